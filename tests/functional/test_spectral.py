import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lowrank.functional import (
    circular_convolution_norm,
    effective_rank,
    energy_outside,
    frobenius_norm,
    leak,
    numerical_rank,
    singular_values,
    spectral_norm,
    spectral_norms,
    spectral_ratio,
    stable_rank,
)
from lightning_lowrank.functional.spectral import leading


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
    assert norm.lower <= norm.value <= norm.upper <= norm.lower * (1 + 1e-7)
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
    with pytest.warns(RuntimeWarning, match="not finite, so its spectral norm is NaN") as caught:
        norm = spectral_norm(bad)
    assert len(caught) == 1
    assert all(math.isnan(number) for number in (norm.value, norm.lower, norm.upper))
    with pytest.warns(RuntimeWarning, match="not finite"):
        rank = stable_rank(bad)
    assert all(math.isnan(number) for number in (rank, rank.lower, rank.upper))
    with pytest.warns(RuntimeWarning, match="not finite, so its singular values are NaN"):
        assert singular_values(bad).isnan().all()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (200, 200)])
@pytest.mark.parametrize("height", [1.3, 2.0, 10.0])
def test_a_warm_start_finds_a_direction_that_its_vector_cannot_see(shape, height):
    for seed in range(10):
        sigma = torch.cat([torch.ones(1), torch.linspace(0.9, 0, 198)]).tolist()
        old = with_spectrum([*sigma, 0.0], *shape, seed=seed)
        norm = spectral_norm(old)
        u, _, vh = torch.linalg.svd(old.double(), full_matrices=False)
        new = (old.double() + height * torch.outer(u[:, -1], vh[-1])).float()
        # Orthogonal to the new direction, to the last digit.
        start = norm.vector - vh[-1].float() * (vh[-1].float() @ norm.vector)
        found = spectral_norm(new, start=start)
        assert found.value == pytest.approx(height, rel=1e-3), seed
        assert spectral_norm(new, start=vh[0].float(), certify=True).certified


def test_a_warm_start_follows_a_training_step():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 300, generator=generator)
    vector = spectral_norm(weight).vector
    for _ in range(20):
        weight = weight + 0.01 * torch.randn(400, 300, generator=generator).sign()
        norm = spectral_norm(weight, start=vector)
        vector = norm.vector
        assert norm.value == pytest.approx(torch.linalg.svdvals(weight.double())[0].item(), rel=1e-3)
        assert torch.equal(spectral_norm(weight, start=vector).vector, spectral_norm(weight, start=vector).vector)


def test_a_start_of_another_size_or_without_numbers():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"start has shape \(200,\), but a vector of a 200 x 300 matrix has 300"):
        spectral_norm(weight, start=torch.ones(200))
    assert spectral_norm(weight, start=torch.full((300,), math.nan))[:3] == spectral_norm(weight)[:3]
    assert spectral_norm(weight, start=torch.zeros(300)).value == pytest.approx(spectral_norm(weight).value, rel=1e-3)


