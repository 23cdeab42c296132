import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank.functional import LowRank, merge_factors

sizes = st.integers(1, 9)
coefficients_of = st.lists(st.floats(-3, 3).filter(lambda c: c == 0 or abs(c) > 1e-3), min_size=1, max_size=4)


def updates(seed, out, inner, ranks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    ups = [torch.randn(out, r, generator=generator).to(dtype) for r in ranks]
    downs = [torch.randn(r, inner, generator=generator).to(dtype) for r in ranks]
    return ups, downs


def full_sum(ups, downs, coefficients):
    """The (out, in) product by numpy, in float64."""
    return sum(
        c * (up.double().flatten(1).numpy() @ down.double().flatten(1).numpy())
        for up, down, c in zip(ups, downs, coefficients, strict=True)
    )


def product(merged: LowRank):
    return (merged.up.flatten(1) @ merged.down.flatten(1)).numpy()


@given(
    seed=st.integers(0, 1000),
    out=sizes,
    inner=sizes,
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    coefficients=coefficients_of,
    extra=st.none() | st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_without_truncation_the_product_is_the_sum(seed, out, inner, ranks, coefficients, extra):
    ups, downs = updates(seed, out, inner, ranks[: len(coefficients)], dtype=torch.bfloat16)
    whole = sum(ranks[: len(coefficients)])
    merged = merge_factors(ups, downs, coefficients, rank=None if extra is None else whole + extra)
    np.testing.assert_allclose(product(merged), full_sum(ups, downs, coefficients), rtol=0, atol=1e-13)
    assert merged.discarded == 0.0
    assert merged.up.shape == (out, whole + (extra or 0))
    assert merged.down.shape == (whole + (extra or 0), inner)
    assert merged.up.dtype == merged.down.dtype == torch.float64


@given(
    seed=st.integers(0, 1000),
    out=sizes,
    inner=sizes,
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    coefficients=coefficients_of,
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_truncation_is_the_truncated_svd_of_the_whole_product(seed, out, inner, ranks, coefficients, data):
    ups, downs = updates(seed, out, inner, ranks[: len(coefficients)])
    rank = data.draw(st.integers(1, sum(ranks[: len(coefficients)])))
    merged = merge_factors(ups, downs, coefficients, rank=rank)
    whole = full_sum(ups, downs, coefficients)
    u, sigma, vh = np.linalg.svd(whole, full_matrices=False)
    # The nearest matrix itself is not unique where singular values tie, which random factors do with probability 0.
    np.testing.assert_allclose(product(merged), (u[:, :rank] * sigma[:rank]) @ vh[:rank], rtol=0, atol=1e-9)
    energy = (sigma**2).sum()
    assert merged.discarded**2 == pytest.approx((sigma[rank:] ** 2).sum() / energy if energy else 0.0, abs=1e-12)
    assert (merged.up.shape, merged.down.shape) == ((out, rank), (rank, inner))
    if rank < sum(ranks[: len(coefficients)]):
        expected = np.diag(np.pad(sigma, (0, rank))[:rank])
        for gram in (merged.up.T @ merged.up, merged.down @ merged.down.T):
            np.testing.assert_allclose(gram.numpy(), expected, rtol=0, atol=1e-9)


def test_a_sum_has_no_cross_terms():
    ups, downs = updates(0, 20, 30, [4, 4])
    whole = full_sum(ups, downs, [1, 1])
    summed_apart = (sum(ups) @ sum(downs)).double().numpy()
    assert np.linalg.norm(summed_apart - whole) > 0.5 * np.linalg.norm(whole)
    assert np.linalg.norm(product(merge_factors(ups, downs, [1, 1])) - whole) < 1e-14 * np.linalg.norm(whole)


def test_an_exact_sum_keeps_every_bit_of_factors_with_coefficient_one():
    ups, downs = updates(0, 7, 5, [2, 3], dtype=torch.float16)
    merged = merge_factors(ups, downs, [1.0, 1.0], rank=6)
    assert torch.equal(merged.up[:, :5].half(), torch.cat(ups, 1))
    assert torch.equal(merged.down[:5].half(), torch.cat(downs))
    assert not merged.up[:, 5].any()
    assert not merged.down[5].any()


def test_discarded_is_the_relative_error():
    ups, downs = updates(3, 40, 50, [8, 8])
    merged = merge_factors(ups, downs, [0.5, 2.0], rank=8)
    whole = full_sum(ups, downs, [0.5, 2.0])
    error = np.linalg.norm(product(merged) - whole) / np.linalg.norm(whole)
    assert merged.discarded == pytest.approx(error, rel=1e-10)
    assert 0.01 < error < 0.5


def test_updates_that_cancel_leave_zeros_and_no_noise():
    (up,), (down,) = updates(0, 30, 40, [6])
    merged = merge_factors([up, up], [down, down], [1.0, -1.0], rank=6)
    assert not merged.up.any()
    assert not merged.down.any()
    assert merged.discarded == 0.0


@pytest.mark.parametrize("rank", [None, 2])
def test_updates_of_zero(rank):
    merged = merge_factors([torch.zeros(4, 2)] * 2, [torch.randn(2, 3)] * 2, [1, 1], rank=rank)
    assert not product(merged).any()
    assert merged.discarded == 0.0


def test_a_sum_of_low_rank_is_reproduced_at_that_rank():
    """Two updates with a common factor: three columns each, but a sum of rank 3."""
    ups, (down,) = updates(0, 25, 35, [3, 3])[0], updates(1, 1, 35, [3])[1]
    merged = merge_factors(ups, [down, down], [1.0, -0.7], rank=3)
    np.testing.assert_allclose(product(merged), full_sum(ups, [down, down], [1.0, -0.7]), rtol=0, atol=1e-13)
    assert merged.discarded == pytest.approx(0, abs=1e-14)


def test_unbalanced_factors_cost_no_digits():
    ups, downs = updates(0, 25, 35, [3, 3], dtype=torch.float64)
    unbalanced = [ups[0] * 2.0**60, ups[1] * 2.0**-60], [downs[0] * 2.0**-60, downs[1] * 2.0**60]
    expected = merge_factors(ups, downs, [1, 1], rank=4)
    merged = merge_factors(*unbalanced, [1, 1], rank=4)
    np.testing.assert_allclose(product(merged), product(expected), rtol=0, atol=1e-13)
    assert merged.discarded == pytest.approx(expected.discarded, rel=1e-12)


def test_convolutions_keep_their_shapes():
    generator = torch.Generator().manual_seed(0)
    ups = [torch.randn(8, 2, 1, 1, generator=generator) for _ in range(2)]
    downs = [torch.randn(2, 3, 5, 5, generator=generator) for _ in range(2)]
    for rank, kept in ((None, 4), (3, 3), (6, 6)):
        merged = merge_factors(ups, downs, [1.0, 2.0], rank)
        assert merged.up.shape == (8, kept, 1, 1)
        assert merged.down.shape == (kept, 3, 5, 5)
        kernel = torch.nn.functional.conv2d(merged.down.transpose(0, 1), merged.up).transpose(0, 1)
        error = np.linalg.norm(kernel.flatten(1).numpy() - full_sum(ups, downs, [1.0, 2.0]))
        assert error == pytest.approx(merged.discarded * np.linalg.norm(full_sum(ups, downs, [1.0, 2.0])), abs=1e-12)


def test_inputs_are_left_alone():
    ups, downs = updates(0, 5, 6, [2, 2])
    parameters = [torch.nn.Parameter(t.clone()) for t in (*ups, *downs)]
    merged = merge_factors(parameters[:2], parameters[2:], [2.0, 3.0])
    merged.up.zero_()
    merged.down.zero_()
    for parameter, original in zip(parameters, (*ups, *downs), strict=True):
        assert torch.equal(parameter, original)
    assert not merged.up.requires_grad


def test_what_can_not_be_merged_is_refused():
    up, down = torch.ones(4, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match="got 2 ups, 1 downs and 2 coefficients"):
        merge_factors([up, up], [down], [1, 1])
    with pytest.raises(ValueError, match="at least one update"):
        merge_factors([], [], [])
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        merge_factors([up], [down], [1], rank=0)
    with pytest.raises(
        ValueError, match=r"update 0 has factors of shapes \(4, 2\) and \(3, 2\), which do not multiply"
    ):
        merge_factors([up], [down.T], [1])
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(2, 3\), which do not multiply"):
        merge_factors([up[:, 0]], [down], [1])
    with pytest.raises(ValueError, match=r"update 1 has factors of shapes \(4, 2\) and \(2, 5\), update 0"):
        merge_factors([up, up], [down, torch.ones(2, 5)], [1, 1])
    with pytest.raises(ValueError, match="update 1 has a factor or coefficient that is not finite"):
        merge_factors([up, up], [down, down * math.nan], [1, 1])
    with pytest.raises(ValueError, match="coefficient inf"):
        merge_factors([up], [down], [math.inf])
    with pytest.raises(ValueError, match="beyond the range"):
        merge_factors([up.double() * 1e200] * 2, [down.double() * 1e200] * 2, [1, 1], rank=2)
