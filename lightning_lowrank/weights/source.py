"""Tensors by name, of which each is read when it is asked for; and how a checkpoint's content becomes that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor

from lightning_lowrank.naming import strip_wrappers

NO_DATA = "no data: on the meta device"
# Where checkpoints keep their weights: Lightning's name, then other common ones.
STATE_KEYS = ("state_dict", "model_state_dict", "model")
# Where Lightning's WeightAveraging puts the weights that it averages; the average is in the state dict.
RAW = "current_model_state"
# Bytes that are read through one mapping of a file; then it is mapped anew, since pages once read stay in memory.
_BUDGET = 1 << 28
# Old and new names of what weight normalisation makes a weight from: its length and its direction.
_NORMALISED = re.compile(r"(?P<owner>(?:.*\.)?)(?:parametrizations\.(?P<new>\w+)\.original1|(?P<old>\w+)_v)")
_PARAMETRISED = re.compile(r"(?:.*\.)?(?:parametrizations\.\w+\..*|\w+_orig)")


@dataclass
class StoredWeights:
    """Tensors by name, of which each is read when it is asked for.

    Attributes:
        shapes: By name, in the order of the source.
        dtypes: By name, as torch calls them, without ``torch.``.
        read: Gives one tensor; of a file that can be mapped, without a copy.
        left_out: Why a tensor is not among them, by name.
        notes: What a reader has to know.
        keys: The name in the source, before wrappers were stripped; those of tied tensors and of ones left out too.
        tied: For a tensor that is the same memory as an earlier one, that one's name.
        others: What a state dict holds beside tensors, such as extra states, by its key in the source.
        format: "lightning", "checkpoint" (another one that holds a state dict), "state dict", "safetensors" or
            "distributed"; empty for a module.
        rest: What the source holds beside the state dict: hyperparameters, epoch, optimizer states.
        files: All files that it was read from.
        holder: Under which key of a checkpoint the state dict is; empty for a bare one.
        normalised: For a weight that :func:`with_normalised` put together, the names of its length and direction, and
            the shape of the length.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], Tensor]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    format: str = ""
    rest: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    holder: str = ""
    normalised: Mapping[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=dict)


class Mapped:
    """Reads tensors from a mapped file, and maps it anew before much of it is in memory."""

    def __init__(self, load: Callable[[], Mapping[str, Tensor]], opened: Mapping[str, Tensor] | None = None) -> None:
        self._load = load
        self._tensors = opened or {}
        self._left = _BUDGET if opened else 0

    def read(self, name: str) -> Tensor:
        """One tensor, valid for as long as it is held."""
        if self._left <= 0:
            self._tensors = {}
            self._tensors, self._left = self._load(), _BUDGET
        tensor = self._tensors[name]
        self._left -= tensor.numel() * tensor.element_size()
        return tensor


def mapped_file(path: Path) -> UntypedStorage:
    """All bytes of a file, read when they are used; what is written to them stays in memory."""
    storage = UntypedStorage.from_file(str(path), False, path.stat().st_size)
    assert isinstance(storage, UntypedStorage)  # its signature says less
    return storage


