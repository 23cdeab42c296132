"""Where the numbers go, when, and under which keys."""

import copy
import csv
import logging
import math
import warnings

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_loader,
    make_trainer,
    mlp,
    wandb_records,
)


def fit_and_keep(monitor, tmp_path, **options):
    """Train with dropout, shuffling and validation; the weights, losses, random state and checkpoint of the run."""
    lightning.pytorch.seed_everything(0, verbose=False)
    module = make_classifier(nn.Sequential(mlp(), nn.Dropout(0.2)))
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", module.training_step(batch, batch_idx))
    module.losses = []
    module.on_train_batch_end = lambda outputs, *_: module.losses.append(outputs["loss"].item())
    trainer = make_trainer(callbacks=[monitor] if monitor else [], max_epochs=3, **options)
    trainer.fit(module, make_loader(shuffle=True), make_loader(seed=1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=False)
    return module.losses, module.state_dict(), torch.get_rng_state(), checkpoint


@pytest.mark.parametrize("gradient", ["step", "window", "full"])
@pytest.mark.parametrize("spectral", ["norm", "full", None])
def test_the_run_is_bit_identical_to_one_without_the_monitor(tmp_path, spectral, gradient):
    with_monitor = fit_and_keep(LowRankMonitor(spectral=spectral, gradient=gradient), tmp_path)
    without = fit_and_keep(None, tmp_path)
    assert with_monitor[0] == without[0]
    assert all(torch.equal(with_monitor[1][name], without[1][name]) for name in without[1])
    assert torch.equal(with_monitor[2], without[2])
    assert with_monitor[3].keys() == without[3].keys()
    kept = {key: state for key, state in with_monitor[3]["callbacks"].items() if "LowRankMonitor" not in key}
    assert kept == without[3]["callbacks"]
    assert str(with_monitor[3]["optimizer_states"]) == str(without[3]["optimizer_states"])


def test_every_namespace_and_every_logger(namespace, tmp_path):
    loggers = namespace.loggers
    used = [
        loggers.CSVLogger(tmp_path, name="csv"),
        loggers.TensorBoardLogger(tmp_path, name="tb"),
        loggers.WandbLogger(save_dir=tmp_path, offline=True, project="test"),
    ]
    trainer = make_trainer(namespace, logger=used, callbacks=[LowRankMonitor()], log_every_n_steps=2)
    trainer.fit(make_classifier(mlp(), namespace), make_loader())
    run = used[2].experiment
    run.finish()
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["lowrank/radial_balance"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    assert all(float(row["lowrank/alignment_minibatch"]) <= 1 for row in rows)
    records = wandb_records(run)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    of_wandb = [item for item in history if "lowrank/radial_balance" in item]
    assert [item["trainer/global_step"] for item in of_wandb] == [1, 3, 5]
    for row, item in zip(rows, of_wandb, strict=True):
        assert item["lowrank/radial_balance"] == pytest.approx(float(row["lowrank/radial_balance"]))
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert ("lowrank/*", "trainer/global_step") in [(m.get("glob_name"), m.get("step_metric")) for m in metrics]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(used[1].log_dir).Reload()
    assert [e.step for e in events.Scalars("lowrank/stable_rank/net.0.weight")] == [1, 3, 5]


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_runs_without_loggers(options):
    trainer = make_trainer(callbacks=[LowRankMonitor()], **({"log_every_n_steps": None} | options))
    if "barebones" in options:
        trainer = lightning.pytorch.Trainer(
            barebones=True, accelerator="cpu", callbacks=[LowRankMonitor()], max_epochs=1
        )
    module = make_classifier(mlp())
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module(batch[0]), batch[1])
    trainer.fit(module, make_loader())
    assert math.isfinite(trainer.callback_metrics["lowrank/radial_balance"])


def test_callback_metrics_hold_the_last_finite_values():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()])
    trainer.fit(make_classifier(mlp()), make_loader())
    last = logger.ours()[-1][1]
    finite = {key: value for key, value in last.items() if math.isfinite(value) and "overhead" not in key}
    assert len(finite) > 10
    for key, value in finite.items():
        assert trainer.callback_metrics[key].item() == pytest.approx(value, rel=1e-6), key


def test_rows_come_at_the_logging_interval_or_the_own_one_with_the_same_keys():
    for options, interval, expected in (({"log_every_n_steps": 4}, None, [3, 7, 11]), ({}, 5, [4, 9])):
        logger = RowLogger()
        trainer = make_trainer(
            logger=logger, max_epochs=4, callbacks=[LowRankMonitor(every_n_steps=interval)], **options
        )
        trainer.fit(make_classifier(mlp()), make_loader())
        rows = logger.ours()
        assert [step for step, _ in rows] == expected
        assert len({tuple(row) for _, row in rows}) == 1


