"""The full-batch gradient's alignment, estimated from the mini-batch gradients of a window of steps.

A mini-batch gradient is the full-batch gradient G plus noise that is often ten times as long, so its own cosine is far
too small. Summing over a window leaves a noise whose expected square is known from the single gradients, and the
sampler decides how much of it. Let batch k have b_k samples and the window n, n_e of them from epoch e of N samples,
drawn without replacement. With g_k the mean over batch k, S = sum b_k g_k, and V the variance of one sample,

    E sum |b_k g_k|^2 = |G|^2 sum b_k^2 + V sum b_k (1 - b_k / N)
    E |S|^2           = |G|^2 n^2       + V sum_e n_e (1 - n_e / N)

and eliminating V gives |G|^2 (derived in docs/theory.md). N = infinity is sampling with replacement; whole epochs leave
no noise at all. Nothing but S is of the model's size: |S|^2 follows from <S before, g_k>, one number per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Fits of the variance components, each with the weights of the one before; further ones change little.
_FITS = 10
# Of the variance of independent draws: the least that a mean of earlier gradients is taken to have in these fits.
_LEAST_SHARE = 0.01
# A square that should be positive and comes out above minus this share of its terms is 0 but for rounding.
_ROUNDING = 1e-12
# How far the weights may move within a window, in units of |G|: as a step of gradient descent does, which changes G by
# the curvature along it. Beyond .1 the alignment at the window's end was off by more than .1: early in training
# because G itself drifts (by .14 at .25, even over whole epochs); at rest, in parts of an epoch, because the noise of
# early batches moves the weights against itself, so that later gradients make |G|^2 too small. Measured on small ReLU
# networks (benchmarks/window.py, and MNIST digits); a heuristic, which a much sharper loss defeats.
MOST_MOVED = 0.1
# Of the alignment; 2.5 of them are the error of .1 that a reader can still live with.
MOST_STDERR = 0.04
# Of the residual, absolute below 1 and relative above.
MOST_RESIDUAL_STDERR = 0.1
# A cosine above 1 by more than three standard errors and this belongs to gradients that were not drawn as assumed.
_ABOVE_ONE = 0.02
# Keeps a vanishing variance from dividing 0 by 0; its square is still a float64.
_TINY = 1e-100


@dataclass(frozen=True)
class Estimate:
    """What a window says about the full-batch gradient; one entry per subset of the parameters.

    Every attribute is a float64 tensor of shape ``(subsets,)``, NaN where there is no value. The standard errors are
    those of the sampling: 0 for whole epochs without replacement, and blind to weights that move within the window.

    Attributes:
        pull: <Lambda theta, G>.
        gradient_squared: |G|^2; may be negative where the noise is too large for the window.
        alignment: cos(Lambda theta, -G). An estimate, so it may exceed 1.
        residual: |G + Lambda theta| / |Lambda theta|.
        radial_balance: -<theta, G> / <theta, Lambda theta>.
        alignment_stderr: Standard error of the alignment.
        residual_stderr: Standard error of the residual.
        radial_balance_stderr: Standard error of the radial balance.
    """

    pull: Tensor
    gradient_squared: Tensor
    alignment: Tensor
    residual: Tensor
    radial_balance: Tensor
    alignment_stderr: Tensor
    residual_stderr: Tensor
    radial_balance_stderr: Tensor

    def trusted(self, moved: float) -> Estimate:
        """The same with NaN for an alignment or residual that may be far off.

        Those are all of them where the weights moved further than ``MOST_MOVED``, and each where its standard error is
        above ``MOST_STDERR`` (of the residual ``MOST_RESIDUAL_STDERR``) or the cosine is impossibly large.

        Args:
            moved: Largest |theta_k - theta_1| within the window in units of |G|, over all decayed parameters.
        """
        possible = self.alignment.abs() <= 1 + _ABOVE_ONE + 3 * self.alignment_stderr
        possible &= moved <= MOST_MOVED
        certain = possible & (self.alignment_stderr <= MOST_STDERR)
        close = self.residual_stderr <= MOST_RESIDUAL_STDERR * self.residual.clamp(min=1)
        return replace(
            self,
            alignment=torch.where(certain, self.alignment, math.nan),
            residual=torch.where(possible & close, self.residual, math.nan),
        )


@dataclass(frozen=True)
class _Draws:
    """How the window's samples were drawn: all that the estimator's coefficients depend on.

    Attributes:
        sizes: b_k, shape ``(K,)``.
        before: Samples of earlier batches, shape ``(K,)``.
        before_in_epoch: Those of the same epoch, shape ``(K,)``.
        spread_before: Variance of the sum of the earlier samples, in units of one sample's, shape ``(K,)``.
        epoch_sizes: n_e of each batch's own epoch, shape ``(K,)``.
        spread: sum_e n_e (1 - n_e / N), the variance of S in units of one sample's.
        population: N.
    """

    sizes: Tensor
    before: Tensor
    before_in_epoch: Tensor
    spread_before: Tensor
    epoch_sizes: Tensor
    spread: float
    population: float

    @classmethod
    def of(cls, sizes: Sequence[float], epochs: Sequence[int], population: float) -> _Draws:
        """From the batches in the order in which they came."""
        totals: dict[int, float] = {}
        before_in_epoch, spread_before = [], []
        spread = 0.0
        for size, epoch in zip(sizes, epochs, strict=True):
            seen = totals.get(epoch, 0.0)
            before_in_epoch.append(seen)
            spread_before.append(spread)
            totals[epoch] = seen + size
            spread += size - ((seen + size) ** 2 - seen**2) / population
        b = torch.tensor(sizes, dtype=torch.float64)
        return cls(
            sizes=b,
            before=b.cumsum(0) - b,
            before_in_epoch=torch.tensor(before_in_epoch, dtype=torch.float64),
            spread_before=torch.tensor(spread_before, dtype=torch.float64),
            epoch_sizes=torch.tensor([totals[epoch] for epoch in epochs], dtype=torch.float64),
            # Summed up again per epoch: whole epochs give an exact 0.
            spread=sum(n * (1 - n / population) for n in totals.values()),
            population=population,
        )

    @property
    def total(self) -> float:
        return float(self.sizes.sum())

    @property
    def single_spread(self) -> float:
        """sum_k b_k (1 - b_k / N): the variances of the single batches' sums."""
        return float((self.sizes * (1 - self.sizes / self.population)).sum())

    @property
    def correction(self) -> float:
        """c: what is subtracted from |S|^2, as a share of the sum of the single squares."""
        # One batch that is the whole population: nothing to correct.
        return self.spread / self.single_spread if self.spread > 0 else 0.0

    @property
    def coefficient(self) -> float:
        """Of |G|^2 in E [|S|^2 - c sum |b_k g_k|^2]."""
        return self.total**2 - self.correction * float(self.sizes.square().sum())

    @property
    def quadratic_spread(self) -> float:
        """Variance of the corrected noise |S - nG|^2 - c sum |b_k (g_k - G)|^2, in units of 2 tr(C^2), C one sample's.

        Exact for Gaussian noise: the sum over both terms of 2 tr(Cov^2), with Cov between batches j and k of one epoch
        -b_j b_k C / N.
        """
        b, c, epoch_share = self.sizes, self.correction, self.epoch_sizes / self.population
        squares = b.square()
        shared = torch.zeros((), dtype=torch.float64)
        if math.isfinite(self.population):
            # Batches of one epoch have equal epoch totals; two epochs with equal totals are told apart by the order.
            first = (self.before_in_epoch == 0).cumsum(0)
            per_epoch = torch.zeros(len(b) + 1, dtype=torch.float64).index_add(0, first, squares)
            shared = (per_epoch.square().sum() - squares.square().sum()) / self.population**2
        singles = (squares * (1 - b / self.population).square()).sum() + shared
        mixed = (squares * (1 - epoch_share).square()).sum()
        return max(0.0, float(self.spread**2 - 2 * c * mixed + c**2 * singles))