def view(part: Any, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    """A tensor of a part of a mapped file.

    Raises:
        RuntimeError: If it reaches beyond that part.
    """
    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(part, offset, shape, stride)
    return tensor


def weights_of_mapping(content: Any, where: str = "the state dict", raw: bool = False) -> StoredWeights:
    """The weights in a state dict, or in a checkpoint that holds one.

    Args:
        content: The state dict or checkpoint.
        where: What errors call it.
        raw: Take the weights that a ``WeightAveraging`` callback averages instead of the average.

    Raises:
        ValueError: If there are no tensors in it, or two of one name.
    """
    found = _found(content, where, raw)
    if odd := [key for key in found.state if not isinstance(key, str)]:
        raise ValueError(f"{found.where} has the key {odd[0]!r}, where names of tensors must be strings")
    tensors = {key: value for key, value in found.state.items() if isinstance(value, Tensor)}
    if not tensors:
        there = ", ".join(list(found.state)[:5]) or "nothing"
        raise ValueError(f"{found.where} holds no tensors by name; there is: {there}")
    keys = stripped(tensors, found.where)
    stored = described({name: tensors[key] for name, key in keys.items()})
    others = {key: value for key, value in found.state.items() if key not in tensors}
    return replace(
        stored,
        keys=keys,
        others=others,
        format=found.format,
        rest=found.rest,
        notes=found.notes,
        holder=found.holder,
    )


class _Found(NamedTuple):
    """A state dict, where it is, and what is beside it."""

    state: Mapping[Any, Any]
    where: str
    format: str
    rest: dict[str, Any]
    notes: list[str]
    holder: str = ""


def _found(content: Any, where: str, raw: bool) -> _Found:
    """The state dict in a checkpoint, or the content itself."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a state dict")
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    averaged = isinstance(content.get(RAW), Mapping)
    if raw and not averaged:
        raise ValueError(no_raw(where))
    if key is None:
        return _Found(content, where, "state dict", {}, [])
    notes = []
    if averaged:
        kinds = (("raw", RAW), ("averaged", key))
        (this, place), (other, elsewhere) = kinds if raw else kinds[::-1]
        notes.append(f"these are {this} weights ({place}); the {other} ones are in {elsewhere}")
    elif key != STATE_KEYS[0]:
        notes.append(f"these are the weights under {key!r}")
    rest = {name: value for name, value in content.items() if name not in (key, RAW)}
    is_lightning = key == STATE_KEYS[0] and "pytorch-lightning_version" in content
    chosen = RAW if raw else key
    kind = "lightning" if is_lightning else "checkpoint"
    return _Found(content[chosen], f"{where} under {chosen!r}", kind, rest, notes, key)


def no_raw(where: str) -> str:
    """What is said when a source has no weights that an average was made of."""
    return f"{where} has no {RAW}, which a WeightAveraging callback writes: its only weights are read without raw"


def stripped(keys: Any, where: str) -> dict[str, str]:
    """The keys by their names without wrappers.

    Raises:
        ValueError: If two have one name.
    """
    names: dict[str, str] = {}
    for key in keys:
        if (other := names.setdefault(strip_wrappers(key), key)) is not key:
            raise ValueError(f"{where} holds {other} and {key}, two names of one tensor; remove the one that is stale")
    return names


def described(tensors: Mapping[str, Tensor]) -> StoredWeights:
    """Tensors that are in memory or mapped; tied ones once, those that are no plain numbers left out."""
    first: dict[Any, str] = {}
    left_out, tied = {}, {}
    for name, tensor in tensors.items():
        if (reason := _no_plain_numbers(tensor)) is not None:
            left_out[name] = reason
        elif (same := first.setdefault(_identity(name, tensor), name)) != name:
            tied[name] = same
            if tensor.ndim > 1:
                left_out[name] = f"the same tensor as {same}"
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    return StoredWeights(
        {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in kept.items()},
        tensors.__getitem__,
        left_out,
        tied=tied,
    )


def _no_plain_numbers(tensor: Tensor) -> str | None:
    """Why a tensor's entries can't be read as they are."""
    if tensor.is_meta:
        return NO_DATA
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    return f"entries of type {str(tensor.dtype).removeprefix('torch.')}" if tensor.is_quantized else None


def _identity(name: str, tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory read the same way."""
    if tensor.numel() == 0:
        return name
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    try:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    except RuntimeError:  # subclasses without memory of their own
        return name


def with_normalised(stored: StoredWeights) -> StoredWeights:
    """Weights behind a weight normalisation put together; those behind another parametrisation left out.

    ``w = g v / |v|`` with the norm over the dimensions in which g has length 1 (Salimans and Kingma, 2016).
    """
    lengths, makes = {}, {}
    for name in stored.shapes:
        if (match := _NORMALISED.fullmatch(name)) is not None:
            length = f"{name[:-1]}0" if match["new"] else f"{name[:-1]}g"
            if length in stored.shapes:
                made = f"{match['owner']}{match['new'] or match['old']}"
                lengths[made], makes[name] = length, made
    directions = {made: name for name, made in makes.items()}

    def read(name: str) -> Tensor:
        if name not in directions:
            return stored.read(name)
        length, direction = (stored.read(source).double() for source in (lengths[name], directions[name]))
        fixed = [i for i, size in enumerate(length.shape) if size == 1] or None
        made: Tensor = direction * (length / torch.linalg.vector_norm(direction, dim=fixed, keepdim=True))
        return made.to(stored.read(directions[name]).dtype)

    used = set(lengths.values())
    rest = [name for name in stored.shapes if name not in used]
    gone = {name for name in rest if name not in makes and _PARAMETRISED.fullmatch(name)}
    names = {makes.get(name, name): name for name in rest if name not in gone}
    hidden = dict.fromkeys(gone, "parametrised in a way that a file does not tell; inspect the module")
    return replace(
        stored,
        shapes={name: stored.shapes[source] for name, source in names.items()},
        dtypes={name: stored.dtypes[source] for name, source in names.items()},
        read=read,
        left_out={**stored.left_out, **{name: why for name, why in hidden.items() if len(stored.shapes[name]) > 1}},
        normalised={made: (lengths[made], directions[made], stored.shapes[lengths[made]]) for made in directions},
    )
