"""Values that the matrix of set-ups does not reach: means over many steps, a run to the end, the full spectrum."""

import math

import lightning.pytorch
import numpy as np
import pytest
from torch import nn

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_loader,
    make_trainer,
    mlp,
)


class Recorder(lightning.pytorch.Callback):
    """What the optimizer sees, kept by a callback that runs after the monitor."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        self.steps.append(
            {
                name: (p.detach().double().numpy().copy(), p.grad.double().numpy().copy(), decays[id(p)])
                for name, p in pl_module.named_parameters()
            }
        )


def radial_balance(step):
    """By definition, from weights and gradients in float64."""
    decayed = [(w.ravel(), g.ravel(), wd) for w, g, wd in step.values() if wd > 0]
    return -sum(w @ g for w, g, _ in decayed) / sum(wd * w @ w for w, _, wd in decayed)


def test_radial_balance_is_the_mean_over_the_measured_steps_with_its_standard_error():
    logger, recorder = RowLogger(), Recorder()
    trainer = make_trainer(
        logger=logger, callbacks=[LowRankMonitor(spectral_budget=1.0), recorder], log_every_n_steps=6, max_epochs=4
    )
    trainer.fit(make_classifier(mlp()), make_loader())
    balances = np.array([radial_balance(step) for step in recorder.steps])
    for (step, row), window in zip(logger.ours(), balances.reshape(2, 6), strict=True):
        assert row["lowrank/radial_balance"] == pytest.approx(window.mean(), rel=1e-5), step
        assert row["lowrank/radial_balance_stderr"] == pytest.approx(window.std(ddof=1) / math.sqrt(6), rel=1e-4)


def test_norm_spread_is_that_of_the_chain_and_1_after_full_batch_training_with_decay():
    logger = RowLogger()
    trainer = make_trainer(
        logger=logger, callbacks=[LowRankMonitor(spectral_budget=1.0)], max_epochs=600, log_every_n_steps=100
    )
    trainer.fit(make_classifier(mlp()), make_loader(batch_size=24))
    rows = [row for _, row in logger.ours()]
    for row in rows:
        norms = [value for key, value in row.items() if key.startswith("lowrank/frobenius_norm/")]
        assert row["lowrank/norm_spread"] == pytest.approx(max(norms) / min(norms), rel=1e-6)
    assert rows[0]["lowrank/norm_spread"] > 1.02
    assert rows[-1]["lowrank/norm_spread"] == pytest.approx(1, abs=1e-3)


def test_norm_spread_is_nan_where_no_rescaling_group_is_found():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(spectral_budget=1.0)], max_epochs=4)
    trainer.fit(make_classifier(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))), make_loader())
    assert all(math.isnan(row["lowrank/norm_spread"]) for _, row in logger.ours())


def test_effective_rank_is_that_of_the_weights():
    logger, recorder = RowLogger(), Recorder()
    make_trainer(
        logger=logger, callbacks=[LowRankMonitor(spectral="full", spectral_budget=1.0), recorder], max_epochs=1
    ).fit(make_classifier(mlp()), make_loader())
    for (_, row), step in zip(logger.ours(), recorder.steps, strict=True):
        share = np.linalg.svd(step["net.2.weight"][0], compute_uv=False)
        share = share / share.sum()
        assert row["lowrank/effective_rank/net.2.weight"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
