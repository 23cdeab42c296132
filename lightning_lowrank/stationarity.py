"""measure_stationarity: one pass over the data at fixed weights, and what it says about the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist, fmean
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import nn
from torch.optim import Optimizer

from lightning_lowrank._compat import attached_trainer, gradient_epsilon, quiet_trainer, raw_optimizer
from lightning_lowrank.callbacks._meter import data_products
from lightning_lowrank.callbacks._optimizer import Settings
from lightning_lowrank.callbacks._regimes import RegimeTracker
from lightning_lowrank.fetching import check_loader
from lightning_lowrank.full_gradient import FullGradient, PassSums
from lightning_lowrank.functional import InnerProducts, spectral_norm
from lightning_lowrank.layers import layer_ends
from lightning_lowrank.optimizers import Decay
from lightning_lowrank.parameters import Penalty, optimized_parameters
from lightning_lowrank.preserve import preserved
from lightning_lowrank.sampling import pass_population
from lightning_lowrank.sharding import shards
from lightning_lowrank.spectral_bound import Outputs, chain_of, largest_stretch, matrices, spectral_ratio_bound
from lightning_lowrank.stationarity_report import LayerStationarity, StationarityReport
from lightning_lowrank.training_pass import BatchGradients, TrainingPass, check_module

# Residual at which an iterated spectral norm stops: the value is good to four digits.
_SPECTRAL_RTOL = 1e-4


def measure_stationarity(
    module: nn.Module,
    dataloader: Any,
    *,
    weight_decay: float | Literal["auto"] = "auto",
    loss_penalty: float = 0.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    outputs: Outputs | None = None,
    confidence: float = 0.95,
    progress: bool = True,
    train_mode: bool = True,
) -> StationarityReport:
    """Measure how far a network is from a stationary point of its L2-regularised loss, with one pass over the data.

    The gradient is that of the module's own ``training_step``, averaged over the samples. Everything is as before
    afterwards: weights, gradients, buffers, modes and random numbers (see
    :class:`lightning_lowrank.training_pass.TrainingPass`). The formulas are those of docs/theory.md.

    Args:
        module: A LightningModule with automatic optimization.
        dataloader: One dataloader over the training data, or anything else that yields batches.
        weight_decay: The coefficient of the penalty ``weight_decay / 2 |theta|^2``, as torch.optim means it, for all
            parameters. "auto": that of the optimizer of the module's Trainer, or of ``configure_optimizers()``, group
            by group.
        loss_penalty: Coefficient c of a penalty ``c / 2 |theta|^2`` that is written into the loss.
        include: Glob pattern or patterns; only parameters whose name matches one are measured.
        exclude: Glob pattern or patterns of parameters that are left out.
        groups: Rescaling groups by name, each a list of patterns of weights, for layers that the search does not pair.
        outputs: ``outputs(module, batch)`` runs the network, for the bound on the spectral ratio; by default
            ``module(batch[0])``.
        confidence: Of the intervals, between 0 and 1.
        progress: Whether to show a progress bar.
        train_mode: Whether to measure the loss as it is in training, with dropout; False: in the module's present mode.

    Raises:
        TypeError: If the module is no LightningModule.
        ValueError: If an argument is out of range, the module or the dataloader does not allow such a pass, or its
            weight decay can't be told.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> _ = torch.manual_seed(0)
        >>> data = [torch.randn(4, 32), torch.randn(2, 32)]
        >>> report = measure_stationarity(BoringModel(), data, weight_decay=0.1, progress=False)
        >>> report.samples, report.stochastic, [layer.name for layer in report.layers]
        (6, False, ['layer.weight'])
        >>> -1 <= report.alignment <= 1
        True
    """
    check_module(module)
    check_loader(dataloader)
    _check_numbers(weight_decay, loss_penalty, confidence)
    settings = Settings(
        penalty=Penalty(None if weight_decay == "auto" else float(weight_decay), float(loss_penalty)),
        groups=groups or {},
        include=_patterns(include),
        exclude=_patterns(exclude),
    )
    with _untouched(module, dataloader):
        optimizer = _optimizer(module, weight_decay)
        if train_mode:
            module.train()
        measured = _Pass(module, dataloader, optimizer, settings)
        measured.run(progress)
        return measured.report(confidence, outputs)


class _Pass:
    """The pass and what is added up in it."""

    def __init__(self, module: Any, loader: Any, optimizer: Optimizer, settings: Settings) -> None:
        self._module, self._loader = module, loader
        layout = shards(module)
        self._trainer = attached_trainer(module) or quiet_trainer(module)
        if self._trainer.world_size > 1 or any(s.groups for found in layout.values() for s in found):
            raise ValueError(
                "measure_stationarity runs in one process, on whole parameters; in a distributed run use"
                " LowRankMonitor(gradient='full')"
            )
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._parameters = [p for p in trained if any(settings.measures(s.name) for s in layout.get(id(p), ()))]
        if not self._parameters:
            raise ValueError("no trained parameter is left to measure; widen include or exclude")
        stand_ins = {id(p): p.detach() for p in self._parameters}
        self._view = optimized_parameters(optimizer, layout, penalty=settings.penalty, gradients=stand_ins)
        if any(p.factor < 0 for p in self._view):
            raise ValueError(f"{type(optimizer).__name__} has maximize=True; only minimised losses are measured")
        self._optimizer_name = type(optimizer).__name__
        shapes = {p.name: p.shape for p in self._view}
        self._regimes = RegimeTracker(layer_ends(module), shapes, gradient_epsilon(self._trainer), settings.groups)
        self._population = pass_population(loader, 1)
        self._sums = PassSums(self._parameters, self._population)
        self._used = [False] * len(self._view)
        self._norm_spread = self._defect = math.nan
        self._notes: list[str] = []

    def run(self, progress: bool) -> None:
        """Go over the data."""
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("full gradient", total=None)
            steps = TrainingPass(
                self._module,
                self._loader,
                self._parameters,
                trainer=self._trainer,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
            for batch in steps:
                self._sums.add(batch)
                self._learn(batch)
        if self._sums.samples == 0:
            raise ValueError("the dataloader yielded no batch with a loss")
        self._sums.finish()
        self.stochastic = bool(steps.stochastic)
        self._notes += steps.notes

    def _learn(self, batch: BatchGradients) -> None:
        """What one batch says about the regimes; parameters that its loss does not depend on are left out."""
        view, rows = [], []
        for row, (p, *drawn) in enumerate(zip(self._view, *batch.draws, strict=True)):
            found = [g for g in drawn if g is not None]
            if found:
                view.append(replace(p, grad=found[0] if len(found) == 1 else (found[0] + found[1]) / 2))
                rows.append(row)
                self._used[row] = True
        data = data_products(view, self._sums.batches[-1][rows])
        values = self._regimes.update(view, torch.stack([data.ww, data.wg, data.gg], 1), math.nan)
        # Weights are fixed, so the latest groups have the norm spread; the defect is the worst of all batches.
        if math.isfinite(values["norm_spread"]):
            self._norm_spread = values["norm_spread"]
        self._defect = max(
            (d for d in (self._defect, values["homogeneity_defect"]) if math.isfinite(d)), default=math.nan
        )

    def report(self, confidence: float, outputs: Outputs | None) -> StationarityReport:
        """Everything that was found."""
        products = data_products(self._view, self._sums.products())
        found = self._estimate()
        self._note_decay()
        layers = self._layers(products)
        decays = {p.weight_decay for p in self._view if p.is_matrix and p.decay is Decay.COUPLED}
        ratios = [layer.spectral_ratio for layer in layers if math.isfinite(layer.spectral_ratio)]
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        return StationarityReport(
            alignment=found.alignment,
            alignment_interval=_interval(found.alignment, z * found.alignment_stderr, -1.0, 1.0),
            residual=found.residual,
            residual_interval=_interval(found.residual, z * found.residual_stderr, 0.0, math.inf),
            radial_balance=found.radial_balance,
            radial_balance_interval=_interval(found.radial_balance, z * found.radial_balance_stderr),
            confidence=confidence,
            samples=self._sums.samples,
            stochastic=self.stochastic,
            weight_decay=decays.pop() if len(decays) == 1 else math.nan,
            layers=layers,
            norm_spread=self._norm_spread,
            homogeneity_defect=self._defect,
            spectral_ratio=fmean(ratios) if ratios else math.nan,
            spectral_ratio_bound=self._bound(outputs),
            notes=list(dict.fromkeys(self._notes)),
        )

    def _estimate(self) -> FullGradient:
        """The aggregates, over what the L2 target holds for and what the loss depends on."""
        excluded = self._regimes.excluded()
        comparable = [
            i for i, p in enumerate(self._view) if p.decay is Decay.COUPLED and p.name not in excluded and self._used[i]
        ]
        if not comparable:
            unknown = math.nan
            return FullGradient(unknown, unknown, unknown, unknown, unknown, unknown, of_parameters=[])
        decay = [p.weight_decay if p.decay is Decay.COUPLED else 0.0 for p in self._view]
        return self._sums.estimate(
            torch.tensor(decay, dtype=torch.float64),
            torch.tensor([p.in_loss for p in self._view], dtype=torch.float64),
            comparable,
        )

    def _layers(self, products: InnerProducts) -> list[LayerStationarity]:
        regimes = self._regimes.regimes()
        pulls, cosines = (-products.wg).tolist(), products.cosines().tolist()
        layers = []
        for p, squared, pull, cosine in zip(self._view, products.ww.tolist(), pulls, cosines, strict=True):
            if not p.is_matrix:
                continue
            coupled = p.decay is Decay.COUPLED
            norm, top = math.sqrt(squared), spectral_norm(p.value, _SPECTRAL_RTOL).value
            ratio = top / norm if norm > 0 else math.nan
            regime = regimes.get(p.name)
            layers.append(
                LayerStationarity(
                    name=p.name,
                    shape=tuple(p.shape),
                    weight_decay=p.weight_decay if coupled else math.nan,
                    frobenius_norm=norm,
                    predicted_norm=math.sqrt(pull / p.weight_decay) if coupled and pull > 0 else math.nan,
                    alignment=cosine if coupled else math.nan,
                    implied_weight_decay=pull / squared if squared > 0 else math.nan,
                    spectral_norm=top,
                    stable_rank=1 / ratio**2 if ratio > 0 else math.nan,
                    spectral_ratio=ratio,
                    regime=regime.regime.value if regime else "undecided",
                    evidence=str(regime) if regime else "undecided: its layer is not measured as a whole",
                )
            )
        return layers

    def _bound(self, outputs: Outputs | None) -> float:
        """The bound on the mean spectral ratio; NaN with a note where there is none."""
        chain, reason = chain_of(self._module)
        if chain is not None:
            chained = {id(weight) for weight in matrices(chain)}
            if chained != {id(p) for p in self._parameters if p.ndim >= 2}:
                chain, reason = None, "not all weights of the network are measured"
        if chain is None:
            self._notes.append(f"no bound on the spectral ratio: {reason}")
            return math.nan
        try:
            stretch = largest_stretch(self._module, chain, self._loader, outputs)
        except Exception as error:
            if outputs is not None:
                raise
            self._notes.append(f"no bound on the spectral ratio: module(batch[0]) raised {error!r}; pass outputs=")
            return math.nan
        if math.isnan(stretch):
            self._notes.append("no bound on the spectral ratio: the nn.Sequential was not called as a whole")
        return spectral_ratio_bound(chain, stretch)

    def _note_decay(self) -> None:
        decays, name = {p.decay for p in self._view}, self._optimizer_name
        if Decay.DECOUPLED in decays:
            self._notes.append(
                f"{name} decays weights beside the gradient, so the stationary point of the L2-regularised loss is not"
                " its target: what it decays is left out of alignment, residual and radial balance. A number for"
                " weight_decay measures them with an L2 penalty all the same"
            )
        if Decay.UNKNOWN in decays:
            self._notes.append(
                f"how {name} applies its weight decay is unknown, so what it decays is left out of alignment, residual"
                f" and radial balance; tell with register_optimizer({name}, decay=...), or pass weight_decay="
            )
        if decays == {Decay.NONE}:
            self._notes.append("there is no weight decay, so alignment, residual and radial balance are NaN")
        if excluded := sorted(self._regimes.excluded()):
            self._notes.append(
                f"scale-invariant, left out of alignment, residual and radial balance: {', '.join(excluded)}"
            )
        unused = [p.name for p, used in zip(self._view, self._used, strict=True) if not used]
        if unused:
            self._notes.append(f"the loss does not depend on {', '.join(unused)}")
        if self._population is not None:
            self._notes.append("the pass is a random draw from more data, which the intervals account for")


@contextmanager
def _untouched(module: nn.Module, loader: Any) -> Iterator[None]:
    """Put back what the pass may change, and which parameters are trained: configure_optimizers may freeze some."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    with preserved(module, loader):
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _optimizer(module: Any, weight_decay: float | Literal["auto"]) -> Optimizer:
    """The optimizer whose groups say how each parameter is decayed."""
    if weight_decay != "auto":
        # Any optimizer with coupled decay stands for the L2-regularised loss.
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
        return torch.optim.SGD(parameters, lr=1.0, weight_decay=float(weight_decay))
    trainer = attached_trainer(module)
    found = list(trainer.optimizers) if trainer is not None else []
    if not found:
        try:
            found = _optimizers_in(module.configure_optimizers())
        except Exception as error:
            raise ValueError(
                f"configure_optimizers() of {type(module).__name__} failed ({error!r}), so its weight decay is not"
                " known; pass weight_decay="
            ) from error
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} has {len(found)} optimizers instead of one; pass weight_decay=")
    return raw_optimizer(found[0])


