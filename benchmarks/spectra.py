"""What spectra cost, beside other ways to get them.

    pip install -e ".[bench]"
    python benchmarks/spectra.py

On a ResNet-18 and an 85 M transformer of GPT-2's shape, at initialisation and after some training on real data, and on
single large matrices. Before every round the optimizer takes one step, so that "warm" means: from the vectors of the
weights one step ago. All contenders run once per round, in turn; the tables have medians, and ratios of the same run.
Errors are those of the largest singular value against a float64 decomposition, the worst matrix of the worst round.
Writes benchmarks/results/spectra.json and .md.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch.utilities import grad_norm
from models import machine, matrices_of, trainers
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from lightning_lowrank.functional import spectral_norm, spectral_norms
from lightning_lowrank.functional._krylov import Top
from lightning_lowrank.functional.spectral import in_threads, leading

RESULTS = Path(__file__).parent / "results"
RTOL = 1e-3
OURS = ("warm", "cold", "warm, with bounds", "cold, with bounds", "certified")
OTHERS = ("svdvals", "svd_lowrank", "scipy svds", "WeightWatcher", "wandb.watch", "grad_norm")

Values = Sequence[float] | None


@dataclass
class Case:
    """One set of matrices.

    Attributes:
        name: For the tables.
        matrices: They are changed in place by ``advance``.
        advance: Takes a training step.
        model: What they belong to, for the contenders that need one.
        step: Forward and backward pass, which wandb.watch's hooks see.
    """

    name: str
    matrices: list[Tensor]
    advance: Callable[[], None]
    model: nn.Module | None = None
    kept: list[Top] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)

    def measure(self, contender: str) -> Values:
        """Run one contender; the largest singular values, if that is what it finds."""
        found: Values = None
        if contender in ("warm", "cold"):
            tops = self.tops(self.kept if contender == "warm" else [None] * len(self.matrices))
            found = [top.value for top in tops]
        elif contender in ("warm, with bounds", "cold, with bounds"):
            starts = self.starts if contender.startswith("warm") else None
            found = [norm.value for norm in spectral_norms(self.matrices, RTOL, starts)]
        elif contender == "certified":
            norms = [spectral_norm(matrix, RTOL, certify=True) for matrix in self.matrices]
            assert all(norm.certified for norm in norms)
            found = [norm.value for norm in norms]
        elif contender == "svdvals":
            found = [torch.linalg.svdvals(matrix)[0].item() for matrix in self.matrices]
        elif contender == "svd_lowrank":
            found = [torch.svd_lowrank(matrix, q=6, niter=2)[1][0].item() for matrix in self.matrices]
        elif contender == "scipy svds":
            found = [
                float(svds(matrix.numpy(), k=1, tol=RTOL, return_singular_vectors=False)[0])
                if min(matrix.shape) > 1
                else math.nan
                for matrix in self.matrices
            ]
        elif contender == "WeightWatcher":
            weightwatcher(self.model)
        elif contender == "grad_norm":
            grad_norm(self.model, 2)
        return found

    def tops(self, before: Sequence[Top | None]) -> list[Top]:
        """What the monitor does, with all the time that it wants."""

        def one(item: tuple[int, Tensor, Top | None]) -> Top:
            seed, matrix, top = item
            found = leading(matrix, RTOL, seed) if top is None else leading(matrix, RTOL, seed, top.kept, top.probe)
            assert found is not None
            return found

        return in_threads(one, list(zip(range(len(before)), self.matrices, before, strict=True)))


def truths(matrices: Sequence[Tensor]) -> list[float]:
    """The largest singular values by float64 decompositions."""
    tall = (matrix if len(matrix) >= matrix.shape[1] else matrix.T.contiguous() for matrix in matrices)
    return [torch.linalg.svdvals(matrix.double())[0].item() for matrix in tall]


def weightwatcher(model: nn.Module | None) -> None:
    """Its analysis with all that it says kept quiet."""
    import weightwatcher as ww

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ww.WeightWatcher(model=model).analyze()


@contextlib.contextmanager
def watching(model: nn.Module, log_freq: int = 1) -> Iterator[list[float]]:
    """wandb.watch on the model in an offline run; collects the seconds that its histograms take."""
    import wandb
    from wandb.integration.torch.wandb_torch import TorchHistory

    spent: list[float] = []
    exact = TorchHistory.log_tensor_stats

    def timed(self: TorchHistory, tensor: Tensor, name: str) -> None:
        start = time.perf_counter()
        exact(self, tensor, name)
        spent.append(time.perf_counter() - start)

    TorchHistory.log_tensor_stats = timed
    with tempfile.TemporaryDirectory() as folder, wandb.init(mode="offline", dir=folder, project="bench") as run:
        run.watch(model, log="all", log_freq=log_freq)
        try:
            yield spent
        finally:
            run.unwatch(model)
            TorchHistory.log_tensor_stats = exact


def run(case: Case, rounds: int, skip: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds and worst error of every contender."""
    times: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    # Each begins with threads awake and libraries loaded.
    torch.linalg.svdvals(torch.randn(300, 300))
    for _ in range(rounds):
        case.kept = case.tops([None] * len(case.matrices)) if not case.kept else case.kept
        case.starts = case.starts or [norm.vector for norm in spectral_norms(case.matrices, RTOL)]
        if case.model is not None and "wandb.watch" not in skip:
            with watching(case.model) as spent:
                case.advance()
            times.setdefault("wandb.watch", []).append(sum(spent))
        else:
            case.advance()
        exact = truths(case.matrices)
        for contender in (*OURS, *OTHERS):
            needs_model = contender in ("WeightWatcher", "grad_norm")
            if contender == "wandb.watch" or contender in skip or (needs_model and case.model is None):
                continue
            start = time.perf_counter()
            values = case.measure(contender)
            times.setdefault(contender, []).append(time.perf_counter() - start)
            if values is not None:
                worst = max(abs(v / t - 1) for v, t in zip(values, exact, strict=True) if math.isfinite(v))
                errors[contender] = max(errors.get(contender, 0.0), worst)
        case.kept = case.tops(case.kept)
        case.starts = [norm.vector for norm in spectral_norms(case.matrices, RTOL, case.starts)]
    return {
        name: {"seconds": statistics.median(found), "error": errors.get(name, math.nan)}
        for name, found in times.items()
    }


