"""Which layers of a run the theory speaks of, and what their norms do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_lowrank.functional.rescaling import Regime, RescalingGroups, homogeneity_defect
from lightning_lowrank.functional.stationarity import norm_spread
from lightning_lowrank.layers import End, EndProducts
from lightning_lowrank.optimizers import Decay
from lightning_lowrank.parameters import Parameter


@dataclass(frozen=True)
class LayerRegime:
    """What was found about one weight.

    Attributes:
        regime: Homogeneous, scale-invariant, other or undecided.
        partners: The ends of layers that a factor can be moved to, for a homogeneous weight.
        product_size: Root mean square of <W, G> in units of |W| |G| / sqrt(size); 0 for a scale-invariant weight.
        steps: Measured steps behind it.
    """

    regime: Regime
    partners: tuple[str, ...]
    product_size: float
    steps: int

    def __str__(self) -> str:
        """The regime with its evidence, in words."""
        if self.regime is Regime.HOMOGENEOUS:
            return f"homogeneous: trades a factor with {', '.join(self.partners)} (equal in {self.steps} steps)"
        if self.regime is Regime.SCALE_INVARIANT:
            return f"scale-invariant: <W, G> is {self.product_size:.1e} of chance level over {self.steps} steps"
        if self.regime is Regime.OTHER:
            return f"other: its <W, G> equals no other layer's over {self.steps} steps"
        return f"undecided after {self.steps} steps with a gradient"


class RegimeTracker:
    """Finds rescaling groups and scale-invariant layers step after step, and follows the norms within the groups.

    Args:
        ends: The module's layer ends.
        shapes: Of the measured parameters, by name.
        epsilon: Machine epsilon of the arithmetic that makes the gradients.
        named: Groups that the user named: patterns of weights by the group's name. They take part as they are.
    """

    # Measured steps from which on the cheap values need no more search, and the regimes are said.
    STEPS = 20

    def __init__(
        self,
        ends: Sequence[End],
        shapes: Mapping[str, torch.Size],
        epsilon: float,
        named: Mapping[str, Sequence[str]],
    ) -> None:
        self.shapes = dict(shapes)
        self._named = {
            group: [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
            for group, patterns in named.items()
        }
        taken = {name for names in self._named.values() for name in names}
        self._products = EndProducts([end for end in ends if end.weight not in taken], shapes)
        self.ends = self._products.ends
        self._found = RescalingGroups(self._products.sizes, epsilon)
        self.steps = 0
        # |W|^2 of each end when it was first measured, and the cumulative decay until then.
        self._first: dict[str, tuple[float, float]] = {}

    @property
    def searching(self) -> bool:
        """Whether more evidence is wanted than the rows give."""
        return self.steps < self.STEPS

    def update(self, view: Sequence[Parameter], products: Tensor, tau: float) -> dict[str, float]:
        """Take one step's evidence.

        Args:
            view: The parameters with their gradients.
            products: <W, W>, <W, G>, <G, G> of each, shape ``(parameters, 3)``.
            tau: The cumulative decay before this step; NaN where there is none.

        Returns:
            ``norm_spread``, ``homogeneity_defect``, ``norm_gap`` and ``norm_gap_predicted``.
        """
        names = [p.name for p in view]
        whole = {p.name: p for p in view if p.is_whole}
        sums = self._products.of(products, names, whole)
        scales = (sums[:, 0] * sums[:, 2]).sqrt()
        if not products.isfinite().all():
            # An overflow, or weights that are lost: no evidence.
            return dict.fromkeys(("norm_spread", "homogeneity_defect", "norm_gap", "norm_gap_predicted"), math.nan)
        defect = self._defect(sums[:, 1], scales, dict(zip(names, products, strict=True)))
        self._found.update(sums[:, 1], scales)
        self.steps += 1
        for end, squared in zip(self.ends, sums[:, 0].tolist(), strict=True):
            if math.isfinite(squared):
                self._first.setdefault(end.name, (squared, tau))
        return {"homogeneity_defect": defect, **self._norms(view, products, sums[:, 0], tau)}

    def _defect(self, products: Tensor, scales: Tensor, of_parameter: Mapping[str, Tensor]) -> float:
        """The largest over the groups as they were known before this step."""
        groups = [(products[group].tolist(), scales[group].tolist()) for group in self._found.groups()]
        for names in self._named.values():
            rows = [of_parameter[name] for name in names if name in of_parameter]
            groups.append(([float(r[1]) for r in rows], [float((r[0] * r[2]).sqrt()) for r in rows]))
        defects = [homogeneity_defect(*group) for group in groups]
        return max((d for d in defects if math.isfinite(d)), default=math.nan)

    def _norms(self, view: Sequence[Parameter], products: Tensor, squared: Tensor, tau: float) -> dict[str, float]:
        """How far the norms within the groups are apart, and how far they should be."""
        decay = {p.name: p.weight_decay if p.decay is Decay.COUPLED else 0.0 for p in view}
        norms = {p.name: float(ww) for p, ww in zip(view, products[:, 0], strict=True)}
        # Under decay beside the gradient norms do not approach each other at a known rate.
        known = {p.name: p.decay in (Decay.COUPLED, Decay.NONE) for p in view}
        spreads, gaps = [], []
        for group in self._found.groups():
            ends = [self.ends[index] for index in group]
            parts = {end.name: [name for name, _, _ in end.parts] for end in ends}
            decays = {decay[name] for names in parts.values() for name in names}
            values = dict(zip(parts, squared[group].tolist(), strict=True))
            if len(decays) > 1:
                # At a stationary point it is wd |W|^2 that is equal; what is not decayed has no part in it.
                values = self._decayed(ends, values, decay, norms)
            spreads.append(norm_spread([math.sqrt(value) for value in values.values()]))
            if len(decays) == 1:
                foretold = all(known[name] for names in parts.values() for name in names)
                gaps.append(self._gap(values, tau if foretold else math.nan))
        for names in self._named.values():
            spreads.append(norm_spread([math.sqrt(norms[name]) for name in names if name in norms]))
        spread = max((s for s in spreads if math.isfinite(s)), default=math.nan)
        gap, predicted = max(
            gaps, key=lambda pair: pair[1] if math.isfinite(pair[1]) else -1.0, default=(math.nan,) * 2
        )
        return {"norm_spread": spread, "norm_gap": gap, "norm_gap_predicted": predicted}

    @staticmethod
    def _decayed(
        ends: Sequence[End], values: Mapping[str, float], decay: Mapping[str, float], norms: Mapping[str, float]
    ) -> dict[str, float]:
        """Wd |W|^2 of each end that is decayed at all; blocks have a single decay, and keep their share of it."""
        out = {}
        for end in ends:
            if all(blocks is not None for _, blocks, _ in end.parts):
                rates = [decay[name] for name, _, _ in end.parts]
                out[end.name] = values[end.name] * rates[0]
            else:
                out[end.name] = sum(decay[name] * norms[name] for name, _, _ in end.parts)
        return {name: value for name, value in out.items() if value > 0}

    def _gap(self, values: Mapping[str, float], tau: float) -> tuple[float, float]:
        """The difference of |W|^2 between the two ends that began furthest apart, and its predicted size."""
        first = {name: self._first[name][0] for name in values}
        low, high = min(first, key=first.__getitem__), max(first, key=first.__getitem__)
        begun = max(self._first[low][1], self._first[high][1])
        predicted = (first[high] - first[low]) * math.exp(-2 * (tau - begun)) if math.isfinite(tau) else math.nan
        return abs(values[high] - values[low]), predicted

    def excluded(self) -> set[str]:
        """The parameters of scale-invariant ends: they never align, so the aggregates leave them out."""
        zero = self._found.is_zero().tolist()
        by_weight: dict[str, list[bool]] = {}
        for end, is_zero in zip(self.ends, zero, strict=True):
            by_weight.setdefault(end.weight + end.kind, []).append(is_zero)
        # Of a weight in blocks all must be: one dead head does not make a projection invariant.
        return {
            name
            for end, is_zero in zip(self.ends, zero, strict=True)
            if is_zero and all(by_weight[end.weight + end.kind])
            for name, _, _ in end.parts
        }

    def regimes(self) -> dict[str, LayerRegime]:
        """What is known about each weight matrix, by name."""
        partners = {index: group for group in self._found.groups() for index in group}
        decided = self._found.decided().tolist()
        excluded, sizes = self.excluded(), self._found.product_sizes().tolist()
        found: dict[str, LayerRegime] = {}
        for name, shape in self.shapes.items():
            own = [index for index, end in enumerate(self.ends) if end.weight == name]
            if len(shape) < 2 or not own:
                continue
            ends: dict[str, list[int]] = {}
            for index in own:
                ends.setdefault(self.ends[index].kind, []).append(index)
            others = {
                i: [
                    self.ends[j].name
                    for j in partners.get(i, ())
                    if self.ends[j].weight != name or ("[" in self.ends[j].name and j != i)
                ]
                for i in own
            }
            if name in excluded:
                ready = all(decided[i] for i in own if self._found.is_zero()[i])
                regime = Regime.SCALE_INVARIANT if ready else Regime.UNDECIDED
            elif any(all(others[i] for i in indices) for indices in ends.values()):
                regime = Regime.HOMOGENEOUS
            else:
                regime = Regime.OTHER if all(decided[i] for i in own) else Regime.UNDECIDED
            names = tuple(dict.fromkeys(partner for i in own for partner in others[i]))
            size = min((sizes[i] for i in own if math.isfinite(sizes[i])), default=math.nan)
            found[name] = LayerRegime(regime, names, size, int(self._found.seen[own].max()))
        for group, names_of_group in self._named.items():
            for name in names_of_group:
                rest = tuple(other for other in names_of_group if other != name)
                found[name] = LayerRegime(Regime.HOMOGENEOUS, rest, math.nan, self.steps)
            del group
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: where the norms began."""
        return {"first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier run's :meth:`state_dict`."""
        self._first = {name: (float(a), float(b)) for name, (a, b) in state["first"].items()}
