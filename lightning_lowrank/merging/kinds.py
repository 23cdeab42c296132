"""What every tensor of a network is, as far as merging cares: told by the module, or by names where there is none."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchmetrics import Metric

from lightning_lowrank.naming import strip_wrappers
from lightning_lowrank.weights import StoredWeights, named_weights


class MergeError(ValueError):
    """The networks can't be merged; the message lists every reason."""


class Kind(enum.Enum):
    """What a tensor is. The value is what a policy calls it."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    BIAS = "bias"
    NORMALISATION = "normalisation"
    GAIN = "gain"
    STATISTIC = "statistic"
    INTEGER = "integer"
    EMBEDDING = "embedding"
    HEAD = "head"
    LORA = "lora"
    FROZEN = "frozen"
    BUFFER = "buffer"
    OTHER = "other"
    UNKNOWN = "unknown"

    @property
    def label(self) -> str:
        """The kind in words."""
        return _LABELS[self]


_LABELS = {
    Kind.LINEAR: "linear weight",
    Kind.CONVOLUTION: "convolution weight",
    Kind.BIAS: "bias",
    Kind.NORMALISATION: "normalisation gain or shift",
    Kind.GAIN: "gain",
    Kind.STATISTIC: "running statistic",
    Kind.INTEGER: "integer buffer",
    Kind.EMBEDDING: "embedding",
    Kind.HEAD: "head",
    Kind.LORA: "LoRA factor",
    Kind.FROZEN: "frozen parameter",
    Kind.BUFFER: "buffer",
    Kind.OTHER: "parameter",
    Kind.UNKNOWN: "tensor of unknown use",
}
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_STATISTICS = ("running_mean", "running_var")
# Factors that scale what passes through them: LayerScale, temperatures.
_GAIN = re.compile(r"gamma(_\d+)?|(layer_?|logit_?)?scale|lambda_\d+|temperature|alpha")
_EMBEDDING = re.compile(r"(^|_)emb|embed|token|wte$|wpe$|(^|_)pos(_emb|$)")
# Which side of a low-rank update a tensor is: the one next to the input (down, A) or next to the output (up, B).
_LORA = re.compile(r"(?P<before>.*?)lora_(?P<embedding>embedding_)?(?P<side>[AaBb]|down|up)(?P<after>(\..*)?)")
_CODES = (torch.uint8, torch.int8)
# What stands beside 8-bit floats that mean something only when multiplied with it.
_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "weight.scale")


@dataclass(frozen=True)
class Described:
    """One tensor of one network.

    Attributes:
        kind: What it is.
        shape: Its shape.
        dtype: Its type.
        read: Gives the tensor, detached; of files mapped, not copied.
        tied_to: The first name under which the same tensor occurs; its own if it occurs once.
        pair: Names of the two factors (down, up) of a LoRA update.
        why: How the kind was told, where that is not plain.
        scale: What the network multiplies a LoRA update with.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    tied_to: str
    pair: tuple[str, str] | None = None
    why: str = ""
    scale: float = 1.0


def describe_module(module: nn.Module, label: str = "the network") -> dict[str, Described]:
    """Every parameter and persistent buffer by name, without wrappers' prefixes.

    Weights behind a weight normalisation appear as the effective weight. The states of torchmetrics and non-persistent
    buffers are left out.

    Raises:
        MergeError: If a tensor has no meaningful sum; lists every one.
    """
    if problems := [*_obstacles(label, module)]:
        raise refusal(problems)
    described: dict[str, Described] = {}
    first_names: dict[int, str] = {}
    weights = named_weights(module)
    for prefix, owner in _owners(module):
        for local, tensor in _own_tensors(owner).items():
            name = strip_wrappers(f"{prefix}.{local}" if prefix else local)
            tied_to = first_names.setdefault(id(tensor), name)
            described[name] = Described(
                _kind(owner, local, tensor), tuple(tensor.shape), tensor.dtype, tensor.detach, tied_to
            )
        for local, sources in effective_weights(owner).items():
            name = strip_wrappers(f"{prefix}.{local}" if prefix else local)
            value = weights[name].value()
            kind = _kind(owner, local, nn.Parameter(value, any(source.requires_grad for source in sources)))
            read = weights[name].value
            described[name] = Described(kind, tuple(value.shape), value.dtype, read, name, why="weight normalisation")
    return _with_pairs(described, partial(_scale, {strip_wrappers(name): m for name, m in module.named_modules()}))


