"""A window of mini-batch gradients, from which the full-batch gradient's values are estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lowrank._compat import LightningModule, step_of_epoch
from lightning_lowrank.callbacks._meter import data_products
from lightning_lowrank.full_gradient import FullGradient
from lightning_lowrank.functional import InnerProducts
from lightning_lowrank.functional._tensors import accumulate_products
from lightning_lowrank.functional.mean_gradient import MOST_MOVED, MOST_STDERR, MeanGradient
from lightning_lowrank.parameters import Parameter
from lightning_lowrank.sampling import Draws, Sampling, Step
from lightning_lowrank.sharding import reduce_sums

# Taking every gradient keeps whole epochs exact, but each costs 4 % of a ResNet-18's training step at batch 64. So a
# window is followed by a rest of some windows' length, unless the model is so small that nobody would notice.
_REST = 8
_SMALL_MODEL = 1_000_000
# |theta - theta at the start| / |theta| from which on no window can end well: it is given up.
_FAR = 0.1
# Entries whose movement is watched, and gradients between two looks.
_WATCHED = 1 << 14
_LOOK_EVERY = 10


class GradientWindow:
    """Adds up gradients over a number of steps, then says what the full-batch gradient is, and starts again.

    Args:
        size: Optimizer steps of a window; None chooses by the sampling.
        stride: Every how many steps a gradient is taken.
        rest: Steps between two windows; None chooses by the number of parameters.
    """

    def __init__(self, size: int | None = None, stride: int = 1, rest: int | None = None) -> None:
        self._chosen = size, stride, rest
        self._resting = 0
        self._said = False
        self._sampling: Sampling | None = None
        self._epoch = -1
        self._restart()

    def _restart(self) -> None:
        self._done = 0
        self._moved = 0.0
        self._names: list[str] = []
        self._sums: list[Tensor] = []
        self._start: list[Tensor] = []
        self._pulls: Tensor | float = 0.0
        self._mean = MeanGradient()
        self._seen = 0.0

    def due(self, trainer: Any, module: LightningModule) -> Step | None:
        """Count an optimizer step; what its gradient is made of if the window takes it, else None."""
        if trainer.current_epoch != self._epoch:
            self._consider(Sampling.of(trainer, module), module)
            self._epoch = trainer.current_epoch
        sampling = self._sampling
        assert sampling is not None
        position = step_of_epoch(trainer)
        if self._resting > 0:
            self._resting -= 1
            return None
        if not sampling.is_known or (self._done == 0 and self._aligned and position != 0):
            return None
        self._done += 1
        return sampling.at(position) if (self._done - 1) % self.stride == self._offset else None

    def _consider(self, sampling: Sampling, module: LightningModule) -> None:
        """Fit the window to how batches are drawn, which may change between epochs."""
        if sampling == self._sampling:
            return
        size, stride, rest = self._chosen
        self._restart()
        self.size = size or (sampling.window_size if sampling.is_known else 1)
        if sampling.needs_whole_epochs and sampling.is_known and self.size % sampling.steps:
            self.size = sampling.steps * math.ceil(self.size / sampling.steps)
            rank_zero_info(
                f"LowRankMonitor: batches come in a fixed order, so a window has to be of whole epochs; window_size is"
                f" {self.size}."
            )
        self.stride = 1 if sampling.needs_whole_epochs else stride
        small = sum(p.numel() for p in module.parameters() if p.requires_grad) < _SMALL_MODEL
        self.rest = rest if rest is not None else 0 if small else _REST * self.size
        # The last step of a stride, where the rows' steps are.
        self._offset = self.stride - 1
        whole = sampling.epochs_are_exact and sampling.draws is not Draws.WITH_REPLACEMENT
        self._aligned = whole and self.size % sampling.steps == 0
        if not sampling.is_known and self._sampling is None:
            rank_zero_info(
                "LowRankMonitor: it can't be known how this run draws its training batches (manual optimization,"
                " several dataloaders, an IterableDataset, or a sampler or batch sampler of its own), and so not how"
                " much of a window's gradient is noise: alignment and residual are NaN."
                " measure_stationarity(module, dataloader) needs no such knowledge."
            )
        elif self._sampling is None:
            # A run that is shorter than the first rest would else pay for its window all the time.
            self._resting = self.rest if rest is None else 0
            between = f", with {self.rest} steps between two of them" if self.rest else ""
            after = self._resting + self.size
            rank_zero_info(
                f"LowRankMonitor: alignment and residual come from windows of {self.size} steps{between}; the first has"
                f" its value after {after} steps, if the weights hardly move in the last {self.size}."
                + (" window_rest=0 measures all the time." if self._resting else "")
            )
        self._sampling = sampling

    def add(self, view: Sequence[Parameter], step: Step) -> InnerProducts:
        """Take a step's gradient.

        Returns:
            The step's own inner products.
        """
        names = [p.name for p in view]
        if names != self._names:
            done = self._done
            self._restart()
            self._done, self._names = done, names
            self._mean = MeanGradient(self._sampling.population if self._sampling else math.inf)
            self._sums = [
                torch.zeros_like(p.value, dtype=torch.promote_types(p.value.dtype, torch.float32)) for p in view
            ]
            self._start = [_watched(p.value, self._spacing(view)).clone() for p in view]
        unit = abs(view[0].factor) / step.scale
        table = accumulate_products([p.value for p in view], [p.grad for p in view], self._sums, step.samples * unit)
        look = len(self._mean) % _LOOK_EVERY == 0 or self._done >= self.size
        table = torch.cat([table, self._movement(view) if look else torch.zeros(len(view), 1)], 1).double()
        table = reduce_sums(table, [p.shard for p in view])
        products = data_products(view, table[:, :3])
        if table.isfinite().all():
            self._take(view, products, table[:, 3] * unit, step)
            if look:
                self._moved = max(self._moved, table[:, 4].sum().sqrt().item())
                if self._moved > _FAR * products.ww.sum().sqrt():
                    self._say(
                        f"the weights moved by more than {_FAR:g} of their norm within {self._done} steps, which is too"
                        " far for a window of gradients, so another is tried later"
                    )
                    self._restart()
                    self._resting = self.rest
        else:
            self._restart()
        return products

    def _say(self, reason: str) -> None:
        if not self._said:
            rank_zero_info(
                f"LowRankMonitor: {reason}. Smaller learning rates or a shorter window_size help; gradient='full' does"
                " not depend on it. This is said once."
            )
        self._said = True

    def _take(self, view: Sequence[Parameter], products: InnerProducts, sg: Tensor, step: Step) -> None:
        """Feed the estimator with the products of the data's gradient; weights hardly move within a window."""
        in_loss = torch.tensor([p.in_loss for p in view], dtype=torch.float64)
        wg, gg = products.wg / step.scale, products.gg / step.scale**2
        if in_loss.any():
            # The sums hold the penalty's gradient as well.
            sg = sg - in_loss * (self._pulls + self._seen * wg)
            self._pulls = self._pulls + step.samples * (wg + in_loss * products.ww)
        epoch = self._epoch if self._sampling and self._sampling.draws is not Draws.WITH_REPLACEMENT else 0
        self._mean.update(wg, gg, sg, samples=step.samples, epoch=epoch)
        self._seen += step.samples

    def _spacing(self, view: Sequence[Parameter]) -> int:
        return max(1, sum(p.value.numel() for p in view) // _WATCHED)

    def _movement(self, view: Sequence[Parameter]) -> Tensor:
        """|theta - theta at the start|^2 of each parameter, from evenly spaced entries, shape ``(parameters, 1)``."""
        rows = []
        spacing = self._spacing(view)
        for p, start in zip(view, self._start, strict=True):
            moved = torch.linalg.vector_norm(_watched(p.value, spacing) - start).square()
            rows.append(moved.double() * (p.value.numel() / max(1, start.numel())))
        return torch.stack([row.to(rows[0].device) for row in rows]).cpu().reshape(-1, 1)

    def result(
        self, view: Sequence[Parameter], products: InnerProducts, comparable: Sequence[int]
    ) -> FullGradient | None:
        """What the window says once it is complete, and start the next one; None before.

        Args:
            view: The parameters of the last gradient.
            products: Its products.
            comparable: Indices of those that the aggregates are over.

        Returns:
            NaN where the weights moved too far or the noise is too large.
        """
        if self._done < self.size or not self._names:
            if self._done >= self.size:
                self._restart()
            return None
        found = self._mean.estimate(
            products.ww, products.weight_decay, [list(comparable), *([index] for index in range(len(view)))]
        )
        size = math.sqrt(max(0.0, found.gradient_squared[0].item()))
        moved = self._moved / size if size > 0 else math.inf
        trusted = found.trusted(moved)
        if moved > MOST_MOVED:
            self._say(
                f"the weights moved by {moved:.2g} |G| within a window of {self.size} steps, and more than"
                f" {MOST_MOVED:g} |G| is too far, so alignment and residual are NaN"
            )
        elif trusted.alignment[0].isnan():
            self._say(
                f"{self.size} gradients are too noisy for an estimate of |G| (standard error of the alignment"
                f" {found.alignment_stderr[0].item():.2g}, at most {MOST_STDERR:g}), so alignment and residual are NaN"
            )
        self._restart()
        self._resting = self.rest
        alignment, *of_parameters = trusted.alignment.tolist()
        return FullGradient(
            alignment=alignment,
            residual=trusted.residual[0].item(),
            radial_balance=found.radial_balance[0].item(),
            alignment_stderr=_where_known(found.alignment_stderr, trusted.alignment),
            residual_stderr=_where_known(found.residual_stderr, trusted.residual),
            radial_balance_stderr=found.radial_balance_stderr[0].item(),
            of_parameters=of_parameters,
        )


def _where_known(error: Tensor, value: Tensor) -> float:
    """The standard error of a value that is given; NaN where that is NaN."""
    return float("nan") if value[0].isnan() else error[0].item()


def _watched(value: Tensor, spacing: int) -> Tensor:
    """Every so manieth entry."""
    return value.reshape(-1)[::spacing]
