"""Files that attack, are damaged or are something else: one clear sentence, no code run, no memory to speak of."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from lightning_lowrank.weights import stored_weights, weights_of_mapping
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
    "module": (saved(nn.Linear(3, 4)), r"can't be read: what torch.nn.modules.linear.Linear makes is no tensor"),
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


@pytest.mark.parametrize("kind", ["new.ckpt", "old.ckpt", "one.safetensors", "d/.metadata", "d/__0_0.distcp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_damage_anywhere_ends_in_a_sentence_or_in_other_numbers(kind, tmp_path):
    state = {"state_dict": STATE, "hyper_parameters": {"x": [1, "y", b"z"]}}
    torch.save(state, tmp_path / "new.ckpt")
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "one.safetensors")
    dcp.save({"model": STATE}, checkpoint_id=tmp_path / "d")
    file, random = tmp_path / kind, Random(kind)
    path = file.parent if file.parent != tmp_path else file
    whole, messages = file.read_bytes(), []
    for _ in range(100):
        content, place = bytearray(whole), random.randrange(len(whole))
        inserted = random.choice((b"", random.randbytes(1), b"\xff\xff\xff\x7f", b"cos\nsystem\n"))
        content[place : place + random.randrange(9)] = inserted
        file.write_bytes(content)
        try:
            stored = stored_weights(path)
            read = [stored.read(name) for name in stored.shapes]
            assert sum(tensor.numel() for tensor in read) < 100
        except (ValueError, OSError) as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(message.isprintable() and str(tmp_path) in message for message in messages)
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


def memory(key):
    """A line of what Linux says of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def test_no_hostile_file_makes_the_process_grow(tmp_path):
    """Also by what Python's own count of memory does not see."""
    for name, (make, _) in FILES.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / name)
    try:
        # The most that was ever in use is counted anew.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory can't be set back here")
    before = memory("VmHWM")
    for name in FILES:
        with pytest.raises((ValueError, OSError), match=r"."):
            stored_weights(tmp_path / name / name)
    assert memory("VmHWM") - before < 32