def describe_stored(
    stored: StoredWeights,
    structure: Mapping[str, Described] | None = None,
    scale: Callable[[str], float] | None = None,
) -> dict[str, Described]:
    """The same for a file: kinds as in a module where that is given, else by names and shapes.

    Args:
        stored: The tensors of a file.
        structure: What :func:`describe_module` says of a module of the same architecture.
        scale: Gives what a LoRA update is multiplied with, by the name of its factor.
    """
    dtypes = {name: torch_type(stored.dtypes[name]) for name in stored.shapes}
    described: dict[str, Described] = {}
    for name, shape in stored.shapes.items():
        if structure and name in structure:
            kind, why = structure[name].kind, structure[name].why
        else:
            kind, why = _kind_by_name(name, shape, dtypes[name], stored.shapes)
        described[name] = Described(kind, shape, dtypes[name], partial(stored.read, name), name, why=why)
    for name, first in stored.tied.items():
        described[name] = replace(described[first], tied_to=first)
    return _with_pairs(described, scale)


def torch_type(name: str) -> torch.dtype:
    """The type that torch calls ``torch.<name>``.

    Raises:
        MergeError: If this torch has none of that name.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise MergeError(f"tensors of type {name} can't be merged: this torch does not know the type")
    return found


def effective_weights(owner: nn.Module) -> dict[str, list[Tensor]]:
    """What a module's weight normalisations make, by name, with the tensors that they make it from."""
    made: dict[str, list[Tensor]] = {key: [*part.parameters()] for key, part in _parametrizations(owner).items()}
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            made[hook.name] = [getattr(owner, f"{hook.name}_{end}") for end in "gv"]
    return made


def refusal(problems: list[str]) -> MergeError:
    """One error that lists every problem."""
    lines = "".join(f"\n  {problem}" for problem in problems)
    return MergeError(f"the networks can't be merged; {len(problems)} obstacle(s):{lines}")


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and its submodules with their names, without metrics, parametrisations and what is inside them."""
    hidden: list[str] = []
    for name, owner in module.named_modules():
        if isinstance(owner, Metric):
            hidden.append(f"{name}.")
        hidden += [f"{name}.parametrizations." if name else "parametrizations."] if _parametrizations(owner) else []
        if not f"{name}.".startswith(tuple(hidden)):
            yield name, owner


def _own_tensors(owner: nn.Module) -> dict[str, Tensor]:
    sources = {id(source) for made in effective_weights(owner).values() for source in made}
    buffers = {name: b for name, b in owner._buffers.items() if name not in owner._non_persistent_buffers_set}
    tensors = {**owner._parameters, **buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and id(tensor) not in sources}


def _parametrizations(owner: nn.Module) -> dict[str, nn.Module]:
    found = getattr(owner, "parametrizations", None)
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}


def _kind(owner: nn.Module, name: str, tensor: Tensor) -> Kind:
    if not isinstance(tensor, nn.Parameter):
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool):
            return Kind.INTEGER
        return Kind.STATISTIC if name in _STATISTICS else Kind.BUFFER
    if not tensor.requires_grad:
        return Kind.FROZEN
    # A gain of one's own normalisation is a vector; a matrix in a class called "...Norm..." is a weight.
    if isinstance(owner, _NORMALISATIONS) or ("norm" in type(owner).__name__.lower() and tensor.ndim <= 1):
        return Kind.NORMALISATION
    if isinstance(owner, nn.PReLU) or _is_gain(name, tuple(tensor.shape)):
        return Kind.GAIN
    if "bias" in name:
        return Kind.BIAS
    if isinstance(owner, _ConvNd):
        return Kind.CONVOLUTION
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or _EMBEDDING.search(name):
        return Kind.EMBEDDING
    return Kind.LINEAR if isinstance(owner, _LINEAR) or (name == "weight" and tensor.ndim > 1) else Kind.OTHER


def _is_gain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter has the name of a factor and one entry per channel."""
    return _GAIN.fullmatch(name) is not None and sum(size > 1 for size in shape) <= 1


