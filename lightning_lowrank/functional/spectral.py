"""The spectral norm of a matrix with its bounds, and what follows from it: stable rank, spectral ratio.

Every function takes a weight of two or more dimensions; a convolution's kernel is unfolded to ``(out, in * kernel
area)``. Half-precision weights are computed in float32 or float64, never in half. A non-finite entry gives NaN, with a
warning.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lowrank.functional._certificate import Bound, gram, is_bound, lower_bound, wide, with_rounding
from lightning_lowrank.functional._krylov import Dense, Top, top_triplet
from lightning_lowrank.functional._tensors import as_matrix, real_view, wide_dtype

T = TypeVar("T")
R = TypeVar("R")

# Up to this smaller side the eigenvalues of the Gram matrix take a millisecond.
_EXACT_SIDE = 128
# Accuracy below which float32 products would be the limit.
_FINE = 1e-5
# What is added to an exact value before it is proved to be a bound: far above rounding, far below any use.
_SLACK = 1e-9
# Of the tolerance, what a proof may use up; the rest is left to rounding.
_TRIED = 0.99
# Traces of a Gram matrix whose entries lose nothing in float64.
_SAFE = (1e-200, 1e200)


class SpectralNorm(NamedTuple):
    """The largest singular value of a matrix.

    Attributes:
        value: The estimate, |W v|.
        lower: A lower bound: |W v| less what rounding can have added.
        upper: An upper bound: proved where ``certified``, else |W|_F, which is known cheaply.
        certified: Whether ``upper`` is at most ``lower * (1 + rtol)``, which proves the value.
        vector: The right singular vector v, shape ``(columns,)``; what to pass as ``start`` the next time.
    """

    value: float
    lower: float
    upper: float
    certified: bool
    vector: Tensor


class Bounded(float):
    """A number that knows its bounds; in arithmetic it is the plain number.

    Attributes:
        lower: What it is at least.
        upper: What it is at most.

    Example:
        >>> rank = Bounded(3.0, lower=2.9, upper=3.1)
        >>> rank + 1, rank.lower, rank.upper
        (4.0, 2.9, 3.1)
    """

    lower: float
    upper: float

    def __new__(cls, value: float, lower: float, upper: float) -> Bounded:
        """A float with two more attributes."""
        self = super().__new__(cls, value)
        self.lower, self.upper = lower, upper
        return self

    def __getnewargs__(self) -> tuple[float, float, float]:  # type: ignore[override]
        """For copies and pickles."""
        return float(self), self.lower, self.upper


def spectral_norm(
    weight: Tensor, rtol: float = 1e-3, start: Tensor | None = None, certify: bool = False
) -> SpectralNorm:
    """|W|_2, the largest singular value.

    Where the smaller side is at most 128 the value is exact (eigenvalues of the float64 Gram matrix) and certified.
    Larger matrices are iterated (Golub-Kahan-Lanczos) until the residual meets ``rtol`` and, from a cold start, the
    chance of having overlooked something larger than that is at most 2 % (Hochstenbach, 2013); the module ``_krylov``
    has the details. ``lower`` holds in any case.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Relative accuracy.
        start: The vector of an earlier measurement, shape ``(columns,)``. It makes a measurement several times faster;
            a fresh random vector joins it, since the old one may be blind to what is new.
        certify: Prove the upper bound: a Cholesky factorisation of s^2 I - W^H W in float64 with s = (1 + rtol) lower,
            its rounding accounted for (Rump, BIT 46, 2006). If it fails, all eigenvalues are computed. Takes the time
            of a float64 product W^H W and room for its result.

    Raises:
        ValueError: If the weight has fewer than two dimensions, ``rtol`` is not positive, or ``start`` does not fit.

    Example:
        >>> import torch
        >>> norm = spectral_norm(torch.diag(torch.tensor([3.0, 1.0])))
        >>> round(norm.value, 6), norm.certified
        (3.0, True)
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    matrix = as_matrix(weight)
    if start is not None and start.shape != matrix.shape[1:]:
        raise ValueError(
            f"start has shape {tuple(start.shape)}, but a vector of a {matrix.shape[0]} x {matrix.shape[1]} matrix has"
            f" {matrix.shape[1]} entries; pass the `vector` of an earlier measurement of it"
        )
    if matrix.numel() == 0:
        return SpectralNorm(0.0, 0.0, 0.0, True, matrix.new_zeros(matrix.shape[1]))
    if start is not None and not 0 < torch.linalg.vector_norm(start).item() < math.inf:
        start = None
    found = _measure(matrix, rtol, start, certify)
    return found if found is not None else _rescaled(matrix, rtol, start, certify)


