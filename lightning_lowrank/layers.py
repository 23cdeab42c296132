"""The ends of a module's layers: where a factor can be put into the weights and taken out again elsewhere.

Scaling the output of ``y = W x + b`` by a factor scales ``W`` and ``b``; scaling its input scales ``W`` alone. These
two bundles of parameters are the layer's ends. A factor that goes into one layer's output end and comes out of the next
one's input end leaves the function as it is, whatever sign-preserving piecewise linear activation lies between.
Attention has such pairs inside each head: queries with keys, values with the output projection.

What is listed here are candidates. Which of them really pair up is found from the gradients, see
:class:`lightning_lowrank.functional.RescalingGroups`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowrank.functional._tensors import wide_dtype
from lightning_lowrank.naming import parameter_names
from lightning_lowrank.parameters import Parameter

# How attention modules call what they consist of, in torch, timm, transformers and common teaching code.
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads")
_FUSED = ("qkv", "c_attn", "in_proj", "query_key_value", "qkv_proj", "to_qkv", "Wqkv")
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
)
_OUTPUT = ("out_proj", "c_proj", "o_proj", "proj", "to_out", "wo", "out_lin", "dense")


@dataclass(frozen=True)
class Blocks:
    """Equal blocks of a parameter along one dimension: the heads of a projection.

    Attributes:
        parameter: The parameter's name.
        dim: The dimension that is cut.
        start: Where the first block begins.
        count: Number of blocks.
        size: Length of each.
    """

    parameter: str
    dim: int
    start: int
    count: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """The blocks as rows, shape ``(count, ...)``."""
        cut = tensor.narrow(self.dim, self.start, self.count * self.size)
        shape = (*cut.shape[: self.dim], self.count, self.size, *cut.shape[self.dim + 1 :])
        return cut.view(shape).movedim(self.dim, 0)


@dataclass(frozen=True)
class End:
    """One end of a layer, or of one head of it.

    Attributes:
        name: For people: the weight's name, with what belongs to it.
        weight: The name of the parameter whose layer this is an end of.
        kind: "in", "out", or "both" where the two coincide (no bias).
        parts: The parameters that are scaled together; each whole, or as one of several blocks.
    """

    name: str
    weight: str
    kind: Literal["in", "out", "both"]
    parts: tuple[tuple[str, Blocks | None, int], ...]


def layer_ends(module: nn.Module) -> list[End]:
    """The ends of every layer of ``module``, in the order of its parameters.

    Example:
        >>> from torch import nn
        >>> for end in layer_ends(nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))):
        ...     print(end.kind, end.name)
        both 0.weight
        in 2.weight
        out 2.weight with 2.bias
    """
    names = parameter_names(module)
    heads = _attention_ends(module, names)
    ends: dict[str, list[End]] = {}
    for owner in module.modules():
        own = {key: names[id(p)] for key, p in owner.named_parameters(recurse=False)}
        for key, name in own.items():
            if key == "bias" and "weight" in own:
                continue
            bias = own.get("bias") if key == "weight" else None
            is_matrix = owner.get_parameter(key).ndim > 1
            ends[name] = _plain_ends(name, bias, is_matrix, heads.get(name, []))
    return list(chain.from_iterable(ends.values()))


def ends_by_name(names: Collection[str]) -> list[End]:
    """Ends for parameters of which only the names are known: ``x.weight`` and ``x.bias`` belong together."""
    ends = []
    for name in names:
        owner, _, key = name.rpartition(".")
        partner = f"{owner}.bias" if key == "weight" and f"{owner}.bias" in names else None
        if not (key == "bias" and f"{owner}.weight" in names):
            ends += _plain_ends(name, partner, True, [])
    return ends


def _plain_ends(weight: str, bias: str | None, is_matrix: bool, heads: list[End]) -> list[End]:
    """The ends of one weight; where its heads are known, theirs stand for the end that they cut."""
    by_head = {end.kind for end in heads}
    whole: tuple[str, Blocks | None, int] = (weight, None, 0)
    if bias is None:
        # Without a bias the ends coincide, unless only one of them is cut.
        kinds: list[Literal["in", "out", "both"]] = ["both"] if not by_head else ["in", "out"]
        plain = [End(weight, weight, kind, (whole,)) for kind in kinds]
    else:
        out = End(f"{weight} with {bias}", weight, "out", (whole, (bias, None, 0)))
        # A gain's input end is a normalised activation: no factor reaches it.
        plain = [End(weight, weight, "in", (whole,)), out] if is_matrix else [out]
    return [end for end in plain if end.kind not in by_head] + heads


def _attention_ends(module: nn.Module, names: Mapping[int, str]) -> dict[str, list[End]]:
    """The heads' ends of every attention module, by the name of the weight that they are blocks of."""
    found: dict[str, list[End]] = {}
    for owner in module.modules():
        heads = next((n for key in _HEADS if isinstance(n := getattr(owner, key, None), int) and n > 0), 0)
        if heads:
            for end in _heads_of(owner, heads, names):
                found.setdefault(end.weight, []).append(end)
    return found


