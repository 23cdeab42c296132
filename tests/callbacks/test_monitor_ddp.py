"""Two real processes: the gradient that is measured is the one averaged over ranks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from lightning.pytorch import Callback
from lightning_lowrank import LowRankMonitor
from torch.utils.data import DataLoader, DistributedSampler
from tests.conftest import RowLogger, make_classifier, make_data, make_trainer, mlp

logger = RowLogger()
monitor = LowRankMonitor(gradient=sys.argv[3], window_size=6, spectral_budget=1.0)
trainer = make_trainer(strategy="ddp", devices=2, logger=logger, callbacks=[monitor])
module = make_classifier(mlp())
sampler = DistributedSampler(make_data(), 2, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
trainer.fit(module, DataLoader(make_data(), batch_size=int(sys.argv[2]), sampler=sampler))
metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("lowrank/")}
result = {"rows": logger.ours(), "metrics": metrics, "weight": module.net[0].weight.tolist()}
with open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w") as file:
    json.dump(result, file)
"""


def run_ddp(folder, batch_size, gradient):
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(folder / "script.py"), str(folder), str(batch_size), gradient]
    done = subprocess.run(
        command, env=_environment(root), capture_output=True, text=True, cwd=folder, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _environment(root):
    import os

    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("batch_size", "gradient"), [(4, "step"), (12, "step"), (4, "window"), (4, "full")])
def test_two_ranks_measure_what_one_process_would_on_both_batches(tmp_path, batch_size, gradient):
    first, second = run_ddp(tmp_path, batch_size, gradient)
    for row in (*(row for rank in (first, second) for _, row in rank["rows"]), first["metrics"], second["metrics"]):
        row.pop("lowrank/overhead", None)  # each rank's own time
    assert str(first["rows"]) == str(second["rows"])
    assert first["metrics"] == second["metrics"]
    assert first["weight"] == second["weight"]
    logger = RowLogger()
    monitor = LowRankMonitor(gradient=gradient, window_size=6, spectral_budget=1.0)
    make_trainer(logger=logger, callbacks=[monitor]).fit(make_classifier(mlp()), make_loader(batch_size=2 * batch_size))
    found = [row.get("lowrank/alignment", math.nan) for _, row in first["rows"]]
    assert (
        sum(map(math.isfinite, found))
        == {(4, "step"): 0, (12, "step"): 2, (4, "window"): 0, (4, "full"): 2}[batch_size, gradient]
    )
    for (step, row), (expected_step, expected) in zip(first["rows"], logger.ours(), strict=True):
        assert step == expected_step
        # The ranks take turns in drawing samples, so together they hold the same ones.
        expected.pop("lowrank/overhead")
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
