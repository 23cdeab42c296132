"""Distributed checkpoints (``torch.distributed.checkpoint``), read a tensor at a time by one process.

torch itself unpickles their metadata in full, which runs whatever it says. Here neither that nor the pickle of a piece
of a tensor is executed: both are read with placeholders, for where the numbers are.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from lightning_lowrank.weights.checks import MOST_DIMENSIONS, Slice, UnreadableError, is_plain_name, torch_records
from lightning_lowrank.weights.inert_pickle import Call, InertUnpickler, described_tensor, named_type
from lightning_lowrank.weights.source import RAW, STATE_KEYS, Mapped, StoredWeights, mapped_file, no_raw, stripped, view
from lightning_lowrank.weights.torch_files import torch_content

METADATA = ".metadata"
_AGAIN = "; copy or download the folder again"
# Where Lightning keeps what is not spread over processes.
_REST = "meta.pt"
_PACKAGE = "torch.distributed.checkpoint"
_PLANNED, _OLD = f"{_PACKAGE}.metadata", "torch.distributed._shard.sharded_tensor.metadata"
# What torch writes into the metadata, besides types of numbers. Some Pythons pickle members of an Enum by getattr.
_KNOWN = {
    *(f"{_PLANNED}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_PLANNED}.{name}StorageMetadata" for name in ("Tensor", "Bytes", "Chunk")),
    *(f"{_PLANNED}.TensorProperties", f"{_OLD}.TensorProperties", f"{_OLD}.MEM_FORMAT_ENCODING"),
    *(f"{_PACKAGE}.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"),
    *("collections.OrderedDict", "builtins.getattr"),
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


class _Piece(NamedTuple):
    """A piece of a tensor: where it is in the tensor, and in which bytes of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class _Whole(NamedTuple):
    """A tensor in pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


class _Contents(NamedTuple):
    """What a distributed checkpoint holds.

    Attributes:
        wholes: Tensors by their keys in the state dict.
        pickled: The keys of what else is in it.
        holder: What the state dict is called, if it is called anything.
        files: All that were or will be read.
    """

    wholes: dict[str, _Whole]
    pickled: tuple[str, ...]
    holder: str
    files: tuple[Path, ...]


def distributed_weights(folder: Path, raw: bool = False) -> StoredWeights:
    """The weights in a distributed checkpoint of Lightning or of ``torch.distributed.checkpoint.save``.

    Args:
        folder: It holds ``.metadata`` and the files that this names.
        raw: Refused: no distributed checkpoint holds the weights of an average.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is damaged, or its metadata would run code.
    """
    if raw:
        raise ValueError(no_raw(str(folder)))
    contents = _contents(folder)
    keys = stripped((*contents.wholes, *contents.pickled), str(folder))
    of_name = {name: contents.wholes[key] for name, key in keys.items() if key in contents.wholes}
    rest: dict[str, Any] = {}
    if has_rest := (folder / _REST).is_file():
        content = torch_content(folder / _REST)
        if not isinstance(content, Mapping):
            raise ValueError(f"{folder / _REST} holds a {type(content).__name__} where Lightning writes a dict{_AGAIN}")
        rest = {name: value for name, value in content.items() if name != RAW}
    return StoredWeights(
        {name: whole.shape for name, whole in of_name.items()},
        {name: str(whole.dtype).removeprefix("torch.") for name, whole in of_name.items()},
        Mapped(lambda: _Opened(of_name)).read,
        {name: "no tensor but pickled bytes" for name in keys if name not in of_name},
        keys=keys,
        format="distributed",
        rest=rest,
        files=(*contents.files, *([folder / _REST] if has_rest else [])),
        # As in the checkpoints of one file; Lightning's FSDP calls it otherwise in distributed ones alone.
        holder=STATE_KEYS[0] if "pytorch-lightning_version" in rest else contents.holder,
    )


def _contents(folder: Path) -> _Contents:
    """What the metadata says, checked."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            reader = InertUnpickler(file)
            root = reader.load()
        foreign = [name for name in reader.names if name not in _KNOWN and not _is_type(name)]
        if foreign:
            raise UnreadableError(
                f"it names {', '.join(foreign[:3])}, which is no metadata and would run code; don't load it"
            )
        entries: dict[str, Call] = root.state["state_dict_metadata"]
        tensors = {name for name, entry in entries.items() if entry.name.endswith("TensorStorageMetadata")}
        names, holder = _names(entries, tensors, root.state.get("planner_data") or {})
        stored = _stored(root.state["storage_data"], folder)
        wholes = {name: _whole(key, entries[key], stored) for name, key in names.items() if key in tensors}
    except OSError:
        raise
    except Exception as error:  # fields of any type
        reason = str(error) if isinstance(error, UnreadableError) else f"it is not what torch writes{_AGAIN}"
        raise ValueError(f"{path} can't be read: {reason}") from error
    files = {piece.file for whole in wholes.values() for piece in whole.pieces}
    pickled = tuple(name for name, key in names.items() if key not in tensors)
    return _Contents(wholes, pickled, holder, (path, *sorted(files)))


def _is_type(name: str) -> bool:
    return isinstance(vars(torch).get(name.removeprefix("torch.")), torch.dtype)


