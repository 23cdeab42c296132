"""How low the spectral ratios of a bias-free network can be, given what it does to its inputs.

For f(x) = W_K s(... s(W_1 x)) with s of Lipschitz constant 1 and s(0) = 0, |f(x)| <= |x| prod |W_k|_2. So by the
inequality of arithmetic and geometric means

    mean_k |W_k|_2 / |W_k|_F  >=  (max_i |f(x_i)| / |x_i|)^(1/K) / (geometric mean of |W_k|_F),

at any point of training (docs/theory.md; compare Timor, Vardi and Shamir, arXiv:2201.12760, at a stationary one). A
convolution's operator norm is at most sqrt(kernel area) times the spectral norm of its unfolded kernel, as each input
number is part of at most that many patches; the factors go into the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank._compat import attached_trainer, clone_batch, move_batch, quiet_trainer
from lightning_lowrank.functional import frobenius_norm
from lightning_lowrank.preserve import preserved

Outputs = Callable[[Any, Any], Any]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# 1-Lipschitz in evaluation mode, and 0 at 0, whatever their arguments.
_CONTRACTIONS = (
    nn.ReLU,
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL_AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def chain_of(module: nn.Module) -> tuple[nn.Sequential | None, str]:
    """The ``nn.Sequential`` that holds all the module's parameters, if the bound holds for it, else None and why.

    Example:
        >>> chain_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)))
        (None, 'layer Linear has a bias')
    """
    every = {id(p) for p in module.parameters()}
    chains = (m for m in module.modules() if type(m) is nn.Sequential and every == {id(p) for p in m.parameters()})
    chain = next(chains, None)
    if chain is None or not every:
        return None, "the parameters are not all in one nn.Sequential"
    layers = list(_layers(chain))
    if len(set(map(id, matrices(chain)))) < len(matrices(chain)):
        return None, "a weight is used twice"
    reason = next((reason for layer in layers if (reason := _objection(layer))), None)
    return (chain, "") if reason is None else (None, reason)


def matrices(chain: nn.Sequential) -> list[Tensor]:
    """The weights of a chain in the order of their use."""
    return [layer.weight for layer in _layers(chain) if isinstance(layer, (nn.Linear, *_CONVOLUTIONS))]


def spectral_ratio_bound(chain: nn.Sequential, stretch: float) -> float:
    """The lower bound on the mean of |W_k|_2 / |W_k|_F.

    Args:
        chain: As :func:`chain_of` returns it.
        stretch: The largest |f(x)| / |x| that was seen.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(layer.weight)
        >>> round(spectral_ratio_bound(nn.Sequential(layer), 1.0), 4)
        0.7071
    """
    if not stretch > 0:
        return 0.0 if stretch == 0 else math.nan
    weights = matrices(chain)
    norms = [frobenius_norm(weight) for weight in weights]
    if not all(norm > 0 and math.isfinite(norm) for norm in norms):
        return math.nan
    areas = [weight.shape[2:].numel() for weight in weights]
    logs = math.log(stretch) - sum(math.log(norm) + math.log(a) / 2 for norm, a in zip(norms, areas, strict=True))
    return math.exp(logs / len(weights))


@torch.no_grad()
def largest_stretch(module: Any, chain: nn.Sequential, loader: Iterable[Any], outputs: Outputs | None = None) -> float:
    """The largest |f(x)| / |x| over the data, of the chain's own inputs and outputs, in evaluation mode.

    Args:
        module: The LightningModule.
        chain: A part of it.
        loader: Yields batches.
        outputs: ``outputs(module, batch)`` runs the network; by default ``module(batch[0])``.

    Returns:
        NaN if the chain was never called as a whole, or gave values that are not finite.
    """
    trainer = attached_trainer(module) or quiet_trainer(module)
    device = next(chain.parameters()).device
    found: list[float] = []

    def watch(_: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> None:
        x, y = (torch.linalg.vector_norm(t.detach().flatten(1).double(), dim=1) for t in (arguments[0], result))
        found.extend((y / x)[x > 0].tolist())

    with preserved(module, loader):
        module.eval()
        handle = chain.register_forward_hook(watch)
        try:
            for batch in loader:
                moved = move_batch(clone_batch(batch), module, trainer, device)
                if outputs is None:
                    module(moved[0])
                else:
                    outputs(module, moved)
        finally:
            handle.remove()
    return max(found) if found and all(map(math.isfinite, found)) else math.nan


def _layers(chain: nn.Sequential) -> Iterator[nn.Module]:
    for layer in chain:
        if type(layer) is nn.Sequential:
            yield from _layers(layer)
        else:
            yield layer


def _objection(layer: nn.Module) -> str | None:
    """Why a layer can't be part of a chain; exact classes alone, as a subclass may compute anything."""
    kind, name = type(layer), type(layer).__name__
    if kind is nn.Linear or kind in _CONVOLUTIONS:
        if layer.bias is not None:
            return f"layer {name} has a bias"
        padded = getattr(layer, "padding_mode", "zeros")
        return None if padded == "zeros" else f"a convolution is padded by {padded!r} instead of zeros"
    if kind is nn.LeakyReLU:
        return None if abs(float(layer.negative_slope)) <= 1 else "a LeakyReLU has a slope above 1"  # type: ignore[arg-type]
    if kind in _AVERAGES:
        whole = getattr(layer, "divisor_override", None) is None and bool(layer.count_include_pad)
        # Windows that stick out at the end are averaged over what is left of them.
        return None if whole and not layer.ceil_mode else "an average pooling does not divide by its kernel's area"
    if kind in _GLOBAL_AVERAGES:
        return None if set(_numbers(layer.output_size)) == {1} else f"an {name} has more than one output"
    if kind in _MAXIMA:
        sizes, strides = (_numbers(v) for v in (layer.kernel_size, layer.stride))
        dimensions = int(name[-2])
        pairs = zip(sizes * (dimensions // len(sizes)), strides * (dimensions // len(strides)), strict=True)
        apart = all(size <= stride for size, stride in pairs) and set(_numbers(layer.dilation)) == {1}
        return None if apart else "a max-pooling's windows overlap"
    return None if kind in _CONTRACTIONS else f"layer {name} is not one of those that the bound is known for"


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