@dataclass
class MeanGradient:
    """Collects a window of mini-batch gradients and estimates the full-batch gradient's products from them.

    Args:
        population: Samples from which an epoch is drawn without replacement, over all ranks; infinity (the default) for
            independent draws.

    Example:
        >>> import torch
        >>> theta = torch.tensor([2.0, 0.0], dtype=torch.float64)
        >>> noise = torch.tensor([0.3, 0.1], dtype=torch.float64)
        >>> window, total = MeanGradient(population=8), torch.zeros(2, dtype=torch.float64)
        >>> for g in (-0.1 * theta + noise, -0.1 * theta - noise):  # the two halves of an epoch
        ...     window.update(theta @ g, g @ g, total @ g, samples=4, epoch=0)
        ...     total += 4 * g
        >>> found = window.estimate(theta @ theta, 0.1)
        >>> round(found.alignment.item(), 6), round(found.residual.item(), 6), found.alignment_stderr.item()
        (1.0, 0.0, 0.0)
    """

    population: float = math.inf
    _wg: list[Tensor] = field(default_factory=list)
    _gg: list[Tensor] = field(default_factory=list)
    _sg: list[Tensor] = field(default_factory=list)
    _sizes: list[float] = field(default_factory=list)
    _epochs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.population > 0:
            raise ValueError(f"population must be positive, or infinity for independent draws, got {self.population}")

    def __len__(self) -> int:
        return len(self._sizes)

    def update(self, wg: Tensor, gg: Tensor, sg: Tensor, *, samples: float, epoch: int) -> None:
        """Take one mini-batch.

        Args:
            wg: <theta, g> of each parameter at this step's weights, shape ``(P,)``, or a scalar for one parameter.
            gg: <g, g>, of the same shape; ``g`` is the *mean* gradient over the batch, without the penalty.
            sg: <S, g>, of the same shape, where S is the sum of ``samples * g`` over the *earlier* batches.
            samples: Batch size b_k, over all ranks and accumulated micro-batches.
            epoch: Any number that differs between epochs; without a meaning for independent draws.

        Raises:
            ValueError: If the shapes differ, or there are more samples than the epoch has left.
        """
        rows = [_row(x) for x in (wg, gg, sg)]
        shapes = [tuple(row.shape) for row in (*rows, *self._wg[:1])]
        if len(set(shapes)) > 1:
            raise ValueError(f"every product needs one entry per parameter, got shapes {shapes}")
        seen = samples + sum(b for b, e in zip(self._sizes, self._epochs, strict=True) if e == epoch)
        if not samples > 0 or seen > self.population * (1 + _ROUNDING):
            raise ValueError(f"epoch {epoch} has {self.population} samples, got a batch of {samples} that makes {seen}")
        for rows_so_far, row in zip((self._wg, self._gg, self._sg), rows, strict=True):
            rows_so_far.append(row)
        self._sizes.append(float(samples))
        self._epochs.append(epoch)

    def estimate(
        self, ww: Tensor, weight_decay: float | Tensor, subsets: Sequence[Sequence[int]] | None = None
    ) -> Estimate:
        """What the window says so far.

        Args:
            ww: <theta, theta> of each parameter at the weights that the estimate is for, shape ``(P,)`` or a scalar.
            weight_decay: The coefficient of each parameter, shape ``(P,)``, or one for all. Parameters without decay
                are left out, as in :class:`InnerProducts`.
            subsets: Indices of the parameters to sum over, one estimate for each; None is one of all parameters.

        Raises:
            ValueError: If there was no update.
        """
        if not self._sizes:
            raise ValueError("a window without a gradient says nothing; call update first")
        squared = _row(ww)
        decay = torch.as_tensor(weight_decay, dtype=torch.float64).cpu().expand_as(squared)
        member = torch.zeros(1 if subsets is None else len(subsets), len(squared), dtype=torch.float64)
        for row, subset in zip(member, [range(len(squared))] if subsets is None else subsets, strict=True):
            row[list(subset)] = 1
        member *= decay > 0
        wg, gg, sg = (torch.stack(rows) for rows in (self._wg, self._gg, self._sg))
        return _estimate(
            _Draws.of(self._sizes, self._epochs, self.population),
            radial=wg @ member.T,
            pulls=(wg * decay) @ member.T,
            squares=gg @ member.T,
            crosses=sg @ member.T,
            decay_radial=member @ (decay * squared),
            decay_squared=member @ (decay.square() * squared),
        )


