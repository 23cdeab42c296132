"""MLflow, TensorBoard and CSV get the same scalars, read back with each package's own reader."""

import csv
import math
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from torch import nn

from lightning_lowrank import LowRankMonitor
from tests.conftest import RowLogger, make_classifier, make_loader, make_trainer, mlp

# MLflow 3 refuses its file store unless told otherwise; a database file needs no server either.
DATABASE = "sqlite:///{folder}/mlflow.db"
# What SQLAlchemy says about MLflow.
OF_MLFLOW = "The ``noload`` loader strategy is deprecated"

RUNS = {
    "coupled": (mlp, lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-2), {"spectral": "full"}),
    "decoupled": (lambda: mlp(bias=True), lambda p: torch.optim.AdamW(p, weight_decay=0.1), {}),
    "many": (lambda: mlp((6, *[4] * 33, 3)), lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-2), {}),
}


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory):
    """A database for all runs: making one takes longer than all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield DATABASE.format(folder=tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(autouse=True)
def _of_mlflow(_foreign_warnings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OF_MLFLOW)
        yield


def read_mlflow(uri, logger):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    keys = client.get_run(logger.run_id).data.metrics
    return {key: [(m.step, m.value) for m in client.get_metric_history(logger.run_id, key)] for key in keys}


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def read_csv(folder):
    points = defaultdict(list)
    with Path(folder, "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key in row.keys() - {"step"}:
                if row[key]:
                    points[key].append((int(row["step"]), float(row[key])))
    return points


@pytest.mark.parametrize("name", RUNS)
def test_every_logger_gets_every_scalar_of_every_row(name, mlflow_uri, tmp_path):
    network, optimizer, options = RUNS[name]
    rows = RowLogger()
    mlflow = MLFlowLogger(tracking_uri=mlflow_uri, experiment_name=name)
    tensorboard, in_csv = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    monitor = LowRankMonitor(gradient="window", window_size=3, **options)
    trainer = make_trainer(logger=[mlflow, tensorboard, in_csv, rows], callbacks=[monitor], max_epochs=6)
    trainer.fit(make_classifier(network(), optimizer=optimizer), make_loader())

    logged = defaultdict(list)
    for step, row in rows.rows:
        for key, value in row.items():
            logged[key].append((step, value))
    ours = {key: points for key, points in logged.items() if key.startswith("lowrank/")}
    assert all([step for step, _ in points] == list(range(18)) for points in ours.values())
    expected = {"coupled": "effective_rank/net.4.weight", "decoupled": "update_alignment", "many": "stable_rank/q50"}
    assert f"lowrank/{expected[name]}" in ours
    values = np.array([value for points in ours.values() for _, value in points])
    # MLflow takes NaN as it is. Infinity it would store as the largest float, but no value is infinite.
    assert np.isnan(values).any()
    assert not np.isinf(values).any()

    found = {
        "mlflow": read_mlflow(mlflow_uri, mlflow),
        "tensorboard": read_tensorboard(tensorboard.log_dir),
        "csv": read_csv(in_csv.log_dir),
    }
    for reader, series in found.items():
        # TensorBoard adds a metric of its own for its table of hyperparameters.
        assert series.keys() - {"hp_metric"} == logged.keys(), reader
        for key, points in logged.items():
            as_stored = np.float32 if reader == "tensorboard" else np.float64
            exact = np.array(points).astype(as_stored)
            assert np.array_equal(np.array(series[key]), exact, equal_nan=True), (reader, key)


class Sum(nn.Module):
    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleDict({name: nn.Linear(6, 3, bias=False) for name in names})

    def forward(self, inputs):
        return sum(branch(inputs) for branch in self.branches.values())


def test_mlflow_gets_names_without_the_characters_that_it_does_not_have(mlflow_uri):
    """Lightning leaves them out, and says so: names of graph networks have such."""
    rows, mlflow = RowLogger(), MLFlowLogger(tracking_uri=mlflow_uri, experiment_name="renamed")
    trainer = make_trainer(logger=[mlflow, rows], callbacks=[LowRankMonitor()], max_epochs=1)
    with pytest.warns(RuntimeWarning, match="MLFlow only allows '_', '/', '.' and ' ' special characters"):
        trainer.fit(make_classifier(Sum("<a_to_b>", "heads (2)")), make_loader())
    found = read_mlflow(mlflow_uri, mlflow)
    for label, name in (("<a_to_b>", "a_to_b"), ("heads (2)", "heads 2")):
        points = [(step, row[f"lowrank/frobenius_norm/net.branches.{label}.weight"]) for step, row in rows.ours()]
        assert found[f"lowrank/frobenius_norm/net.branches.{name}.weight"] == points


@pytest.mark.parametrize(
    ("name", "reason"), [("a//b", "must not resolve to other names"), ("x" * 230, "maximum length of 250")]
)
def test_a_name_that_mlflow_refuses_is_said_once_and_ends_nothing(mlflow_uri, name, reason):
    rows, mlflow = RowLogger(), MLFlowLogger(tracking_uri=mlflow_uri, experiment_name="refused")
    trainer = make_trainer(logger=[mlflow, rows], callbacks=[LowRankMonitor()])
    with pytest.warns(UserWarning, match=f"MLFlowLogger could not take a row: .*{reason}") as caught:
        trainer.fit(make_classifier(Sum(name, "other")), make_loader())
    assert len([w for w in caught if "could not take a row" in str(w.message)]) == 1
    assert [step for step, _ in rows.ours()] == list(range(6))
    assert math.isfinite(trainer.callback_metrics[f"lowrank/frobenius_norm/net.branches.{name}.weight"])
    found = read_mlflow(mlflow_uri, mlflow)
    # MLflow takes a row whole or not at all; what Lightning logs of the run it still gets.
    assert not [key for key in found if key.startswith("lowrank/")]
    assert [step for step, _ in found["train_loss"]] == list(range(6))
