import copy
import json
import warnings
import zipfile
from pathlib import Path

import blake3
import lightning.pytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import WeightAveraging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lowrank import MergeError, MergePolicy, MergeReport, merge_checkpoints, merge_modules
from tests.conftest import make_loader, make_trainer


class Net(lightning.pytorch.LightningModule):
    """Batch normalisation, tied weights, hyperparameters with a tensor in them."""

    def __init__(self, width: int = 8, scales: torch.Tensor | None = None, note: str = ""):
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, width, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(width, 3)

    def forward(self, inputs):
        return self.head(self.third(self.second(self.norm(self.first(inputs)).relu()).relu()))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(path: Path, seed: int, callbacks=(), **arguments) -> Net:
    torch.manual_seed(seed)
    net = Net(**arguments)
    trainer = make_trainer(callbacks=list(callbacks))
    trainer.fit(net, make_loader(seed=seed))
    trainer.save_checkpoint(path)
    return net


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints of Lightning, and their networks."""
    nets = [
        trained(tmp_path / f"{seed}.ckpt", seed, scales=torch.ones(3) * seed, note=f"run {seed}") for seed in (0, 1)
    ]
    return [tmp_path / "0.ckpt", tmp_path / "1.ckpt"], nets


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype is tensor.dtype
        assert torch.equal(state[name], tensor), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_lightning_checkpoints_merge_to_what_merge_modules_makes(tmp_path, pair):
    paths, nets = pair
    report = merge_checkpoints(paths, tmp_path / "merged.ckpt")
    merged = Net.load_from_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    assert_same(merged.state_dict(), merge_modules(*nets).state_dict())
    assert merged.third.weight is merged.second.weight
    # The first network's hyperparameters, tensors in them included.
    assert merged.hparams.note == "run 0"
    assert merged.hparams.scales.tolist() == [0.0, 0.0, 0.0]
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert not {"optimizer_states", "lr_schedulers", "callbacks", "loops"} & set(content)
    assert zipfile.ZipFile(tmp_path / "merged.ckpt").testzip() is None
    assert names(tmp_path) >= {"merged.ckpt", "merged.ckpt.card.json", "merged.ckpt.card.md"}
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    make_trainer().test(merged, make_loader(), ckpt_path=str(tmp_path / "merged.ckpt"), verbose=False)
    assert "optimizer_states" in " ".join(report.notes)


def test_the_written_file_is_what_torch_would_have_written(tmp_path, pair):
    """Byte for byte, but for what torch draws anew for every file."""
    paths, _ = pair
    merge_checkpoints(paths, tmp_path / "merged.ckpt")
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    (tmp_path / "again").mkdir()
    torch.save(content, tmp_path / "again" / "merged.ckpt")
    ours, theirs = (zipfile.ZipFile(path / "merged.ckpt") for path in (tmp_path, tmp_path / "again"))
    assert [(e.filename, e.file_size) for e in ours.infolist()] == [
        (e.filename, e.file_size) for e in theirs.infolist()
    ]
    for entry in theirs.infolist():
        # Keys may be numbered in another order where tensors are shared.
        if "/data/" in entry.filename and not entry.filename.endswith("serialization_id"):
            assert ours.read(entry.filename) == theirs.read(entry.filename)
            assert ours.getinfo(entry.filename).CRC == entry.CRC
    assert_same(torch.load(tmp_path / "merged.ckpt", mmap=True)["state_dict"], content["state_dict"])


def test_the_same_merge_gives_the_same_bytes(tmp_path, pair):
    paths, _ = pair
    digests = [merge_checkpoints(paths, tmp_path / "m.ckpt", force=True).card["output"]["blake3"] for _ in range(2)]
    assert digests[0] == digests[1]


def test_inputs_are_not_touched(tmp_path, pair):
    paths, _ = pair
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    merge_checkpoints(paths, tmp_path / "merged.ckpt")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_the_card_has_hashes_rules_versions_and_the_command(tmp_path, pair):
    paths, _ = pair
    out = tmp_path / "merged.ckpt"
    report = merge_checkpoints(paths, out, coefficients=[0.5, 1.0], command="lightning-lowrank merge a b")
    card = json.loads((tmp_path / "merged.ckpt.card.json").read_text())["card"]
    assert card["output"] == {
        "name": out.name,
        "blake3": blake3.blake3(out.read_bytes()).hexdigest(),
        "bytes": out.stat().st_size,
    }
    for entry, path in zip(card["inputs"], paths, strict=True):
        digest = blake3.blake3(path.read_bytes()).hexdigest()
        assert entry["files"] == {path.name: {"blake3": digest, "bytes": path.stat().st_size}}
    assert card["rules"] == {
        "linear: sum": 3, "bias: sum": 2, "normalisation: mean": 2, "statistic: mean": 2, "integer: first": 1,
    }  # fmt: skip
    assert card["hyper_parameters"] == {
        "scales": ["tensor([0., 0., 0.])", "tensor([1., 1., 1.])"], "note": ["'run 0'", "'run 1'"],
    }  # fmt: skip
    assert card["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert MergeReport.load(tmp_path / "merged.ckpt.card.json") == report
    text = (tmp_path / "merged.ckpt.card.md").read_text()
    for part in (
        "lightning-lowrank merge a b",
        card["output"]["blake3"],
        "| linear: sum | 3 |",
        "c = [0.5, 1.0]",
        "None was given",
    ):
        assert part in text


def test_an_evaluation_stands_in_the_card(tmp_path, pair):
    paths, _ = pair
    evaluation = MergeReport({"a": "m1"}, ["m1", "sum"], {"a/m1/acc": 0.5, "a/sum/acc": float("nan")}, ["a note"])
    report = merge_checkpoints(paths, tmp_path / "merged.pt", evaluation=evaluation)
    assert report.value("a", "m1", "acc") == 0.5
    assert "a note" in report.notes
    assert "| a | acc | 0.5 | - |" in (tmp_path / "merged.pt.card.md").read_text()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_state_dicts(tmp_path, suffix):
    nets = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(torch.bfloat16) for _ in range(3)]
    for number, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / f"{number}.pt")
    out = tmp_path / f"merged{suffix}"
    merge_checkpoints([tmp_path / f"{number}.pt" for number in range(3)], out, coefficients=[0.25, 1, -2])
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert_same(
        {name: found[name] for name in nets[0].state_dict()},
        merge_modules(*nets, coefficients=[0.25, 1, -2]).state_dict(),
    )


def test_safetensors_single_and_sharded(tmp_path):
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    save_file(nets[0].state_dict(), tmp_path / "one.safetensors", {"format": "pt", "author": "me"})
    shards = tmp_path / "two"
    shards.mkdir()
    places = {}
    for number, layer in enumerate("01"):
        part = {name: tensor for name, tensor in nets[1].state_dict().items() if name.startswith(layer)}
        file = f"model-{number}.safetensors"
        save_file(part, shards / file)
        places |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    report = merge_checkpoints([tmp_path / "one.safetensors", shards], tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "author": "me"}
    expected = merge_modules(*nets).state_dict()
    found = load_file(tmp_path / "merged.safetensors")
    assert_same({name: found[name] for name in expected}, expected)
    assert set(report.card["inputs"][1]["files"]) == {
        "model.safetensors.index.json",
        "model-0.safetensors",
        "model-1.safetensors",
    }


def test_types_of_many_sizes_in_one_safetensors_file(tmp_path):
    dtypes = [torch.bool, torch.int8, torch.float16, torch.float32, torch.float64, torch.int64, torch.bfloat16]
    names = ["mask", "order.i8", "half.weight", "single.weight", "double.weight", "order.i64", "brain.weight"]
    state = {name: torch.ones(3, 5).to(dtype) for name, dtype in zip(names, dtypes, strict=True)}
    for file in ("a", "b"):
        save_file(state, tmp_path / f"{file}.safetensors")
    merge_checkpoints([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "c.safetensors")
    found = load_file(tmp_path / "c.safetensors")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor * 2 if "weight" in name else tensor)
        assert found[name].dtype is tensor.dtype


def test_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp

    nets = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    for number, net in enumerate(nets):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        content = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(content, checkpoint_id=tmp_path / str(number), no_dist=True)
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "merged.pt")
    expected = merge_modules(*nets).state_dict()
    content = torch.load(tmp_path / "merged.pt", weights_only=True)
    content = content.get("state_dict", content)
    assert_same({name: content[name] for name in expected}, expected)


def test_averaged_weights_are_merged_and_raw_ones_on_request(tmp_path):
    averaging = [WeightAveraging(avg_fn=lambda averaged, now, count: 0.5 * averaged + 0.5 * now) for _ in range(2)]
    nets = [trained(tmp_path / f"{seed}.ckpt", seed, [averaging[seed]]) for seed in (0, 1)]
    contents = [torch.load(tmp_path / f"{seed}.ckpt", weights_only=True) for seed in (0, 1)]
    for raw, key in ((False, "state_dict"), (True, "current_model_state")):
        loaded = [copy.deepcopy(net) for net in nets]
        for net, content in zip(loaded, contents, strict=True):
            net.load_state_dict(content[key])
        out = tmp_path / f"merged-{raw}.ckpt"
        report = merge_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], out, raw=raw)
        merged = Net.load_from_checkpoint(out, weights_only=True)
        assert_same(merged.state_dict(), merge_modules(*loaded).state_dict())
        assert any(("raw weights" if raw else "averaged weights") in note for note in report.notes)
        assert not {"current_model_state", "averaging_state"} & set(torch.load(out, weights_only=True))


def test_base_coefficients_policy_and_module(tmp_path):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)) for _ in range(3)]
    for net in nets:
        net.register_parameter("free", nn.Parameter(torch.randn(2, 2)))
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for path, net in zip(paths, nets, strict=True):
        torch.save(net.state_dict(), path)
    *models, base = nets
    options = {"coefficients": [0.5, 2.0], "policy": MergePolicy(names={"2.*": "first"})}
    with torch.device("meta"):
        module = copy.deepcopy(nets[0]).to("meta")
    merge_checkpoints(paths[:2], tmp_path / "merged.pt", base=paths[2], module=module, **options)
    expected = merge_modules(*models, base=base, **options).state_dict()
    assert_same(torch.load(tmp_path / "merged.pt", weights_only=True), expected)
    # Without the module the file does not tell what "free" is; the message says what to do.
    with pytest.raises(
        MergeError, match=r"free: tensor of unknown uses must be equal .*; say what it is: a rule for its"
    ):
        merge_checkpoints(paths[:2], tmp_path / "other.pt")
    assert "other.pt" not in str(names(tmp_path))
    merge_checkpoints(paths[:2], tmp_path / "other.pt", policy=MergePolicy(names={"free": "sum"}))


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, None], ids=["new", "old"])
def test_weight_normalised_layers_in_files(tmp_path, make):
    nets = []
    for number in range(2):
        layer = nn.Conv1d(3, 4, 2)
        if make is None:
            with pytest.warns(FutureWarning, match="weight_norm"):
                layer = nn.utils.weight_norm(layer)
        else:
            layer = make(layer)
        nets.append(layer)
        torch.save(layer.state_dict(), tmp_path / f"{number}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "merged.pt")
    weights = [copy.deepcopy(net.weight.detach()) for net in nets]
    merged = copy.deepcopy(nets[0]) if make else nets[0]
    merged.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True))
    merged(torch.zeros(1, 3, 4))
    torch.testing.assert_close(merged.weight.detach(), weights[0] + weights[1], rtol=1e-5, atol=1e-6)


def test_other_parametrisations_in_files_are_refused(tmp_path):
    for number in range(2):
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        torch.save(layer.state_dict(), tmp_path / f"{number}.pt")
    with pytest.raises(MergeError, match=r"parametrizations.weight.original: .*; it has no sum"):
        merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "merged.pt")


def test_lora_factors_in_files(tmp_path):
    torch.manual_seed(0)
    states = [{"q.lora_A.weight": torch.randn(r, 6), "q.lora_B.weight": torch.randn(5, r)} for r in (2, 3)]
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
    whole = sum(state["q.lora_B.weight"].double() @ state["q.lora_A.weight"].double() for state in states)
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    report = merge_checkpoints(paths, tmp_path / "exact.safetensors")
    found = load_file(tmp_path / "exact.safetensors")
    assert found["q.lora_A.weight"].shape == (5, 6)
    torch.testing.assert_close(
        found["q.lora_B.weight"].double() @ found["q.lora_A.weight"].double(), whole, rtol=1e-5, atol=1e-5
    )
    assert any("another rank" in note for note in report.notes)
    report = merge_checkpoints(paths, tmp_path / "cut.safetensors", policy=MergePolicy(lora_rank=2))
    sigma = torch.linalg.svdvals(whole)
    lost = (sigma[2:].norm() / sigma.norm()).item()
    assert f"q.lora_A.weight: truncation left out {lost:.3g} of the update's norm" in report.notes


@given(
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]),
    suffix=st.sampled_from([".pt", ".safetensors"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_shapes_and_types(tmp_path_factory, sizes, dtype, suffix, seed):
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(seed)
    # "bias" is a kind whatever the shape.
    states = [{f"{i}.bias": torch.randn(size).to(dtype) for i, size in enumerate(sizes)} for _ in range(2)]
    for number, state in enumerate(states):
        torch.save(state, folder / f"{number}.pt")
    merge_checkpoints([folder / "0.pt", folder / "1.pt"], folder / f"m{suffix}")
    found = load_file(folder / "m.safetensors") if suffix == ".safetensors" else torch.load(folder / "m.pt")
    assert_same({name: found[name] for name in states[0]}, {n: states[0][n] + states[1][n] for n in states[0]})


def test_large_tensors_are_written_in_pieces(tmp_path):
    """More entries than a piece, a batch of pieces and the queue of batches hold together; and not contiguous ones."""
    torch.manual_seed(0)
    states = [{"weight": torch.randn(1500, 2100), "turned.weight": torch.randn(500, 700).T} for _ in range(2)]
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt")
    assert_same(found, {name: states[0][name] + states[1][name] for name in states[0]})
    assert zipfile.ZipFile(tmp_path / "m.pt").testzip() is None


def test_tensors_that_share_memory_with_others_in_hyperparameters(tmp_path):
    table = torch.arange(6.0)
    for number in range(2):
        content = {
            "state_dict": {"weight": torch.ones(2, 2)},
            "hyper_parameters": {
                "all": table,
                "tail": table[3:],
                "nested": [{"x": table[:2]}],
                "empty": torch.empty(0),
            },
            "pytorch-lightning_version": "2.0.0",
        }
        torch.save(content, tmp_path / f"{number}.ckpt")
    merge_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "m.ckpt")
    found = torch.load(tmp_path / "m.ckpt", weights_only=True)["hyper_parameters"]
    assert found["all"].tolist() == table.tolist()
    assert found["tail"].tolist() == [3, 4, 5]
    assert found["nested"][0]["x"].tolist() == [0, 1]
    assert found["empty"].numel() == 0
    found["all"][3] = 9
    assert found["tail"][0] == 9


def test_wrapped_names_are_paired_and_kept(tmp_path):
    net = nn.Linear(2, 2)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "0.pt")
    torch.save(net.state_dict(), tmp_path / "1.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "m.pt", coefficients=[0.5, 0.5])
    assert list(torch.load(tmp_path / "m.pt")) == ["_orig_mod.weight", "_orig_mod.bias"]


def test_shared_weights_are_named_in_the_notes(tmp_path, pair):
    paths, _ = pair
    report = merge_checkpoints([paths[0], paths[0]], tmp_path / "m.ckpt")
    assert any(
        note.startswith("first.weight, first.bias, second.weight") and "multiplied them by 2" in note
        for note in report.notes
    )


def test_overflow_names_the_tensor(tmp_path):
    for number in range(2):
        torch.save(
            {"a.weight": torch.ones(2, 2), "b.weight": torch.full((2, 2), 4e4).half()}, tmp_path / f"{number}.pt"
        )
    with pytest.raises(MergeError, match=r"b.weight: the sum overflows torch.float16 \(largest magnitude 8e\+04\)"):
        merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "m.pt")


def test_every_mismatch_is_listed(tmp_path):
    torch.save(
        {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2), "c.weight": torch.ones(2)}, tmp_path / "one.pt"
    )
    torch.save(
        {"a.weight": torch.ones(2, 3), "d.weight": torch.ones(2, 2), "c.weight": torch.ones(2)}, tmp_path / "two.pt"
    )
    with pytest.raises(MergeError) as caught:
        merge_checkpoints([tmp_path / "one.pt", tmp_path / "two.pt"], tmp_path / "m.pt")
    for line in (
        "a.weight: shape (2, 2) in one.pt and (2, 3) in two.pt",
        "b.weight: only in one.pt, not in two.pt",
        "d.weight: only in two.pt, not in one.pt",
    ):
        assert line in str(caught.value)


def test_sha256_on_request(tmp_path, pair):
    import hashlib

    paths, _ = pair
    report = merge_checkpoints(paths, tmp_path / "m.ckpt", hash_name="sha256")
    assert report.card["output"]["sha256"] == hashlib.sha256((tmp_path / "m.ckpt").read_bytes()).hexdigest()


def test_the_evaluation_of_another_merge_is_refused(tmp_path, pair):
    paths, _ = pair
    for made, name in (({"coefficients": [1.0, 1.0]}, "coefficients"), ({"base": True}, "base")):
        evaluation = MergeReport({"a": "m1"}, ["m1"], {"a/m1/acc": 0.5}, settings=made)
        with pytest.raises(ValueError, match=rf"^the evaluation is that of another merge: {name} was"):
            merge_checkpoints(paths, tmp_path / "m.ckpt", coefficients=[0.5, 0.5], evaluation=evaluation)
    with pytest.raises(ValueError, match=r"0.ckpt is not a merge report: it is no text"):
        MergeReport.load(paths[0])


def test_hyperparameters_that_one_file_does_not_have_are_no_difference(tmp_path, pair):
    paths, nets = pair
    torch.save(nets[1].state_dict(), tmp_path / "bare.pt")
    report = merge_checkpoints([paths[0], tmp_path / "bare.pt"], tmp_path / "m.ckpt")
    assert report.card["hyper_parameters"] == {}