def test_many_at_once_are_the_same_as_one_by_one():
    weights = [torch.randn(200 + k, 150, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    together = spectral_norms(weights)
    assert [norm[:4] for norm in together] == [spectral_norm(weight)[:4] for weight in weights]
    warm = spectral_norms(weights, starts=[norm.vector for norm in together])
    for before, after in zip(together, warm, strict=True):
        assert after.value == pytest.approx(before.value, rel=1e-3)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
def test_stable_rank_and_ratio_carry_the_bounds(certify, dtype):
    weight = torch.randn(200, 260, generator=torch.Generator().manual_seed(0), dtype=dtype)
    sigma = torch.linalg.svdvals(weight.to(torch.promote_types(dtype, torch.float64)))
    rank = (sigma.square().sum() / sigma[0] ** 2).item()
    found, ratio = stable_rank(weight, certify=certify), spectral_ratio(weight, certify=certify)
    assert found.lower <= rank <= found.upper
    assert ratio.lower <= rank**-0.5 <= ratio.upper
    assert found == pytest.approx(rank, rel=2e-3)
    assert found.upper / rank == pytest.approx(1, rel=3e-3)
    assert (found.lower / rank == pytest.approx(1, rel=3e-3)) == certify
    assert copy.copy(found).lower == found.lower


def test_numerical_rank_is_that_of_numpy():
    for true, shape in [(40, (180, 200)), (40, (150, 900)), (3, (5, 4)), (1, (7, 1))]:
        weight = with_spectrum([0.9**k for k in range(true)] if true > 1 else [1.0], *shape)
        expected = np.linalg.matrix_rank(weight.numpy())
        assert numerical_rank(singular_values(weight), weight.shape, weight.dtype) == expected == true
    assert numerical_rank(torch.zeros(4), (4, 4)) == 0
    assert math.isnan(numerical_rank(torch.ones(4), (4, 128), torch.bfloat16))
    assert math.isnan(numerical_rank(torch.tensor([math.nan]), (1, 1)))


def test_oblong_matrices_have_the_singular_values_of_the_decomposition():
    weight = with_spectrum([0.8**k for k in range(100)], 100, 900)
    exact = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert singular_values(weight).numpy() == pytest.approx(exact, abs=3e-8)
    assert singular_values(weight.double()).numpy() == pytest.approx(exact, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(
    "sigma", [[0.8**k for k in range(300)], [1.0] * 150 + [0.2] * 150, [1.0, 1.0, 0.5] + [0.0] * 297]
)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_the_largest_singular_values(sigma, scale):
    weight = with_spectrum([scale * value for value in sigma], 400, 300)
    found = singular_values(weight, k=5).numpy() / scale
    assert found == pytest.approx(sigma[:5], rel=1e-3, abs=1e-3)
    assert singular_values(weight, k=300)[:5].numpy() / scale == pytest.approx(sigma[:5], rel=1e-5, abs=1e-6)
    with pytest.raises(ValueError, match="k must be from 1 to 300 for a 400 x 300 matrix, got 301"):
        singular_values(weight, k=301)


def test_energy_outside_the_top():
    sigma = torch.tensor([1.0, 2.0, 3.0])
    assert [energy_outside(sigma, k) for k in range(5)] == pytest.approx([1, 5 / 14, 1 / 14, 0, 0])
    assert energy_outside(torch.tensor([1.0, 1e-9], dtype=torch.float64), 1) == pytest.approx(1e-18, rel=1e-9)
    assert math.isnan(energy_outside(torch.zeros(3), 1))
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        energy_outside(sigma, -1)


@pytest.mark.parametrize(("kernel", "size"), [((3,), (7,)), ((3, 2), (5, 6)), ((2, 2, 2), (3, 4, 3))])
def test_a_circular_convolution_has_the_norm_of_its_matrix(kernel, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, *kernel, generator=generator, dtype=torch.float64)
    inputs = torch.eye(2 * math.prod(size), dtype=torch.float64).reshape(-1, 2, *size)
    convolve = getattr(torch.nn.functional, f"conv{len(kernel)}d")
    padding = [p for k in reversed(kernel) for p in (k - 1, 0)]
    columns = convolve(torch.nn.functional.pad(inputs, padding, mode="circular"), weight).flatten(1)
    exact = torch.linalg.svdvals(columns)[0].item()
    assert circular_convolution_norm(weight, size) == pytest.approx(exact, rel=1e-9)
    assert exact <= math.sqrt(math.prod(kernel)) * spectral_norm(weight).value
    with pytest.raises(ValueError, match="spatial sizes, got"):
        circular_convolution_norm(weight, [*size, 4])
    with pytest.raises(ValueError, match="does not fit into an input"):
        circular_convolution_norm(weight, [1] * len(size))


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


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("height", [1.02, 1.05, 1.16, 1.3, 2.0])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_what_has_changed_shows_new_directions(shape, height, noise):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator)
        before = leading(weight, 1e-3, seed)
        left, right = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in shape)
        changed = weight + height * before.value * torch.outer(left, right)
        changed += noise * torch.randn(shape, generator=generator).sign()
        found = leading(changed, 1e-3, 100 + seed, before.kept, before.probe)
        assert found.value == pytest.approx(torch.linalg.svdvals(changed.double())[0].item(), rel=1e-3), seed
        assert found.steps < before.steps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_matrix_that_has_not_changed_keeps_its_norm(dtype):
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before = leading(weight, 1e-3, 0)
    for seed in range(1, 5):
        after = leading(weight, 1e-3, seed, before.kept, before.probe)
        assert after.value == pytest.approx(before.value, rel=1e-4)
        assert torch.allclose(after.probe[1], weight.mH.mH @ (weight.mH @ after.probe[0]), rtol=1e-3, atol=1e-1)
        before = after


def test_a_start_from_other_weights_is_given_up():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        before = leading(torch.randn(300, 200, generator=generator), 1e-3, seed)
        other = torch.randn(300, 200, generator=generator)
        found = leading(other, 1e-3, 100 + seed, before.kept, before.probe)
        cold = leading(other, 1e-3, 100 + seed)
        assert found.value == pytest.approx(torch.linalg.svdvals(other.double())[0].item(), rel=1e-3), seed
        assert found.steps == cold.steps
