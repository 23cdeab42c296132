"""What a run's numbers allow to say, in words; never more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from lightning_lowrank.dashboards.recorded import Series

Level = Literal["good", "warning", "bad", "unknown"]
Values = Mapping[str, "Series"]

# An alignment a leaves at least sqrt(1 - a^2) of the decay without a counterweight, whatever the gradient's size: .14
# at .99, which is small beside the 1 of a random start; .44 at .9, which is not.
STATIONARY = 0.99
NEARLY_STATIONARY = 0.9
# sqrt(2 (1 - .99)), rounded up: the residual that goes with that alignment.
SMALL_RESIDUAL = 0.15
# exp(-3): 5 % of the initialisation is left.
FORGOTTEN = 3.0
# Of two standard errors the interval holds 95 % of a normal estimate's values.
ERRORS = 2.0
# The standard error of the radial balance takes steps for independent, which they are not quite.
OFF_BALANCE = 0.2
# A value from before the last tenth of the steps tells of an earlier network.
STALE = 0.1
# Squared norms within 10 % of each other; and more than a factor of two apart.
BALANCED = 1.05
UNBALANCED = 1.5
# The products of a true group differ by rounding: 8 epsilon / sqrt(size), 6e-4 for 100 x 100 entries in bfloat16.
LARGE_DEFECT = 0.01
# "A few units", and half of what it was: a narrow layer has a small stable rank from the beginning.
FEW_DIRECTIONS = 5.0
FALLEN = 0.5
# Norms of a stationary point are tenths of those of a random start; what is left of less is on its way to 0.
VANISHED = 1e-3


@dataclass(frozen=True)
class Verdict:
    """One thing that can be said.

    Attributes:
        level: "good": as at a stationary point, or a merge that works; "bad": clearly not; "warning": neither, or with
            a reservation; "unknown": the numbers don't tell.
        headline: The verdict with its number.
        detail: When it was measured, what goes with it, and what it does not say.
    """

    level: Level
    headline: str
    detail: str


class Estimate(NamedTuple):
    """A number and the interval that it is known within; infinite ends where its error is not known."""

    value: float
    low: float
    high: float

    def above(self, threshold: float) -> bool | None:
        """Whether it is at least that large; None where the interval leaves it open."""
        return True if self.low >= threshold else None if self.high >= threshold else False

    def below(self, threshold: float) -> bool | None:
        """Whether it is at most that large; None where the interval leaves it open."""
        return True if self.high <= threshold else None if self.low <= threshold else False

    def __str__(self) -> str:
        """The number to the digits that its error leaves a meaning."""
        half = (self.high - self.low) / 2
        if not 0 < half < math.inf:
            return shown(self.value)
        digits = max(0, 1 - math.floor(math.log10(half)))
        return f"{self.value:.{digits}f} ± {half:.{digits}f}"


def shown(value: float) -> str:
    """A number as the page writes it.

    Example:
        >>> shown(0.98765), shown(float("nan"))
        ('0.9877', '-')
    """
    return f"{value:.4g}" if math.isfinite(value) else "-"


def last(values: Values, key: str) -> tuple[float, int] | None:
    """The last finite value of a key, and its step; None if there never was one."""
    series = values.get(key)
    if series is None:
        return None
    pairs = zip(reversed(series.values), reversed(series.steps), strict=True)
    return next(((value, step) for value, step in pairs if math.isfinite(value)), None)


def at(values: Values, key: str, step: int) -> float:
    """The value of a key at a step; NaN if it was not measured there."""
    series = values.get(key)
    if series is None:
        return math.nan
    found = [v for v, s in zip(series.values, series.steps, strict=True) if s == step and math.isfinite(v)]
    return found[-1] if found else math.nan


def of_run(values: Values, regimes: Mapping[str, Sequence[str]] | None, end: int) -> list[Verdict]:
    """What a training run's values say.

    Args:
        values: Series by key, without the prefix.
        regimes: Names of the layers in each regime; None if the log does not hold them.
        end: The run's last step.
    """
    verdicts = [stationarity(values, end), balance(values, end), rank(values, end), scope(values, regimes)]
    if last(values, "alignment") and last(values, "update_alignment"):
        verdicts.insert(1, _update(values, end))
    return [with_errors(verdict, "± is two standard errors.") for verdict in verdicts]


def stationarity(values: Values, end: int) -> Verdict:
    """Whether a run has come to a stationary point."""
    found = last(values, "alignment")
    if found is None:
        return _without_alignment(values, end)
    step = found[1]
    alignment, residual = (_estimate(values, key, step) for key in ("alignment", "residual"))
    tau = _tau(values, step)
    verdict = judged(alignment, residual, tau)
    details = [_when(step, end), f"Residual {residual} (0 when stationary)."]
    if math.isfinite(tau):
        details.append(f"Cumulative decay {shown(tau)}: {percent(math.exp(-tau))} of the initialisation is left.")
    else:
        details.append("How much of the initialisation is left is not known: this optimizer has no cumulative decay.")
    spread = last(values, "norm_spread")
    whole = "alignment_stderr" not in values
    if whole and alignment.below(NEARLY_STATIONARY) and tau >= FORGOTTEN and spread and spread[0] <= BALANCED:
        details.append(
            "Norms are balanced nevertheless: full-batch steps that are too large oscillate about a stationary point."
        )
    headline = f"{verdict.headline}: alignment {alignment} (1 when stationary)"
    if verdict.level == "good" and end - step > STALE * end:
        return Verdict("warning", f"Was stationary at step {step:,}: alignment {alignment}", joined(details))
    return Verdict(verdict.level, headline, joined([verdict.detail, *details]))


def judged(alignment: Estimate, residual: Estimate, tau: float = math.nan) -> Verdict:
    """The verdict on alignment, residual and cumulative decay, its headline without the numbers."""
    aligned, small = alignment.above(STATIONARY), residual.below(SMALL_RESIDUAL)
    if math.isinf(alignment.high):
        return Verdict("unknown", "Not known how far from stationary", "The alignment's error is not known.")
    if aligned is False:
        if alignment.above(NEARLY_STATIONARY) is False:
            return Verdict("bad", "Not stationary", "")
        return Verdict("warning", "Not yet stationary", "")
    if small is False:
        return Verdict("warning", "Not yet stationary", "The gradient has the decay's direction, but not its size.")
    if tau < FORGOTTEN:
        reason = f"Before a cumulative decay of {FORGOTTEN:g} the initialisation is still there."
        return Verdict("warning", "Aligned, but the initialisation is not forgotten", reason)
    if aligned and small:
        return Verdict("good", "Stationary", "")
    reason = "The residual was not measured." if math.isnan(residual.value) else "The error is too large to tell."
    return Verdict("warning", "Perhaps stationary", reason)


def _without_alignment(values: Values, end: int) -> Verdict:
    """What can be said without a full-batch alignment, and why there is none."""
    tau, minibatch = last(values, "cumulative_decay"), last(values, "alignment_minibatch")
    if last(values, "update_alignment"):
        return _update(values, end)
    if tau and tau[0] == 0.0 and not minibatch:
        return Verdict(
            "unknown",
            "Not defined: no weight decay",
            "Without weight decay the L2-regularised loss is the loss itself, and its stationary points have none of"
            " the properties that this page is about.",
        )
    radial = last(values, "radial_balance")
    balance = _estimate(values, "radial_balance", radial[1]) if radial else None
    hint = f"Radial balance {balance} (1 is necessary, not sufficient)." if balance else ""
    if radial and balance and "radial_balance_stderr" in values and _refuted(balance):
        reason = "It is 1 at a stationary point, and needs no full-batch gradient. How far away is not known."
        headline = f"Not stationary: radial balance {balance}"
        return Verdict("bad", headline, joined([reason, _when(radial[1], end)]))
    if "alignment" in values:
        reason = (
            "No window was completed, or the weights moved too fast, or the error was too large. Lower learning rates"
            " at the end help, or LowRankMonitor(gradient='full')."
        )
        return Verdict("unknown", "Not known: no full-batch value could be measured", joined([reason, hint]))
    if minibatch:
        reason = (
            f"Their alignment, {shown(minibatch[0])} at step {minibatch[1]:,}, is drowned by noise at stationary points"
            " too. Under automatic optimization LowRankMonitor(gradient='window') or measure_stationarity() tell."
        )
        return Verdict("unknown", "Not known: only mini-batch values", joined([reason, hint]))
    return Verdict("unknown", "Not known: no alignment in this log", hint or "Was LowRankMonitor among the callbacks?")


def _refuted(balance: Estimate) -> bool:
    """Whether a radial balance is surely not 1: off by more than its error and a margin for steps that depend."""
    return balance.low > 1 + OFF_BALANCE or balance.high < 1 - OFF_BALANCE


def _update(values: Values, end: int) -> Verdict:
    """The fixed point of decoupled decay, from the direction of single steps."""
    found = last(values, "update_alignment")
    assert found is not None
    value, step = found
    residual = at(values, "update_residual", step)
    details = [
        "AdamW and its like don't descend the L2-regularised loss; this is about the fixed point of their own steps.",
        f"{_when(step, end)} Residual of the update {shown(residual)} (0 at the fixed point).",
    ]
    number = f"alignment of the update {shown(value)} (1 at the fixed point)"
    if value >= STATIONARY and residual <= SMALL_RESIDUAL and end - step <= STALE * end:
        return Verdict("good", f"At the optimizer's own fixed point: {number}", joined(details))
    details.append("A single step's noise lowers the alignment, so that a low one does not refute it.")
    return Verdict("unknown", f"Not known whether at the optimizer's fixed point: {number}", joined(details))


def balance(values: Values, end: int) -> Verdict:
    """Whether layers that can trade a factor have equal norms."""
    spread, defect, gap = (last(values, key) for key in ("norm_spread", "homogeneity_defect", "norm_gap"))
    if spread is None:
        return Verdict(
            "unknown",
            "Not known whether norms are balanced",
            "No two layers were found that can trade a factor without changing the network; others need not have equal"
            " norms.",
        )
    verdict = balanced(spread[0], defect[0] if defect else math.nan)
    details = [verdict.detail, _when(spread[1], end)]
    predicted = at(values, "norm_gap_predicted", gap[1]) if gap else math.nan
    if gap and math.isfinite(predicted):
        details.append(f"Gap of squared norms {shown(gap[0])}; gradient flow predicts {shown(predicted)}.")
    level = verdict.level
    if level == "bad" and _is_decoupled(values):
        level = "warning"
        details.append("Decoupled decay makes them equal nowhere.")
    return Verdict(level, verdict.headline, joined(details))


def balanced(spread: float, defect: float) -> Verdict:
    """The verdict on a norm spread, which means something where the homogeneity defect is rounding."""
    if defect > LARGE_DEFECT:
        return Verdict(
            "unknown",
            f"Norms can't be compared: homogeneity defect {shown(defect)}",
            f"The layers that are taken for a group can't trade a factor, so their spread of {shown(spread)} means"
            " nothing.",
        )
    number = f"spread {spread:.3f} (1 when balanced)" if spread < UNBALANCED else f"spread {shown(spread)}"
    if spread <= BALANCED:
        return Verdict("good", f"Norms are balanced: {number}", "Necessary at a stationary point, not sufficient.")
    if spread <= UNBALANCED:
        return Verdict("warning", f"Norms are nearly balanced: {number}", "")
    return Verdict("bad", f"Norms are not balanced: {number}", "")


def rank(values: Values, end: int) -> Verdict:
    """Whether the stable rank has become low in the run."""
    found, series = last(values, "stable_rank"), values.get("stable_rank")
    if found is None or series is None:
        return Verdict("unknown", "Rank not known", "No spectrum was measured (spectral=None, or no time for it yet).")
    value, step = found
    first, begun = next((v, s) for v, s in zip(series.values, series.steps, strict=True) if math.isfinite(v))
    age = at(values, "spectral_age", step)
    aged = f"Logged at step {step:,}, from spectra that were measured up to {age:,.0f} steps before."
    details = [f"At step {begun:,} it was {shown(first)}.", aged if age > 0 else _when(step, end)]
    ranks = {
        key.partition("/")[2]: each[0]
        for key in values
        if key.startswith("stable_rank/") and (each := last(values, key)) is not None
    }
    if len(ranks) > 1 and not ranks.keys() <= {"q10", "q50", "q90"}:
        low, high = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
        details.append(f"From {shown(ranks[low])} ({low}) to {shown(ranks[high])} ({high}).")
    number = f"mean stable rank {shown(value)}"
    if (share := _share_of_norms(values)) < VANISHED:
        return Verdict("bad", f"The weights have vanished, with {number}", f"{percent(share)} of their norms is left.")
    fallen = begun < step and value <= FALLEN * first
    if fallen and value <= FEW_DIRECTIONS:
        details.append("No merit in itself: a collapse lowers it too.")
        return Verdict("good", f"Low rank: {number}", joined(details))
    if fallen:
        return Verdict("warning", f"Rank has fallen, not to a few directions: {number}", joined(details))
    if value <= FEW_DIRECTIONS:
        details.append("Less than half of it has gone: narrow layers and restored checkpoints begin with few as well.")
        return Verdict("warning", f"Few directions, not clearly by this run: {number}", joined(details))
    return Verdict("bad", f"Not low rank: {number}", joined(details))


def _share_of_norms(values: Values) -> float:
    """The largest norm at the end over the largest at the beginning; NaN if none was logged."""
    finite = [
        [value for value in series.values if math.isfinite(value)]
        for key, series in values.items()
        if key.startswith("frobenius_norm/")
    ]
    begun = max((norms[0] for norms in finite if norms), default=math.nan)
    return max((norms[-1] for norms in finite if norms), default=math.nan) / begun if begun > 0 else math.nan


def scope(values: Values, regimes: Mapping[str, Sequence[str]] | None) -> Verdict:
    """Which layers the theory speaks of."""
    if _is_decoupled(values):
        return Verdict(
            "bad",
            "The L2 theory does not speak of this optimizer",
            "Its weight decay is decoupled from the gradient, which has other limit points: AdamW bounds the largest"
            " entry, Muon the spectral norm.",
        )
    if regimes:
        return of_regimes({regime: len(names) for regime, names in regimes.items()})
    if last(values, "scale_invariant_balance"):
        return Verdict(
            "warning",
            "The theory does not speak of some layers",
            "Layers in front of a normalisation never align; they are left out of the means. Which they are is not in"
            " this log: monitor.regimes() says, and W&B's log.",
        )
    return Verdict(
        "unknown",
        "Which layers the theory speaks of is not in this log",
        "monitor.regimes() says it for each layer, and so does W&B's log. No scale-invariant layer has left a value.",
    )


def of_regimes(counts: Mapping[str, int]) -> Verdict:
    """The verdict on layers counted by regime."""
    total, silent = sum(counts.values()), counts.get("scale-invariant", 0)
    open_, others = counts.get("undecided", 0), counts.get("other", 0)
    details = []
    if silent:
        details.append("Scale-invariant layers, in front of a normalisation, never align; the means leave them out.")
    if others:
        details.append(f"{others} can trade a factor with no other layer, so that only their norms are not compared.")
    if open_:
        details.append(f"{open_} {'is' if open_ == 1 else 'are'} undecided: too few steps with a gradient.")
    if total and open_ == total:
        return Verdict("unknown", "Not decided yet which layers the theory speaks of", joined(details))
    if silent:
        level: Level = "bad" if silent == total else "warning"
        return Verdict(level, f"The theory does not speak of {silent} of {total} layers", joined(details))
    if open_:
        known = total - open_
        return Verdict("warning", f"The theory speaks of {known} of {total} layers at least", joined(details))
    return Verdict("good", f"The theory speaks of all {total} layers", joined(details))


def _is_decoupled(values: Values) -> bool:
    """Whether all decay is beside the gradient."""
    return "update_alignment" in values and not {"alignment", "alignment_minibatch"} & values.keys()


def _estimate(values: Values, key: str, step: int) -> Estimate:
    """A key's value at a step, and two standard errors to both sides where the run has standard errors of it."""
    value, of_error = at(values, key, step), f"{key}_stderr"
    error = ERRORS * at(values, of_error, step) if of_error in values else 0.0
    return within(value, (value - error, value + error))


def within(value: float, interval: tuple[float, float]) -> Estimate:
    """A number and its interval, whose ends are NaN where the error is not known."""
    low, high = interval
    return Estimate(value, -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high)


def _tau(values: Values, step: int) -> float:
    """The cumulative decay at a step, or before it."""
    series = values.get("cumulative_decay")
    if series is None:
        return math.nan
    pairs = zip(series.values, series.steps, strict=True)
    return max((value for value, at_step in pairs if at_step <= step and math.isfinite(value)), default=math.nan)


def _when(step: int, end: int) -> str:
    return f"Measured at step {step:,}, the last." if step >= end else f"Measured at step {step:,} of {end:,}."


def percent(share: float) -> str:
    """A share in percent, to two digits.

    Example:
        >>> percent(0.0005531), percent(1.234)
        ('0.055 %', '123 %')
    """
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def with_errors(verdict: Verdict, meaning: str) -> Verdict:
    """The verdict, with what its errors mean if it has any."""
    has = "±" in verdict.headline + verdict.detail
    return replace(verdict, detail=joined([verdict.detail, meaning])) if has else verdict


def joined(sentences: Iterable[str]) -> str:
    """The sentences that are not empty."""
    return " ".join(sentence for sentence in sentences if sentence)
