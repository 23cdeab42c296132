"""Weights in files and folders, read one tensor at a time: safetensors, checkpoints, sharded or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_lowrank.weights.checks import UnreadableError, is_plain_name
from lightning_lowrank.weights.distributed_files import METADATA, distributed_weights
from lightning_lowrank.weights.safetensors_files import by_number, safetensors_weights, unique
from lightning_lowrank.weights.source import StoredWeights
from lightning_lowrank.weights.torch_files import torch_weights

_INDEX = ".index.json"
_TORCH = (".ckpt", ".pt", ".pth", ".bin")
# How the hubs number the files of one model.
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.\w+")
_LISTED = 3


def stored_weights(path: str | Path, raw: bool = False) -> StoredWeights:
    """The weights in a file or folder: safetensors, an index of several, or a checkpoint of ``torch.save``.

    A folder may hold one of these, several files of safetensors, or a distributed checkpoint. No code of a checkpoint
    is run, and nothing is allocated out of proportion to its file. A tensor that is read is a view of the mapped file,
    whose pages the system may drop at any time; only files of torch before 1.6 are read as a whole, and of a
    distributed checkpoint a tensor that is in several pieces is put together in memory.

    Args:
        path: The file or folder.
        raw: Take the weights that a ``WeightAveraging`` callback averages instead of the average.

    Raises:
        FileNotFoundError: If the path, or a file that an index names, does not exist.
        ValueError: If the content is not readable, in one sentence.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"w": torch.eye(2)}, "epoch": 3}, f"{folder}/a.ckpt")
        ...     stored = stored_weights(f"{folder}/a.ckpt")
        ...     print(stored.shapes, stored.format, stored.rest, stored.read("w").sum().item())
        {'w': (2, 2)} checkpoint {'epoch': 3} 2.0
    """
    try:
        return _stored(Path(path), raw)
    except (ValueError, OSError) as error:
        if (text := str(error)).isprintable():
            raise
        # Names in a file can hold anything, such as what a terminal takes for commands.
        kind = ValueError if isinstance(error, ValueError) else type(error)
        raise kind("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)) from error


def _stored(path: Path, raw: bool) -> StoredWeights:
    """By what there is at a path."""
    if path.is_dir():
        return distributed_weights(path, raw) if (path / METADATA).is_file() else _folder(path, raw)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    return _indexed(path, raw) if path.name.endswith(_INDEX) else _one(path, raw)


def _one(path: Path, raw: bool) -> StoredWeights:
    """The weights in a file that is no index."""
    return safetensors_weights(path, raw) if path.suffix == ".safetensors" else torch_weights(path, raw)


def _folder(folder: Path, raw: bool) -> StoredWeights:
    """The weights in the files of a folder that belong together."""
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise type(error)(f"{folder} can't be opened ({error.strerror}); make it readable for this user") from error
    for ending in (f".safetensors{_INDEX}", ".safetensors", f".bin{_INDEX}", _TORCH):
        found = [file for file in files if file.name.endswith(ending)]
        if len(found) == 1:
            return _indexed(found[0], raw) if _INDEX in ending else _numbered(found, raw)
        if found and ending == ".safetensors":
            return _numbered(found, raw)
        if found:
            raise ValueError(f"{folder} holds {', '.join(file.name for file in found)}; name one of them")
    raise ValueError(f"{folder} holds no file of weights (safetensors, {', '.join(_TORCH)}); name the folder that does")


def _numbered(files: list[Path], raw: bool) -> StoredWeights:
    """The weights of the files of a folder, of which none may be missing."""
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    for shard in shards:
        there = {int(other["number"]) for other in shards if other["stem"] == shard["stem"]}
        if len(there) < int(shard["count"]):
            folder, count = files[0].parent, int(shard["count"])
            raise FileNotFoundError(f"{folder} holds {len(there)} of {count} files of {shard['stem']}; copy the others")
    return _together({file: _one(file, raw) for file in files}) if len(files) > 1 else _one(files[0], raw)


def _indexed(path: Path, raw: bool) -> StoredWeights:
    """The weights in the files that an index names, each tensor where the index says."""
    places = _places(path)
    for place in sorted(set(places.values())):
        if not is_plain_name(place) or place.endswith(_INDEX):
            raise ValueError(f"{path} names the file {place!r}; an index may only name weights in its own folder")
    files = {place: path.parent / place for place in sorted(set(places.values()))}
    if missing := [place for place, file in files.items() if not file.is_file()]:
        raise FileNotFoundError(f"{path} names {_some(missing)}, missing in its folder; copy them there")
    parts = {file: _one(file, raw) for file in files.values()}
    for place, file in files.items():
        expected = {name for name, other in places.items() if other == place}
        held = {*parts[file].keys.values(), *parts[file].others}
        if absent := sorted(expected - held):
            raise ValueError(f"{path} names {_some(absent)}, which {place} doesn't hold; copy both again")
        if more := sorted(held - expected):
            raise ValueError(f"{file} holds {_some(more)}, which {path.name} doesn't name; copy both again")
    stored = _together(parts)
    return replace(stored, files=(path, *stored.files))


def _places(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, UnreadableError) else "it has no readable 'weight_map'"
        raise ValueError(f"{path} is not an index of weights: {reason}; copy or download it again") from error
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{path} is not an index of weights: its 'weight_map' names no files; download it again")
    return places


def _together(parts: Mapping[Path, StoredWeights]) -> StoredWeights:
    """The weights of several files as one."""
    place: dict[str, StoredWeights] = {}
    for file, part in parts.items():
        for name in part.keys:
            if name in place:
                raise ValueError(f"{file} holds {name}, and so does another file of its folder; name one of them")
            place[name] = part
    names = sorted(place, key=by_number)
    kept = [name for name in names if name in place[name].shapes]
    return StoredWeights(
        {name: place[name].shapes[name] for name in kept},
        {name: place[name].dtypes[name] for name in kept},
        lambda name: place[name].read(name),
        {name: why for part in parts.values() for name, why in part.left_out.items()},
        [note for part in parts.values() for note in part.notes],
        {name: place[name].keys[name] for name in names},
        {name: same for part in parts.values() for name, same in part.tied.items()},
        {key: value for part in parts.values() for key, value in part.others.items()},
        next(iter(parts.values())).format,
        {key: value for part in parts.values() for key, value in part.rest.items()},
        tuple(file for part in parts.values() for file in part.files),
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
