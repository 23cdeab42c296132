"""One HTML page of a run or of a report, with all that it needs in itself: to open from disk, to send, to print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_lowrank.dashboards import page_verdicts
from lightning_lowrank.dashboards.page_layout import Part, render, settings_of
from lightning_lowrank.dashboards.page_report import (
    card_blocks,
    merge_block,
    merge_of,
    stationarity_blocks,
    weight_blocks,
)
from lightning_lowrank.dashboards.page_run import by_optimizer, own_values, run_part
from lightning_lowrank.dashboards.verdicts import shown
from lightning_lowrank.merging.report import MergeReport
from lightning_lowrank.stationarity_report import StationarityReport
from lightning_lowrank.weight_report import WeightReport

if TYPE_CHECKING:
    from lightning_lowrank.dashboards.recorded import RecordedRun

Report = MergeReport | StationarityReport | WeightReport
# Beginnings of keys that an error lists.
_LISTED = 8


def run_page(run: RecordedRun, prefix: str = "lowrank", merge_prefix: str = "merge") -> str:
    """The page of a training run.

    Args:
        run: As :func:`lightning_lowrank.dashboards.recorded.read_run` returns it.
        prefix: What the keys of LowRankMonitor begin with.
        merge_prefix: What those of a merge report begin with.

    Returns:
        HTML.

    Raises:
        ValueError: If the run has no value of either.
        ModuleNotFoundError: If vl-convert-python is not installed.

    Example:
        >>> from lightning_lowrank.dashboards.recorded import RecordedRun, Series
        >>> run = RecordedRun("digits", "CSV", {"lowrank/alignment_minibatch": Series([50, 100], [0.1, 0.2])}, {})
        >>> "Not known: only mini-batch values" in run_page(run)
        True
    """
    optimizers = by_optimizer(run.series, prefix)
    report = merge_of(run.series, merge_prefix)
    if not optimizers and report is None:
        found = sorted({key.partition("/")[0] for key in run.series})
        raise ValueError(
            f"run {run.name!r} has no key that begins with {prefix + '/'!r} or {merge_prefix + '/'!r}, so there is"
            f" nothing to show; keys begin with {', '.join(found[:_LISTED])}. Pass the prefix of its LowRankMonitor"
        )
    monitored = run.config.get(prefix)
    monitored = monitored if isinstance(monitored, Mapping) else {}
    parts = [run_part(name, values, run.config, monitored) for name, values in optimizers.items()]
    if report is not None:
        parts.append(Part("Merge" if optimizers else "", page_verdicts.of_merge(report), [merge_block(report)]))
    own = own_values(run.series, (prefix, merge_prefix))
    steps = [step for values in optimizers.values() for series in values.values() for step in series.steps]
    facts = [("Logged by", run.source), *([("Steps", f"{min(steps):,} to {max(steps):,}")] if steps else [])]
    for optimizer in monitored.get("optimizers", ()):
        facts.append((f"{optimizer.get('class')} aims at", ", ".join(map(str, optimizer.get("target", ())))))
    if own and len(optimizers) == 1:
        own.decay = parts[0].decay
    every = [*parts, *([own] if own else [])]
    return render(run.name, "Training run", facts, every, settings_of(run.config), "lightning-lowrank report")


def report_page(report: Report) -> str:
    """The page of a report.

    Args:
        report: Of an evaluation or a merge, of a pass over the data, or of the spectra of weights.

    Returns:
        HTML.

    Raises:
        TypeError: If it is none of these.
        ModuleNotFoundError: If vl-convert-python is not installed.

    Example:
        >>> metrics = {"even/m1/test_acc": 0.98, "even/sum/test_acc": 0.90}
        >>> "The sum loses 8.0 points" in report_page(MergeReport({"even": "m1"}, ["m1", "sum"], metrics))
        True
    """
    command = f"{type(report).__name__}.save"
    if isinstance(report, MergeReport):
        title = report.card["output"]["name"] if report.card else " + ".join(report.tasks) or "Merge"
        facts = [(f"Task of {own}" if own else "Task", task) for task, own in report.tasks.items()]
        part = Part("", page_verdicts.of_merge(report), [merge_block(report), *card_blocks(report)])
        command = str(report.card.get("command") or command)
        return render(title, "Merge", facts, [part], settings_of(report.settings), command)
    if isinstance(report, StationarityReport):
        facts = [("Samples", f"{report.samples:,}"), ("Weight decay", shown(report.weight_decay))]
        part = Part("", page_verdicts.of_stationarity(report), stationarity_blocks(report))
        return render("Stationarity of a network", "Pass over the data", facts, [part], [], command)
    if isinstance(report, WeightReport):
        facts = [("Matrices", str(len(report.matrices))), ("Spectra", report.spectra)]
        part = Part("", page_verdicts.of_weights(report), weight_blocks(report))
        return render(report.source, "Spectra of weights", facts, [part], [], command)
    raise TypeError(f"report must be a MergeReport, StationarityReport or WeightReport, got {type(report).__name__}")
