"""The full-batch gradient from one pass over training data, with the error that dropout and augmentation leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import accumulate_products, inner_products
from lightning_lowrank.functional.mean_gradient import MeanGradient
from lightning_lowrank.training_pass import BatchGradients, TrainingPass

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FullGradient:
    """What is known about the full-batch gradient.

    Attributes:
        alignment: cos(Lambda theta, -G) over the comparable parameters.
        residual: |G + Lambda theta| / |Lambda theta| over them.
        radial_balance: -<theta, G> / <theta, Lambda theta> over them.
        alignment_stderr: Standard error of the alignment; 0 where nothing is random.
        residual_stderr: Standard error of the residual.
        radial_balance_stderr: Standard error of the radial balance.
        of_parameters: The alignment of each parameter.
    """

    alignment: float
    residual: float
    radial_balance: float
    alignment_stderr: float
    residual_stderr: float
    radial_balance_stderr: float
    of_parameters: list[float]


class PassSums:
    """Adds up the gradients of a pass.

    A batch that was drawn twice, with independent dropout and augmentation, gives the half difference delta of its two
    gradients beside their mean: the noise of the mean has the same distribution. So with S = sum b_k mean_k and
    D = sum b_k delta_k, |S|^2 - |D|^2 is free of bias, and products with the deltas give standard errors (derived in
    docs/theory.md). That takes a second buffer of the model's size; without randomness there is one.

    Args:
        parameters: The parameters, in the order of the pass.
        population: Of how many samples the pass is a random draw; None if it is all the data.
        total: Sums a tensor over the processes that share the data.

    Attributes:
        batches: <theta, g> and |theta| |g| of each batch and parameter.
    """

    def __init__(
        self, parameters: Sequence[Tensor], population: float | None = None, total: Sum = lambda tensor: tensor
    ) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._total = total
        self._mean = None if population is None else MeanGradient(population)
        self._sums = self._buffers()
        self._noise: list[Tensor] | None = None
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.batches: list[Tensor] = []
        self.samples = 0

    def _buffers(self) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self._parameters]

    def add(self, batch: BatchGradients) -> None:
        """Take one batch."""
        drawn = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, draw, strict=True)]
            for draw in batch.draws
        ]
        weight = batch.samples
        mean = drawn[0]
        if len(drawn) == 2:
            half = [(a - b) / 2 for a, b in zip(*drawn, strict=True)]
            mean = [(a + b) / 2 for a, b in zip(*drawn, strict=True)]
            if self._noise is None:
                self._noise = self._buffers()
            with_sum = inner_products(list(zip(self._sums, half, strict=True)))[:, 1] / max(1, self.samples)
            moved = accumulate_products(self._parameters, half, self._noise, weight)
            self._pairs.append((weight * moved[:, 1], weight * with_sum, weight * moved[:, 3]))
        products = accumulate_products(self._parameters, mean, self._sums, weight)
        self.batches.append(products[:, :3])
        if self._mean is not None:
            self._mean.update(products[:, 1], products[:, 2], products[:, 3], samples=weight, epoch=0)
        self.samples += weight

    def finish(self) -> None:
        """Bring the sums of all processes together."""
        count = self._total(torch.tensor([float(self.samples)], dtype=torch.float64))
        for tensor in (*self._sums, *(self._noise or [])):
            tensor.copy_(self._total(tensor))
        self.samples = round(count.item())

    def gradients(self) -> list[Tensor]:
        """The mean gradient of each parameter."""
        return [total / self.samples for total in self._sums]

    def products(self) -> Tensor:
        """<theta, theta>, <theta, G> and |G|^2 of each parameter, freed of noise, shape ``(parameters, 3)``."""
        n = self.samples
        found = inner_products(list(zip(self._parameters, self._sums, strict=True)))
        found[:, 1] /= n
        if self._noise is not None:
            found[:, 2] -= inner_products([(d, d) for d in self._noise])[:, 0]
        found[:, 2] /= n**2
        if self._mean is not None:
            every = self._mean.estimate(found[:, 0], 1.0, [[i] for i in range(len(found))])
            found[:, 2] = every.gradient_squared
        return found

    def estimate(self, weight_decay: Tensor, in_loss: Tensor, comparable: Sequence[int]) -> FullGradient:
        """What the pass says.

        Args:
            weight_decay: The coefficient of the whole L2 penalty, shape ``(parameters,)``.
            in_loss: The part of it that is within the loss.
            comparable: Indices that the aggregates are over.
        """
        ww, wg, gg = self.products().unbind(1)
        wg, gg = wg - in_loss * ww, gg - 2 * in_loss * wg + in_loss.square() * ww
        index = torch.tensor(list(comparable), dtype=torch.long)
        decay = weight_decay[index]
        pull, squared = (decay * wg[index]).sum().item(), gg[index].sum().item()
        size = (decay.square() * ww[index]).sum().item()
        radial, scale = wg[index].sum().item(), (decay * ww[index]).sum().item()
        exact = self._exact_residual(weight_decay - in_loss, index) if self._is_exact else None
        share = (squared + 2 * pull + size) / size if size > 0 else math.nan
        residual = math.sqrt(exact / size) if exact is not None and size > 0 else _root(share)
        alignment = -pull / math.sqrt(size * squared) if size * squared > 0 else math.nan
        errors = self._errors(decay, in_loss, index, pull, squared, size, share)
        each = -wg / (ww * gg).sqrt()
        return FullGradient(
            alignment, residual, -radial / scale if scale > 0 else math.nan, *errors, of_parameters=each.tolist()
        )

    @property
    def _is_exact(self) -> bool:
        return self._noise is None and self._mean is None

    def _exact_residual(self, own: Tensor, index: Tensor) -> float:
        """|G + Lambda theta|^2 entry by entry: a small difference of products would be rounding noise."""
        found = 0.0
        for i in index.tolist():
            moved = self._sums[i].double() / self.samples + own[i].item() * self._parameters[i].double()
            found += moved.square().sum().item()
        return found

    def _errors(
        self, decay: Tensor, in_loss: Tensor, index: Tensor, pull: float, squared: float, size: float, share: float
    ) -> tuple[float, float, float]:
        """Standard errors of alignment, residual and radial balance, to first order."""
        if self._mean is not None:
            ww = self.products()[:, 0]
            found = self._mean.estimate(ww, torch.zeros_like(ww).index_copy(0, index, decay), [index.tolist()])
            errors = (found.alignment_stderr, found.residual_stderr, found.radial_balance_stderr)
            return tuple(error.item() for error in errors)  # type: ignore[return-value]
        if not (size > 0 and squared > 0 and pull != 0):
            return math.nan, math.nan, math.nan
        if self._noise is None:
            return 0.0, 0.0, 0.0
        n = self.samples
        along, with_sum, with_noise = (torch.stack(rows)[:, index] for rows in zip(*self._pairs, strict=True))
        x = (along * decay).sum(1)
        y = (with_sum - in_loss[index] * along).sum(1)
        z, plain = with_noise.sum(1), along.sum(1)
        moments = self._total(
            torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum(), (z * z).sum(), (plain**2).sum()])
        )
        xx, yy, xy, zz, rr = (moments / n**2).tolist()
        of_square = 4 * yy + 8 * zz / n**2
        relative = xx / pull**2 + of_square / (4 * squared**2) - 2 * xy / (pull * squared)
        alignment = -pull / math.sqrt(size * squared)
        spread = math.sqrt(max(0.0, of_square + 4 * xx + 8 * xy)) / size
        residual = math.sqrt(max(0.0, share) + spread) - math.sqrt(max(0.0, share))
        scale = size / decay.mean().item() if len(decay) else math.nan
        return abs(alignment) * _root(max(0.0, relative)), residual, math.sqrt(rr) / scale


def gradient_of_pass(
    steps: TrainingPass, parameters: Sequence[Tensor], population: float | None, total: Sum = lambda tensor: tensor
) -> PassSums:
    """Go through a pass and add up its gradients.

    Raises:
        ValueError: If there was no batch with a loss.
    """
    sums = PassSums(parameters, population, total)
    for batch in steps:
        sums.add(batch)
    sums.finish()
    if sums.samples == 0:
        raise ValueError("the dataloader yielded no batch with a loss")
    return sums


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan
