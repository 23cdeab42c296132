"""Does one optimizer step see the whole epoch? Only then is its gradient the full-batch gradient."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_lowrank._compat import LightningModule, Trainer, train_dataloaders


def step_sees_whole_epoch(trainer: Trainer, module: LightningModule) -> bool:
    """Whether every optimizer step of this fit uses every training sample exactly once, with equal weight.

    Answers yes only where it can be known: automatic optimization, one DataLoader with one of torch's own samplers, and
    as many batches as are accumulated. ``limit_train_batches``, ``drop_last``, sampling with replacement, a partial
    accumulation window (Lightning divides it by the full window's length) and unknown iterables are all a no.
    """
    loaders = train_dataloaders(trainer)
    if len(loaders) != 1 or not module.automatic_optimization:
        return False
    batches = trainer.num_training_batches
    if batches != trainer.accumulate_grad_batches:
        return False
    loader = loaders[0]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return len(loader) == batches and _covers_dataset(loader)


def _covers_dataset(loader: DataLoader[Any]) -> bool:
    """Whether one pass over the loader yields every sample of its dataset once, in batches of one size."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    sampler = loader.sampler
    if type(sampler) is RandomSampler:
        complete = not sampler.replacement and sampler.num_samples == size
    elif type(sampler) is DistributedSampler:
        # Uneven shares are padded with repeated samples, or cut short.
        complete = size % sampler.num_replicas == 0
        size //= sampler.num_replicas
    else:
        complete = type(sampler) is SequentialSampler
    if not complete:
        return False
    if loader.batch_size is None:
        # Automatic batching is off, or a batch sampler of the user's own decides.
        return loader.batch_sampler is None and size == 1
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    return len(loader) * loader.batch_size == size or (len(loader) == 1 and not loader.drop_last)
