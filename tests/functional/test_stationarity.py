import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank.functional import (
    InnerProducts,
    RescalingGroups,
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


def groups_of(net, inputs, steps=4, classes=3):
    """What RescalingGroups finds for a network from a few random batches."""
    found = RescalingGroups()
    names = [name for name, p in net.named_parameters() if p.ndim > 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        net.zero_grad()
        x = torch.randn(inputs, generator=generator)
        y = torch.randint(classes, (inputs[0],), generator=generator)
        torch.nn.functional.cross_entropy(net(x), y).backward()
        products = InnerProducts.of(
            [net.get_parameter(n) for n in names], [net.get_parameter(n).grad for n in names], 0.0
        )
        found.update(names, products.wg.tolist(), (products.ww * products.gg).sqrt().tolist())
    return found.groups()


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.first, self.up, self.down, self.last = (
            linear(a, b, bias=False) for a, b in ((6, 16), (16, 12), (12, 16), (16, 3))
        )

    def forward(self, x):
        h = self.first(x).relu()
        return self.last((h + self.down(self.up(h).relu())).relu())


def test_rescaling_groups_of_a_chain_are_the_whole_chain():
    torch.manual_seed(0)
    linear = torch.nn.Linear
    net = torch.nn.Sequential(
        linear(6, 16, bias=False),
        torch.nn.ReLU(),
        linear(16, 12, bias=False),
        torch.nn.ReLU(),
        linear(12, 3, bias=False),
    )
    assert groups_of(net, (8, 6)) == [["0.weight", "2.weight", "4.weight"]]


def test_rescaling_groups_keep_a_residual_branch_and_its_trunk_apart():
    torch.manual_seed(0)
    # The branch scales by a / a; the trunk's `first` feeds both paths, so it pairs with `last` only.
    assert sorted(groups_of(Residual(), (8, 6))) == [["down.weight", "up.weight"], ["first.weight", "last.weight"]]


def test_scale_invariant_layers_are_in_no_group():
    torch.manual_seed(0)
    norm, linear = torch.nn.BatchNorm1d, torch.nn.Linear
    net = torch.nn.Sequential(linear(6, 16, bias=False), norm(16), linear(16, 12, bias=False), norm(12), linear(12, 3))
    assert groups_of(net, (32, 6)) == []


def test_products_that_cross_zero_do_not_split_a_group():
    groups = RescalingGroups()
    for product in (0.5, 1e-9, 0.3, 0.2):
        groups.update(["a", "b"], [product, product * (1 + 1e-6)], scales=[1.0, 1e-3])
    assert groups.groups() == [["a", "b"]]


def test_non_finite_steps_are_no_evidence():
    groups = RescalingGroups()
    for product in (0.5, math.nan, math.inf, 0.3, 0.2):
        groups.update(["a", "b"], [product, product if product < 1 else 7.0], scales=[1.0, 1.0])
    assert groups.groups() == [["a", "b"]]
