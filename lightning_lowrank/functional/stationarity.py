"""How close parameters and their gradient are to a stationary point of an L2-regularised loss.

A stationary point of ``loss(theta) + 1/2 * sum_i wd_i * theta_i^2`` has ``g = -wd * theta`` (``g``: the gradient of the
loss alone). Every quantity here is a function of the inner products <W, W>, <W, G>, <G, G> of each parameter, so they
are computed once, in :class:`InnerProducts`; the functions are thin verbs over it. The derivations are in
docs/theory.md.

The formulas speak of the *full-batch* gradient. Given a mini-batch gradient, :func:`alignment` and :func:`residual` are
those of the mini-batch, which are far from the full-batch ones; :func:`radial_balance` and
:func:`implied_weight_decay` are linear in the gradient, so a mini-batch estimates them without bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import inner_products


@dataclass(frozen=True)
class InnerProducts:
    """The inner products of K parameters with their gradients.

    Attributes:
        ww: <W_k, W_k>, float64, shape ``(K,)``.
        wg: <W_k, G_k>, float64, shape ``(K,)``.
        gg: <G_k, G_k>, float64, shape ``(K,)``.
        weight_decay: The coefficient wd_k of each parameter, float64, shape ``(K,)``.
    """

    ww: Tensor
    wg: Tensor
    gg: Tensor
    weight_decay: Tensor

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float | Sequence[float]
    ) -> InnerProducts:
        """Compute the products of weights and gradients.

        Args:
            weights: K tensors of any shapes.
            grads: K tensors of the same shapes: the gradient of the loss without the penalty.
            weight_decay: The coefficient as torch.optim means it, one for all or one per tensor.

        Raises:
            ValueError: If the numbers of tensors or their shapes differ, or a coefficient is negative.
        """
        if len(weights) != len(grads):
            raise ValueError(f"got {len(weights)} weights and {len(grads)} gradients; pass one gradient per weight")
        for index, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            if weight.shape != grad.shape:
                raise ValueError(
                    f"weight {index} has shape {tuple(weight.shape)} and its gradient {tuple(grad.shape)}; they must"
                    " agree"
                )
        decays = [float(weight_decay)] * len(weights) if isinstance(weight_decay, (int, float)) else list(weight_decay)
        if len(decays) != len(weights):
            raise ValueError(f"got {len(weights)} weights and {len(decays)} weight decays; pass one, or one per weight")
        if any(decay < 0 for decay in decays):
            raise ValueError(f"weight decay must be at least 0, got {min(decays)}")
        return cls.from_sums(inner_products(list(zip(weights, grads, strict=True))), decays)

    @classmethod
    def from_sums(cls, sums: Tensor, weight_decay: Sequence[float]) -> InnerProducts:
        """The products as an object.

        Args:
            sums: <W, W>, <W, G> and <G, G> of each parameter, shape ``(K, 3)``.
            weight_decay: One coefficient per parameter.
        """
        ww, wg, gg = sums.double().unbind(1)
        return cls(ww, wg, gg, torch.tensor(weight_decay, dtype=torch.float64))

    def select(self, indices: Sequence[int]) -> InnerProducts:
        """The products of a subset of the parameters."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        return InnerProducts(self.ww[rows], self.wg[rows], self.gg[rows], self.weight_decay[rows])

    def alignment(self) -> float:
        """cos(wd * theta, -g) over the decayed parameters."""
        decayed = self.weight_decay > 0
        pull = -(self.weight_decay * self.wg).sum()
        scale = (self.weight_decay.square() * self.ww).sum() * self.gg[decayed].sum()
        return _ratio(pull, scale.sqrt())

    def residual(self) -> float:
        """|g + wd * theta| / |wd * theta| over the decayed parameters."""
        decayed = self.weight_decay > 0
        decay_squared = (self.weight_decay.square() * self.ww).sum()
        squared = self.gg[decayed].sum() + 2 * (self.weight_decay * self.wg).sum() + decay_squared
        # Rounding can leave a difference of -1e-17 where the truth is 0.
        return _ratio(squared.clamp(min=0).sqrt(), decay_squared.sqrt())

    def decay_norm(self) -> float:
        """|wd * theta|."""
        return math.sqrt((self.weight_decay.square() * self.ww).sum().item())

    def radial_balance(self) -> float:
        """-<theta, g> / <theta, wd * theta> over the decayed parameters."""
        decayed = self.weight_decay > 0
        return _ratio(-self.wg[decayed].sum(), (self.weight_decay * self.ww).sum())

    def implied_weight_decay(self) -> float:
        """-<theta, g> / |theta|^2 over all the parameters."""
        return _ratio(-self.wg.sum(), self.ww.sum())

    def cosines(self) -> Tensor:
        """cos(W_k, -G_k) of each parameter, float64, shape ``(K,)``; NaN where a norm is 0."""
        return -self.wg / (self.ww * self.gg).sqrt()


