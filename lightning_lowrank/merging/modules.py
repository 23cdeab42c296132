"""merge_modules: two trained modules become one whose weights are the sums."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torchmetrics import Metric

from lightning_lowrank.merging.adapters import update_configs
from lightning_lowrank.merging.engine import Merge, check_coefficients
from lightning_lowrank.merging.kinds import MergeError, describe_module, effective_weights, refusal
from lightning_lowrank.merging.policy import MergePolicy, some
from lightning_lowrank.naming import strip_wrappers

M = TypeVar("M", bound=nn.Module)


def merge_modules(
    m1: M,
    m2: nn.Module,
    *more: nn.Module,
    base: nn.Module | None = None,
    coefficients: Sequence[float] | None = None,
    policy: MergePolicy | None = None,
) -> M:
    """Merge trained networks by summing their weights.

    Without ``base`` a weight becomes c_1 W_1 + c_2 W_2 + ..., with ``base`` W_0 it becomes W_0 + sum of c_i (W_i -
    W_0): task arithmetic, for networks fine-tuned from one start. Nothing is normalised. Weights and biases are summed;
    gains, normalisation shifts and running statistics are averaged; integer buffers are the first network's; frozen
    parameters (``requires_grad=False``) and other buffers must be equal and are kept once; the factors of LoRA updates
    are concatenated, so that the updates are summed. ``print(MergePolicy().plan(m1, m2))`` shows every tensor's rule.
    Sums are accumulated in float64 and rounded once. docs/merging.md gives the reasons.

    Args:
        m1: The first network; the result is a copy of it with merged tensors, in its class, dtypes, device and mode.
        m2: The second network, of the same architecture. Tensors are paired by name.
        more: Further networks.
        base: The common start of all the networks.
        coefficients: One number per network; all 1 by default. They apply to sums.
        policy: Other rules for some tensors; see :class:`MergePolicy`.

    Returns:
        A new module of m1's class; no Trainer attached, metrics reset. The arguments are not changed.

    Warns:
        UserWarning: If trained weights are equal in all networks and would be multiplied; if tables of integers differ;
            if the policy sums what has no sum without a base.

    Raises:
        MergeError: If names, shapes, kinds or ties differ, frozen tensors are not equal, a tensor has entries that are
            not finite or the sum overflows. The message lists every tensor concerned.
        TypeError: If an argument is not a module.
        ValueError: If the coefficients are not one finite number per network, or a pattern of the policy fits nothing.

    Example:
        >>> import torch
        >>> one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> merged = merge_modules(one, two)
        >>> torch.equal(merged.weight, one.weight + two.weight)
        True
    """
    merged: M = merge_with_heads((m1, m2, *more), base, coefficients, policy)[0]
    return merged


def merge_with_heads(
    modules: Sequence[nn.Module],
    base: nn.Module | None,
    coefficients: Sequence[float] | None,
    policy: MergePolicy | None,
    heads: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[Any, Merge]:
    """:func:`merge_modules` with tensors that one network alone has a say in.

    Args:
        modules: The networks; the result is a copy of the first.
        base: Their common start.
        coefficients: One number per network.
        policy: The rules.
        heads: Per network a glob pattern of such tensors, or None.
        labels: What messages call the networks.

    Returns:
        The merged module, and how it was made.
    """
    unwrapped = [_unwrapped(module) for module in modules]
    weights = check_coefficients(coefficients, len(unwrapped))
    names = labels or [f"model {number}" for number in range(1, len(unwrapped) + 1)]
    tables = {name: describe_module(module, name) for name, module in zip(names, unwrapped, strict=True)}
    start = None if base is None else describe_module(_unwrapped(base), "base")
    merge = Merge((policy or MergePolicy()).plan_tables(tables, start, heads), weights)
    if empty := [e.name for e in merge.plan.entries if any(t.read().is_meta for t in e.tensors)]:
        raise MergeError(f"{some(empty)}: on the meta device, without values; load the networks first")
    _warn(merge)
    # What is copied in inference mode could not be trained afterwards.
    with torch.inference_mode(False):
        merged = copy_module(unwrapped[0])
        _write(merged, merge)
        update_configs(merged, merge)
    return merged, merge


def with_trunk(module: M, other: nn.Module, head: str) -> M:
    """A copy of a module that keeps its own head and has another network's tensors elsewhere.

    Args:
        module: The network whose head is kept.
        other: The network whose trunk is taken.
        head: Glob pattern of the head's tensors.
    """
    copied = copy_module(module)
    places = _places(_unwrapped(copied))
    with torch.no_grad():
        for name, tensor in describe_module(_unwrapped(other)).items():
            if name in places and tensor.tied_to == name and not fnmatchcase(name, head):
                _put(*places[name], tensor.read())
    return copied


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


def _unwrapped(module: object) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a module, got {type(module).__name__}; load a checkpoint with load_from_checkpoint first"
        )
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _warn(merge: Merge) -> None:
    for note in merge.plan.notes:
        warnings.warn(note, stacklevel=4)
    if shared := merge.shared():
        warnings.warn(
            f"{some(shared)}: equal in all networks, so the sum multiplies them by {sum(merge.coefficients):g}. If the"
            " networks share them (a backbone that was frozen in training; checkpoints do not keep that), call"
            " requires_grad_(False) on them before merging, or pass base=.",
            stacklevel=4,
        )
    if tables := merge.differing_integers():
        warnings.warn(
            f"{some(tables)}: integers that differ between the networks, of which the first network's are kept. Weights"
            " that depend on them (an order, an index) do not fit together then.",
            stacklevel=4,
        )


def _write(merged: nn.Module, merge: Merge) -> None:
    """Put the merged values into a copy of the first network."""
    places = _places(merged)
    problems = []
    for entry in merge.plan.entries:
        if entry.name not in places:
            continue
        owner, local = places[entry.name]
        try:
            with torch.no_grad():
                _put(owner, local, merge.tensor(entry))
        except MergeError as error:
            problems.append(f"{entry.name}: {error}")
    if problems:
        raise refusal(problems)


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Which submodule holds each tensor, under which name."""
    return {
        strip_wrappers(f"{prefix}.{local}" if prefix else local): (owner, local)
        for prefix, owner in module.named_modules()
        for local in (*owner._parameters, *owner._buffers, *effective_weights(owner))
    }


