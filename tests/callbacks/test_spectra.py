"""Spectra over a run: their turn, their age, their budget, and what they start from."""

import math
import pickle

import lightning.pytorch
import pytest
import torch
from torch import nn

from lightning_lowrank import LowRankMonitor
from lightning_lowrank.callbacks import _budget, _spectra
from lightning_lowrank.callbacks._budget import Budget
from lightning_lowrank.callbacks._spectra import Spectra, age_of
from lightning_lowrank.matrices import Layout
from lightning_lowrank.optimizers import Decay
from lightning_lowrank.parameters import Parameter
from lightning_lowrank.sharding import Shard
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp


def view_of(weights):
    """Parameters as the optimizer's view has them, each with its norm."""
    return [
        (
            Parameter(name, w, torch.zeros_like(w), 1.0, 0.1, 0.0, Decay.COUPLED, 0.0, Shard.of_whole(name, w)),
            torch.linalg.vector_norm(w.double()).item(),
        )
        for name, w in weights.items()
    ]


def gaussians(count=5, shape=(160, 140)):
    return {f"w{k}": torch.randn(*shape, generator=torch.Generator().manual_seed(k)) for k in range(count)}


class Rounds:
    """A budget that allows so many questions to be answered with yes."""

    def __init__(self, count):
        self.count = count

    def allows(self):
        self.count -= 1
        return self.count >= 0

    spending = Budget.spending
    spent = 0.0


@pytest.fixture
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(_spectra.torch, "get_num_threads", lambda: 1)


def test_matrices_take_turns_in_a_fixed_order(one_at_a_time):
    weights, spectra = gaussians(), Spectra(False, {})
    known = []
    for step in range(4):
        spectra.measure(view_of(weights), step, Rounds(2))
        known.append([spectrum.step for spectrum in spectra.of(list(weights))])
    assert known == [[0, 0, -1, -1, -1], [0, 0, 1, 1, -1], [2, 0, 1, 1, 2], [2, 3, 3, 1, 2]]
    assert [age_of(spectra.of(list(weights)[:2]), 5)] == [3.0]
    assert math.isnan(age_of(Spectra(False, {}).of(["w0"]), 5))


def test_each_matrix_is_measured_at_most_once_a_row():
    weights, spectra, budget = gaussians(), Spectra(False, {}), Rounds(99)
    spectra.measure(view_of(weights), 0, budget)
    assert budget.count >= 99 - len(weights) - 1
    for name, spectrum in zip(weights, spectra.of(list(weights)), strict=True):
        sigma = torch.linalg.svdvals(weights[name].double())
        assert spectrum.top == pytest.approx(sigma[0].item(), rel=1e-3)
        assert spectrum.stable_rank == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item(), rel=2.1e-3)


def test_later_measurements_start_from_the_last_ones_and_are_shorter(monkeypatch):
    weights, spectra, steps = gaussians(1), Spectra(False, {}), []
    exact = _spectra.leading
    monkeypatch.setattr(_spectra, "leading", lambda *args: steps.append(exact(*args)) or steps[-1])
    for step in range(4):
        spectra.measure(view_of(weights), step, Rounds(9))
        weights["w0"] += 0.01 * torch.randn(160, 140, generator=torch.Generator().manual_seed(step)).sign()
    cold, *warm = [top.steps for top in steps]
    assert max(warm) < cold / 2


def test_values_stay_with_the_norm_that_they_were_measured_with(one_at_a_time):
    weights, spectra = gaussians(2), Spectra(False, {})
    spectra.measure(view_of(weights), 0, Rounds(9))
    before = spectra.of(list(weights))
    for weight in weights.values():
        weight *= 3
    spectra.measure(view_of(weights), 1, Rounds(1))
    first, second = spectra.of(list(weights))
    assert first.top == pytest.approx(3 * before[0].top, rel=1e-3)
    assert first.stable_rank == pytest.approx(before[0].stable_rank, rel=2e-3)
    assert second == before[1]


@pytest.mark.parametrize("full", [False, True])
def test_matrices_that_are_not_plain(full):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "grouped": torch.randn(8, 3, 5, generator=generator),
        "experts": torch.randn(3, 150, 140, generator=generator),
        "zero": torch.zeros(150, 150),
        "nan": torch.full((150, 150), math.nan),
        "tiny": 1e-30 * torch.randn(150, 150, generator=generator),
    }
    layouts = {"grouped": Layout("convolution", groups=4), "experts": Layout(rows=2, groups=3)}
    spectra = Spectra(full, layouts)
    spectra.measure(view_of(weights), 0, Rounds(9))
    grouped, experts, zero, nan, tiny = spectra.of(list(weights))
    exact = [
        torch.linalg.svdvals(weights["grouped"].double().reshape(4, 2, 15)).max().item(),
        torch.linalg.svdvals(weights["experts"].double()).max().item(),
        torch.linalg.svdvals(weights["tiny"].double()).max().item(),
    ]
    assert [grouped.top, experts.top, tiny.top] == pytest.approx(exact, rel=1e-3)
    assert zero.top == 0
    assert math.isnan(nan.top)
    assert math.isnan(zero.stable_rank)
    assert math.isnan(nan.stable_rank)
    assert math.isfinite(grouped.effective_rank) == full


