"""Weights & Biases: tables and summary values. Imported only where a W&B run is in use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import wandb

if TYPE_CHECKING:
    from lightning_lowrank.merging.report import MergeReport


def log_report(run: Any, report: MergeReport, prefix: str) -> None:
    """Write a merge report into a run: a table (a row per model and task) and the values into the summary.

    Args:
        run: An active wandb run.
        report: The report.
        prefix: What the keys begin with.
    """
    metrics = list(dict.fromkeys(name for task in report.tasks for name in report.metric_names(task)))
    rows = [
        [model, task, *(_cell(report.metrics.get(f"{task}/{model}/{metric}")) for metric in metrics)]
        for model in report.models
        for task in report.tasks
    ]
    run.log({f"{prefix}/table": wandb.Table(columns=["model", "task", *metrics], data=rows)})
    run.summary.update({f"{prefix}/{key}": value for key, value in report.metrics.items()})


def _cell(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