def _names(entries: Mapping[str, Call], tensors: set[str], paths: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Entries of the state dict by their keys there, and what that is called; optimizer states are elsewhere."""
    path = {key: tuple(map(str, paths.get(key, (key,)))) for key in entries}
    heads = [path[key][:depth] for key in tensors for depth in (1, 2) if len(path[key]) > depth]
    roots = [head for head in heads if head[-1] in STATE_KEYS]
    if not roots and heads:
        there = ", ".join(sorted({head[0] for head in heads}))
        raise UnreadableError(
            f"it has no state dict under {', '.join(STATE_KEYS)}; there is: {there}; save it under one of them"
        )
    root = min(roots, key=lambda head: (len(head), STATE_KEYS.index(head[-1])), default=())
    inside = [key for key in entries if path[key][: len(root)] == root]
    names = {".".join(path[key][len(root) :]): key for key in inside}
    if len(names) < len(inside) or not tensors:
        raise UnreadableError(f"it {'names a tensor twice' if tensors else 'holds no tensors'}; save it again")
    return names, root[-1] if root else ""


def _stored(places: Mapping[Call, Call], folder: Path) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """File, first byte and length of every piece, by the tensor's key and the piece's offsets."""
    found, sizes = {}, {}
    for index, place in places.items():
        name, start, length = (place.state[field] for field in ("relative_path", "offset", "length"))
        if not is_plain_name(name):
            raise UnreadableError(f"it names the file {name!r}, which is not in its folder{_AGAIN}")
        if place.state.get("transform_descriptors"):
            raise UnreadableError(f"{name} is compressed; load the checkpoint by torch and save it again without that")
        if name not in sizes:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / METADATA} names {name}, missing in its folder; copy it there")
            sizes[name] = (folder / name).stat().st_size
        if not 0 <= start <= start + length <= sizes[name]:
            raise UnreadableError(
                f"{name} is cut short: it has {sizes[name]} bytes where {start + length} are needed{_AGAIN}"
            )
        if index.state.get("offset") is not None:
            found[index.state["fqn"], _numbers(index.state["offset"])] = (folder / name, start, length)
    return found


def _whole(key: str, entry: Call, stored: Mapping[Any, tuple[Path, int, int]]) -> _Whole:
    """A tensor whose pieces fill it, each with the bytes that it needs."""
    dtype, shape = named_type(entry.state["properties"].state[0].name), _numbers(entry.state["size"])
    pieces = []
    for chunk in entry.state["chunks"]:
        offsets, sizes = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
        piece = _Piece(offsets, sizes, *stored[key, offsets])
        inside = all(start + size <= length for start, size, length in zip(offsets, sizes, shape, strict=True))
        if not inside or math.prod(sizes) * dtype.itemsize > piece.length:
            raise UnreadableError(
                f"a piece of {key} does not fit into the tensor or into its {piece.length} stored bytes{_AGAIN}"
            )
        pieces.append(piece)
    room = sum(math.prod(piece.sizes) for piece in pieces)
    if room != math.prod(shape) or len({(piece.file, piece.start) for piece in pieces}) < len(pieces):
        raise UnreadableError(f"the pieces of {key} do not make up a tensor of shape {shape}{_AGAIN}")
    return _Whole(dtype, shape, tuple(pieces))


def _numbers(size: Any) -> tuple[int, ...]:
    """The entries of a torch.Size."""
    numbers = tuple(*size.args) if isinstance(size, Call) else tuple(size)
    if len(numbers) > MOST_DIMENSIONS or any(type(number) is not int or number < 0 for number in numbers):
        raise UnreadableError(f"a size is no list of numbers{_AGAIN}")
    return numbers


class _Opened(Mapping[str, Tensor]):
    """Tensors by name; each file is mapped when it is first needed."""

    def __init__(self, wholes: Mapping[str, _Whole]) -> None:
        self._wholes = wholes
        self._files: dict[Path, UntypedStorage] = {}

    def __len__(self) -> int:
        return len(self._wholes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wholes)

    def __getitem__(self, name: str) -> Tensor:
        whole = self._wholes[name]
        pieces = [(piece, self._piece(piece, whole.dtype)) for piece in whole.pieces]
        if len(pieces) == 1:
            return pieces[0][1]
        tensor = torch.zeros(whole.shape, dtype=whole.dtype)
        for piece, values in pieces:
            place = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
            tensor[place].copy_(values)
        return tensor

    def _piece(self, piece: _Piece, dtype: torch.dtype) -> Tensor:
        """A view of the mapped file."""
        where = f"{piece.file}, at byte {piece.start}"
        with piece.file.open("rb") as file:
            stream = io.BufferedReader(Slice(file, piece.start, piece.length))
            records = torch_records(stream, where)
            content = {name: _bytes(stream, records.get(name, range(0))) for name in ("data.pkl", "byteorder")}
        try:
            call = InertUnpickler(io.BytesIO(content["data.pkl"])).load()
            described = described_tensor(call, 0)
            numbers = records[f"data/{described.storage.key}"]
            if (described.dtype, described.shape) != (dtype, piece.sizes) or described.storage.nbytes > len(numbers):
                raise UnreadableError(f"it is no tensor of shape {piece.sizes} and type {dtype}")
            # Of complex numbers, that they are to be conjugated or negated.
            if any(isinstance(arg, dict) and arg for arg in call.args):
                raise UnreadableError("its numbers are stored with a sign of their own")
            if content["byteorder"] not in (b"", sys.byteorder.encode()):
                raise UnreadableError("its numbers are in the byte order of another kind of processor")
        except Exception as error:  # a piece may say anything
            reason = str(error) if isinstance(error, UnreadableError) else "it is no tensor of torch.save"
            raise ValueError(f"{where} can't be read: {reason}{_AGAIN}") from error
        if piece.file not in self._files:
            self._files[piece.file] = mapped_file(piece.file)
        part = self._files[piece.file][piece.start + numbers.start : piece.start + numbers.stop]
        return view(part, dtype, described.shape, described.stride, described.offset)


def _bytes(stream: BinaryIO, span: range) -> bytes:
    stream.seek(span.start)
    return stream.read(len(span))
