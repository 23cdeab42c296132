"""inspect_weights against numpy's decomposition in float64, from modules, state dicts and files; and its report."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_lowrank import WeightReport, inspect_weights
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp


def svd(tensor):
    matrix = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
    return np.linalg.svd(matrix, compute_uv=False)


def same(one, other):
    """NaN differs from itself, but not its text."""
    return repr([replace(row, singular_values=()) for row in one.matrices]) == repr(
        [replace(row, singular_values=()) for row in other.matrices]
    ) and [row.singular_values for row in one.matrices] == [row.singular_values for row in other.matrices]


def check(row, blocks, rel=1e-9):
    """A row against the singular values of the blocks, by the formulas' own definitions."""
    sigma = np.sort(np.concatenate([svd(block) for block in blocks]))[::-1]
    squares = sigma**2
    share = sigma / sigma.sum()
    share = share[share > 0]
    assert row.singular_values == pytest.approx(sigma, rel=rel, abs=1e-12 * sigma[0])
    assert row.frobenius_norm == pytest.approx(math.sqrt(squares.sum()), rel=rel)
    assert row.spectral_norm == pytest.approx(sigma[0], rel=rel)
    assert row.stable_rank == pytest.approx(squares.sum() / squares[0], rel=rel)
    assert row.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=rel)
    assert row.energy_outside_1 == pytest.approx(squares[1:].sum() / squares.sum(), rel=rel, abs=1e-14)
    assert row.energy_outside_8 == pytest.approx(squares[8:].sum() / squares.sum(), rel=rel, abs=1e-14)
    assert row.rms_entry == pytest.approx(math.sqrt(squares.sum() / sum(block.numel() for block in blocks)), rel=rel)
    threshold = sigma[0] * max(blocks[0].shape) * torch.finfo(blocks[0].dtype).eps
    expected = (sigma > threshold).sum()
    assert row.numerical_rank == pytest.approx(expected if expected else math.nan, nan_ok=True)
    assert (row.shape, row.groups) == (tuple(blocks[0].shape), len(blocks))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_values_are_those_of_the_oracle_in_every_type(dtype):
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64 if not dtype.is_complex else torch.complex128)
    low = torch.outer(weight[:, 0], weight[0])
    report = inspect_weights({"a": weight.to(dtype), "low": low.to(dtype)})
    for row, exact in zip(report.matrices, (weight, low), strict=True):
        check(row, [exact.to(dtype)])
        assert row.dtype == str(dtype).removeprefix("torch.")
    assert report.matrices[1].numerical_rank == (1 if torch.finfo(dtype).eps < 1e-6 else pytest.approx(1, nan_ok=True))


def test_every_kind_of_layer_in_one_module():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 12, 3),
            "grouped": nn.Conv2d(12, 8, 3, groups=4),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "up": nn.ConvTranspose2d(8, 4, 2, groups=2),
            "attn": nn.MultiheadAttention(8, 2),
            "rnn": nn.GRU(8, 5),
            "norm": nn.LayerNorm((4, 4)),
            "scaled": nn.utils.parametrizations.weight_norm(nn.Linear(5, 10)),
            "thin": nn.Linear(10, 1),
        }
    ).double()
    report = inspect_weights(net)
    rows = {row.name: row for row in report.matrices}
    weight = {name: value.detach() for name, value in net.named_parameters()}
    check(rows["conv.weight"], [weight["conv.weight"].flatten(1)])
    check(rows["grouped.weight"], list(weight["grouped.weight"].reshape(4, 2, 27)))
    check(rows["depthwise.weight"], list(weight["depthwise.weight"].reshape(8, 1, 9)))
    check(rows["up.weight"], list(weight["up.weight"].reshape(2, 4, 8)))
    for i, part in enumerate(("query", "key", "value")):
        check(rows[f"attn.in_proj_weight[{part}]"], [weight["attn.in_proj_weight"][8 * i : 8 * i + 8]])
    for i, part in enumerate(("reset", "update", "new")):
        check(rows[f"rnn.weight_hh_l0[{part}]"], [weight["rnn.weight_hh_l0"][5 * i : 5 * i + 5]])
    check(rows["scaled.weight"], [net["scaled"].weight.detach()])
    check(rows["thin.weight"], [weight["thin.weight"]])
    assert len(rows) == 4 + 3 + 1 + 6 + 2
    assert report.left_out == {"norm.weight": "not a matrix", "norm.bias": "not a matrix"}
    # Nothing but the two that a state dict can't tell is read otherwise.
    other = inspect_weights(net.state_dict(), matrices={"grouped.weight": "groups:4", "up.weight": "groups:2"})
    assert [row.name for row in other.matrices] == list(rows)
    assert all(
        mine.singular_values == other.singular_values for mine, other in zip(rows.values(), other.matrices, strict=True)
    )


