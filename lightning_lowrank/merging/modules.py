"""merge_modules: two trained modules become one whose weights are the sums."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lowrank.merging.policy import Entry, Kind, MergeError, Rule, plan

M = TypeVar("M", bound=nn.Module)


def merge_modules(
    m1: M, m2: nn.Module, *more: nn.Module, base: nn.Module | None = None, coefficients: Sequence[float] | None = None
) -> M:
    """Merge trained networks by summing their weights.

    Without ``base`` a weight becomes c_1 W_1 + c_2 W_2 + ..., with ``base`` W_0 it becomes W_0 + sum of c_i (W_i -
    W_0): task arithmetic, for networks fine-tuned from one start. Nothing is normalised. Weights and biases are summed;
    normalisation gains and shifts and running statistics are averaged; integer buffers are the first network's; frozen
    parameters (``requires_grad=False``) and other buffers must be equal and are kept once. Sums are accumulated in
    float64 and rounded once. docs/merging.md gives the reasons.

    Args:
        m1: The first network; the result is a copy of it with merged tensors, in its class, dtypes, device and mode.
        m2: The second network, of the same architecture. Tensors are paired by name.
        more: Further networks.
        base: The common start of all the networks.
        coefficients: One number per network; all 1 by default.

    Returns:
        A new module of m1's class; no Trainer attached, metrics reset. The arguments are not changed.

    Raises:
        MergeError: If names, shapes, kinds or ties differ, frozen tensors are not equal, a tensor has entries that are
            not finite or the sum overflows. The message lists every tensor concerned.
        TypeError: If an argument is not a module.
        ValueError: If the coefficients are not one finite number per network.

    Example:
        >>> import torch
        >>> one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> merged = merge_modules(one, two)
        >>> torch.equal(merged.weight, one.weight + two.weight)
        True
    """
    modules: list[Any] = [_unwrapped(module) for module in (m1, m2, *more)]
    weights = check_coefficients(coefficients, len(modules))
    entries = plan(modules, None if base is None else _unwrapped(base))
    if base is None:
        _warn_of_shared(entries, weights)
    values = _merge_all(entries, weights, has_base=base is not None)
    merged = copy_module(modules[0])
    _write(merged, entries, values)
    return merged  # type: ignore[no-any-return]


def copy_module(module: M) -> M:
    """A deep copy without the Trainer, with metrics reset.

    Tensors that still hang on a graph (a stored loss, old-style weight norm) can't be deep-copied by torch; they are
    detached in the copy.
    """
    memo: dict[int, Any] = {}
    for owner in module.modules():
        _detach_graph_tensors(vars(owner), memo)
    try:
        copied = copy.deepcopy(module, memo)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} can't be copied: {error}{_uncopyable(module)}. Delete or replace what can't be"
            " copied before merging, or give its class a __deepcopy__ or __getstate__ that leaves it out"
        ) from error
    for owner in copied.modules():
        if isinstance(owner, Metric):
            owner.reset()
    return copied


def _uncopyable(module: nn.Module) -> str:
    """The attributes that deepcopy stumbles over, for an error message."""
    found = []
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name in ("_modules", "_parameters", "_buffers", "_trainer"):
                continue
            try:
                copy.deepcopy(value, {id(module): module})
            except (TypeError, RuntimeError):
                found.append(f"{prefix}.{name}" if prefix else name)
    return f" (attribute {', '.join(found)})" if found else ""


def check_coefficients(coefficients: Sequence[float] | None, count: int) -> list[float]:
    """One finite number per network.

    Raises:
        ValueError: If there are more or fewer, or one is not finite.
    """
    if coefficients is None:
        return [1.0] * count
    try:
        values = [float(value) for value in coefficients]
    except (TypeError, ValueError):
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"coefficients must be {count} finite numbers, one per network, got {coefficients!r}")
    return values


def _unwrapped(module: object) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a module, got {type(module).__name__}; load a checkpoint with load_from_checkpoint first"
        )
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _merge_all(entries: Sequence[Entry], coefficients: Sequence[float], *, has_base: bool) -> list[Tensor]:
    values, problems = [], []
    with torch.no_grad():
        for entry in entries:
            try:
                values.append(_merge_one(entry, coefficients, has_base=has_base))
            except MergeError as error:
                problems.append(f"\n  {entry.name}: {error}")
    if problems:
        raise MergeError(f"the networks can't be merged; {len(problems)} tensor(s):{''.join(problems)}")
    return values


def _merge_one(entry: Entry, coefficients: Sequence[float], *, has_base: bool) -> Tensor:
    first = entry.tensors[0].detach()
    if entry.rule is Rule.FIRST:
        return first
    device = torch.device("cpu") if first.device.type == "mps" else first.device
    wide = [
        tensor.detach().to(device, torch.complex128 if tensor.is_complex() else torch.float64)
        for tensor in entry.tensors
    ]
    if entry.rule is Rule.EQUAL:
        if not all(torch.equal(wide[0], other) for other in wide[1:]):
            difference = max((wide[0] - other).abs().max().item() for other in wide[1:])
            advice = {Kind.FROZEN: "; a parameter that was frozen only after training needs requires_grad_(True)"}
            raise MergeError(
                f"{entry.kind.value}s must be equal in all networks, and these differ by up to {difference:.3g}"
                f"{advice.get(entry.kind, '')}"
            )
        return first
    for number, tensor in enumerate(wide, 1):
        if not torch.isfinite(tensor).all():
            which = "base" if has_base and number == len(wide) else f"model {number}"
            raise MergeError(f"has entries that are not finite in {which}")
    networks = wide[: len(coefficients)]
    if entry.rule is Rule.MEAN:
        total = torch.stack(networks).mean(0)
    elif has_base:
        total = wide[-1].clone()
        for coefficient, tensor in zip(coefficients, networks, strict=True):
            total += coefficient * (tensor - wide[-1])
    else:
        total = torch.zeros_like(networks[0])
        for coefficient, tensor in zip(coefficients, networks, strict=True):
            total += coefficient * tensor
    merged = total.to(first.device, first.dtype)
    if not torch.isfinite(merged).all():
        raise MergeError(f"the sum overflows {first.dtype} (largest magnitude {total.abs().max().item():.3g})")
    return merged


def _warn_of_shared(entries: Sequence[Entry], coefficients: Sequence[float]) -> None:
    """Say which trained tensors are the same in all networks, and would be multiplied by the sum of coefficients."""
    if len(coefficients) < 2 or math.isclose(sum(coefficients), 1.0):
        return
    shared = [
        entry.name
        for entry in entries
        if entry.rule is Rule.SUM
        and all(torch.equal(entry.tensors[0], other.to(entry.tensors[0])) for other in entry.tensors[1:])
        and bool(entry.tensors[0].any())
    ]
    if shared:
        names = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
        warnings.warn(
            f"{names}: equal in all networks, so the sum multiplies them by {sum(coefficients):g}. If the networks"
            " share them (a backbone that was frozen in training; checkpoints do not keep that), call"
            " requires_grad_(False) on them before merging, or pass base=.",
            stacklevel=3,
        )


def _write(merged: nn.Module, entries: Sequence[Entry], values: Sequence[Tensor]) -> None:
    # The copy has the same names and ties, so the same plan finds its tensors.
    targets = {entry.name: entry.tensors[0] for entry in plan([merged])}
    with torch.no_grad():
        for entry, value in zip(entries, values, strict=True):
            targets[entry.name].copy_(value)


def _detach_graph_tensors(value: Any, memo: dict[int, Any]) -> None:
    """Prepare deepcopy's memo with detached stand-ins for tensors inside plain attributes and containers."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            _detach_graph_tensors(item, memo)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _detach_graph_tensors(item, memo)
