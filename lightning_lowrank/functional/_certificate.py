"""Bounds on the largest singular value that are proofs, in float64 arithmetic as it is.

Lower: the norm of W x for a unit vector x, less what rounding can have added. Upper: if the Cholesky factorisation of
s^2 I - W^H W runs to completion, then all singular values are at most s, up to terms that are known (Rump,
"Verification of positive definiteness", BIT 46, 2006). With gamma_k = k u / (1 - k u), u = 2^-53:

- computed inner products of length m are off by at most gamma_m |x| |y|, in whatever order they are summed (Higham,
  "Accuracy and Stability of Numerical Algorithms", 3.1), so a computed W x by at most gamma_n |W|_F |x|, and the
  computed Gram matrix by at most gamma_m |W|_F^2;
- a Cholesky factorisation of A that succeeds is exactly that of a matrix A + E with
  |E| <= gamma_(n+1) / (1 - gamma_(n+1)) tr(A).

Complex multiplications take more roundings; four times the constants cover them (Higham, 3.6).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Elements that are converted to float64 at a time: the copy stays in cache.
_CHUNK = 1 << 19
_UNIT = 2.0**-53


class Bound(NamedTuple):
    """What one pass over the matrix shows.

    Attributes:
        value: |W x|, the best that is known of the largest singular value.
        lower: The value less its rounding.
        frobenius: |W|_F plus its rounding, so an upper bound.
        vector: The right singular vector, shape ``(columns,)``, float64.
    """

    value: float
    lower: float
    frobenius: float
    vector: Tensor


def lower_bound(matrix: Tensor, vector: Tensor) -> Bound:
    """The norm of W v, or of W^H u.

    Args:
        matrix: Shape ``(rows, columns)``, any floating type.
        vector: On the smaller side: right if rows >= columns, else left.
    """
    rows, columns = matrix.shape
    tall = rows >= columns
    vector = wide(vector)
    vector = vector / torch.linalg.vector_norm(vector)
    count = max(1, _CHUNK // columns)
    products: list[Tensor] = []
    squares = torch.zeros((), dtype=torch.float64, device=vector.device)
    image = vector.new_zeros(columns)
    for index, chunk in enumerate(torch.split(matrix, count)):
        chunk = wide(chunk)
        entries = torch.view_as_real(chunk) if chunk.is_complex() else chunk
        squares += entries.reshape(-1).dot(entries.reshape(-1))
        if tall:
            products.append(chunk.mv(vector))
        else:
            image.addmv_(chunk.mH, vector[index * count : index * count + count])
    product = torch.cat(products) if tall else image
    value = torch.linalg.vector_norm(product).item()
    frobenius = math.sqrt(squares.item())
    rounding = _gamma(rows + columns, matrix)
    right = vector if tall else product / max(value, torch.finfo(torch.float64).tiny)
    return Bound(
        value, max(0.0, value - 2 * rounding * frobenius), frobenius * (1 + 2 * _gamma(matrix.numel(), matrix)), right
    )


def gram(matrix: Tensor) -> Tensor:
    """The smaller of W^H W and W W^H in float64."""
    tall = matrix.shape[0] >= matrix.shape[1]
    size = min(matrix.shape)
    dtype = torch.complex128 if matrix.is_complex() else torch.float64
    device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    total = torch.zeros(size, size, dtype=dtype, device=device)
    # Pieces along the longer side: at least as long as the shorter one, for the speed of the product.
    for chunk in torch.split(matrix, max(size, _CHUNK // size), dim=0 if tall else 1):
        chunk = wide(chunk)
        total.addmm_(chunk.mH, chunk) if tall else total.addmm_(chunk, chunk.mH)
    return total


def is_bound(squares: Tensor, bound: float) -> bool:
    """Whether the Cholesky factorisation of ``bound^2 I - W^H W`` runs to completion.

    Args:
        squares: As :func:`gram` returns it.
        bound: Positive.
    """
    shifted = -squares
    shifted.diagonal().add_(bound**2)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def with_rounding(bound: float, squares: Tensor, matrix: Tensor) -> float:
    """The upper bound that a successful :func:`is_bound` proves.

    Args:
        bound: The bound that was tried.
        squares: The Gram matrix.
        matrix: The matrix itself.
    """
    size, length = len(squares), max(matrix.shape)
    energy = squares.diagonal().real.sum().item() if squares.is_complex() else squares.trace().item()
    energy *= 1 + 2 * _gamma(length, matrix)
    factor = _gamma(size + 1, matrix) / (1 - _gamma(size + 1, matrix))
    squared = bound**2 + _gamma(length + 2, matrix) * energy + factor * size * bound**2 + 4 * _UNIT * bound**2
    return math.sqrt(squared) * (1 + 4 * _UNIT)


def wide(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _gamma(count: int, matrix: Tensor) -> float:
    count = 4 * count if matrix.is_complex() else count
    return count * _UNIT / (1 - count * _UNIT)
