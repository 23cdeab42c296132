"""Names of parameters as users wrote them."""

from __future__ import annotations

import re

from torch import nn

# What torch.compile, FSDP and activation checkpointing put into the names. DDP's `module.` is not among them: Lightning
# never hands out the wrapped module, and users call their own submodules `module`.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names by ``id`` of the parameter, wrappers' prefixes stripped; a tied parameter has its first name."""
    return {id(parameter): strip_wrappers(name) for name, parameter in module.named_parameters()}


def strip_wrappers(name: str) -> str:
    """Remove what compilation, FSDP and activation checkpointing put into a parameter's name.

    Example:
        >>> strip_wrappers("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    return _WRAPPERS.sub("", name)
