"""What W&B runs hold: offline ones read back by W&B's own command, an online one from the stand-in for its server."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_lowrank import LowRankMonitor, demo
from lightning_lowrank.cli import main
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp
from tests.dashboards.offline import number, offline_runs
from tests.dashboards.wandb_stub import WandbStub

wandb = pytest.importorskip("wandb")

# The scalars of a run whose weight decay is coupled, those of decoupled decay, and those of every matrix.
COUPLED = [
    "alignment",
    "residual",
    "alignment_minibatch",
    "residual_minibatch",
    "radial_balance",
    "radial_balance_stderr",
    "implied_weight_decay",
    "norm_spread",
    "homogeneity_defect",
    "stable_rank",
    "spectral_ratio",
    "cumulative_decay",
    "norm_gap",
    "norm_gap_predicted",
    "steps_to_stationarity",
    "overhead",
]
DECOUPLED = ["update_alignment", "update_residual"]
OF_LAYERS = ["alignment", "frobenius_norm", "spectral_norm", "stable_rank", "effective_rank", "implied_weight_decay"]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_STEPS", 400)
        patch.chdir(output)
        assert main(["demo", "--wandb", "offline", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def demo_runs(demo_folder):
    """The runs of the demo by name."""
    return {run.name: run for run in offline_runs(demo_folder)}


def test_one_command_makes_a_run_per_network_and_per_merge(demo_runs):
    assert sorted(demo_runs) == [
        "merge-seed0-wd0",
        "merge-seed0-wd0.005",
        "seed0-wd0-digits-0-4",
        "seed0-wd0-digits-5-9",
        "seed0-wd0.005-digits-0-4",
        "seed0-wd0.005-digits-5-9",
    ]


@pytest.mark.parametrize("name", ["seed0-wd0.005-digits-0-4", "seed0-wd0-digits-5-9"])
def test_every_key_reads_back_with_its_step_and_value(demo_folder, demo_runs, name):
    with (demo_folder / "runs" / name / "metrics.csv").open() as file:
        expected = list(csv.DictReader(file))
    rows = demo_runs[name].rows
    assert [row["trainer/global_step"] for row in rows] == [int(row["step"]) for row in expected]
    assert [int(row["step"]) for row in expected] == list(range(49, 400, 50))
    layers = ["net.0.weight", "net.2.weight", "net.4.weight"]
    keys = [f"lowrank/{key}" for key in COUPLED] + [f"lowrank/{key}/{layer}" for key in OF_LAYERS for layer in layers]
    assert set(keys) <= set(expected[0])
    for key in (key for key in expected[0] if key.startswith("lowrank/")):
        for row, wanted in zip(rows, expected, strict=True):
            # The CSV file's values are rounded to what Python prints of them, which reads back exactly.
            assert number(row[key]) == pytest.approx(float(wanted[key]), rel=1e-12, nan_ok=True), key
    nans = [key for key in keys if rows[-1][key] == "NaN"]
    assert ("lowrank/alignment" in nans) is ("wd0-" in name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_keys_of_decoupled_decay_read_back(tmp_path, kind):
    def optimizer(parameters):
        if kind == "adamw":
            return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        return torch.optim.Muon(parameters, lr=1e-2)

    if not hasattr(torch.optim, "Muon") and kind == "muon":
        pytest.skip("this torch has no Muon")
    from lightning.pytorch.loggers import WandbLogger

    rows = RowLogger()
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="test")
    trainer = make_trainer(logger=[rows, logger], callbacks=[LowRankMonitor(spectral_budget=1.0)])
    trainer.fit(make_classifier(mlp(), optimizer=optimizer), make_loader())
    logger.experiment.finish()
    [recorded] = offline_runs(tmp_path)
    found = recorded.rows
    expected = rows.ours()
    bound = "linf_decay" if kind == "adamw" else "spectral_decay"
    assert {f"lowrank/{key}" for key in [*DECOUPLED, bound]} <= set(expected[0][1])
    assert [row["trainer/global_step"] for row in found] == [step for step, _ in expected]
    for row, (_, wanted) in zip(found, expected, strict=True):
        for key, value in wanted.items():
            assert number(row[key]) == pytest.approx(value, rel=1e-12, nan_ok=True)
    assert recorded.config["lowrank"]["optimizers"][0]["target"] == [
        "fixed point of its own direction and decoupled decay"
    ]


def test_configuration_has_target_regimes_and_settings(demo_runs):
    config = demo_runs["seed0-wd0.005-digits-0-4"].config["lowrank"]
    assert config["optimizers"] == [
        {
            "class": "SGD",
            "target": ["stationary point of the L2-regularised loss"],
            "weight_decay": [0.005],
            "full_batch_values": "step",
            "matrices": 3,
        }
    ]
    layers = ["net.0.weight", "net.2.weight", "net.4.weight"]
    assert config["regimes"] == {"homogeneous": layers, "scale-invariant": [], "other": [], "undecided": []}
    assert config["settings"]["spectral"] == "full"
    assert config["settings"]["gradient"] == "auto"
    assert config["settings"]["weight_decay"] == "auto"
    assert config["settings"]["spectral_budget"] == 1.0
    without = demo_runs["seed0-wd0-digits-0-4"].config["lowrank"]
    assert without["optimizers"][0]["target"] == ["none: no weight decay"]


def test_summary_has_the_last_and_the_best_finite_values(demo_runs):
    run = demo_runs["seed0-wd0.005-digits-0-4"]
    for key, target in (("alignment", 1), ("residual", 0), ("norm_spread", 1), ("radial_balance", 1)):
        values = [found for row in run.rows if math.isfinite(found := number(row[f"lowrank/{key}"]))]
        assert run.summary[f"lowrank/{key}"] == values[-1]
        assert run.summary[f"lowrank/best/{key}"] == min(values, key=lambda value: abs(value - target))
    assert "lowrank/best/stable_rank" not in run.summary


def test_missing_values_do_not_reach_the_summary(tmp_path):
    from lightning_lowrank.dashboards.weights_and_biases import Board

    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True))
    board = Board(run, "lowrank")
    for value in (math.nan, 0.5, 0.9, 0.7, math.nan):
        row = {"lowrank/alignment": value, "lowrank/optimizer_1/residual": value, "lowrank/overhead": math.nan}
        run.log(row)
        board.summarise(row)
    run.finish()
    [recorded] = offline_runs(tmp_path)
    summary = recorded.summary
    assert summary["lowrank/alignment"] == 0.7
    assert summary["lowrank/best/alignment"] == 0.9
    assert summary["lowrank/optimizer_1/residual"] == 0.7
    assert summary["lowrank/best/optimizer_1/residual"] == 0.5
    assert summary["lowrank/overhead"] == "NaN"


def test_the_best_of_an_earlier_fit_is_kept(tmp_path):
    from lightning_lowrank.dashboards.weights_and_biases import Board

    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True))
    for values in ((0.5, 0.9), (0.7, 0.8)):
        board = Board(run, "lowrank")
        for value in values:
            run.log({"lowrank/alignment": value})
            board.summarise({"lowrank/alignment": value})
    run.finish()
    [recorded] = offline_runs(tmp_path)
    assert recorded.summary["lowrank/alignment"] == 0.8
    assert recorded.summary["lowrank/best/alignment"] == 0.9


def test_tables_come_with_rows_1_2_4_8_and_at_the_end(demo_folder, demo_runs):
    run = demo_runs["seed0-wd0.005-digits-0-4"]
    tables = run.tables("lowrank/layers")
    assert [row["trainer/global_step"] for row, _ in tables] == [49, 99, 199, 399]
    table = tables[-1][1]
    assert table["columns"][:3] == ["layer", "shape", "regime"]
    first = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (first["layer"], first["shape"], first["regime"]) == ("net.0.weight", "192x128", "homogeneous")
    assert first["evidence"].startswith("homogeneous: trades a factor with")
    last = run.rows[-1]
    for key in OF_LAYERS:
        assert first[key] == pytest.approx(last[f"lowrank/{key}/net.0.weight"], rel=1e-12)


def test_the_chart_has_the_singular_values(demo_folder, demo_runs):
    run = demo_runs["seed0-wd0.005-digits-0-4"]
    table = run.tables("lowrank/spectra_table")[-1][1]
    weights = torch.load(demo_folder / "runs" / "seed0-wd0.005-digits-0-4" / "network.ckpt", weights_only=True)
    # The last row was measured before the last step, whose learning rate was next to 0.
    for layer in ("net.0.weight", "net.4.weight"):
        expected = torch.linalg.svdvals(weights["state_dict"][layer].double())
        points = {index: (value, ratio) for name, index, value, ratio in table["data"] if name == layer}
        assert {1, 2, len(expected)} <= set(points)
        for index, (value, ratio) in points.items():
            assert value == pytest.approx(expected[index - 1].item(), rel=1e-3, abs=1e-5 * expected[0].item())
            assert ratio == pytest.approx(value / points[1][0])
    chart = run.config["_wandb.visualize.lowrank/spectra"]
    assert chart["panel_config"]["panelDefId"] == "wandb/line/v0"


def test_merge_tables_and_chart(demo_folder, demo_runs):
    run = demo_runs["merge-seed0-wd0.005"]
    report = json.loads((demo_folder / "merges" / "seed0-wd0.005.ckpt.card.json").read_text())
    [(_, table)] = run.tables("merge/table")
    assert [row[0] for row in table["data"]] == report["models"]
    for row in table["data"]:
        for column, value in zip(table["columns"][1:], row[1:], strict=True):
            metric, task = column.split(" on ")
            assert value == pytest.approx(report["metrics"][f"{task}/{row[0]}/{metric}"])
    [(_, bars)] = run.tables("merge/bars_table")
    assert ["sum on digits 0-4", report["metrics"]["digits 0-4/sum/joint_accuracy"]] in bars["data"]
    [(_, leaks)] = run.tables("merge/leak")
    assert leaks["columns"] == ["layer", "digits 0-4", "digits 5-9"]
    first = report["leak"]
    assert leaks["data"][0][1:] == pytest.approx([first[task]["net.0.weight"] for task in leaks["columns"][1:]])
    assert run.summary["merge/digits 5-9/average/test_loss"] == report["metrics"]["digits 5-9/average/test_loss"]
    assert run.config["merge"]["tasks"] == {"digits 0-4": "m1", "digits 5-9": "m2"}


def test_the_merged_checkpoint_has_its_card_and_its_parents_digests(demo_folder, demo_runs):
    import blake3

    run = demo_runs["merge-seed0-wd0.005"]
    [merged] = [artifact for artifact in run.artifacts if artifact["type"] == "model"]
    assert merged["name"] == "seed0-wd0.005"
    names = ["seed0-wd0.005.ckpt", "seed0-wd0.005.ckpt.card.json", "seed0-wd0.005.ckpt.card.md"]
    assert sorted(entry["path"] for entry in merged["manifest"]["contents"]) == names
    metadata = merged["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    digests = [found["files"]["network.ckpt"]["blake3"] for found in metadata["inputs"]]
    files = [demo_folder / "runs" / f"seed0-wd0.005-digits-{half}" / "network.ckpt" for half in ("0-4", "5-9")]
    assert digests == [blake3.blake3(file.read_bytes()).hexdigest() for file in files]
    output = demo_folder / "merges" / names[0]
    assert metadata["output"]["blake3"] == blake3.blake3(output.read_bytes()).hexdigest()
    assert "tensors" not in metadata


def test_a_run_of_a_merge_alone_reads_back(demo_folder, demo_runs):
    from lightning_lowrank.dashboards.page import run_page
    from lightning_lowrank.dashboards.recorded import read_run

    recorded = demo_runs["merge-seed0-wd0.005"]
    report = json.loads((demo_folder / "merges" / "seed0-wd0.005.ckpt.card.json").read_text())
    run = read_run(recorded.folder)
    assert {key: found.values for key, found in run.series.items()} == {
        f"merge/{key}": [pytest.approx(value)] for key, value in report["metrics"].items()
    }
    assert "digits 5-9" in run_page(run)


def test_rows_of_your_own_belong_to_the_last_step_and_the_best_is_no_series(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    from lightning_lowrank.dashboards.recorded import read_run

    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True))
    trainer = make_trainer(logger=WandbLogger(experiment=run), callbacks=[LowRankMonitor()])
    trainer.fit(make_classifier(mlp()), make_loader())
    run.log({"after": 3.0})
    run.summary["only here"] = 4.0
    run.finish()
    [recorded] = offline_runs(tmp_path)
    series = read_run(recorded.folder).series
    assert (series["after"].steps, series["after"].values) == ([5], [3.0])
    assert (series["only here"].steps, series["only here"].values) == ([5], [4.0])
    assert not [key for key in series if "/best/" in key or "layers" in key]


def test_a_run_that_someone_else_started_gets_its_axis_and_the_loggers_prefix(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True))
    run.log({"mine": 1})
    logger = WandbLogger(experiment=run, prefix="student")
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(prefix="wd")])
    trainer.fit(make_classifier(mlp()), make_loader())
    run.finish()
    [recorded] = offline_runs(tmp_path)
    found = recorded
    metrics = [record["metric"] for record in found.records if record["type"] == "metric"]
    axes = {metric.get("glob_name") or metric.get("name"): metric.get("step_metric") for metric in metrics}
    assert axes["student-wd/*"] == "trainer/global_step"
    rows = [row for row in found.history if "student-wd/overhead" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(6))
    assert math.isfinite(found.summary["student-wd/best/radial_balance"])
    assert found.config["student-wd"]["settings"]["gradient"] == "auto"
    assert len(found.tables("student-wd/layers")) == 4


def test_a_large_model_has_one_table_instead_of_keys(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(40)), nn.Linear(6, 3))
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="test")
    monitor = LowRankMonitor(spectral="full", spectral_budget=1.0, spectral_every_n_steps=3)
    trainer = make_trainer(logger=logger, callbacks=[monitor])
    trainer.fit(make_classifier(net), make_loader())
    logger.experiment.finish()
    [recorded] = offline_runs(tmp_path)
    run = recorded
    assert not [key for key in run.rows[0] if key.endswith(".weight")]
    tables = run.tables("lowrank/layers")
    # With an interval of its own: with the first row, and every three steps.
    assert [row["trainer/global_step"] for row, _ in tables] == [0, 2, 5]
    columns, data = tables[-1][1]["columns"], tables[-1][1]["data"]
    assert len(data) == 41
    ranks = sorted(row[columns.index("stable_rank")] for row in data)
    assert torch.tensor(ranks).double().median().item() == pytest.approx(run.rows[-1]["lowrank/stable_rank/q50"])


def test_a_failing_board_is_told_of_once_and_ends_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    from lightning_lowrank.dashboards import weights_and_biases

    def broken(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(weights_and_biases.Board, "tables", broken)
    rows = RowLogger()
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="test")
    trainer = make_trainer(logger=[logger, rows], callbacks=[LowRankMonitor()])
    with pytest.warns(UserWarning, match="WandbLogger could not take a row: OSError.'the disk is full'") as caught:
        trainer.fit(make_classifier(mlp()), make_loader())
    logger.experiment.finish()
    assert len([one for one in caught if "could not take" in str(one.message)]) == 1
    assert len(rows.ours()) == 6
    assert trainer.state.finished


MERGE = """
import sys
from pathlib import Path
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning_lowrank import merge_checkpoints

