"""Spectra of one optimizer's matrices: a few at a time, each from where its last measurement ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowrank.callbacks._budget import Budget
from lightning_lowrank.functional import circular_convolution_norm, effective_rank, spectral_norm
from lightning_lowrank.functional._krylov import Top, top_triplet
from lightning_lowrank.functional.spectral import block_norm, in_threads, leading
from lightning_lowrank.functional.spectrum import block_singular_values
from lightning_lowrank.matrices import Layout
from lightning_lowrank.parameters import Parameter
from lightning_lowrank.sharded_matrix import sharded_matrix

# Accuracy of an iterated spectral norm.
RTOL = 1e-3
# Up to this many entries a sharded matrix is sent around as a whole: fewer messages than products with vectors take.
_SMALL = 1 << 14


@dataclass(frozen=True)
class Spectrum:
    """What was found about one matrix.

    Attributes:
        step: When.
        top: |W|_2.
        frobenius: |W|_F at the same time.
        effective_rank: NaN unless all singular values were computed.
        singular_values: All of them, descending, where they were computed.
    """

    step: int
    top: float
    frobenius: float
    effective_rank: float = math.nan
    singular_values: Tensor | None = None

    @property
    def ratio(self) -> float:
        """|W|_2 / |W|_F."""
        return self.top / self.frobenius if self.frobenius > 0 else math.nan

    @property
    def stable_rank(self) -> float:
        """|W|_F^2 / |W|_2^2."""
        return 1 / self.ratio**2 if self.ratio > 0 else math.nan


class Spectra:
    """Keeps what is known of every matrix, and measures as many anew as the time allows, in turn.

    The vectors that the next measurement starts from are kept here and nowhere else: a resumed run starts cold.

    Args:
        full: Whether to compute all singular values.
        layouts: Which matrix each parameter is; one that is missing is unfolded.
    """

    def __init__(self, full: bool, layouts: Mapping[str, Layout]) -> None:
        self._full = full
        self._layouts = layouts
        self._found: dict[str, Spectrum] = {}
        self._kept: dict[str, Top] = {}
        self._turn: list[str] = []
        self._measured = 0

    def measure(self, matrices: Sequence[tuple[Parameter, float]], step: int, budget: Budget) -> None:
        """Go on where the last call ran out of time, at most once around.

        Args:
            matrices: Each with |W|_F, in the same order on every process.
            step: The present one.
            budget: Is asked before every matrix, or before as many as are measured at a time.
        """
        by_name = {p.name: (p, norm) for p, norm in matrices}
        # Those that have waited longest first; what has not been measured before is new in the turn.
        known = set(self._turn)
        self._turn += [name for name in by_name if name not in known]
        waiting = [name for name in self._turn if name in by_name]
        while waiting and budget.allows():
            with budget.spending():
                some = self._together(waiting, by_name)
                waiting = waiting[len(some) :]
                self._turn = [name for name in self._turn if name not in some] + some
                chosen = [(self._measured + i, *by_name[name]) for i, name in enumerate(some)]
                self._measured += len(some)
                for name, spectrum in zip(some, in_threads(lambda one: self._one(*one, step), chosen), strict=True):
                    self._found[name] = spectrum

    def of(self, names: Sequence[str]) -> list[Spectrum]:
        """What is known of each matrix; NaN of one that was not measured yet."""
        unknown = Spectrum(-1, math.nan, math.nan)
        return [self._found.get(name, unknown) for name in names]

    def _together(self, waiting: Sequence[str], by_name: Mapping[str, tuple[Parameter, float]]) -> list[str]:
        """The next matrix, or as many as the CPU has threads for: collectives and accelerators keep an order."""
        first, _ = by_name[waiting[0]]
        alone = bool(first.shard.groups) or first.value.device.type != "cpu" or self._full
        count = 1 if alone else torch.get_num_threads()
        some = list(waiting[:count])
        return some if all(not by_name[name][0].shard.groups for name in some) else some[:1]

    @torch.no_grad()
    def _one(self, seed: int, p: Parameter, norm: float, step: int) -> Spectrum:
        if not 0 < norm < math.inf:
            return Spectrum(step, 0.0 if norm == 0 else math.nan, norm)
        if self._full:
            sigma = block_singular_values(self._layout(p).blocks(p.shard.whole(p.value)))
            return Spectrum(step, float(sigma[0]), norm, effective_rank(sigma), sigma.float().cpu())
        return Spectrum(step, self._norm(seed, p), norm)

    def _norm(self, seed: int, p: Parameter) -> float:
        layout = self._layout(p)
        plain = layout.groups == 1 and layout.rows == 1 and layout.circular is None
        last = self._kept.get(p.name)
        before = (last.kept, last.probe) if last is not None else (None, None)
        found: Top | None = None
        if plain and p.shard.groups and p.shape.numel() > _SMALL:
            spread = sharded_matrix(p.shard, p.value)
            if spread is not None:
                found = top_triplet(spread, RTOL, seed, *before)
                if found is None:
                    return spectral_norm(p.shard.whole(p.value), RTOL).value
        if found is None:
            whole = p.shard.whole(p.value)
            blocks = layout.blocks(whole)
            if layout.circular is not None:
                kernels = whole.reshape(layout.groups, -1, *whole.shape[1:])
                return max(circular_convolution_norm(kernel, layout.circular) for kernel in kernels)
            if len(blocks) > 1:
                return block_norm(blocks, RTOL, seed)
            found = leading(blocks[0], RTOL, seed, *before)
            if found is None:
                # Entries so large or small that they have to be scaled; here as above.
                return spectral_norm(blocks[0], RTOL).value
        self._kept[p.name] = found
        return found.value

    def _layout(self, p: Parameter) -> Layout:
        return self._layouts.get(p.name, Layout())


def age_of(spectra: Sequence[Spectrum], step: int) -> float:
    """Steps since the oldest of the spectra was measured; NaN while one is missing."""
    oldest = min((spectrum.step for spectrum in spectra), default=-1)
    return float(step - oldest) if oldest >= 0 else math.nan
