"""Small files that claim to be large, or that different readers would read differently."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile

import torch

from tests.hostile.making import STATE, archive, assembled, glob, hostile, number, storage, tensor, touching


@hostile("deflated.pt", r"has the compressed record archive/data.pkl, so it may be a zip bomb, or was packed again")
def _(path):
    archive(path, b"\x80\x02}" + b"0" * (1 << 26), compression=zipfile.ZIP_DEFLATED)


@hostile("deflated_data.pt", r"has the compressed record archive/data/0")
def _(path):
    archive(path, assembled(tensor(storage(1 << 26), (1 << 26,), (1,))))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(1 << 26), zipfile.ZIP_DEFLATED)


@hostile("twice.pt", r"names a record twice or in two folders; torch.save never does that")
def _(path):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")
        for _i in range(2):
            file.writestr("archive/data.pkl", pickle.dumps({}, 2))


@hostile("cases.pt", r"names a record twice or in two folders")
def _(path):
    archive(path, pickle.dumps({}, 2), {"DATA.PKL": pickle.dumps(touching(), 2)})


@hostile("overlapping.pt", r"has the record archive/data/0 outside of its place or within another one")
def _(path):
    archive(path, pickle.dumps({}, 2), {"data/0": bytes(64), "data/1": bytes(64)})
    with zipfile.ZipFile(path, "a") as file:
        file.getinfo("archive/data/0").header_offset = file.getinfo("archive/data.pkl").header_offset + 1
        file.writestr("archive/x", "")
    content = path.read_bytes()
    place = struct.pack("<L", 1)
    path.write_bytes(content.replace(place + b"archive/data/0", struct.pack("<L", 0) + b"archive/data/0"))


@hostile("too_long.pt", r"has the record archive/data/0 outside of its place")
def _(path):
    archive(path, pickle.dumps({}, 2), {"data/0": b"\x11" * 1234})
    sizes = struct.pack("<LL", 1234, 1234)
    path.write_bytes(path.read_bytes().replace(sizes, struct.pack("<LL", 1 << 31, 1 << 31)))


@hostile("behind.pt", r"goes on behind its directory; torch.save never does that")
def _(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes() + b"more")


@hostile("second_directory.pt", r"has two directories; torch.save never does that")
def _(path):
    archive(path, pickle.dumps({}, 2))
    body, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    entries, size, offset = struct.unpack("<HLL", end[10:20])
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, offset)
    path.write_bytes(body + end64 + struct.pack("<4sLQL", b"PK\x06\x07", 0, 30, 1) + end)


@hostile("expanded.pt", r"a tensor of shape \(8192, 8192\) is described with 4 stored bytes; don't load it")
def _(path):
    torch.save({"w": torch.ones(1).expand(8192, 8192)}, path)


@hostile("old_expanded.pt", r"a tensor of shape \(8192, 8192\) is described with 4 stored bytes; don't load it")
def _(path):
    torch.save({"w": torch.ones(1).expand(8192, 8192)}, path, _use_new_zipfile_serialization=False)


@hostile("beyond.pt", r"a tensor of shape \(1000,\) reaches beyond its 4 stored bytes")
def _(path):
    archive(path, assembled(tensor(storage(1), (1000,), (1,))), {"data/0": bytes(4)})


@hostile("strides.pt", r"a tensor of shape \(2, 2\) reaches beyond its 16 stored bytes")
def _(path):
    archive(path, assembled(tensor(storage(4), (2, 2), (1 << 40, 1))), {"data/0": bytes(16)})


@hostile("short_record.pt", r"its record data/0 is missing or short; copy or download it again")
def _(path):
    archive(path, assembled(tensor(storage(1 << 30), (1 << 30,), (1,))), {"data/0": bytes(4)})


@hostile("old_long.pt", r"is cut short: it should hold more numbers than it has")
def _(path):
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"M\xe8\x03N", b"J\xff\xff\xff\x7fN"))


@hostile("bytearray.pt", r"damaged or hostile: a builtins.bytearray is made in a way that torch.save never does; don't")
def _(path):
    archive(path, assembled(glob("__builtin__", "bytearray"), b"(", number(1 << 36), b"tR"))


@hostile("constructor.pt", r"damaged or hostile: torch.FloatTensor is called in a way that torch.save never does")
def _(path):
    archive(path, assembled(glob("torch", "FloatTensor"), b"(", number(1 << 36), b"tR"))


@hostile("device.pt", r"torch._utils._rebuild_device_tensor_from_cpu_tensor is called in a way that torch.save never")
def _(path):
    made = tensor(storage(1), (1 << 20,), (0,)) + glob("torch", "float64") + b"X\x03\x00\x00\x00cpu\x89tR"
    made = glob("torch._utils", "_rebuild_device_tensor_from_cpu_tensor") + b"(" + made
    archive(path, assembled(made), {"data/0": bytes(4)})


@hostile("many_sets.pt", r"collections are made of one another in a way that torch.save never does")
def _(path):
    entries = b"]q\x01(" + b"K\x01" * 1000 + b"e"
    archive(path, assembled(b"](", entries, (glob("__builtin__", "set") + b"h\x01\x85R") * 1000, b"e"))


@hostile("changed.pt", r"what torch._utils._rebuild_tensor_v2 made is changed in a way that torch.save never does")
def _(path):
    made = tensor(storage(1), (1,), (1,))
    state = b"(" + storage(1) + b"K\x00" + number(1 << 36) + b"\x85K\x00\x85tb"
    archive(path, assembled(made, state), {"data/0": bytes(4)})


@hostile("nested_calls.pt", r"is made in a way that torch.save never does")
def _(path):
    call = glob("torch._tensor", "_rebuild_from_type_v2")
    archive(path, assembled(call, b"]q\x05(" + call + glob("torch", "Tensor") + b"h\x05}e", b"R"))


@hostile("memo.pt", r"memo.pt (holds no tensors|is damaged)")
def _(path):
    archive(path, b"\x80\x02}r\xf0\xff\xff\xff.")


@hostile("allocating.pt", r"allocating.pt is damaged: its pickle can't be read; copy or download it again")
def _(path):
    archive(path, b"\x80\x02}X\x01\x00\x00\x00w\x96" + struct.pack("<Q", 1 << 36) + b"s.")
