"""Checkpoints written tensor by tensor: nothing of them is held in memory, and they appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import queue
import struct
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import Tensor
from torch.serialization import skip_data
from zlib_ng.zlib_ng import crc32

from lightning_lowrank.merging.atomic import Draft

Hash = Literal["blake3", "sha256"]
Pieces = Callable[[], Iterator[Tensor]]
# New hash objects by name.
HASHES: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
# Pieces that are handed to the writing thread together, and batches that may wait for it.
_BATCH = 2
_WAITING = 4
# Seconds between calls that make the system write what it holds, so that the last one has little left to do.
_FLUSH_EVERY = 0.15
# Bytes that are hashed between two looks at whether the merge has failed.
_STRIDE = 1 << 24
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


class Output:
    """A file that is written from front to back beside its final name, hashed on the way, and then renamed.

    A thread of its own writes and hashes, while the caller computes. Used as a context manager: until it is published
    the file has a temporary name, and what is not published is removed at the end.

    Args:
        path: The final name.
        hash_name: The hash of the content.
    """

    def __init__(self, path: Path, hash_name: Hash) -> None:
        self.path = path
        self._draft = Draft(path)
        self.temporary = self._draft.file
        self._hash = HASHES[hash_name]()
        self._queue: queue.Queue[list[Any] | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._done = threading.Event()
        self._batch: list[Any] = []
        self._descriptor = -1
        self._threads: list[threading.Thread] = []
        self.position = 0

    def __enter__(self) -> Output:
        return self

    def start(self) -> None:
        """Open the temporary file, which may have been filled with a template, and begin to write at its front."""
        self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666)
        works = (self._write_all, self._flush_often)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def write(self, content: Any) -> None:
        """Put bytes, or the memory of a flat tensor, at the end of what was written."""
        view = memoryview(_bytes_of(content) if isinstance(content, Tensor) else content)
        self._batch.append(view)
        self.position += len(view)
        if len(self._batch) >= _BATCH:
            self._hand_over()

    def keep(self, until: int) -> None:
        """Take over what a template holds up to this position."""
        while self.position < until:
            part = os.pread(self._descriptor, min(until - self.position, _STRIDE), self.position)
            if not part:
                raise OSError(f"{self.temporary} ended while it was written")
            self.write(part)

    def digest(self) -> str:
        """The hash of everything that was written."""
        return str(self._hash.hexdigest())

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: If it could not be written.
        """
        self._hand_over()
        self._stop()
        if self._failure is not None:
            raise self._failure
        os.ftruncate(self._descriptor, self.position)
        os.fsync(self._descriptor)

    def publish(self, force: bool = False) -> None:
        """Give the file its name, in one step, and make that last; ``force`` replaces one that is there by now."""
        self._draft.publish(force)

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._draft.__exit__()

    def _stop(self) -> None:
        """End the threads."""
        if self._threads:
            self._queue.put(None)
            self._done.set()
            for thread in self._threads:
                thread.join()
            self._threads = []

    def _hand_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._batch:
            self._queue.put(self._batch)
            self._batch = []

    def _write_all(self) -> None:
        position = 0
        while (batch := self._queue.get()) is not None:
            if self._failure is not None:
                continue
            try:
                for part in batch:
                    self._hash.update(part)
                    while part:
                        written = os.pwrite(self._descriptor, part, position)
                        position, part = position + written, part[written:]
            except BaseException as error:  # handed to the caller's thread
                self._failure = error

    def _flush_often(self) -> None:
        while not self._done.wait(_FLUSH_EVERY):
            # What can't be written is told by the last call, which is not in a thread.
            with contextlib.suppress(OSError):
                os.fdatasync(self._descriptor) if hasattr(os, "fdatasync") else os.fsync(self._descriptor)


class FileHashes:
    """Hashes of files, computed by a thread while other work goes on.

    Args:
        files: The files; each must stay as it is until the end.
        hash_name: The hash.
    """

    def __init__(self, files: Iterable[Path], hash_name: Hash) -> None:
        self._files = [*dict.fromkeys(files)]
        self._name: Hash = hash_name
        self._seen = {file: _identity(file) for file in self._files}
        self._stop = threading.Event()
        self._found: dict[Path, str] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> dict[Path, str]:
        """The hashes by file.

        Raises:
            ValueError: If a file was changed meanwhile.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for file, identity in self._seen.items():
            if _identity(file) != identity:
                raise ValueError(f"{file} was changed while it was merged; merge again when nothing writes to it")
        return self._found

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for file in self._files:
                self._found[file] = self._hashed(file)
        except BaseException as error:  # handed to the caller's thread
            self._failure = error

    def _hashed(self, file: Path) -> str:
        made = HASHES[self._name]()
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for start in range(0, len(mapped), _STRIDE):
                if self._stop.is_set():
                    break
                with memoryview(mapped) as view, view[start : start + _STRIDE] as part:
                    made.update(part)
        return str(made.hexdigest())


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
            data = _bytes_of(piece)
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
    for start in range(0, len(whole), _STRIDE):
        yield whole[start : start + _STRIDE]


def _bytes_of(tensor: Tensor) -> memoryview:
    plain: Any = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(plain)


def _identity(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
