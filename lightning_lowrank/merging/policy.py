"""One rule per tensor, decided before anything is computed."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm
from torchmetrics import Metric

from lightning_lowrank.naming import strip_wrappers


class MergeError(ValueError):
    """The networks can't be merged; the message lists every reason."""


class Kind(enum.Enum):
    """What a tensor is, as far as merging cares."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORMALISATION = "normalisation gain or shift"
    STATISTIC = "running statistic"
    INTEGER = "integer buffer"
    BUFFER = "buffer"
    FROZEN = "frozen parameter"


class Rule(enum.Enum):
    """How a merged tensor is made."""

    SUM = "sum"
    MEAN = "mean"
    FIRST = "first"
    EQUAL = "equal"


# Why each kind has its rule:
# - weights and biases carry what a network learned, and the theory merges them by summing;
# - a gain multiplies what is there: two gains of about 1 would sum to 2. Shifts follow their gain;
# - running statistics describe data, and both networks' merged features are nearest to neither alone;
# - a counter or index has no sum, and an integer sum may leave its type;
# - what was not trained is not the network's to change: keeping it twice (a shared frozen output layer) would double
# it.
RULES = {
    Kind.WEIGHT: Rule.SUM,
    Kind.BIAS: Rule.SUM,
    Kind.NORMALISATION: Rule.MEAN,
    Kind.STATISTIC: Rule.MEAN,
    Kind.INTEGER: Rule.FIRST,
    Kind.BUFFER: Rule.EQUAL,
    Kind.FROZEN: Rule.EQUAL,
}
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Entry:
    """One tensor of the merge.

    Attributes:
        name: The name in the module, without wrappers' prefixes.
        kind: What it is.
        tensors: One tensor per module, of one shape; the base's last.
    """

    name: str
    kind: Kind
    tensors: tuple[Tensor, ...]

    @property
    def rule(self) -> Rule:
        """How the merged tensor is made."""
        return RULES[self.kind]


@dataclass(frozen=True)
class _Named:
    kind: Kind
    tensor: Tensor
    tied_to: str


def plan(modules: Sequence[nn.Module], base: nn.Module | None = None) -> list[Entry]:
    """Pair the modules' tensors by name and give each its kind.

    Tied tensors appear once, under their first name. The states of torchmetrics and non-persistent buffers are left
    out.

    Args:
        modules: Modules of one architecture.
        base: Their common start; its tensors come last in each entry. What is frozen in it does not matter.

    Raises:
        MergeError: If names, shapes, kinds or ties differ, or a tensor can't be merged; lists every difference.
    """
    named = {f"model {number}": module for number, module in enumerate(modules, 1)}
    if base is not None:
        named["base"] = base
    problems = [problem for label, module in named.items() for problem in _obstacles(label, module)]
    if problems:
        raise _refusal(problems)
    tables = {label: dict(_named_tensors(module)) for label, module in named.items()}
    first = tables.pop("model 1")
    for label, table in tables.items():
        problems += [f"{name}: only in model 1, not in {label}" for name in first if name not in table]
        problems += [f"{name}: only in {label}, not in model 1" for name in table if name not in first]
        for name in (name for name in first if name in table):
            one, other = first[name], table[name]
            if one.tensor.shape != other.tensor.shape:
                shapes = f"{tuple(one.tensor.shape)} in model 1 and {tuple(other.tensor.shape)} in {label}"
                problems.append(f"{name}: shape {shapes}")
            if one.kind != other.kind and label != "base":
                problems.append(f"{name}: {one.kind.value} in model 1 and {other.kind.value} in {label}")
            if one.tied_to != other.tied_to:
                problems.append(f"{name}: tied to {one.tied_to} in model 1 and to {other.tied_to} in {label}")
    if problems:
        raise _refusal(problems)
    return [
        Entry(name, one.kind, (one.tensor, *(table[name].tensor for table in tables.values())))
        for name, one in first.items()
        if one.tied_to == name
    ]


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, _Named]]:
    """Every parameter and persistent buffer, by name; a tensor that occurs again is tied to its first name."""
    first_names: dict[int, str] = {}
    for prefix, owner in _owners(module):
        tensors = {
            **owner._parameters,
            **{name: b for name, b in owner._buffers.items() if name not in owner._non_persistent_buffers_set},
        }
        for local, tensor in tensors.items():
            if tensor is None:
                continue
            name = strip_wrappers(f"{prefix}.{local}" if prefix else local)
            tied_to = first_names.setdefault(id(tensor), name)
            yield name, _Named(_kind(owner, local, tensor), tensor, tied_to)


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and its submodules with their names, without metrics and what is inside them."""
    metrics = tuple(f"{name}." for name, owner in module.named_modules() if isinstance(owner, Metric))
    for name, owner in module.named_modules():
        if not f"{name}.".startswith(metrics):
            yield name, owner


def _kind(owner: nn.Module, name: str, tensor: Tensor) -> Kind:
    if isinstance(tensor, nn.Parameter):
        if not tensor.requires_grad:
            return Kind.FROZEN
        # A gain of one's own normalisation is a vector; a matrix in a class called "...Norm..." is a weight.
        if isinstance(owner, _NORMALISATIONS) or ("norm" in type(owner).__name__.lower() and tensor.ndim <= 1):
            return Kind.NORMALISATION
        return Kind.BIAS if "bias" in name else Kind.WEIGHT
    if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool):
        return Kind.INTEGER
    return Kind.STATISTIC if name in _STATISTICS else Kind.BUFFER


def _obstacles(label: str, module: nn.Module) -> Iterator[str]:
    """What in one module has no sum."""
    for prefix, owner in _owners(module):
        where = f"{strip_wrappers(prefix) or type(owner).__name__} of {label}"
        if is_parametrized(owner):
            yield (
                f"{where}: its weight is computed by a parametrization, whose inner tensors have no meaningful sum;"
                " call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if any(isinstance(hook, WeightNorm) for hook in owner._forward_pre_hooks.values()):
            yield f"{where}: uses the old weight_norm; call torch.nn.utils.remove_weight_norm first"
        for name, tensor in {**owner._parameters, **owner._buffers}.items():
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                yield f"{where}: {name} has no shape yet; run one batch through the module first"
            elif tensor is not None and (tensor.layout is not torch.strided or tensor.is_quantized):
                yield (
                    f"{where}: {name} is {tensor.layout} of {tensor.dtype}; only dense, unquantised tensors are summed"
                )


def _refusal(problems: Sequence[str]) -> MergeError:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return MergeError(f"the networks can't be merged; {len(problems)} obstacle(s):{lines}")
