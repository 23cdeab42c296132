"""Runs in which what is trained, how often and on how much changes on the way."""

import math
import warnings

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import nn

from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp, sgd


class Manual(lightning.pytorch.LightningModule):
    """Optimizer i steps in the batches that `steps` gives it."""

    def __init__(self, steps):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.steps = steps
        self.nets = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in steps)
        self.seen = -1

    def training_step(self, batch, batch_idx):
        self.seen += 1
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for net, optimizer, steps in zip(self.nets, optimizers, self.steps, strict=True):
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            if steps(self.seen):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1) for net in self.nets]


def test_a_row_comes_at_the_next_step_where_steps_are_rarer_than_batches():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], log_every_n_steps=6, max_epochs=10)
    trainer.fit(Manual([lambda batch: batch % 5 == 1]), make_loader())
    # Batches 1, 6, 11, ...: the first of them at or after the batches 5, 11, 17, 23, 29.
    assert [step for step, _ in logger.ours()] == [6, 11, 21, 26]


def test_alternating_optimizers_both_have_rows_with_the_same_keys():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(every_n_steps=2)], max_epochs=4)
    trainer.fit(Manual([lambda batch: batch % 2 == 0, lambda batch: batch % 2 == 1]), make_loader())
    rows = [row for _, row in logger.ours()]
    assert len({tuple(row) for row in rows}) == 1
    for index in (0, 1):
        key = f"lowrank/optimizer_{index}/frobenius_norm/nets.{index}.weight"
        values = [row[key] for row in rows if math.isfinite(row[key])]
        assert len(values) >= 5
        assert len(set(values)) == len(values)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


def trainable(parameters):
    return sgd([p for p in parameters if p.requires_grad])


def test_layers_that_are_unfrozen_later_have_keys_from_the_first_row():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(), Unfreeze()], max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not to be trained")
        trainer.fit(make_classifier(mlp(), optimizer=trainable), make_loader())
    values = [row["lowrank/frobenius_norm/net.0.weight"] for _, row in logger.ours()]
    assert [math.isnan(value) for value in values] == [True] * 3 + [False] * 6


def test_layers_that_are_not_used_in_the_first_step_have_keys():
    module = make_classifier(mlp())
    module.extra = nn.Linear(6, 3, bias=False)
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(
        module(batch[0]) + (module.extra(batch[0]) if module.global_step else 0), batch[1]
    )
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    values = [row["lowrank/stable_rank/extra.weight"] for _, row in logger.ours()]
    assert [math.isnan(value) for value in values] == [True] + [False] * 5


def test_lazy_layers_are_named_once_they_have_a_shape():
    logger = RowLogger()
    module = make_classifier(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Lazy|uninitialized|lazy)")
        make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(module, make_loader())
    assert math.isfinite(logger.ours()[0][1]["lowrank/stable_rank/net.2.weight"])


