"""The top singular triplet of a matrix that is known by its products with vectors alone.

Golub-Kahan-Lanczos, written as Lanczos on the smaller of W^H W and W W^H: the two build the same Krylov space (Golub
and Kahan, 1965), and only vectors of the smaller side are kept. In place of the tridiagonal recurrence the products
with the whole basis are kept (Rayleigh-Ritz), so that any orthonormal basis will do: vectors of an earlier measurement,
a fresh random one, or what rounding leaves of an invariant subspace.

When to stop. A small residual says that *some* singular value is near, not that it is the largest one: stopping at it
from a random start missed 6 to 13 % of Gaussian matrices by more than a thousandth. So a cold start also asks how
likely it is that something larger has been overlooked. The Lanczos polynomial p_k(t) = prod(t - theta_j) / prod(beta_j)
takes the start q to a unit vector, so |p_k(lambda_1)| <= 1 / |<q, v_1>|, and a random unit vector of R^n has a
component below delta along v_1 with a probability of at most delta sqrt(2 n / pi) (Hochstenbach, "Probabilistic upper
bounds for the matrix two-norm", 2013). That takes twice as many steps, and missed 2 of 1,200.

A warm start begins at the last top vectors, which are blind to what is new. A fresh random vector joins it, and is kept
with its image W^H W r: the next time the difference of the two images of one r, what has changed times r, points into
the directions that have grown since, however little of them r itself has. Without such a probe the random vector's
Krylov space is searched instead, which takes twice as many products.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# The chance, in exact arithmetic, that a cold start overlooks a singular value beyond the estimate's tolerance.
_OVERLOOKED = 0.02
# Steps before the first look at the Ritz values, and the fewest and most before the next: a look is an eigenvalue
# problem of the basis' size.
_FIRST_STEPS = 10
_NEXT_STEPS = (2, 12)
# By how much a direction that is new must exceed the old top one to be searched for by the random vector that joins a
# warm start; smaller ones show themselves in later measurements. And the steps before the first look.
_ALERT = 0.1
_FRESH_STEPS = 4
# Products after which a warm start was none: the weights are others by now, and a residual alone may overlook the top.
_STALE = 9
# Ritz vectors that a next measurement starts from: the top one, and the one that may overtake it.
_KEPT = 2
# More steps than any but adversarial spectra need.
_MOST_STEPS = 400
# Vectors that there is room for at first.
_ROOM = 16
# Norms of W^H W q within which squares neither overflow float32 nor lose its digits.
_SAFE = (1e-24, 1e24)
# Below that share of the largest norm, a new vector is so much rounding that it is orthogonalised once more.
_CANCELLED = 1e-4


class Matrix(Protocol):
    """A matrix by its products with vectors."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def mv(self, vector: Tensor) -> Tensor:
        """W v, shape ``(rows,)``."""

    def rmv(self, vector: Tensor) -> Tensor:
        """W^H u, shape ``(columns,)``."""

    def agree(self, flag: bool) -> bool:
        """Whether all processes that hold a part of the matrix say so."""


