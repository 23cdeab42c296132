"""stored_weights: names, values and surroundings of weights in every kind of file, mapped and not copied."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as planned

from lightning_lowrank.weights import stored_weights, weights_of_mapping
from lightning_lowrank.weights.inert_pickle import InertUnpickler, check_calls
from tests.conftest import make_classifier, make_loader, make_trainer, mlp


def tensors():
    torch.manual_seed(0)
    return {
        "10.weight": torch.randn(3, 4),
        "2.half": torch.randn(5).half(),
        "a.b": torch.randn(2, 3, 4).to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
    }


def save_distributed(state, folder):
    """As FSDP2's users do, by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.save(state, checkpoint_id=folder)
    return folder


def check(stored, expected):
    """Same names, shapes, types and values."""
    assert set(stored.shapes) == set(expected)
    for name, tensor in expected.items():
        found = stored.read(name)
        assert (stored.shapes[name], stored.dtypes[name]) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.fixture
def everywhere(tmp_path):
    """The same tensors in every kind of file, by the format that they should be recognised as."""
    state = tensors()
    names = list(state)
    torch.save(state, tmp_path / "bare.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": state, "epoch": 3}, tmp_path / "other.bin")
    save_file(state, tmp_path / "one.safetensors", metadata={"format": "pt"})
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    (tmp_path / "sharded").mkdir()
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / "sharded" / file)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    return {
        tmp_path / "bare.pt": "state dict",
        tmp_path / "old.pth": "state dict",
        tmp_path / "other.bin": "checkpoint",
        tmp_path / "one.safetensors": "safetensors",
        index: "safetensors",
        index.parent: "safetensors",
        save_distributed({"state_dict": state, "optimizer_0": {"m": torch.ones(2)}}, tmp_path / "d1"): "distributed",
        save_distributed({"app": {"model": state}}, tmp_path / "d2"): "distributed",
        save_distributed(state, tmp_path / "d3"): "distributed",
    }


def test_every_kind_of_file_gives_the_same_tensors(everywhere):
    state = tensors()
    for path, kind in everywhere.items():
        stored = stored_weights(path)
        check(stored, state)
        assert (stored.format, stored.keys) == (kind, {name: name for name in stored.shapes}), path
        assert (stored.left_out, stored.tied, stored.others) == ({}, {}, {})
        with pytest.raises(ValueError, match="has no current_model_state, which a WeightAveraging callback writes"):
            stored_weights(path, raw=True)
    rests = {path.name: dict(stored_weights(path).rest) for path in everywhere}
    assert {name: rest for name, rest in rests.items() if rest} == {
        "other.bin": {"epoch": 3},
        "one.safetensors": {"format": "pt"},
    }


def test_all_files_that_are_read_are_named(everywhere):
    for path in everywhere:
        found = {file.name for file in stored_weights(path).files}
        if path.name in ("sharded", "model.safetensors.index.json"):
            assert found == {"model.safetensors.index.json", "a.safetensors", "b.safetensors"}
        else:
            assert found == ({path.name} if path.is_file() else {".metadata", "__0_0.distcp"})