def spectral_norms(
    weights: Sequence[Tensor], rtol: float = 1e-3, starts: Sequence[Tensor | None] | None = None
) -> list[SpectralNorm]:
    """:func:`spectral_norm` of many matrices.

    On a CPU as many at a time as torch has threads: a product with one vector keeps only one of them busy, and a matrix
    that is finished before the next one is begun stays in cache, which stacked matrices of equal shape do not.

    Args:
        weights: K weights.
        rtol: Relative accuracy.
        starts: K vectors of earlier measurements, or None.

    Example:
        >>> import torch
        >>> [round(norm.value, 6) for norm in spectral_norms([torch.eye(2), 2 * torch.eye(3)])]
        [1.0, 2.0]
    """
    pairs = list(zip(weights, starts or [None] * len(weights), strict=True))
    if any(weight.device.type != "cpu" for weight in weights):
        return [spectral_norm(weight, rtol, start) for weight, start in pairs]
    return in_threads(lambda pair: spectral_norm(pair[0], rtol, pair[1]), pairs)


def stable_rank(weight: Tensor, rtol: float = 1e-3, start: Tensor | None = None, certify: bool = False) -> Bounded:
    """Stable rank |W|_F^2 / |W|_2^2: at least 1, at most the rank.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Accuracy of the spectral norm, see :func:`spectral_norm`; twice that of the stable rank.
        start: As for :func:`spectral_norm`.
        certify: As for :func:`spectral_norm`.

    Returns:
        A float with ``lower`` and ``upper``; NaN for a zero or non-finite matrix.

    Raises:
        ValueError: As :func:`spectral_norm`.

    Example:
        >>> import torch
        >>> round(stable_rank(torch.eye(4)), 6)
        4.0
        >>> round(stable_rank(torch.ones(3, 5)), 6)
        1.0
    """
    ratio = spectral_ratio(weight, rtol, start, certify)
    if not ratio > 0:
        return Bounded(math.nan, math.nan, math.nan)
    return Bounded(1 / ratio**2, 1 / ratio.upper**2, 1 / ratio.lower**2 if ratio.lower > 0 else math.inf)


def spectral_ratio(weight: Tensor, rtol: float = 1e-3, start: Tensor | None = None, certify: bool = False) -> Bounded:
    """|W|_2 / |W|_F: 1 for a matrix of rank one, 1 / sqrt(rank) at the least.

    Args:
        weight: Shape ``(out, in, ...)``.
        rtol: Accuracy of the spectral norm, see :func:`spectral_norm`.
        start: As for :func:`spectral_norm`.
        certify: As for :func:`spectral_norm`.

    Returns:
        A float with ``lower`` and ``upper``; NaN for a zero or non-finite matrix.

    Raises:
        ValueError: As :func:`spectral_norm`.

    Example:
        >>> import torch
        >>> round(spectral_ratio(torch.eye(4)), 6)
        0.5
    """
    norm = spectral_norm(weight, rtol, start, certify)
    frobenius = frobenius_norm(weight)
    if not frobenius > 0:
        return Bounded(math.nan, math.nan, math.nan)
    # Summing the squares can be off by 2^-53 for each entry.
    rounding = 1 + real_view(weight).numel() * 2.0**-52
    return Bounded(
        norm.value / frobenius, norm.lower / (frobenius * rounding), min(1.0, norm.upper / frobenius * rounding)
    )


def frobenius_norm(weight: Tensor) -> float:
    """|W|_F, accumulated in float64.

    Example:
        >>> import torch
        >>> frobenius_norm(torch.tensor([[3.0, 4.0]]))
        5.0
    """
    weight = real_view(weight)
    return float(torch.linalg.vector_norm(weight, dtype=wide_dtype(weight)).item())


def leading(
    matrix: Tensor, rtol: float, seed: int, start: Tensor | None = None, probe: Tensor | None = None
) -> Top | None:
    """The top singular triplet without bounds: all that a measurement needs which is repeated.

    Args:
        matrix: Two dimensions, not empty.
        rtol: Relative accuracy.
        seed: Of the random vector.
        start: :attr:`Top.kept` of an earlier measurement.
        probe: :attr:`Top.probe` of the same.

    Returns:
        None where entries are not finite, all are zero, or products leave the range of the type.
    """
    if min(matrix.shape) <= _EXACT_SIDE:
        squares = gram(matrix)
        if not _SAFE[0] < squares.diagonal().real.sum().item() < _SAFE[1]:
            return None
        values, vectors = torch.linalg.eigh(squares)
        return Top(math.sqrt(values[-1].item()), vectors[:, -1:].mT, vectors[:, :0].mT, True, 0)
    fine = rtol < _FINE or matrix.dtype in (torch.float64, torch.complex128)
    work = wide(matrix) if fine else matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return top_triplet(Dense(work), rtol, seed, start, probe)


