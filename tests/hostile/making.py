"""What hostile files are made of: a register of them, and pickles written by hand."""

from __future__ import annotations

import os
import struct
import zipfile

import torch

STATE = {"w": torch.ones(4, 3), "b": torch.ones(4)}
# What would show that code was run.
TRACE = "touched"
# By name: what makes the file at a path, and the message that it is refused with.
FILES = {}


class Runs:
    """A pickle of it calls a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def touching():
    return Runs(os.system, f"touch {TRACE}")


def hostile(name, message):
    """Register a function that makes a file or folder of that name in the working directory."""

    def register(make):
        FILES[name] = (make, message)
        return make

    return register


def archive(path, pickled, records=None, compression=zipfile.ZIP_STORED):
    """A file like torch.save's with a pickle of our own."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **(records or {})}.items():
            file.writestr(f"archive/{name}", data)


def assembled(*instructions):
    """A pickle of {"w": what the instructions make}."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + b"".join(instructions) + b"s."


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(entries, kind="FloatStorage"):
    """A reference to data/0."""
    text = b"X\x07\x00\x00\x00storage"
    return b"(" + text + glob("torch", kind) + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(entries) + b"tQ"


def tensor(stored, shape, stride, offset=0):
    sizes = b"".join(b"(" + b"".join(map(number, part)) + b"t" for part in (shape, stride))
    rest = b"\x89" + glob("collections", "OrderedDict") + b")R"
    return glob("torch._utils", "_rebuild_tensor_v2") + b"(" + stored + number(offset) + sizes + rest + b"tR"
