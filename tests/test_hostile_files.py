"""Files that attack, are damaged or are something else: one clear sentence, no code run, no memory to speak of."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from lightning_lowrank.weight_files import stored_weights, weights_of_mapping
from tests.hostile import FILES, STATE, TRACE, touching
from tests.hostile.distributed import place_of
from tests.hostile.making import archive, storage, tensor

# Bytes that reading a hostile file may need. Each bomb would take hundreds of megabytes or more.
ALLOWED = 8 << 20


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_sentence_and_does_nothing(name, tmp_path):
    make, message = FILES[name]
    make(tmp_path / name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            stored_weights(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert peak < ALLOWED
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not Path(TRACE).exists()


def test_the_hostile_pickles_do_run_code_where_they_are_trusted(tmp_path):
    FILES["system.ckpt"][0](tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert Path(TRACE).exists()


def replace_piece(folder, name, data):
    """Another content for a piece of a distributed checkpoint."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    place = place_of(content, name)
    (folder / "other.distcp").write_bytes(data)
    place.relative_path, place.offset, place.length = "other.distcp", 0, len(data)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def saved(content, **options):
    torch.save(content, file := io.BytesIO(), **options)
    return file.getvalue()


def packed(pickled, records=None, **options):
    archive(file := io.BytesIO(), pickled, records, **options)
    return file.getvalue()


PIECES = {
    "code": (saved([torch.ones(4, 3), touching()]), r"can't be read: it is no tensor of torch.save"),
    "module": (saved(nn.Linear(3, 4)), r"can't be read: it is no tensor of torch.save"),
    "shape": (saved(torch.ones(3, 3)), r"it is no tensor of shape \(4, 3\) and type torch.float32"),
    "type": (saved(torch.ones(4, 3).half()), r"it is no tensor of shape \(4, 3\) and type torch.float32"),
    "expanded": (saved(torch.ones(1).expand(4, 3)), r"a tensor of shape \(4, 3\) is described with 4 stored bytes"),
    "short": (
        packed(b"\x80\x02" + tensor(storage(12), (4, 3), (3, 1)) + b".", {"data/0": bytes(8)}),
        r"it is no tensor of shape \(4, 3\)",
    ),
    "order": (
        packed(b"\x80\x02" + tensor(storage(12), (4, 3), (3, 1)) + b".", {"data/0": bytes(48), "byteorder": b"big"}),
        r"its numbers are in the byte order of another kind of processor",
    ),
    "deflated": (
        packed(b"\x80\x02" + b"N" * (1 << 24), compression=zipfile.ZIP_DEFLATED),
        r"has the compressed record archive/data.pkl",
    ),
    "old": (saved(torch.ones(4, 3), _use_new_zipfile_serialization=False), r"the directory at its end can't be read"),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_hostile_piece_of_a_distributed_checkpoint_is_refused(name, tmp_path):
    data, message = PIECES[name]
    dcp.save({"model": STATE}, checkpoint_id=tmp_path / "d")
    replace_piece(tmp_path / "d", "model.w", data + bytes(max(0, 48 - len(data))))
    stored = stored_weights(tmp_path / "d")
    assert torch.equal(stored.read("b"), STATE["b"])
    with pytest.raises(ValueError, match=message) as caught:
        stored.read("w")
    assert "other.distcp, at byte 0" in str(caught.value)
    assert not Path(TRACE).exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_no_tensor_of_a_distributed_checkpoint_is_never_unpickled(tmp_path):
    dcp.save({"model": STATE, "optimizer": {"lr": 0.1}}, checkpoint_id=tmp_path / "d")
    replace_piece(tmp_path / "d", "optimizer.lr", saved(touching()))
    stored = stored_weights(tmp_path / "d")
    assert all(torch.equal(stored.read(name), value) for name, value in STATE.items())
    assert not Path(TRACE).exists()


def test_classes_that_the_user_allowed_are_loaded(tmp_path):
    torch.save({"state_dict": STATE, "path": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds objects of pathlib.*PosixPath|holds objects of .*WindowsPath"):
        stored_weights(tmp_path / "a.ckpt")
    with torch.serialization.safe_globals([type(Path("x"))]):
        assert stored_weights(tmp_path / "a.ckpt").rest["path"] == Path("x")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "a.pt")

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse)
    for path in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(PermissionError, match=rf"{path.name} can't be opened \(Permission denied\); make it read"):
            stored_weights(path)


def test_names_in_memory_are_checked_as_those_of_files_are():
    with pytest.raises(ValueError, match=r"the state dict holds a and _orig_mod.a, two names of one tensor"):
        weights_of_mapping({"a": torch.ones(1), "_orig_mod.a": torch.ones(2)})


def test_no_hostile_file_makes_the_process_grow(tmp_path):
    """Also by what Python's own count of memory does not see."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is counted as Linux does it")
    for name, (make, _) in FILES.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / name)
    torch.save(STATE, tmp_path / "good.pt")
    code = """
from pathlib import Path
from lightning_lowrank.weight_files import stored_weights
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
stored_weights("good.pt").read("w")
before, refused = peak(), 0
for folder in Path().iterdir():
    if folder.is_dir():
        try:
            stored_weights(folder / folder.name)
        except (ValueError, OSError):
            refused += 1
print(refused, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    refused, grown = map(int, done.stdout.split())
    assert refused == len(FILES)
    assert grown < 32