def _put(owner: nn.Module, local: str, value: Tensor) -> None:
    sources = effective_weights(owner).get(local)
    if sources is not None:
        _put_normalised(owner, local, value, sources)
        return
    target: Tensor | None = owner._parameters.get(local)
    target = owner._buffers[local] if target is None else target
    assert target is not None
    if target.shape == value.shape:
        target.copy_(value)
    else:
        # A LoRA factor of another rank.
        owner._parameters[local] = nn.Parameter(value.to(target.device), target.requires_grad)


def _put_normalised(owner: nn.Module, local: str, value: Tensor, sources: Sequence[Tensor]) -> None:
    """Set the tensors of a weight normalisation so that they make the value."""
    hook = next((hook for hook in owner._forward_pre_hooks.values() if getattr(hook, "name", None) == local), None)
    if isinstance(hook, WeightNorm):
        length, direction = sources
        direction.copy_(value)
        length.copy_(torch.norm_except_dim(value, 2, hook.dim))
        setattr(owner, local, hook.compute_weight(owner))
    else:
        setattr(owner, local, value)
    made = getattr(owner, local)
    # One product and one quotient more than the sum itself.
    if not torch.allclose(made, value, rtol=8 * torch.finfo(value.dtype).eps, atol=0, equal_nan=True):
        raise MergeError(
            "its parametrization can't hold the sum; call torch.nn.utils.parametrize.remove_parametrizations first"
        )


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