def test_a_circular_convolution_has_its_operators_norm_beside_that_of_the_patches():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False, groups=2).double()
    basis = torch.eye(2 * 5 * 4, dtype=torch.float64).reshape(-1, 2, 5, 4)
    with torch.no_grad():
        operator = layer(basis).flatten(1).mT
    [row] = inspect_weights(layer, matrices={"weight": "circular:5x4"}).matrices
    assert row.operator_norm == pytest.approx(svd(operator)[0], rel=1e-9)
    check(row, list(layer.weight.detach().reshape(2, 2, 9)))
    assert math.isnan(inspect_weights(layer).matrices[0].operator_norm)


def test_what_is_not_finite_is_named_once_and_the_rest_goes_on():
    net = mlp().double()
    expected = inspect_weights(net).matrices
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
        net[2].weight[0, 0] = math.inf
    with pytest.warns(RuntimeWarning, match=r"not finite, so values are NaN: 0.weight, 2.weight") as caught:
        report = inspect_weights(net)
    assert len(caught) == 1
    for row in report.matrices[:2]:
        assert not row.finite
        assert row.singular_values == ()
        numbers = [value for value in vars(row).values() if isinstance(value, float)]
        assert len(numbers) == 9
        assert all(map(math.isnan, numbers))
    assert repr(report.matrices[2]) == repr(expected[2])
    assert "0.weight, 2.weight" in str(report)


def test_zeros_empty_and_huge_matrices():
    huge = torch.eye(3, dtype=torch.float64) * 1e30
    report = inspect_weights(
        {"zero": torch.zeros(3, 4), "empty": torch.zeros(0, 4), "huge": huge, "tiny": huge * 1e-60}
    )
    zero, empty, huge, tiny = report.matrices
    assert (zero.spectral_norm, zero.frobenius_norm, zero.numerical_rank) == (0, 0, 0)
    assert math.isnan(zero.stable_rank)
    assert (empty.shape, empty.spectral_norm) == ((0, 4), 0)
    assert [huge.stable_rank, tiny.stable_rank] == pytest.approx([3, 3])


def test_the_fast_way_has_norms_alone():
    net = nn.Sequential(nn.Linear(200, 150), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    full, fast = inspect_weights(net), inspect_weights(net, spectra="norm")
    for one, other in zip(full.matrices, fast.matrices, strict=True):
        assert other.spectral_norm == pytest.approx(one.spectral_norm, rel=1e-3)
        assert other.stable_rank == pytest.approx(one.stable_rank, rel=2e-3)
        assert other.singular_values == ()
        assert math.isnan(other.effective_rank)
    with pytest.raises(ValueError, match=r"spectra must be one of \('full', 'norm'\), got 'all'"):
        inspect_weights(net, spectra="all")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_integers_and_codes_are_left_out_with_the_reason():
    tensors = {
        "w": torch.randn(3, 3),
        "ids": torch.zeros(2, 2, dtype=torch.int64),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "codes": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8),
        "meta": torch.zeros(2, 2, device="meta"),
        "counter": torch.tensor(3),
    }
    report = inspect_weights(tensors)
    assert [row.name for row in report.matrices] == ["w"]
    assert report.left_out == {
        "ids": "entries of type int64",
        "mask": "entries of type bool",
        "codes": "entries of type float8_e4m3fn",
        "quantised": "entries of type qint8",
        "meta": "no data: on the meta device",
    }


def test_include_exclude_and_arguments_that_leave_nothing():
    net = mlp()
    assert [row.name for row in inspect_weights(net, include=["0.*", "2.*"], exclude="2.*").matrices] == ["0.weight"]
    with pytest.raises(
        ValueError, match=r"'nothing' matches no weight matrix; there are: 0.weight, 2.weight, 4.weight"
    ):
        inspect_weights(net, include="nothing")
    with pytest.raises(ValueError, match="Sequential has no weight matrix to inspect that is included"):
        inspect_weights(net, exclude="*")
    with pytest.raises(ValueError, match="Linear has no weight matrix to inspect"):
        inspect_weights(nn.Linear(2, 2), matrices={"*": None})
    with pytest.raises(ValueError, match="takes a module, a state dict or a path, got a int"):
        inspect_weights(3)
    with pytest.raises(ValueError, match="state dict holds no tensors by name; there is: a"):
        inspect_weights({"a": 1})


