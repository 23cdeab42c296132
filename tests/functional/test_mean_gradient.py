"""What a window of mini-batch gradients says about the full-batch gradient, against exact expectations."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from lightning_lowrank.functional import InnerProducts
from lightning_lowrank.functional.mean_gradient import (
    MOST_MOVED,
    MOST_STDERR,
    MeanGradient,
    _Draws,
)

DECAY = 0.1


def make_population(samples, dims=3, noise=2.0, across=0.05, seed=0):
    """Per-sample gradients around -wd * theta plus something across it, and theta."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(dims, dtype=torch.float64, generator=generator)
    bent = across * torch.randn(dims, dtype=torch.float64, generator=generator)
    spread = noise * DECAY * torch.randn(samples, dims, dtype=torch.float64, generator=generator)
    return bent - DECAY * theta + spread - spread.mean(0), theta


def feed(rows, theta, batches, population=math.inf):
    """A window over batches of (epoch, indices)."""
    window, total = MeanGradient(population), torch.zeros_like(theta)
    for epoch, indices in batches:
        g = rows[list(indices)].mean(0)
        window.update(theta @ g, g @ g, total @ g, samples=len(indices), epoch=epoch)
        total += len(indices) * g
    return window


def cut(order, sizes, epoch=0):
    ends = itertools.accumulate(sizes)
    return [(epoch, order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def exact(rows, theta):
    """The truth from all samples."""
    return InnerProducts.of([theta], [rows.mean(0)], DECAY)


@pytest.mark.parametrize(
    "epochs",
    [[(2,)], [(1, 1)], [(1, 1, 1)], [(2, 1)], [(1, 2)], [(3, 1)], [(2, 2), (2,)], [(2, 1), (1, 2)]],
    ids=str,
)
def test_square_of_the_full_gradient_is_unbiased_without_replacement(epochs):
    # The mean over all orders in which the epochs can come is the expectation itself.
    rows, theta = make_population(4)
    orders = list(itertools.permutations(range(4)))
    found = []
    for drawn in itertools.product(orders, repeat=len(epochs)):
        pairs = zip(drawn, epochs, strict=True)
        batches = [batch for epoch, (order, sizes) in enumerate(pairs) for batch in cut(order, sizes, epoch)]
        found.append(feed(rows, theta, batches, 4).estimate(theta @ theta, DECAY).gradient_squared.item())
    if epochs == [(2,)]:
        # A single batch holds no pair of batches to learn from.
        assert all(math.isnan(value) for value in found)
    else:
        assert statistics.fmean(found) == pytest.approx(exact(rows, theta).gg.item(), rel=1e-9)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 1, 2)], ids=str)
def test_square_of_the_full_gradient_is_unbiased_with_replacement(sizes):
    rows, theta = make_population(4)
    draws = itertools.product(range(4), repeat=sum(sizes))
    found = [
        feed(rows, theta, cut(draw, sizes)).estimate(theta @ theta, DECAY).gradient_squared.item() for draw in draws
    ]
    assert statistics.fmean(found) == pytest.approx(exact(rows, theta).gg.item(), rel=1e-9)


def test_unequal_weights_within_a_batch_count_as_fewer_samples():
    # Two accumulated batches of 2 and 1 samples, each a mean; then one of 1. Kish's number of the first step is 2^2 /
    # (1/2 + 1), as in Sampling.
    rows, theta = make_population(4)
    samples, found = 4 / 1.5, []
    for order in itertools.permutations(range(4)):
        first = (rows[list(order[:2])].mean(0) + rows[order[2]]) / 2
        second = rows[order[3]]
        window = MeanGradient(4)
        window.update(theta @ first, first @ first, torch.tensor(0.0), samples=samples, epoch=0)
        window.update(theta @ second, second @ second, samples * first @ second, samples=1, epoch=0)
        found.append(window.estimate(theta @ theta, DECAY).gradient_squared.item())
    assert statistics.fmean(found) == pytest.approx(exact(rows, theta).gg.item(), rel=1e-9)


