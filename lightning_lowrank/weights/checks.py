"""What a file is by its first bytes, and where the records of an archive are: before anything in it is believed."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NoReturn

# Of a tensor of torch, in most of its functions.
MOST_DIMENSIONS = 64
# What a torch.save before torch 1.6 begins with.
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`",
    b"\x89HDF": "an HDF5 file (Keras writes these); convert it to safetensors",
    b"GGUF": "a GGUF file (llama.cpp writes these); convert it to safetensors",
    b"\x93NUMPY": "an array of NumPy; convert it to safetensors",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}
_LOCAL_HEADER, _END, _END64_PLACE = 30, 22, 20 + 22
_END64 = 56


class UnreadableError(ValueError):
    """Why something is refused; where it is caught, the name of the file and what to do is added."""


def kind_of(path: Path) -> str:
    """What a file is: "zip" or "legacy" (torch.save, new and old), "safetensors", "pickle", or "unknown".

    Raises:
        ValueError: If it is empty, or known to be something else.
        OSError: If it can't be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise type(error)(f"{path} can't be opened ({error.strerror}); make it readable for this user") from error
    if not head:
        raise ValueError(f"{path} is empty; copy or download it again")
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights; its download failed or needs a login: download it again")
    if head.startswith(_ZIP):
        return "zip"
    if head[8:9] == b"{" and head[7:8] == b"\0":
        return "safetensors"
    if head.startswith(LEGACY):
        return "legacy"
    return "pickle" if head[0] == 0x80 and 2 <= head[1] <= 5 else "unknown"


def is_plain_name(name: str) -> bool:
    """Whether a file name stays in the folder that it is looked for in."""
    return Path(name).name == name and name not in ("", "..") and not {"\\", "\0"} & {*name}


class Slice(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, never before the start."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before the start of the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As many bytes as there are and fit."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def torch_records(stream: BinaryIO, where: str) -> dict[str, range]:
    """Where each record's bytes are in an archive of ``torch.save``, by name.

    The archive has to be as torch writes it, so that every reader finds the same in it: nothing compressed, one record
    after the other, the directory at the end.

    Args:
        stream: The archive.
        where: What errors call it.

    Raises:
        ValueError: If it is not.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            entries, directory = sorted(archive.infolist(), key=lambda entry: entry.header_offset), archive.start_dir
    except Exception as error:  # a damaged directory may raise anything
        raise ValueError(
            f"{where} is cut short or damaged: the directory at its end can't be read; copy or download it again"
        ) from error
    _check_end(stream, where)
    names = [entry.orig_filename for entry in entries]
    roots = {name.partition("/")[0] for name in names}
    if len({name.lower() for name in names}) < len(names) or len(roots) > 1 or any("\0" in name for name in names):
        _refuse(where, "names a record twice or in two folders")
    records: dict[str, range] = {}
    end = 0
    for entry, name in zip(entries, names, strict=True):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            _refuse(where, f"has the compressed record {name}, so it may be a zip bomb, or was packed again")
        if entry.flag_bits & 1:
            _refuse(where, f"has the encrypted record {name}")
        if entry.header_offset < end or (entry.header_offset > 0 and not records):
            _refuse(where, f"has the record {name} outside of its place or within another one")
        begin = _begin_of_data(stream, entry.header_offset, where)
        stop = begin + entry.file_size
        if stop > directory:
            _refuse(where, f"has the record {name} outside of its place or within another one")
        records[name.partition("/")[2]], end = range(begin, stop), stop
    return records


def _refuse(where: str, what: str) -> NoReturn:
    raise ValueError(f"{where} {what}; torch.save never does that: load it where you trust it and save it again")


def _begin_of_data(stream: BinaryIO, header: int, where: str) -> int:
    """Behind the header in front of a record, which torch fills up so that the data is aligned."""
    stream.seek(header)
    local = stream.read(_LOCAL_HEADER)
    if len(local) < _LOCAL_HEADER or not local.startswith(_ZIP):
        raise ValueError(f"{where} is damaged: a record is not where its directory says; copy or download it again")
    name, extra = struct.unpack("<HH", local[26:30])
    return header + _LOCAL_HEADER + int(name) + int(extra)


def _check_end(stream: BinaryIO, where: str) -> None:
    """One end of the directory, at the end of the file: with two, readers would differ about which counts."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - _END64_PLACE))
    tail = stream.read()
    if not tail[-_END:].startswith(b"PK\x05\x06"):
        _refuse(where, "goes on behind its directory")
    if tail.startswith(b"PK\x06\x07") and struct.unpack("<Q", tail[8:16])[0] != size - _END64_PLACE - _END64:
        _refuse(where, "has two directories")