def _heads_of(owner: nn.Module, heads: int, names: Mapping[int, str]) -> Iterator[End]:
    """Queries', keys' and values' output ends, and the output projection's input ends, head by head."""

    def blocks(parameter: Any, dim: int, start: int, length: int) -> Blocks | None:
        known = isinstance(parameter, Tensor) and id(parameter) in names and length % heads == 0
        return Blocks(names[id(parameter)], dim, start, heads, length // heads) if known else None

    for label, dim, (weight, start), (bias, bias_start), length in _projections(owner):
        of_weight = blocks(weight, dim, start, length)
        of_bias = blocks(bias, 0, bias_start, length)
        if of_weight is None or (bias is not None and of_bias is None):
            continue
        for head in range(heads):
            parts = tuple((b.parameter, b, head) for b in (of_weight, of_bias) if b is not None)
            yield End(f"{of_weight.parameter}[{label}, head {head}]", of_weight.parameter, "out", parts)
    output = _child(owner, _OUTPUT)
    if output is not None:
        dim = 1 - _out_dim(output)
        of_output = blocks(output.weight, dim, 0, output.weight.shape[dim])
        for head in range(heads) if of_output else ():
            assert of_output is not None
            name = f"{of_output.parameter}[head {head}]"
            yield End(name, of_output.parameter, "in", ((of_output.parameter, of_output, head),))


def _projections(owner: nn.Module) -> Iterator[tuple[str, int, tuple[Any, int], tuple[Any, int], int]]:
    """Label, dimension of the outputs, weight and bias (each with where it starts) and length of q, k and v."""
    labels = ("query", "key", "value")
    if isinstance(owner, nn.MultiheadAttention) and owner.in_proj_weight is None:
        # Three weights that share one vector of biases.
        size = owner.embed_dim
        for i, weight in enumerate((owner.q_proj_weight, owner.k_proj_weight, owner.v_proj_weight)):
            yield labels[i], 0, (weight, 0), (owner.in_proj_bias, i * size), size
        return
    if isinstance(owner, nn.MultiheadAttention):
        yield from _thirds(labels, owner.in_proj_weight, owner.in_proj_bias, 0)
        return
    if (child := _child(owner, _FUSED)) is not None:
        yield from _thirds(labels, child.weight, child.bias, _out_dim(child))
        return
    for trio in _SEPARATE:
        children = [child for name in trio if (child := _child(owner, (name,))) is not None]
        lengths = {child.weight.shape[_out_dim(child)] for child in children}
        # Fewer key than query heads (grouped queries) pair up as whole matrices only.
        if len(children) == len(labels) and len(lengths) == 1:
            for label, child in zip(labels, children, strict=True):
                yield label, _out_dim(child), (child.weight, 0), (child.bias, 0), next(iter(lengths))


def _thirds(
    labels: Sequence[str], weight: Tensor, bias: Tensor | None, dim: int
) -> Iterator[tuple[str, int, tuple[Any, int], tuple[Any, int], int]]:
    """Queries, keys and values of one fused projection."""
    if weight.shape[dim] % len(labels) == 0:
        length = weight.shape[dim] // len(labels)
        for i, label in enumerate(labels):
            yield label, dim, (weight, i * length), (bias, i * length), length


def _child(owner: nn.Module, candidates: tuple[str, ...]) -> Any:
    """The first child of one of these names that has a matrix for a weight."""
    for name in candidates:
        child = getattr(owner, name, None)
        if isinstance(child, nn.Module) and getattr(getattr(child, "weight", None), "ndim", 0) == 2:
            return child
    return None


def _out_dim(layer: nn.Module) -> int:
    """Where a layer's weight has its outputs: first, but last in transformers' ``Conv1D``."""
    return 1 if type(layer).__name__ == "Conv1D" else 0


class EndProducts:
    """Sums <W, W>, <W, G> and <G, G> over the parts of each end.

    Args:
        ends: Of a module, as :func:`layer_ends` lists them.
        shapes: Of the parameters that are measured, by name; an end with another part is left out.

    Attributes:
        ends: Those that are measured.
        sizes: Number of entries of each.
    """

    def __init__(self, ends: Sequence[End], shapes: Mapping[str, torch.Size]) -> None:
        known, names = set(shapes), list(shapes)
        self.ends = [end for end in ends if known.issuperset(name for name, _, _ in end.parts)]
        self._names = names
        self._blocks = list(dict.fromkeys(b for end in self.ends for _, b, _ in end.parts if b is not None))
        # One table of rows: first the parameters, then every block of every cut.
        first: dict[Any, int] = {name: row for row, name in enumerate(names)}
        size = len(names)
        for blocks in self._blocks:
            first[blocks] = size
            size += blocks.count
        parts = [(e, first[b or name] + index) for e, end in enumerate(self.ends) for name, b, index in end.parts]
        self._size = size
        self.sizes = [sum(_size(shapes[name], blocks) for name, blocks, _ in end.parts) for end in self.ends]
        self._end_of, self._row_of = torch.tensor(parts, dtype=torch.long).reshape(-1, 2).unbind(1)

    def of(self, products: Tensor, present: Sequence[str], whole: Mapping[str, Parameter]) -> Tensor:
        """The sums of one step.

        Args:
            products: Of each parameter that has a gradient, shape ``(parameters, 3)``.
            present: The names of these parameters.
            whole: The parameters that this process holds as a whole, by name; blocks are cut out of them.

        Returns:
            A float64 CPU tensor of shape ``(ends, 3)``; NaN for an end of which a part is missing.
        """
        table = torch.full((self._size, 3), torch.nan, dtype=torch.float64)
        row = {name: index for index, name in enumerate(self._names)}
        where = [row[name] for name in present if name in row]
        table[where] = products[[index for index, name in enumerate(present) if name in row]]
        start = len(self._names)
        for blocks in self._blocks:
            if (parameter := whole.get(blocks.parameter)) is not None:
                rows = _block_products(blocks, parameter.value, parameter.grad)
                table[start : start + blocks.count] = parameter.of_data(rows)
            start += blocks.count
        return torch.zeros(len(self.ends), 3, dtype=torch.float64).index_add(0, self._end_of, table[self._row_of])


def _size(shape: torch.Size, blocks: Blocks | None) -> int:
    return shape.numel() if blocks is None else shape.numel() // shape[blocks.dim] * blocks.size


def _block_products(blocks: Blocks, value: Tensor, grad: Tensor) -> Tensor:
    w, g = (blocks.of(t.detach()).flatten(1) for t in (value, grad))
    dtype = wide_dtype(w)
    return torch.stack([(a * b).sum(1, dtype=dtype) for a, b in ((w, w), (w, g), (g, g))], 1).to("cpu", torch.float64)