def test_equal_batches_give_the_formula_of_the_theory():
    rows, theta = make_population(24)
    batches, per_epoch, steps = 6, 4, [6, 3]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    window = [(e, order[per_epoch * k : per_epoch * (k + 1)]) for e, count in enumerate(steps) for k in range(count)]
    g = torch.stack([rows[indices].mean(0) for _, indices in window])
    k = sum(steps)
    c = sum(n * (batches - n) / (batches - 1) for n in steps) / k
    expected = (g.sum(0).square().sum() - c * g.square().sum()) / (k**2 - c * k)
    found = feed(rows, theta, window, 24).estimate(theta @ theta, DECAY)
    assert found.gradient_squared.item() == pytest.approx(expected.item(), rel=1e-12)
    pull = DECAY * theta @ g.mean(0)
    assert found.pull.item() == pytest.approx(pull.item(), rel=1e-12)
    assert found.alignment.item() == pytest.approx((-pull / (DECAY * theta.norm() * expected.sqrt())).item(), rel=1e-12)


@pytest.mark.parametrize("epochs", [1, 3])
def test_whole_epochs_are_exact_whatever_the_batches(epochs):
    rows, theta = make_population(20)
    orders = [torch.randperm(20, generator=torch.Generator().manual_seed(e)).tolist() for e in range(epochs)]
    batches = [batch for e, order in enumerate(orders) for batch in cut(order, (8, 8, 4), e)]
    found, truth = feed(rows, theta, batches, 20).estimate(theta @ theta, DECAY), exact(rows, theta)
    assert found.alignment.item() == pytest.approx(truth.alignment(), rel=1e-12)
    assert found.residual.item() == pytest.approx(truth.residual(), rel=1e-10)
    assert found.radial_balance.item() == pytest.approx(truth.radial_balance(), rel=1e-12)
    errors = (found.alignment_stderr, found.residual_stderr, found.radial_balance_stderr)
    assert [error.item() for error in errors] == [0, 0, 0]


def test_one_batch_of_all_samples_is_the_truth():
    rows, theta = make_population(6)
    found = feed(rows, theta, [(0, range(6))], 6).estimate(theta @ theta, DECAY)
    assert found.alignment.item() == pytest.approx(exact(rows, theta).alignment(), rel=1e-12)


def test_a_stationary_point_has_alignment_1_and_residual_0():
    theta = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rows = (-DECAY * theta).expand(8, 2)
    found = feed(rows, theta, cut(list(range(8)), (4, 4)), 8).estimate(theta @ theta, DECAY)
    assert found.alignment.item() == pytest.approx(1, rel=1e-12)
    assert found.residual.item() == pytest.approx(0, abs=1e-6)


def test_noise_that_outweighs_the_window_is_nan_and_not_clipped():
    rows = torch.tensor([[1.0], [-1.1]], dtype=torch.float64)
    theta = torch.ones(1, dtype=torch.float64)
    found = feed(rows, theta, [(0, [0]), (0, [1])]).estimate(theta @ theta, DECAY)
    assert found.gradient_squared.item() < 0
    assert math.isnan(found.alignment.item())
    assert math.isnan(found.residual.item())
    assert found.radial_balance.item() == pytest.approx(0.05 / DECAY)


