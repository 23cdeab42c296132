"""What every formula does to a parameter before it computes: the real view, the matrix, exact inner products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

# Which inner product: of W and W, W and G, G and G, or of a sum of gradients S and G.
Product = Literal["ww", "wg", "gg", "sg"]

# Elements summed in the working precision before the sum moves on to float64. Two float32 chunks stay in a CPU's caches
# while all products read them, and a thread's part of such a sum is right to 7e-7 (3e-6 at four times the length, where
# rounding leans to one side); shorter ones cost more in waking threads than they save. Shorter float64 chunks keep a
# converted copy in cache. On a GPU every thread sums only a few entries, so launches decide; the bound keeps a
# converted copy of a large embedding small.
_CHUNK_PER_THREAD = 1 << 18
_CHUNK_FLOAT64 = 1 << 16
_CHUNK_ACCELERATOR = 1 << 22

# Tensors up to this many elements are stacked with others of their size: a network has many more biases and gains than
# matrices, and each would cost as much in calls as a chunk does in arithmetic. Few enough elements for float64.
_SMALL = 1 << 12

# From float32 products, |G + wd W|^2 / |wd W|^2 is uncertain by about 4e-6: 1e-3 of the residual itself at this one.
_SMALL_RESIDUAL = 0.05


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


def inner_products(
    pairs: Sequence[tuple[Tensor, Tensor]], *, exact: bool = True, only: Sequence[Product] = ("ww", "wg", "gg")
) -> Tensor:
    """<W, W>, <W, G> and <G, G> of every pair.

    Args:
        pairs: Weights and gradients, each pair of one shape; any layout, memory order and type.
        exact: Multiply and add in float64. Without it, float32 entries are multiplied and added in float32 over chunks
            and the chunks' sums in float64, which saves the conversion: right to 1e-6 of |W| |G|, but for entries of
            few digits, whose rounding errors agree in sign (4e-6 for bfloat16's, 5e-5 for a constant's). A small
            residual is lost in such products; :func:`squared_residuals` finds it.
        only: Which products; fewer cost less.

    Returns:
        A CPU tensor of shape ``(len(pairs), len(only))``, float64, in the order of the pairs; one host synchronisation
        per device.

    Example:
        >>> inner_products([(torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0]))])
        tensor([[25., -1.,  2.]], dtype=torch.float64)
    """
    return _one_pass(pairs, tuple(only), exact=exact)


def accumulate_products(
    weights: Sequence[Tensor], grads: Sequence[Tensor], sums: Sequence[Tensor], scale: float
) -> Tensor:
    """The products of a step, and ``S += scale * G`` in the same pass over memory.

    Args:
        weights: K tensors.
        grads: K gradients of the same shapes.
        sums: K dense tensors of the same shapes, float32 (float64 for float64 weights); changed in place.
        scale: The factor of the gradient.

    Returns:
        A CPU tensor of shape ``(K, 4)``, float64: <W, W>, <W, G>, <G, G> and <S, G> with S from before the update, as
        exact as :func:`inner_products` without ``exact``.

    Raises:
        ValueError: If the numbers of tensors or a shape differ, or a sum is not dense.

    Example:
        >>> total = torch.tensor([1.0, 1.0])
        >>> accumulate_products([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, -1.0])], [total], 0.5)
        tensor([[25., -1.,  2.,  0.]], dtype=torch.float64)
        >>> total
        tensor([1.5000, 0.5000])
    """
    if not len(weights) == len(grads) == len(sums):
        raise ValueError(
            f"got {len(weights)} weights, {len(grads)} gradients and {len(sums)} sums; pass one of each per parameter"
        )
    rows = list(zip(weights, grads, sums, strict=True))
    # All is checked before anything is added: half an update would be worse than none.
    for index, (weight, grad, total) in enumerate(rows):
        if not weight.shape == grad.shape == total.shape:
            raise ValueError(
                f"weight {index} has shape {tuple(weight.shape)}, its gradient {tuple(grad.shape)} and its sum"
                f" {tuple(total.shape)}; they must agree"
            )
        if total.layout is not torch.strided or not _memory_order(total).is_contiguous():
            raise ValueError(
                f"sum {index} of shape {tuple(total.shape)} has gaps or is sparse, so it can't be updated in place;"
                " make it with torch.zeros_like(weight)"
            )
    return _one_pass(rows, ("ww", "wg", "gg", "sg"), scale=scale)


def squared_residuals(
    pairs: Sequence[tuple[Tensor, Tensor]], decays: Sequence[float] | Tensor, products: Tensor
) -> Tensor:
    """|G + wd W|^2 of every pair, also where it is a tiny share of |wd W|^2.

    Far from a stationary point it follows from the products. Near one it is their small difference and would be
    rounding noise, so those pairs, and only those, are read again and added entry by entry.

    Args:
        pairs: Weights and gradients, as for :func:`inner_products`.
        decays: Weight decay of each pair.
        products: What :func:`inner_products` returned for the pairs.

    Returns:
        A CPU tensor of shape ``(len(pairs),)``, float64; its square root is right to 1e-3 of itself, or 1e-7 of
        |wd W| where that is more (float32).

    Example:
        >>> pairs = [(torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -3.0]))]
        >>> squared_residuals(pairs, [1.0], inner_products(pairs))
        tensor([1.], dtype=torch.float64)
    """
    decay = torch.as_tensor(decays, dtype=torch.float64)
    ww, wg, gg = products[:, :3].unbind(1)
    pull = decay.square() * ww
    squared = gg + 2 * decay * wg + pull
    near = (squared < _SMALL_RESIDUAL**2 * pull).nonzero().flatten().tolist()
    by_device: dict[torch.device, list[int]] = {}
    for index in near:
        by_device.setdefault(pairs[index][0].device, []).append(index)
    for indices in by_device.values():
        again = torch.stack([_squared_distance(*pairs[index], float(decay[index])) for index in indices])
        squared[torch.tensor(indices)] = again.to("cpu", torch.float64)
    return squared


def _one_pass(
    rows: Sequence[tuple[Tensor, ...]], columns: tuple[Product, ...], *, scale: float = 0.0, exact: bool = False
) -> Tensor:
    by_device: dict[torch.device, list[int]] = {}
    for index, row in enumerate(rows):
        by_device.setdefault(row[0].device, []).append(index)
    out = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    # Thousands of short calls: without autograd's bookkeeping they take a twentieth less.
    with torch.inference_mode():
        for indices in by_device.values():
            owners, values = _device_products(rows, indices, columns, scale, exact)
            out.index_add_(0, torch.tensor(owners), values.to("cpu", torch.float64))
    return out


def _device_products(
    rows: Sequence[tuple[Tensor, ...]], indices: Sequence[int], columns: tuple[Product, ...], scale: float, exact: bool
) -> tuple[list[int], Tensor]:
    """Products to be summed, shape ``(n, columns)``, still on their device, and the row each belongs to."""
    owners: list[int] = []
    parts: list[Tensor] = []
    small: dict[int, list[tuple[int, list[Tensor]]]] = {}
    for index in indices:
        flat = _flatten(rows[index])
        if flat[0].numel() <= _SMALL:
            small.setdefault(flat[0].numel(), []).append((index, flat))
            continue
        for products in _chunk_products(flat, columns, scale, exact):
            owners.append(index)
            parts += products
    blocks = [torch.stack(parts).to(wide_dtype(parts[0])).view(-1, len(columns))] if parts else []
    for group in small.values():
        owners += [index for index, _ in group]
        blocks.append(_stacked_products([flat for _, flat in group], columns, scale))
    return owners, torch.cat(blocks)


def _chunk_products(
    flat: Sequence[Tensor], columns: tuple[Product, ...], scale: float, exact: bool
) -> Iterator[list[Tensor]]:
    """The products of each chunk, while its entries are in cache; the sum, if there is one, moves on behind them."""
    dtype = wide_dtype(flat[0]) if exact else _working_dtype(flat[:2])
    for w, g, *sums in _chunks(flat, dtype):
        w, wide = _cast(w, dtype), _cast(g, dtype)
        found: dict[Product, Tensor] = {}
        # The mixed product first: it fetches both streams from memory at once.
        for name in sorted(columns, key=lambda name: name != "wg"):
            if name == "sg":
                found[name] = _moved(sums[0], g, wide, scale)
            else:
                found[name] = (wide if name == "gg" else w).dot(w if name == "ww" else wide)
        yield [found[name] for name in columns]


def _moved(total: Tensor, grad: Tensor, wide: Tensor, scale: float) -> Tensor:
    """<S, G>, and then S += scale * G."""
    product = _cast(total, wide.dtype).dot(wide)
    total.add_(grad, alpha=scale)
    return product


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to would do nothing as well, but through the dispatcher, hundreds of times a pass.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _stacked_products(group: Sequence[Sequence[Tensor]], columns: tuple[Product, ...], scale: float) -> Tensor:
    """The products of many small tensors of one size, in float64; shape ``(len(group), len(columns))``."""
    vectors = torch.stack([vector for flat in group for vector in flat]).to(wide_dtype(group[0][0]))
    w, g, *sums = vectors.view(len(group), len(group[0]), -1).unbind(1)
    factors = {"ww": (w, w), "wg": (w, g), "gg": (g, g), "sg": (sums[0] if sums else g, g)}
    products = torch.stack([(a * b).sum(-1) for a, b in (factors[name] for name in columns)], 1)
    for _, grad, *totals in group:
        for total in totals:
            total.add_(grad, alpha=scale)
    return products


def _squared_distance(weight: Tensor, grad: Tensor, decay: float) -> Tensor:
    """|G + wd W|^2: entry by entry, so float32 suffices for float32 entries."""
    w, g = _flatten((weight, grad))
    dtype = _working_dtype((w, g))
    differences = (_cast(b, dtype).add(_cast(a, dtype), alpha=decay) for a, b in _chunks((w, g), dtype))
    return torch.stack([d.dot(d) for d in differences]).to(wide_dtype(w)).sum()


def _working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32 for float32 alone.

    Coarser entries need a conversion in any case, and have products so coarse that float32 would round a long sum of
    them to one side.
    """
    return torch.float32 if all(t.dtype is torch.float32 for t in tensors) else wide_dtype(tensors[0])


def _chunks(flat: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Vectors of one length in pieces, as long as suits arithmetic in ``dtype``."""
    if flat[0].device.type != "cpu":
        size = _CHUNK_ACCELERATOR
    else:
        size = _CHUNK_FLOAT64 if dtype is torch.float64 else _CHUNK_PER_THREAD * torch.get_num_threads()
    return zip(*(torch.split(tensor, size) for tensor in flat), strict=True)


def _flatten(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape as vectors that list their entries in one order: the order of the last in memory.

    Views wherever the tensors agree on that order (channels_last weights and gradients do); the last one, if dense,
    always. A plain reshape would copy those, and pairing entries by their place in memory would mix them up where the
    orders differ.
    """
    views = [real_view(tensor) for tensor in tensors]
    if all(view.is_contiguous() for view in views):
        return [view if view.ndim == 1 else view.view(-1) for view in views]
    order = _axes_by_stride(views[-1])
    return [view.permute(order).reshape(-1) for view in views]


def _memory_order(tensor: Tensor) -> Tensor:
    view = real_view(tensor)
    return view.permute(_axes_by_stride(view))


def _axes_by_stride(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
