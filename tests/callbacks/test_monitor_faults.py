"""What goes wrong in a run never ends it and never becomes a wrong number."""

import math

import lightning.pytorch
import pytest
import torch

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_loader,
    make_trainer,
    mlp,
)


def poison_weights(module, step):
    if step == 2:
        with torch.no_grad():
            module.net[0].weight[0, 0] = math.nan


def poison_gradients(module, step):
    if step == 2:
        module.net[0].weight.grad[0, 0] = math.inf


@pytest.mark.parametrize("poison", [poison_weights, poison_gradients])
def test_non_finite_weights_or_gradients_give_nan_and_never_end_the_run(poison):
    class Poison(lightning.pytorch.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            poison(pl_module, trainer.global_step)

    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[Poison(), LowRankMonitor()])
    trainer.fit(make_classifier(mlp()), make_loader())
    rows = [row for _, row in logger.ours()]
    assert len(rows) == 6
    assert math.isnan(rows[2]["lowrank/alignment_minibatch"])
    assert not any(math.isinf(value) for row in rows for value in row.values())
    assert math.isfinite(trainer.callback_metrics["lowrank/alignment_minibatch"])


def test_a_failing_measurement_warns_once_and_leaves_nan(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such thing")

    logger = RowLogger()
    monitor = LowRankMonitor(spectral_budget=1.0)

    class Break(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                monkeypatch.setattr("lightning_lowrank.callbacks._spectra.leading", fail)

    trainer = make_trainer(logger=logger, callbacks=[Break(), monitor])
    with pytest.warns(UserWarning, match="measures no more in this run: no such thing") as caught:
        trainer.fit(make_classifier(mlp()), make_loader())
    assert len([w for w in caught if "measures no more" in str(w.message)]) == 1
    rows = [row for _, row in logger.ours()]
    assert len(rows) == 6
    assert all(math.isnan(value) for row in rows[3:] for key, value in row.items() if key != "lowrank/overhead")
    assert rows[5].keys() == rows[0].keys()


def test_a_raising_logger_never_ends_the_run():
    class Raising(RowLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("lowrank/") for key in metrics):
                raise OSError("disk full")

    trainer = make_trainer(logger=Raising(), callbacks=[LowRankMonitor()])
    with pytest.warns(UserWarning, match="Raising could not take a row: OSError") as caught:
        trainer.fit(make_classifier(mlp()), make_loader())
    assert trainer.global_step == 6
    assert len([w for w in caught if "could not take" in str(w.message)]) == 1


def test_training_step_that_returns_none_is_passed_over():
    logger = RowLogger()
    module = make_classifier(mlp())
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx) if batch_idx else None
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    assert [step for step, _ in logger.ours()] == [1, 2, 4, 5]
    assert all(math.isfinite(row["lowrank/radial_balance"]) for _, row in logger.ours())


def test_closures_are_measured_once_a_step():
    logger = RowLogger()
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    assert [step for step, _ in logger.ours()] == list(range(6))


def test_a_failure_before_training_never_ends_the_run(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("lightning_lowrank.callbacks.monitor.step_sees_whole_epoch", fail)
    trainer = make_trainer(logger=RowLogger(), callbacks=[LowRankMonitor()])
    with pytest.warns(UserWarning, match="measures no more in this run: no such thing") as caught:
        trainer.fit(make_classifier(mlp()), make_loader())
    assert trainer.global_step == 6
    assert len([w for w in caught if "measures no more" in str(w.message)]) == 1
