"""Real processes over gloo that shard one network: every rank logs what one process would, for the same batches."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp

folder, case, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = distributed.FileStore(f"{folder}/store", world)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)

def shard(net):
    if case == "fsdp2":
        return fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    if case == "hsdp2":
        return fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    if case.startswith("fsdp1"):
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params="original" in case)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(net, init_device_mesh("cpu", (world,)), plan)

module = make_classifier(mlp())
module.net = shard(module.net)
logger = RowLogger()
monitor = LowRankMonitor(gradient="window", window_size=6, spectral_budget=1.0)
trainer = make_trainer(logger=logger, callbacks=[monitor], max_epochs=4)
trainer.fit(module, make_loader())
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"rows": logger.ours(), "regimes": {n: str(r.regime) for n, r in monitor.regimes().items()}}, file)
distributed.destroy_process_group()
"""


def run(folder, case, world):
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder), case, str(rank), str(world)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            assert "measures no more" not in errors, errors
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(
    ("case", "world"),
    [("fsdp2", 2), ("fsdp2", 4), ("hsdp2", 4), ("fsdp1 flat", 2), ("fsdp1 original", 4), ("tensor parallel", 2)],
)
def test_ranks_log_what_one_process_would(tmp_path, case, world):
    ranks = run(tmp_path, case, world)
    logger, monitor = RowLogger(), LowRankMonitor(gradient="window", window_size=6, spectral_budget=1.0)
    make_trainer(logger=logger, callbacks=[monitor], max_epochs=4).fit(make_classifier(mlp()), make_loader())
    for rank in ranks:
        assert rank["regimes"] == {name: str(found.regime) for name, found in monitor.regimes().items()}
        for (step, row), (expected_step, expected) in zip(rank["rows"], logger.ours(), strict=True):
            assert step == expected_step
            assert list(row) == list(ranks[0]["rows"][0][1])
            assert row.keys() == expected.keys()
            for key in row.keys() - {"lowrank/overhead", "lowrank/homogeneity_defect"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-6, nan_ok=True), (key, step)
    assert math.isfinite(ranks[0]["rows"][-1][1]["lowrank/norm_spread"])