def test_full_batch_values_end_where_an_epoch_stops_being_one_step():
    logger = RowLogger()
    module = make_classifier(mlp())
    module.train_dataloader = lambda: make_loader(batch_size=24 if module.current_epoch < 2 else 8)
    trainer = make_trainer(
        logger=logger, callbacks=[LowRankMonitor()], max_epochs=4, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(module)
    for key in ("lowrank/alignment", "lowrank/residual", "lowrank/alignment/net.0.weight"):
        values = [row[key] for _, row in logger.ours()]
        assert [math.isnan(value) for value in values] == [False] * 2 + [True] * 6


def test_full_batch_values_end_where_the_accumulation_changes():
    logger = RowLogger()
    callbacks = [GradientAccumulationScheduler({0: 1, 2: 4}), LowRankMonitor()]
    trainer = make_trainer(logger=logger, callbacks=callbacks, max_epochs=4)
    trainer.fit(make_classifier(mlp()), make_loader(batch_size=24))
    values = [row["lowrank/residual"] for _, row in logger.ours()]
    assert [math.isnan(value) for value in values] == [False, False, True, True]


# On a busy machine the usual budget is used up after a few steps, and spectra wait.
class Compare(lightning.pytorch.Callback):
    """What a callback reads at a check, and the truth at the last optimizer step before it."""

    def __init__(self, key):
        self.monitor = key
        self.read, self.truth, self.now = [], [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        w = pl_module.net[0].weight.detach().double()
        self.now = (
            (w.norm() / torch.linalg.svdvals(w)[0]).item() ** 2 if "stable_rank" in self.monitor else w.norm().item()
        )

    def look(self, trainer):
        self.read.append(trainer.callback_metrics[self.monitor].item())
        self.truth.append(self.now)


@pytest.mark.parametrize("key", ["lowrank/frobenius_norm/net.0.weight", "lowrank/stable_rank/net.0.weight"])
@pytest.mark.parametrize(
    "options", [{"val_check_interval": 0.5}, {"val_check_interval": 5, "check_val_every_n_epoch": None}], ids=str
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_values_are_fresh_at_every_validation(key, options, accumulate):
    class AtValidation(Compare):
        def on_validation_end(self, trainer, pl_module):
            if self.now is not None:
                self.look(trainer)

    compare = AtValidation(key)
    module = make_classifier(mlp())
    module.validation_step = lambda batch, batch_idx: None
    trainer = make_trainer(
        callbacks=[LowRankMonitor(spectral_budget=1.0), compare],
        max_epochs=4,
        log_every_n_steps=50,
        accumulate_grad_batches=accumulate,
        **options,
    )
    trainer.fit(module, make_loader(samples=48), make_loader())
    assert len(compare.read) >= 4
    assert compare.read == pytest.approx(compare.truth, rel=1e-4)


@pytest.mark.parametrize("key", ["lowrank/frobenius_norm/net.0.weight", "lowrank/stable_rank/net.0.weight"])
def test_checkpoints_by_steps_see_the_step_s_own_value(key, tmp_path):
    class AtSave(Compare):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step % 2 == 0:
                self.look(trainer)

    compare = AtSave(key)
    checkpoint = ModelCheckpoint(tmp_path, monitor=key, every_n_train_steps=2, save_top_k=-1)
    make_trainer(
        callbacks=[LowRankMonitor(spectral_budget=1.0), compare, checkpoint],
        log_every_n_steps=50,
        enable_checkpointing=True,
    ).fit(make_classifier(mlp()), make_loader())
    assert compare.read == pytest.approx(compare.truth, rel=1e-4)
    assert len(checkpoint.best_k_models) == 3


@pytest.mark.parametrize(
    ("key", "warned"),
    [("lowrank/stable_rank/q50", False), ("lowrank/stable_rank/net.2.weight", True), ("lowrank/alignment", True)],
)
def test_watched_layer_keys_are_known_before_training(key, warned):
    deep = mlp((6, *[4] * 40, 3))
    trainer = make_trainer(
        callbacks=[LowRankMonitor(gradient="step"), EarlyStopping(key, strict=False, patience=99)], max_epochs=1
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_classifier(deep), make_loader())
    assert any("does not measure" in str(w.message) for w in caught) is warned


def test_patterns_that_match_nothing_are_named():
    with pytest.warns(UserWarning, match=r"include=\['nett.\*'\], exclude=\[\] leave no parameter to measure"):
        make_trainer(callbacks=[LowRankMonitor(include="nett.*")]).fit(make_classifier(mlp()), make_loader())


def test_watching_a_key_without_spectra_measures_none(monkeypatch):
    from lightning_lowrank.callbacks import _spectra

    calls = []
    exact = _spectra.leading
    monkeypatch.setattr(_spectra, "leading", lambda *args: calls.append(1) or exact(*args))
    stopping = EarlyStopping("lowrank/alignment_minibatch", mode="max", patience=99)
    trainer = make_trainer(callbacks=[LowRankMonitor(), stopping], log_every_n_steps=50, max_epochs=4)
    trainer.fit(make_classifier(mlp()), make_loader())
    assert len(calls) == 3  # one per matrix, on the first step


def test_a_resumed_run_has_its_rows_at_the_same_steps(tmp_path):
    whole, resumed = RowLogger(), RowLogger()
    make_trainer(logger=whole, callbacks=[LowRankMonitor()], log_every_n_steps=4, max_epochs=4).fit(
        make_classifier(mlp()), make_loader()
    )
    first = make_trainer(callbacks=[LowRankMonitor()], log_every_n_steps=4, max_epochs=2)
    first.fit(make_classifier(mlp()), make_loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(logger=resumed, callbacks=[LowRankMonitor()], log_every_n_steps=4, max_epochs=4).fit(
        make_classifier(mlp()), make_loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    later = [(step, row["lowrank/stable_rank"]) for step, row in whole.ours() if step >= 6]
    assert [(step, row["lowrank/stable_rank"]) for step, row in resumed.ours()] == later


def test_another_fit_of_the_same_trainer_goes_on():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()])
    module = make_classifier(mlp())
    trainer.fit(module, make_loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, make_loader())
    taus = [row["lowrank/cumulative_decay"] for _, row in logger.ours()]
    assert taus == pytest.approx([0.01 * step for step in range(12)])


def test_a_run_that_resumes_without_the_monitor_s_state_does_not_know_its_decay(tmp_path):
    first = make_trainer()
    first.fit(make_classifier(mlp()), make_loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=4).fit(
        make_classifier(mlp()), make_loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    for _, row in logger.ours():
        for key in ("cumulative_decay", "steps_to_stationarity", "norm_gap_predicted"):
            assert math.isnan(row[f"lowrank/{key}"]), key


def test_steps_skipped_for_overflow_do_not_count_as_decay():
    class Skipped(lightning.pytorch.Callback):
        """Steps that were really taken: the weights have moved."""

        def __init__(self):
            self.taken, self.before = 0, None

        def on_train_batch_start(self, trainer, pl_module, *args):
            self.before = pl_module.net[0].weight.detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.taken += not torch.equal(self.before, pl_module.net[0].weight)

    skipped, monitor, logger = Skipped(), LowRankMonitor(), RowLogger()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    make_trainer(logger=logger, callbacks=[skipped, monitor], plugins=[plugin], max_epochs=20).fit(
        make_classifier(mlp()), make_loader()
    )
    assert 10 < skipped.taken < 50
    assert monitor._optimizers[0].clock.tau() == pytest.approx(0.01 * skipped.taken)
    # The search for groups has not been used up by steps without a finite gradient.
    assert math.isfinite(logger.ours()[-1][1]["lowrank/norm_spread"])


class Stream(torch.utils.data.IterableDataset):
    """Of a length that nobody knows."""

    def __iter__(self):
        return iter([(x, y) for x, y in make_loader(batch_size=1).dataset])


def test_a_pass_over_a_stream_of_unknown_length():
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(gradient="full")]).fit(
        make_classifier(mlp()), torch.utils.data.DataLoader(Stream(), batch_size=8)
    )
    assert len([row for _, row in logger.ours() if math.isfinite(row["lowrank/alignment"])]) == 2


def test_a_pass_that_fails_stops_passes_and_nothing_else():
    module = make_classifier(mlp())
    own, seen = module.training_step, set()

    def once(batch, batch_idx):
        if (module.current_epoch, batch_idx) in seen:
            raise RuntimeError("a second pass")
        seen.add((module.current_epoch, batch_idx))
        return own(batch, batch_idx)

    module.training_step = once
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(gradient="full")], max_epochs=3)
    with pytest.warns(UserWarning, match=r"takes no more passes .*a second pass"):
        trainer.fit(module, make_loader())
    assert all(math.isfinite(row["lowrank/stable_rank"]) for _, row in logger.ours())
    assert all(math.isnan(row["lowrank/alignment"]) for _, row in logger.ours())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Manual([lambda batch: True]), make_loader()), "optimizes manually"),
        (lambda: (make_classifier(mlp()), [make_loader(), make_loader()]), "this run has 2"),
        (
            lambda: (
                make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, weight_decay=0.1, maximize=True)),
                make_loader(),
            ),
            "maximize=True",
        ),
    ],
)
def test_runs_that_no_pass_can_go_over_are_refused_before_training(make, message):
    module, loaders = make()
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[LowRankMonitor(gradient="full")]).fit(module, loaders)


def test_windows_say_once_why_they_have_no_value(caplog):
    fast = make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(callbacks=[LowRankMonitor(window_size=3)], max_epochs=10).fit(fast, make_loader(shuffle=True))
    assert "windows of 3 steps" in caplog.text
    assert caplog.text.count("the weights moved by") == 1


def test_another_module_has_a_decay_of_its_own():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=1)
    first, second = make_classifier(mlp()), make_classifier(mlp(seed=1))
    for epochs, module in ((1, first), (2, first), (3, second)):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, make_loader())
    taus = [row["lowrank/cumulative_decay"] for _, row in logger.ours()]
    assert len(taus) == 9
    assert taus[:6] == sorted(set(taus[:6]))
    assert all(map(math.isnan, taus[6:]))


def test_decoupled_decay_has_no_window(caplog):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, weight_decay=0.1)

    module = make_classifier(mlp(), optimizer=adamw)
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[LowRankMonitor()]).fit(module, make_loader(shuffle=True))
    assert "decays weights beside the gradient" in caplog.text
    assert "windows of" not in caplog.text