def alignment(weights: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float | Sequence[float]) -> float:
    """Cosine between the decay ``wd * theta`` and the negative gradient; 1 at a stationary point.

    cos(Lambda theta, -g), Lambda the diagonal of the per-parameter weight decays, over the parameters with a positive
    weight decay (derived in docs/theory.md). With different decays per group the plain cosine cos(theta, -g) is *not* 1
    at a stationary point.

    Args:
        weights: K tensors of any shapes.
        grads: K gradients of the loss without the penalty, of the same shapes.
        weight_decay: torch.optim's coefficient, one for all or one per tensor.

    Returns:
        A number in [-1, 1]; NaN if no parameter is decayed or a norm is 0.

    Raises:
        ValueError: If the arguments do not match in number or shape, or a decay is negative.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> round(alignment([w], [-0.1 * w], weight_decay=0.1), 6)
        1.0
        >>> round(alignment([w], [torch.tensor([[0.0, -1.0]])], weight_decay=0.1), 6)
        0.8
    """
    return InnerProducts.of(weights, grads, weight_decay).alignment()


def residual(weights: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float | Sequence[float]) -> float:
    """Size of the gradient of the regularised loss relative to the decay; 0 at a stationary point.

    |g + Lambda theta| / |Lambda theta| over the parameters with a positive weight decay (derived in docs/theory.md).

    Args:
        weights: K tensors of any shapes.
        grads: K gradients of the loss without the penalty, of the same shapes.
        weight_decay: torch.optim's coefficient, one for all or one per tensor.

    Returns:
        A number of at least 0, without a unit; NaN if no parameter is decayed.

    Raises:
        ValueError: If the arguments do not match in number or shape, or a decay is negative.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> round(residual([w], [-0.05 * w], weight_decay=0.1), 6)
        0.5
    """
    return InnerProducts.of(weights, grads, weight_decay).residual()


def radial_balance(weights: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float | Sequence[float]) -> float:
    """Balance of gradient and decay along theta; 1 when |theta| has stopped changing.

    -<theta, g> / <theta, Lambda theta> over the parameters with a positive weight decay (derived in docs/theory.md). It
    is linear in the gradient, so the mean over mini-batches is unbiased. Necessary for stationarity, not sufficient:
    .99 has been seen at an alignment of .41.

    Args:
        weights: K tensors of any shapes.
        grads: K gradients of the loss without the penalty, of the same shapes.
        weight_decay: torch.optim's coefficient, one for all or one per tensor.

    Returns:
        A number without a unit; NaN if no parameter is decayed.

    Raises:
        ValueError: If the arguments do not match in number or shape, or a decay is negative.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> round(radial_balance([w], [-0.1 * w + torch.tensor([[4.0, -3.0]])], weight_decay=0.1), 6)
        1.0
    """
    return InnerProducts.of(weights, grads, weight_decay).radial_balance()


def implied_weight_decay(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """The weight decay at which the gradient would balance it along theta: -<theta, g> / |theta|^2.

    At a stationary point it equals the run's weight decay, in total and for each layer alone (derived in
    docs/theory.md). Linear in the gradient, so the mean over mini-batches is unbiased.

    Args:
        weights: K tensors of any shapes.
        grads: K gradients of the loss without the penalty, of the same shapes.

    Returns:
        A number in torch.optim's unit of ``weight_decay``; NaN if every weight is 0.

    Raises:
        ValueError: If the arguments do not match in number or shape.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> round(implied_weight_decay([w], [-0.02 * w]), 6)
        0.02
    """
    return InnerProducts.of(weights, grads, 0.0).implied_weight_decay()


def norm_spread(norms: Sequence[float]) -> float:
    """Largest over smallest Frobenius norm among the weights of one rescaling group.

    1 at a stationary point: there |W_k|^2 is the same for every weight between which a factor can be moved without
    changing the function (derived in docs/theory.md). Across groups the norms may differ, so never mix them.

    Args:
        norms: Frobenius norms of the group's weights.

    Returns:
        A number of at least 1; NaN for fewer than two norms, or one that is 0 or not finite.

    Example:
        >>> norm_spread([2.0, 1.0, 1.5])
        2.0
    """
    if len(norms) < 2 or not all(0 < norm < math.inf for norm in norms):
        return math.nan
    return max(norms) / min(norms)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """Numerator / denominator as a float; NaN where the denominator is 0 or either is not finite."""
    value = (numerator / denominator).item() if denominator > 0 else math.nan
    return value if math.isfinite(value) else math.nan
