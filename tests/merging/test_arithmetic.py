"""Exactness, compared with rational numbers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank import MergeError
from lightning_lowrank.merging.arithmetic import check_equal, combined, is_finite, pieces, pooled_variance, rounded

# Bits of the significand, and the exponent of the smallest positive number.
FORMATS = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.float16: (11, -24),
    torch.bfloat16: (8, -133),
}


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """The number of a type that is nearest to a rational number, ties to even; overflow aside."""
    if value == 0:
        return 0.0
    bits, smallest = FORMATS[dtype]
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    step = Fraction(2) ** max(exponent - bits + 1, smallest)
    # Python rounds fractions half to even.
    return float(round(value / step) * step)


def number(dtype):
    width = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 32}[dtype]
    finite = st.floats(-1e4, 1e4, width=width)
    return finite.map(lambda value: torch.tensor(value, dtype=torch.float64).to(dtype).item())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_sum_of_two_is_the_exact_sum_rounded_once(dtype, data):
    one, two = data.draw(number(dtype)), data.draw(number(dtype))
    found = combined([torch.tensor([one], dtype=dtype), torch.tensor([two], dtype=dtype)], [1.0, 1.0])
    assert found.dtype is dtype
    assert found.item() == nearest(Fraction(one) + Fraction(two), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(value=st.floats(-6e4, 6e4))
@settings(max_examples=300, deadline=None)
def test_float64_is_rounded_once(dtype, value):
    assert rounded(torch.tensor([value], dtype=torch.float64), dtype).item() == nearest(Fraction(value), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ties_and_what_is_next_to_them(dtype):
    bits, smallest = FORMATS[dtype]
    ties = [Fraction(1) + Fraction(2) ** -bits, Fraction(3) / 2 + Fraction(2) ** -bits, Fraction(2) ** (smallest - 1)]
    for tie in ties:
        for offset in (0, Fraction(2) ** -50, -(Fraction(2) ** -50)):
            value = float(tie + offset * tie)
            for sign in (1, -1):
                found = rounded(torch.tensor([sign * value], dtype=torch.float64), dtype).item()
                assert found == nearest(Fraction(sign * value), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_infinities_and_not_numbers_stay(dtype):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e300, -1e300], dtype=torch.float64)
    found = rounded(values, dtype)
    assert found[0] == found[3] == float("inf")
    assert found[1] == found[4] == -float("inf")
    assert found[2].isnan()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_combination_is_the_float64_one_rounded_once(dtype, data):
    values = data.draw(st.lists(number(dtype), min_size=3, max_size=3))
    coefficients = data.draw(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
    start = data.draw(number(dtype))
    tensors = [torch.tensor([value], dtype=dtype) for value in values]
    plain = sum(c * v for c, v in zip(coefficients, values, strict=True))
    around = start + sum(c * (v - start) for c, v in zip(coefficients, values, strict=True))
    for base, expected in ((None, plain), (torch.tensor([start], dtype=dtype), around)):
        found = combined(tensors, coefficients, base)
        if dtype is torch.float64:
            assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-9)
        elif abs(expected) < 6e4:
            assert found.item() == nearest(Fraction(expected), dtype)


def test_a_mean_of_equal_numbers_is_the_number():
    tensors = [torch.tensor([0.1])] * 3
    assert torch.equal(combined(tensors, [1.0, 1.0, 1.0], divisor=3), tensors[0])


def test_pooled_variance_is_that_of_the_data_together():
    torch.manual_seed(0)
    groups = [torch.randn(50, 4, dtype=torch.float64) * scale + shift for scale, shift in ((1, 0), (2, 3), (0.5, -1))]
    found = pooled_variance([g.mean(0) for g in groups], [g.var(0, correction=0) for g in groups], torch.float64)
    torch.testing.assert_close(found, torch.cat(groups).var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(24.0).reshape(2, 3, 4),
        lambda: torch.arange(24.0).reshape(4, 6).T,
        lambda: torch.arange(48.0)[::2],
        lambda: torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.tensor(3.0),
        lambda: torch.empty(0, 3),
    ],
    ids=["contiguous", "transposed", "strided", "channels_last", "scalar", "empty"],
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_pieces_are_all_entries_in_row_major_order(make, size):
    tensor = make()
    found = [*pieces([tensor, tensor + 1], size)]
    joined = torch.cat([piece[0] for piece in found]) if found else torch.empty(0)
    assert torch.equal(joined, tensor.reshape(-1))
    assert all(torch.equal(second, first + 1) for first, second in found)


def test_what_is_not_finite_is_seen():
    assert is_finite(torch.tensor([1.0, 2.0]))
    assert is_finite(torch.empty(0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not is_finite(torch.tensor([1.0, bad]))
        assert not is_finite(torch.tensor([1.0, bad], dtype=torch.bfloat16))
        assert not is_finite(torch.tensor([complex(0, bad)]))


def test_equal_tensors_may_hold_infinities_and_not_numbers():
    mask = torch.tensor([0.0, -float("inf"), float("nan")])
    check_equal([mask, mask.clone()], "buffer", "")
    with pytest.raises(MergeError, match="buffers must be equal in all networks, and these differ by up to inf, look"):
        check_equal([mask, torch.zeros(3)], "buffer", ", look")
    large = torch.tensor([2**60])
    with pytest.raises(MergeError, match="differ by up to"):
        check_equal([large, large + 1], "buffer", "")
