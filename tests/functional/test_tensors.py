import numpy as np
import pytest
import torch

from lightning_lowrank.functional import _tensors
from lightning_lowrank.functional._tensors import accumulate_products, inner_products, squared_residuals


def random_tensors(count, shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def oracle(*tensors):
    """<W, W>, <W, G>, <G, G> and <S, G> entry by entry in numpy's float64, and the scale |W| |G| of each error."""
    w, g, *sums = (t.detach().to(torch.float64).contiguous().numpy().ravel() for t in tensors)
    pairs = [(w, w), (w, g), (g, g), *((s, g) for s in sums)]
    return np.array([a @ b for a, b in pairs]), np.array([np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs])


def assert_products(row, *tensors, rtol):
    expected, scale = oracle(*tensors)
    assert row.dtype == torch.float64
    assert (np.abs(row.numpy() - expected) <= rtol * scale).all(), (row.numpy() - expected) / scale


SHAPES = [(0,), (), (7,), (64, 64), (64, 65), (600, 500), (1 << 17,), ((1 << 17) + 1,), (3, 1 << 18)]


@pytest.mark.parametrize(
    ("dtype", "exact", "rtol"),
    [(torch.float32, True, 1e-13), (torch.float32, False, 1e-6), (torch.float64, False, 1e-12)]
    + [(dtype, exact, 1e-6) for dtype in (torch.bfloat16, torch.float16) for exact in (True, False)],
)
def test_products_of_every_size_and_type(dtype, exact, rtol):
    pairs = [tuple(random_tensors(2, shape, seed, dtype)) for seed, shape in enumerate(SHAPES)]
    rows = inner_products(pairs, exact=exact)
    assert rows.shape == (len(SHAPES), 3)
    for row, pair in zip(rows, pairs, strict=True):
        assert_products(row, *pair, rtol=rtol)


def test_positive_entries_do_not_drift():
    weight = torch.rand(3_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    assert_products(inner_products([(weight, weight)], exact=False)[0], weight, weight, rtol=1e-6)


def test_nothing_to_multiply():
    assert inner_products([]).shape == (0, 3)
    assert accumulate_products([], [], [], 1.0).shape == (0, 4)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (96, 64, 3, 3)])
@pytest.mark.parametrize("w_layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("g_layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("s_layout", [torch.Tensor.contiguous, channels_last])
def test_entries_are_paired_by_index_whatever_the_memory_order(shape, w_layout, g_layout, s_layout):
    weight, grad, total = random_tensors(3, shape)
    sums = [s_layout(total.clone())]
    row = accumulate_products([w_layout(weight)], [g_layout(grad)], sums, 0.5)[0]
    assert_products(row, weight, grad, total, rtol=1e-6)
    torch.testing.assert_close(sums[0], total + 0.5 * grad)
    assert_products(inner_products([(w_layout(weight), g_layout(grad))])[0], weight, grad, rtol=1e-13)


def test_transposed_strided_and_expanded_tensors():
    weight, grad = random_tensors(2, (300, 200))
    cases = [(weight.t(), grad.t()), (weight.t(), grad.t().contiguous()), (weight[::2], grad[::2])]
    cases += [(weight, grad[:1].expand(300, 200))]
    for row, pair in zip(inner_products(cases), cases, strict=True):
        assert_products(row, *pair, rtol=1e-13)


def test_one_memory_order_is_read_without_a_copy():
    weight, grad = (channels_last(tensor) for tensor in random_tensors(2, (96, 64, 3, 3)))
    flat = _tensors._flatten((weight, grad))
    assert [tensor.data_ptr() for tensor in flat] == [weight.data_ptr(), grad.data_ptr()]


def test_complex_entries_are_pairs_and_sparse_ones_dense():
    weight, grad, total = random_tensors(3, (80, 70), dtype=torch.float32)
    z_weight, z_grad = torch.complex(weight, grad), torch.complex(grad, total)
    expected = [torch.view_as_real(weight_or_grad) for weight_or_grad in (z_weight, z_grad)]
    assert_products(inner_products([(z_weight, z_grad)], exact=False)[0], *expected, rtol=1e-6)
    sparse = torch.where(grad > 1, grad, 0.0)
    assert_products(inner_products([(weight, sparse.to_sparse())], exact=False)[0], weight, sparse, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_accumulated_sums_and_the_products_before_them(dtype):
    triples = [random_tensors(3, shape, seed, dtype) for seed, shape in enumerate(SHAPES)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weights, grads, sums = (list(column) for column in zip(*triples, strict=True))
    weights = [torch.nn.Parameter(weight) for weight in weights]
    sums = [total.to(wide) for total in sums]
    before = [total.clone() for total in sums]
    rows = accumulate_products(weights, grads, sums, -0.25)
    for row, weight, grad, old, new in zip(rows, weights, grads, before, sums, strict=True):
        assert_products(row, weight, grad, old, rtol=1e-6)
        torch.testing.assert_close(new, old - 0.25 * grad.to(wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (500, 700)])
@pytest.mark.parametrize("size", [2.0, 0.06, 0.04, 1e-3, 1e-5])
def test_residuals_are_right_however_small(dtype, shape, size):
    weight, noise = random_tensors(2, shape, dtype=torch.float64)
    weight = weight.to(dtype)
    grad = (-0.1 * weight.double() + size * 0.1 * noise * weight.norm() / noise.norm()).to(dtype)
    expected = np.linalg.norm(grad.double().numpy() + 0.1 * weight.double().numpy())
    pairs = [(weight, grad)]
    value = squared_residuals(pairs, [0.1], inner_products(pairs, exact=False)).sqrt()
    assert value.item() == pytest.approx(expected, rel=2e-3)


def test_residual_without_decay_is_the_gradient():
    pairs = [tuple(random_tensors(2, (500, 700)))]
    products = inner_products(pairs, exact=False)
    assert squared_residuals(pairs, [0.0], products).item() == products[0, 2].item()


@pytest.mark.parametrize(
    ("grads", "sums", "message"),
    [
        ([], [torch.zeros(4, 6)], "1 weights, 0 gradients and 1 sums"),
        ([torch.ones(4, 6)], [torch.zeros(6, 4)], r"shape \(4, 6\), its gradient \(4, 6\) and its sum \(6, 4\)"),
        ([torch.ones(4, 6)], [torch.zeros(4, 12)[:, ::2]], "sum 0 of shape .* has gaps"),
        ([torch.ones(4, 6)], [torch.zeros(4, 6).to_sparse()], "sum 0 of shape .* is sparse"),
    ],
)
def test_sums_that_can_not_be_updated_are_refused(grads, sums, message):
    with pytest.raises(ValueError, match=message):
        accumulate_products([torch.ones(4, 6)], grads, sums, 1.0)
