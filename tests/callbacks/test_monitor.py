import copy
import csv
import logging
import math
import re
import warnings
from functools import partial

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_data,
    make_loader,
    make_trainer,
    mlp,
    sgd,
    wandb_records,
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


def expected_scalars(step):
    """The monitor's formulas once more, in numpy and by definition, from weights and gradients in float64."""
    theta = np.concatenate([w.ravel() for w, _, wd in step.values() if wd > 0])
    g = np.concatenate([g.ravel() for _, g, wd in step.values() if wd > 0])
    pull = np.concatenate([wd * w.ravel() for w, _, wd in step.values() if wd > 0])
    matrices = {name: (w, g) for name, (w, g, _) in step.items() if w.ndim > 1}
    top = {name: np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)[0] for name, (w, _) in matrices.items()}
    norms = {name: np.linalg.norm(w) for name, (w, _) in matrices.items()}
    values = {
        "alignment_minibatch": -(pull @ g) / np.linalg.norm(pull) / np.linalg.norm(g),
        "residual_minibatch": np.linalg.norm(g + pull) / np.linalg.norm(pull),
        "radial_balance": -(theta @ g) / (theta @ pull),
        "implied_weight_decay": -sum((w * g).sum() for w, g in matrices.values()) / sum(n**2 for n in norms.values()),
        "stable_rank": np.mean([(norms[name] / top[name]) ** 2 for name in matrices]),
        "spectral_ratio": np.mean([top[name] / norms[name] for name in matrices]),
    }
    for name, (w, g) in matrices.items():
        cosine = -(w * g).sum() / norms[name] / np.linalg.norm(g)
        values[f"alignment_minibatch/{name}"] = cosine if step[name][2] > 0 else math.nan
        values[f"implied_weight_decay/{name}"] = -(w * g).sum() / norms[name] ** 2
        values[f"frobenius_norm/{name}"] = norms[name]
        values[f"spectral_norm/{name}"] = top[name]
        values[f"stable_rank/{name}"] = (norms[name] / top[name]) ** 2
    return values


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True), 2
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip


NETWORKS = {
    "mlp": (mlp, (6,)),
    "wide mlp": (lambda: mlp((6, 300, 200, 3)), (6,)),  # its spectra are iterated, not exact
    "cnn": (cnn, (2, 5, 5)),
    "transformer": (Transformer, (5, 4)),
}


