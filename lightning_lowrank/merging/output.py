"""Files written from front to back beside their final name, and hashes of files, each in a thread of its own."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import Tensor

from lightning_lowrank.merging.atomic import Draft

Hash = Literal["blake3", "sha256"]
# New hash objects by name.
HASHES: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
# Bytes that are read or hashed between two looks at whether the merge has failed.
STRIDE = 1 << 24
# Pieces that are handed to the writing thread together, and batches that may wait for it.
_BATCH = 2
_WAITING = 4
# Seconds between calls that make the system write what it holds, so that the last one has little left to do.
_FLUSH_EVERY = 0.15


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
        view = memoryview(bytes_of(content) if isinstance(content, Tensor) else content)
        self._batch.append(view)
        self.position += len(view)
        if len(self._batch) >= _BATCH:
            self._hand_over()

    def keep(self, until: int) -> None:
        """Take over what a template holds up to this position."""
        while self.position < until:
            part = os.pread(self._descriptor, min(until - self.position, STRIDE), self.position)
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

    def publish(self, force: bool) -> None:
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
            for start in range(0, len(mapped), STRIDE):
                if self._stop.is_set():
                    break
                with memoryview(mapped) as view, view[start : start + STRIDE] as part:
                    made.update(part)
        return str(made.hexdigest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor's entries, copied only where they are on a device or not contiguous."""
    plain: Any = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(plain)


def _identity(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