def block_norm(blocks: Tensor, rtol: float, seed: int) -> float:
    """The norm of a block-diagonal matrix: the largest of its blocks'.

    Args:
        blocks: Shape ``(count, rows, columns)``.
        rtol: Relative accuracy of a block that has to be iterated.
        seed: Of the random vectors.
    """
    if min(blocks.shape[1:]) <= _EXACT_SIDE:
        squares = (
            wide(blocks).mH @ wide(blocks) if blocks.shape[1] >= blocks.shape[2] else wide(blocks) @ wide(blocks).mH
        )
        if _SAFE[0] < squares.diagonal(dim1=1, dim2=2).real.sum().item() < _SAFE[1]:
            return math.sqrt(torch.linalg.eigvalsh(squares).max().item())
    found = (leading(block, rtol, seed) or spectral_norm(block, rtol) for block in blocks)
    return max(top.value for top in found)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply a function to every item, as many at a time as torch has threads."""
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def _measure(matrix: Tensor, rtol: float, start: Tensor | None, certify: bool) -> SpectralNorm | None:
    """The norm of a matrix whose products stay in range, else None."""
    seed, kept = 0, None
    if start is not None and min(matrix.shape) > _EXACT_SIDE:
        # The same call gives the same result, and an updated vector another random companion.
        seed = zlib.crc32(start.detach().to("cpu", torch.complex64).numpy().tobytes())
        kept = _on_smaller_side(matrix, start)
    found = leading(matrix, rtol, seed, kept)
    if found is None:
        return None
    bound = lower_bound(matrix, found.kept[0])
    if min(matrix.shape) <= _EXACT_SIDE:
        upper = _proved(matrix, gram(matrix), bound.value)
    elif certify:
        bound, upper = _certified(matrix, bound, rtol)
    else:
        upper = bound.frobenius
    vector = bound.vector.to(matrix.device, torch.promote_types(matrix.dtype, torch.float32))
    return SpectralNorm(bound.value, bound.lower, upper, upper <= bound.lower * (1 + rtol), vector)


def _on_smaller_side(matrix: Tensor, start: Tensor) -> Tensor:
    """A right singular vector, as the vector that a measurement starts from."""
    work = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    start = start.detach().to(work.device, work.dtype)
    return (start if matrix.shape[0] >= matrix.shape[1] else work.mv(start))[None]


def _certified(matrix: Tensor, bound: Bound, rtol: float) -> tuple[Bound, float]:
    """The proved upper bound; with a better lower one if the first was too low to be proved."""
    squares = gram(matrix)
    tried = bound.lower * (1 + _TRIED * rtol)
    if is_bound(squares, tried):
        return bound, with_rounding(tried, squares, matrix)
    _, vectors = torch.linalg.eigh(squares)
    bound = lower_bound(matrix, vectors[:, -1])
    return bound, _proved(matrix, squares, bound.value)


def _proved(matrix: Tensor, squares: Tensor, value: float) -> float:
    """An upper bound just above an exact value."""
    slack = _SLACK
    while not is_bound(squares, value * (1 + slack)):
        slack *= 10
    return with_rounding(value * (1 + slack), squares, matrix)


def _rescaled(matrix: Tensor, rtol: float, start: Tensor | None, certify: bool) -> SpectralNorm:
    """The norm of a matrix with entries that are huge, tiny, zero or not finite."""
    largest = matrix.abs().max().double().item()
    if not math.isfinite(largest):
        warnings.warn(
            f"a matrix of shape {tuple(matrix.shape)} has entries that are not finite, so its spectral norm is NaN",
            RuntimeWarning,
            stacklevel=3,
        )
        return SpectralNorm(math.nan, math.nan, math.nan, False, matrix.new_full((matrix.shape[1],), math.nan))
    if largest == 0:
        return SpectralNorm(0.0, 0.0, 0.0, True, matrix.new_zeros(matrix.shape[1]))
    # A power of two changes no digit.
    scale = 2.0 ** math.floor(math.log2(largest))
    found = _measure(wide(matrix) / scale, rtol, start, certify)
    assert found is not None
    value, lower, upper = (number * scale for number in found[:3])
    return SpectralNorm(value, lower, upper, found.certified, found.vector.to(matrix.device))