def test_subsets_and_decays_of_their_own():
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (4, 3, 5)]
    decays = torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64)
    whole, alone, decayed = MeanGradient(), MeanGradient(), MeanGradient()
    totals = [torch.zeros_like(theta) for theta in thetas]
    for _ in range(6):
        grads = [torch.randn(len(t), dtype=torch.float64, generator=generator) - 0.9 * t for t in thetas]
        table = [torch.stack([x @ g for x, g in zip(side, grads, strict=True)]) for side in (thetas, grads, totals)]
        whole.update(*table, samples=2, epoch=0)
        alone.update(*(row[2] for row in table), samples=2, epoch=0)
        scale = decays / 0.1
        # With one decay for all, scaled weights pull as the others do.
        decayed.update(
            (table[0] * scale)[[0, 2]].sum(), table[1][[0, 2]].sum(), table[2][[0, 2]].sum(), samples=2, epoch=0
        )
        totals = [total + 2 * g for total, g in zip(totals, grads, strict=True)]
    ww = torch.stack([theta @ theta for theta in thetas])
    found = whole.estimate(ww, decays, [[0, 1, 2], [2], [1]])
    single = alone.estimate(ww[2], 0.3)
    for name in ("alignment", "residual", "radial_balance", "alignment_stderr", "residual_stderr"):
        assert getattr(found, name)[1].item() == pytest.approx(getattr(single, name).item(), rel=1e-9)
    both = decayed.estimate((ww * scale.square()).sum(), 0.1)
    for name in ("alignment", "residual", "alignment_stderr", "residual_stderr"):
        assert getattr(found, name)[0].item() == pytest.approx(getattr(both, name).item(), rel=1e-9)
    assert math.isnan(found.alignment[2].item())  # it is not decayed


def test_error_of_the_balance_is_the_usual_one_with_replacement():
    rows, theta = make_population(30)
    draws = torch.randint(30, (12, 5), generator=torch.Generator().manual_seed(0)).tolist()
    found = feed(rows, theta, [(0, draw) for draw in draws]).estimate(theta @ theta, DECAY)
    balances = [-(theta @ rows[draw].mean(0) / (DECAY * theta @ theta)).item() for draw in draws]
    assert found.radial_balance.item() == pytest.approx(statistics.fmean(balances))
    assert found.radial_balance_stderr.item() == pytest.approx(statistics.stdev(balances) / math.sqrt(12))


def test_error_of_the_balance_has_the_right_square_without_replacement():
    # Over all orders its mean square is the true variance of the mean: two batches, of 2 and 1 samples of 5.
    rows, theta = make_population(5)
    found = [
        feed(rows, theta, cut(order, (2, 1)), 5).estimate(theta @ theta, DECAY)
        for order in itertools.permutations(range(5))
    ]
    spread = statistics.pvariance(estimate.radial_balance.item() for estimate in found)
    assert statistics.fmean(e.radial_balance_stderr.item() ** 2 for e in found) == pytest.approx(spread, rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "epochs", "population"),
    [((4, 4, 2), (0, 0, 0), math.inf), ((4, 4, 2), (0, 0, 0), 16), ((8, 8, 8, 5), (0, 0, 1, 1), 16)],
)
def test_variance_of_the_quadratic_noise_is_that_of_gaussians(sizes, epochs, population):
    # Var(x' M x) = 2 tr((M Sigma)^2) for the batches' summed noise x, in one dimension.
    b = torch.tensor(sizes, dtype=torch.float64)
    same = torch.tensor(epochs)[:, None] == torch.tensor(epochs)
    sigma = torch.diag(b) - same * torch.outer(b, b) / population
    draws = _Draws.of(sizes, epochs, population)
    assert draws.correction == pytest.approx((sigma.sum() / sigma.trace()).item())
    form = torch.ones_like(sigma) - draws.correction * torch.eye(len(b))
    assert draws.quadratic_spread == pytest.approx((form @ sigma @ form @ sigma).trace().item())


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(("noise", "across"), [(1.5, 0.05), (4.0, 0.3)])
def test_standard_errors_cover_the_truth(replacement, noise, across):
    rows, theta = make_population(480, dims=30, noise=noise, across=across)
    truth, generator = exact(rows, theta), torch.Generator().manual_seed(1)
    found = []
    for _ in range(100):
        drawn = (
            torch.randint(480, (480,), generator=generator) if replacement else torch.randperm(480, generator=generator)
        )
        batches = [(0, indices) for indices in drawn[:240].reshape(40, 6).tolist()]
        found.append(feed(rows, theta, batches, math.inf if replacement else 480).estimate(theta @ theta, DECAY))
    for name in ("alignment", "residual", "radial_balance"):
        values = torch.cat([getattr(estimate, name) for estimate in found])
        errors = torch.cat([getattr(estimate, f"{name}_stderr") for estimate in found])
        z = (values - getattr(truth, name)()) / errors
        # A standard deviation from 100 windows is good to 7 %; the errors themselves are estimates.
        assert 0.75 < z.square().mean().sqrt() < 1.35, name
        assert (z.abs() < 2).double().mean() > 0.85, name
        # The two have the same scale, not only the same ratio in the mean.
        assert errors.median().item() == pytest.approx(values.std().item(), rel=0.25), name


