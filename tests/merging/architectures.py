"""Random architectures for property tests, and the float64 reference that they are compared with."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

LAYERS = {
    "linear": lambda width: nn.Linear(width, width),
    "plain": lambda width: nn.Linear(width, width, bias=False),
    "convolution": lambda width: nn.Conv1d(width, width, 3, padding=1),
    "depthwise": lambda width: nn.Conv1d(width, width, 1, groups=width),
    "batch_norm": nn.BatchNorm1d,
    "layer_norm": nn.LayerNorm,
    "group_norm": lambda width: nn.GroupNorm(1, width),
    "embedding": lambda width: nn.Embedding(7, width),
    "attention": lambda width: nn.MultiheadAttention(width, 1),
    "recurrent": lambda width: nn.GRU(width, width),
    "prelu": lambda width: nn.PReLU(width),
    "bilinear": lambda width: nn.Bilinear(width, width, width),
}
architectures = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5)


def build(names: list[str], seed: int, width: int = 3, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """A network of named layers with random values everywhere, statistics and counters included."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.ModuleDict({f"{index}_{name}": LAYERS[name](width) for index, name in enumerate(names)})
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        positive = "int" in str(tensor.dtype) or name.endswith("running_var")
        tensor.data.copy_(values.abs() * 10 if positive else values)
    return net.to(dtype)


def is_averaged(name: str) -> bool:
    """Whether the default rule of a tensor is the mean, told from its layer."""
    return any(kind in name for kind in ("_norm.", "prelu.")) and not name.endswith("num_batches_tracked")


def reference(states: list[dict[str, Tensor]], coefficients: list[float], base: dict[str, Tensor] | None) -> dict:
    """What a merge should be, in float64, by formulas that are written out once more."""
    merged = {}
    for name, first in states[0].items():
        wide = [state[name].double() for state in states]
        if not first.is_floating_point():
            merged[name] = first
        elif is_averaged(name):
            merged[name] = sum(wide) / len(wide)
        elif base is None:
            merged[name] = sum(c * w for c, w in zip(coefficients, wide, strict=True))
        else:
            start = base[name].double()
            merged[name] = start + sum(c * (w - start) for c, w in zip(coefficients, wide, strict=True))
    return merged
