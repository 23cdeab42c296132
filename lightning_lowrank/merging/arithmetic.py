"""Exact arithmetic of a merge, in pieces that fit a cache: nothing is summed below float32, and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_lowrank.merging.kinds import MergeError

# Entries that are computed at once: torch does not wake its threads for fewer than 32,768, and they would only be in
# the way of those that hash and write.
_AT_ONCE = 31_744
# Entries per piece: a few stay in the cache of one core.
PIECE = 8 * _AT_ONCE
# Types in which the sum of two numbers, rounded in float32 and then in the type, equals their exact sum rounded once:
# the wider significand has at least twice the bits and two more (Figueroa, "When is double rounding innocuous?", 1995).
_EXACT_PAIRS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pieces(tensors: Sequence[Tensor], size: int = PIECE) -> Iterator[list[Tensor]]:
    """The same entries of every tensor, as flat pieces in row-major order.

    Args:
        tensors: Tensors of one shape. Contiguous ones are not copied, of others one piece at a time is.
        size: Entries per piece.
    """
    if all(tensor.is_contiguous() or tensor.ndim == 1 for tensor in tensors):
        flat = [tensor.reshape(-1) if tensor.ndim != 1 else tensor for tensor in tensors]
        for start in range(0, flat[0].numel(), size):
            yield [tensor[start : start + size] for tensor in flat]
    elif tensors[0].numel() <= size:
        yield [tensor.reshape(-1) for tensor in tensors]
    else:
        for rows in zip(*tensors, strict=True):
            yield from pieces(rows, size)


def combined(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    base: Tensor | None = None,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``sum of c_i W_i / divisor``, or ``W_0 + sum of c_i (W_i - W_0)``, in float64, rounded once.

    Args:
        tensors: One piece per network, of one shape.
        coefficients: One per network.
        base: The piece of the common start.
        divisor: What the sum is divided by, where there is no base.
        dtype: Of the result; the first piece's by default.

    Example:
        >>> combined([torch.tensor([1.0]), torch.tensor([3.0])], [1.0, 0.5], base=torch.tensor([1.0]))
        tensor([2.])
    """
    dtype = dtype or tensors[0].dtype
    plain = base is None and divisor == 1 and len(tensors) == 2 and all(c == 1.0 for c in coefficients)
    if plain and dtype in _EXACT_PAIRS and all(tensor.dtype is dtype for tensor in tensors):
        return _added(*tensors)
    start = None if base is None else widened(base)
    total: Tensor | None = None
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        wide = widened(tensor) if start is None else widened(tensor) - start
        part = wide if coefficient == 1.0 else coefficient * wide
        total = part if total is None else total + part
    assert total is not None
    return rounded(total / divisor if start is None else start + total, dtype).to(tensors[0].device)


def _added(one: Tensor, other: Tensor) -> Tensor:
    out = torch.empty_like(one)
    for start in range(0, len(one), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        torch.add(one[part], other[part], out=out[part])
    return out


def pooled_variance(means: Sequence[Tensor], variances: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The variance of data that is, in equal parts, that of every network (law of total variance)."""
    within = torch.stack([widened(variance) for variance in variances]).mean(0)
    between = torch.stack([widened(mean) for mean in means]).var(0, correction=0)
    return rounded(within + between, dtype)


def widened(tensor: Tensor) -> Tensor:
    """In float64, or complex128. Not every device has them: such tensors come to the CPU."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.complex128 if tensor.is_complex() else torch.float64)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 or complex128 tensor in another type, rounded once to nearest, ties to even.

    torch goes from float64 to types below float32 through float32, which rounds twice. Here the step to float32 rounds
    to odd, and then the second one is right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

    Example:
        >>> value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
        >>> rounded(value, torch.bfloat16).item(), value.to(torch.bfloat16).item()
        (1.0078125, 1.0)
    """
    if dtype.is_complex or dtype in (torch.float64, torch.float32) or not dtype.is_floating_point:
        return value.to(dtype)
    near = value.to(torch.float32)
    # Neighbours of a float have neighbouring integers as their bits, away from zero upwards.
    bits = near.view(torch.int32)
    inexact = (near.double() != value) & (bits & 1 == 0) & ~value.isnan()
    step = torch.where(near.double().abs() < value.abs(), 1, -1).to(torch.int32)
    odd = torch.where(inexact, bits + step, bits).view(torch.float32)
    if dtype.itemsize == 1:
        # Types of eight bits saturate in torch: what rounds beyond their largest number would pass for it.
        info = torch.finfo(dtype)
        halfway = info.max + info.eps * 2 ** math.floor(math.log2(info.max)) / 2
        odd = torch.where(odd.abs() >= halfway, torch.nan, odd)
    return odd.to(dtype)


def is_finite(piece: Tensor) -> bool:
    """Whether all entries are finite, in one pass."""
    if piece.numel() == 0:
        return True
    real = torch.view_as_real(piece) if piece.is_complex() else piece
    if "float8" in str(real.dtype):
        real = real.float()
    for start in range(0, len(real), _AT_ONCE):
        low, high = torch.aminmax(real[start : start + _AT_ONCE])
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            return False
    return True


def check_equal(tensors: Sequence[Tensor], what: str, advice: str) -> None:
    """Tensors that are kept once have to be the same; entries that are not numbers count as equal.

    Raises:
        MergeError: If they differ, with the largest difference.
    """
    gaps = []
    for first, *others in pieces(tensors):
        for other in others:
            same = (first == other) | ((first != first) & (other != other))
            if not same.all():
                gap = (widened(first) - widened(other))[~same].abs().max().item()
                gaps.append(gap if math.isfinite(gap) else math.inf)
    if gaps:
        raise MergeError(f"{what}s must be equal in all networks, and these differ by up to {max(gaps):.3g}{advice}")
