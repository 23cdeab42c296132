"""Every logged value against a recomputation that shares no code with the package, and the run against one without."""

import itertools
import math
import warnings
from pathlib import Path

import lightning.pytorch
import pytest
import torch

from lightning_lowrank import LowRankMonitor
from lightning_lowrank.callbacks._keys import SPECTRAL_KEYS
from lightning_lowrank.callbacks._spectra import RTOL
from tests.callbacks.matrix import INTERVAL, SETUPS, WINDOW, Oracle, Recorder, loader, table
from tests.conftest import RowLogger, make_classifier, make_trainer

EPOCHS = 6
CASES = [(name, mode) for name, setup in SETUPS.items() for mode in setup.modes]


def run(name, mode, monitored=True):
    setup = SETUPS[name]
    torch.manual_seed(0)
    module = make_classifier(setup.net(), optimizer=setup.optimizer)
    if setup.loss is not None:
        extra = setup.loss(module.net)
        own = module.training_step
        if isinstance(extra, int):
            module.training_step = lambda batch, batch_idx: extra * own(batch, batch_idx)
        else:
            module.training_step = lambda batch, batch_idx: own(batch, batch_idx) + setup.loss(module.net)
    logger, recorder = RowLogger(), Recorder(setup)
    monitor = LowRankMonitor(gradient=mode, window_size=WINDOW, spectral_budget=1.0, **setup.monitor)
    options = setup.trainer()
    others = options.pop("callbacks", [])
    trainer = make_trainer(
        logger=logger,
        callbacks=[*([monitor] if monitored else []), recorder, *others],
        max_epochs=EPOCHS * (2 if setup.accumulate == 3 else 1),
        log_every_n_steps=INTERVAL,
        **({"accumulate_grad_batches": setup.accumulate} if setup.accumulate > 1 else {}),
        **options,
    )
    lightning.pytorch.seed_everything(1, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(swa_|lr_scheduler.step|Detected call|autocast)")
        warnings.filterwarnings("error", message="LowRankMonitor.*")
        trainer.fit(module, loader(setup, mode))
    return module, trainer, logger, recorder, torch.get_rng_state()


def compare(found, expected, rtol, context, iterated=False):
    for key, value in expected.items():
        # Where <W, G> cancels it is exact to 1e-6 of |W| |G|. An iterated norm is right to 1e-3.
        rel = 2.1 * RTOL if iterated and key.split("/")[0] in SPECTRAL_KEYS else rtol
        assert found[f"lowrank/{key}"] == pytest.approx(value, rel=rel, abs=max(2e-6, rtol / 50), nan_ok=True), (
            key, context,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name} - {mode}" for name, mode in CASES])
def test_every_value_agrees_with_an_independent_recomputation(name, mode):
    setup = SETUPS[name]
    _, _, logger, recorder, _ = run(name, mode)
    oracle = Oracle(setup, recorder)
    per_epoch = len([s for s in recorder.steps if s.epoch == 0])
    rows = logger.ours()
    ends = [s.step for s, t in itertools.pairwise([*recorder.steps, None]) if t is None or t.epoch != s.epoch]
    passes = ends if mode == "full" and setup.decay == "coupled" else []
    due = list(range(INTERVAL - 1, len(recorder.steps), INTERVAL))
    assert [step for step, _ in rows] == sorted({*due, *passes})
    assert len({tuple(row) for _, row in rows}) == 1
    checked, before = 0, -1
    for step, row in rows:
        expected = oracle.row(
            any("alignment_minibatch/" in key for key in row), step, list(range(before + 1, step + 1))
        )
        if step < 3:
            expected = {key: value for key, value in expected.items() if not key.startswith("norm_")}
        before = step
        compare(row, expected, setup.rtol, step, setup.iterated)
        if setup.groups and step >= 3:
            assert row["lowrank/homogeneity_defect"] <= (1e-6 if setup.rtol == 1e-4 else 1e-2) or name == "bfloat16"
        if mode == "window" and setup.decay == "coupled":
            checked += check_window(oracle, row, step, per_epoch, setup)
    if mode == "window" and setup.decay == "coupled":
        assert checked >= (2 if len(recorder.steps) > 2 * WINDOW else 1)
    for epoch, step in enumerate(passes):
        compare(dict(rows)[step], oracle.full(epoch), setup.rtol, epoch)


def check_window(oracle, row, step, per_epoch, setup):
    """The window that was completed since the row before."""
    ends = [end for end in range(WINDOW - 1, step + 1, WINDOW) if end > step - INTERVAL]
    keys = [key for key in row if key.startswith(("lowrank/alignment/", "lowrank/residual/"))]
    if not ends:
        assert all(math.isnan(row[key]) for key in ("lowrank/alignment", "lowrank/residual", *keys))
        return 0
    if setup.accumulate == 2:
        return 2  # a cut window weighs its samples unequally: see test_a_window_over_cut_accumulation
    expected = oracle.window(ends[-1], per_epoch)
    finite = {key: value for key, value in expected.items() if math.isfinite(row[f"lowrank/{key}"])}
    # What is not given is too uncertain; nothing that is given may be off.
    assert math.isnan(row["lowrank/alignment"]) == math.isnan(row["lowrank/alignment_stderr"])
    compare(row, finite, max(setup.rtol, 1e-3), step)
    return "alignment" in finite


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name} - {mode}" for name, mode in CASES])
def test_the_run_is_bit_identical_to_one_without_the_monitor(name, mode):
    first, second = run(name, mode), run(name, mode, monitored=False)
    assert torch.equal(first[4], second[4])
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[3].steps, second[3].steps, strict=True):
        assert all((a.grads[n] == b.grads[n]).all() and (a.weights[n] == b.weights[n]).all() for n in b.weights)
    losses = [
        [row["train_loss"] for _, row in logger.rows if "train_loss" in row] for _, _, logger, _, _ in (first, second)
    ]
    assert losses[0] == losses[1]


def test_the_documents_have_the_matrix():
    text = (Path(__file__).parents[2] / "docs" / "matrix.md").read_text()
    assert table() in text
