"""One optimizer's measurements: the parameters, the meter, the clock and the window that belong to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.callbacks._budget import Budget
from lightning_lowrank.callbacks._clock import DecayClock
from lightning_lowrank.callbacks._keys import Keys, PerLayer, Spectral
from lightning_lowrank.callbacks._meter import StepMeter, has_coupled_target
from lightning_lowrank.callbacks._regimes import LayerRegime, RegimeTracker
from lightning_lowrank.callbacks._spectra import Spectra
from lightning_lowrank.callbacks._window import GradientWindow
from lightning_lowrank.full_gradient import FullGradient
from lightning_lowrank.functional import InnerProducts
from lightning_lowrank.layers import ends_by_name, layer_ends
from lightning_lowrank.matrices import layouts_of_parameters
from lightning_lowrank.optimizers import Decay, StepRecord, bound
from lightning_lowrank.parameters import Parameter, Penalty, optimized_parameters
from lightning_lowrank.sampling import Step
from lightning_lowrank.sharding import Shard, shards

Source = Literal["step", "window", "full"]

# What an optimizer's weights come to rest at.
_TARGETS = {
    Decay.COUPLED: "stationary point of the L2-regularised loss",
    Decay.DECOUPLED: "fixed point of its own direction and decoupled decay",
    Decay.NONE: "none: no weight decay",
    Decay.UNKNOWN: "unknown",
}


@dataclass(frozen=True)
class LayerRow:
    """What is known of one weight matrix.

    Attributes:
        name: The parameter's name.
        shape: Its shape.
        regime: What the theory says about it; None while nothing is known.
        values: Last values by key.
        singular_values: All of them, descending, where they were computed.
    """

    name: str
    shape: tuple[int, ...]
    regime: LayerRegime | None
    values: Mapping[str, float]
    singular_values: Tensor | None


@dataclass(frozen=True)
class Settings:
    """What the user chose, checked."""

    spectral: Spectral | None = "norm"
    per_layer: PerLayer = "auto"
    penalty: Penalty = field(default_factory=Penalty)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    share: float = 0.01
    matrices: Mapping[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The choices as plain data, under the names of the arguments."""
        found = asdict(self)
        penalty, share = found.pop("penalty"), found.pop("share")
        weight_decay = "auto" if penalty["weight_decay"] is None else penalty["weight_decay"]
        return {
            **found,
            "weight_decay": weight_decay,
            "loss_penalty": penalty["in_loss"],
            "initialization_share": share,
        }

    def measures(self, name: str) -> bool:
        """Whether a parameter is one of those that are measured."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


class OptimizerMonitor:
    """Measures one optimizer.

    Args:
        optimizer: The torch optimizer.
        settings: The user's choices.
        gradient: Where full-batch values come from; None where there are none.
        epsilon: Machine epsilon of the arithmetic that makes the gradients.
        window: Adds up gradients, under ``gradient="window"``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: Settings,
        gradient: Source | None,
        epsilon: float,
        window: GradientWindow | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.clock = DecayClock(optimizer, settings.penalty)
        self._epsilon = epsilon
        self._meter: StepMeter | None = None
        self._shards: dict[int, list[Shard]] = {}
        self._record: StepRecord | None = None
        self._completed: dict[str, float] = {}
        self._state: Mapping[str, Any] | None = None
        groups = optimizer.param_groups
        self.decays = [settings.penalty.decay(optimizer, group) for group in groups]
        decoupled = [group for group, decay in zip(groups, self.decays, strict=True) if decay is Decay.DECOUPLED]
        bounds = {bound(optimizer, group) for group in decoupled} - {None}
        self.keys = Keys(
            gradient=gradient if has_coupled_target(self.decays) else None,
            coupled=has_coupled_target(self.decays),
            decoupled=bool(decoupled),
            bounds=frozenset(str(b) for b in bounds),
            spectral=settings.spectral,
            per_layer=settings.per_layer,
        )
        # Where nothing is coupled there is no full-batch value to make of it.
        self.window = window if self.keys.gradient == "window" else None

    @property
    def is_decayed(self) -> bool:
        """Whether some weights are pulled to an L2-stationary point at present."""
        groups = self.optimizer.param_groups
        return any(self.settings.penalty.decay(self.optimizer, group) is Decay.COUPLED for group in groups)

    @property
    def regimes(self) -> RegimeTracker | None:
        """What is known about the layers; None before the first step of a lazy module."""
        return self._meter.regimes if self._meter else None

    def name_layers(self, module: nn.Module, later: Sequence[nn.Parameter] = ()) -> None:
        """Fix which matrices have keys: all that the optimizer holds, and those that may be handed to it later."""
        self._shards = shards(module)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        held = {id(p) for p in (*trained, *later)}
        every = {shard.name: shard.shape for key, found in self._shards.items() if key in held for shard in found}
        shapes = {name: shape for name, shape in every.items() if self.settings.measures(name)}
        if not shapes:
            rank_zero_warn(
                f"LowRankMonitor: include={list(self.settings.include)}, exclude={list(self.settings.exclude)} leave no"
                " parameter to measure"
            )
        for group, patterns in self.settings.groups.items():
            if not any(fnmatchcase(name, pattern) for name in shapes for pattern in patterns):
                rank_zero_warn(f"LowRankMonitor: no parameter matches the patterns {list(patterns)} of group {group!r}")
        self.keys.layers = [name for name, shape in shapes.items() if len(shape) >= 2]
        ends = layer_ends(module)
        ends += ends_by_name(set(shapes) - {name for end in ends for name, _, _ in end.parts})
        layouts = layouts_of_parameters(module, every, self.settings.matrices)
        self.keys.without_spectra = frozenset(self.keys.layers) - layouts.keys()
        self._meter = StepMeter(
            self.keys,
            RegimeTracker(ends, shapes, self._epsilon, self.settings.groups),
            Spectra(self.settings.spectral == "full", layouts),
        )
        if self._state is not None:
            self._meter.regimes.load_state_dict(self._state)

    def view(self, module: nn.Module, loss_scale: float) -> list[Parameter]:
        """The measured parameters that have a gradient."""
        if self._meter is None:
            self.name_layers(module)
        if any(id(p) not in self._shards for group in self.optimizer.param_groups for p in group["params"]):
            self._shards = shards(module)
        view = optimized_parameters(self.optimizer, self._shards, penalty=self.settings.penalty, loss_scale=loss_scale)
        return [p for p in view if self.settings.measures(p.name)]

    def step(
        self,
        view: Sequence[Parameter],
        *,
        whole: bool,
        in_full: bool,
        spectra: Budget | None,
        drawn: Step | None,
        number: int = 0,
    ) -> dict[str, float]:
        """Measure the gradient that the optimizer is about to use.

        Args:
            view: As :meth:`view` returns it.
            whole: Whether it is the gradient of a whole epoch.
            in_full: Whether all values are wanted, or just those that are means over steps.
            spectra: The time that there is for spectra; None where none are due.
            drawn: What it is made of; None where the window does not take it.
            number: Of the step.

        Returns:
            Values by key; those of a window only in the step that completes it, and in the next that is wanted in full.
        """
        assert self._meter is not None
        completed: dict[str, float] = {}
        if drawn is not None and self.window is not None:
            products = self.window.add(view, drawn)
            completed = self._window_values(view, products)
            self._completed |= completed
            if not in_full and not self._meter.regimes.searching:
                self._meter.glance(view, products)
                return completed
        elif in_full or self._meter.regimes.searching:
            products = self._meter.products(view)
        else:
            self._meter.glance_only(view)
            return completed
        values = self._meter.measure(
            view,
            products,
            whole_epoch=whole,
            spectra=spectra if in_full else None,
            tau=self.clock.tau(),
            number=number,
        )
        if not in_full:
            return completed
        values |= self._completed
        values["cumulative_decay"] = self.clock.tau()
        values["steps_to_stationarity"] = self.clock.steps_left(self.settings.share)
        if self.keys.decoupled:
            self._record = StepRecord(self.optimizer)
        return values

    def _window_values(self, view: Sequence[Parameter], products: InnerProducts) -> dict[str, float]:
        assert self._meter is not None
        assert self.window is not None
        found = self.window.result(view, products, self._meter.comparable(view))
        return {} if found is None else self.full_values(view, found)

    def comparable(self, view: Sequence[Parameter]) -> list[int]:
        """Indices of the parameters that the aggregates are over."""
        assert self._meter is not None
        return self._meter.comparable(view)

    def full_values(self, view: Sequence[Parameter], found: FullGradient) -> dict[str, float]:
        """The keys of the full-batch gradient, per layer too."""
        assert self._meter is not None
        indices = [index for index, p in enumerate(view) if p.is_matrix]
        names = [view[index].name for index in indices]
        # Where the optimizer does not add wd * W to the gradient the theory predicts no alignment.
        layers = {
            "alignment": [
                found.of_parameters[index] if view[index].decay is Decay.COUPLED else math.nan for index in indices
            ]
        }
        return {
            "alignment": found.alignment,
            "residual": found.residual,
            "alignment_stderr": found.alignment_stderr,
            "residual_stderr": found.residual_stderr,
            **self._meter.of_layers(names, layers),
        }

    def after_step(self, module: nn.Module) -> dict[str, float]:
        """The values of decoupled decay, once the step that :meth:`step` measured has been taken."""
        if self._record is None or self._meter is None:
            return {}
        directions, self._record = self._record.directions(), None
        view = self.view(module, 1.0)
        by_id: dict[str, Tensor] = {}
        for key, direction in directions.items():
            for shard in self._shards.get(key, ()):
                by_id[shard.name] = shard.local(direction)
        values = self._meter.after_step(view, by_id)
        bounded = [p for p in view if p.decay is Decay.DECOUPLED]
        if "linf" in self.keys.bounds and bounded:
            values["linf_decay"] = self._meter.linf_decay(bounded)
        return values

    def start_row(self) -> None:
        """Begin the means over steps anew."""
        self._completed = {}
        if self._meter is not None:
            self._meter.start_row()

    def announce(self) -> None:
        """Say once what can't be measured under this optimizer."""
        name = type(self.optimizer).__name__
        if Decay.DECOUPLED in self.decays:
            rank_zero_info(
                f"LowRankMonitor: {name} decays weights beside the gradient, not through it, so the stationary point of"
                " the L2-regularised loss is not its target: alignment, residual and radial balance are left out for"
                " the parameters that it decays, and the optimizer's own direction is measured instead."
            )
        if Decay.UNKNOWN in self.decays:
            rank_zero_info(
                f"LowRankMonitor: how {name} applies its weight decay is unknown, so alignment, residual and radial"
                " balance are left out for the parameters that it decays. Tell with"
                f" lightning_lowrank.register_optimizer({name}, decay=...), or pass weight_decay=."
            )
        if all(decay is Decay.NONE for decay in self.decays):
            rank_zero_info(
                f"LowRankMonitor: {name} has no weight decay, so alignment, residual and radial balance are NaN."
            )

    def description(self) -> dict[str, Any]:
        """What this optimizer's values are measured against, as plain data for a run's configuration."""
        groups = self.optimizer.param_groups
        return {
            "class": type(self.optimizer).__name__,
            "target": [_TARGETS[decay] for decay in dict.fromkeys(self.decays)],
            "weight_decay": [self.settings.penalty.coefficient(group) for group in groups],
            "full_batch_values": self.keys.gradient,
            "matrices": len(self.keys.layers or ()),
        }

    def layer_rows(self) -> list[LayerRow]:
        """Every matrix with the last values of it."""
        if self._meter is None or self.keys.layers is None:
            return []
        regimes = self._meter.regimes.regimes()
        spectra = self._meter.spectra.of(self.keys.layers)
        shapes = {shard.name: tuple(shard.shape) for found in self._shards.values() for shard in found}
        return [
            LayerRow(name, shapes[name], regimes.get(name), self._meter.latest.get(name, {}), found.singular_values)
            for name, found in zip(self.keys.layers, spectra, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        regimes = self.regimes
        return {"clock": self.clock.state_dict(), "regimes": regimes.state_dict() if regimes else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier run."""
        self.clock.load_state_dict(state["clock"])
        self._state = state["regimes"]
        if self._state is not None and self.regimes is not None:
            self.regimes.load_state_dict(self._state)