DECOUPLED = [
    lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
    lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
    lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
    lambda p: torch.optim.Muon(list(p), weight_decay=0.1),
]


class OwnSGD(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [*DECOUPLED, lambda p: OwnSGD(p, weight_decay=0.1)])
def test_no_coupled_values_under_other_optimizers_and_it_is_said_once(optimizer, caplog):
    logger = RowLogger()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(
            make_classifier(mlp(), optimizer=optimizer), make_loader()
        )
    for _, row in logger.ours():
        assert not [key for key in row if "minibatch" in key or "balance" in key or "lowrank/alignment" in key]
        assert math.isfinite(row["lowrank/implied_weight_decay"])
    assert caplog.text.count("left out") == 1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad])
def test_coupled_optimizers_have_coupled_values(optimizer):
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(
        make_classifier(mlp(), optimizer=lambda p: optimizer(p, weight_decay=0.1)), make_loader()
    )
    assert math.isfinite(logger.ours()[0][1]["lowrank/residual_minibatch"])


def test_without_decay_the_values_are_nan_and_it_is_said(caplog):
    logger = RowLogger()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(
            make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), make_loader()
        )
    row = logger.ours()[-1][1]
    assert all(math.isnan(row[f"lowrank/{key}"]) for key in ("alignment_minibatch", "residual_minibatch"))
    assert math.isnan(row["lowrank/alignment/net.0.weight"])
    assert math.isfinite(row["lowrank/stable_rank"])
    assert "has no weight decay" in caplog.text


def test_early_stopping_and_checkpoints_on_our_keys_find_them(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lowrank/residual_minibatch", save_top_k=1)
    stopping = EarlyStopping("lowrank/radial_balance", mode="max", patience=100)
    trainer = make_trainer(
        callbacks=[LowRankMonitor(), stopping, checkpoint],
        max_epochs=4,
        log_every_n_steps=50,
        enable_checkpointing=True,
    )
    module = make_classifier(mlp())
    module.validation_step = lambda batch, batch_idx: None
    trainer.fit(module, make_loader(), make_loader())
    assert trainer.current_epoch == 4
    assert math.isfinite(checkpoint.best_model_score)
    assert stopping.wait_count < 4


def test_monitored_values_are_fresh_at_every_check_although_rows_are_rare():
    seen = []

    class Look(lightning.pytorch.Callback):
        monitor = "lowrank/radial_balance"

        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics[self.monitor].item())

    module = make_classifier(mlp())
    module.validation_step = lambda batch, batch_idx: None
    trainer = make_trainer(
        callbacks=[LowRankMonitor(), Look()], max_epochs=3, log_every_n_steps=50,
        num_sanity_val_steps=0,
        val_check_interval=0.5,
    )  # fmt: skip
    trainer.fit(module, make_loader(samples=32), make_loader())
    assert len(set(seen)) == 6


def test_a_watched_key_that_the_run_will_not_have_is_named_before_training():
    monitor = LowRankMonitor(gradient="step")
    trainer = make_trainer(callbacks=[monitor, EarlyStopping("lowrank/alignment", strict=False)])
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'lowrank/alignment', which this run does not measure"):
        trainer.fit(make_classifier(mlp()), make_loader())


@pytest.mark.parametrize("key", ["alignment", "norm_spread", "norm_gap", "radial_balance_stderr", "cumulative_decay"])
@pytest.mark.parametrize("validate", [False, True])
def test_nothing_stops_or_raises_because_a_watched_key_comes_late(key, validate, tmp_path):
    """Three batches an epoch, rows every 50 steps, windows of 51 steps."""
    stopping = EarlyStopping(f"lowrank/{key}", mode="max", patience=100)
    checkpoint = ModelCheckpoint(tmp_path, monitor=f"lowrank/{key}", mode="max")
    seen = []
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-4, weight_decay=1e-2))
    if validate:
        module.validation_step = lambda batch, batch_idx: None
    module.on_train_epoch_end = lambda: seen.append(trainer.callback_metrics.get(f"lowrank/{key}"))
    trainer = make_trainer(
        callbacks=[stopping, LowRankMonitor(), checkpoint],
        max_epochs=20,
        log_every_n_steps=50,
        enable_checkpointing=True,
        num_sanity_val_steps=2,
    )
    loaders = [make_loader(shuffle=True), *([make_loader(seed=1)] if validate else [])]
    trainer.fit(module, *loaders)
    assert trainer.current_epoch == 20
    assert math.isfinite(seen[-1])
    assert math.isfinite(stopping.best_score)
    assert math.isfinite(checkpoint.best_model_score)
    assert "_run_early_stopping_check" not in vars(stopping)


def test_a_watched_key_that_the_run_has_gives_no_warning():
    stopping = EarlyStopping("lowrank/frobenius_norm/net.0.weight", mode="max", patience=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[LowRankMonitor(), stopping]).fit(make_classifier(mlp()), make_loader())
    assert math.isfinite(stopping.best_score)
    assert not [w for w in caught if "monitors" in str(w.message)]


