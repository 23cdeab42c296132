"""Which matrix a parameter is: the one place that decides what spectra speak of.

A shape alone does not say which linear map a parameter stands for: a grouped convolution is several maps side by side,
a fused attention projection is three in one tensor, and a weight behind a parametrisation is no parameter at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_lowrank.layers import _FUSED, _HEADS, _OUTPUT, _out_dim
from lightning_lowrank.naming import strip_wrappers
from lightning_lowrank.weights import Weight, named_weights

_QKV = ("query", "key", "value")
_GATES = {4: ("input", "forget", "cell", "output"), 3: ("reset", "update", "new")}
# Number of key and value heads where queries share them.
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head")
# transformers' attention classes whose fused projection holds query, key and value of one head, then of the next.
_BY_HEAD = ("GPTNeoX", "Bloom", "Falcon", "Persimmon", "GPTBigCode")
# Those that cut it in a way of their own, and a name that different models mean different things by.
_OWN_ORDER = "CodeGen"
_AMBIGUOUS = "query_key_value"
# What stands between an attention module and its projection, in names.
_BETWEEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
# Entries of a state dict that are no weights although they may have two or more dimensions.
_NO_WEIGHT = re.compile(r"bias|(.*_)?mask|(cos|sin)_cached")
_EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)
_NORMALISATION = re.compile(r"(?:.*_)?(?:layer|group)?_?norm_?\d*", re.IGNORECASE)
_GATED = re.compile(r"weight_(ih|hh|hr)((?:_l\d+)?(?:_reverse)?)")
# Channels that a picture has at most.
_PICTURE = 4
# Normalisations whose gain may have several dimensions.
_NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm)
_FORMS = (
    '"linear", "qkv", "qkv:1" (outputs last), "qkv*12" (head by head, 12 heads), "groups:4", "circular:32x32", "stack"'
)


@dataclass(frozen=True)
class Layout:
    """How a parameter is read as one linear map, or as several.

    Attributes:
        kind: "linear", "convolution", "transposed convolution", "embedding", "fused attention", "recurrent gates",
            "stack of matrices" or "other".
        rows: How many leading dimensions count the rows; the others count the columns.
        groups: The map is block-diagonal, with as many equal blocks along the rows (grouped convolutions).
        parts: Names of the maps that are joined in one tensor, in their order; empty for a single one.
        part_dim: The dimension along which they are joined.
        sizes: Their lengths along it; empty where they are equal.
        repeats: How often the parts follow each other: 1, or the number of heads where each head has its own.
        circular: The input's spatial size, if the kernel is used with stride 1 and circular padding. The operator's
            norm is then known exactly.

    Example:
        >>> fused = Layout("fused attention", parts=("query", "key", "value"))
        >>> [(name, tuple(fused.blocks(piece).shape)) for name, piece in fused.pieces(torch.zeros(6, 2)).items()]
        [('query', (1, 2, 2)), ('key', (1, 2, 2)), ('value', (1, 2, 2))]
        >>> Layout("convolution", groups=4).blocks(torch.zeros(8, 3, 5, 5)).shape
        torch.Size([4, 2, 75])
    """

    kind: str = "other"
    rows: int = 1
    groups: int = 1
    parts: tuple[str, ...] = ()
    part_dim: int = 0
    sizes: tuple[int, ...] = ()
    repeats: int = 1
    circular: tuple[int, ...] | None = None

    def pieces(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts by name, as views where the parts are not repeated; ``{"": tensor}`` without parts."""
        if not self.parts:
            return {"": tensor}
        first = tensor.movedim(self.part_dim, 0)
        cut = first.reshape(self.repeats, first.shape[0] // self.repeats, *first.shape[1:])
        sizes = list(self.sizes) or [cut.shape[1] // len(self.parts)] * len(self.parts)
        found = (piece.flatten(0, 1).movedim(0, self.part_dim) for piece in torch.split(cut, sizes, 1))
        return dict(zip(self.parts, found, strict=True))

    def blocks(self, tensor: Tensor) -> Tensor:
        """A parameter, or a piece of it, as a block-diagonal matrix: shape ``(groups, rows, columns)``."""
        rows, columns = math.prod(tensor.shape[: self.rows]), math.prod(tensor.shape[self.rows :])
        return tensor.reshape(self.groups, rows // self.groups, columns)

    def objection(self, shape: Sequence[int]) -> str | None:
        """Why a tensor of this shape can't be read so, in words."""
        if not 0 < self.rows < len(shape) or not 0 <= self.part_dim < len(shape):
            return f"it has {len(shape)} dimensions"
        if self.groups < 1 or math.prod(shape[: self.rows]) % self.groups:
            return f"its {math.prod(shape[: self.rows])} rows are not {self.groups} equal groups"
        block, rest = divmod(shape[self.part_dim], max(self.repeats, 1))
        fits = sum(self.sizes) == block if self.sizes else not self.parts or block % len(self.parts) == 0
        if rest or not fits:
            what = f"{self.repeats} times " if self.repeats != 1 else ""
            return f"dimension {self.part_dim} of length {shape[self.part_dim]} is not {what}{', '.join(self.parts)}"
        kernel = tuple(shape[2:])
        if self.circular is not None and (
            len(kernel) != len(self.circular) or any(k > n for k, n in zip(kernel, self.circular, strict=True))
        ):
            return f"its kernel {kernel} does not fit into an input of size {self.circular}"
        return None


Overrides = Mapping[str, "Layout | str | None"]


def weight_layouts(module: nn.Module, overrides: Overrides | None = None) -> dict[str, Layout]:
    """How each weight of a module is read as a matrix; vectors and scalars, and gains of normalisations, are left out.

    Args:
        module: Any module.
        overrides: By glob pattern of the name, the first that matches: a :class:`Layout`; a short form ("linear",
            "qkv", "qkv:1", "qkv*12", "groups:4", "circular:32x32", "stack"); or None, which leaves the weight out.

    Raises:
        ValueError: If a short form is unknown, a pattern matches no weight, or a layout does not fit a weight's shape.

    Example:
        >>> layouts = weight_layouts(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LSTM(8, 2)))
        >>> {name: (layout.kind, layout.groups, len(layout.parts)) for name, layout in layouts.items()}
        {'0.weight': ('convolution', 8, 0),
         '2.weight_ih_l0': ('recurrent gates', 1, 4),
         '2.weight_hh_l0': ('recurrent gates', 1, 4)}
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    weights = named_weights(module)
    shapes = {name: tuple(weight.value().shape) for name, weight in weights.items()}
    found = {name: _of_weight(weights[name], shape, modules) for name, shape in shapes.items() if len(shape) > 1}
    return _overridden(found, shapes, overrides)


def layouts_of_parameters(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], overrides: Overrides | None = None
) -> dict[str, Layout]:
    """:func:`weight_layouts` for the parameters as an optimizer holds them; nothing is computed or gathered.

    What a parametrisation makes a weight from is left out: it is not the matrix that the network uses.

    Args:
        module: What the parameters belong to.
        shapes: Of the whole parameters, by name; names that the module does not know are read as those of a state dict.
        overrides: As for :func:`weight_layouts`.

    Raises:
        ValueError: As :func:`weight_layouts`.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    weights = named_weights(module)
    hidden = {strip_wrappers(name) for name, _ in module.named_parameters()} - set(weights)
    found: dict[str, Layout | None] = {}
    for name, shape in shapes.items():
        if len(shape) > 1 and name in weights:
            found[name] = _of_weight(weights[name], tuple(shape), modules)
        elif len(shape) > 1:
            found[name] = None if name in hidden else _of_name(name, tuple(shape), shapes, False)
    return _overridden(found, shapes, overrides)


def layouts_of_names(shapes: Mapping[str, Sequence[int]], overrides: Overrides | None = None) -> dict[str, Layout]:
    """:func:`weight_layouts` for a bare state dict, of which only names and shapes are known.

    What they can't tell is read as plainly as possible: the kernel of a grouped convolution is one matrix (but for a
    depthwise one), and a fused projection that may be ordered head by head stays whole.

    Args:
        shapes: By name, in the order of the state dict.
        overrides: As for :func:`weight_layouts`.

    Raises:
        ValueError: As :func:`weight_layouts`.

    Example:
        >>> layouts = layouts_of_names({"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,)})
        >>> {name: (layout.parts, layout.part_dim) for name, layout in layouts.items()}
        {'h.0.attn.c_attn.weight': (('query', 'key', 'value'), 1)}
    """
    depthwise = _depthwise(shapes)
    found = {
        name: _of_name(name, tuple(shape), shapes, name in depthwise)
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    return _overridden(found, shapes, overrides)


def check_overrides(overrides: Overrides) -> None:
    """Refuse unknown short forms, which needs no module.

    Raises:
        ValueError: If there is one; lists those that exist.
    """
    for pattern, how in overrides.items():
        _layout(pattern, how)


def _of_weight(weight: Weight, shape: tuple[int, ...], modules: Mapping[str, nn.Module]) -> Layout | None:
    """The layout of a module's weight; None where it is no matrix."""
    owner, key = weight.owner, weight.key
    if isinstance(owner, _NORMALISATIONS):
        return None
    if key == "weight" and isinstance(owner, _ConvNd):
        kind = "transposed convolution" if isinstance(owner, _ConvTransposeNd) else "convolution"
        return Layout(kind, groups=owner.groups)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Layout("embedding")
    if isinstance(owner, nn.Bilinear):
        return Layout()
    if isinstance(owner, nn.MultiheadAttention) and not key.startswith("bias"):
        return Layout("fused attention", parts=_QKV) if key == "in_proj_weight" else Layout("linear")
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        gates = 4 if isinstance(owner, (nn.LSTM, nn.LSTMCell)) else 3 if isinstance(owner, (nn.GRU, nn.GRUCell)) else 1
        return _gated(1 if key.startswith("weight_hr") else gates)
    if key == "weight" and len(shape) == 2:
        path = weight.path.split(".")
        while path[-1] in _BETWEEN:
            path.pop()
        return _projection(path[-1], modules[".".join(path[:-1])], shape, _out_dim(owner))
    return _unnamed(f"{type(owner).__name__}.{key}", shape)


def _projection(child: str, parent: nn.Module, shape: tuple[int, ...], dim: int) -> Layout:
    """A linear layer: one map, or an attention's queries, keys and values."""
    plain, length = Layout("linear"), shape[dim]
    kind = type(parent).__name__
    if child not in _FUSED:
        return plain
    if hasattr(parent, "q_attn") and length == 2 * shape[1 - dim]:
        return Layout("fused attention", parts=_QKV[1:], part_dim=dim)
    heads = _count(parent, _HEADS)
    # Without a number of their own, keys have as many heads as queries.
    shared = _count(parent, _KEY_HEADS)
    if kind.startswith(_BY_HEAD):
        shared = shared or heads
        if not heads or heads % shared or length % (heads + 2 * shared):
            return plain
        size = length // (heads + 2 * shared)
        sizes = (heads // shared * size, size, size)
        return Layout("fused attention", parts=_QKV, part_dim=dim, sizes=sizes, repeats=shared)
    if child == _AMBIGUOUS or kind.startswith(_OWN_ORDER):
        return plain
    if heads and shared and length % (heads + 2 * shared) == 0:
        return _joined(length // (heads + 2 * shared) * heads, length, dim)
    outputs = (getattr(parent, name, None) for name in _OUTPUT)
    inputs = (getattr(output, "in_features", getattr(output, "nx", None)) for output in outputs)
    queries = next((n for n in inputs if isinstance(n, int)), length // 3 if heads else 0)
    return _fused(child, shape, dim, queries) or plain


def _of_name(name: str, shape: tuple[int, ...], shapes: Mapping[str, Sequence[int]], depthwise: bool) -> Layout | None:
    """The layout of an entry of a state dict; None where it is no matrix."""
    *path, key = name.split(".")
    owner = ".".join(path)
    while path and path[-1] in _BETWEEN:
        path.pop()
    child = path[-1] if path else ""
    if _NO_WEIGHT.fullmatch(key) or (key == "weight" and _NORMALISATION.fullmatch(child)):
        return None
    if key == "in_proj_weight" and shape[0] == 3 * shape[1]:
        return Layout("fused attention", parts=_QKV)
    if (match := _GATED.fullmatch(key)) is not None:
        return _gated(1 if match[1] == "hr" else _gates(f"{owner}." if owner else "", match[2], shapes))
    if len(shape) == 2 and key == "weight":
        if child in _FUSED and child != _AMBIGUOUS:
            return _projection_of_name(child, ".".join(path[:-1]), shape, shapes)
        return Layout("embedding" if _EMBEDDING.search(child) else "linear")
    if key == "weight" and "experts" not in path:
        return Layout("convolution", groups=shape[0] if depthwise else 1)
    return _unnamed(name, shape)


def _depthwise(shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """The kernels of one input channel that are depthwise, as far as shapes can tell.

    Others are the first layer, unless another one takes a picture's few channels or tokens, and the transposed
    convolution that makes a grey picture at the end.
    """
    matrices = {name: tuple(shape) for name, shape in shapes.items() if len(shape) > 1}
    kernels = {name: shape for name, shape in matrices.items() if len(shape) > 2 and name.endswith("weight")}
    made = {shape[0] for shape in kernels.values()}
    single = [name for name, shape in kernels.items() if shape[1] == 1 < shape[0]]
    has_first = any(1 < shape[1] <= _PICTURE and shape[1] not in made for shape in kernels.values())
    has_first |= any(_EMBEDDING.search(name) for name, shape in matrices.items() if len(shape) == 2)
    found = set(single if has_first else single[1:]) - set(list(matrices)[-1:])
    biases = {name: shapes.get(f"{name.removesuffix('weight')}bias") for name in found}
    return {name for name, bias in biases.items() if bias is None or tuple(bias) == matrices[name][:1]}


def _projection_of_name(child: str, parent: str, shape: tuple[int, ...], shapes: Mapping[str, Sequence[int]]) -> Layout:
    """Queries, keys and values in a state dict; the output projection's inputs tell how many queries there are."""
    outputs = [shapes.get(f"{parent}.{name}.weight", ()) for name in (*_OUTPUT, "to_out.0")]
    output = next((shape for shape in outputs if len(shape) == 2), (0, 0))
    if child == "qkv_proj" and f"{parent}.out_proj.weight" in shapes:
        # So CodeGen calls them, which has an order of its own.
        return Layout("linear")
    # transformers' Conv1D has its outputs last.
    for dim in (0, 1) if child == "c_attn" else (0,):
        if f"{parent}.q_attn.weight" in shapes:
            if shape[dim] == 2 * shape[1 - dim]:
                return Layout("fused attention", parts=_QKV[1:], part_dim=dim)
        elif (found := _fused(child, shape, dim, output[1 - dim])) is not None:
            return found
    return Layout("linear")


def _fused(child: str, shape: tuple[int, ...], dim: int, queries: int) -> Layout | None:
    """Queries, keys and values one after the other; ``queries`` is their number of rows as far as it is known."""
    length = shape[dim]
    # State-space models call something else "in_proj".
    if child != "in_proj" and 0 < queries < length and (length - queries) % 2 == 0:
        return _joined(queries, length, dim)
    return _joined(length // 3, length, dim) if length == 3 * shape[1 - dim] else None


def _joined(queries: int, length: int, dim: int) -> Layout:
    keys = (length - queries) // 2
    sizes = () if keys == queries else (queries, keys, keys)
    return Layout("fused attention", parts=_QKV, part_dim=dim, sizes=sizes)


def _gates(prefix: str, suffix: str, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many gates a recurrent layer has: its rows over the size of its state."""
    inner = shapes.get(f"{prefix}weight_hh{suffix}", ())
    # With a projection the state is larger than what is fed back.
    projected = shapes.get(f"{prefix}weight_hr{suffix}", inner)
    return inner[0] // projected[1] if len(inner) == 2 and inner[0] % projected[1] == 0 else 1


def _gated(gates: int) -> Layout:
    return Layout("recurrent gates", parts=_GATES[gates]) if gates in _GATES else Layout("linear")


def _unnamed(name: str, shape: tuple[int, ...]) -> Layout | None:
    """A parameter of a class that is not known."""
    if len(shape) == 2 and name.endswith("weight"):
        return Layout("linear")
    if len(shape) == 3 and "expert" in name.lower():
        return Layout("stack of matrices", rows=2, groups=shape[0])
    # Dimensions of length 1 are for broadcasting, as in position embeddings and scales of channels.
    long = [i for i, length in enumerate(shape) if length != 1]
    return Layout(rows=long[0] + 1) if len(long) > 1 else None


def _overridden(
    found: Mapping[str, Layout | None], shapes: Mapping[str, Sequence[int]], overrides: Overrides | None
) -> dict[str, Layout]:
    """The layouts with the user's in place of those that they name."""
    chosen = dict(found)
    wanted = {pattern: _layout(pattern, how) for pattern, how in (overrides or {}).items()}
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in found):
            names = ", ".join(found) or "none"
            raise ValueError(f"matrices: {pattern!r} matches no weight of two or more dimensions; there are: {names}")
    for name, plain in found.items():
        patterns = [pattern for pattern in wanted if fnmatchcase(name, pattern)]
        if not patterns:
            continue
        pattern, how = patterns[0], wanted[patterns[0]]
        chosen[name] = layout = how(plain or Layout(), shapes[name]) if callable(how) else how
        if layout is not None and (reason := layout.objection(shapes[name])) is not None:
            raise ValueError(
                f"matrices: {pattern!r} is not possible for {name} of shape {tuple(shapes[name])}: {reason}"
            )
    return {name: layout for name, layout in chosen.items() if layout is not None}


def _layout(pattern: str, how: Any) -> Any:
    """A layout, None, or what makes a layout of the plain one and the shape."""
    if how is None or isinstance(how, Layout):
        return how
    text = how.strip() if isinstance(how, str) else ""
    if text == "linear":
        return Layout("linear")
    if text == "stack":
        return lambda plain, shape: Layout("stack of matrices", rows=2, groups=shape[0])
    if match := re.fullmatch(r"qkv(?::(\d))?(?:\*([1-9]\d*))?", text):
        return Layout("fused attention", parts=_QKV, part_dim=int(match[1] or 0), repeats=int(match[2] or 1))
    if match := re.fullmatch(r"groups:([1-9]\d*)", text):
        return lambda plain, shape: Layout(plain.kind, groups=int(match[1]))
    if match := re.fullmatch(r"circular:(\d+(?:x\d+)*)", text):
        size = tuple(map(int, match[1].split("x")))
        return lambda plain, shape: Layout("convolution", groups=plain.groups, circular=size)
    raise ValueError(f"matrices: {pattern!r} is said to be {how!r}; choose a Layout, None or one of {_FORMS}")


def _count(module: nn.Module, names: Sequence[str]) -> int:
    """The first of these numbers that the module, or its configuration, has."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(number := getattr(holder, name, None), int) and number > 0:
                return number
    return 0