def _estimate(
    draws: _Draws,
    *,
    radial: Tensor,
    pulls: Tensor,
    squares: Tensor,
    crosses: Tensor,
    decay_radial: Tensor,
    decay_squared: Tensor,
) -> Estimate:
    """The estimates from <theta, g_k>, <Lambda theta, g_k>, |g_k|^2 and <S_k-1, g_k>, each of shape (K, subsets)."""
    b = draws.sizes[:, None]
    pull = (b * pulls).sum(0) / draws.total
    singles = (b.square() * squares).sum(0)
    whole = singles + 2 * (b * crosses).sum(0)
    # A window of one batch, or of batches that are all of one epoch's noise, has no pair to learn from.
    gradient = _positive_or_nan(draws.coefficient) * (whole - draws.correction * singles)
    gradient = gradient / _positive_or_nan(draws.coefficient) ** 2
    known = torch.where(gradient > 0, gradient, math.nan)
    alignment = -pull / (decay_squared * known).sqrt()
    share = (known + 2 * pull + decay_squared) / decay_squared
    share = torch.where((share < 0) & (share > -_ROUNDING), 0.0, share)
    residual = share.sqrt()

    # <mean of the earlier gradients, g_k>, freed of the correlation of draws without replacement: mean |G|^2.
    noise = (singles - b.square().sum() * gradient) / _positive_or_nan(draws.single_spread)
    earlier = draws.before[1:, None]
    pairs = (crosses[1:] + noise * draws.before_in_epoch[1:, None] / draws.population) / earlier
    # The relative error of the alignment is that of the pull minus half that of |G|^2, to first order.
    errors = pulls[1:] / pull - pairs / known
    relative = _variance(draws, errors, linear=1.0, quadratic=0.25)
    # |G + Lambda theta|^2 is itself a mean over pairs, of gradients with the penalty.
    mean_pulls = ((b * pulls).cumsum(0) - b * pulls)[1:] / earlier
    deviations = (pairs + pulls[1:] + mean_pulls + decay_squared) / decay_squared - share
    uncertainty = _variance(draws, deviations, linear=4.0, quadratic=1.0).sqrt()
    return Estimate(
        pull=pull,
        gradient_squared=gradient,
        alignment=alignment,
        residual=residual,
        radial_balance=-(b * radial).sum(0) / draws.total / decay_radial,
        alignment_stderr=alignment.abs() * relative.sqrt(),
        # Of the root: the first-order error where it is small, and no division by a residual of 0.
        residual_stderr=(share + uncertainty).sqrt() - residual,
        radial_balance_stderr=_mean_stderr(draws, radial) / decay_radial,
    )


