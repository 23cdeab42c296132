"""Every logged number against a recomputation that shares no code with the package."""

import math
from functools import partial

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler

from lightning_lowrank import LowRankMonitor
from tests.conftest import (
    RowLogger,
    make_classifier,
    make_loader,
    make_trainer,
    mlp,
    sgd,
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


def test_radial_balance_is_the_mean_over_the_measured_steps_with_its_standard_error():
    logger, recorder = RowLogger(), Recorder()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor(), recorder], log_every_n_steps=6, max_epochs=4)
    trainer.fit(make_classifier(mlp()), make_loader())
    balances = np.array([expected_scalars(step)["radial_balance"] for step in recorder.steps])
    for (step, row), window in zip(logger.ours(), balances.reshape(2, 6), strict=True):
        assert row["lowrank/radial_balance"] == pytest.approx(window.mean(), rel=1e-5), step
        assert row["lowrank/radial_balance_stderr"] == pytest.approx(window.std(ddof=1) / math.sqrt(6), rel=1e-4)


def test_norm_spread_is_that_of_the_chain_and_1_after_full_batch_training_with_decay():
    logger = RowLogger()
    trainer = make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=600, log_every_n_steps=100)
    trainer.fit(make_classifier(mlp()), make_loader(batch_size=24))
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


def test_effective_rank_is_that_of_the_weights():
    logger, recorder = RowLogger(), Recorder()
    make_trainer(logger=logger, callbacks=[LowRankMonitor(spectral="full"), recorder], max_epochs=1).fit(
        make_classifier(mlp()), make_loader()
    )
    for (_, row), step in zip(logger.ours(), recorder.steps, strict=True):
        share = np.linalg.svd(step["net.2.weight"][0], compute_uv=False)
        share = share / share.sum()
        assert row["lowrank/effective_rank/net.2.weight"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


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
