"""The batches of a dataloader, fetched anew for each draw of the random numbers, without touching the dataloader."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_lowrank._compat import is_combined_loader

_DRAWS = 2
# Random numbers for a batch's data are seeded like a further draw, those for the order of the batches like a batch -1.
_DATA = _DRAWS


class Batches:
    """One pass over the batches of a dataloader, one or two draws of each.

    A ``DataLoader`` of a map-style dataset that forms batches itself fetches the samples of a batch anew for each draw,
    in one order; from any other iterable a batch is fetched once and yielded as both draws. Workers are new ones, so
    that persistent workers and their random numbers stay as they are. The global generators are seeded on the way; the
    caller puts them back, and the state of dataset and samplers.

    Args:
        loader: What :func:`check_loader` accepts.
        seed: Determines the order and all draws.
        rank: Makes the draws of one process differ from those of another; the order stays common.
        limit: Stop after as many batches.

    Attributes:
        total: The number of batches; None where it is not known (yet).
    """

    def __init__(self, loader: Any, *, seed: int = 0, rank: int = 0, limit: int | None = None) -> None:
        self._loader = loader
        self._seed = seed
        self._rank = rank
        self._limit = limit
        self.total: int | None = None

    def fetch(self, stochastic: Callable[[], bool | None]) -> Iterator[list[Any]]:
        """Go through the data.

        Args:
            stochastic: Whether several draws are needed; None as long as that is not known. Asked before each batch.

        Yields:
            One batch, as a list of its draws.
        """
        fetch = self._fetch_for_each_draw if _refetches(self._loader) else self._fetch_once
        return fetch(stochastic)

    def _fetch_once(self, stochastic: Callable[[], bool | None]) -> Iterator[list[Any]]:
        self.total = _length(self._loader, self._limit)
        seed_generators(self._seed, -1, _DATA)
        batches = iter(_twin(self._loader) if isinstance(self._loader, DataLoader) else self._loader)
        for number in itertools.count() if self._limit is None else range(self._limit):
            seed_generators(self._seed, number, _DATA, self._rank)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield [batch] * _draws(stochastic())

    def _fetch_for_each_draw(self, stochastic: Callable[[], bool | None]) -> Iterator[list[Any]]:
        seed_generators(self._seed, -1, _DATA)
        # One order of the samples for all draws.
        indices = [list(batch) for batch in itertools.islice(self._loader.batch_sampler, self._limit)]
        self.total = len(indices)
        number = 0
        while number < len(indices):
            # Workers fetch ahead, so the number of draws has to be known before they start on the rest.
            known = stochastic() is not None
            part = indices[number:] if known else indices[number : number + 1]
            seed_generators(self._seed, number, _DATA, self._rank)
            batches = iter(_redrawing_twin(self._loader, part, _draws(stochastic()), probing=not known))
            for _ in part:
                seed_generators(self._seed, number, _DATA, self._rank)
                yield next(batches)
                number += 1


def check_loader(loader: Any) -> None:
    """Refuse what is not one dataloader that can be gone through again and again.

    Raises:
        ValueError: With the reason and what to do.
    """
    several = isinstance(loader, (list, tuple)) and any(isinstance(item, DataLoader) for item in loader)
    if several or isinstance(loader, Mapping) or is_combined_loader(loader):
        raise ValueError(
            f"got several dataloaders (a {type(loader).__name__}), for which it is not known how their batches make up"
            " the data; pass one dataloader"
        )
    data = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(data, Iterator):
        raise ValueError(
            f"{type(data).__name__} can be gone through only once, and a pass would use up the run's data; pass a"
            " DataLoader or a list of batches, or let __iter__ of the dataset return a new iterator"
        )
    if not isinstance(loader, Iterable):
        raise ValueError(f"a dataloader is an iterable of batches, got {type(loader).__name__}")


def seed_generators(*entropy: int) -> None:
    """Seed the global generators of Python, NumPy and torch from all the numbers together."""
    # Negative numbers are no entropy to NumPy.
    state = np.random.SeedSequence([number % 2**64 for number in entropy]).generate_state(2, np.uint32)
    seed = int(state[0]) << 32 | int(state[1])
    random.seed(seed)
    np.random.seed(int(state[0]))  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed would leave a seed for devices that start later.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def _refetches(loader: Any) -> bool:
    """Whether single batches can be asked for by their indices."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _twin(loader: DataLoader[Any]) -> Any:
    """A dataloader of the same data with workers of its own; the attributes of a DataLoader are frozen."""
    twin = copy.copy(loader)
    # Workers are seeded from the global generator, which this pass seeds.
    vars(twin).update(_iterator=None, persistent_workers=False, generator=None, in_order=True)
    return twin


def _redrawing_twin(loader: DataLoader[Any], indices: list[list[Any]], draws: int, *, probing: bool) -> Any:
    """A dataloader that yields these batches, each as a list of several draws.

    One worker makes all draws of a batch: generators that a dataset holds are in the same state in every worker.
    """
    twin = _twin(loader)
    collate = functools.partial(_collate_draws, loader.collate_fn, draws)
    vars(twin).update(batch_sampler=[batch * draws for batch in indices], collate_fn=collate)
    if probing:
        vars(twin).update(num_workers=min(loader.num_workers, 1))
    return twin


def _collate_draws(collate: Callable[[list[Any]], Any], draws: int, samples: Any) -> list[Any]:
    size = len(samples) // draws
    return [collate(samples[draw * size : (draw + 1) * size]) for draw in range(draws)]


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        return limit
    return length if limit is None else min(length, limit)


def _draws(stochastic: bool | None) -> int:
    return 1 if stochastic is False else _DRAWS
