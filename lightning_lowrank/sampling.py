"""How a run draws its batches: what decides the noise in a sum of its gradients.

Everything is read off the Trainer and its dataloader. Where it can't be known the answer is unknown, never a guess.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_lowrank._compat import LightningModule, Trainer, train_dataloaders

# Fewer gradients leave the standard errors themselves uncertain by more than a tenth.
_FEWEST_STEPS = 50
# Whole epochs up to this length: longer ones take too long, in which the weights move too far.
_MOST_STEPS = 1000
# Where no whole epochs help. At rest, where single gradients have a cosine of .04 to .09, the standard error is then
# .08 to .04.
_USUAL_STEPS = 500


class Draws(enum.Enum):
    """How the samples of an epoch come about."""

    WITHOUT_REPLACEMENT = "without replacement"  # a new random order every epoch
    WITH_REPLACEMENT = "with replacement"  # independent draws; epochs mean nothing
    FIXED_ORDER = "fixed order"  # neighbours in the data share a batch: parts of an epoch are no random sample
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Step:
    """What the gradient of one optimizer step is made of.

    Attributes:
        samples: Number of samples, over ranks and accumulated batches, as far as the mean over them is as noisy: where
            samples have unequal weights u_i it is (sum u)^2 / sum u^2 (Kish).
        scale: The sum of the samples' weights. The gradient divided by it is a mean over samples; below 1 for a last
            accumulation window that is cut short, which Lightning divides by the full window's length.
    """

    samples: float
    scale: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How a run draws its batches, over all ranks.

    The loss is taken for a mean over the batch.

    Attributes:
        draws: The kind.
        population: Samples that an epoch is drawn from; infinity for draws with replacement, NaN where unknown.
        batches: Batches of an epoch, per rank.
        steps: Optimizer steps of an epoch.
        step: Every step but perhaps the last of an epoch.
        last: The last step of an epoch.
        is_whole_dataset: Whether the population is all of the dataset, each sample once.

    Example:
        >>> Sampling(Draws.WITHOUT_REPLACEMENT, 100, 4, 4, Step(32), Step(4)).epochs_are_exact
        True
    """

    draws: Draws
    population: float = math.nan
    batches: int = 0
    steps: int = 0
    step: Step = Step(math.nan)
    last: Step = Step(math.nan)
    is_whole_dataset: bool = False

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Sampling:
        """Read it off a Trainer that has set up its training dataloader."""
        loaders = train_dataloaders(trainer)
        batches: Any = trainer.num_training_batches
        if len(loaders) != 1 or not module.automatic_optimization or not 0 < batches < math.inf:
            return UNKNOWN
        loader = loaders[0]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return UNKNOWN
        if trainer.strategy.handles_gradient_accumulation or len(loader) < batches:
            return UNKNOWN
        size = _batch_size(loader)
        draws, population = _drawn_from(loader, trainer.world_size)
        if size is None or draws is Draws.UNKNOWN:
            return UNKNOWN

        ranks, window = trainer.world_size, trainer.accumulate_grad_batches
        rest = len(loader.sampler) - (len(loader) - 1) * size  # type: ignore[arg-type]
        # The smaller last batch, unless a limit ends the epoch before it.
        final = min(size, rest) if batches == len(loader) else size
        steps = math.ceil(batches / window)
        last_sizes = [size] * (batches - (steps - 1) * window - 1) + [final]
        return cls(
            draws=draws,
            population=population,
            batches=batches,
            steps=steps,
            step=_step([size] * window, window, ranks) if steps > 1 else _step(last_sizes, window, ranks),
            last=_step(last_sizes, window, ranks),
            is_whole_dataset=population == len(loader.dataset),  # type: ignore[arg-type]
        )

    def at(self, step: int) -> Step:
        """What the gradient of optimizer step ``step`` of an epoch, from 0 on, is made of."""
        return self.last if step == self.steps - 1 else self.step

    @property
    def epochs_are_exact(self) -> bool:
        """Whether the mean over an epoch's steps, weighted by ``samples``, weighs each sample of the population once.

        Dropped rests, limits, and batches of unequal size within one accumulation window are a no.
        """
        # The effective number falls short of the true one where weights are unequal.
        return math.isclose((self.steps - 1) * self.step.samples + self.last.samples, self.population, rel_tol=1e-9)

    @property
    def needs_whole_epochs(self) -> bool:
        """Whether only whole epochs say something about the full-batch gradient."""
        return self.draws is Draws.FIXED_ORDER

    @property
    def is_known(self) -> bool:
        """Whether a window of this run's gradients says something about the full-batch gradient."""
        if self.draws is Draws.FIXED_ORDER:
            return self.epochs_are_exact
        return self.draws is not Draws.UNKNOWN

    @property
    def window_size(self) -> int:
        """Optimizer steps of a window that nobody chose: whole epochs, unless those are too long or mean nothing.

        Whole epochs leave no noise and no bias from weights that follow it (docs/theory.md), so they are worth waiting
        for.
        """
        if self.needs_whole_epochs or (self.epochs_are_exact and self.steps <= _MOST_STEPS):
            return self.steps * math.ceil(_FEWEST_STEPS / self.steps)
        return _USUAL_STEPS