def _optimizers_in(configured: Any) -> list[Any]:
    """The optimizers in any of the forms that configure_optimizers may return."""
    if isinstance(configured, Mapping):
        return [configured["optimizer"]]
    if isinstance(configured, (list, tuple)):
        with_schedulers = len(configured) == 2 and isinstance(configured[0], (list, tuple))
        parts = configured[0] if with_schedulers else configured
        return [optimizer for part in parts for optimizer in _optimizers_in(part)]
    return [] if configured is None else [configured]


def _check_numbers(weight_decay: object, loss_penalty: object, confidence: object) -> None:
    if weight_decay != "auto" and not _is_coefficient(weight_decay):
        raise ValueError(f"weight_decay must be 'auto' or a number of at least 0, got {weight_decay!r}")
    if not _is_coefficient(loss_penalty):
        raise ValueError(f"loss_penalty must be a number of at least 0, got {loss_penalty!r}")
    if not (isinstance(confidence, float) and 0 < confidence < 1):
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")


def _is_coefficient(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _interval(value: float, half: float, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
    """The interval around a value, within the range that it can have; NaN where the error is not known."""
    if half == 0 or math.isnan(value) or math.isnan(half):
        return (value, value) if half == 0 else (math.nan, math.nan)
    return max(low, value - half), min(high, value + half)
