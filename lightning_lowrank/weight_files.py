"""Weights wherever they are, read one tensor at a time: modules, state dicts, safetensors, checkpoints, folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_lowrank.naming import strip_wrappers

# Bytes that are read through one mapping of a file; then it is mapped anew, since pages once read stay in memory.
_BUDGET = 1 << 28
# Where checkpoints keep their weights: Lightning's name, then other common ones.
_KEYS = ("state_dict", "model_state_dict", "model")
_NO_DATA = "no data: on the meta device"
_INDEX = ".index.json"
_TORCH = (".ckpt", ".pt", ".pth", ".bin")
_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"}
# Old and new names of what weight normalisation makes a weight from: its length and its direction.
_NORMALISED = re.compile(r"(?P<owner>(?:.*\.)?)(?:parametrizations\.(?P<new>\w+)\.original1|(?P<old>\w+)_v)")
_PARAMETRISED = re.compile(r"(?:.*\.)?(?:parametrizations\.\w+\..*|\w+_orig)")


@dataclass
class StoredWeights:
    """Tensors by name, of which each is read when it is asked for.

    Attributes:
        shapes: By name, in the order of the source.
        dtypes: By name, as torch calls them, without ``torch.``.
        read: Gives one tensor.
        left_out: Why a tensor is not among them, by name.
        notes: What a reader has to know.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], Tensor]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Weight:
    """A parameter of a module, or the weight that a parametrisation makes.

    Attributes:
        path: Where its module is, as ``named_modules`` calls it.
        owner: The module.
        key: Its name in the module.
    """

    path: str
    owner: nn.Module
    key: str

    def value(self) -> Tensor:
        """The effective weight, computed if it is parametrised; nothing is changed by that."""
        with torch.no_grad():
            if self.key in _parametrised(self.owner):
                # In training mode a spectral normalisation would move its power iteration on.
                with _evaluating(_parametrised(self.owner)[self.key]):
                    effective: Tensor = getattr(self.owner, self.key)
                    return effective.detach()
            hook = next((hook for hook in _hooks(self.owner) if hook.name == self.key), None)
            if hook is None:
                return self.owner.get_parameter(self.key).detach()
            # What the attribute holds is that of the last forward pass.
            arguments = (self.owner, False) if isinstance(hook, SpectralNorm) else (self.owner,)
            made: Tensor = hook.compute_weight(*arguments)
            return made.detach()