def test_a_circular_convolution_has_its_operator_norm():
    kernel = torch.ones(1, 1, 3, 3) / 9
    spectra = Spectra(False, {"k": Layout("convolution", circular=(8, 8))})
    spectra.measure(view_of({"k": kernel}), 0, Rounds(9))
    assert spectra.of(["k"])[0].top == pytest.approx(1.0)


def test_the_budget_is_a_share_of_the_time_that_has_passed(monkeypatch):
    now, asked = [100.0], []
    monkeypatch.setattr(_budget.time, "perf_counter", lambda: now[0])
    budget = Budget(0.01, lambda answer: asked.append(answer) or answer)
    assert budget.allows()  # a tenth of a second is free
    with budget.spending():
        now[0] += 1.0
    assert not budget.allows()
    now[0] += 88
    assert not budget.allows()
    now[0] += 3
    assert budget.allows()
    # What the monitor's other measurements took is gone, but for a quarter.
    budget.spent_elsewhere = 10.0
    assert not budget.allows()
    now[0] += 4 * 100
    assert budget.allows()
    assert len(asked) == 6


def test_another_process_decides():
    assert not Budget(1.0, lambda answer: False).allows()


def wide():
    return make_classifier(
        nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 180), nn.ReLU(), nn.Linear(180, 3))
    )


def test_the_age_is_logged_and_keys_stay(monkeypatch, one_at_a_time):
    """Time for one matrix a row: means are known once all three have been measured, and then they age."""
    monkeypatch.setattr(Budget, "allows", lambda self: next(answers))
    answers = iter([True, False] * 99)
    logger = RowLogger()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(gradient="step")], max_epochs=3).fit(wide(), make_loader())
    rows = [row for _, row in logger.ours()]
    assert len({tuple(row) for row in rows}) == 1
    ages = [row["lowrank/spectral_age"] for row in rows]
    assert [math.isnan(age) for age in ages[:3]] == [True, True, False]
    assert ages[2:] == [2.0] * (len(ages) - 2)
    for row in rows:
        assert math.isnan(row["lowrank/stable_rank"]) == math.isnan(row["lowrank/spectral_age"])
    assert rows[0]["lowrank/spectral_norm/net.0.weight"] == rows[2]["lowrank/spectral_norm/net.0.weight"]
    assert rows[0]["lowrank/spectral_norm/net.0.weight"] != rows[3]["lowrank/spectral_norm/net.0.weight"]


def test_spectra_have_an_interval_of_their_own():
    logger = RowLogger()
    monitor = LowRankMonitor(gradient="step", spectral_every_n_steps=3, spectral_budget=1.0)
    make_trainer(logger=logger, callbacks=[monitor], max_epochs=3).fit(wide(), make_loader())
    ages = [row["lowrank/spectral_age"] for _, row in logger.ours()]
    assert ages == [0.0, 1.0, 0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0]


def test_start_vectors_stay_out_of_checkpoints(tmp_path):
    monitor = LowRankMonitor(gradient="step", spectral_budget=1.0)
    trainer = make_trainer(callbacks=[monitor], max_epochs=1)
    trainer.fit(wide(), make_loader())
    meter = monitor._optimizers[0]._meter
    assert meter.spectra._kept
    assert len(pickle.dumps(monitor.state_dict())) < 20_000
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"]
    assert not any(
        isinstance(value, torch.Tensor) and 180 in value.shape for value in _leaves(saved[monitor.state_key])
    )


def _leaves(tree):
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"*": "diagonal"}, r"'\*' is said to be 'diagonal'; choose"),
        ({"nett.*": "linear"}, r"'nett.\*' matches no weight"),
        ({"net.0.weight": "groups:7"}, "not possible for net.0.weight"),
    ],
)
def test_wrong_matrices_raise_before_training(matrices, message):
    seen = []

    class Watch(lightning.pytorch.Callback):
        def on_train_batch_start(self, *args):
            seen.append(1)

    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[LowRankMonitor(matrices=matrices), Watch()]).fit(make_classifier(mlp()), make_loader())
    assert not seen


def test_matrices_choose_what_is_measured():
    logger = RowLogger()
    monitor = LowRankMonitor(
        gradient="step", spectral_budget=1.0, matrices={"net.0.weight": None, "net.2.weight": "groups:4"}
    )
    module = make_classifier(mlp())
    first = module.net[2].weight.detach().clone()
    make_trainer(logger=logger, callbacks=[monitor], max_epochs=1).fit(module, make_loader())
    row = logger.ours()[0][1]
    assert "lowrank/frobenius_norm/net.0.weight" in row
    assert "lowrank/spectral_norm/net.0.weight" not in row
    exact = torch.linalg.svdvals(first.double().reshape(4, 3, 16)).max().item()
    assert row["lowrank/spectral_norm/net.2.weight"] == pytest.approx(exact, rel=1e-6)
    ranks = [row[f"lowrank/stable_rank/net.{k}.weight"] for k in (2, 4)]
    assert row["lowrank/stable_rank"] == pytest.approx(sum(ranks) / 2)
