"""The weights of a module as it uses them: tied ones once, parametrised ones put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_lowrank.naming import strip_wrappers
from lightning_lowrank.weights.source import NO_DATA, StoredWeights


@dataclass(frozen=True)
class Weight:
    """A parameter of a module, or the weight that a parametrisation makes.

    Attributes:
        path: Where its module is, as ``named_modules`` calls it.
        owner: The module.
        key: Its name in the module.
    """

    path: str
    owner: nn.Module
    key: str

    def value(self) -> Tensor:
        """The effective weight, computed if it is parametrised; nothing is changed by that."""
        with torch.no_grad():
            if self.key in _parametrised(self.owner):
                # In training mode a spectral normalisation would move its power iteration on.
                with _evaluating(_parametrised(self.owner)[self.key]):
                    effective: Tensor = getattr(self.owner, self.key)
                    return effective.detach()
            hook = next((hook for hook in _hooks(self.owner) if hook.name == self.key), None)
            if hook is None:
                return self.owner.get_parameter(self.key).detach()
            # What the attribute holds is that of the last forward pass.
            arguments = (self.owner, False) if isinstance(hook, SpectralNorm) else (self.owner,)
            made: Tensor = hook.compute_weight(*arguments)
            return made.detach()


def named_weights(module: nn.Module) -> dict[str, Weight]:
    """All parameters by name, without wrappers' prefixes; tied ones once, parametrised ones as the effective weight.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        >>> {name: tuple(weight.value().shape) for name, weight in named_weights(layer).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    inner = {id(part) for m in module.modules() for made in _parametrised(m).values() for part in made.modules()}
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        if id(owner) in inner:
            continue
        made = [*_parametrised(owner), *(hook.name for hook in _hooks(owner))]
        sources = {f"{key}_{end}" for key in made for end in ("g", "v", "orig")}
        own = [(key, id(p)) for key, p in owner.named_parameters(recurse=False) if _has_shape(p) and key not in sources]
        for key, identity in [*((key, 0) for key in made), *own]:
            if identity not in seen:
                seen |= {identity} - {0}
                found[strip_wrappers(f"{path}.{key}" if path else key)] = Weight(path, owner, key)
    return found


def weights_of_module(module: nn.Module) -> StoredWeights:
    """The weights of a module, parametrised ones computed when they are read.

    Raises:
        ValueError: If FSDP has flattened the parameters.
    """
    if any("_flat_param" in name for name, _ in module.named_parameters()):
        raise ValueError(
            "the module's parameters are flattened by FSDP; inspect its checkpoint, or call this inside"
            " FullyShardedDataParallel.summon_full_params(module)"
        )
    weights = named_weights(module)
    stored = StoredWeights({}, {}, lambda name: weights[name].value())
    for name, weight in weights.items():
        value = weight.value()
        stored.shapes[name] = tuple(value.shape)
        stored.dtypes[name] = str(value.dtype).removeprefix("torch.")
        if value.is_meta and value.ndim > 1:
            stored.left_out[name] = NO_DATA
    return stored


def _parametrised(owner: nn.Module) -> dict[str, nn.Module]:
    """What makes the parametrised weights of a module, by the weight's name."""
    made: Any = owner.parametrizations if is_parametrized(owner) else {}
    return dict(made.items())


def _hooks(owner: nn.Module) -> Iterator[Any]:
    """The old weight and spectral normalisations, which recompute a weight before every forward pass."""
    return (hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm)))


def _has_shape(parameter: Tensor) -> bool:
    return not isinstance(parameter, UninitializedParameter)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, every part put back after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