def test_the_module_is_left_as_it_is():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    inspect_weights(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_flattened_parameters_are_refused():
    net = nn.Module()
    net._flat_param = nn.Parameter(torch.zeros(9))
    with pytest.raises(ValueError, match="flattened by FSDP; inspect its checkpoint, or"):
        inspect_weights(net)


def test_sharded_parameters_are_gathered_one_at_a_time(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        net = nn.Linear(4, 6)
        expected = inspect_weights(net)
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
        assert same(inspect_weights(net), expected)
        assert same(inspect_weights(net.state_dict()), expected)
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- files


def transformer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16)


def test_files_give_what_the_module_gives(tmp_path):
    net = transformer()
    expected = inspect_weights(net)
    state = net.state_dict()
    save_file(state, tmp_path / "one.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": state, "optimizer": {"lr": 1}}, tmp_path / "nested.pth")
    torch.save({"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "compiled.ckpt")
    folder = tmp_path / "folder"
    folder.mkdir()
    halves = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    places = {}
    for i, half in enumerate(halves):
        save_file(half, folder / f"part-{i}.safetensors")
        places |= dict.fromkeys(half, f"part-{i}.safetensors")
    unindexed = inspect_weights(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    single = tmp_path / "single"
    single.mkdir()
    torch.save(state, single / "a.ckpt")
    (single / "hparams.yaml").write_text("{}")
    sources = [file for file in tmp_path.iterdir() if file.is_file()]
    sources += [folder, folder / "model.safetensors.index.json", single, str(single)]
    assert len(sources) == 9
    by_name = replace(expected, matrices=sorted(expected.matrices, key=lambda row: row.name.partition("[")[0]))
    for source in sources:
        found = inspect_weights(source)
        # Files of safetensors have lost the order.
        assert same(found, expected if str(source).endswith(("pt", "pth", "ckpt", "single")) else by_name), source
    assert same(unindexed, by_name)
    assert inspect_weights(tmp_path / "nested.pth").notes == ["these are the weights under 'model'"]


def test_lightnings_checkpoints_and_averaged_weights(tmp_path):
    from lightning.pytorch.callbacks import WeightAveraging

    module = make_classifier(mlp())
    keep = ModelCheckpoint(tmp_path, filename="last", save_last=False)
    average = WeightAveraging(use_buffers=False, avg_fn=lambda old, new, _: 0.5 * (old + new))
    trainer = make_trainer(callbacks=[keep, average], enable_checkpointing=True)
    trainer.fit(module, make_loader())
    content = torch.load(keep.best_model_path, weights_only=True)
    report = inspect_weights(keep.best_model_path)
    averaged, raw = (content[key]["net.0.weight"] for key in ("state_dict", "current_model_state"))
    check(report.matrices[0], [averaged], rel=1e-6)
    assert not torch.allclose(averaged, raw)
    assert report.notes == ["these are averaged weights (state_dict); the raw ones are in current_model_state"]
    assert [row.name for row in report.matrices] == ["net.0.weight", "net.2.weight", "net.4.weight"]
    assert same(inspect_weights(content), report)


def test_ties_are_counted_once_in_files_too(tmp_path):
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    torch.save(net.state_dict(), tmp_path / "tied.pt")
    for source in (net, net.state_dict(), tmp_path / "tied.pt"):
        report = inspect_weights(source)
        assert [row.name for row in report.matrices] == ["embed.weight"]
    assert report.left_out == {"head.weight": "the same tensor as embed.weight"}


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_is_put_together_from_a_file(tmp_path, dim):
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2), dim=dim),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 1), dim=0 if dim is None else dim),
    )
    expected = inspect_weights(net)
    torch.save(net.state_dict(), tmp_path / "normed.pt")
    found = inspect_weights(tmp_path / "normed.pt")
    assert [row.name for row in found.matrices] == ["0.weight", "1.weight"]
    for one, other in zip(found.matrices, expected.matrices, strict=True):
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-6)
    assert found.left_out == {}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_and_unknown_parametrisations_in_a_state_dict():
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3))
    found = inspect_weights(old.state_dict())
    assert [row.name for row in found.matrices] == ["0.weight", "1.weight"]
    assert found.matrices[0].singular_values == pytest.approx(inspect_weights(old).matrices[0].singular_values)
    unknown = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2))
    found = inspect_weights(unknown.state_dict())
    assert [row.name for row in found.matrices] == ["1.weight"]
    assert set(found.left_out.values()) == {"parametrised in a way that a file does not tell; inspect the module"}


