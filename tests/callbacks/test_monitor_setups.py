"""Ways to train that are more than options of a Trainer: the values are there, and the run is as without them."""

import math
import warnings

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp, sgd

MODES = ["step", "window", "full"]


class Embedded(nn.Module):
    """Words are the signs of the inputs."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(2, 8, sparse=True)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.head(self.words((x > 0).long()).mean(1))


class Configured(lightning.pytorch.LightningModule):
    """Has no layers before the Trainer asks for them."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = mlp()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.parameters())


def sparse():
    torch.manual_seed(0)
    return make_classifier(Embedded(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))


def averaged():
    return {"callbacks": [EMAWeightAveraging(decay=0.9)]}


SETUPS = {
    "sparse gradients": (sparse, dict),
    "configure_model": (Configured, dict),
    "averaged weights": (lambda: make_classifier(mlp()), averaged),
    "validation between": (lambda: make_classifier(mlp()), lambda: {"val_check_interval": 1}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SETUPS)
def test_values_are_measured_and_the_run_is_bit_identical(name, mode):
    make, options = SETUPS[name]
    weights = []
    for monitored in (True, False):
        lightning.pytorch.seed_everything(0, verbose=False)
        module, logger, others = make(), RowLogger(), options()
        if name == "validation between":
            module.validation_step = lambda batch, batch_idx: None
        monitor = [LowRankMonitor(gradient=mode, window_size=3)] if monitored else []
        trainer = make_trainer(
            logger=logger, max_epochs=4, **{**others, "callbacks": [*monitor, *others.get("callbacks", [])]}
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="LowRankMonitor.*")
            validation = [make_loader(seed=1)] if name == "validation between" else []
            trainer.fit(module, make_loader(shuffle=True), *validation)
        weights.append([p.detach().clone() for p in module.parameters()])
        if monitored:
            assert len(logger.ours()) == 12
            assert all(math.isfinite(row["lowrank/implied_weight_decay"]) for _, row in logger.ours())
            assert all(math.isfinite(row["lowrank/stable_rank"]) for _, row in logger.ours())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_finders_leave_no_rows_and_the_run_starts_from_nothing(tmp_path):
    logger = RowLogger()
    module = make_classifier(mlp())
    module.lr = 0.1
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(weights_only|num_training)")
        Tuner(trainer).lr_find(module, make_loader(), num_training=5, update_attr=False)
    assert logger.ours() == []
    trainer.fit(module, make_loader())
    assert logger.ours()[0][1]["lowrank/cumulative_decay"] == 0


def test_nothing_is_measured_where_nothing_is_trained():
    logger = RowLogger()
    module = make_classifier(mlp())
    module.validation_step = lambda batch, batch_idx: None
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).validate(module, make_loader(), verbose=False)
    module = make_classifier(mlp())
    module.configure_optimizers = lambda: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no optimizer")
        make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    assert logger.ours() == []


def test_two_trainers_in_one_process_take_turns():
    """One run inside another: each monitor speaks of its own."""
    inner, outer = RowLogger(), RowLogger()

    class Nested(lightning.pytorch.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                make_trainer(logger=inner, callbacks=[LowRankMonitor()]).fit(
                    make_classifier(mlp(seed=1)), make_loader(seed=1)
                )

    make_trainer(logger=outer, callbacks=[Nested(), LowRankMonitor()]).fit(make_classifier(mlp()), make_loader())
    for logger, seed in ((inner, 1), (outer, 0)):
        assert len(logger.ours()) == 6
        expected = mlp(seed=seed)[0].weight.norm().item()
        assert logger.ours()[0][1]["lowrank/frobenius_norm/net.0.weight"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_whose_shape_changes_ends_the_measuring_and_not_the_run(mode):
    class Prune(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                net = pl_module.net
                net[0].weight.data, net[2].weight.data = net[0].weight.data[:8], net[2].weight.data[:, :8]
                net.zero_grad()

    logger = RowLogger()
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    trainer = make_trainer(logger=logger, callbacks=[Prune(), LowRankMonitor(gradient=mode, window_size=3)])
    with pytest.warns(UserWarning, match="measures no more in this run") as caught:
        trainer.fit(module, make_loader())
    assert trainer.global_step == 6
    assert len([w for w in caught if "LowRankMonitor" in str(w.message)]) == 1
    later = [row for step, row in logger.ours() if step >= 3]
    assert all(math.isnan(v) for row in later for key, v in row.items() if key != "lowrank/overhead")
