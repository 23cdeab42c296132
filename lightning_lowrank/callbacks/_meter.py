"""From the parameters of one optimizer, step after step, to named numbers. Knows nothing of Lightning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_lowrank.callbacks._budget import Budget
from lightning_lowrank.callbacks._keys import Keys
from lightning_lowrank.callbacks._regimes import RegimeTracker
from lightning_lowrank.callbacks._spectra import Spectra, age_of
from lightning_lowrank.functional import InnerProducts
from lightning_lowrank.functional._tensors import inner_products, squared_residuals
from lightning_lowrank.optimizers import Decay
from lightning_lowrank.parameters import Parameter
from lightning_lowrank.sharding import reduce_max, reduce_sums

# Below it the residual is a small difference of the products, and is computed from the entries.
_SMALL_RESIDUAL = 0.05


class StepMeter:
    """Measures one optimizer's steps.

    Args:
        keys: Which values there are.
        regimes: Which layers the theory speaks of; learns from every step that is measured in full.
        spectra: What is known of the matrices' spectra.
    """

    def __init__(self, keys: Keys, regimes: RegimeTracker, spectra: Spectra) -> None:
        self.keys = keys
        self.regimes = regimes
        self.spectra = spectra
        self.latest: dict[str, dict[str, float]] = {}
        self.start_row()

    def start_row(self) -> None:
        """Begin the means over steps anew."""
        self._balances: list[float] = []
        self._invariant: dict[str, list[float]] = {}

    def products(self, view: Sequence[Parameter]) -> InnerProducts:
        """The inner products of the parameters with the *data's* gradient, reduced over shards."""
        sums = inner_products([(p.value, p.grad) for p in view], exact=False)
        return data_products(view, reduce_sums(sums, [p.shard for p in view]))

    def residual(self, view: Sequence[Parameter], products: InnerProducts) -> float:
        """|G + Lambda theta| / |Lambda theta| over the comparable parameters, also where it is small."""
        some = [view[index] for index in self.comparable(view)]
        if not some:
            return math.nan
        pairs = [(p.value, p.grad) for p in some]
        # G is factor * grad less the penalty within the loss, so G + wd W = factor * (grad + own / factor * W).
        decays = [(p.weight_decay - p.in_loss) / p.factor for p in some]
        local = inner_products(pairs, exact=False)
        squared = squared_residuals(pairs, decays, local) * torch.tensor([p.factor**2 for p in some]).double()
        squared = reduce_sums(squared[:, None], [p.shard for p in some])
        pull = products.select(self.comparable(view)).decay_norm()
        return math.sqrt(squared.sum().item()) / pull if pull > 0 and squared.isfinite().all() else math.nan

    def glance_only(self, view: Sequence[Parameter]) -> None:
        """Take a step into the means over steps with just the products that those need, which is cheaper."""
        if any(p.in_loss for p in view):
            self.glance(view, self.products(view))
            return
        chosen = set(self.comparable(view))
        some = [p for index, p in enumerate(view) if index in chosen]
        excluded = self.regimes.excluded()
        invariant = [p for p in view if p.name in excluded and p.is_matrix and p.decay is Decay.COUPLED]
        radial = inner_products([(p.value, p.grad) for p in some], exact=False, only=("ww", "wg"))
        squares = inner_products([(p.value, p.grad) for p in invariant], exact=False, only=("ww", "gg"))
        rows = torch.full((len(some) + len(invariant), 3), math.nan, dtype=torch.float64)
        rows[: len(some), :2] = radial
        rows[len(some) :, 0], rows[len(some) :, 2] = squares.unbind(1)
        both = [*some, *invariant]
        self.glance(both, data_products(both, reduce_sums(rows, [p.shard for p in both])))

    def glance(self, view: Sequence[Parameter], products: InnerProducts) -> None:
        """Take a step into the means over steps, and nothing more."""
        comparable = self.comparable(view)
        balance = products.select(comparable).radial_balance()
        if math.isfinite(balance):
            self._balances.append(balance)
        excluded = self.regimes.excluded()
        for p, ww, gg in zip(view, products.ww.tolist(), products.gg.tolist(), strict=True):
            if p.name in excluded and p.is_matrix and p.decay is Decay.COUPLED and ww > 0:
                # |G|^2 / |W|^2 over its steady state 2 wd / lr_effective = 2 wd^2 / rate (docs/theory.md).
                self._invariant.setdefault(p.name, []).append(gg / ww * float(p.rate) / (2 * p.weight_decay**2))

    def measure(
        self,
        view: Sequence[Parameter],
        products: InnerProducts,
        *,
        whole_epoch: bool,
        spectra: Budget | None,
        tau: float,
        number: int,
    ) -> dict[str, float]:
        """Measure one step.

        Args:
            view: The parameters with their gradients.
            products: As :meth:`products` returns them.
            whole_epoch: Whether this step's gradient is the full-batch gradient.
            spectra: The time that there is for measuring spectra; None where none are due.
            tau: The cumulative decay before this step.
            number: Of this step.

        Returns:
            Values by key; NaN where there is none.
        """
        norms = self.regimes.update(view, torch.stack([products.ww, products.wg, products.gg], 1), tau)
        self.glance(view, products)
        indices = [index for index, p in enumerate(view) if p.is_matrix]
        matrices = [view[index] for index in indices]
        of_matrices = products.select(indices)
        values: dict[str, float] = {}
        if self.keys.coupled:
            comparable = products.select(self.comparable(view))
            step = {"alignment": comparable.alignment(), "residual": comparable.residual()}
            if step["residual"] < _SMALL_RESIDUAL:
                step["residual"] = self.residual(view, products)
            values |= {f"{key}_minibatch": value for key, value in step.items()}
            if self.keys.gradient == "step":
                values |= step if whole_epoch else dict.fromkeys(step, math.nan)
            values |= {"radial_balance": _mean(self._balances), "radial_balance_stderr": _stderr(self._balances)}
            values["scale_invariant_balance"] = _mean([_mean(found) for found in self._invariant.values()])
        values |= {"implied_weight_decay": of_matrices.implied_weight_decay(), **norms}
        layers = self._layer_values(matrices, of_matrices, whole_epoch)
        if self.keys.spectral:
            if spectra is not None:
                wanted = [
                    (p, norm)
                    for p, norm in zip(matrices, layers["frobenius_norm"], strict=True)
                    if p.name not in self.keys.without_spectra
                ]
                self.spectra.measure(wanted, number, spectra)
            self._add_spectra(values, layers, matrices, number)
        per_layer = self.of_layers([p.name for p in matrices], layers)
        return {key: _finite(value) for key, value in {**values, **per_layer}.items()}

    def of_layers(self, names: Sequence[str], layers: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The per-layer part of a row. ``latest`` has the last values of every matrix, where rows have quantiles too.

        Args:
            names: The matrices.
            layers: Values in their order, by key.
        """
        for key in (key for key in self.keys.of_layers if key in layers):
            for name, value in zip(names, layers[key], strict=True):
                self.latest.setdefault(name, {})[key] = value
        return self.keys.spread_out(names, layers)

    def after_step(self, view: Sequence[Parameter], directions: Mapping[str, Tensor]) -> dict[str, float]:
        """The values of decoupled decay, from the direction u of the step that was taken.

        Args:
            view: The parameters, with their values after the step.
            directions: u by name, this process' piece of it.
        """
        excluded = self.regimes.excluded()
        decayed = [p for p in view if p.decay is Decay.DECOUPLED and p.name not in excluded]
        moved = [p for p in decayed if p.name in directions]
        values = {"update_alignment": math.nan, "update_residual": math.nan}
        if moved and len(moved) == len(decayed):
            sums = inner_products([(p.value, directions[p.name]) for p in moved])
            products = InnerProducts.from_sums(
                reduce_sums(sums, [p.shard for p in moved]), [p.weight_decay for p in moved]
            )
            values = {"update_alignment": products.alignment(), "update_residual": products.residual()}
        return values

    def linf_decay(self, parameters: Sequence[Parameter]) -> float:
        """The largest wd * max|theta| over the parameters; AdamW's limit points have at most 1."""
        tops = torch.stack(
            [p.value.abs().amax().float().cpu() if p.value.numel() else torch.zeros(()) for p in parameters]
        )
        tops = reduce_max(tops, [p.shard for p in parameters])
        return max(p.weight_decay * float(top) for p, top in zip(parameters, tops.tolist(), strict=True))

    def comparable(self, view: Sequence[Parameter]) -> list[int]:
        """What the L2 target holds for: coupled decay, and not scale-invariant."""
        excluded = self.regimes.excluded()
        return [i for i, p in enumerate(view) if p.decay is Decay.COUPLED and p.name not in excluded]

    def _layer_values(
        self, matrices: Sequence[Parameter], products: InnerProducts, whole_epoch: bool
    ) -> dict[str, list[float]]:
        """Lists in the order of the matrices, by key."""
        layers = {
            "implied_weight_decay": (-products.wg / products.ww).tolist(),
            "frobenius_norm": products.ww.sqrt().tolist(),
        }
        if self.keys.coupled and self.keys.gradient in (None, "step"):
            known = whole_epoch or self.keys.gradient is None
            # Where the optimizer does not add wd * W to the gradient the theory predicts no alignment.
            layers[self.keys.alignment] = [
                cosine if known and p.decay is Decay.COUPLED else math.nan
                for cosine, p in zip(products.cosines().tolist(), matrices, strict=True)
            ]
        return layers

    def _add_spectra(
        self, values: dict[str, float], layers: dict[str, list[float]], matrices: Sequence[Parameter], step: int
    ) -> None:
        """What is known of the spectra by now; of those that are not due, what was measured before."""
        names = [p.name for p in matrices]
        found = self.spectra.of(names)
        layers["spectral_norm"] = [spectrum.top for spectrum in found]
        layers["stable_rank"] = [spectrum.stable_rank for spectrum in found]
        if self.keys.spectral == "full":
            layers["effective_rank"] = [spectrum.effective_rank for spectrum in found]
        of_all = [s for p, s in zip(matrices, found, strict=True) if p.name not in self.keys.without_spectra]
        values["spectral_age"] = age_of(of_all, step)
        # A mean over some of the matrices would be another quantity.
        known = math.isfinite(values["spectral_age"])
        values["stable_rank"] = _mean([s.stable_rank for s in of_all]) if known else math.nan
        values["spectral_ratio"] = _mean([s.ratio for s in of_all]) if known else math.nan
        if "spectral" in self.keys.bounds:
            decayed = [
                p.weight_decay * s.top for p, s in zip(matrices, found, strict=True) if p.decay is Decay.DECOUPLED
            ]
            values["spectral_decay"] = max(decayed, default=math.nan) if known else math.nan


def data_products(view: Sequence[Parameter], sums: Tensor) -> InnerProducts:
    """The products with the gradient of the data's loss: sign, scale and a penalty within the loss taken out.

    Args:
        view: The parameters.
        sums: <W, W>, <W, G>, <G, G> with the gradients as they are in ``grad``, shape ``(parameters, 3)``.
    """
    data = sums.double()
    if any(p.factor != 1 or p.in_loss for p in view):
        data = torch.cat([p.of_data(row[None]) for p, row in zip(view, data, strict=True)])
    return InnerProducts.from_sums(data, [p.weight_decay if p.decay is Decay.COUPLED else 0.0 for p in view])


def has_coupled_target(decays: Iterable[Decay]) -> bool:
    """Whether the L2-regularised loss is what an optimizer descends, for some of its parameters.

    An optimizer without any decay counts: its decay may be scheduled to start later, and until then the values are NaN.
    """
    decays = list(decays)
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
