"""How a run draws its batches, against the gradients themselves.

The module's loss is the mean of one weight per sample, so that the gradient is each sample's share in it.
"""

import math
from types import SimpleNamespace

import lightning.pytorch
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_lowrank.sampling import UNKNOWN, Draws, Sampling, Step, step_sees_whole_epoch
from tests.conftest import make_trainer

N = 20


class Shares(lightning.pytorch.LightningModule):
    """Records the sampling that it is told, and the shares of the samples in every step's gradient."""

    def __init__(self, automatic=True):
        super().__init__()
        self.per_sample = torch.nn.Parameter(torch.zeros(N))
        self.automatic_optimization = automatic
        self.steps = []
        self.sampling = self.whole = None

    def training_step(self, batch, batch_idx):
        self.sampling = Sampling.of(self.trainer, self)
        self.whole = step_sees_whole_epoch(self.trainer, self)
        rows = batch[0] if isinstance(batch, (list, tuple)) else batch
        return self.per_sample[rows].mean() if self.automatic_optimization else None

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(self.per_sample.grad.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loader, automatic=True, **options):
    module = Shares(automatic)
    make_trainer(max_epochs=2, **options).fit(module, loader)
    return module


def load(sampler=None, batch_size=4, **options):
    return DataLoader(torch.arange(N), batch_size=batch_size, sampler=sampler, **options)


def random(**options):
    return RandomSampler(range(N), **options)


@pytest.mark.parametrize(
    ("batch_size", "options", "steps", "exact"),
    [
        (4, {}, 5, True),
        (8, {}, 3, True),
        (N, {}, 1, True),
        (50, {}, 1, True),
        (4, {"limit_train_batches": 3}, 3, False),
        (8, {"limit_train_batches": 2}, 2, False),
        (4, {"accumulate_grad_batches": 5}, 1, True),
        (4, {"accumulate_grad_batches": 2}, 3, True),
        (8, {"accumulate_grad_batches": 2}, 2, True),
        (8, {"accumulate_grad_batches": 3}, 1, False),
        (6, {"accumulate_grad_batches": 2}, 2, False),
        (4, {"accumulate_grad_batches": 7}, 1, True),
    ],
)
def test_steps_are_what_the_gradients_are_made_of(batch_size, options, steps, exact):
    module = fit(load(batch_size=batch_size, shuffle=True), **options)
    found = module.sampling
    assert (found.draws, found.population, found.steps) == (Draws.WITHOUT_REPLACEMENT, N, steps)
    assert len(module.steps) == 2 * steps
    for number, shares in enumerate(module.steps):
        step = found.at(number % steps)
        assert step.scale == pytest.approx(shares.sum().item(), rel=1e-5)
        assert step.samples == pytest.approx((shares.sum().square() / shares.square().sum()).item(), rel=1e-5)
    # An epoch is exact if its weighted sum holds every sample equally.
    total = sum(found.at(k).samples / found.at(k).scale * shares for k, shares in enumerate(module.steps[:steps]))
    even = torch.allclose(total, torch.ones(N), rtol=1e-5)
    assert found.epochs_are_exact == even == exact


@pytest.mark.parametrize(
    ("loader", "draws", "population"),
    [
        (lambda: load(), Draws.FIXED_ORDER, N),
        (lambda: load(shuffle=True), Draws.WITHOUT_REPLACEMENT, N),
        (lambda: load(random(num_samples=9)), Draws.WITHOUT_REPLACEMENT, N),
        (lambda: load(random(replacement=True)), Draws.WITH_REPLACEMENT, math.inf),
        (lambda: load(random(replacement=True, num_samples=33)), Draws.WITH_REPLACEMENT, math.inf),
        (lambda: load(WeightedRandomSampler(range(1, N + 1), 12)), Draws.WITH_REPLACEMENT, math.inf),
        (lambda: load(SubsetRandomSampler(range(12))), Draws.WITHOUT_REPLACEMENT, 12),
        (lambda: load(DistributedSampler(range(N), 1, 0)), Draws.WITHOUT_REPLACEMENT, N),
        (lambda: load(DistributedSampler(range(N), 1, 0, shuffle=False)), Draws.FIXED_ORDER, N),
        (lambda: load(batch_size=None, shuffle=True), Draws.WITHOUT_REPLACEMENT, N),
    ],
)
def test_torchs_own_samplers_are_known(loader, draws, population):
    found = fit(loader()).sampling
    assert (found.draws, found.population) == (draws, population)
    assert found.is_known


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(N - 1, -1, -1))

    def __len__(self):
        return N