def grouped(parameters):
    """Matrices decayed in two different ways, vectors not at all."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1]
    return torch.optim.SGD(
        [
            {"params": matrices[:1], "weight_decay": 1e-1},
            {"params": matrices[1:], "weight_decay": 1e-3},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.05,
        momentum=0.9,
    )


@pytest.mark.parametrize("optimizer", [sgd, grouped])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_agree_with_a_float64_recomputation(name, optimizer, accumulate):
    torch.manual_seed(0)
    network, shape = NETWORKS[name]
    logger, recorder = RowLogger(), Recorder()
    trainer = make_trainer(
        logger=logger,
        callbacks=[LowRankMonitor(), recorder],
        gradient_clip_val=1e-3,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(make_classifier(network(), optimizer=optimizer), make_loader(samples=32, shape=shape))
    rows = logger.ours()
    assert [step for step, _ in rows] == list(range(8 // accumulate))
    for (_, row), step in zip(rows, recorder.steps, strict=True):
        expected = expected_scalars(step)
        ratios = {n: np.linalg.norm(g) / np.linalg.norm(w) for n, (w, g, _) in step.items() if w.ndim > 1}
        for key, value in expected.items():
            # Where <W, G> cancels it is exact to 1e-6 of |W| |G|; implied_weight_decay divides it by |W|^2.
            scale = ratios.get(key.split("/")[-1], max(ratios.values())) if "implied" in key else 1
            assert row[f"lowrank/{key}"] == pytest.approx(value, rel=1e-4, abs=1e-6 * scale, nan_ok=True), key
        assert {key.removeprefix("lowrank/") for key in row} == {*expected, "radial_balance_stderr", "norm_spread"}


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


@pytest.mark.parametrize("spectral", ["norm", "full", None])
def test_the_run_is_bit_identical_to_one_without_the_monitor(tmp_path, spectral):
    with_monitor = fit_and_keep(LowRankMonitor(spectral=spectral), tmp_path)
    without = fit_and_keep(None, tmp_path)
    assert with_monitor[0] == without[0]
    assert all(torch.equal(with_monitor[1][name], without[1][name]) for name in without[1])
    assert torch.equal(with_monitor[2], without[2])
    assert with_monitor[3].keys() == without[3].keys()
    assert with_monitor[3]["callbacks"] == without[3]["callbacks"]
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
    finite = {key: value for key, value in last.items() if math.isfinite(value)}
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


def test_radial_balance_is_the_mean_over_the_measured_steps_with_its_standard_error():
    logger, recorder = RowLogger(), Recorder()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(), recorder], log_every_n_steps=6, max_epochs=4)
    trainer.fit(make_classifier(mlp()), make_loader())
    balances = np.array([expected_scalars(step)["radial_balance"] for step in recorder.steps])
    for (step, row), window in zip(logger.ours(), balances.reshape(2, 6), strict=True):
        assert row["lowrank/radial_balance"] == pytest.approx(window.mean(), rel=1e-5), step
        assert row["lowrank/radial_balance_stderr"] == pytest.approx(window.std(ddof=1) / math.sqrt(6), rel=1e-4)


def full_batch(shuffle=False):
    return make_loader(batch_size=24, shuffle=shuffle)


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
    ],
    ids=[
        "one batch", "one shuffled batch", "batch larger than data", "accumulated epoch", "mini-batches",
        "partial accumulation", "window longer than epoch", "uneven last batch", "limited", "with replacement",
        "sampled part", "unknown sampler", "dropped rest", "two loaders",
    ],
)  # fmt: skip
def test_full_batch_keys_exist_only_where_a_step_sees_the_whole_epoch(loader, options, whole):
    logger = RowLogger()
    module = make_classifier(mlp())
    if isinstance(loader(), list):
        own = module.training_step
        module.training_step = lambda batch, batch_idx: own(batch[0], batch_idx)
    make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=3, **options).fit(module, loader())
    row = logger.ours()[-1][1]
    assert ("lowrank/alignment" in row) == ("lowrank/residual" in row) == whole
    assert ("lowrank/alignment/net.0.weight" in row) == whole
    if whole:
        assert row["lowrank/alignment"] == row["lowrank/alignment_minibatch"]


def test_accumulated_epoch_gives_the_full_batch_gradient():
    found = []
    for options, loader in (({"accumulate_grad_batches": 3}, make_loader()), ({}, full_batch())):
        logger = RowLogger()
        make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=1, **options).fit(
            make_classifier(mlp()), loader
        )
        found.append(logger.ours()[0][1])
    assert found[0]["lowrank/alignment"] == pytest.approx(found[1]["lowrank/alignment"], rel=1e-5)


def test_norm_spread_is_that_of_the_chain_and_1_after_full_batch_training_with_decay():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=600, log_every_n_steps=100)
    trainer.fit(make_classifier(mlp()), full_batch())
    rows = [row for _, row in logger.ours()]
    for row in rows:
        norms = [value for key, value in row.items() if key.startswith("lowrank/frobenius_norm/")]
        assert row["lowrank/norm_spread"] == pytest.approx(max(norms) / min(norms), rel=1e-6)
    assert rows[0]["lowrank/norm_spread"] > 1.02
    assert rows[-1]["lowrank/norm_spread"] == pytest.approx(1, abs=1e-3)


def test_norm_spread_is_nan_where_no_rescaling_group_is_found():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=4)
    trainer.fit(make_classifier(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))), make_loader())
    assert all(math.isnan(row["lowrank/norm_spread"]) for _, row in logger.ours())


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
        assert not [key for key in row if "alignment" in key or "residual" in key or "balance" in key]
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
    assert math.isnan(row["lowrank/alignment_minibatch/net.0.weight"])
    assert math.isfinite(row["lowrank/stable_rank"])
    assert "has no weight decay" in caplog.text


def test_maximize_turns_the_gradient_around():
    rows = []
    for maximize in (False, True):
        logger = RowLogger()
        optimizer = partial(torch.optim.SGD, lr=0.01, weight_decay=0.1, maximize=maximize)
        module = make_classifier(mlp(), optimizer=optimizer)
        own, sign = module.training_step, -1 if maximize else 1
        module.training_step = partial(lambda own, sign, batch, batch_idx: sign * own(batch, batch_idx), own, sign)
        make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
        rows.append(logger.ours()[-1][1])
    assert rows[0]["lowrank/radial_balance"] == pytest.approx(rows[1]["lowrank/radial_balance"], rel=1e-6)


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
    trainer = make_trainer(callbacks=[LowRankMonitor(), EarlyStopping("lowrank/alignment", strict=False)])
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'lowrank/alignment', which this run does not measure"):
        trainer.fit(make_classifier(mlp()), make_loader())


def test_a_watched_key_that_comes_late_is_named_before_training():
    trainer = make_trainer(callbacks=[LowRankMonitor(), EarlyStopping("lowrank/norm_spread", strict=False)])
    with pytest.warns(UserWarning, match="first value only after several measured steps"):
        trainer.fit(make_classifier(mlp()), make_loader())


def test_a_watched_key_that_the_run_has_gives_no_warning():
    stopping = EarlyStopping("lowrank/alignment_minibatch/net.0.weight", mode="max")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(workers|LeafSpec)")
        make_trainer(callbacks=[LowRankMonitor(), stopping]).fit(make_classifier(mlp()), make_loader())


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
    monitor = LowRankMonitor()

    class Break(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                monkeypatch.setattr("lightning_lowrank.callbacks._meter.spectral_norm", fail)

    trainer = make_trainer(logger=logger, callbacks=[Break(), monitor])
    with pytest.warns(UserWarning, match="measures no more in this run: no such thing") as caught:
        trainer.fit(make_classifier(mlp()), make_loader())
    assert len([w for w in caught if "measures no more" in str(w.message)]) == 1
    rows = [row for _, row in logger.ours()]
    assert len(rows) == 6
    assert all(math.isnan(value) for row in rows[3:] for value in row.values())
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
    values = [row["lowrank/radial_balance"] for _, row in logger.ours()]
    assert len(values) == 5
    assert [math.isnan(value) for value in values] == [False, False, True, False, False]


def test_closures_are_measured_once_a_step():
    logger = RowLogger()
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    assert [step for step, _ in logger.ours()] == list(range(6))


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


def test_effective_rank_is_that_of_the_weights():
    logger, recorder = RowLogger(), Recorder()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(spectral="full"), recorder], max_epochs=1).fit(
        make_classifier(mlp()), make_loader()
    )
    for (_, row), step in zip(logger.ours(), recorder.steps, strict=True):
        share = np.linalg.svd(step["net.2.weight"][0], compute_uv=False)
        share = share / share.sum()
        assert row["lowrank/effective_rank/net.2.weight"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_two_monitors_need_two_prefixes():
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(), LowRankMonitor(prefix="again")]).fit(
        make_classifier(mlp()), make_loader()
    )
    assert len(logger.ours("lowrank/")) == len(logger.ours("again/")) == 6
    trainer = make_trainer(callbacks=[LowRankMonitor(), LowRankMonitor()])
    with pytest.raises(ValueError, match=re.escape("two LowRankMonitors log under the prefix 'lowrank'")):
        trainer.fit(make_classifier(mlp()), make_loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "positive integer or None, got 0"),
        ({"every_n_steps": 1.5}, "positive integer or None, got 1.5"),
        ({"spectral": "svd"}, "spectral must be one of .*'norm', 'full', None.*, got 'svd'"),
        ({"per_layer": "yes"}, "'auto', True or False, got 'yes'"),
        ({"prefix": ""}, "prefix must be a name"),
        ({"prefix": "a/"}, "prefix must be a name"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankMonitor(**options)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_under_mixed_precision_with_and_without_a_fused_optimizer(fused):
    def row(plugins):
        logger = RowLogger()
        module = make_classifier(
            mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, fused=fused and bool(plugins))
        )
        make_trainer(logger=logger, plugins=plugins, callbacks=[LowRankMonitor()], max_epochs=1).fit(
            module, make_loader()
        )
        return logger.ours()[0][1]

    # bfloat16 would do for the forward pass; the scaler is what is tested.
    scaled = row([MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=1024.0))])
    plain = row([])
    assert scaled["lowrank/residual_minibatch"] == pytest.approx(plain["lowrank/residual_minibatch"], rel=0.02)


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
