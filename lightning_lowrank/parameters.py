"""The view of a module's parameters that every measurement starts from.

Everything that knows about optimizers, wrappers or loss scaling lives here; the formulas see named tensors.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

# What torch.compile, FSDP and activation checkpointing put into the names. DDP's `module.` is not among them: Lightning
# never hands out the wrapped module, and users call their own submodules `module`.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Decay(enum.Enum):
    """How an optimizer applies a parameter group's weight decay."""

    COUPLED = "coupled"  # wd * theta is added to the gradient: the L2-regularised loss
    DECOUPLED = "decoupled"  # theta shrinks by lr * wd beside the update
    NONE = "none"
    UNKNOWN = "unknown"


# torch optimizers that add wd * theta to the gradient unless the group says `decoupled_weight_decay`.
_COUPLED = ("SGD", "Adam", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "ASGD")
# Decoupled without saying so in every torch version.
_DECOUPLED = ("AdamW", "Adafactor", "Muon")


@dataclass(frozen=True)
class Parameter:
    """One parameter as the optimizer is about to use it.

    Attributes:
        name: The name in the module, without the prefixes that wrappers add.
        value: The parameter, detached.
        grad: The gradient that the optimizer descends, unscaled; of the parameter's shape. Negated under
            ``maximize=True``.
        weight_decay: The group's coefficient; 0 where there is none.
        decay: How the optimizer applies it.
    """

    name: str
    value: Tensor
    grad: Tensor
    weight_decay: float
    decay: Decay

    @property
    def is_matrix(self) -> bool:
        """Whether spectra and rescaling groups speak of it; biases and gains are vectors."""
        return self.value.ndim >= 2


def decay_kind(optimizer: Optimizer, group: Mapping[str, Any]) -> Decay:
    """How ``optimizer`` decays the parameters of ``group``.

    Known are torch's own optimizers (and subclasses that do not change ``step``) and others that declare
    ``weight_decouple`` or ``decoupled_weight_decay`` in their groups. Any other optimizer with a positive decay is
    unknown.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        >>> decay_kind(optimizer, optimizer.param_groups[0])
        <Decay.DECOUPLED: 'decoupled'>
    """
    if not float(group.get("weight_decay") or 0) > 0:
        return Decay.NONE
    if _steps_like(optimizer, _DECOUPLED):
        return Decay.DECOUPLED
    declared = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    if declared is not None:
        return Decay.DECOUPLED if declared else Decay.COUPLED
    return Decay.COUPLED if _steps_like(optimizer, _COUPLED) else Decay.UNKNOWN


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names by ``id`` of the parameter, wrappers' prefixes stripped; a tied parameter has its first name."""
    return {id(parameter): strip_wrappers(name) for name, parameter in module.named_parameters()}


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether some parameter has no shape before the first forward pass."""
    return any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters())


def strip_wrappers(name: str) -> str:
    """Remove what compilation, FSDP and activation checkpointing put into a parameter's name.

    Example:
        >>> strip_wrappers("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    return _WRAPPERS.sub("", name)


def optimized_parameters(optimizer: Optimizer, names: Mapping[int, str], *, loss_scale: float = 1.0) -> list[Parameter]:
    """The parameters that ``optimizer`` is about to update, in the order of its groups.

    A parameter without a gradient is left out: no torch optimizer updates or decays it.

    Args:
        optimizer: Its gradients are complete: reduced over ranks and accumulated.
        names: As :func:`parameter_names` returns them; a parameter that the module does not know is ``group<i>.<j>``.
        loss_scale: A factor still in the gradients (fused optimizers under mixed precision).
    """
    view = []
    for i, group in enumerate(optimizer.param_groups):
        decay = decay_kind(optimizer, group)
        factor = (-1.0 if group.get("maximize") else 1.0) / loss_scale
        for j, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            grad = parameter.grad.detach()
            view.append(
                Parameter(
                    name=names.get(id(parameter), f"group{i}.{j}"),
                    value=parameter.detach(),
                    grad=grad if factor == 1.0 else grad * factor,
                    weight_decay=float(group.get("weight_decay") or 0.0),
                    decay=decay,
                )
            )
    return view


def sharding(module: nn.Module, parameters: Iterable[Tensor]) -> str | None:
    """What shards these parameters over processes, so that local sums are not the parameters'; None if nothing does."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            return "DTensor"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed"
    # With `use_orig_params` FSDP hands out plain parameters that are pieces of the real ones.
    return "FSDP" if any(isinstance(owner, FullyShardedDataParallel) for owner in module.modules()) else None


def _steps_like(optimizer: Optimizer, names: Iterable[str]) -> bool:
    """Whether the optimizer runs the ``step`` of one of torch's own classes, itself or inherited unchanged."""
    own = inspect.unwrap(type(optimizer).step)
    for name in names:
        cls = getattr(torch.optim, name, None)
        if cls is not None and isinstance(optimizer, cls) and own is inspect.unwrap(cls.step):
            return True
    return False
