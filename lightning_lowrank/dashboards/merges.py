"""What a merge writes into a W&B run: a table, a chart, the leak by layer, and the merged file with its parents."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from lightning_lowrank.merging.card import card_paths
from lightning_lowrank.merging.output import HASHES, FileHashes
from lightning_lowrank.merging.report import MergeReport

_TYPE = "model"
# How much of a hash names an artifact.
_DIGITS = 12


def log_report(run: Any, report: MergeReport, prefix: str) -> None:
    """Write a report into a run: tables and charts, values into the summary, settings into the configuration.

    Args:
        run: An active wandb run.
        report: The report.
        prefix: What the keys begin with.
    """
    metrics = list(dict.fromkeys(name for task in report.tasks for name in report.metric_names(task)))
    pairs = [(metric, task) for metric in metrics for task in report.tasks]
    rows = [
        [model, *(_cell(report.metrics.get(f"{task}/{model}/{metric}")) for metric, task in pairs)]
        for model in report.models
    ]
    found: dict[str, Any] = {}
    if rows:
        columns: list[str | int] = ["model", *(f"{metric} on {task}" for metric, task in pairs)]
        found[f"{prefix}/table"] = wandb.Table(columns=columns, data=rows)
    if headline := report.headline_metric:
        bars = [
            [f"{model} on {task}", _cell(report.metrics.get(f"{task}/{model}/{headline}"))]
            for task in report.tasks
            for model in report.models
        ]
        table = wandb.Table(columns=["model on task", "value"], data=bars)
        title = headline.replace("_", " ")
        found[f"{prefix}/bars"] = wandb.plot.bar(table, "model on task", "value", title=title)
    if report.leak:
        layers = list(dict.fromkeys(layer for of_task in report.leak.values() for layer in of_task))
        leaks = [[layer, *(_cell(of_task.get(layer)) for of_task in report.leak.values())] for layer in layers]
        found[f"{prefix}/leak"] = wandb.Table(columns=["layer", *report.leak], data=leaks)
    run.log(found)
    about = {"tasks": report.tasks, "settings": report.settings, "notes": report.notes}
    run.config.update({prefix: about}, allow_val_change=True)
    run.summary.update({f"{prefix}/{key}": value for key, value in report.metrics.items()})


def log_artifact(run: Any, report: MergeReport, checkpoint: Path, parents: Sequence[str] | None) -> Any:
    """Log a merged file as an artifact: its card beside it and in its metadata, its parents as the run's inputs.

    Args:
        run: An active wandb run. An offline one has no lineage; the parents' digests are in the metadata.
        report: With the card of the merge, or without where it stands beside the file.
        checkpoint: The merged file.
        parents: Names of the parents' artifacts in W&B, base last; None records their files by reference.

    Raises:
        ValueError: If there is no card, or it is of another file; if there is not one name for each parent; or if a
            parent's file is gone or is no longer what was merged.
    """
    card = report.card or _card_beside(checkpoint)
    if card["output"]["name"] != checkpoint.name:
        raise ValueError(f"the report is of {card['output']['name']!r}, not of {checkpoint.name!r}")
    sources = [*card["inputs"], *([card["base"]] if card["base"] else [])]
    if parents is not None and len(parents) != len(sources):
        raise ValueError(f"parents must name {len(sources)} artifacts, the base last, got {list(parents)}")
    if not run.offline:
        for artifact in parents if parents is not None else list(map(_by_reference, sources)):
            run.use_artifact(artifact)
    about = {key: value for key, value in card.items() if key != "tensors"}
    if parents is not None:
        about["parents"] = list(parents)
    merged = wandb.Artifact(_artifact_name(checkpoint.stem), type=_TYPE, metadata=about)
    for path in (checkpoint, *card_paths(checkpoint)):
        if path.is_file():
            merged.add_file(str(path), name=path.name)
    return run.log_artifact(merged)


def _card_beside(checkpoint: Path) -> dict[str, Any]:
    path = card_paths(checkpoint)[0]
    if not (checkpoint.is_file() and path.is_file()):
        raise ValueError(f"{checkpoint} has no merge card {path.name} beside it; merge_checkpoints writes both")
    return MergeReport.load(path).card


def _by_reference(source: Mapping[str, Any]) -> Any:
    """A parent as an artifact that refers to its files and uploads nothing.

    Its name has the hash, so that the same file is the same artifact in every merge.
    """
    path = Path(source["path"])
    folder = path if path.is_dir() else path.parent
    hash_name = next(key for found in source["files"].values() for key in found if key in HASHES)
    files = {folder / name: found[hash_name] for name, found in source["files"].items()}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is gone, so it can't be recorded as a parent; pass parents=[names of artifacts]")
    with FileHashes(files, hash_name) as hashes:
        for file, digest in hashes.result().items():
            if digest != files[file]:
                raise ValueError(
                    f"{file} is no longer what was merged: its {hash_name} is not the card's. Merge again, or pass"
                    " parents=[names of artifacts]"
                )
    digest = "-".join(files.values())
    artifact = wandb.Artifact(
        f"{_artifact_name(path.stem)}-{digest[:_DIGITS]}",
        type=_TYPE,
        metadata={"format": source["format"], "files": source["files"]},
    )
    for file in files:
        artifact.add_reference(file.resolve().as_uri(), name=file.name)
    return artifact


def _artifact_name(text: str) -> str:
    """Of the characters that W&B takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "merged"


def _cell(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
