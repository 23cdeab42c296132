"""What a report's numbers allow to say, in words; never more than the numbers do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_lowrank.dashboards.verdicts import (
    FALLEN,
    FEW_DIRECTIONS,
    Level,
    Verdict,
    balance,
    balanced,
    joined,
    judged,
    of_regimes,
    percent,
    shown,
    with_errors,
    within,
)

if TYPE_CHECKING:
    from lightning_lowrank.merging.report import MergeReport
    from lightning_lowrank.stationarity_report import StationarityReport
    from lightning_lowrank.weight_report import WeightReport

# Of the stable rank of a Gaussian matrix of the same shape: clearly below what no training gives; not below it.
LOW_SHARE = 0.25
HIGH_SHARE = 0.75
# Points of accuracy: the standard error of 98 % on a few hundred test samples; and what nobody overlooks.
SMALL_LOSS = 1.0
LARGE_LOSS = 5.0
# Of a loss function relative to the task's own network, since it has no unit of its own.
SMALL_RISE = 1.1
# A tenth of a layer's pre-activations. Larger leaks may show in the outputs or not: deep layers often do not.
SMALL_LEAK = 0.1


def of_stationarity(report: StationarityReport) -> list[Verdict]:
    """What a pass over the data says."""
    alignment, residual = (
        within(value, interval)
        for value, interval in (
            (report.alignment, report.alignment_interval),
            (report.residual, report.residual_interval),
        )
    )
    if math.isnan(report.alignment):
        first = Verdict("unknown", "Not known: alignment could not be measured", "The notes say why.")
    else:
        verdict = judged(alignment, residual)
        details = [verdict.detail, f"Residual {residual} (0 when stationary).", f"{report.samples:,} samples."]
        headline = f"{verdict.headline}: alignment {alignment} (1 when stationary)"
        first = Verdict(verdict.level, headline, joined(details))
    if math.isnan(report.norm_spread):
        second = balance({}, 0)
    else:
        second = balanced(report.norm_spread, report.homogeneity_defect)
    # Kernels of grouped convolutions don't tell by their shape which matrix they are.
    flat = [(layer.stable_rank, layer.shape[0], layer.shape[1], 1) for layer in report.layers if len(layer.shape) == 2]
    counts: dict[str, int] = {}
    for layer in report.layers:
        counts[layer.regime] = counts.get(layer.regime, 0) + 1
    first = with_errors(first, f"± is half the interval that holds {100 * report.confidence:g} %.")
    return [first, second, _of_shapes(flat), of_regimes(counts)]


def of_weights(report: WeightReport) -> list[Verdict]:
    """What the spectra of a network say."""
    verdicts = [_of_shapes([(row.stable_rank, *row.shape, row.groups) for row in report.matrices])]
    broken = [row.name for row in report.matrices if not row.finite]
    if broken:
        headline = f"{len(broken)} of {len(report.matrices)} matrices have entries that are not finite"
        verdicts.append(Verdict("bad", headline, "Among them " + ", ".join(broken[:3]) + "."))
    if report.left_out:
        verdicts.append(
            Verdict("warning", f"Tensors left out: {len(report.left_out)}", "They are listed below, with the reasons.")
        )
    return verdicts


def _of_shapes(matrices: Iterable[tuple[float, int, int, int]]) -> Verdict:
    """The verdict on stable ranks, each with rows, columns and number of equal blocks of its matrix."""
    known = [(value, _random_rank(m, n, groups)) for value, m, n, groups in matrices if math.isfinite(value)]
    if not known:
        return Verdict("unknown", "Rank not known", "No stable rank of a matrix could be measured.")
    mean = statistics.fmean(value for value, _ in known)
    share = statistics.fmean(value / random for value, random in known)
    number = f"mean stable rank {shown(mean)}"
    detail = (
        f"Random matrices of these shapes have {shown(statistics.fmean(random for _, random in known))}; on average the"
        f" matrices have {percent(share)} of theirs. {len(known)} matrices. Low rank is no merit in itself."
    )
    if share <= LOW_SHARE or (share <= FALLEN and mean <= FEW_DIRECTIONS):
        return Verdict("good", f"Low rank: {number}", detail)
    if share <= HIGH_SHARE:
        return Verdict("warning", f"Lower rank than at random, but not low: {number}", detail)
    return Verdict("bad", f"Not low rank: {number}", detail)


def _random_rank(rows: int, columns: int, groups: int) -> float:
    """The stable rank of a Gaussian matrix, from the limit sqrt(rows) + sqrt(columns) of its spectral norm."""
    return groups * rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


def of_merge(report: MergeReport) -> list[Verdict]:
    """What an evaluation says about the sum."""
    verdicts = [_loss_of_sum(report)] if report.tasks else []
    leaks = [
        (value, layer, task) for task, found in report.leak.items() for layer, value in found.items() if value == value
    ]
    if leaks:
        value, layer, task = max(leaks)
        detail = (
            f"Layer {layer} on {task}: what the merge adds to its pre-activations, relative to what was there. Near 0"
            " the sum changes nothing in a layer, at 1 it adds as much as there was; whether the outputs change with it"
            " is for the metrics to say."
        )
        level: Level = "good" if value <= SMALL_LEAK else "warning"
        verdicts.append(Verdict(level, f"Largest leak {shown(value)}", detail))
    if report.settings.get("start") == "shared" and not report.settings.get("base"):
        headline = "The networks share a start, which the sum counts once per network"
        verdicts.append(Verdict("warning", headline, "Pass the start as base= to count it once."))
    if not report.tasks:
        verdicts.append(Verdict("unknown", "Not known how good the merge is", "It was not evaluated on any task."))
    return verdicts


def _loss_of_sum(report: MergeReport) -> Verdict:
    names = [name for task in report.tasks for name in report.metric_names(task)]
    accuracy = next((n for n in ("joint_accuracy", *names) if n in names and "acc" in n), None)
    metric = accuracy or next((n for n in names if "loss" in n), None)
    pairs = {}
    for task, own in report.tasks.items():
        pair = [report.metrics.get(f"{task}/{model}/{metric}", math.nan) for model in (own, "sum")]
        if all(map(math.isfinite, pair)):
            pairs[task] = (pair[0], pair[1])
    if metric is None or len(pairs) < len(report.tasks):
        reason = "An accuracy or a loss of the sum and of the task's own network is needed on every task."
        return Verdict("unknown", "Not known what the sum loses", reason)
    changes = [report.metrics.get(f"{task}/sum/output_change", math.nan) for task in report.tasks]
    moved = max((change for change in changes if math.isfinite(change)), default=math.nan)
    outputs = f"Its outputs differ by up to {percent(moved)} of their size." if math.isfinite(moved) else ""
    if accuracy is None:
        task, rise = max(((t, after / own if own > 0 else math.nan) for t, (own, after) in pairs.items()), key=_second)
        detail = joined(
            [f"{metric} on {task}: {shown(pairs[task][0])} alone, {shown(pairs[task][1])} summed.", outputs]
        )
        level: Level = "good" if rise <= SMALL_RISE else "warning"
        return Verdict(level, f"The sum's {metric} is {shown(rise)} times that of the networks alone, at most", detail)
    # Accuracies above 1 are percentages already.
    points = 1.0 if max(map(max, pairs.values())) > 1.0 else 100.0
    task, lost = max(((t, points * (own - after)) for t, (own, after) in pairs.items()), key=_second)
    before, after = (points * value for value in pairs[task])
    detail = joined([f"{metric} on {task}: {before:.1f} % alone, {after:.1f} % summed.", outputs])
    level = "good" if lost <= SMALL_LOSS else "bad" if lost > LARGE_LOSS else "warning"
    headline = (
        f"The sum loses {lost:.1f} points{' on its worse task' if len(pairs) > 1 else ''}"
        if lost > 0
        else "The sum loses nothing"
    )
    if level == "good" and moved > 1.0:
        level, outputs = "warning", "As many decisions are right, with outputs that have moved by more than their size."
        detail = joined([detail, outputs])
    return Verdict(level, headline, detail)


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
