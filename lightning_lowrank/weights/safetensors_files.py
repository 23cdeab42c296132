"""Files of safetensors, mapped: the header is read and checked here, since it says where everything is."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from lightning_lowrank.weights.checks import MOST_DIMENSIONS, UnreadableError, kind_of
from lightning_lowrank.weights.source import Mapped, StoredWeights, mapped_file, no_raw, stripped, view

# https://github.com/huggingface/safetensors#format; a torch that lacks a type can't read it.
_TYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
# The format's own limit.
_LONGEST_HEADER = 100_000_000
_PREFIX = 8
_LARGEST = 1 << 63


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_weights(path: Path, raw: bool = False) -> StoredWeights:
    """The weights in one file.

    Args:
        path: A file of safetensors.
        raw: Refused: there is one set of weights.

    Raises:
        ValueError: If it is damaged or something else.
        OSError: If it can't be opened.
    """
    if raw:
        raise ValueError(no_raw(str(path)))
    start, header = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is no object of strings")
    entries = _entries(path, start, header)
    # Written in the order of the alphabet, in which layer 10 comes before layer 2.
    keys = stripped(sorted(entries, key=by_number), str(path))

    def load() -> dict[str, Tensor]:
        storage = mapped_file(path)
        return {name: _tensor(storage, start, entries[key]) for name, key in keys.items()}

    return StoredWeights(
        {name: entries[key].shape for name, key in keys.items()},
        {name: str(entries[key].dtype).removeprefix("torch.") for name, key in keys.items()},
        Mapped(load).read,
        keys=keys,
        format="safetensors",
        rest=metadata,
        files=(path,),
    )


def by_number(name: str) -> list[str | int]:
    """A key to sort names by, with numbers in them as numbers.

    Example:
        >>> sorted(["layer.10.weight", "layer.2.weight"], key=by_number)
        ['layer.2.weight', 'layer.10.weight']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads(..., object_pairs_hook=unique)``.

    Raises:
        UnreadableError: If it names something twice: readers differ about which one counts.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UnreadableError(f"it names {key!r} twice")
        found[key] = value
    return found


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says of them."""
    kind = kind_of(path)
    if kind in ("zip", "legacy"):
        raise ValueError(f"{path} is no safetensors file but a zip archive or pickle, as torch.save writes; rename it")
    with path.open("rb") as file:
        prefix = file.read(_PREFIX)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _PREFIX else 0
        if not 2 <= length <= min(_LONGEST_HEADER, path.stat().st_size - _PREFIX):
            raise _damaged(path, f"header too large ({length} bytes in a file of {path.stat().st_size})")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, UnreadableError) else "its header is no JSON"
            raise _damaged(path, reason) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    return _PREFIX + length, header


def _entries(path: Path, start: int, header: dict[str, Any]) -> dict[str, _Entry]:
    """Checked: every byte behind the header belongs to one tensor."""
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            raise _damaged(path, f"{name} begins at byte {entry.begin} of the data, where another tensor ends at {end}")
        end = entry.end
    if (size := path.stat().st_size) != start + end:
        raise _damaged(path, f"incomplete, it has {size} bytes where its header says {start + end}")
    if not entries:
        raise ValueError(f"{path} holds no tensors")
    return entries


def _entry(path: Path, name: str, fields: Any) -> _Entry:
    """One tensor, as long as its shape and type say."""
    try:
        kind, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = (*shape, begin, end)
        fine = len(shape) <= MOST_DIMENSIONS and isinstance(kind, str) and all(map(_is_size, numbers))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header does not say what {name} is") from error
    if not fine:
        raise _damaged(path, f"its header does not say what {name} is")
    dtype = getattr(torch, _TYPES.get(kind, ""), None)
    if dtype is None:
        raise ValueError(f"{path}: {name} is of type {kind}, which can't be read here; convert it to one of torch's")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _damaged(path, f"{name} of shape {shape} and type {kind} can't have the bytes from {begin} to {end}")
    return _Entry(dtype, shape, begin, end)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < _LARGEST


def _tensor(storage: UntypedStorage, start: int, entry: _Entry) -> Tensor:
    """A view of the mapped file."""
    strides = [math.prod(entry.shape[i + 1 :]) for i in range(len(entry.shape))]
    return view(storage[start + entry.begin : start + entry.end], entry.dtype, entry.shape, strides)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or no safetensors file: {reason}; copy or download it again")
