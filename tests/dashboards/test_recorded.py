"""What real loggers wrote is read back as it was logged; what is no run is refused in one sentence."""

import builtins
import math
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_lowrank import LowRankMonitor
from lightning_lowrank.dashboards import recorded
from lightning_lowrank.dashboards.recorded import RecordedRun, Series, read_run
from tests.conftest import FOREIGN_WARNINGS, RowLogger, make_classifier, make_loader, make_trainer, mlp

HPARAMS = {"lr": 0.1, "name": "small", "sizes": [6, 16], "nested": {"decay": 1e-2, "none": None}}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[Path, list, str]:
    """A run with all three loggers and validation; their folder, the rows of a logger that keeps them, W&B's id."""
    folder, rows = tmp_path_factory.mktemp("logged"), RowLogger()
    loggers = [
        CSVLogger(folder, name="csv"),
        TensorBoardLogger(folder, name="tb"),
        WandbLogger(offline=True, save_dir=folder, project="test"),
    ]
    # Slow enough for windows to have a value.
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-2))
    module.save_hyperparameters(HPARAMS)
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", module.training_step(batch, batch_idx))
    monitor = LowRankMonitor(gradient="window", window_size=3, spectral="full")
    trainer = make_trainer(logger=[*loggers, rows], callbacks=[monitor], max_epochs=6)
    with warnings.catch_warnings():
        for message in FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        trainer.fit(module, make_loader(), make_loader(seed=1))
    run = loggers[2].experiment
    run.log({"table": wandb.Table(columns=["a"], data=[[1]]), "drawn": wandb.Histogram([1, 2]), "said": "text"})
    run.log({"yes": True, "up": math.inf, "down": -math.inf, "in": {"deep": 2}, "nothing": None})
    run.finish()
    return folder, rows.rows, run.id


@pytest.mark.parametrize(
    ("place", "source"), [("csv", "CSV"), ("tb/version_0", "TensorBoard"), ("wandb", "W&B")], ids=lambda name: name
)
def test_every_key_is_read_back_with_the_steps_and_values_that_were_logged(logged, place, source):
    folder, rows, run_id = logged
    run = read_run(folder / place)
    names = {"CSV": "csv/version_0", "TensorBoard": "tb/version_0", "W&B": run_id}
    assert (run.name, run.source) == (names[source], source)
    # In W&B the monitor's own settings stand beside them.
    assert {key: value for key, value in run.config.items() if key != "lowrank"} == HPARAMS
    keys = {key for _, row in rows for key in row}
    assert len([key for key in keys if key.startswith("lowrank/")]) > 30
    extra = {"TensorBoard": {"hp_metric"}, "W&B": {"up", "down", "in.deep"}, "CSV": set()}
    assert run.series.keys() == keys | extra[source]
    for key in keys:
        points = [(step, row[key]) for step, row in rows if key in row]
        assert run.series[key].steps == [step for step, _ in points], key
        expected = np.array([value for _, value in points])
        if source == "TensorBoard":
            expected = expected.astype(np.float32).astype(np.float64)
        assert np.array_equal(run.series[key].values, expected, equal_nan=True), key
    alignment = run.series["lowrank/alignment"].values
    assert any(map(math.isnan, alignment))
    assert any(map(math.isfinite, alignment))


def test_wandb_values_that_json_does_not_know(logged):
    series = read_run(logged[0] / "wandb").series
    assert (series["up"].values, series["down"].values) == ([math.inf], [-math.inf])
    # The last row of Lightning says where it was logged.
    assert series["in.deep"] == Series([17], [2.0])


def test_a_run_is_found_by_its_folder_its_file_and_a_folder_above_it(logged):
    folder, _, _ = logged
    offline = next((folder / "wandb").glob("offline-run-*"))
    above = {"csv": folder / "csv", "tb": folder / "tb", "wandb": folder / "wandb"}
    files = {
        "csv": folder / "csv/version_0/metrics.csv",
        "tb": next((folder / "tb/version_0").glob("*tfevents*")),
        "wandb": next(offline.glob("*.wandb")),
    }
    for kind, path in above.items():
        found = read_run(path).series
        for other in (files[kind], str(files[kind].parent)):
            again = read_run(other).series
            assert found.keys() == again.keys()
            assert all(found[key].steps == again[key].steps for key in found)
    with pytest.raises(ValueError, match=r"holds 3 runs, choose one: .*csv/version_0, .*tb/version_0, .*\.wandb$"):
        read_run(folder)


