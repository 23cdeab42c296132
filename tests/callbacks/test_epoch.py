"""When does one optimizer step see the whole epoch?"""

import pytest
import torch

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_data,
    make_loader,
    make_trainer,
    mlp,
)


def full_batch(shuffle=False):
    return make_loader(batch_size=24, shuffle=shuffle)


class Stream(torch.utils.data.IterableDataset):
    """As many samples as there are, of a length that is not known."""

    def __iter__(self):
        return iter(make_data())


def with_sampler(sampler, **options):
    return torch.utils.data.DataLoader(make_data(), batch_size=24, sampler=sampler, **options)


@pytest.mark.parametrize(
    ("loader", "options", "whole"),
    [
        (full_batch, {}, True),
        (lambda: full_batch(shuffle=True), {}, True),
        (lambda: make_loader(batch_size=100), {}, True),
        (make_loader, {"accumulate_grad_batches": 3}, True),
        (make_loader, {}, False),
        (make_loader, {"accumulate_grad_batches": 2}, False),
        (make_loader, {"accumulate_grad_batches": 4}, False),
        (lambda: make_loader(samples=23), {"accumulate_grad_batches": 3}, False),
        (make_loader, {"limit_train_batches": 1}, False),
        (lambda: with_sampler(torch.utils.data.RandomSampler(make_data(), replacement=True)), {}, False),
        (lambda: with_sampler(torch.utils.data.RandomSampler(make_data(), num_samples=12)), {}, False),
        (lambda: with_sampler(torch.utils.data.SubsetRandomSampler(range(12))), {}, False),
        (lambda: torch.utils.data.DataLoader(make_data(samples=25), batch_size=24, drop_last=True), {}, False),
        (lambda: [full_batch(), full_batch()], {}, False),
        (lambda: torch.utils.data.DataLoader(Stream(), batch_size=24), {"limit_train_batches": 1}, False),
    ],
    ids=[
        "one batch", "one shuffled batch", "batch larger than data", "accumulated epoch", "mini-batches",
        "partial accumulation", "window longer than epoch", "uneven last batch", "limited", "with replacement",
        "sampled part", "unknown sampler", "dropped rest", "two loaders", "stream",
    ],
)  # fmt: skip
def test_full_batch_keys_exist_only_where_a_step_sees_the_whole_epoch(loader, options, whole):
    logger = RowLogger()
    module = make_classifier(mlp())
    if isinstance(loader(), list):
        own = module.training_step
        module.training_step = lambda batch, batch_idx: own(batch[0], batch_idx)
    make_trainer(logger=logger, callbacks=[LowRankMonitor(gradient="step")], max_epochs=3, **options).fit(
        module, loader()
    )
    row = logger.ours()[-1][1]
    assert ("lowrank/alignment" in row) == ("lowrank/residual" in row) == whole
    assert ("lowrank/alignment/net.0.weight" in row) == whole
    if whole:
        assert row["lowrank/alignment"] == row["lowrank/alignment_minibatch"]


def test_accumulated_epoch_gives_the_full_batch_gradient():
    found = []
    for options, loader in (({"accumulate_grad_batches": 3}, make_loader()), ({}, full_batch())):
        logger = RowLogger()
        make_trainer(logger=logger, callbacks=[LowRankMonitor(gradient="step")], max_epochs=1, **options).fit(
            make_classifier(mlp()), loader
        )
        found.append(logger.ours()[0][1])
    assert found[0]["lowrank/alignment"] == pytest.approx(found[1]["lowrank/alignment"], rel=1e-5)
