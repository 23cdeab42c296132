"""Values in the Trainer's progress bar, which are opt-in."""

import math

import pytest
import torch
from torch import nn

from lightning_lowrank import LowRankMonitor
from lightning_lowrank.callbacks._outlets import show
from tests.conftest import make_classifier, make_loader, make_trainer, make_two_optimizers, mlp


def bars(namespace):
    return [namespace.callbacks.TQDMProgressBar, namespace.callbacks.RichProgressBar]


def fit(namespace, bar, optimizer=None, **options):
    """What the bar showed after each batch, and the Trainer."""
    shown = []

    class Bar(bar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            shown.append(dict(self.get_metrics(trainer, pl_module)))

    module = make_classifier(nn.Sequential(mlp()), namespace, optimizer)
    trainer = make_trainer(
        namespace, callbacks=[LowRankMonitor(**options), Bar()], enable_progress_bar=True, max_epochs=3
    )
    # One step sees the whole epoch, so that full-batch values exist.
    trainer.fit(module, make_loader(batch_size=24))
    return shown, trainer, module


@pytest.mark.parametrize("index", [0, 1])
def test_alignment_and_residual_appear_in_the_bar(namespace, index, capsys):
    shown, trainer, _ = fit(namespace, bars(namespace)[index], progress_bar=True)
    for key in ("alignment", "residual"):
        assert shown[-1][key] == pytest.approx(trainer.callback_metrics[f"lowrank/{key}"].item())
        assert len({one[key] for one in shown}) == 3
    printed = capsys.readouterr()
    if index == 0:
        assert "alignment=" in printed.err + printed.out


@pytest.mark.parametrize("index", [0, 1])
def test_it_is_opt_in(namespace, index, capsys):
    shown, _, _ = fit(namespace, bars(namespace)[index])
    assert not [key for key in shown[-1] if "alignment" in key]


def test_what_does_not_exist_is_not_shown_under_another_name(namespace, capsys):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, weight_decay=0.1)

    shown, _, _ = fit(namespace, bars(namespace)[0], adamw, progress_bar=True)
    assert math.isfinite(shown[-1]["update_alignment"])
    assert "alignment" not in shown[-1]
    trainer = make_trainer(namespace, callbacks=[LowRankMonitor(gradient="step", progress_bar=True)])
    trainer.fit(make_classifier(mlp(), namespace), make_loader())
    assert "alignment" not in trainer.progress_bar_metrics
    assert math.isfinite(trainer.progress_bar_metrics["alignment_minibatch"])


def test_until_a_full_batch_value_is_known_the_mini_batch_s_is_shown_under_its_name():
    bar = {"loss": 1.0}
    pairs = [("alignment", "residual"), ("alignment_minibatch", "residual_minibatch")]
    show(bar, "optimizer_1", pairs, {"alignment_minibatch": 0.1, "residual_minibatch": 9.0, "alignment": math.nan})
    assert bar == {"loss": 1.0, "optimizer_1/alignment_minibatch": 0.1, "optimizer_1/residual_minibatch": 9.0}
    show(bar, "optimizer_1", pairs, {"alignment": 0.9, "residual": 0.4, "alignment_minibatch": 0.2})
    assert bar == {"loss": 1.0, "optimizer_1/alignment": 0.9, "optimizer_1/residual": 0.4}
    show(bar, "optimizer_1", pairs, {"alignment_minibatch": 0.3})
    assert bar == {"loss": 1.0, "optimizer_1/alignment": 0.9, "optimizer_1/residual": 0.4}


def test_several_optimizers_are_told_apart(namespace):
    trainer = make_trainer(namespace, callbacks=[LowRankMonitor(progress_bar=True)])
    trainer.fit(make_two_optimizers(namespace), make_loader())
    assert {"optimizer_0/alignment_minibatch", "optimizer_1/alignment_minibatch"} <= set(trainer.progress_bar_metrics)


def test_the_bar_changes_nothing_in_the_run(namespace, capsys):
    weights = []
    for options in ({"progress_bar": True}, {}):
        torch.manual_seed(0)
        weights.append(fit(namespace, bars(namespace)[0], **options)[2].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