def test_rows_in_csv_go_before_those_of_tensorboard(tmp_path):
    for logger in (CSVLogger(tmp_path, version=0), TensorBoardLogger(tmp_path, version=0)):
        logger.log_metrics({"value": 0.1}, step=3)
        logger.save()
        logger.finalize("success")
    run = read_run(tmp_path)
    assert (run.source, run.series) == ("CSV", {"value": Series([3], [0.1])})


def test_files_of_a_resumed_run_are_read_in_order_as_tensorboard_reads_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for suffix, steps, purge in (("a", range(5), None), ("b", range(3, 7), None), ("c", range(5, 8), 5)):
        writer = SummaryWriter(tmp_path, purge_step=purge, filename_suffix=f".{suffix}")
        for step in steps:
            writer.add_scalar("value", step + ord(suffix), step)
            writer.add_histogram("weights", np.arange(3), step)
        if suffix == "a":
            writer.add_scalar("early", 1.0, 6)
        writer.close()
    # Within a second file names do not tell the order of the files.
    for number, path in enumerate(sorted(tmp_path.glob("*tfevents*"), key=lambda path: path.suffix)):
        path.rename(tmp_path / f"events.out.tfevents.{number}")
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    found = [(event.step, event.value) for event in events.Scalars("value")]
    assert [step for step, _ in found] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert read_run(tmp_path).series == {"value": Series([step for step, _ in found], [value for _, value in found])}


def test_what_a_run_has_written_so_far_is_read(logged, tmp_path):
    folder, _, _ = logged
    whole = {place: read_run(folder / place).series["train_loss"] for place in ("csv", "tb", "wandb")}
    files = {
        "csv": folder / "csv/version_0/metrics.csv",
        "tb": next((folder / "tb/version_0").glob("*tfevents*")),
        "wandb": next(folder.glob("wandb/*/*.wandb")),
    }
    for place, path in files.items():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2])
        read = read_run(tmp_path / path.name).series["train_loss"]
        count = len(read.steps)
        assert 0 < count < len(whole[place].steps)
        assert read == Series(whole[place].steps[:count], whole[place].values[:count])


def test_damage_inside_a_wandb_file_is_said(logged, tmp_path):
    content = bytearray(next(logged[0].glob("wandb/*/*.wandb")).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "run-x.wandb").write_bytes(content)
    with pytest.warns(UserWarning, match=r"run-x\.wandb is damaged, and some rows may be missing: .*checksum mismatch"):
        run = read_run(tmp_path / "run-x.wandb")
    assert "train_loss" in run.series