UNKNOWN = Sampling(Draws.UNKNOWN)


def step_sees_whole_epoch(trainer: Trainer, module: LightningModule) -> bool:
    """Whether every optimizer step of this fit uses every training sample exactly once, with equal weight.

    Answers yes only where it can be known: automatic optimization, one DataLoader with one of torch's own samplers, and
    as many batches as are accumulated. ``limit_train_batches``, ``drop_last``, sampling with replacement, a partial
    accumulation window (Lightning divides it by the full window's length) and unknown iterables are all a no.
    """
    sampling = Sampling.of(trainer, module)
    whole = sampling.steps == 1 and sampling.epochs_are_exact and sampling.is_whole_dataset
    return whole and sampling.batches == trainer.accumulate_grad_batches


def _step(sizes: list[int], window: int, ranks: int) -> Step:
    """A step over batches of these sizes per rank; each sample of batch j weighs 1 / (window * ranks * size_j)."""
    return Step(ranks * len(sizes) ** 2 / sum(1 / size for size in sizes), len(sizes) / window)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Samples per batch; None where a batch sampler of the user's own decides."""
    if loader.batch_size is None:
        # Automatic batching off: one item is one batch, whatever is in it.
        return 1 if loader.batch_sampler is None else None
    return loader.batch_size if type(loader.batch_sampler) is BatchSampler else None


def _drawn_from(loader: DataLoader[Any], ranks: int) -> tuple[Draws, float]:
    """How the sampler draws, and from how many samples. Samplers of the user's own are unknown, subclasses included."""
    sampler: Any = loader.sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    if type(sampler) is DistributedSampler:
        if sampler.num_replicas != ranks:
            return Draws.UNKNOWN, math.nan
        if not sampler.shuffle:
            return Draws.FIXED_ORDER, size
        # Uneven shares are padded: fewer than `ranks` samples, other ones each epoch, come twice.
        return Draws.WITHOUT_REPLACEMENT, max(size, sampler.total_size)
    if ranks > 1:
        # Every rank draws by itself, from which random numbers nobody knows.
        return Draws.UNKNOWN, math.nan
    if type(sampler) is SequentialSampler:
        return Draws.FIXED_ORDER, len(sampler)
    if type(sampler) is SubsetRandomSampler:
        return Draws.WITHOUT_REPLACEMENT, len(sampler)
    if type(sampler) in (RandomSampler, WeightedRandomSampler) and sampler.replacement:
        return Draws.WITH_REPLACEMENT, math.inf
    if type(sampler) is RandomSampler and sampler.num_samples <= len(sampler.data_source):
        return Draws.WITHOUT_REPLACEMENT, len(sampler.data_source)
    return Draws.UNKNOWN, math.nan


def pass_population(loader: Any, ranks: int, limit: int | None = None) -> float | None:
    """Of how many samples one pass over the loader is a random draw; None if it is all of the data itself.

    Infinity for draws with replacement. Loaders of which nothing is known are taken for all the data.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    draws, population = _drawn_from(loader, ranks)
    if draws is Draws.WITH_REPLACEMENT:
        return population
    size = _batch_size(loader)
    if draws is not Draws.WITHOUT_REPLACEMENT or size is None:
        return None
    batches = len(loader) if limit is None else min(limit, len(loader))
    seen = ranks * min(batches * size, len(loader.sampler))  # type: ignore[arg-type]
    return None if seen >= population else population
