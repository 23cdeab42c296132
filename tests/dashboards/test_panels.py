"""Panels against recorded runs, both ways: no panel without a value, no value without a panel."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_lowrank import LowRankMonitor, MergeReport
from lightning_lowrank.dashboards.panels import SECTIONS
from tests.conftest import (
    foreign_warnings_ignored,
    make_classifier,
    make_loader,
    make_trainer,
    make_two_optimizers,
    mlp,
)
from tests.dashboards.offline import offline_runs

pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")

from lightning.pytorch.loggers import WandbLogger

from lightning_lowrank.dashboards._wandb_panels import Keys
from lightning_lowrank.dashboards.workspace import bound_keys


def fit(folder, optimizer=None, module=None, loader=None, **options):
    logger = WandbLogger(save_dir=folder, mode="offline", project="test")
    monitor = LowRankMonitor(spectral_budget=1.0, **options)
    module = module or make_classifier(mlp(), optimizer=optimizer)
    make_trainer(logger=logger, callbacks=[monitor]).fit(module, loader or make_loader(shuffle=True))
    return logger


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.1)


def muon(parameters):
    return torch.optim.Muon(parameters)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Every key of five kinds of runs and of a merge, as W&B has them."""
    folder = tmp_path_factory.mktemp("runs")
    with foreign_warnings_ignored():
        logger = fit(folder, gradient="window", window_size=3, spectral="full")
        MergeReport({"a": "m1"}, ["m1", "sum"], {"a/m1/acc": 1.0, "a/sum/acc": 0.9}, leak={"a": {"w": 0.1}}).log(logger)
        logger.experiment.finish()
        kinds = [{"gradient": "step"}, {"optimizer": adamw}, {"gradient": "full"}]
        kinds += [{"optimizer": muon}] if hasattr(torch.optim, "Muon") else []
        for kind in kinds:
            fit(folder, **kind).experiment.finish()
    keys = set().union(*(run.keys for run in offline_runs(folder)))
    return {key for key in keys if key.startswith(("lowrank/", "merge/", "trainer/global_step"))}


@pytest.mark.parametrize("x_axis", ["global_step", "cumulative_decay"])
def test_no_dead_panel_and_no_unshown_scalar(logged, x_axis):
    keys, patterns = bound_keys(Keys(x_axis=x_axis))
    if not hasattr(torch.optim, "Muon"):
        keys -= {"lowrank/spectral_decay"}
    assert keys - logged == set()
    assert [pattern for pattern in patterns if not any(re.search(pattern, key) for key in logged)] == []
    unshown = {key for key in logged - keys if not any(re.search(pattern, key) for pattern in patterns)}
    assert unshown - {"trainer/global_step"} == set()


def test_every_layer_key_is_in_one_panel_alone(logged):
    _, patterns = bound_keys()
    for key in (key for key in logged if key.endswith(".weight")):
        assert len([pattern for pattern in patterns if re.search(pattern, key)]) == 1, key


def test_sections_of_several_optimizers_are_shown(tmp_path):
    fit(tmp_path, module=make_two_optimizers(), gradient="step").experiment.finish()
    [run] = offline_runs(tmp_path)
    keys, patterns = bound_keys(Keys(optimizers=2))
    of_run = {key for key in run.keys if key.startswith("lowrank/")}
    assert {key for key in of_run - keys if not any(re.search(pattern, key) for pattern in patterns)} == set()
    assert {f"lowrank/optimizer_{i}/radial_balance" for i in (0, 1)} <= keys & of_run
    assert "lowrank/overhead" in keys & of_run


def test_every_panel_says_how_to_read_it():
    panels = [panel for section in SECTIONS for panel in section.panels]
    assert len({panel.title for panel in panels}) == len(panels)
    assert all(panel.text.endswith(".") and len(panel.text) > 10 for panel in panels)
    assert len(SECTIONS) == 5