def test_errors_are_finite_after_many_epochs():
    # At the end of an epoch the mean of the earlier gradients has no noise, which is no reason to divide by it.
    for seed in range(20):
        rows, theta = make_population(120, dims=10, noise=1.0, across=0.0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        batches = [
            (epoch, indices)
            for epoch in range(3)
            for indices in torch.randperm(120, generator=generator).reshape(20, 6).tolist()
        ][:50]
        window = feed(rows, theta, batches, 120)
        found, truth = window.estimate(theta @ theta, DECAY), exact(rows, theta)
        assert 0 < found.alignment_stderr.item() < 0.05
        assert abs(found.alignment.item() - truth.alignment()) < 5 * found.alignment_stderr.item()
        assert found.residual.isnan().item() == found.residual_stderr.isnan().item()


def test_trusted_leaves_out_what_may_be_far_off():
    rows, theta = make_population(64, dims=10, noise=0.2)
    window = feed(rows, theta, cut(list(range(64)), (4,) * 12), 64)
    found = window.estimate(theta @ theta, DECAY)
    assert found.alignment_stderr.item() < MOST_STDERR
    kept = found.trusted(0.9 * MOST_MOVED)
    assert (kept.alignment, kept.residual) == (found.alignment, found.residual)
    for moved in (1.1 * MOST_MOVED, math.nan):
        lost = found.trusted(moved)
        assert math.isnan(lost.alignment.item())
        assert math.isnan(lost.residual.item())
        assert lost.radial_balance == found.radial_balance
    noisy = feed(*make_population(64, dims=10, noise=20.0), cut(list(range(64)), (4,) * 12), 64)
    uncertain = noisy.estimate(theta @ theta, DECAY)
    assert uncertain.alignment_stderr.item() > MOST_STDERR
    assert math.isnan(uncertain.trusted(0.0).alignment.item())


@pytest.mark.parametrize(("alignment", "kept"), [(1.04, True), (1.06, False), (-1.06, False)])
def test_a_cosine_far_above_1_is_no_cosine(alignment, kept):
    rows, theta = make_population(8)
    found = feed(rows, theta, [(0, range(8))], 8).estimate(theta @ theta, DECAY)
    values = torch.tensor([alignment], dtype=torch.float64)
    trusted = replace(found, alignment=values, alignment_stderr=torch.full_like(values, 0.01)).trusted(0.0)
    assert trusted.alignment.isfinite().item() == kept
    assert trusted.residual.isfinite().item() == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.zeros(3), torch.zeros(2), 1), r"one entry per parameter, got shapes"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2), 0), r"got a batch of 0"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2), 9), r"has 8 samples, got a batch of 9"),
    ],
)
def test_refuses_what_can_not_be(arguments, message):
    *products, samples = arguments
    with pytest.raises(ValueError, match=message):
        MeanGradient(8).update(*products, samples=samples, epoch=0)


def test_refuses_an_epoch_with_too_many_samples():
    window = MeanGradient(8)
    window.update(*torch.zeros(3, 1), samples=6, epoch=0)
    window.update(*torch.zeros(3, 1), samples=6, epoch=1)
    with pytest.raises(ValueError, match=r"epoch 0 has 8 samples, got a batch of 4 that makes 10"):
        window.update(*torch.zeros(3, 1), samples=4, epoch=0)


def test_refuses_an_empty_window_and_an_empty_population():
    with pytest.raises(ValueError, match="call update first"):
        MeanGradient().estimate(torch.ones(1), 0.1)
    with pytest.raises(ValueError, match="population must be positive"):
        MeanGradient(0)