class Evil:
    def __reduce__(self):
        return print, ("this code was run",)


def bad_files(folder):
    """Path and message of everything that can't be read."""
    state = mlp().state_dict()
    torch.save(state, folder / "good.pt")
    save_file(state, folder / "good.safetensors")
    half = {ending: (folder / f"good.{ending}").read_bytes()[:900] for ending in ("pt", "safetensors")}
    (folder / "half.ckpt").write_bytes(half["pt"])
    (folder / "half.safetensors").write_bytes(half["safetensors"])
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.ckpt").write_text("hello world\n" * 20)
    (folder / "text.safetensors").write_text("hello world\n" * 20)
    (folder / "index.index.json").write_text("[]")
    (folder / "absent.index.json").write_text('{"weight_map": {"a": "nowhere.safetensors"}}')
    (folder / "wrong.index.json").write_text('{"weight_map": {"nothing": "good.safetensors"}}')
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 1}, folder / "none.pt")
    torch.save({"state_dict": {}}, folder / "nothing.ckpt")
    torch.save({"state_dict": state, "hyper_parameters": {"model": partial(mlp), "evil": Evil()}}, folder / "evil.ckpt")
    for name in ("hollow", "twice", "distributed", "pair"):
        (folder / name).mkdir()
    (folder / "distributed" / ".metadata").write_bytes(b"")
    for name in ("a", "b"):
        save_file(state, folder / "twice" / f"{name}.safetensors")
        torch.save(state, folder / "pair" / f"{name}.ckpt")
    return {
        "missing.ckpt": r"there is no file or folder '.*missing.ckpt'",
        "half.ckpt": r"half.ckpt is cut short or damaged: the directory at its end can't be read",
        "half.safetensors": r"half.safetensors is damaged or no safetensors file: incomplete, it has 900 bytes",
        "empty.ckpt": r"empty.ckpt is empty",
        "empty.safetensors": r"empty.safetensors is empty",
        "text.ckpt": r"text.ckpt is damaged or no checkpoint of torch.save",
        "text.safetensors": r"text.safetensors is damaged or no safetensors file: header too large",
        "index.index.json": r"is not an index of weights: it has no readable 'weight_map'",
        "absent.index.json": r"absent.index.json names nowhere.safetensors, missing in its folder",
        "wrong.index.json": r"wrong.index.json names nothing, which good.safetensors doesn't hold",
        "list.pt": r"list.pt holds a list, not a state dict",
        "none.pt": r"none.pt holds no tensors by name; there is: epoch",
        "nothing.ckpt": r"nothing.ckpt under 'state_dict' holds no tensors by name; there is: nothing",
        "evil.ckpt": r"evil.ckpt holds objects of (?=.*functools.partial)(?=.*print).*, which would run code to load",
        "hollow": r"hollow holds no file of weights \(safetensors, .ckpt",
        "twice": r"b.safetensors holds 0.weight, and so does another file of its folder; name one of them",
        "distributed": r"distributed/.metadata can't be read: it is not what torch writes",
        "pair": r"pair holds a.ckpt, b.ckpt; name one of them",
    }


