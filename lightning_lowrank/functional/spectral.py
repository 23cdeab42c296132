"""Spectra of weight matrices: spectral norm, stable rank, effective rank.

Every function takes a weight of two or more dimensions; a convolution's kernel is unfolded to ``(out, in * kernel
area)``. Half-precision weights are computed in float32 or float64, never in half. A non-finite entry gives NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import as_matrix, real_view, wide_dtype

# Up to this smaller side a full float64 SVD costs milliseconds (tenths of a second beside a side of 20,000).
_EXACT_SIDE = 128
# Krylov steps between two looks at the residual: each look is a host synchronisation.
_STEPS_PER_CHECK = 8
# The start vector has its own generator: measuring must not touch the global random state.
_START_SEED = 0x10B4


class SpectralNorm(NamedTuple):
    """The largest singular value of a matrix.

    Attributes:
        value: The estimate.
        lower: A lower bound, to rounding: the norm of ``W v`` for the unit vector ``v``.
        upper: An upper bound: the value itself where the full SVD was computed, else the Frobenius norm.
        certified: Whether ``lower`` and ``upper`` agree to rounding.
        vector: The right singular vector, shape ``(in,)``.
    """

    value: float
    lower: float
    upper: float
    certified: bool
    vector: Tensor


def spectral_norm(weight: Tensor, rtol: float = 1e-3) -> SpectralNorm:
    """|W|_2, the largest singular value.

    The full SVD in float64 where the smaller side is at most 128, else Golub-Kahan-Lanczos bidiagonalisation with full
    reorthogonalisation (Golub and Kahan, 1965), started at a random vector. It stops when the residual
    |W^T u - sigma v| is at most ``rtol * sigma``, so a singular value lies within ``rtol`` of the estimate; that it is
    the largest one is certain only up to the (negligible) chance that the start vector misses its direction, which is
    why ``upper`` is then no better than the Frobenius norm.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Residual at which the iteration stops, relative to the estimate.

    Raises:
        ValueError: If the weight has fewer than two dimensions or ``rtol`` is not positive.

    Example:
        >>> import torch
        >>> norm = spectral_norm(torch.diag(torch.tensor([3.0, 1.0])))
        >>> norm.value, norm.certified
        (3.0, True)
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    matrix = as_matrix(weight)
    if matrix.numel() == 0:
        return SpectralNorm(0.0, 0.0, 0.0, True, torch.zeros(matrix.shape[1]))
    if not torch.isfinite(matrix).all():
        return SpectralNorm(math.nan, math.nan, math.nan, False, torch.full((matrix.shape[1],), math.nan))
    if min(matrix.shape) <= _EXACT_SIDE:
        _, sigma, vh = torch.linalg.svd(_wide(matrix), full_matrices=False)
        value = sigma[0].item()
        return SpectralNorm(value, value, value, True, vh[0].conj())
    return _lanczos(matrix, rtol)


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, descending, from a float64 SVD.

    Args:
        weight: Shape ``(out, in, ...)``.

    Returns:
        A float64 CPU tensor of shape ``(min(out, in),)``; all NaN if the weight has a non-finite entry.

    Raises:
        ValueError: If the weight has fewer than two dimensions.

    Example:
        >>> import torch
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [3.0, 1.0]
    """
    matrix = as_matrix(weight)
    if not torch.isfinite(matrix).all():
        return torch.full((min(matrix.shape),), math.nan, dtype=torch.float64)
    sigma: Tensor = torch.linalg.svdvals(_wide(matrix))
    return sigma.cpu()


def stable_rank(weight: Tensor, rtol: float = 1e-3) -> float:
    """Stable rank |W|_F^2 / |W|_2^2: at least 1, at most the rank.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Accuracy of the spectral norm, see :func:`spectral_norm`.

    Returns:
        NaN for a zero or non-finite matrix.

    Raises:
        ValueError: If the weight has fewer than two dimensions.

    Example:
        >>> import torch
        >>> stable_rank(torch.eye(4))
        4.0
        >>> round(stable_rank(torch.ones(3, 5)), 6)
        1.0
    """
    ratio = spectral_ratio(weight, rtol)
    return 1 / ratio**2 if ratio > 0 else math.nan


def spectral_ratio(weight: Tensor, rtol: float = 1e-3) -> float:
    """|W|_2 / |W|_F: 1 for a matrix of rank one, 1 / sqrt(rank) at the least.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Accuracy of the spectral norm, see :func:`spectral_norm`.

    Returns:
        NaN for a zero or non-finite matrix.

    Raises:
        ValueError: If the weight has fewer than two dimensions.

    Example:
        >>> import torch
        >>> spectral_ratio(torch.eye(4))
        0.5
    """
    frobenius = frobenius_norm(weight)
    return spectral_norm(weight, rtol).value / frobenius if frobenius > 0 else math.nan


def frobenius_norm(weight: Tensor) -> float:
    """|W|_F, accumulated in float64.

    Example:
        >>> import torch
        >>> frobenius_norm(torch.tensor([[3.0, 4.0]]))
        5.0
    """
    weight = real_view(weight)
    return float(torch.linalg.vector_norm(weight, dtype=wide_dtype(weight)).item())


def effective_rank(sigma: Tensor) -> float:
    """Exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        sigma: Singular values, shape ``(k,)``, as :func:`singular_values` returns them.

    Returns:
        A number from 1 to k; NaN if all are 0 or one is not finite.

    Raises:
        ValueError: If a singular value is negative.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.ones(4)), 6)
        4.0
    """
    if (sigma < 0).any():
        raise ValueError(f"singular values must be at least 0, got {sigma.min().item()}")
    sigma = sigma.detach().cpu().double()
    total = sigma.sum().item()
    if not (total > 0 and math.isfinite(total)):
        return math.nan
    share = sigma / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def _wide(matrix: Tensor) -> Tensor:
    """The matrix in double precision, on the CPU where its device has none."""
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)


def _lanczos(matrix: Tensor, rtol: float) -> SpectralNorm:
    """Golub-Kahan-Lanczos: W V_k = U_k B_k with B_k upper bidiagonal; its top singular triplet is the estimate."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    rows, columns = matrix.shape
    # A scale near 1 keeps squares inside float32's range; the norm is homogeneous, so it is put back at the end.
    scale = matrix.abs().max().item()
    if scale == 0:
        return SpectralNorm(0.0, 0.0, 0.0, True, matrix.new_zeros(columns))
    matrix = matrix / scale
    generator = torch.Generator().manual_seed(_START_SEED)
    v = torch.randn(columns, generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    v = v / torch.linalg.vector_norm(v)
    right, left = [v], [_unit(matrix @ v)]
    alphas, betas = [torch.linalg.vector_norm(matrix @ v)], []
    for step in range(1, min(rows, columns) + 1):
        w = _orthogonalise(matrix.mH @ left[-1], right)
        betas.append(torch.linalg.vector_norm(w))
        if step % _STEPS_PER_CHECK == 0 or step == min(rows, columns):
            alpha, beta = torch.stack(alphas).tolist(), torch.stack(betas).tolist()
            bidiagonal = torch.diag(torch.tensor(alpha, dtype=torch.float64))
            bidiagonal += torch.diag(torch.tensor(beta[:-1], dtype=torch.float64), 1)
            p, sigma, qh = torch.linalg.svd(bidiagonal)
            if step == min(rows, columns) or beta[-1] * abs(p[-1, 0].item()) <= rtol * sigma[0].item():
                break
        right.append(_unit(w))
        u = _orthogonalise(matrix @ right[-1], left)
        alphas.append(torch.linalg.vector_norm(u))
        left.append(_unit(u))
    vector = _unit(torch.stack(right, 1) @ qh[0].to(matrix.device, matrix.dtype))
    lower = torch.linalg.vector_norm(matrix @ vector).item() * scale
    frobenius = torch.linalg.vector_norm(matrix).item() * scale
    return SpectralNorm(lower, lower, max(lower, frobenius), False, vector)


def _unit(vector: Tensor) -> Tensor:
    """The vector over its norm; a zero vector stays zero."""
    unit: Tensor = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
    return unit


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Project the basis out, twice: once leaves what rounding put in (Giraud et al., 2005).

    Where nothing but rounding is left, an invariant subspace is complete and the remainder is exactly zero. Scaled to a
    unit vector that rounding would not be orthogonal to the basis, and the bidiagonal matrix no longer that of W.
    """
    stacked = torch.stack(basis, 1)
    rounding = 4 * torch.finfo(vector.dtype).eps * math.sqrt(max(stacked.shape)) * torch.linalg.vector_norm(vector)
    for _ in range(2):
        vector = torch.addmv(vector, stacked, stacked.mH.mv(vector), alpha=-1)
    return torch.where(torch.linalg.vector_norm(vector) <= rounding, torch.zeros_like(vector), vector)