def cases(training: dict[str, int]) -> Iterator[Case]:
    """All that is measured, one after the other."""
    for name, make in trainers().items():
        model, step = make()
        yield Case(f"{name}, at initialisation", matrices_of(model), step, model)
        for _ in range(training[name]):
            step()
        yield Case(f"{name}, {training[name]} steps", matrices_of(model), step, model)
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((4096, 4096), (32000, 1024)):
        for kind in ("Gaussian", "power law"):
            matrix = torch.randn(rows, columns, generator=generator)
            if kind == "power law":
                # Columns of falling size, turned: singular values like those of trained layers.
                turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
                matrix = matrix * torch.arange(1.0, columns + 1) ** -0.7 @ turn

            def nudge(matrix: Tensor = matrix) -> None:
                matrix.add_(torch.randn(matrix.shape, generator=generator).sign(), alpha=1e-3)

            yield Case(f"{rows} x {columns}, {kind}", [matrix], nudge)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Seconds of each contender, its worst error, and how many times longer it takes than ours."""
    lines = [
        "| matrices | contender | seconds | worst error | / warm | / cold | / certified |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in results.items():
        for name, result in found.items():
            ratios = [
                f"{result['seconds'] / found[unit]['seconds']:.3g}" if unit in found else ""
                for unit in ("warm", "cold", "certified")
            ]
            error = "" if math.isnan(result["error"]) else f"{result['error']:.1e}"
            lines.append(f"| {case} | {name} | {result['seconds']:.4f} | {error} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(rounds: int = 3, threads: int = 2, skip: list[str] = [], only: str = "") -> None:  # noqa: B006
    """Time all contenders.

    Args:
        rounds: Interleaved rounds per set of matrices.
        threads: Threads torch may use.
        skip: Contenders to leave out.
        only: Measure just the cases whose name contains it, and keep nothing.
    """
    torch.set_num_threads(threads)
    results = {}
    for case in cases({"ResNet-18": 100, "GPT-2 shape, 85 M": 30}):
        if only in case.name:
            results[case.name] = run(case, rounds, skip)
            print(table({case.name: results[case.name]}), flush=True)
    setting = machine(rounds=rounds, tolerance=RTOL)
    title = ", ".join(f"{key}: {value}" for key, value in setting.items())
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "spectra.md").write_text(f"{title}\n\n{table(results)}\n")
        (RESULTS / "spectra.json").write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
