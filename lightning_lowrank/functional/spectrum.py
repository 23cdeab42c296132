"""Whole spectra: singular values, and the ranks and energies that are read from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lowrank.functional._certificate import gram, wide
from lightning_lowrank.functional._tensors import as_matrix

# From that ratio of the sides and that many entries on, the Gram matrix is cheaper than a decomposition.
_OBLONG = 4
_LARGE = 1 << 16
# Columns of a block beyond the k that are wanted, and blocks that a Krylov space needs to be worth it.
_MORE = 8
_BLOCKS = 8
# Accuracy below which float32 products would be the limit, and the rounding of a residual in units of eps.
_FINE = 1e-5
_ROUNDING = 64


def singular_values(weight: Tensor, k: int | None = None, rtol: float = 1e-3) -> Tensor:
    """Singular values, descending, as float64.

    All of them are computed in float64: by a singular value decomposition, or, where one side of a large matrix is at
    least four times the other and its type has fewer digits than float64, by the eigenvalues of its float64 Gram
    matrix, which are right to 1e-8 of the largest singular value. The k largest alone come from a block Krylov space
    (Musco and Musco, 2015), grown until the residual of each is at most ``rtol`` of it.

    Args:
        weight: Shape ``(out, in, ...)``.
        k: How many; None for all.
        rtol: Relative accuracy if ``k`` is given.

    Returns:
        A CPU tensor of shape ``(min(out, in),)`` or ``(k,)``; all NaN, with a warning, if an entry is not finite.

    Raises:
        ValueError: If the weight has fewer than two dimensions, or not k singular values.

    Example:
        >>> import torch
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [3.0, 1.0]
    """
    matrix = as_matrix(weight)
    size, length = sorted(matrix.shape)
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to {size} for a {matrix.shape[0]} x {matrix.shape[1]} matrix, got {k}")
    if not torch.isfinite(matrix).all():
        warnings.warn(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite, so its singular values are NaN",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.full((k or size,), math.nan, dtype=torch.float64)
    if size == 0:
        return torch.zeros(0, dtype=torch.float64)
    if k is not None and (found := _largest(matrix, k, rtol)) is not None:
        return found
    coarse = matrix.dtype not in (torch.float64, torch.complex128)
    if coarse and length >= _OBLONG * size and matrix.numel() >= _LARGE:
        squares: Tensor = torch.linalg.eigvalsh(gram(matrix)).flip(0)
        return squares.clamp_min(0).sqrt().cpu()[:k]
    matrix = wide(matrix)
    # LAPACK's routine is up to three times slower on a wide matrix.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mH.contiguous()
    sigma: Tensor = torch.linalg.svdvals(tall)
    return sigma.cpu()[:k]


def block_singular_values(blocks: Tensor) -> Tensor:
    """The singular values of a block-diagonal matrix, descending: those of all its blocks.

    Args:
        blocks: Shape ``(count, rows, columns)``.

    Returns:
        A float64 CPU tensor of shape ``(count * min(rows, columns),)``.
    """
    if len(blocks) == 1:
        return singular_values(blocks[0])
    sigma: Tensor = torch.linalg.svdvals(wide(blocks)).flatten().cpu()
    return sigma.sort(descending=True).values


def numerical_rank(sigma: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
    """Number of singular values that are above the rounding of the matrix' entries.

    Above sigma_1 * max(out, in) * eps, the threshold of numpy and torch, with the eps of the type that the entries were
    rounded to.

    Args:
        sigma: All singular values, as :func:`singular_values` returns them: of a float32 Gram matrix they would be too
            coarse.
        shape: The matrix' shape.
        dtype: The type of the weight.

    Returns:
        A whole number; NaN if a singular value is not finite, or the type so short that its rounding hides them all.

    Example:
        >>> import torch
        >>> weight = torch.outer(torch.arange(3.0), torch.ones(4))
        >>> numerical_rank(singular_values(weight), weight.shape, weight.dtype)
        1.0
    """
    if not sigma.isfinite().all():
        return math.nan
    if not (sigma > 0).any():
        return 0.0
    rounding = max(shape) * torch.finfo(dtype).eps
    return float((sigma.double() > sigma.max().item() * rounding).sum().item()) if rounding < 1 else math.nan


def energy_outside(sigma: Tensor, k: int) -> float:
    """Share of the squared Frobenius norm that is outside the k largest singular values.

    Args:
        sigma: All singular values, in any order.
        k: At least 0.

    Returns:
        From 0 to 1; NaN if all singular values are 0 or one is not finite.

    Raises:
        ValueError: If k is negative.

    Example:
        >>> import torch
        >>> energy_outside(torch.tensor([3.0, 1.0]), 1)
        0.1
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    # Smallest first, so that a tiny rest is not lost in the sum.
    energies = sigma.detach().cpu().double().sort().values.square()
    total = energies.sum().item()
    if not (total > 0 and math.isfinite(total)):
        return math.nan
    return energies[: max(0, len(energies) - k)].sum().item() / total


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


