"""Files that are cut short, or something else than their names say."""

from __future__ import annotations

import shutil
import zipfile

import torch
from safetensors.torch import save_file

from tests.hostile.making import STATE, archive, assembled, glob, hostile


@hostile("cut.pt", r"cut.pt is cut short or damaged: the directory at its end can't be read; copy or download it again")
def _(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])


@hostile("cut_old.pt", r"cut_old.pt is damaged or can't be mapped|cut_old.pt is cut short")
def _(path):
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-400])


@hostile("documents.pt", r"is a zip archive of something else: it has no data.pkl")
def _(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w/>")


@hostile("lfs.safetensors", r"is a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`")
def _(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@hostile("lfs.ckpt", r"is a Git LFS pointer, not the file that it stands for")
def _(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@hostile("page.ckpt", r"is a web page, not weights; its download failed or needs a login: download it again")
def _(path):
    path.write_text("\n<!DOCTYPE html><html><body>404</body></html>")


@hostile("text.ckpt", r"text.ckpt is damaged or no checkpoint of torch.save")
def _(path):
    path.write_text("hello world")


@hostile("packed.ckpt", r"is compressed with gzip; unpack it first")
def _(path):
    path.write_bytes(b"\x1f\x8b\x08\x00")


@hostile("empty.ckpt", r"empty.ckpt is empty; copy or download it again")
def _(path):
    path.touch()


@hostile("folder", r"folder holds no file of weights \(.*\); name the folder that does")
def _(path):
    path.mkdir()
    (path / "README.md").write_text("hello")


@hostile("wrong.ckpt", r"wrong.ckpt holds safetensors; let its name end in .safetensors")
def _(path):
    save_file(STATE, path)


@hostile("wrong.safetensors", r"is no safetensors file but a zip archive or pickle, as torch.save writes; rename it")
def _(path):
    torch.save(STATE, path.with_name("right.pt"))
    shutil.copy(path.with_name("right.pt"), path)


@hostile(
    "stale.ckpt", r"under 'state_dict' holds a and _orig_mod.a, two names of one tensor; remove the one that is stal"
)
def _(path):
    torch.save({"state_dict": {"a": torch.ones(1), "_orig_mod.a": torch.ones(2)}}, path)


@hostile("shard.pt", r"holds the shards of one process alone; save the whole state dict \(full_state_dict=True\)")
def _(path):
    # As a process' own DTensors are pickled, of which the class is enough to know them by.
    archive(path, assembled(glob("torch.distributed.tensor", "DTensor")))


@hostile("numbers.pt", r"numbers.pt has the key 3, where names of tensors must be strings")
def _(path):
    torch.save({"a": torch.ones(1), 3: torch.ones(1)}, path)


@hostile("escapes.pt", r"escapes.pt holds no tensors by name; there is: \\x1b\[2J\\nhello$")
def _(path):
    torch.save({"\x1b[2J\nhello": 3}, path)


@hostile("list.pt", r"list.pt holds a list, not a state dict")
def _(path):
    torch.save([torch.ones(1)], path)