torch.manual_seed(0)
for name in ("one", "two", "base"):
    Path(name).mkdir(exist_ok=True)
    torch.save({"layer.weight": torch.randn(3, 4)}, Path(name) / "last.pt")
report = merge_checkpoints(["one/last.pt", "two/last.pt"], "merged.pt", base="base/last.pt", force=True)
logger = WandbLogger(project="merges", id=sys.argv[1])
parents = sys.argv[2:] or None
report.log(logger, checkpoint="merged.pt", parents=parents)
logger.experiment.finish()
"""


def test_lineage_online(tmp_path):
    with WandbStub() as stub:
        for arguments in (["first"], ["second"]):
            run_merge(stub, tmp_path, *arguments)
        used = stub.used["first"]
        assert [artifact.metadata["format"] for artifact in used] == ["state dict"] * 3
        assert len({artifact.name for artifact in used}) == 3
        merged = next(artifact for artifact in stub.artifacts if artifact.collection == "merged")
        assert merged.created_by == "first"
        assert set(merged.files) == {"merged.pt", "merged.pt.card.json", "merged.pt.card.md"}
        assert merged.contents["merged.pt"] == (tmp_path / "merged.pt").read_bytes()
        sources = [*merged.metadata["inputs"], merged.metadata["base"]]
        assert [artifact.metadata["files"] for artifact in used] == [source["files"] for source in sources]
        for artifact, folder in zip(used, ("one", "two", "base"), strict=True):
            # Nothing of a parent is uploaded: it is recorded where it lies.
            assert artifact.contents == {}
            assert artifact.files["last.pt"]["ref"] == (tmp_path / folder / "last.pt").as_uri()
        # The same files are the same artifacts in every merge.
        assert [artifact.name for artifact in stub.used["second"]] == [artifact.name for artifact in used]
        run_merge(stub, tmp_path, "third", *(f"team/merges/{artifact.name}" for artifact in used))
        assert stub.used["third"] == used
        assert stub.unknown == []
        assert stub.escaped == []


def run_merge(stub, folder, *arguments):
    command = [sys.executable, "-c", MERGE, *arguments]
    done = subprocess.run(
        command, env=stub.environment(folder), cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def merge(tmp_path):
    """A merge of two files, and a run that is offline but does not say so."""
    from lightning_lowrank import merge_checkpoints

    torch.manual_seed(0)
    for name in ("one", "two"):
        torch.save({"weight": torch.randn(3, 4)}, tmp_path / f"{name}.pt")

    class Run:
        offline = False

        def use_artifact(self, artifact):
            raise AssertionError("nothing is used before everything is checked")

    return merge_checkpoints([tmp_path / "one.pt", tmp_path / "two.pt"], tmp_path / "merged.pt"), Run()


def test_parents_that_are_gone_or_changed_are_no_lineage(tmp_path, merge):
    from lightning_lowrank.dashboards.merges import log_artifact

    report, run = merge
    with pytest.raises(ValueError, match=r"parents must name 2 artifacts, the base last, got \['a'\]"):
        log_artifact(run, report, tmp_path / "merged.pt", ["a"])
    with pytest.raises(ValueError, match=r"the report is of 'merged.pt', not of 'other.pt'"):
        log_artifact(run, report, tmp_path / "other.pt", None)
    torch.save({"weight": torch.randn(3, 4)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two.pt is no longer what was merged: its blake3 is not the card's"):
        log_artifact(run, report, tmp_path / "merged.pt", None)
    (tmp_path / "one.pt").unlink()
    with pytest.raises(ValueError, match=r"one.pt is gone, so it can't be recorded as a parent"):
        log_artifact(run, report, tmp_path / "merged.pt", None)
    report.card.clear()
    (tmp_path / "merged.pt.card.json").unlink()
    with pytest.raises(ValueError, match=r"has no merge card merged.pt.card.json beside it"):
        log_artifact(run, report, tmp_path / "merged.pt", None)