class Dense:
    """A matrix in memory.

    Args:
        matrix: Of the type that the arithmetic is done in.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._adjoint = matrix, matrix.mH
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def mv(self, vector: Tensor) -> Tensor:
        """W v."""
        return self._matrix.mv(vector)

    def rmv(self, vector: Tensor) -> Tensor:
        """W^H u."""
        return self._adjoint.mv(vector)

    def agree(self, flag: bool) -> bool:
        """There is no other process."""
        return flag


class Top(NamedTuple):
    """The top singular triplet, as far as it was found.

    Attributes:
        value: The square root of the largest Ritz value.
        kept: Unit vectors on the smaller side, shape ``(at most 2, smaller side)``; the first belongs to the value: a
            right singular vector if rows >= columns, else a left one. What the next measurement starts from.
        probe: A random unit vector and its image, shape ``(2, smaller side)``, to see by what has changed until then.
        converged: Whether the accuracy was met.
        steps: Products with W^H W that it took.
    """

    value: float
    kept: Tensor
    probe: Tensor
    converged: bool
    steps: int


def is_tall(shape: tuple[int, int]) -> bool:
    """Whether the smaller side, where vectors are kept, is that of the columns."""
    return shape[0] >= shape[1]


def top_triplet(
    matrix: Matrix, rtol: float, seed: int, start: Tensor | None = None, probe: Tensor | None = None
) -> Top | None:
    """The largest singular value.

    Args:
        matrix: Both sides are positive.
        rtol: Relative accuracy that is aimed at.
        seed: Of the random vector that begins the search, or joins ``start``.
        start: Vectors on the smaller side, shape ``(count, smaller side)``: :attr:`Top.kept` of an earlier measurement.
        probe: :attr:`Top.probe` of the same.

    Returns:
        None where entries are not finite, all are zero, or the products leave the range of the type.
    """
    # Thousands of short calls: without autograd's bookkeeping they take a tenth less.
    with torch.inference_mode():
        found = _iterate(matrix, rtol, seed, start, probe)
    return None if found is None else found._replace(kept=found.kept.clone(), probe=found.probe.clone())


def _iterate(matrix: Matrix, rtol: float, seed: int, start: Tensor | None, probe: Tensor | None) -> Top | None:
    space = _Space(matrix)
    warm = start is not None and space.most >= _ROOM
    probed = warm and probe is not None
    if start is not None and warm:
        _revisit(space, start.to(matrix.device, matrix.dtype), probe.to(start) if probe is not None else None)
    search = _Search(space.count, space.size, _ALERT if warm else rtol)
    if probed:
        search.missing = 0.0
    fresh = _random(space.size, seed, matrix)
    following, _ = space.unit(fresh)
    steps = 1 if probed else _FRESH_STEPS if warm else _FIRST_STEPS
    while True:
        for _ in range(min(steps, space.most - space.count)):
            following, beta = space.expand(following)
            search.betas.append(beta)
            # The first product shows whether float32 can hold the rest.
            if len(search.betas) == 1 and not matrix.agree(space.is_safe()):
                return None
        within = space.within()
        # All processes have the same numbers, up to the rounding of unlike processors.
        if not matrix.agree(bool(within.isfinite().all())):
            return None
        if matrix.agree(search.look(within) or space.count == space.most):
            if probed and space.count >= _STALE:
                return _iterate(matrix, rtol, seed, None, None)
            ritz = space.ritz(within)
            done = matrix.agree((ritz.error <= rtol and search.missing <= 0) or space.count == space.size)
            if done or space.count == space.most:
                top = space.combine(ritz.vectors[:, -_KEPT:]).flip(0)
                return Top(math.sqrt(max(ritz.top, 0.0)), top, space.image(fresh), done, space.count)
            if warm:
                following, _ = space.unit(ritz.residual)
                search.betas.clear()
        steps = 1 if warm and search.missing <= 0 else search.steps()


def _revisit(space: _Space, start: Tensor, probe: Tensor | None) -> None:
    """Begin with what was found before, and with what has changed since."""
    changed: list[Tensor] = []
    if probe is not None:
        # First of all, while nothing is projected out of it.
        space.expand(space.unit(probe[0])[0])
        changed.append(space.latest() - probe[1])
    for vector in (*start, *changed):
        space.expand(space.unit(vector)[0])


class _Search:
    """What may have been overlooked by the Krylov space of the random vector.

    Args:
        since: Vectors in the basis before it; what is searched is orthogonal to them.
        size: Of a vector.
        tolerance: How far something must exceed the top singular value, relatively, to be searched for.
    """

    def __init__(self, since: int, size: int, tolerance: float) -> None:
        self.betas: list[float] = []
        self.missing = math.inf
        self._since = since
        self._needed = math.log(math.sqrt(2 * size / math.pi) / _OVERLOOKED)
        self._tolerance = tolerance
        self._reached = [(0, 0.0), (0, 0.0)]

    def look(self, within: Tensor) -> bool:
        """Whether log p_k at the square of (1 + tolerance) sigma_1 is as large as it has to be.

        Args:
            within: As :meth:`_Space.within` returns it.
        """
        if self.missing > 0:
            every = torch.linalg.eigvalsh(within)
            values = every if self._since == 0 else torch.linalg.eigvalsh(within[self._since :, self._since :])
            beyond = float(every[-1]) * (1 + self._tolerance) ** 2
            tiny = torch.finfo(torch.float64).tiny
            growth = (beyond - values).log().sum().item()
            growth -= math.fsum(math.log(max(beta, tiny)) for beta in self.betas)
            self._reached = [self._reached[-1], (len(self.betas), growth)]
            self.missing = self._needed - growth
        return self.missing <= 0

    def steps(self) -> int:
        """Steps until the next look, from how fast log p_k grew lately."""
        (start, low), (end, high) = self._reached
        fewest, most = _NEXT_STEPS
        if self.missing <= 0 or high <= low:
            return fewest if self.missing <= 0 else most
        return min(most, max(fewest, math.ceil(0.8 * self.missing * (end - start) / (high - low))))


class _Ritz(NamedTuple):
    """Eigenvalues, ascending, and -vectors of W^H W within a space."""

    values: Tensor
    vectors: Tensor
    residual: Tensor

    @property
    def top(self) -> float:
        return float(self.values[-1])

    @property
    def error(self) -> float:
        """Relative error of the top singular value as estimated from the residual r: min(r, r^2 / gap) / 2 lambda."""
        residual = torch.linalg.vector_norm(self.residual).item()
        gap = self.top - (float(self.values[-2]) if len(self.values) > 1 else 0.0)
        squared = min(residual, residual**2 / gap) if gap > 0 else residual
        return squared / (2 * self.top) if self.top > 0 else math.inf


class _Space:
    """An orthonormal basis, and the products of W^H W (or W W^H) with it. Rows are vectors."""

    def __init__(self, matrix: Matrix) -> None:
        self.size = min(matrix.shape)
        self.most = min(_MOST_STEPS, self.size)
        self.count = 0
        self._first, self._second = (matrix.mv, matrix.rmv) if is_tall(matrix.shape) else (matrix.rmv, matrix.mv)
        self._scale = 0.0
        self._complex = matrix.dtype.is_complex
        empty = torch.zeros(0, 0, dtype=matrix.dtype, device=matrix.device)
        self._rows, self._columns = empty.new_zeros(2, 0, self.size), empty
        self._make_room(min(_ROOM, self.most))

    def _make_room(self, room: int) -> None:
        rows, columns = self._rows, self._columns
        # Not filled with zeros: that would wake threads, which then keep a core busy that another matrix needs.
        self._rows, self._columns = rows.new_empty(2, room, self.size), rows.new_empty(room, room)
        self._rows[:, : rows.shape[1]] = rows
        self._columns[: len(columns), : len(columns)] = columns
        self._limit()

    def _limit(self) -> None:
        """The basis as far as it goes, for sums over its vectors."""
        basis = self._rows[0, : self.count]
        self._bras, self._kets = (basis.conj() if self._complex else basis), basis.mT

    def expand(self, vector: Tensor) -> tuple[Tensor, float]:
        """Take a unit vector into the basis; returns the next one of its Krylov space, and its norm before scaling."""
        count = self.count
        if count == len(self._columns):
            self._make_room(min(2 * count, self.most))
        product = self._second(self._first(vector))
        self._rows[0, count] = vector
        self._rows[1, count] = product
        self.count += 1
        self._limit()
        coefficients = self._bras.mv(product)
        self._columns[count, : self.count].copy_(coefficients)
        return self._scaled(torch.addmv(product, self._kets, coefficients, alpha=-1))

    def unit(self, vector: Tensor) -> tuple[Tensor, float]:
        """What the basis does not have of a vector, with norm one, and its norm before."""
        return self._scaled(torch.addmv(vector, self._kets, self._bras.mv(vector), alpha=-1))

    def _scaled(self, vector: Tensor) -> tuple[Tensor, float]:
        """A vector from which the basis was projected out, with norm one; it is changed in place.

        The basis is projected out again: once leaves what rounding put in (Giraud et al., 2005). Where an invariant
        subspace is complete only rounding is left; orthogonalised once more it is a new direction like any other.
        """
        vector.addmv_(self._kets, self._bras.mv(vector), alpha=-1)
        norm = torch.linalg.vector_norm(vector).item()
        self._scale = max(self._scale, norm)
        if norm >= _CANCELLED * self._scale or not math.isfinite(norm):
            return vector.div_(norm), norm
        vector /= max(norm, torch.finfo(vector.dtype).tiny)
        vector.addmv_(self._kets, self._bras.mv(vector), alpha=-1)
        again = torch.linalg.vector_norm(vector).item()
        # Of exactly nothing a zero vector is made, which takes no part.
        return vector / (again if again > 0 else 1.0), norm

    def is_safe(self) -> bool:
        """Whether the latest product is within the range in which squares can be trusted."""
        return _SAFE[0] < float(torch.linalg.vector_norm(self.latest())) < _SAFE[1]

    def latest(self) -> Tensor:
        """The last product."""
        return self._rows[1, self.count - 1]

    def image(self, vector: Tensor) -> Tensor:
        """A vector of the space, with norm one, and its product; shape ``(2, size)``."""
        vector = vector / torch.linalg.vector_norm(vector)
        products = self._rows[1, : self.count]
        return torch.stack([vector, products.mT.mv(self._bras.mv(vector))])

    def within(self) -> Tensor:
        """The matrix within the basis, from what each product had of the vectors up to its own; float64, on the CPU."""
        rows = self._columns[: self.count, : self.count].tril().cpu()
        rows = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
        # Row k has <q_j, G q_k> for j up to k: the upper triangle, column by column.
        return rows.mT + rows.tril(-1).conj()

    def ritz(self, within: Tensor) -> _Ritz:
        """Rayleigh-Ritz: eigenvalues and -vectors within the basis, and the residual of the top one."""
        values, vectors = torch.linalg.eigh(within)
        basis, products = self._rows[:, : self.count]
        top = vectors[:, -1].to(basis.device, basis.dtype)
        self._scale = max(self._scale, float(values[-1]))
        return _Ritz(values, vectors, products.mT.mv(top) - float(values[-1]) * basis.mT.mv(top))

    def combine(self, coefficients: Tensor) -> Tensor:
        """The basis' combinations, shape ``(count, size)``, from coefficients of shape ``(basis, count)``."""
        basis = self._rows[0, : self.count]
        found: Tensor = coefficients.mT.to(basis.device, basis.dtype) @ basis
        return found


def _random(size: int, seed: int, like: Matrix) -> Tensor:
    """A random direction. From a generator of its own: measuring must not touch the global random state."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if like.dtype.is_complex else torch.float64
    return torch.randn(size, generator=generator, dtype=wide).to(like.device, like.dtype)
