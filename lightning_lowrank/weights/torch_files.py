"""Checkpoints of ``torch.save``, mapped where their format allows it; no code of theirs is run."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from lightning_lowrank.weights.checks import UnreadableError, kind_of, torch_records
from lightning_lowrank.weights.inert_pickle import Call, InertUnpickler, check_calls
from lightning_lowrank.weights.source import Mapped, StoredWeights, weights_of_mapping

# A torch.save before torch 1.6 is pickle after pickle: a magic number, a version, the machine, the content, the keys.
_LEGACY_PICKLES = 4
# The only protocol that torch reads without running code; a user of torch.save can choose another one.
_PROTOCOL = 2
_LISTED = 5
# What the outermost object of a checkpoint is made by, where it is no object of a class of its own.
_PLAIN = ("collections.", "torch._utils.", "torch._tensor.")


def torch_weights(path: Path, raw: bool = False) -> StoredWeights:
    """The weights in a checkpoint.

    Args:
        path: A file of ``torch.save``.
        raw: Take the weights that a ``WeightAveraging`` callback averages instead of the average.

    Raises:
        ValueError: If it is damaged, something else, would run code, or would need memory out of proportion.
        OSError: If it can't be opened.
    """
    content = torch_content(path)
    stored = replace(weights_of_mapping(content, str(path), raw), files=(path,))
    if kind_of(path) == "zip":
        stored.read = Mapped(
            lambda: _by_name(weights_of_mapping(_loaded(path, "zip"), str(path), raw)), _by_name(stored)
        ).read
    return stored


def torch_content(path: Path) -> Any:
    """What ``torch.save`` wrote, without running code, mapped where its format allows it.

    Raises:
        ValueError: If it is damaged, something else, would run code, or would need memory out of proportion.
        OSError: If it can't be opened.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        raise ValueError(f"{path} holds safetensors; let its name end in .safetensors")
    if kind == "zip":
        _check_zip(path)
    elif kind == "legacy":
        _check_legacy(path)
    elif kind == "pickle":
        _refuse_pickle(path)
    else:
        raise ValueError(f"{path} is damaged or no checkpoint of torch.save; copy or download it again")
    return _loaded(path, kind)


def _loaded(path: Path, kind: str) -> Any:
    """A checked file; the format before torch 1.6 can't be mapped."""
    try:
        with warnings.catch_warnings():
            # About types of storages and checks of sparse tensors, of which a user can do nothing.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:  # what is no pickle may raise anything
        if refused := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise ValueError(_refusal(path, [refused[1]], None)) from error
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or can't be mapped ({reason}); copy or download it again") from error


def _by_name(stored: StoredWeights) -> dict[str, Tensor]:
    return {name: stored.read(name) for name in stored.keys}


def _check_zip(path: Path) -> None:
    """Refuse what is damaged, would run code, or is out of proportion."""
    with path.open("rb") as file:
        records = torch_records(file, str(path))
        if "constants.pkl" in records:
            raise ValueError(f"{path} is a TorchScript program; load it by torch.jit.load and save its state_dict()")
        if "data.pkl" not in records:
            raise ValueError(f"{path} is a zip archive of something else: it has no data.pkl, as torch.save writes it")
        file.seek(records["data.pkl"].start)
        content = file.read(len(records["data.pkl"]))
    pickled, root = _read(io.BytesIO(content), path)
    if any(name.startswith("torch.distributed.") for name in pickled.names):
        raise ValueError(
            f"{path} holds the shards of one process alone; save the whole state dict (full_state_dict=True), or"
            " a folder by torch.distributed.checkpoint.save"
        )
    if refused := _refused(path):
        raise ValueError(_refusal(path, refused, root))
    for key, storage in pickled.storages.items():
        if storage.nbytes > len(records.get(f"data/{key}", ())):
            raise ValueError(f"{path} is damaged: its record data/{key} is missing or short; copy or download it again")
    _check(path, pickled, len(content))


def _check_legacy(path: Path) -> None:
    """The same for what torch wrote before version 1.6."""
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            start = file.tell()
            pickled, root = _read(file, path)
        length = file.tell() - start
    if isinstance(root, Call) and not root.name.startswith(_PLAIN):
        raise ValueError(_refusal(path, [root.name], root))
    if sum(storage.nbytes for storage in pickled.storages.values()) > path.stat().st_size:
        raise ValueError(f"{path} is cut short: it should hold more numbers than it has; copy or download it again")
    _check(path, pickled, length)


def _refused(path: Path) -> list[str]:
    """The classes that a checkpoint names and that torch does not call harmless."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # instructions that torch.save does not write; torch.load refuses them
        return []


def _refuse_pickle(path: Path) -> NoReturn:
    """A pickle that torch.save did not write is never loaded."""
    with path.open("rb") as file:
        names = sorted(_read(file, path)[0].names)
    what = f"a plain pickle (of {_some(names)})" if names else "a plain pickle"
    raise ValueError(
        f"{path} is {what}, which would run code to load; if you trust it, load it with pickle and save its state dict"
        " by torch.save"
    )


def _read(stream: BinaryIO, path: Path) -> tuple[InertUnpickler, Any]:
    """One pickle, read without making anything, and its outermost object."""
    reader = InertUnpickler(stream)
    try:
        return reader, reader.load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error) if isinstance(error, UnreadableError) else "its pickle can't be read"
        raise ValueError(f"{path} is damaged: {reason}; copy or download it again") from error


def _check(path: Path, pickled: InertUnpickler, length: int) -> None:
    if pickled.proto != _PROTOCOL:
        raise ValueError(
            f"{path} was saved with pickle protocol {pickled.proto}, which torch can't read without running code; if"
            f" you trust it, load it with weights_only=False and save it again with protocol {_PROTOCOL}, the default"
        )
    try:
        check_calls(pickled, length, path.stat().st_size)
    except Exception as error:  # arguments of any kind and number
        reason = str(error) if isinstance(error, UnreadableError) else "a call has wrong arguments"
        raise ValueError(f"{path} is damaged or hostile: {reason}; don't load it") from error


def _refusal(path: Path, names: list[str], root: Any) -> str:
    """What is said of a checkpoint that names classes which torch does not call harmless."""
    if isinstance(root, Call) and root.name in names:
        return (
            f"{path} holds a whole {root.name}, pickled with its class, which would run code to load; if you trust it,"
            " load it by torch.load(..., weights_only=False) and save its state_dict()"
        )
    classes = ", ".join(name.rpartition(".")[2] for name in names[:_LISTED])
    return (
        f"{path} holds objects of {_some(names)}, which would run code to load; if you trust them, allow them in Python"
        f" by torch.serialization.add_safe_globals([{classes}]), or load it by torch.load(..., weights_only=False) and"
        " save its state dict"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
