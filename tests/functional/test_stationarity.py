import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank.functional import (
    InnerProducts,
    alignment,
    implied_weight_decay,
    norm_spread,
    radial_balance,
    residual,
)


def random_problem(seed, shapes=((5, 7), (7,), (3, 2, 3, 3)), decays=(0.1, 0.0, 0.02)):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    return weights, grads, list(decays)


def as_numpy(weights, grads, decays):
    """theta, g and the decay of each entry as float64 vectors: the oracle shares no code with the package."""
    flat = [np.concatenate([t.numpy().astype(np.float64).ravel() for t in ts]) for ts in (weights, grads)]
    return *flat, np.concatenate([np.full(w.numel(), d) for w, d in zip(weights, decays, strict=True)])


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_formulas_agree_with_numpy_in_float64(seed):
    weights, grads, decays = random_problem(seed)
    theta, g, wd = as_numpy(weights, grads, decays)
    decayed = wd > 0
    pull = wd[decayed] * theta[decayed]
    g_decayed = g[decayed]
    expected = {
        alignment: -(pull @ g_decayed) / np.linalg.norm(pull) / np.linalg.norm(g_decayed),
        residual: np.linalg.norm(g_decayed + pull) / np.linalg.norm(pull),
        radial_balance: -(theta[decayed] @ g_decayed) / (theta[decayed] @ pull),
    }
    for function, value in expected.items():
        assert function(weights, grads, decays) == pytest.approx(value, rel=1e-10), function.__name__
    assert implied_weight_decay(weights, grads) == pytest.approx(-(theta @ g) / (theta @ theta), rel=1e-10)


def test_stationary_point_with_different_decays_is_recognised_where_the_plain_cosine_is_not():
    weights, _, _ = random_problem(0, shapes=((4, 4), (4, 4)), decays=(0.1, 0.001))
    grads = [-0.1 * weights[0], -0.001 * weights[1]]
    assert alignment(weights, grads, [0.1, 0.001]) == pytest.approx(1, abs=1e-7)
    assert residual(weights, grads, [0.1, 0.001]) == pytest.approx(0, abs=1e-6)
    assert radial_balance(weights, grads, [0.1, 0.001]) == pytest.approx(1, abs=1e-6)
    theta, g, _ = as_numpy(weights, grads, [0.1, 0.001])
    assert -(theta @ g) / np.linalg.norm(theta) / np.linalg.norm(g) < 0.9


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_residuals_do_not_drown_in_rounding(size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    grad = -0.1 * weight + size * 0.1 * noise * weight.norm() / noise.norm()
    assert residual([weight], [grad], 0.1) == pytest.approx(size, rel=1e-4, abs=1e-9)


def test_radial_balance_of_minibatches_averages_to_that_of_the_mean_gradient():
    weights, _, _ = random_problem(0, shapes=((5, 7),), decays=(0.1,))
    batches = [torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    mean = torch.stack(batches).double().mean(0)
    averaged = np.mean([radial_balance(weights, [grad], 0.1) for grad in batches])
    assert averaged == pytest.approx(radial_balance([weights[0].double()], [mean], 0.1), rel=1e-9)


@pytest.mark.parametrize("function", [alignment, residual, radial_balance])
def test_without_decay_or_weight_there_is_no_value(function):
    weights, grads, _ = random_problem(0)
    assert math.isnan(function(weights, grads, 0.0))
    assert math.isnan(function([torch.zeros(3)], [torch.ones(3)], 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_entries_give_nan(bad):
    grads = [torch.tensor([1.0, bad])]
    for function in (alignment, residual, radial_balance):
        assert math.isnan(function([torch.ones(2)], grads, 0.1))


def test_complex_bf16_and_sparse_tensors():
    weight = torch.tensor([1 + 2j, 3 - 1j])
    assert alignment([weight], [-0.1 * weight], 0.1) == pytest.approx(1, abs=1e-6)
    half = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert alignment([half], [-half], 0.1) == pytest.approx(1, abs=1e-12)
    dense = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    values = [residual([torch.ones(2, 2)], [grad], 0.1) for grad in (dense, dense.to_sparse())]
    assert values[0] == values[1]


def test_large_tensors_are_summed_in_pieces_without_loss():
    weight = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    products = InnerProducts.of([weight], [weight], 0.1)
    assert products.ww.item() == pytest.approx((weight.double() ** 2).sum().item(), rel=1e-14)


@pytest.mark.parametrize(
    ("weights", "grads", "decay", "message"),
    [
        ([torch.ones(2)], [], 0.1, "1 weights and 0 gradients"),
        ([torch.ones(2)], [torch.ones(3)], 0.1, r"weight 0 has shape \(2,\) and its gradient \(3,\)"),
        ([torch.ones(2)], [torch.ones(2)], [0.1, 0.2], "1 weights and 2 weight decays"),
        ([torch.ones(2)], [torch.ones(2)], -0.1, "at least 0, got -0.1"),
    ],
)
def test_arguments_that_do_not_match_are_named(weights, grads, decay, message):
    with pytest.raises(ValueError, match=message):
        alignment(weights, grads, decay)


def test_norm_spread():
    assert norm_spread([1.0, 3.0, 2.0]) == 3
    assert math.isnan(norm_spread([1.0]))
    assert math.isnan(norm_spread([1.0, 0.0]))
    assert math.isnan(norm_spread([1.0, math.nan]))
