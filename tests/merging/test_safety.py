"""What a merge of files must never do: overwrite, leave halves behind, go on when something is wrong."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lowrank import MergeError, merge_checkpoints


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints of Lightning, and their networks."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(nn.ModuleDict({"first": nn.Linear(6, 8), "head": nn.Linear(8, 3)}))
        content = {"state_dict": nets[-1].state_dict(), "pytorch-lightning_version": "2.0.0", "epoch": seed}
        torch.save(content, tmp_path / f"{seed}.ckpt")
    return [tmp_path / "0.ckpt", tmp_path / "1.ckpt"], nets


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_outputs_are_not_overwritten_unasked(tmp_path, pair):
    paths, _ = pair
    out = tmp_path / "m.ckpt"
    for existing in (out, tmp_path / "m.ckpt.card.md"):
        existing.write_text("precious")
        with pytest.raises(FileExistsError, match=r"exists; name another output, or pass force \(--force\)"):
            merge_checkpoints(paths, out)
        assert existing.read_text() == "precious"
        existing.unlink()
    out.write_text("old")
    merge_checkpoints(paths, out, force=True)
    assert torch.load(out, weights_only=True)["state_dict"]
    linked = tmp_path / "link.ckpt"
    os.link(paths[0], linked)
    for target in (paths[0], linked):
        with pytest.raises(FileExistsError, match="is an input"):
            merge_checkpoints(paths, target, force=True)
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(FileExistsError, match="is a folder; name a file"):
        merge_checkpoints(paths, tmp_path / "folder.ckpt", force=True)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .* for the output; make it first"):
        merge_checkpoints(paths, tmp_path / "missing" / "m.ckpt")
    with pytest.raises(ValueError, match=r"'.*m.onnx' should end in .ckpt, .pt"):
        merge_checkpoints(paths, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"a merge needs two or more checkpoints, got \["):
        merge_checkpoints(paths[:1], tmp_path / "n.ckpt")


def test_a_shard_of_an_input_is_not_overwritten(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file({"x.weight": torch.ones(2, 2)}, tmp_path / folder / "part.safetensors")
        index = {"weight_map": {"x.weight": "part.safetensors"}}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    indexes = [tmp_path / folder / "model.safetensors.index.json" for folder in ("a", "b")]
    shard = tmp_path / "a" / "part.safetensors"
    before = shard.read_bytes()
    with pytest.raises(FileExistsError, match=r"is one of the files of an input; name another file"):
        merge_checkpoints(indexes, shard, force=True)
    assert shard.read_bytes() == before


def test_failures_leave_nothing_behind(tmp_path, pair, monkeypatch):
    paths, _ = pair
    before = names(tmp_path)
    broken = torch.load(paths[1], weights_only=True)
    broken["state_dict"]["head.weight"][0, 0] = float("nan")
    torch.save(broken, paths[1])
    with pytest.raises(MergeError, match=r"head.weight: has entries that are not finite in 1.ckpt"):
        merge_checkpoints(paths, tmp_path / "m.ckpt")
    assert names(tmp_path) == before


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, pair, monkeypatch):
    paths, _ = pair
    before = names(tmp_path)
    full = OSError(28, "No space left on device")
    for call in ("pwrite", "fsync"):
        with monkeypatch.context() as patched:

            def fail(*_):
                raise full

            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space left on device"):
                merge_checkpoints(paths, tmp_path / "m.ckpt")
        assert names(tmp_path) == before
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"the output takes .* GB and '.*' has 1e-06 GB left; make room"):
        merge_checkpoints(paths, tmp_path / "m.ckpt")
    assert names(tmp_path) == before


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, pair, monkeypatch):
    paths, _ = pair
    before = names(tmp_path)
    from lightning_lowrank.merging import checkpoints

    original = checkpoints._write

    def write(*arguments):
        notes = original(*arguments)
        os.utime(paths[0], ns=(0, 0))
        return notes

    monkeypatch.setattr(checkpoints, "_write", write)
    with pytest.raises(ValueError, match=r"0.ckpt was changed while it was merged; merge again"):
        merge_checkpoints(paths, tmp_path / "m.ckpt")
    assert names(tmp_path) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, pair, monkeypatch):
    paths, _ = pair
    from lightning_lowrank.merging import checkpoints

    original = checkpoints._write

    def write(*arguments):
        for name in ("m.ckpt", "m.ckpt.card.md"):
            (tmp_path / name).write_text("another process's")
        return original(*arguments)

    monkeypatch.setattr(checkpoints, "_write", write)
    with pytest.raises(FileExistsError, match=r"m.ckpt' exists by now; another process has written it"):
        merge_checkpoints(paths, tmp_path / "m.ckpt")
    assert names(tmp_path) == {"0.ckpt", "1.ckpt", "m.ckpt", "m.ckpt.card.md"}
    assert {(tmp_path / name).read_text() for name in ("m.ckpt", "m.ckpt.card.md")} == {"another process's"}
