"""Pickles that run code where they are trusted."""

from __future__ import annotations

import builtins
import functools
import io
import json
import pickle
import tarfile

import numpy as np
import torch
from torch import nn

from tests.hostile.making import STATE, TRACE, Runs, archive, assembled, glob, hostile, touching


@hostile("system.ckpt", r"holds objects of .*system, which would run code to load; if you trust them, allow them in")
def _(path):
    torch.save({"state_dict": STATE, "hyper_parameters": touching()}, path)


@hostile("exec.pt", r"holds objects of .*exec, which would run code to load")
def _(path):
    torch.save({"w": torch.ones(2), "x": Runs(builtins.exec, f"open('{TRACE}', 'w')")}, path)


@hostile("partial.ckpt", r"holds objects of functools.partial, .*open.*add_safe_globals\(\[partial, open\]\)")
def _(path):
    torch.save({"state_dict": STATE, "f": functools.partial(1 and open, TRACE, "w")}, path)


@hostile("numpy.ckpt", r"holds objects of numpy.*scalar.*, which would run code to load")
def _(path):
    torch.save({"state_dict": STATE, "lr": np.float64(0.1)}, path)


@hostile("old.pt", r"old.pt holds objects of .*system, which would run code to load")
def _(path):
    torch.save({**STATE, "x": touching()}, path, _use_new_zipfile_serialization=False)


@hostile(
    "plain.ckpt", r"is a plain pickle \(of (posix|nt).system\), which would run code to load; if you trust it, load"
)
def _(path):
    path.write_bytes(pickle.dumps({"w": touching()}, protocol=4))


@hostile("text_pickle.pt", r"text_pickle.pt is damaged or no checkpoint of torch.save; copy or download it again")
def _(path):
    path.write_bytes(pickle.dumps({"w": touching()}, protocol=0))


@hostile(
    "module.pt", r"holds a whole torch.nn.modules.linear.Linear, pickled with its class, .* save its state_dict\(\)"
)
def _(path):
    torch.save(nn.Linear(2, 2), path)


@hostile("old_module.pt", r"holds a whole torch.nn.modules.linear.Linear, pickled with its class")
def _(path):
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)


@hostile("protocol.pt", r"was saved with pickle protocol 4, which torch can't read without running code; .*protocol 2")
def _(path):
    torch.save(STATE, path, pickle_protocol=4)


@hostile("script.pt", r"is a TorchScript program; load it by torch.jit.load and save its state_dict\(\)")
def _(path):
    archive(path, pickle.dumps({}, 2), {"constants.pkl": pickle.dumps(touching(), 2)})


@hostile("by_name.pt", r"holds objects of torch.hub.load, which would run code")
def _(path):
    archive(path, assembled(glob("torch.hub", "load"), b"(X\x01\x00\x00\x00.tR"))


@hostile("getattr.pt", r"holds objects of builtins.getattr, os.path, which would run code")
def _(path):
    system = b"(" + glob("os", "path") + b"X\x06\x00\x00\x00systemtR"
    archive(path, assembled(glob("__builtin__", "getattr"), system, b"(X\x0d\x00\x00\x00touch touched", b"tR"))


@hostile("computed.pt", r"computed.pt is damaged or can't be mapped")
def _(path):
    archive(path, assembled(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", b"(X\x0d\x00\x00\x00touch touchedtR"))


@hostile("tar.pt", r"tar.pt is damaged or no checkpoint of torch.save")
def _(path):
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(touching(), 2)
            file.addfile(entry := tarfile.TarInfo(name), io.BytesIO(data[: entry.size]))


@hostile("shards.bin.index.json", r"evil.bin holds objects of .*system, which would run code")
def _(path):
    torch.save({"w": touching()}, path.with_name("evil.bin"))
    path.write_text(json.dumps({"weight_map": {"w": "evil.bin"}}))
