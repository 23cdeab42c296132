"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


class Draft:
    """A file that is written in a hidden folder beside its final place, under its final name, and then moved there.

    A context manager: what is not published is removed at the end.

    Args:
        path: The final place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        self.file = self._folder / path.name

    def __enter__(self) -> Draft:
        return self

    def write(self, text: str) -> None:
        """Fill the file with a text, and wait until that is on the disk."""
        with self.file.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, force: bool = True) -> None:
        """Move the file to its place in one step, and make that last.

        Args:
            force: Whether a file that is there by now is replaced.

        Raises:
            FileExistsError: If one is there and must not be replaced.
        """
        if force:
            self.file.replace(self.path)
        else:
            self._link()
        # The name lasts when its folder is on the disk; not every system opens folders.
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _link(self) -> None:
        try:
            # Unlike a renaming, this fails where a file is.
            self.path.hardlink_to(self.file)
        except FileExistsError as error:
            raise FileExistsError(f"{str(self.path)!r} exists by now; another process has written it") from error
        except OSError:  # a file system without links
            self.file.replace(self.path)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
