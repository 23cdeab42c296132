"""The values of a merge, entry by entry and piece by piece; both merging of modules and of files go through here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lowrank.functional.low_rank import merge_factors
from lightning_lowrank.merging.arithmetic import (
    check_equal,
    combined,
    is_finite,
    pieces,
    pooled_variance,
    rounded,
    widened,
)
from lightning_lowrank.merging.kinds import Kind, MergeError
from lightning_lowrank.merging.plan import Entry, MergePlan

# Entries that are compared first when looking for tensors that networks share.
_PROBE = 4096
_ADVICE = {
    Kind.FROZEN: "; a parameter that was frozen only after training needs requires_grad_(True)",
    Kind.UNKNOWN: (
        "; say what it is: a rule for its name (sum for a parameter, first for a buffer), or a module of the same"
        " architecture"
    ),
}


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


@dataclass
class Merge:
    """A plan with its coefficients, ready to be computed.

    Attributes:
        plan: One rule per tensor.
        coefficients: One per network.
        discarded: By the name of the factor next to the input, what truncation of a LoRA update left out: the norm of
            the rest over the norm of the whole.
    """

    plan: MergePlan
    coefficients: Sequence[float]
    discarded: dict[str, float] = field(default_factory=dict)
    _factors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_name: Mapping[str, Entry] = {entry.name: entry for entry in self.plan.entries}

    def pieces(self, entry: Entry) -> Iterator[Tensor]:
        """The merged tensor as flat pieces in row-major order.

        Raises:
            MergeError: If it can't be; the message does not repeat the name.
        """
        if entry.pair is not None and entry.rule in ("sum", "mean"):
            for (piece,) in pieces([self._factor(entry)]):
                yield piece
            return
        tensors = [described.read() for described in entry.tensors]
        tensors = [tensor.to(tensors[0].device) for tensor in tensors]
        if entry.rule == "equal":
            check_equal(tensors, Kind(entry.kind).label, _ADVICE.get(Kind(entry.kind), ""))
        if entry.rule in ("equal", "first"):
            yield from (piece for (piece,) in pieces(tensors[:1]))
        elif entry.rule == "pooled" and entry.name.endswith("running_var"):
            yield from self._pooled(entry, tensors)
        else:
            yield from self._combined(entry, tensors)

    def tensor(self, entry: Entry) -> Tensor:
        """The merged tensor as a whole, on the first network's device."""
        if entry.pair is not None and entry.rule in ("sum", "mean"):
            return self._factor(entry)
        made = [*self.pieces(entry)]
        return (torch.cat(made) if made else entry.tensors[0].read()).reshape(entry.shape)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of the merged tensor, known before it is computed."""
        if entry.pair is None or entry.rule not in ("sum", "mean"):
            return entry.shape
        axis = _rank_axis(entry, self._by_name)
        return tuple(self.rank(entry) if i == axis else n for i, n in enumerate(entry.shape))

    def rank(self, entry: Entry) -> int:
        """The rank of a merged LoRA update."""
        axis = _rank_axis(entry, self._by_name)
        if entry.rule not in ("sum", "mean"):
            return entry.shape[axis]
        used = entry.tensors if self.plan.has_base and entry.rule == "sum" else entry.tensors[: len(self.coefficients)]
        exact = sum(described.shape[axis] for described in used)
        return min(exact, self.plan.lora_rank or exact)

    def shared(self) -> list[str]:
        """Trained tensors that are the same in all networks, and that a sum would multiply."""
        if self.plan.has_base or len(self.coefficients) < 2 or math.isclose(sum(self.coefficients), 1.0):
            return []
        return [entry.name for entry in self.plan.entries if entry.rule == "sum" and not entry.pair and _same(entry)]

    def differing_integers(self) -> list[str]:
        """Tables of integers (not counters) that differ between networks, of which the first is kept."""
        kept = [e for e in self.plan.entries if e.kind == "integer" and e.rule == "first" and math.prod(e.shape) > 1]
        return [entry.name for entry in kept if not _same(entry, zero_counts=True)]

    def truncations(self) -> list[str]:
        """What truncated LoRA updates lost, in words."""
        return [f"{name}: truncation left out {rest:.3g} of the update's norm" for name, rest in self.discarded.items()]

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The first two networks' trained weights, unfolded to matrices (out, rest)."""
        weights = [e for e in self.plan.entries if e.kind in ("linear", "convolution") and len(e.tensors) > 1]
        pairs = {entry.name: (entry.tensors[0].read(), entry.tensors[1].read()) for entry in weights}
        return {
            name: (one.flatten(1), other.to(one.device).flatten(1))
            for name, (one, other) in pairs.items()
            if one.ndim > 1
        }

    def _combined(self, entry: Entry, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        count = len(self.coefficients)
        around_base = self.plan.has_base and entry.rule == "sum"
        used = tensors if around_base else tensors[:count]
        mean = entry.rule != "sum"
        coefficients, divisor = ([1.0] * count, count) if mean else (self.coefficients, 1)
        for piece in pieces(used):
            base = piece.pop() if around_base else None
            merged = combined(piece, coefficients, base, divisor)
            if not is_finite(merged):
                parts = [*piece, *([] if base is None else [base])]
                wide = torch.complex128 if merged.is_complex() else torch.float64
                raise self._not_finite(parts, combined(piece, coefficients, base, divisor, wide), merged.dtype)
            if entry.rule == "sum" and entry.name.endswith("running_var") and bool((merged < 0).any()):
                raise MergeError("has negative variances after the merge; take the rule mean or pooled")
            yield merged

    def _pooled(self, entry: Entry, variances: Sequence[Tensor]) -> Iterator[Tensor]:
        count = len(self.coefficients)
        partner = self._by_name.get(entry.name.removesuffix("running_var") + "running_mean")
        if partner is None:
            raise MergeError("pooled needs a running_mean beside it")
        means = [described.read().to(variances[0].device) for described in partner.tensors[:count]]
        for piece in pieces([*means, *variances[:count]]):
            merged = pooled_variance(piece[:count], piece[count:], entry.dtype)
            if not is_finite(merged):
                raise self._not_finite(piece[count:], merged, entry.dtype)
            yield merged

    def _not_finite(self, parts: Sequence[Tensor], total: Tensor, dtype: torch.dtype) -> MergeError:
        for label, part in zip((*self.plan.labels, "base"), parts, strict=False):
            if not is_finite(part):
                return MergeError(f"has entries that are not finite in {label}")
        return MergeError(f"the sum overflows {dtype} (largest magnitude {total.abs().max().item():.3g})")

    def _factor(self, entry: Entry) -> Tensor:
        assert entry.pair is not None
        down, up = (self._by_name[name] for name in entry.pair)
        if up.name not in self._factors or down.name not in self._factors:
            self._factors = dict(zip((down.name, up.name), self._merged_pair(down, up), strict=True))
        return self._factors[entry.name]

    def _merged_pair(self, down: Entry, up: Entry) -> tuple[Tensor, Tensor]:
        """The two factors of the merged update, each rounded once."""
        coefficients = list(self.coefficients)
        if down.rule == "mean":
            coefficients = [1 / len(coefficients)] * len(coefficients)
        count = len(coefficients)
        if self.plan.has_base and down.rule == "sum":
            # W_0 + sum of c_i (W_i - W_0), the start's own update being one more.
            coefficients.append(1 - sum(coefficients))
            count += 1
        # The result is multiplied with the first network's scale.
        scales = [described.scale / down.tensors[0].scale for described in down.tensors[:count]]
        coefficients = [c * scale for c, scale in zip(coefficients, scales, strict=True)]
        axis = _rank_axis(down, self._by_name)
        ins = [widened(described.read()).movedim(axis, 0) for described in down.tensors[:count]]
        outs = [
            widened(described.read()).movedim(_rank_axis(up, self._by_name), -1) for described in up.tensors[:count]
        ]
        for label, *parts in zip((*self.plan.labels, "base"), ins, outs, strict=False):
            if not all(map(is_finite, parts)):
                raise MergeError(f"has entries that are not finite in {label}")
        merged = merge_factors(
            [o.reshape(-1, o.shape[-1]) for o in outs], [i.flatten(1) for i in ins], coefficients, self.rank(down)
        )
        if self.plan.lora_rank is not None:
            self.discarded[down.name] = merged.discarded
        made = (
            merged.down.reshape(-1, *ins[0].shape[1:]).movedim(0, axis),
            merged.up.reshape(*outs[0].shape[:-1], -1).movedim(-1, _rank_axis(up, self._by_name)),
        )
        results = []
        for factor, of in zip(made, (down, up), strict=True):
            factor = rounded(factor, of.dtype).to(of.tensors[0].read().device).contiguous()
            if not is_finite(factor):
                raise MergeError(f"a factor of the merged update overflows {of.dtype}")
            results.append(factor)
        return results[0], results[1]


def _rank_axis(entry: Entry, by_name: Mapping[str, Entry]) -> int:
    """Which axis of a LoRA factor is the rank.

    The usual order is (rank, in) and (out, rank); some write (in, rank) and (rank, out). Where both would fit, because
    the layer is square, the rank is the smaller one.
    """
    assert entry.pair is not None
    down, up = (by_name[name].shape for name in entry.pair)
    usual, transposed = down[0] == up[1], down[1] == up[0]
    if usual and transposed:
        usual = down[0] <= down[1]
    elif not (usual or transposed):
        raise MergeError(f"factors of shapes {down} and {up} have no common rank")
    is_down = entry.name == entry.pair[0]
    return 0 if is_down == usual else 1


def _same(entry: Entry, *, zero_counts: bool = False) -> bool:
    """Whether a tensor is the same, and not zero, in all networks; most differ in the first entries."""
    first, *others = (described.read() for described in entry.tensors)
    others = [other.to(first) for other in others]
    probe = next(pieces([first, *others], _PROBE), [])
    if not all(torch.equal(probe[0], other) for other in probe[1:]):
        return False
    return all(torch.equal(first, other) for other in others) and (zero_counts or bool(first.any()))
