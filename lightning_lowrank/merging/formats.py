"""Checkpoints written tensor by tensor, as torch and safetensors write them; nothing of them is held in memory."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data
from zlib_ng.zlib_ng import crc32

from lightning_lowrank.merging.output import STRIDE, Output, bytes_of

Pieces = Callable[[], Iterator[Tensor]]
# The zip format: lengths of a local header and of a directory's entry, and where in them lengths and checksum are.
_HEADER, _LENGTHS = 30, 26
_ENTRY, _ENTRY_LENGTHS, _CHECKSUM = 46, 28, 16
_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Part:
    """A tensor that is made while it is written.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        pieces: Makes its entries, as flat pieces in row-major order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Pieces


def write_torch(output: Output, content: Any, tensors: Mapping[int, Pieces]) -> None:
    """Write what ``torch.save(content)`` would, with the values of tensors that are made on the way.

    torch itself writes the file without the tensors' data; that is then filled in from front to back, and the checksums
    of the zip format, which torch could not know, are put right.

    Args:
        output: Where to.
        content: What is saved. Tensors in it may be placeholders without values.
        tensors: By ``id`` of a tensor in ``content``, what makes its values; others are written as they are.
    """
    with skip_data():
        torch.save(content, output.temporary)
    records, directory, tail = _template(output.temporary)
    sources = _sources(output.temporary, content, sorted(records), tensors)
    output.start()
    for start, size in sorted(records.items()):
        output.keep(start)
        crc = 0
        for piece in sources[start]():
            data = bytes_of(piece)
            crc = crc32(data, crc)
            output.write(data)
        if output.position != start + size:
            raise AssertionError(f"{output.position - start} bytes were made for a record of {size}")
        # After the data: a signature of four bytes, then the checksum.
        output.keep(output.position + 4)
        output.write(struct.pack("<I", crc))
        struct.pack_into("<I", tail, directory[start] + _CHECKSUM, crc)
    output.keep(output.temporary.stat().st_size - len(tail))
    output.write(bytes(tail))


def write_safetensors(output: Output, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: eight bytes of length, a JSON header, the tensors.

    Args:
        output: Where to.
        parts: The tensors by name.
        metadata: Strings for the header.

    Raises:
        ValueError: If the format does not know a type.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    # Wide types first, so that every tensor begins at a multiple of its entries' size.
    ordered = sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, part in ordered:
        if part.dtype not in _SAFETENSORS_TYPES:
            raise ValueError(f"safetensors has no type for {name} ({part.dtype}); write a .ckpt or .pt file instead")
        end = position + part.dtype.itemsize * torch.Size(part.shape).numel()
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.start()
    output.write(struct.pack("<Q", len(text)) + text)
    for _, part in ordered:
        for piece in part.pieces():
            output.write(piece)


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor inside nested containers, in the order of the containers."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from tensors_in(value)


def _template(path: Path) -> tuple[dict[int, int], dict[int, int], bytearray]:
    """Where a template wants data.

    Returns:
        The size of every record of tensor data by its start; where each has its entry in the zip's directory; and the
        directory, with what follows it.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        file.seek(archive.start_dir)
        tail = bytearray(file.read())
        records, directory, place = {}, {}, 0
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size:
                file.seek(entry.header_offset + _LENGTHS)
                start = entry.header_offset + _HEADER + sum(struct.unpack("<HH", file.read(4)))
                records[start], directory[start] = entry.file_size, place
            place += _ENTRY + sum(struct.unpack_from("<HHH", tail, place + _ENTRY_LENGTHS))
    return records, directory, tail


def _sources(path: Path, content: Any, starts: list[int], tensors: Mapping[int, Pieces]) -> dict[int, Pieces]:
    """What fills each record of a template, by the record's start.

    The template is loaded: its tensors then lie in a mapping of the file, in the order of its records.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    pairs = [*zip(tensors_in(content), tensors_in(loaded), strict=True)]
    addresses = {twin.untyped_storage().data_ptr() for _, twin in pairs if twin.untyped_storage().nbytes()}
    if len(addresses) != len(starts):
        raise ValueError("a checkpoint holds tensors inside objects, which can't be copied; save it without them")
    by_address = dict(zip(sorted(addresses), starts, strict=True))
    sources: dict[int, Pieces] = {}
    for tensor, twin in pairs:
        start = by_address.get(twin.untyped_storage().data_ptr())
        if start is not None and (start not in sources or id(tensor) in tensors):
            sources[start] = tensors.get(id(tensor), partial(_stored, tensor))
    return sources


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The memory behind a tensor, which others may share."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    for start in range(0, len(whole), STRIDE):
        yield whole[start : start + STRIDE]