class Lazy(RandomSampler):
    """A subclass may draw in any way."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(N))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: load(Backwards()),
        lambda: load(Lazy(range(N))),
        lambda: load(random(num_samples=33)),
        lambda: load(WeightedRandomSampler(range(1, N + 1), 12, replacement=False)),
        lambda: load(DistributedSampler(range(N), 2, 0)),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(torch.arange(N), batch_sampler=Own(SequentialSampler(range(N)), 4, False)),
        lambda: [load(), load()],
        lambda: [torch.arange(4), torch.arange(4, 8)],
    ],
    ids=[
        "own sampler", "subclass", "more than one order", "weighted without replacement", "share of a rank",
        "stream", "own batch sampler", "two loaders", "no loader",
    ],
)  # fmt: skip
def test_anything_else_is_unknown(loader):
    module = fit(loader())
    assert module.sampling == UNKNOWN
    assert not module.sampling.is_known
    assert not module.whole


class Own(BatchSampler):
    """A batch sampler of the user's own."""


def test_manual_optimization_is_unknown():
    assert fit(load(shuffle=True), automatic=False).sampling == UNKNOWN


@pytest.mark.parametrize(
    ("loader", "options", "whole"),
    [
        (lambda: load(batch_size=N), {}, True),
        (lambda: load(), {"accumulate_grad_batches": 5}, True),
        (lambda: load(), {"accumulate_grad_batches": 6}, False),
        (lambda: load(SubsetRandomSampler(range(12)), batch_size=12), {}, False),
        (lambda: load(random(replacement=True), batch_size=N), {}, False),
        (lambda: load(batch_size=15, drop_last=True), {}, False),
    ],
)
def test_a_step_that_sees_the_whole_epoch(loader, options, whole):
    assert fit(loader(), **options).whole == whole


def test_dropped_rests_are_not_exact_but_known():
    found = fit(load(batch_size=6, shuffle=True, drop_last=True)).sampling
    assert (found.steps, found.step, found.last, found.population) == (3, Step(6.0), Step(6.0), N)
    assert found.is_known
    assert not found.epochs_are_exact
    fixed = fit(load(batch_size=6, drop_last=True)).sampling
    assert not fixed.is_known  # the same samples are left out in every epoch


def ranked(sampler, ranks, batch_size=3):
    """The sampling of one rank of several; no processes are started."""
    loader = load(sampler, batch_size=batch_size)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(_combined_loader=SimpleNamespace(flattened=[loader])),
        num_training_batches=len(loader),
        accumulate_grad_batches=1,
        world_size=ranks,
        strategy=SimpleNamespace(handles_gradient_accumulation=False),
    )
    return Sampling.of(trainer, SimpleNamespace(automatic_optimization=True))


@pytest.mark.parametrize(
    ("options", "draws", "last", "population", "exact"),
    [
        ({"num_replicas": 2}, Draws.WITHOUT_REPLACEMENT, 2, N, True),
        ({"num_replicas": 2, "shuffle": False}, Draws.FIXED_ORDER, 2, N, True),
        # 7 each: one of the 21 comes twice.
        ({"num_replicas": 3}, Draws.WITHOUT_REPLACEMENT, 3, 21, True),
        ({"num_replicas": 3, "shuffle": False}, Draws.FIXED_ORDER, 3, N, False),
        ({"num_replicas": 3, "drop_last": True}, Draws.WITHOUT_REPLACEMENT, 9, N, False),
    ],
)
def test_ranks_share_an_epoch(options, draws, last, population, exact):
    ranks = options["num_replicas"]
    found = ranked(DistributedSampler(range(N), rank=0, **options), ranks)
    assert (found.draws, found.population, found.epochs_are_exact) == (draws, population, exact)
    assert found.step.samples == pytest.approx(3 * ranks)
    assert found.last.samples == pytest.approx(last)


def test_ranks_that_draw_by_themselves_are_unknown():
    assert ranked(random(), 2) == UNKNOWN


@pytest.mark.parametrize(
    ("draws", "samples", "steps", "size"),
    [
        (Draws.WITHOUT_REPLACEMENT, 20, 5, 50),
        (Draws.WITHOUT_REPLACEMENT, 1200, 300, 300),
        (Draws.WITHOUT_REPLACEMENT, 8000, 2000, 500),
        (Draws.FIXED_ORDER, 8000, 2000, 2000),
        (Draws.WITH_REPLACEMENT, math.inf, 300, 500),
    ],
)
def test_windows_are_whole_epochs_where_that_helps(draws, samples, steps, size):
    assert Sampling(draws, samples, steps, steps, Step(4), Step(4)).window_size == size