class TwoOptimizers(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)

    def training_step(self, batch, batch_idx):
        for index, (net, optimizer) in enumerate(zip((self.one, self.two), self.optimizers(), strict=True)):
            if index and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1) for net in (self.one, self.two)]


def test_several_optimizers_have_a_section_each_and_one_row_a_step():
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(TwoOptimizers(), make_loader())
    rows = logger.ours()
    assert len({step for step, _ in rows}) == len(rows) == 6
    assert len({tuple(row) for _, row in rows}) == 1
    assert "lowrank/optimizer_0/alignment_minibatch/one.weight" in rows[0][1]
    assert "lowrank/optimizer_1/alignment_minibatch/one.weight" not in rows[0][1]
    skipped = [math.isnan(row["lowrank/optimizer_1/radial_balance"]) for _, row in rows]
    assert skipped == [False, True, False, False, True, False]


def test_many_layers_become_quantiles():
    deep = mlp((6, *[4] * 40, 3))
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=1).fit(make_classifier(deep), make_loader())
    row = logger.ours()[0][1]
    assert not [key for key in row if key.endswith(".weight")]
    norms = [p.norm().item() for p in mlp((6, *[4] * 40, 3)).parameters()]
    assert row["lowrank/frobenius_norm/q50"] == pytest.approx(np.median(norms), rel=1e-5)
    assert row["lowrank/frobenius_norm/q10"] == pytest.approx(np.quantile(norms, 0.1), rel=1e-5)


def test_per_layer_spectral_include_and_exclude_choose_the_keys():
    def keys(**options):
        logger = RowLogger()
        make_trainer(logger=logger, callbacks=[LowRankMonitor(**options)], max_epochs=1).fit(
            make_classifier(mlp()), make_loader()
        )
        return set(logger.ours(options.get("prefix", "lowrank"))[0][1])

    assert not [key for key in keys(per_layer=False) if "net." in key]
    assert not [key for key in keys(spectral=None) if "rank" in key.split("/", 1)[1] or "spectral" in key]
    assert "lowrank/effective_rank/net.0.weight" in keys(spectral="full")
    layers = {key.split("/")[-1] for key in keys(include="net.[02]*", exclude=["net.2.*"]) if "net." in key}
    assert layers == {"net.0.weight"}
    assert all(key.startswith("mine/") for key in keys(prefix="mine"))


def test_two_monitors_need_two_prefixes():
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(), LowRankMonitor(prefix="again")]).fit(
        make_classifier(mlp()), make_loader()
    )
    assert len(logger.ours("lowrank/")) == len(logger.ours("again/")) == 6
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LowRankMonitor`"):
        make_trainer(callbacks=[LowRankMonitor(), LowRankMonitor()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "positive integer or None, got 0"),
        ({"every_n_steps": 1.5}, "positive integer or None, got 1.5"),
        ({"spectral": "svd"}, "spectral must be one of .*'norm', 'full', None.*, got 'svd'"),
        ({"per_layer": "yes"}, r"per_layer must be one of .'auto', True, False., got 'yes'"),
        ({"gradient": "batch"}, "gradient must be one of .*'auto'.*, got 'batch'"),
        ({"window_size": 0}, "window_size must be a positive integer or None, got 0"),
        ({"window_stride": -1}, "window_stride must be a positive integer, got -1"),
        ({"window_rest": -1}, "window_rest must be an integer of at least 0 or None, got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a positive integer, got 0"),
        ({"weight_decay": -1.0}, "weight_decay must be 'auto' or a number of at least 0, got -1.0"),
        ({"loss_penalty": math.nan}, "loss_penalty must be a number of at least 0, got nan"),
        ({"initialization_share": 1.0}, "between 0 and 1, got 1.0"),
        ({"prefix": ""}, "prefix must be a name"),
        ({"prefix": "a/"}, "prefix must be a name"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankMonitor(**options)


def test_compiled_submodules_tied_and_frozen_parameters_have_their_own_names_once():
    net = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)
    )
    net[2].weight = net[0].weight
    net[3].weight.requires_grad_(False)
    module = make_classifier(torch.compile(net, backend="eager"))
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=1).fit(module, make_loader())
    layers = [key for key in logger.ours()[0][1] if key.startswith("lowrank/frobenius_norm/")]
    assert layers == ["lowrank/frobenius_norm/net.0.weight"]


def test_the_monitor_can_be_copied_and_reused():
    monitor = LowRankMonitor()
    for _ in range(2):
        logger = RowLogger()
        make_trainer(logger=logger, callbacks=[monitor]).fit(make_classifier(mlp()), make_loader())
        assert len(logger.ours()) == 6
    assert copy.deepcopy(monitor).prefix == "lowrank"