def _kind_by_name(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Kind, str]:
    """What a tensor of a file is, and how that was told."""
    prefix, _, local = name.rpartition(".")
    owner = prefix.rpartition(".")[2].lower()
    weight = shapes.get(f"{prefix}.weight" if prefix else "weight", ())
    is_scaled = "float8" in str(dtype) and any(f"{prefix}.{scale}".lstrip(".") in shapes for scale in _SCALES)
    if dtype in _CODES or is_scaled:
        return Kind.BUFFER, f"{str(dtype).removeprefix('torch.')} entries are codes"
    if not (dtype.is_floating_point or dtype.is_complex):
        return (Kind.BUFFER, "") if dtype is torch.bool else (Kind.INTEGER, "")
    if local in _STATISTICS:
        return Kind.STATISTIC, ""
    if local == "weight" and len(shape) == 1:
        return Kind.NORMALISATION, "a vector called weight"
    if local == "bias" and len(weight) == 1:
        return Kind.NORMALISATION, "beside a vector called weight"
    if _is_gain(local, shape):
        return Kind.GAIN, "by name"
    if "bias" in local:
        return Kind.BIAS, ""
    if _EMBEDDING.search(local) or (local == "weight" and _EMBEDDING.search(owner)):
        return Kind.EMBEDDING, "by name"
    if "weight" in local and len(shape) > 1:
        return (Kind.CONVOLUTION if len(shape) > 2 else Kind.LINEAR), "by name"
    return Kind.UNKNOWN, "neither its name nor its shape tells what it is"


def _with_pairs(described: dict[str, Described], scale: Callable[[str], float] | None) -> dict[str, Described]:
    """Trained LoRA factors told, each with the names of its pair and the scale of the update."""
    sides: dict[tuple[str, ...], dict[str, str]] = {}
    for name, tensor in described.items():
        match = _LORA.fullmatch(name)
        if match and tensor.kind not in (Kind.FROZEN, Kind.BUFFER, Kind.INTEGER, Kind.BIAS):
            side = "down" if match["side"].lower() in ("a", "down") else "up"
            place = (match["before"], match["embedding"] or "", match["after"])
            sides.setdefault(place, {})[side] = name
    for pair in sides.values():
        if len(pair) == 2:
            names = pair["down"], pair["up"]
            factor = 1.0 if scale is None else scale(pair["down"])
            for name in names:
                described[name] = replace(described[name], kind=Kind.LORA, pair=names, scale=factor)
    return described


def _scale(modules: Mapping[str, nn.Module], name: str) -> float:
    """What a module multiplies its LoRA update with: its ``scaling``, a number or one per adapter as PEFT keeps it."""
    match = _LORA.fullmatch(name)
    assert match is not None
    scaling = getattr(modules.get(match["before"].removesuffix(".")), "scaling", None)
    if isinstance(scaling, Mapping):
        scaling = scaling.get(match["after"].strip(".").partition(".")[0])
    return float(scaling) if isinstance(scaling, (int, float)) and scaling else 1.0


def _obstacles(label: str, module: nn.Module) -> Iterator[str]:
    """What in one module has no sum."""
    for prefix, owner in _owners(module):
        where = f"{strip_wrappers(prefix) or type(owner).__name__} of {label}"
        if ".quantized" in type(owner).__module__ and type(owner).__module__.startswith("torch."):
            yield f"{where}: a quantised layer, whose codes have no sum; merge the networks before they are quantised"
        parts = [part for made in _parametrizations(owner).values() for part in made.children()]
        if any(isinstance(part, (_Orthogonal, _SpectralNorm)) or not hasattr(part, "right_inverse") for part in parts):
            yield (
                f"{where}: its weight is computed by a parametrization that can't hold a sum of such weights;"
                " call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if any(isinstance(hook, SpectralNorm) for hook in owner._forward_pre_hooks.values()):
            yield f"{where}: uses the old spectral_norm; call torch.nn.utils.remove_spectral_norm first"
        for name, tensor in {**owner._parameters, **owner._buffers}.items():
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                yield f"{where}: {name} has no shape yet; run one batch through the module first"
            elif tensor is not None and (tensor.layout is not torch.strided or tensor.is_quantized):
                yield (
                    f"{where}: {name} is {tensor.layout} of {tensor.dtype}; only dense, unquantised tensors are summed"
                )
