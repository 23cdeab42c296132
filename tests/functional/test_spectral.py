import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank.functional import (
    effective_rank,
    frobenius_norm,
    leak,
    singular_values,
    spectral_norm,
    spectral_ratio,
    stable_rank,
)


def with_spectrum(sigma, rows, columns, seed=0, dtype=torch.float32):
    """A matrix with exactly these singular values, up to the rounding of its own type."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    return (u * torch.tensor(sigma, dtype=torch.float64) @ v.T).to(dtype)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 12), columns=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_small_matrices_agree_with_numpy(seed, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    sigma = np.linalg.svd(weight.numpy().astype(np.float64), compute_uv=False)
    norm = spectral_norm(weight)
    assert norm.value == pytest.approx(sigma[0], rel=1e-12)
    assert norm.certified
    assert norm.lower == norm.upper == norm.value
    assert singular_values(weight).numpy() == pytest.approx(sigma, rel=1e-10, abs=1e-12)
    assert stable_rank(weight) == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
    assert spectral_ratio(weight) == pytest.approx(sigma[0] / np.linalg.norm(sigma), rel=1e-6)


@pytest.mark.parametrize(
    "sigma",
    [
        [1.0] * 200,
        [1.0 - 1e-3 * k for k in range(200)],
        [0.9**k for k in range(200)],
        [1.0, 0.9999] + [0.5] * 198,
        [1e-30 * 0.9**k for k in range(200)],
        [1e25 * 0.9**k for k in range(200)],
    ],
    ids=["equal", "flat", "steep", "close pair", "tiny", "huge"],
)
@pytest.mark.parametrize("shape", [(200, 300), (400, 200)])
def test_iterated_spectral_norm_is_within_its_tolerance(sigma, shape):
    norm = spectral_norm(with_spectrum(sigma, *shape), rtol=1e-3)
    assert norm.value == pytest.approx(sigma[0], rel=1e-3)
    assert norm.lower <= sigma[0] * (1 + 1e-6)
    assert norm.upper >= sigma[0] * (1 - 1e-6)
    assert not norm.certified


def test_random_matrices_have_the_spectral_norm_of_the_full_svd():
    for seed in range(5):
        weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(seed))
        exact = torch.linalg.svdvals(weight.double())[0].item()
        assert spectral_norm(weight).value == pytest.approx(exact, rel=1e-3)


def test_iterated_vector_gives_the_lower_bound():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    norm = spectral_norm(weight)
    assert (weight @ norm.vector).norm().item() == pytest.approx(norm.lower, rel=1e-5)
    assert norm.vector.norm().item() == pytest.approx(1, rel=1e-5)


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    spectral_norm(torch.ones(200, 300))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("side", [8, 200])
def test_other_types(dtype, side):
    weight = torch.randn(side, side + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    assert spectral_norm(weight).value == pytest.approx(torch.linalg.svdvals(wide)[0].item(), rel=1e-3)


def test_a_convolution_is_its_unfolded_kernel():
    kernel = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert stable_rank(kernel) == pytest.approx(stable_rank(kernel.reshape(4, 12)), rel=1e-12)


@pytest.mark.parametrize("side", [3, 200])
def test_zero_and_non_finite_matrices(side):
    zero = torch.zeros(side, side)
    assert spectral_norm(zero).value == 0
    assert math.isnan(stable_rank(zero))
    bad = torch.ones(side, side)
    bad[0, 0] = math.inf
    assert math.isnan(spectral_norm(bad).value)
    assert math.isnan(spectral_norm(bad).upper)
    assert math.isnan(stable_rank(bad))
    assert singular_values(bad).isnan().all()


def signs(seed, size):
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def block(rows, columns, width):
    weight = torch.zeros(rows, columns)
    weight[:, :width] = 1
    return weight


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(200, 300),
        torch.ones(512, 512),
        torch.full((200, 300), 0.02, dtype=torch.float16),
        torch.outer(signs(0, 200), signs(1, 300)),
        block(200, 300, 10),
        torch.outer(signs(0, 200), signs(1, 300)) + block(200, 300, 5),
        torch.eye(200, 300),
        torch.ones(200, 1000, dtype=torch.float64),
    ],
    ids=["ones", "square ones", "half", "signs", "block", "rank two", "identity", "double"],
)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_iteration_that_runs_out_of_directions_is_exact(weight, rtol):
    exact = torch.linalg.svdvals(weight.double())[0].item()
    assert spectral_norm(weight, rtol).value == pytest.approx(exact, rel=5e-6)


def test_rank_one_among_large_matrices():
    weight = torch.outer(torch.arange(1.0, 301.0), torch.ones(200))
    assert stable_rank(weight) == pytest.approx(1, rel=1e-5)


def test_effective_rank_is_the_exponential_of_the_entropy():
    sigma = torch.tensor([5.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert effective_rank(sigma) == pytest.approx(math.exp(scipy.stats.entropy(sigma.numpy())), rel=1e-12)
    assert math.isnan(effective_rank(torch.zeros(3)))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        effective_rank(torch.tensor([-1.0]))


@pytest.mark.parametrize("function", [spectral_norm, stable_rank, spectral_ratio, singular_values])
def test_vectors_are_refused(function):
    with pytest.raises(ValueError, match=r"shape \(3,\), which is not a matrix"):
        function(torch.ones(3))


def test_tolerance_must_be_positive():
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        spectral_norm(torch.eye(2), rtol=0)


def test_frobenius_norm_of_half_precision_neither_overflows_nor_drifts():
    assert frobenius_norm(torch.full((100, 100), 1000.0, dtype=torch.float16)) == pytest.approx(1e5, rel=1e-12)


def test_leak_is_the_ratio_of_preactivations():
    generator = torch.Generator().manual_seed(0)
    own, other, x = (torch.randn(s, generator=generator) for s in ((5, 7), (5, 7), (9, 7)))
    expected = np.linalg.norm(x.numpy() @ other.numpy().T) / np.linalg.norm(x.numpy() @ own.numpy().T)
    assert leak(other, own, x) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(leak(other, torch.zeros(5, 7), x))
    with pytest.raises(ValueError, match=r"\(samples, 7\), got \(9, 6\)"):
        leak(other, own, x[:, :6])
    with pytest.raises(ValueError, match="they must agree"):
        leak(other[:4], own, x)