def test_files_that_cannot_be_read_are_refused_in_one_sentence_and_run_nothing(tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            inspect_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "this code was run" not in capsys.readouterr().out


def test_numbered_layers_are_in_order_in_a_file_that_sorts_them_as_words(tmp_path):
    save_file({f"{i}.weight": torch.eye(2) for i in range(12)}, tmp_path / "a.safetensors")
    assert [row.name for row in inspect_weights(tmp_path / "a.safetensors").matrices] == [
        f"{i}.weight" for i in range(12)
    ]


def test_memory_is_that_of_the_largest_matrix_not_of_the_file(tmp_path):
    # 24 matrices of 8 MB.
    state = {f"{i}.weight": torch.full((2048, 1024), 1.0 + i) for i in range(24)}
    torch.save({"state_dict": state}, tmp_path / "large.ckpt")
    save_file(state, tmp_path / "large.safetensors")
    del state
    code = """
import resource, torch, lightning_lowrank
lightning_lowrank.weights.source._BUDGET = 1 << 24
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
lightning_lowrank.inspect_weights({"0.weight": torch.ones(2048, 1024)}, spectra="norm")
before = peak()
for ending in ("ckpt", "safetensors"):
    report = lightning_lowrank.inspect_weights(f"large.{ending}", spectra="norm")
    print(len(report.matrices), report.matrices[-1].spectral_norm, peak() - before)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for line in done.stdout.splitlines():
        count, norm, grown = map(float, line.split())
        assert count == 24
        assert norm == pytest.approx(24 * math.sqrt(2048 * 1024), rel=1e-3)
        assert grown < 80
    assert len(done.stdout.splitlines()) == 2


# --------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(20, 30), nn.Linear(30, 1))
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return inspect_weights({**net.state_dict(), "ids": torch.zeros(2, 2, dtype=torch.int64)})


def test_the_report_survives_a_file(report, tmp_path):
    loaded = WeightReport.load(report.save(tmp_path / "report.json"))
    assert repr(loaded) == repr(report)
    assert same(loaded, report)
    assert json.loads((tmp_path / "report.json").read_text())["matrices"][2]["spectral_norm"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    for content, message in (
        ("[]", "is not a weight report"),
        ('{"schema_version": 9}', "version 9; this version reads"),
    ):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            WeightReport.load(tmp_path / "report.json")


def test_the_table_has_a_row_per_matrix_and_no_empty_column(report):
    text = str(report)
    for row in report.matrices:
        assert row.name in text
    assert "4 * (1 x 9)" in text
    assert "4 matrices, 774 entries" in text
    assert "Left out: ids (entries of type int64)" in text
    assert "Note: entries that are not finite, so values are NaN: 2.weight" in text
    assert "operator norm" not in text
    assert f"{report.matrices[0].stable_rank:.4g}" in text
    assert "effective rank" not in str(inspect_weights(mlp(), spectra="norm"))


def test_the_figure_has_a_line_and_a_dot_per_matrix(report):
    pytest.importorskip("matplotlib")
    figure, (spectra, ranks) = report.plot()
    assert figure.axes == [spectra, ranks]
    drawn = {line.get_label(): line.get_ydata() for line in spectra.lines}
    assert list(drawn) == ["0.weight", "1.weight", "3.weight"]
    sigma = np.array(report.matrices[0].singular_values)
    assert drawn["0.weight"] == pytest.approx(sigma / sigma[0])
    most, dots = (collection.get_offsets() for collection in ranks.collections)
    assert [float(x) for x in most[:, 0]] == [4, 4, 20, 1]
    assert dots[:, 0].filled(math.nan) == pytest.approx([row.stable_rank for row in report.matrices], nan_ok=True)
    assert [label.get_text() for label in ranks.get_yticklabels()] == [row.name for row in report.matrices]


def test_the_figure_of_many_large_matrices_stays_readable(report):
    pytest.importorskip("matplotlib")
    row = replace(report.matrices[0], singular_values=tuple(np.geomspace(1, 1e-12, 5000)), spectral_norm=1.0)
    many = WeightReport("many", "full", [replace(row, name=f"layer.{i}.weight") for i in range(150)])
    figure, (spectra, ranks) = many.plot()
    assert len(spectra.lines) == 150
    assert max(len(line.get_xdata()) for line in spectra.lines) <= 400
    assert spectra.lines[0].get_xdata()[[0, -1]].tolist() == [1, 5000]
    names = [label.get_text() for label in ranks.get_yticklabels()]
    assert 20 <= len(names) <= 40
    assert names[-1] == "layer.149.weight"
    assert max(figure.get_size_inches()) <= 12
    empty = WeightReport("fast", "norm", [replace(row, singular_values=())])
    _, (spectra, _) = empty.plot()
    assert [text.get_text() for text in spectra.texts] == ["not computed"]


def test_loggers_get_finite_numbers_by_name(report):
    logger = RowLogger()
    report.log([logger], prefix="w")
    [(_, row)] = logger.rows
    assert row["w/spectral_norm/0.weight"] == report.matrices[0].spectral_norm
    known = [matrix.stable_rank for matrix in report.matrices if matrix.finite]
    assert row["w/stable_rank"] == pytest.approx(sum(known) / 3)
    assert "w/spectral_norm/2.weight" not in row
    assert all(map(math.isfinite, row.values()))
    assert all(re.match(r"w/\w+(/|$)", key) for key in row)