def event(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + bytes(4) + data + bytes(4)


# The name of the file, its content, and what is said about it.
REFUSED = {
    "empty.csv": (b"", r"has no column 'step', so it is not from CSVLogger; or it is empty"),
    "other.csv": (b"epoch,loss\n1,2\n", r"has no column 'step'"),
    "header.csv": (b"step,loss\n", r"holds no logged numbers; if its run is still going on"),
    "cut.csv": (b"step,loss\n1,0.25", r"holds no logged numbers"),
    "binary.csv": (bytes(range(256)) * 40, r"is no table of comma-separated values: 'utf-8' codec can't decode"),
    "nul.csv": (b"step,loss\n1,\0\n", r"line contains NUL|line 2: '\\x00' is no number"),
    "long.csv": (b'step,loss\n1,"' + b"1" * 200_000 + b'"\n', r"field larger than field limit"),
    "text.csv": (b"step,loss\n1,0.5\n2,low\n", r"line 3: 'low' is no number"),
    "step.csv": (b"step,loss\n1.5,0.5\n", r"line 2: step '1.5' is no whole number"),
    "none.csv": (b"step,loss\n,0.5\n", r"line 2: '' is no number"),
    "nan.csv": (b"step,loss\nnan,0.5\n", r"line 2: step 'nan' is no whole number"),
    "wide.csv": (b"step,loss\n1,0.5,3\n", r"line 2: 3 cells under 2 columns"),
    "several.csv": (b"run,step,loss\na,1,0.5\n", r"holds several runs, as its column 'run' says; choose the folder"),
    "empty.tfevents": (b"", r"holds no logged numbers"),
    "random.tfevents": (bytes(range(256)) * 40, r"holds no logged numbers"),
    "huge.tfevents": (struct.pack("<Q", 2**63) + bytes(40), r"holds no logged numbers"),
    "damaged.tfevents": (event(b"\xff\xff\xff"), r"is damaged: it holds something that is no event of TensorBoard"),
    "empty.wandb": (b"", r"holds no logged numbers"),
    "random.wandb": (bytes(range(256)) * 40, r"can't be read by `wandb leet inspect`: .*invalid W&B identifier"),
    "weights.ckpt": (b"PK\x03\x04", r"is no run: expected metrics\.csv of CSVLogger, events\.out\.tfevents\.\.\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_run_is_refused_in_one_sentence(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_run(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_lines_that_csv_allows(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"\xef\xbb\xbfstep,loss,late\r\n1.0,nan,\r\n\r\n2,-inf,0.5\r\n")
    series = read_run(tmp_path).series
    assert (series["loss"].steps, series["late"]) == ([1, 2], Series([2], [0.5]))
    assert str(series["loss"].values) == "[nan, -inf]"


def test_folders_with_no_run_and_with_many(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder 'missing'"):
        read_run("missing")
    with pytest.raises(ValueError, match=r"there is no run in .*: looked for metrics\.csv \(CSVLogger\), events"):
        read_run(tmp_path)
    for number in range(25):
        logger = CSVLogger(tmp_path, name="runs", version=f"run{number:02}")
        logger.log_metrics({"value": 1.0}, step=0)
        logger.save()
    with pytest.raises(ValueError, match=r"holds 25 runs, choose one: \S+run00, .*run19 and 5 more$") as caught:
        read_run(tmp_path)
    assert "run20" not in str(caught.value)
    assert read_run(tmp_path / "runs/run07").name == "run07"
    (tmp_path / "latest").symlink_to(tmp_path / "runs/run07")
    with pytest.raises(ValueError, match="holds 25 runs"):
        read_run(tmp_path)


def test_several_wandb_runs_are_listed(logged, tmp_path):
    path = next(logged[0].glob("wandb/*/*.wandb"))
    for name in ("run-a", "offline-run-b"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "wandb" / name)
    with pytest.raises(ValueError, match=r"holds 2 runs, choose one: \S+offline-run-b/run-\S+, \S+run-a/run-\S+$"):
        read_run(tmp_path / "wandb")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
CONFIGS = {
    "plain": ("a: 1\nb: {c: [x, null, 0.5]}\n", {"a": 1, "b": {"c": ["x", None, 0.5]}}),
    "shared": ("a: &a [1, 2]\nb: *a\n", {"a": [1, 2], "b": [1, 2]}),
    "dates": ("a: 2024-01-02\n1: !!set {x}\nb: !!binary QQ==\n", {"a": "2024-01-02", "1": ["x"], "b": "b'A'"}),
    "code": ("a: !!python/object/apply:os.mkdir [trace]\n", {}),
    "tuple": ("a: !!python/tuple [1, 2]\n", {}),
    "bomb": (BOMB, {}),
    "circle": ("a: &a [*a]\n", {}),
    "deep": ("a: " + "[" * 600, {}),
    "no date": ("a: 2024-99-99\n", {}),
    "list": ("- a\n", {}),
    "empty": ("", {}),
    "damaged": ("a: [\n", {}),
    "binary": ("a: \x00", {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hyperparameters_are_plain_data_or_left_out(name, tmp_path):
    text, config = CONFIGS[name]
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    (tmp_path / "hparams.yaml").write_text(text)
    assert read_run(tmp_path) == RecordedRun(tmp_path.name, "CSV", {"loss": Series([1], [0.5])}, config)
    assert not (tmp_path / "trace").exists()


def test_packages_that_are_not_there_are_named(logged, tmp_path, monkeypatch):
    offline = next(logged[0].glob("wandb/*/*.wandb"))
    monkeypatch.setattr(recorded.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb: pip install -U 'lightning-lowrank\[wandb\]'"):
        read_run(offline)
    # A wandb from before the command; click says so with these words.
    (old := tmp_path / "wandb").write_text("#!/bin/sh\necho \"Error: No such command 'leet'.\" >&2\nexit 2\n")
    old.chmod(0o755)
    assert subprocess.run([old], check=False, capture_output=True).returncode == 2
    monkeypatch.setattr(recorded.shutil, "which", lambda *args, **kwargs: str(old))
    with pytest.raises(ModuleNotFoundError, match=r"has no command `leet inspect` to read a run with: pip install -U"):
        read_run(offline)
    real = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ModuleNotFoundError, match="needs tensorboard: pip install tensorboard"):
        read_run(logged[0] / "tb")
