"""The keys of one optimizer's values, which never change over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

Spectral = Literal["norm", "full"]
PerLayer = bool | Literal["auto"]

# Up to this many matrices each gets its own keys under per_layer="auto"; dashboards drown in more.
MANY_LAYERS = 32
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
SPECTRAL_KEYS = ("stable_rank", "spectral_ratio", "spectral_norm", "effective_rank", "spectral_decay", "spectral_age")
# Estimates of the full-batch gradient's values.
FULL_KEYS = ("alignment", "residual")
ERROR_KEYS = ("alignment_stderr", "residual_stderr")
# What a single measured step cannot give a value.
LATE_KEYS = ("radial_balance_stderr", "norm_spread", "homogeneity_defect", "norm_gap", "norm_gap_predicted")


@dataclass
class Keys:
    """Which values one optimizer has.

    Attributes:
        gradient: Where full-batch values come from: "step" (one step sees the whole epoch), "window" or "full"; None
            where there are none.
        coupled: Whether some weights have the L2-regularised loss as their target.
        bounds: What decoupled decay bounds, "linf" or "spectral", for those groups that it does.
        decoupled: Whether some weights are decayed beside the gradient.
        spectral: Which spectra there are.
        per_layer: Whether each matrix has keys of its own, or by their number.
        layers: The matrices' names, once they are known.
        without_spectra: Those of which no spectrum is wanted.
    """

    gradient: Literal["step", "window", "full"] | None
    coupled: bool
    decoupled: bool
    bounds: frozenset[str]
    spectral: Spectral | None
    per_layer: PerLayer
    layers: list[str] | None = field(default=None)
    without_spectra: frozenset[str] = frozenset()

    @property
    def scalars(self) -> list[str]:
        """The keys without the per-layer ones."""
        keys = []
        if self.coupled:
            keys += ["alignment_minibatch", "residual_minibatch"]
            keys += FULL_KEYS if self.gradient else ()
            keys += ERROR_KEYS if self.gradient in ("window", "full") else ()
            keys += ["radial_balance", "radial_balance_stderr", "scale_invariant_balance"]
        if self.decoupled:
            keys += ["update_alignment", "update_residual"]
            keys += ["linf_decay"] if "linf" in self.bounds else []
            keys += ["spectral_decay"] if "spectral" in self.bounds and self.spectral else []
        keys += ["implied_weight_decay", "norm_spread", "homogeneity_defect", "norm_gap", "norm_gap_predicted"]
        keys += ["cumulative_decay", "steps_to_stationarity"]
        return keys + (["stable_rank", "spectral_ratio", "spectral_age"] if self.spectral else [])

    @property
    def headlines(self) -> list[tuple[str, str]]:
        """Pairs of keys that say how far the run is from where its optimizer leads it, the better ones first."""
        if not self.coupled:
            return [("update_alignment", "update_residual")]
        minibatch = ("alignment_minibatch", "residual_minibatch")
        return [FULL_KEYS, minibatch] if self.gradient else [minibatch]

    @property
    def of_layers(self) -> list[str]:
        """The keys that every matrix has."""
        keys = [self.alignment] if self.coupled else []
        keys += ["implied_weight_decay", "frobenius_norm"]
        keys += ["spectral_norm", "stable_rank"] if self.spectral else []
        return keys + (["effective_rank"] if self.spectral == "full" else [])

    @property
    def alignment(self) -> str:
        """The per-layer alignment: the full gradient's where there is one."""
        return "alignment" if self.gradient else "alignment_minibatch"

    @property
    def all(self) -> list[str]:
        """Every key, once the layers are known."""
        return self.scalars + [f"{key}/{entry}" for key in self.of_layers for entry in self._entries(key)]

    @property
    def by_name(self) -> bool:
        """Whether the per-layer keys are the matrices' names rather than quantiles."""
        return self.per_layer is True or len(self.layers or ()) <= MANY_LAYERS

    def _entries(self, key: str) -> list[str]:
        """What one per-layer key has values for."""
        if self.per_layer is False:
            return []
        if not self.by_name:
            return list(QUANTILES)
        left_out = self.without_spectra if key in SPECTRAL_KEYS else frozenset()
        return [name for name in self.layers or [] if name not in left_out]

    def spread_out(self, names: Sequence[str], layers: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The per-layer part of a row: a key per matrix, or quantiles over the matrices when they are many."""
        out: dict[str, float] = {}
        for key in (key for key in self.of_layers if key in layers and self.per_layer is not False):
            if self.by_name:
                found = dict(zip(names, layers[key], strict=True))
                out |= {f"{key}/{name}": found.get(name, math.nan) for name in self._entries(key)}
            else:
                finite = torch.tensor([v for v in layers[key] if math.isfinite(v)], dtype=torch.float64)
                out |= {
                    f"{key}/{label}": finite.quantile(q).item() if len(finite) else math.nan
                    for label, q in QUANTILES.items()
                }
        return out