def named_weights(module: nn.Module) -> dict[str, Weight]:
    """All parameters by name, without wrappers' prefixes; tied ones once, parametrised ones as the effective weight.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        >>> {name: tuple(weight.value().shape) for name, weight in named_weights(layer).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    inner = {id(part) for m in module.modules() for made in _parametrised(m).values() for part in made.modules()}
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        if id(owner) in inner:
            continue
        made = [*_parametrised(owner), *(hook.name for hook in _hooks(owner))]
        sources = {f"{key}_{end}" for key in made for end in ("g", "v", "orig")}
        own = [(key, id(p)) for key, p in owner.named_parameters(recurse=False) if _has_shape(p) and key not in sources]
        for key, identity in [*((key, 0) for key in made), *own]:
            if identity not in seen:
                seen |= {identity} - {0}
                found[strip_wrappers(f"{path}.{key}" if path else key)] = Weight(path, owner, key)
    return found


def weights_of_module(module: nn.Module) -> StoredWeights:
    """The weights of a module, parametrised ones computed when they are read.

    Raises:
        ValueError: If FSDP has flattened the parameters.
    """
    if any("_flat_param" in name for name, _ in module.named_parameters()):
        raise ValueError(
            "the module's parameters are flattened by FSDP; inspect its checkpoint, or call this inside"
            " FullyShardedDataParallel.summon_full_params(module)"
        )
    weights = named_weights(module)
    stored = StoredWeights({}, {}, lambda name: weights[name].value())
    for name, weight in weights.items():
        value = weight.value()
        stored.shapes[name] = tuple(value.shape)
        stored.dtypes[name] = str(value.dtype).removeprefix("torch.")
        if value.is_meta and value.ndim > 1:
            stored.left_out[name] = _NO_DATA
    return stored


def stored_weights(path: str | Path) -> StoredWeights:
    """The weights in a file or folder: safetensors, an index of several, or a checkpoint of ``torch.save``.

    No code of a checkpoint is run (``weights_only=True``). Memory is needed for the tensor that is read, and for pages
    of the file that the system may drop at any time.

    Raises:
        FileNotFoundError: If the path, or a file that an index names, does not exist.
        ValueError: If the content is not readable, in one sentence.
    """
    path = Path(path)
    if path.is_dir():
        path, *more = _files_of(path)
        return _several([path, *more]) if more else stored_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    if path.name.endswith(_INDEX):
        return _several(*_indexed(path))
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return _safetensors(path) if path.suffix == ".safetensors" else _checkpoint(path)


def weights_of_mapping(content: Mapping[str, Any], where: str = "the state dict") -> StoredWeights:
    """The weights in a state dict, or in a checkpoint that holds one.

    Raises:
        ValueError: If there are no tensors in it.
    """
    tensors, notes = _state_dict(content, where)
    return _of_tensors(tensors, tensors.__getitem__, notes)


def _files_of(folder: Path) -> list[Path]:
    """The files of a folder that belong together."""
    if (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} is a distributed checkpoint; make one file of it with"
            f" `python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}`"
        )
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for ending in (f".safetensors{_INDEX}", ".safetensors", f".bin{_INDEX}", _TORCH):
        found = [file for file in files if file.name.endswith(ending)]
        if found and (len(found) == 1 or ending == ".safetensors"):
            return found
        if found:
            raise ValueError(f"{folder} holds {', '.join(file.name for file in found)}; name one of them")
    raise ValueError(f"{folder} holds no file of weights (safetensors, {', '.join(_TORCH)})")


def _indexed(path: Path) -> tuple[list[Path], set[str]]:
    """The files that an index names, and the names of the tensors that they should hold."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files, names = sorted({path.parent / place for place in places.values()}), set(places)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of weights: it has no readable 'weight_map'") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{path} names {', '.join(missing) or 'no files'}, missing in its folder")
    return files, names


def _several(files: Iterable[Path], expected: set[str] | None = None) -> StoredWeights:
    """The weights of several files as one."""
    parts = [(file, stored_weights(file)) for file in files]
    place: dict[str, StoredWeights] = {}
    for file, part in parts:
        for name in part.shapes:
            if name in place:
                raise ValueError(f"{file} holds {name}, and so does another file of its folder; name one of them")
            place[name] = part
    left_out = {name: why for _, part in parts for name, why in part.left_out.items()}
    if absent := sorted((expected or set()) - {*place, *left_out}):
        raise ValueError(f"the index names {', '.join(absent[:3])}, which its files don't hold")
    names = sorted(place, key=_by_number)
    return StoredWeights(
        {name: place[name].shapes[name] for name in names},
        {name: place[name].dtypes[name] for name in names},
        lambda name: place[name].read(name),
        left_out,
        [note for _, part in parts for note in part.notes],
    )


