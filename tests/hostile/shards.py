"""Indexes of shards that lead astray, and folders of shards that do not fit together."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tests.hostile.making import hostile


def index(name, message, places):
    """An index beside two shards."""

    def make(path):
        save_file({"w": torch.ones(2), "v": torch.ones(2)}, path.with_name("a.safetensors"))
        save_file({"b": torch.ones(2)}, path.with_name("b.safetensors"))
        path.write_text(places if isinstance(places, str) else json.dumps({"weight_map": places}))

    hostile(f"{name}.safetensors.index.json", message)(make)


BOTH = {"w": "a.safetensors", "v": "a.safetensors", "b": "b.safetensors"}
OUTSIDE = r"an index may only name weights in its own folder"
index("above", rf"names the file '\.\./a.safetensors'; {OUTSIDE}", {"w": "../a.safetensors"})
index("absolute", rf"names the file '/etc/passwd'; {OUTSIDE}", {"w": "/etc/passwd"})
index("below", rf"names the file 'x/../../a.safetensors'; {OUTSIDE}", {"w": "x/../../a.safetensors"})
index("backslash", rf"names the file '.*\\a.safetensors'; {OUTSIDE}", {"w": "..\\a.safetensors"})
index("parent", rf"names the file '\.\.'; {OUTSIDE}", {"w": ".."})
index("null", rf"names the file 'a\\x00'; {OUTSIDE}", {"w": "a\0"})
index("itself", rf"names the file 'itself.safetensors.index.json'; {OUTSIDE}", {"w": "itself.safetensors.index.json"})
index("absent", r"names c.safetensors, missing in its folder; copy them there", {**BOTH, "c": "c.safetensors"})
index("more", r"more.*json names z, which b.safetensors doesn't hold; copy both again", {**BOTH, "z": "b.safetensors"})
index("less", r"a.safetensors holds v, which less.*json doesn't name; copy both again", {"w": "a.safetensors"})
index("twice", r"it names 'w' twice", '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}')
index("list", r"its 'weight_map' names no files", '{"weight_map": {"w": ["a.safetensors"]}}')
index("none", r"it has no readable 'weight_map'; copy or download it again", '{"metadata": {}}')
index("text", r"it has no readable 'weight_map'", "hello")


@hostile(
    "in_two", r"model-00002-of-00002.safetensors holds w, and so does another file of its folder; name one of them"
)
def _(path):
    path.mkdir()
    for i in (1, 2):
        save_file({"w": torch.ones(2)}, path / f"model-0000{i}-of-00002.safetensors")


@hostile("incomplete", r"incomplete holds 2 of 3 files of model; copy the others")
def _(path):
    path.mkdir()
    for i in (1, 3):
        save_file({f"w{i}": torch.ones(2)}, path / f"model-0000{i}-of-00003.safetensors")
