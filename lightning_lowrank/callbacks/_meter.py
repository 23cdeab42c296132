"""From the parameters of one optimizer, step after step, to named numbers. Knows nothing of Lightning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import torch

from lightning_lowrank.functional import (
    InnerProducts,
    RescalingGroups,
    effective_rank,
    norm_spread,
    singular_values,
    spectral_norm,
)
from lightning_lowrank.parameters import Decay, Parameter

Spectral = Literal["norm", "full"]

# Up to this many matrices each gets its own keys under per_layer="auto"; dashboards drown in more.
MANY_LAYERS = 32
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
# Keys that a single measured step cannot give a value.
LATE_KEYS = ("norm_spread", "radial_balance_stderr")
SPECTRAL_KEYS = ("stable_rank", "spectral_ratio", "spectral_norm", "effective_rank")
# Residual at which an iterated spectral norm stops: the logged value is good to four digits.
_SPECTRAL_RTOL = 1e-4


class StepMeter:
    """Measures one optimizer's steps, under keys that never change.

    Args:
        whole_epoch: Whether there are keys for values of the full-batch gradient.
        spectral: Which spectra there are.
        per_layer: Whether each matrix has keys of its own, or by their number.
        decays: How the optimizer decays its groups, at the start of the run.
    """

    def __init__(
        self,
        *,
        whole_epoch: bool,
        spectral: Spectral | None,
        per_layer: bool | Literal["auto"],
        decays: Sequence[Decay],
    ) -> None:
        self.whole_epoch = whole_epoch
        self.spectral = spectral
        self.per_layer = per_layer
        self.coupled = has_coupled_target(decays)
        self.layers: list[str] | None = None
        self._groups = RescalingGroups()
        self._balances: list[float] = []

    @property
    def scalar_keys(self) -> list[str]:
        """The keys without the per-layer ones."""
        keys = []
        if self.coupled:
            keys += ["alignment_minibatch", "residual_minibatch"]
            keys += ["alignment", "residual"] if self.whole_epoch else []
            keys += ["radial_balance", "radial_balance_stderr"]
        keys += ["implied_weight_decay", "norm_spread"]
        return keys + (["stable_rank", "spectral_ratio"] if self.spectral else [])

    @property
    def layer_keys(self) -> list[str]:
        """The keys that every matrix has."""
        keys = [self._alignment_key] if self.coupled else []
        keys += ["implied_weight_decay", "frobenius_norm"]
        keys += ["spectral_norm", "stable_rank"] if self.spectral else []
        return keys + (["effective_rank"] if self.spectral == "full" else [])

    @property
    def keys(self) -> list[str]:
        """All keys, once the layers are known."""
        per_layer = self.layer_keys if self.per_layer is not False else []
        entries = (self.layers or []) if self._by_name else list(QUANTILES)
        return self.scalar_keys + [f"{key}/{entry}" for key in per_layer for entry in entries]

    @property
    def _by_name(self) -> bool:
        return self.per_layer is True or len(self.layers or ()) <= MANY_LAYERS

    @property
    def _alignment_key(self) -> str:
        return "alignment" if self.whole_epoch else "alignment_minibatch"

    def start_row(self) -> None:
        """Begin the means over steps anew."""
        self._balances.clear()

    def measure(self, view: Sequence[Parameter], *, whole_epoch: bool, spectra: bool) -> dict[str, float]:
        """Measure one step.

        Args:
            view: The parameters with their gradients.
            whole_epoch: Whether this step's gradient is the full-batch gradient.
            spectra: Whether to measure the spectra as well; without, their keys are missing from the result.

        Returns:
            Values by key; NaN where there is none.
        """
        products = InnerProducts.of(
            [p.value for p in view],
            [p.grad for p in view],
            [p.weight_decay if p.decay is Decay.COUPLED else 0.0 for p in view],
        )
        indices = [index for index, p in enumerate(view) if p.is_matrix]
        matrices = [view[index] for index in indices]
        names = [p.name for p in matrices]
        of_matrices = products.select(indices)
        norms = dict(zip(names, of_matrices.ww.sqrt().tolist(), strict=True))
        self._groups.update(names, of_matrices.wg.tolist(), (of_matrices.ww * of_matrices.gg).sqrt().tolist())

        values: dict[str, float] = {}
        if self.coupled:
            alignment, residual = products.alignment(), products.residual()
            values |= {"alignment_minibatch": alignment, "residual_minibatch": residual}
            if self.whole_epoch:
                full = {"alignment": alignment, "residual": residual}
                values |= full if whole_epoch else dict.fromkeys(full, math.nan)
            balance = products.radial_balance()
            if math.isfinite(balance):
                self._balances.append(balance)
            values |= {"radial_balance": _mean(self._balances), "radial_balance_stderr": _stderr(self._balances)}
        values["implied_weight_decay"] = of_matrices.implied_weight_decay()
        groups = [[norms[name] for name in group if name in norms] for group in self._groups.groups()]
        values["norm_spread"] = max((norm_spread(group) for group in groups), default=math.nan)

        layers = self._layer_values(matrices, of_matrices, whole_epoch)
        if spectra and self.spectral:
            self._add_spectra(values, layers, matrices, norms)
        return {key: _finite(value) for key, value in {**values, **self._per_layer(names, layers)}.items()}

    def _layer_values(
        self, matrices: Sequence[Parameter], products: InnerProducts, whole_epoch: bool
    ) -> dict[str, list[float]]:
        """Lists in the order of the matrices, by key."""
        layers = {
            "implied_weight_decay": (-products.wg / products.ww).tolist(),
            "frobenius_norm": products.ww.sqrt().tolist(),
        }
        if self.coupled:
            cosines = products.cosines().tolist()
            # Where the optimizer does not add wd * W to the gradient the theory predicts no alignment.
            has_target = [p.decay is Decay.COUPLED and (whole_epoch or not self.whole_epoch) for p in matrices]
            layers[self._alignment_key] = [
                cosine if target else math.nan for cosine, target in zip(cosines, has_target, strict=True)
            ]
        return layers

    def _add_spectra(
        self,
        values: dict[str, float],
        layers: dict[str, list[float]],
        matrices: Sequence[Parameter],
        norms: dict[str, float],
    ) -> None:
        if self.spectral == "full":
            spectra = [singular_values(p.value) for p in matrices]
            tops = [sigma[0].item() if len(sigma) else 0.0 for sigma in spectra]
            layers["effective_rank"] = [effective_rank(sigma) for sigma in spectra]
        else:
            tops = [spectral_norm(p.value, _SPECTRAL_RTOL).value for p in matrices]
        ratios = [top / norms[p.name] if norms[p.name] > 0 else math.nan for top, p in zip(tops, matrices, strict=True)]
        layers["spectral_norm"] = tops
        layers["stable_rank"] = [1 / ratio**2 if ratio > 0 else math.nan for ratio in ratios]
        values |= {"stable_rank": _mean(layers["stable_rank"]), "spectral_ratio": _mean(ratios)}

    def _per_layer(self, names: Sequence[str], layers: dict[str, list[float]]) -> dict[str, float]:
        """The per-layer part: a key per matrix, or quantiles over the matrices when they are many."""
        if self.per_layer is False:
            return {}
        out: dict[str, float] = {}
        for key in (key for key in self.layer_keys if key in layers):
            if self._by_name:
                found = dict(zip(names, layers[key], strict=True))
                out |= {f"{key}/{name}": found.get(name, math.nan) for name in self.layers or []}
            else:
                finite = torch.tensor([v for v in layers[key] if math.isfinite(v)], dtype=torch.float64)
                out |= {
                    f"{key}/{label}": finite.quantile(q).item() if len(finite) else math.nan
                    for label, q in QUANTILES.items()
                }
        return out


def has_coupled_target(decays: Sequence[Decay]) -> bool:
    """Whether the L2-regularised loss is what this optimizer descends, for some of its parameters.

    An optimizer without any decay counts: its decay may be scheduled to start later, and until then the values are NaN.
    """
    return Decay.COUPLED in decays or all(decay is Decay.NONE for decay in decays)


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _stderr(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