def _safetensors(path: Path) -> StoredWeights:
    def load() -> Any:
        return safe_open(path, framework="pt")

    try:
        with load() as opened:
            # Written in the order of the alphabet, in which layer 10 comes before layer 2.
            stored = {strip_wrappers(name): name for name in sorted(opened.keys(), key=_by_number)}
            slices = {name: opened.get_slice(original) for name, original in stored.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    mapped = _Mapped(load, lambda opened, name: opened.get_tensor(stored[name]))
    return StoredWeights(shapes, dtypes, mapped.read)


def _by_number(name: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _checkpoint(path: Path) -> StoredWeights:
    tensors, notes = _state_dict(_loaded(path), str(path))
    if not _is_zip(path):
        return _of_tensors(tensors, tensors.__getitem__, notes)
    mapped = _Mapped(lambda: _state_dict(_loaded(path), str(path))[0], lambda loaded, name: loaded[name])
    return _of_tensors(tensors, mapped.read, notes)


def _loaded(path: Path) -> Any:
    """What ``torch.save`` wrote, without running code, mapped where its format allows it."""
    try:
        # The format before torch 1.6 can't be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # unpickling what is no pickle may raise anything
        if classes := _refused_classes(path):
            raise ValueError(
                f"{path} holds objects of {', '.join(classes)}, which would run code to load; if you trust it, load it"
                " yourself and pass its state dict"
            ) from error
        # A stray byte is looked up like an instruction: the message of that is a number.
        told = str(error) and not isinstance(error, KeyError)
        reason = str(error).splitlines()[0].split(". ")[0] if told else "its content is none"
        raise ValueError(f"{path} is damaged or no checkpoint of torch.save: {reason}") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refused_classes(path: Path) -> list[str]:
    """The classes that a checkpoint needs and that torch does not call harmless."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a checkpoint at all
        return []


def _state_dict(content: Any, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, wherever a checkpoint keeps them, and what is to be said of them."""
    notes: list[str] = []
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a state dict")
    key = next((key for key in _KEYS if isinstance(content.get(key), Mapping)), None)
    if key is not None:
        if "current_model_state" in content:
            notes.append("these are averaged weights (state_dict); the raw ones are in current_model_state")
        elif key != _KEYS[0]:
            notes.append(f"the weights under {key!r} are shown")
        content, where = content[key], f"{where} under {key!r}"
    tensors = {strip_wrappers(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"{where} holds no tensors by name; there is: {found}")
    return tensors, notes


def _of_tensors(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], notes: list[str]) -> StoredWeights:
    """Weights of tensors that are in memory or mapped; tied ones once."""
    first: dict[Any, str] = {}
    left_out = {}
    for name, tensor in tensors.items():
        if (same := first.setdefault(_identity(name, tensor), name)) != name and tensor.ndim > 1:
            left_out[name] = f"the same tensor as {same}"
        elif tensor.is_meta and tensor.ndim > 1:
            left_out[name] = _NO_DATA
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    return StoredWeights(
        {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in kept.items()},
        read,
        left_out,
        notes,
    )


def _identity(name: str, tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory read the same way."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return name
    try:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    except RuntimeError:  # subclasses without memory of their own
        return name


class _Mapped:
    """Reads tensors from a mapped file, and maps it anew before much of it is in memory."""

    def __init__(self, load: Callable[[], Any], get: Callable[[Any, str], Tensor]) -> None:
        self._load, self._get = load, get
        self._opened: Any = None
        self._read = 0

    def read(self, name: str) -> Tensor:
        if self._opened is None or self._read > _BUDGET:
            self._opened, self._read = None, 0
            self._opened = self._load()
        tensor = self._get(self._opened, name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor


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
    return StoredWeights(
        {name: stored.shapes[source] for name, source in names.items()},
        {name: stored.dtypes[source] for name, source in names.items()},
        read,
        {**stored.left_out, **{name: why for name, why in hidden.items() if len(stored.shapes[name]) > 1}},
        stored.notes,
    )


def _parametrised(owner: nn.Module) -> dict[str, nn.Module]:
    """What makes the parametrised weights of a module, by the weight's name."""
    made: Any = owner.parametrizations if is_parametrized(owner) else {}
    return dict(made.items())


def _hooks(owner: nn.Module) -> Iterator[Any]:
    """The old weight and spectral normalisations, which recompute a weight before every forward pass."""
    return (hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm)))


def _has_shape(parameter: Tensor) -> bool:
    return not isinstance(parameter, UninitializedParameter)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, every part put back after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
