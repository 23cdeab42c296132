"""Which layers the theory speaks of, found from the inner products of weights and gradients alone."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Regime(enum.Enum):
    """What the gradients of a run say about a layer.

    Example:
        >>> Regime.SCALE_INVARIANT.value
        'scale-invariant'
    """

    HOMOGENEOUS = "homogeneous"  # a factor can be moved between it and another layer
    SCALE_INVARIANT = "scale-invariant"  # its size has no effect: it feeds a normalisation
    OTHER = "other"  # neither, as with GELU, or no partner
    UNDECIDED = "undecided"


# All tolerances are in the unit |W| |G| / sqrt(size): the inner product that two unrelated vectors of that size have.
# It is also how rounding scales: in this unit, products that are equal in exact arithmetic differ by about 8 epsilon of
# the arithmetic (measured 1e-6 in float32, .01 to .05 in bfloat16; deeper networks add up a little more).
# Near a stationary point the samples' gradients cancel, and rounding is larger by as much as they do: in float32 no
# group of a converged network may be lost for that. Layers that do not belong together differ by .01 to 1 and more.
_EPSILONS = 32.0
_SMALLEST_TOLERANCE = 1e-3
# A normalisation's own epsilon leaves <W, G> a little off zero: measured up to 5e-4, and with bfloat16's rounding .015,
# two of its epsilons. Layers that are not invariant have .3 and more in the root mean square, nearly invariant ones (a
# gain before a residual block whose GELUs are all but linear) .01.
_ZERO = 0.002
_ZERO_EPSILONS = 4.0
# Once found, a layer is let go when its products are larger than that by far, not at the border.
_HYSTERESIS = 2.0
# A single step can agree by accident; that three do is out of the question.
_MIN_STEPS = 3
# A small product by accident is more likely than two equal ones, so a zero needs more evidence.
_MIN_ZERO_STEPS = 5


class RescalingGroups:
    """Find which ends of layers a factor can be moved between, from their products <W, G> step after step.

    A factor can be moved between W_j and W_k without changing the loss exactly if <W_j, G_j> = <W_k, G_k> at every
    point and on every batch (differentiate the loss along the rescaling; docs/theory.md). So ends whose products agree
    on every measured step so far form a group, and one disagreement separates them for good. A product of 0 on every
    step says that the size of W has no effect at all: the layer is scale-invariant, and belongs to no group.

    Args:
        sizes: Number of entries of each end.
        epsilon: Machine epsilon of the arithmetic that made the gradients; mixed precision has that of the lower one.

    Example:
        >>> groups = RescalingGroups(sizes=[1, 1, 1, 1])
        >>> for products in ([-0.5, -0.5, -0.1, 0.0], [-0.2, -0.2, -0.3, 0.0], [-0.3, -0.3, -0.3, 0.0]):
        ...     groups.update(torch.tensor(products), scales=torch.ones(4))
        >>> groups.groups()
        [[0, 1]]
        >>> groups.is_zero().tolist()
        [False, False, False, True]
    """

    def __init__(self, sizes: Sequence[int], epsilon: float = torch.finfo(torch.float32).eps) -> None:
        self.count = len(sizes)
        self.epsilon = epsilon
        self._unit = torch.tensor(sizes, dtype=torch.float64).clamp(min=1).rsqrt()
        self._reset(torch.zeros(self.count, dtype=torch.bool))

    def _reset(self, present: Tensor) -> None:
        self._present = present
        self._gone = torch.zeros(self.count, dtype=torch.bool)
        self._group = torch.zeros(self.count, dtype=torch.long)
        # Steps with a product that is large enough to tell ends apart; steps with any gradient; squares in the unit.
        self.evidence = torch.zeros(self.count, dtype=torch.long)
        self.seen = torch.zeros(self.count, dtype=torch.long)
        self._squares = torch.zeros(self.count, dtype=torch.float64)
        self._found_zero = torch.zeros(self.count, dtype=torch.bool)

    def update(self, products: Tensor, scales: Tensor) -> None:
        """Take one step's evidence.

        Args:
            products: <W, G> of each end, shape ``(count,)``; NaN for an end that has no gradient in this step.
            scales: |W| |G| of each end. A step with an infinite value is passed over.

        Ends that get their first gradient later start the search anew; one that has none in some step is left out.
        """
        products, scales = products.double(), scales.double()
        if torch.isinf(products).any() or torch.isinf(scales).any():
            return
        now = products.isfinite() & scales.isfinite()
        if (now & ~self._present & ~self._gone).any():
            self._reset(now)
        self._gone |= self._present & ~now
        self._present &= now
        products, scales = products.masked_fill(~now, 0), (scales * self._unit).masked_fill(~now, 0)
        self._separate(products, scales)
        active = self._present & (scales > 0)
        sizes = torch.where(active, products / scales, 0).abs()
        self.seen += active
        self.evidence += active & (sizes > self._tolerance)
        self._squares += sizes.square()
        self._found_zero = (self.seen > 0) & (
            self.product_sizes()
            <= torch.where(self._found_zero, _HYSTERESIS, 1.0) * max(_ZERO, _ZERO_EPSILONS * self.epsilon)
        )

    @property
    def _tolerance(self) -> float:
        return max(_SMALLEST_TOLERANCE, _EPSILONS * self.epsilon)

    def _separate(self, products: Tensor, scales: Tensor) -> None:
        """Refine the partition: who was together and agrees again stays together."""
        order = products.argsort()
        gap = products[order].diff()
        sorted_scales = scales[order]
        tolerance = self._tolerance * torch.maximum(sorted_scales[1:], sorted_scales[:-1])
        cluster = torch.zeros(self.count, dtype=torch.long)
        cluster[order[1:]] = (gap > tolerance).cumsum(0)
        pair = self._group * (self.count + 1) + cluster
        self._group = torch.unique(pair, return_inverse=True)[1]

    def product_sizes(self) -> Tensor:
        """Root mean square of <W, G> over the steps, in units of |W| |G| / sqrt(size), shape ``(count,)``.

        About 1 or more for most layers, 0 for scale-invariant ones; NaN where there was no gradient.
        """
        return (self._squares / self.seen).sqrt()

    def is_zero(self) -> Tensor:
        """Which ends have had a product of 0 so far, shape ``(count,)``, from the first step on."""
        return self._found_zero & ~self._gone

    def groups(self) -> list[list[int]]:
        """The groups of two or more ends for which there is enough evidence, as lists of indices."""
        members: dict[int, list[int]] = {}
        ready = self._present & (self.evidence >= _MIN_STEPS) & ~self._found_zero
        for index in ready.nonzero().flatten().tolist():
            members.setdefault(int(self._group[index]), []).append(index)
        return [indices for indices in members.values() if len(indices) > 1]

    def decided(self) -> Tensor:
        """For which ends there is enough evidence, shape ``(count,)``."""
        enough = torch.where(self._found_zero, self.seen >= _MIN_ZERO_STEPS, self.evidence >= _MIN_STEPS)
        return self._present & enough


def homogeneity_defect(products: Sequence[float], scales: Sequence[float]) -> float:
    """By how much the products <W, G> of a rescaling group differ: 0 in exact arithmetic, in any state of training.

    (max - min of <W_k, G_k>) / max |W_k| |G_k| (derived in docs/theory.md). A layer for which the group's rescaling
    changes the function shows itself by a defect far above rounding.

    Args:
        products: <W_k, G_k> of the group's members.
        scales: |W_k| |G_k| of the members.

    Returns:
        A number of at least 0; NaN for fewer than two members, or values that are not finite.

    Example:
        >>> homogeneity_defect([-0.5, -0.5], scales=[2.0, 1.0])
        0.0
        >>> homogeneity_defect([-0.5, -0.3], scales=[2.0, 1.0])
        0.1
    """
    if len(products) < 2 or not all(map(math.isfinite, (*products, *scales))) or not max(scales) > 0:
        return math.nan
    return (max(products) - min(products)) / max(scales)
