"""What every formula does to a parameter before it computes: the real view, the matrix, exact inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements converted to float64 at a time. Large enough to amortise a kernel launch, small enough that the two
# converted pieces stay in a CPU's cache and never double the memory of a large embedding on a GPU.
_CHUNK_CPU = 1 << 16
_CHUNK_ACCELERATOR = 1 << 22


def real_view(tensor: Tensor) -> Tensor:
    """The tensor as real numbers: complex entries become pairs, sparse ones are filled in with zeros."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_matrix(weight: Tensor) -> Tensor:
    """A weight of two or more dimensions as the matrix ``(weight.shape[0], -1)``.

    A convolution's kernel ``(out, in, height, width)`` becomes ``(out, in * height * width)``: the linear map from an
    unfolded patch to the output channels.

    Raises:
        ValueError: If the weight has fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ValueError(
            f"got a tensor of shape {tuple(weight.shape)}, which is not a matrix; pass a weight of two or more"
            " dimensions"
        )
    return weight.detach().flatten(1)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The widest real type on the tensor's device: float64, or float32 where the device has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def inner_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """<W, W>, <W, G> and <G, G> of every pair, accumulated in float64.

    float64 is no luxury: the residual |G + wd * W| of a converged network is a small difference of these three, and
    from float32 products it would be rounding noise below about 1e-3.

    Args:
        pairs: Weights and gradients, each pair of one shape.

    Returns:
        A CPU tensor of shape ``(len(pairs), 3)``, in the order of the pairs; one host synchronisation per device.
    """
    by_device: dict[torch.device, list[int]] = {}
    for index, (weight, _) in enumerate(pairs):
        by_device.setdefault(weight.device, []).append(index)
    out = torch.empty(len(pairs), 3, dtype=torch.float64)
    for indices in by_device.values():
        rows = torch.stack([_products(*pairs[index]) for index in indices])
        out[torch.tensor(indices)] = rows.to("cpu", torch.float64)
    return out


def _products(weight: Tensor, grad: Tensor) -> Tensor:
    w, g = real_view(weight).reshape(-1), real_view(grad).reshape(-1)
    dtype = wide_dtype(w)
    size = _CHUNK_CPU if w.device.type == "cpu" else _CHUNK_ACCELERATOR
    total = torch.zeros(3, dtype=dtype, device=w.device)
    for start in range(0, w.numel(), size):
        w_wide, g_wide = w[start : start + size].to(dtype), g[start : start + size].to(dtype)
        total += torch.stack([w_wide.dot(w_wide), w_wide.dot(g_wide), g_wide.dot(g_wide)])
    return total
