"""Sums of low-rank updates B A, kept as factors: the exact sum, or the best one of a given rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import as_matrix, wide_dtype
from lightning_lowrank.functional.spectrum import energy_outside


class LowRank(NamedTuple):
    """The two factors of an update ``up @ down``.

    Attributes:
        up: The outer factor B, shape ``(out, rank)``.
        down: The inner factor A, shape ``(rank, in)``.
        discarded: What the factors leave out of the exact sum, relative to it, both in the Frobenius norm: from 0 to 1,
            the square root of the energy left out. 0.0 where nothing is.

    Example:
        >>> update = LowRank(torch.ones(3, 1), torch.ones(1, 2), discarded=0.0)
        >>> (update.up @ update.down).shape
        torch.Size([3, 2])
    """

    up: Tensor
    down: Tensor
    discarded: float


def merge_factors(
    ups: Sequence[Tensor], downs: Sequence[Tensor], coefficients: Sequence[float], rank: int | None = None
) -> LowRank:
    """Factors of ``sum_i c_i B_i A_i``.

    The sum of the factors is not a factor of the sum: ``(B_1 + B_2)(A_1 + A_2)`` has the cross terms ``B_1 A_2`` and
    ``B_2 A_1``. Side by side, ``[c_1 B_1, c_2 B_2]`` and ``[A_1; A_2]`` multiply to exactly the sum. Its best
    approximation of a lower rank R (Eckart and Young, 1936) comes from the QR decompositions of the two and the SVD of
    the small product of their triangles, in O((out + in) R^2) and without the ``(out, in)`` product.

    Args:
        ups: B_i, each of shape ``(out, r_i)``; for convolutions ``(out, r_i, 1, 1)``.
        downs: A_i, each of shape ``(r_i, in)``; for convolutions ``(r_i, in, height, width)``.
        coefficients: c_i: any finite numbers, the updates' own scales included.
        rank: The rank of the result. At least the sum of the r_i: the exact sum, padded with zeros up to it. Less: the
            nearest update of that rank in the Frobenius norm, with the singular values shared evenly between the two
            factors (their Gram matrices are equal and diagonal). None: the sum of the r_i.

    Returns:
        Factors in float64 (float32 on a device without it), of exactly that rank, with the trailing dimensions of the
        inputs. They are not rounded to the inputs' type. An exact sum holds the ``downs`` as they are and the ``ups``
        times their coefficients, so that a coefficient of 1 costs no rounding, and one of 0 leaves a block of zeros.

    Raises:
        ValueError: If there are no updates, shapes do not fit, rank is less than 1, or a number is not finite.

    Example:
        >>> up, down = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 3.0]])
        >>> other_up, other_down = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0]])
        >>> exact = merge_factors([up, other_up], [down, other_down], coefficients=[1.0, -1.0])
        >>> exact.up @ exact.down
        tensor([[ 0.,  3.],
                [-1.,  0.]], dtype=torch.float64)
        >>> round(merge_factors([up, other_up], [down, other_down], [1.0, -1.0], rank=1).discarded ** 2, 6)
        0.1
    """
    _check(ups, downs, coefficients, rank)
    wide_ups = [as_matrix(b).to(wide_dtype(b)) * c for b, c in zip(ups, coefficients, strict=True)]
    up = torch.cat(wide_ups, dim=1)
    down = torch.cat([as_matrix(a).to(wide_dtype(a)) for a in downs])
    discarded = 0.0
    if rank is not None and rank < up.shape[1]:
        up, down, discarded = _truncated(up, down, rank)
    elif rank is not None:
        missing = rank - up.shape[1]
        up = torch.nn.functional.pad(up, (0, missing))
        down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    up = up.reshape(*up.shape, *ups[0].shape[2:])
    return LowRank(up, down.reshape(-1, *downs[0].shape[1:]), discarded)


def _truncated(up: Tensor, down: Tensor, rank: int) -> LowRank:
    # Householder QR is backward stable column by column, so a large B_i beside a small A_i costs no digits.
    left, left_triangle = torch.linalg.qr(up)
    right, right_triangle = torch.linalg.qr(down.mT)
    core = left_triangle @ right_triangle.mT
    if not torch.isfinite(core).all():
        raise ValueError(
            f"the sum of the updates has entries beyond the range of {core.dtype}; scale the factors or coefficients"
        )
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    # What rounding alone leaves of updates that cancel, relative to the rank-one terms that were summed: the usual
    # bound of a numerical rank. Without it, the noise left of W - W would be truncated and reported as discarded.
    terms = torch.linalg.vector_norm(up, dim=0) @ torch.linalg.vector_norm(down, dim=1)
    noise = max(len(up), down.shape[1]) * torch.finfo(sigma.dtype).eps * terms
    sigma = torch.where(sigma > noise, sigma, 0)
    energy = energy_outside(sigma, rank)
    # A sum of low rank can have fewer singular values than the rank asked for.
    missing = max(0, rank - len(sigma))
    roots = sigma[:rank].sqrt()
    up = torch.nn.functional.pad((left @ u)[:, :rank] * roots, (0, missing))
    down = torch.nn.functional.pad(roots[:, None] * (vh @ right.mT)[:rank], (0, 0, 0, missing))
    return LowRank(up, down, 0.0 if math.isnan(energy) else math.sqrt(energy))


def _check(ups: Sequence[Tensor], downs: Sequence[Tensor], coefficients: Sequence[float], rank: int | None) -> None:
    if not ups or not len(ups) == len(downs) == len(coefficients):
        raise ValueError(
            f"got {len(ups)} ups, {len(downs)} downs and {len(coefficients)} coefficients; pass one of each per update,"
            " and at least one update"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; a merge that drops the updates needs no factors")
    for index, (up, down, coefficient) in enumerate(zip(ups, downs, coefficients, strict=True)):
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        if up.ndim < 2 or down.ndim < 2 or as_matrix(up).shape[1] != len(down):
            raise ValueError(
                f"update {index} has factors of shapes {shapes}, which do not multiply; pass (out, rank) and (rank,"
                " in), or (out, rank, 1, 1) and (rank, in, height, width)"
            )
        if (len(up), up.shape[2:], down.shape[1:]) != (len(ups[0]), ups[0].shape[2:], downs[0].shape[1:]):
            raise ValueError(
                f"update {index} has factors of shapes {shapes}, update 0 {tuple(ups[0].shape)} and"
                f" {tuple(downs[0].shape)}; they must agree in all but the rank to be summed"
            )
        if not (torch.isfinite(up).all() and torch.isfinite(down).all() and math.isfinite(coefficient)):
            raise ValueError(
                f"update {index} has a factor or coefficient that is not finite (coefficient {coefficient}); leave it"
                " out or mend its checkpoint"
            )
