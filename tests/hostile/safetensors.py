"""Files of safetensors whose headers are wrong."""

from __future__ import annotations

import json
import struct

from safetensors.torch import save

from tests.hostile.making import STATE, hostile


def with_header(path, header, data=bytes(16), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(begin=0, end=16, shape=(4,), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(name, message, header, **options):
    hostile(f"{name}.safetensors", message)(lambda path: with_header(path, header, **options))


PAIR = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)
safetensors("absurd", r"header too large \(\d+ bytes in a file of 26\)", b"{}", length=1 << 62)
safetensors("long", r"header too large \(99999999 bytes in a file of 26\)", b"{}", length=99_999_999)
safetensors("no_json", r"its header is no JSON; copy or download it again", b"{hello}")
safetensors("deep", r"its header is no JSON", b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
safetensors("array", r"its header is no JSON object", b"[]")
safetensors("twice", r"it names 'a' twice; copy or download it again", PAIR)
safetensors("type", r"a is of type F7, which can't be read here; convert it", {"a": entry(kind="F7")})
safetensors("overlap", r"begins at byte 8 of the data, where another .* at 16", {"a": entry(), "b": entry(8, 24)})
safetensors("outside", r"incomplete, it has \d+ bytes where its header says", {"a": entry(0, 4000, (1000,))})
safetensors(
    "hole", r"b begins at byte 20 of the data, where another tensor ends at 16", {"a": entry(), "b": entry(20, 36)}
)
safetensors("shape", r"a of shape \(5,\) and type F32 can't have the bytes from 0 to 16", {"a": entry(shape=(5,))})
safetensors("negative", r"its header does not say what a is", {"a": entry(shape=(-4,))})
safetensors("dimensions", r"its header does not say what a is", {"a": entry(shape=(1,) * 10_000)})
safetensors("fields", r"its header does not say what a is", {"a": [1, 2]})
safetensors("metadata", r"its __metadata__ is no object of strings", {"a": entry(), "__metadata__": {"x": [1]}})
safetensors("nothing", r"nothing.safetensors holds no tensors", {}, data=b"")


@hostile("cut.safetensors", r"incomplete, it has \d+ bytes where its header says \d+; copy or download it again")
def _(path):
    path.write_bytes(save(STATE)[:-10])