def test_links_of_a_hubs_cache_are_followed(everywhere, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in everywhere:
        if path.is_file():
            (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
            (snapshot / "a.safetensors").unlink(missing_ok=True)
            (snapshot / "b.safetensors").unlink(missing_ok=True)
            for shard in ("a.safetensors", "b.safetensors"):
                (snapshot / shard).symlink_to(tmp_path / "sharded" / shard)
            check(stored_weights(snapshot / path.name), tensors())
    (tmp_path / "linked").symlink_to(tmp_path / "d1")
    check(stored_weights(tmp_path / "linked"), tensors())


def test_names_are_those_of_the_module_and_keys_those_of_the_file(tmp_path):
    compiled = {
        f"_orig_mod.layers.{i}._checkpoint_wrapped_module.{key}": value
        for i in range(2)
        for key, value in mlp().state_dict().items()
    }
    torch.save({"state_dict": compiled}, tmp_path / "a.ckpt")
    save_file(compiled, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.ckpt", tmp_path / "a.safetensors", save_distributed(compiled, tmp_path / "d")):
        stored = stored_weights(path)
        assert {name: key for name, key in stored.keys.items() if "1.0" in name} == {
            "layers.1.0.weight": "_orig_mod.layers.1._checkpoint_wrapped_module.0.weight"
        }
        assert torch.equal(stored.read("layers.0.2.weight"), mlp()[2].weight)


def test_ties_of_all_shapes_are_named(tmp_path):
    weight, bias = torch.randn(4, 3), torch.randn(12)
    state = {"w": weight, "b": bias, "again": weight, "b2": bias, "part": bias[:6], "turned": weight.t(), "x": bias + 1}
    torch.save(state, tmp_path / "a.pt")
    for stored in (stored_weights(tmp_path / "a.pt"), weights_of_mapping(state)):
        assert stored.tied == {"again": "w", "b2": "b"}
        assert stored.left_out == {"again": "the same tensor as w"}
        assert list(stored.keys) == list(state)
        assert torch.equal(stored.read("again"), weight)
        assert torch.equal(stored.read("turned"), weight.t())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*sparse|Sparse|nested", "ignore:.*prototype")
def test_tensors_that_are_no_plain_numbers_are_named_with_the_reason(tmp_path):
    state = {
        "w": torch.ones(2),
        "meta": torch.ones(2, device="meta"),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "_extra_state": {"calls": 3},
    }
    torch.save(state, tmp_path / "a.pt")
    stored = stored_weights(tmp_path / "a.pt")
    assert list(stored.shapes) == ["w"]
    assert stored.left_out == {
        "meta": "no data: on the meta device",
        "coo": "a sparse tensor (sparse_coo)",
        "csr": "a sparse tensor (sparse_csr)",
        "quantised": "entries of type qint8",
        "nested": "a nested tensor",
    }
    assert stored.others == {"_extra_state": {"calls": 3}}


def test_lightnings_checkpoints_with_averaged_and_raw_weights(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last")
    average = WeightAveraging(use_buffers=False, avg_fn=lambda old, new, _: 0.5 * (old + new))
    make_trainer(callbacks=[keep, average], enable_checkpointing=True).fit(make_classifier(mlp()), make_loader())
    content = torch.load(keep.best_model_path, weights_only=True)
    averaged, raw = (stored_weights(keep.best_model_path, raw=raw) for raw in (False, True))
    check(averaged, content["state_dict"])
    check(raw, content["current_model_state"])
    assert not torch.equal(averaged.read("net.0.weight"), raw.read("net.0.weight"))
    assert averaged.format == raw.format == "lightning"
    assert set(averaged.rest) == set(raw.rest) == set(content) - {"state_dict", "current_model_state"}
    assert averaged.rest["epoch"] == 1
    momentum = averaged.rest["optimizer_states"][0]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, content["optimizer_states"][0]["state"][0]["momentum_buffer"])
    assert averaged.notes == ["these are averaged weights (state_dict); the raw ones are in current_model_state"]
    assert raw.notes == ["these are raw weights (current_model_state); the averaged ones are in state_dict"]


def test_all_that_torch_saves_passes_the_checks(tmp_path):
    rest = {
        "ordered": OrderedDict(a=[1, 2.5, None, True]),
        "counter": Counter("hello"),
        "set": {1, "two", (3, 4)},
        "bytes": b"\x00\xff" * 50,
        "bytearray": bytearray(b"\x00\xff" * 50),
        "complex": 1j,
        "device": torch.device("cpu"),
        "type": torch.float16,
        "size": torch.Size([1, 2]),
        "large": 1 << 100,
        "parameter": nn.Parameter(torch.ones(3)),
        "view": torch.arange(100)[10:20:3],
        "turned": torch.arange(6).reshape(2, 3).t(),
        "mask": torch.zeros(1, dtype=torch.bool).expand(64, 64),
        "unsigned": torch.arange(3).to(torch.uint16),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "random": torch.get_rng_state(),
        "nothing": torch.zeros(0),
        "storage": torch.arange(3).untyped_storage(),
    }
    # state_dict() carries versions as an attribute.
    state = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).state_dict()
    # The old format has no place for these.
    older = {key: value for key, value in rest.items() if key not in ("unsigned", "float8", "storage")}
    torch.save({"state_dict": state, **rest}, tmp_path / "new.ckpt")
    torch.save({"state_dict": state, **older}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name, expected in {"new.ckpt": rest, "old.ckpt": older}.items():
        stored = stored_weights(tmp_path / name)
        check(stored, state)
        assert set(stored.rest) == set(expected)
        for key, value in expected.items():
            found = stored.rest[key]
            is_numbers = isinstance(value, (torch.Tensor, torch.UntypedStorage))
            assert found.tolist() == value.tolist() if is_numbers else found == value, key


def test_archives_without_checksums_are_read(tmp_path):
    options = pytest.importorskip("torch.utils.serialization").config.save
    before, options.compute_crc32 = options.compute_crc32, False
    try:
        torch.save(tensors(), tmp_path / "a.pt")
    finally:
        options.compute_crc32 = before
    check(stored_weights(tmp_path / "a.pt"), tensors())


def split(folder, key, parts):
    """Make one tensor of a distributed checkpoint of the pieces that are saved as part0, part1, ..."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    pieces = {name: content.state_dict_metadata.pop(name) for name in parts}
    chunks = []
    for name, offsets in parts.items():
        chunks.append(planned.ChunkStorageMetadata(torch.Size(offsets), pieces[name].size))
        place = content.storage_data.pop(planned.MetadataIndex(name, [0] * len(offsets)))
        content.storage_data[planned.MetadataIndex(key, offsets)] = place
        content.planner_data.pop(name)
    shape = torch.Size(max(o + s for o, s in zip(*axis, strict=True)) for axis in axes(chunks))
    content.state_dict_metadata[key] = planned.TensorStorageMetadata(pieces[name].properties, shape, chunks)
    content.planner_data[key] = ("model", key.removeprefix("model."))
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def axes(chunks):
    return [
        ([chunk.offsets[axis] for chunk in chunks], [chunk.sizes[axis] for chunk in chunks])
        for axis in range(len(chunks[0].offsets))
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_pieces_of_several_processes_are_put_together_as_torch_does_it(tmp_path):
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    parts = {"part0": (0, 0), "part1": (3, 0), "part2": (0, 3), "part3": (3, 3)}
    rows, columns = (slice(0, 3), slice(3, 5)), (slice(0, 3), slice(3, 4))
    blocks = [whole[row, column].clone() for column in columns for row in rows]
    other = {"optimizer_0": {"state": {"w": torch.ones(3)}, "lr": 0.1}, "model": {"b.c": torch.ones(2), "_extra": {}}}
    save_distributed({**dict(zip(parts, blocks, strict=True)), **other}, tmp_path / "d")
    split(tmp_path / "d", "model.a.w", parts)
    torch.save({"pytorch-lightning_version": "2.6", "epoch": 4, "current_model_state": {}}, tmp_path / "d" / "meta.pt")
    oracle = {"model": {"a.w": torch.zeros(5, 4)}}
    dcp.load(oracle, checkpoint_id=tmp_path / "d")
    assert torch.equal(oracle["model"]["a.w"], whole)
    stored = stored_weights(tmp_path / "d")
    check(stored, {"a.w": whole, "b.c": torch.ones(2)})
    assert (stored.format, stored.holder) == ("distributed", "state_dict")
    assert stored.rest == {"pytorch-lightning_version": "2.6", "epoch": 4}
    assert {file.name for file in stored.files} == {".metadata", "__0_0.distcp", "meta.pt"}


def test_values_without_tensors_in_a_distributed_state_dict_are_named(tmp_path):
    save_distributed({"model": {"w": torch.ones(2), "_extra_state": b"3 calls"}}, tmp_path / "d")
    stored = stored_weights(tmp_path / "d")
    assert stored.left_out == {"_extra_state": "no tensor but pickled bytes"}
    assert (stored.keys["_extra_state"], stored.holder) == ("_extra_state", "model")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted as Linux does it")
def test_nothing_that_is_read_is_copied(tmp_path):
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

    # 40 MB in 5 tensors.
    state = {f"{i}.weight": torch.full((2048, 1024), 1.0 + i) for i in range(5)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    save_distributed(state, tmp_path / "a")
    for name in ("a.ckpt", "a.safetensors", "a"):
        before = anonymous()
        stored = stored_weights(tmp_path / name)
        held = [stored.read(name) for name in stored.shapes]
        assert [tensor.max().item() for tensor in held] == [1, 2, 3, 4, 5]
        assert anonymous() - before < 8


def test_a_pickle_is_read_with_placeholders_alone(tmp_path):
    state = {f"layers.{i}.weight": torch.ones(i + 1) for i in range(300)}
    torch.save({"state_dict": state, "path": tmp_path}, tmp_path / "modèle.pt")
    with zipfile.ZipFile(tmp_path / "modèle.pt") as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = archive.read(name)
    pickled = InertUnpickler(io.BytesIO(content))
    root = pickled.load()
    check_calls(pickled, len(content), len(content))
    assert type(root["path"]).__name__ == "Call"
    assert {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"} < set(pickled.names)
    assert [pickled.storages[str(i)].nbytes for i in range(300)] == [4 * i + 4 for i in range(300)]
    torch.save({"state_dict": state}, tmp_path / "modèle.pt")
    check(stored_weights(tmp_path / "modèle.pt"), state)