def circular_convolution_norm(weight: Tensor, size: Sequence[int]) -> float:
    """The operator norm of a convolution with stride 1 and circular padding, exactly.

    The Fourier transform takes it apart into one ``out x in`` matrix for each frequency; the largest of their spectral
    norms is that of the whole map (Sedghi, Gupta and Long, 2019). The unfolded kernel's norm, times the square root of
    its area, is a bound on it.

    Args:
        weight: Shape ``(out, in, *kernel)``.
        size: The input's spatial size, one number for each dimension of the kernel.

    Returns:
        NaN if an entry is not finite.

    Raises:
        ValueError: If the numbers of dimensions differ, or the kernel is larger than the input.

    Example:
        >>> import torch
        >>> averaging = torch.full((1, 1, 3), 1 / 3)
        >>> round(circular_convolution_norm(averaging, [8]), 6)
        1.0
    """
    kernel = tuple(weight.shape[2:])
    if len(kernel) != len(size) or not kernel:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} needs {len(kernel)} spatial sizes, got {tuple(size)}; pass those"
            " of the layer's input"
        )
    if any(inner > outer for inner, outer in zip(kernel, size, strict=True)):
        raise ValueError(f"a kernel of size {kernel} does not fit into an input of size {tuple(size)}")
    weight = wide(weight.detach())
    if not weight.isfinite().all():
        return math.nan
    spectra = torch.fft.fftn(weight, s=tuple(size), dim=tuple(range(2, weight.ndim)))
    return float(torch.linalg.svdvals(spectra.flatten(2).permute(2, 0, 1)).max().item())


def _largest(matrix: Tensor, k: int, rtol: float) -> Tensor | None:
    """The k largest singular values by block Krylov; None where all of them cost no more."""
    size = min(matrix.shape)
    block = k + _MORE
    if block * _BLOCKS > size:
        return None
    fine = rtol < _FINE or matrix.dtype in (torch.float64, torch.complex128)
    work = wide(matrix) if fine else matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # Of moderate scale, so that squares stay within float32.
    scale = work.abs().max().item()
    if scale == 0:
        return torch.zeros(k, dtype=torch.float64)
    work = work / scale
    first, second = (work, work.mH) if work.shape[0] >= work.shape[1] else (work.mH, work)
    generator = torch.Generator().manual_seed(k)
    last = torch.randn(size, block, generator=generator, dtype=torch.float64).to(work.device, work.dtype)
    basis, products = work.new_zeros(size, 0), work.new_zeros(size, 0)
    while basis.shape[1] + block <= size // 2:
        for _ in range(2):
            last = torch.linalg.qr(last - basis @ (basis.mH @ last)).Q
        basis = torch.cat([basis, last], 1)
        last = second @ (first @ last)
        products = torch.cat([products, last], 1)
        within = wide(basis.mH @ products)
        values, vectors = torch.linalg.eigh((within + within.mH) / 2)
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1).to(work.dtype)
        residuals = torch.linalg.vector_norm(products @ vectors - basis @ vectors * values.to(work.dtype), dim=0)
        # In squares twice the relative accuracy; a rest of rounding is all that a matrix of low rank leaves.
        if (residuals <= 2 * rtol * values + _ROUNDING * torch.finfo(work.dtype).eps * values[0]).all():
            found: Tensor = values.clamp_min(0).sqrt().cpu() * scale
            return found
    return None
