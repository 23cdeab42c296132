"""Which layers can trade a factor, found from inner products."""

import math

import pytest
import torch

from lightning_lowrank.functional import InnerProducts, RescalingGroups, homogeneity_defect


def groups_of(net, inputs, steps=4, classes=3):
    """What RescalingGroups finds for a network from a few random batches."""
    names = [name for name, p in net.named_parameters() if p.ndim > 1]
    found = RescalingGroups([net.get_parameter(name).numel() for name in names])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        net.zero_grad()
        x = torch.randn(inputs, generator=generator)
        y = torch.randint(classes, (inputs[0],), generator=generator)
        torch.nn.functional.cross_entropy(net(x), y).backward()
        products = InnerProducts.of(
            [net.get_parameter(n) for n in names], [net.get_parameter(n).grad for n in names], 0.0
        )
        found.update(products.wg, (products.ww * products.gg).sqrt())
    return [[names[index] for index in group] for group in found.groups()]


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
    assert sorted(groups_of(Residual(), (8, 6))) == [["first.weight", "last.weight"], ["up.weight", "down.weight"]]


def test_scale_invariant_layers_are_in_no_group():
    torch.manual_seed(0)
    norm, linear = torch.nn.BatchNorm1d, torch.nn.Linear
    net = torch.nn.Sequential(linear(6, 16, bias=False), norm(16), linear(16, 12, bias=False), norm(12), linear(12, 3))
    assert groups_of(net, (32, 6)) == []


def fed(products, scales, **options):
    groups = RescalingGroups([1] * len(scales), **options)
    for step in products:
        groups.update(torch.tensor(step), torch.tensor(scales))
    return groups


def test_products_that_cross_zero_do_not_split_a_group():
    products = [[p, p * (1 + 1e-6)] for p in (0.5, 1e-9, 0.3, 0.2)]
    assert fed(products, [1.0, 0.6]).groups() == [[0, 1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_overflow_is_no_evidence(bad):
    products = [[p, p] for p in (0.5, 0.3, 0.2)]
    assert fed([products[0], [math.inf, bad], *products[1:]], [1.0, 1.0]).groups() == [[0, 1]]


def test_an_end_without_a_gradient_in_some_step_is_left_out():
    groups = fed([[0.5, 0.5, 0.5], [0.3, 0.3, math.nan], [0.2, 0.2, 0.2], [0.1, 0.1, 0.1]], [1.0, 1.0, 1.0])
    assert groups.groups() == [[0, 1]]


def test_an_end_with_a_first_gradient_later_starts_the_search_anew():
    early = [[p, math.nan] for p in (0.5, 0.3, 0.2)]
    late = [[p, p] for p in (0.4, 0.1, 0.6)]
    assert fed([*early, *late[:2]], [1.0, 1.0]).groups() == []
    assert fed([*early, *late], [1.0, 1.0]).groups() == [[0, 1]]


def test_coarse_arithmetic_has_a_coarse_tolerance():
    products = [[p, p * 1.01] for p in (0.5, 0.3, 0.2)]
    assert fed(products, [1.0, 1.0]).groups() == []
    assert fed(products, [1.0, 1.0], epsilon=2**-8).groups() == [[0, 1]]


def test_homogeneity_defect_of_values_without_meaning_is_nan():
    assert math.isnan(homogeneity_defect([0.5], [1.0]))
    assert math.isnan(homogeneity_defect([0.5, math.nan], [1.0, 1.0]))
    assert math.isnan(homogeneity_defect([0.0, 0.0], [0.0, 0.0]))
