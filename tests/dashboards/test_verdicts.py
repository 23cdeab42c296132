"""Verdicts: constructed numbers with a known answer, and never more than the numbers say."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_lowrank import MergeReport
from lightning_lowrank.dashboards import page_verdicts, verdicts
from lightning_lowrank.dashboards.recorded import Series
from tests.dashboards.browser import make_merge, make_spectra, make_stationarity

NAN = math.nan
END = 1000


def values(**found):
    """Series of one value at the last step, or of several up to it."""
    series = {}
    for key, value in found.items():
        several = value if isinstance(value, list) else [value]
        steps = [END * (number + 1) // len(several) for number in range(len(several))]
        series[key.replace("__", "/")] = Series(steps, several)
    return series


CONVERGED = {"alignment": 0.998, "residual": 0.06, "cumulative_decay": 7.0}


def stationarity(**changed):
    return verdicts.stationarity(values(**{**CONVERGED, **changed}), END)


@pytest.mark.parametrize(
    ("changed", "level", "headline"),
    [
        ({}, "good", "Stationary: alignment 0.998 (1 when stationary)"),
        ({"alignment_stderr": 0.001}, "good", "Stationary: alignment 0.9980 ± 0.0020"),
        ({"alignment_stderr": 0.01}, "warning", "Perhaps stationary: alignment 0.998 ± 0.020"),
        ({"alignment": 0.97, "alignment_stderr": 0.02}, "warning", "Perhaps stationary: alignment 0.970 ± 0.040"),
        ({"alignment": 0.93, "alignment_stderr": 0.01}, "warning", "Not yet stationary: alignment 0.930 ± 0.020"),
        ({"alignment": 0.989}, "warning", "Not yet stationary"),
        ({"alignment": 0.5, "alignment_stderr": 0.01}, "bad", "Not stationary: alignment 0.500 ± 0.020"),
        ({"alignment_stderr": NAN}, "unknown", "Not known how far from stationary"),
        ({"residual": 0.5}, "warning", "Not yet stationary"),
        ({"residual": NAN}, "warning", "Perhaps stationary"),
        ({"residual_stderr": 0.06}, "warning", "Perhaps stationary"),
        ({"residual_stderr": 0.04}, "good", "Stationary"),
        ({"cumulative_decay": 2.9}, "warning", "Aligned, but the initialisation is not forgotten"),
        ({"cumulative_decay": NAN}, "good", "Stationary"),
    ],
)
def test_stationarity_is_said_within_the_errors(changed, level, headline):
    verdict = stationarity(**changed)
    assert verdict.level == level
    assert verdict.headline.startswith(headline)


def test_a_gradient_of_the_wrong_size_is_told():
    assert "not its size" in stationarity(residual=0.5).detail
    assert "The residual was not measured" in stationarity(residual=NAN).detail


def test_without_a_cumulative_decay_what_is_left_of_the_initialisation_is_not_known():
    assert "is not known" in stationarity(cumulative_decay=NAN).detail
    assert "0.091 % of the initialisation is left" in stationarity().detail


def test_a_value_from_long_ago_is_in_the_past_tense():
    old = verdicts.stationarity(values(**{k: [v] + [NAN] * 3 for k, v in CONVERGED.items()}), END)
    assert old.level == "warning"
    assert old.headline == "Was stationary at step 250: alignment 0.998"
    assert "Measured at step 250 of 1,000." in old.detail
    recent = verdicts.stationarity(values(**{k: [*[NAN] * 18, v, NAN] for k, v in CONVERGED.items()}), END)
    assert recent.level == "good"


def test_the_cumulative_decay_counts_as_it_was_when_the_alignment_was_measured():
    verdict = stationarity(
        alignment=[*[NAN] * 8, 0.998, NAN], residual=[*[NAN] * 8, 0.06, NAN], cumulative_decay=[2.0] * 9 + [8.0]
    )
    assert verdict.headline.startswith("Aligned, but the initialisation is not forgotten")


def test_balanced_norms_with_a_low_cosine_point_to_large_steps_of_full_batches_alone():
    seen = {"alignment": 0.5, "norm_spread": 1.001}
    assert "oscillate" in stationarity(**seen).detail
    assert "oscillate" not in stationarity(**seen, alignment_stderr=0.01).detail
    assert "oscillate" not in stationarity(**{**seen, "norm_spread": 2.0}).detail


@pytest.mark.parametrize(
    ("found", "headline", "detail"),
    [
        ({"alignment_minibatch": 0.04, "radial_balance": 1.0}, "Not known: only mini-batch values", "drowned by noise"),
        ({"alignment": NAN, "alignment_minibatch": 0.04}, "Not known: no full-batch value could be", "No window was"),
        ({"alignment": NAN, "cumulative_decay": 0.0}, "Not defined: no weight decay", "loss itself"),
        ({"stable_rank": 3.0}, "Not known: no alignment in this log", "callbacks"),
        ({"update_alignment": 0.79, "update_residual": 0.7}, "Not known whether at the optimizer's fixed", "noise"),
    ],
)
def test_what_can_not_be_known_is_unknown_with_the_reason(found, headline, detail):
    verdict = verdicts.stationarity(values(**found), END)
    assert verdict.level == "unknown"
    assert verdict.headline.startswith(headline)
    assert detail in verdict.detail


@pytest.mark.parametrize(
    ("balance", "error", "refuted"),
    [(23.6, 0.3, True), (0.2, 0.1, True), (1.1, 0.3, False), (3.0, 1.5, False), (23.6, NAN, False)],
)
def test_a_radial_balance_that_is_surely_not_one_refutes_stationarity(balance, error, refuted):
    found = values(alignment_minibatch=0.1, radial_balance=balance, radial_balance_stderr=error)
    verdict = verdicts.stationarity(found, END)
    assert (verdict.level == "bad") is refuted
    assert verdict.headline.startswith("Not stationary: radial balance" if refuted else "Not known")


def test_a_radial_balance_of_one_is_never_taken_for_stationarity():
    verdict = verdicts.stationarity(values(alignment_minibatch=0.9, radial_balance=1.0), END)
    assert verdict.level == "unknown"
    assert "Radial balance 1 (1 is necessary, not sufficient)" in verdict.detail


def test_decoupled_decay_has_a_target_of_its_own():
    found = values(update_alignment=0.995, update_residual=0.1)
    assert verdicts.stationarity(found, END).headline.startswith("At the optimizer's own fixed point")
    assert verdicts.scope(found, None).level == "bad"
    mixed = verdicts.of_run(values(**CONVERGED, update_alignment=0.995, update_residual=0.1), None, END)
    assert [verdict.level for verdict in mixed[:2]] == ["good", "good"]


@pytest.mark.parametrize(
    ("spread", "defect", "level", "headline"),
    [
        (1.002, 1e-7, "good", "Norms are balanced: spread 1.002"),
        (1.2, 1e-7, "warning", "Norms are nearly balanced: spread 1.200"),
        (2.4, 1e-7, "bad", "Norms are not balanced: spread 2.4"),
        (1.002, 0.3, "unknown", "Norms can't be compared: homogeneity defect 0.3"),
        (1.002, NAN, "good", "Norms are balanced"),
        (NAN, NAN, "unknown", "Not known whether norms are balanced"),
    ],
)
def test_norms_are_compared_within_groups_that_are_groups(spread, defect, level, headline):
    verdict = verdicts.balance(values(norm_spread=spread, homogeneity_defect=defect), END)
    assert verdict.level == level
    assert verdict.headline.startswith(headline)


def test_decoupled_decay_promises_no_balance():
    verdict = verdicts.balance(values(norm_spread=2.4, update_alignment=0.5), END)
    assert verdict.level == "warning"
    assert "Decoupled decay makes them equal nowhere" in verdict.detail


def test_errors_are_explained_where_there_are_any():
    said = "± is two standard errors."
    exact, noisy = (
        verdicts.of_run(values(**CONVERGED, **more), None, END)[0] for more in ({}, {"alignment_stderr": 0.1})
    )
    assert said not in exact.detail
    assert said in noisy.detail
    assert "holds 95 %" in page_verdicts.of_stationarity(make_stationarity(["a"]))[0].detail


@pytest.mark.parametrize(
    ("ranks", "level", "headline"),
    [
        ([22.0, 8.0, 3.1], "good", "Low rank: mean stable rank 3.1"),
        ([60.0, 25.0, 20.0], "warning", "Rank has fallen, not to a few directions"),
        ([3.4, 3.3, 3.1], "warning", "Few directions, not clearly by this run"),
        ([22.0, 21.0, 20.0], "bad", "Not low rank"),
        ([3.1], "warning", "Few directions, not clearly by this run"),
        ([NAN], "unknown", "Rank not known"),
    ],
)
def test_a_low_rank_is_one_that_the_run_has_made(ranks, level, headline):
    verdict = verdicts.rank(values(stable_rank=ranks), END)
    assert verdict.level == level
    assert verdict.headline.startswith(headline)


def test_the_rank_is_told_with_its_layers_and_its_age():
    found = values(stable_rank=[22.0, 3.0], spectral_age=[0.0, 250.0], stable_rank__a=[9.0, 2.0], stable_rank__b=4.0)
    detail = verdicts.rank(found, END).detail
    assert "From 2 (a) to 4 (b)." in detail
    assert "up to 250 steps before" in detail
    many = values(stable_rank=[22.0, 3.0], stable_rank__q10=2.0, stable_rank__q50=3.0, stable_rank__q90=4.0)
    assert "q10" not in verdicts.rank(many, END).detail


def test_weights_that_have_vanished_are_of_no_low_rank():
    found = {"stable_rank": [22.0, 1.0], "frobenius_norm__a": [9.0, 1e-15], "frobenius_norm__b": [4.0, 2e-15]}
    verdict = verdicts.rank(values(**found), END)
    assert (verdict.level, verdict.headline) == ("bad", "The weights have vanished, with mean stable rank 1")
    assert verdicts.rank(values(**{**found, "frobenius_norm__b": [4.0, 1.0]}), END).level == "good"


@pytest.mark.parametrize(
    ("regimes", "level", "headline"),
    [
        ({"homogeneous": ["a", "b"], "other": ["c"]}, "good", "The theory speaks of all 3 layers"),
        ({"homogeneous": ["a"], "scale-invariant": ["b"]}, "warning", "The theory does not speak of 1 of 2 layers"),
        ({"scale-invariant": ["b"]}, "bad", "The theory does not speak of 1 of 1 layers"),
        ({"other": ["a"], "undecided": ["b"]}, "warning", "The theory speaks of 1 of 2 layers at least"),
        ({"undecided": ["b"]}, "unknown", "Not decided yet"),
        (None, "unknown", "Which layers the theory speaks of is not in this log"),
    ],
)
def test_regimes_are_counted(regimes, level, headline):
    verdict = verdicts.scope({}, regimes)
    assert verdict.level == level
    assert verdict.headline.startswith(headline)


def test_scale_invariant_layers_show_in_a_log_without_regimes():
    assert verdicts.scope(values(scale_invariant_balance=1.1), None).level == "warning"


def test_a_stationarity_report_speaks_with_its_intervals():
    report = make_stationarity(["a", "b"])
    assert [verdict.level for verdict in page_verdicts.of_stationarity(report)] == ["good", "good", "good", "good"]
    wide = replace(report, alignment_interval=(0.95, 1.0))
    assert page_verdicts.of_stationarity(wide)[0].headline.startswith("Perhaps stationary")
    lost = replace(report, alignment=NAN, alignment_interval=(NAN, NAN))
    assert page_verdicts.of_stationarity(lost)[0].level == "unknown"


def test_stable_ranks_are_compared_with_those_of_random_matrices():
    # The oracle: a Gaussian matrix' own stable rank.
    sigma = torch.linalg.svdvals(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    random = (sigma.square().sum() / sigma[0] ** 2).item()
    report = make_spectra(["a", "b"])
    at_random = [replace(row, stable_rank=random) for row in report.matrices]
    assert page_verdicts.of_weights(replace(report, matrices=at_random))[0].level == "bad"
    assert "102 % of theirs" in page_verdicts.of_weights(replace(report, matrices=at_random))[0].detail
    assert page_verdicts.of_weights(report)[0].level == "good"
    half = [replace(row, stable_rank=random / 2) for row in report.matrices]
    assert page_verdicts.of_weights(replace(report, matrices=half))[0].level == "warning"


def test_weights_that_are_not_finite_and_what_was_left_out_are_told():
    report = make_spectra(["a", "b"])
    broken = replace(report, matrices=[replace(report.matrices[0], finite=False), report.matrices[1]])
    headlines = [verdict.headline for verdict in page_verdicts.of_weights(broken)]
    assert headlines[1:] == ["1 of 2 matrices have entries that are not finite", "Tensors left out: 1"]


def merge(own: float, after: float, metric: str = "joint_accuracy", change: float = 0.4) -> MergeReport:
    metrics = {f"t/m1/{metric}": own, f"t/sum/{metric}": after, "t/sum/output_change": change}
    return MergeReport({"t": "m1"}, ["m1", "sum"], metrics)


@pytest.mark.parametrize(
    ("report", "level", "headline"),
    [
        (merge(0.98, 0.979), "good", "The sum loses 0.1 points"),
        (merge(98.0, 97.9, "test_acc"), "good", "The sum loses 0.1 points"),
        (merge(0.97, 0.98), "good", "The sum loses nothing"),
        (merge(0.98, 0.95), "warning", "The sum loses 3.0 points"),
        (merge(0.98, 0.60), "bad", "The sum loses 38.0 points"),
        (merge(0.98, 0.98, change=1.3), "warning", "The sum loses nothing"),
        (merge(0.98, NAN), "unknown", "Not known what the sum loses"),
        (merge(0.10, 0.105, "test_loss"), "good", "The sum's test_loss is 1.05 times"),
        (merge(0.10, 0.20, "test_loss"), "warning", "The sum's test_loss is 2 times"),
        (merge(0.10, 0.20, "mystery"), "unknown", "Not known what the sum loses"),
        (MergeReport({}, [], {}), "unknown", "Not known how good the merge is"),
    ],
)
def test_what_the_sum_loses(report, level, headline):
    verdict = page_verdicts.of_merge(report)[0]
    assert verdict.level == level
    assert verdict.headline.startswith(headline)


def test_the_worst_task_and_the_largest_leak_count():
    loss, leak = page_verdicts.of_merge(make_merge())
    assert loss.headline == "The sum loses 0.2 points on its worse task"
    assert "digits 0-4: 99.3 % alone, 99.1 % summed" in loss.detail
    assert (leak.level, leak.headline) == ("warning", "Largest leak 0.21")


def test_a_start_that_is_summed_twice_is_told():
    report = replace(make_merge(), settings={"start": "shared", "base": False})
    assert "share a start" in page_verdicts.of_merge(report)[-1].headline
    assert len(page_verdicts.of_merge(replace(report, settings={"start": "shared", "base": True}))) == 2