def _mean_stderr(draws: _Draws, values: Tensor) -> Tensor:
    """Standard error of the weighted mean of values that are means over the batches; shape ``(subsets,)``."""
    if draws.spread <= 0:
        return torch.zeros(values.shape[1], dtype=torch.float64)
    b, n = draws.sizes[:, None], draws.total
    squares = (b * (values - (b * values).sum(0) / n).square()).sum(0)
    per_sample = squares / _positive_or_nan(len(b) - n / draws.population - draws.spread / n)
    return (per_sample * draws.spread).sqrt() / n


def _variance(draws: _Draws, errors: Tensor, *, linear: float, quadratic: float) -> Tensor:
    """Variance of a mean over all pairs of gradients, from single pairs (Hoeffding's of a U-statistic)."""
    if draws.spread <= 0:
        return torch.zeros(errors.shape[1], dtype=torch.float64)
    single, pair = _components(draws, errors)
    return (
        linear * single * draws.spread / draws.total**2
        + quadratic * 2 * pair * draws.quadratic_spread / draws.coefficient**2
    )


def _components(draws: _Draws, errors: Tensor) -> tuple[Tensor, Tensor]:
    """The variance components L and Q, from the errors of the pairs (mean of the earlier gradients, g_k), k = 2..K.

    The error of such a pair is <w, noise_k> + <mean noise before, noise_k>, whose square has the mean L / b_k + Q / b_k
    * (variance of the earlier mean). Least squares with non-negative L and Q, each square weighted by its own variance:
    twice the square of its mean if errors are Gaussian.
    """
    if len(errors) < 2:
        unknown = torch.full((errors.shape[1],), math.nan, dtype=torch.float64)
        return unknown, unknown
    own = 1 / draws.sizes[1:]
    # Where an epoch ends nothing of the noise is left; a variance of 0 would weigh that one pair above all others.
    share = (draws.spread_before[1:] / draws.before[1:]).clamp(min=_LEAST_SHARE)
    both = own * share / draws.before[1:]
    basis = torch.stack([own, both])
    moments = torch.stack([own.square(), own * both, both.square()])
    squares = errors.square()
    single, pair = squares.mean(0) / own.mean() / 2, squares.mean(0) / both.mean() / 2
    for _ in range(_FITS):
        weights = (torch.outer(own, single) + torch.outer(both, pair)).clamp(min=_TINY).reciprocal().square()
        aa, ab, bb = moments @ weights
        sa, sb = basis @ (weights * squares)
        # The solution of the normal equations; where one component is negative, it is 0 and the other fits alone.
        first, second = sa * bb - sb * ab, sb * aa - sa * ab
        determinant = aa * bb - ab.square()
        single = torch.where(second < 0, sa / aa, first / determinant).clamp(min=0)
        pair = torch.where(first < 0, sb / bb, second / determinant).clamp(min=0)
    return single, pair


def _row(products: Tensor) -> Tensor:
    """One float64 number per parameter, on the CPU."""
    return products.detach().double().cpu().reshape(-1)


def _positive_or_nan(value: float) -> float:
    return value if value > 0 else math.nan
