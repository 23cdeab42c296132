"""Whether two networks come from one initialisation, told from their weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import real_view

Verdict = Literal["shared", "separate", "undetermined"]

# One-sided, for a normal variable, 3e-7: one false layer in three million. The largest value among 10,000 hidden sides
# of separately initialised networks, most of them trained, was 3.6.
_MATCH = 5.0
# Less than what is left of a common start without weight decay (cosines of .40 and more in the hidden layers of
# networks trained to the end on different classes): a layer in which this much could hide says nothing.
_TELLING = 0.25
# Shorter sides are mostly classes, image channels or heads, not hidden units, and have too few permutations for the
# statistic to be near normal.
_MIN_UNITS = 16
# Left out of the sum are the units that agree best: where nearly all rows are alike (pruned, dead), one or two that
# stand out in both networks by accident would make a large z on their own.
_LEFT_OUT = 3
# Correlations that vary by less, on average, vary by rounding.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class UnitMatch:
    """How well the units of a layer correspond, index by index, in two networks.

    Attributes:
        cosine: Of the two weights as vectors, over the entries that were compared; NaN if one has only zeros there.
        rows: By how many standard deviations corresponding rows agree better than rows do on average; NaN for a side of
            fewer than 16 units, or whose units are all alike.
        columns: The same of the columns.
        resolution: The mean correlation of corresponding units from which on ``z`` would be at least 5; NaN where ``z``
            is.
        identical: Whether the two weights are equal in every entry: a frozen layer, or the same weights twice.

    Example:
        >>> UnitMatch(cosine=0.9, rows=12.0, columns=7.0, resolution=0.1, identical=False).matched
        True
    """

    cosine: float
    rows: float
    columns: float
    resolution: float
    identical: bool

    @property
    def z(self) -> float:
        """The smaller of ``rows`` and ``columns``: what both sides say; NaN if neither could be tested."""
        return min((z for z in (self.rows, self.columns) if not math.isnan(z)), default=math.nan)

    @property
    def matched(self) -> bool:
        """Whether the units correspond."""
        return self.z >= _MATCH


@dataclass(frozen=True)
class SharedStart:
    """What the weights of two networks say about their initialisations; printed, a sentence.

    Attributes:
        verdict: "shared": the units of most layers correspond index by index, as they do only in networks that come
            from the same weights. "separate": no trace of a common start, in layers where one would have shown; a start
            that weight decay has erased looks the same, and so do networks with their units in a different order.
            "undetermined": too few or too small layers, or layers that disagree.
        layers: The match of each layer.

    Example:
        >>> SharedStart("undetermined", {}).verdict
        'undetermined'
    """

    verdict: Verdict
    layers: dict[str, UnitMatch]

    def __str__(self) -> str:
        tested = {name: match for name, match in self.layers.items() if not math.isnan(match.z)}
        found = {name: match for name, match in tested.items() if match.matched}
        same = sum(match.identical for match in self.layers.values())
        counts = f"units correspond in {len(found)} of {len(tested)} layers that can tell"
        if found:
            counts += f", median cosine {median(match.cosine for match in found.values()):.2f}"
        if same:
            counts += f"; {same} of all {len(self.layers)} are identical"
        if self.verdict == "shared":
            return f"shared start: {counts}"
        if self.verdict == "separate":
            seen = min(match.resolution for match in tested.values())
            return (
                f"no trace of a common start: {counts}, where correlations down to {seen:.2g} would have shown (a start"
                " that weight decay has erased looks the same)"
            )
        return f"undetermined whether the networks share a start: {counts}; two layers at least, and most, must agree"


def unit_match(a: Tensor, b: Tensor, limit: int = 256, seed: int = 0) -> UnitMatch:
    """Compare the units of a layer in two networks, index by index.

    Which index a hidden unit has is an accident of the initialisation. In separately initialised networks unit i of one
    therefore has nothing more to do with unit i of the other than with unit j, however alike their data are. So the sum
    over i of the correlations r_ii between corresponding units is compared with its distribution over all pairings:
    with r_ij doubly centred, which takes out what all units have in common, the mean is 0 and the variance exactly
    ``sum r_ij^2 / (n - 1)``, and the sum is near normal (Hoeffding, "A combinatorial central limit theorem", 1951).

    Only hidden units are exchangeable: the rows of an output layer are classes, those of an embedding tokens, the
    columns of a first layer inputs, and those agree in separate networks too. But each layer of a network with two or
    more has hidden units on one side at least, so a match has to show on both sides, and that which side it is need not
    be known. Sides of fewer than 16 units are not tested. Entries that tie a unit to itself (i, i) are not looked at:
    identity initialisation, recurrence and residual branches give the same ones to all networks.

    Args:
        a: A weight of shape ``(out, in, ...)``; a kernel's trailing dimensions are unfolded into the columns.
        b: The other network's weight, of the same shape.
        limit: Largest number of rows, and of columns, that are compared, the rows of one half of the units with the
            columns of the other half; which ones is drawn at random.
        seed: Of the draw; the global random state is not used.

    Raises:
        ValueError: If the shapes differ, are empty or no matrices, a sampled entry is not finite, or limit is below 16.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> start, other = torch.randn(2, 64, 64, generator=generator)
        >>> unit_match(start + other, start).matched, unit_match(start, other).matched
        (True, False)
    """
    if a.shape != b.shape or a.ndim < 2 or a.numel() == 0:
        raise ValueError(
            f"the two weights have shapes {tuple(a.shape)} and {tuple(b.shape)}; pass two of one shape (out, in, ...),"
            " not empty"
        )
    if limit < _MIN_UNITS:
        raise ValueError(
            f"limit must be at least {_MIN_UNITS}, the smallest number of units that can tell; got {limit}"
        )
    blocks = [(_block(a, *at), _block(b, *at)) for at in _indices(a, limit, seed)]
    x, y = (torch.cat([block.flatten() for block in network]) for network in zip(*blocks, strict=True))
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError(f"a weight of shape {tuple(a.shape)} has entries that are not finite, so it can't be compared")
    cosine = x @ y / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    row_z, row_resolution = _compare(blocks)
    column_z, column_resolution = _compare([(x.mT, y.mT) for x, y in blocks])
    # The side that sees less decides, as it does for z.
    resolution = max((r for r in (row_resolution, column_resolution) if not math.isnan(r)), default=math.nan)
    identical = torch.equal(x, y) and torch.equal(a, b.to(a.device))
    return UnitMatch(cosine.item(), row_z, column_z, resolution, identical)


def shared_start(pairs: Mapping[str, tuple[Tensor, Tensor]], limit: int = 256, seed: int = 0) -> SharedStart:
    """Do two networks come from one initialisation?

    Each layer is tested by :func:`unit_match`. "shared" takes two layers or more that match or are identical, and that
    they are at least as many as those that do not. "separate" takes two layers or more of which none matches (identical
    ones aside, if they are fewer: a frozen layer can be common to networks that are otherwise separate), and one at
    least in which a correlation of .25 would have shown. Anything else is "undetermined", a network of one layer always
    unless the weights are the same.

    A single layer can match by what it is: a classifier on flattened feature maps has a fixed position in each column.
    Factors of a low-rank update start anew with each update, so pass the weights that they are added to as well.

    Args:
        pairs: Both networks' weight of each layer, by name; of two or more dimensions each.
        limit: As in :func:`unit_match`; bounds the cost to that of a ``limit x limit`` product per side and layer.
        seed: As in :func:`unit_match`.

    Raises:
        ValueError: If a pair can't be compared, with its name.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> start, noise = torch.randn(2, 3, 64, 64, generator=generator)
        >>> found = shared_start({f"layer{k}": (w, w + d / 4) for k, (w, d) in enumerate(zip(start, noise))})
        >>> found.verdict
        'shared'
        >>> print(found)
        shared start: units correspond in 3 of 3 layers that can tell, median cosine 0.97
    """
    layers = {}
    for name, (a, b) in pairs.items():
        try:
            layers[name] = unit_match(a, b, limit, seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return SharedStart(_verdict(list(layers.values())), layers)


def _verdict(matches: list[UnitMatch]) -> Verdict:
    if matches and all(match.identical for match in matches):
        return "shared"
    same = sum(match.identical and match.matched for match in matches)
    found = sum(match.matched for match in matches)
    apart = [match for match in matches if match.z < _MATCH]
    if found >= max(2, len(apart)):
        return "shared"
    telling = any(match.resolution <= _TELLING for match in apart)
    if found == same < len(apart) and len(apart) > 1 and telling:
        return "separate"
    return "undetermined"


def _indices(weight: Tensor, limit: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the blocks of the unfolded weight that are compared.

    Half the units' rows with the other half's columns, and the reverse, so that no entry ties a unit to itself. Masking
    those entries instead would leave gaps, in the same places in both networks.
    """
    generator = torch.Generator().manual_seed(seed)
    out, channels, *trailing = real_view(weight).shape
    # Modulo the shorter side, for gates and projections that are stacked in one weight.
    size = min(out, channels)
    row_units = torch.arange(out) % size
    column_units = torch.arange(channels).repeat_interleave(math.prod(trailing)) % size
    # Units of a short side, mostly classes or image channels, are hardly the same as those of the other side.
    parts = 2 if size >= _MIN_UNITS else 1
    half = torch.randperm(size, generator=generator) % parts
    return [
        (
            _sample((half[row_units] == part).nonzero().flatten(), limit // parts, generator),
            _sample((half[column_units] == parts - 1 - part).nonzero().flatten(), limit // parts, generator),
        )
        for part in range(parts)
    ]


def _sample(indices: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)[:limit].sort().values]


def _block(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    matrix = real_view(weight).flatten(1)
    return matrix[rows[:, None].to(matrix.device), columns.to(matrix.device)].cpu().double()


def _compare(blocks: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """How much better than others corresponding rows agree, in standard deviations, and what would have been 5 of them.

    Rows are paired within each block. Both NaN where they are too few, or all alike.
    """
    count = sum(len(x) for x, _ in blocks)
    if count < _MIN_UNITS:
        return math.nan, math.nan
    agreement, variance = [], 0.0
    for x, y in blocks:
        # Correlations have no scale, so a unit that did nothing but decay still shows its start.
        r = _standardised(x) @ _standardised(y).mT
        r = r - r.mean(0) - r.mean(1, keepdim=True) + r.mean()
        agreement.append(r.diagonal())
        variance += r.square().sum().item() / (len(r) - 1)
    if variance <= _ROUNDING**2 * count:
        return math.nan, math.nan
    kept = torch.cat(agreement).sort().values[:-_LEFT_OUT]
    deviation = math.sqrt(variance)
    return kept.sum().item() / deviation, _MATCH * deviation / len(kept)


def _standardised(x: Tensor) -> Tensor:
    """Rows less their means, of norm 1; constant ones 0."""
    centred = x - x.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    varied = norms > _ROUNDING * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(varied, centred / norms, 0)
