"""How a parameter is spread over processes: sums are taken over local pieces and reduced once.

Inner products, squared norms and counts add up over the pieces of a parameter, so nobody else needs to know whether
FSDP, tensor parallelism or nothing at all has cut it. Replicated pieces are kept out of the sums by reducing over the
mesh dimensions that shard the parameter and over no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Placement
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_lowrank.naming import strip_wrappers

# Wrappers of other libraries that cut parameters in ways of their own; fairscale's has the name of torch's.
_FOREIGN_WRAPPERS = {"XlaFullyShardedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


class Block(NamedTuple):
    """A rectangle of a matrix: where its first entry is, and its entries, shape ``(rows, columns)``."""

    row: int
    column: int
    entries: Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """Where the numbers of one parameter are. This class: all of them are here, as without sharding or under DDP.

    Attributes:
        name: The parameter's name in the module, without the prefixes that wrappers add.
        shape: Of the whole parameter.
        size: How many of its numbers this process holds; may be 0.
        groups: Sums over local pieces become the parameter's by reducing them over each of these in turn. Empty if this
            process holds everything. The same number of groups on every process.
        device: Where the groups communicate; None without groups.
    """

    name: str
    shape: torch.Size
    size: int
    groups: tuple[ProcessGroup, ...] = ()
    device: torch.device | None = None

    @classmethod
    def of_whole(cls, name: str, parameter: Tensor) -> Shard:
        """A parameter that this process holds all of."""
        return Shard(name, parameter.shape, parameter.numel())

    def local(self, tensor: Tensor) -> Tensor:
        """This process's numbers of the parameter, of its gradient, or of an optimizer's state of the same shape.

        Every such tensor is cut alike, so that the results belong together element by element. Where a DTensor is laid
        out differently from its parameter, such as a gradient that is still to be summed, it is brought into the
        parameter's layout: a collective, which every process enters, because layouts agree between processes.

        Args:
            tensor: As the optimizer has it, outside forward and backward passes.

        Returns:
            A detached, plain tensor of ``size`` numbers, of any shape; no copy unless the layout had to change.

        Raises:
            ValueError: If the tensor is not cut as the parameter was, as while FSDP has its parameters gathered.
        """
        return self._checked(tensor.detach(), self.size)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """This process's numbers of the parameter's gradient; None if it has none, on every process alike.

        FSDP1 with ``use_orig_params=True`` shows a gradient only to the processes that hold a piece of it. There the
        result is never None for a parameter that requires a gradient: zeros stand for what is missing, so that all
        processes count the same parameters. FSDP itself gives zeros to unused parameters, so whether there was a
        gradient shows in the reduced <G, G> alone: if it is 0, there was none.
        """
        return None if parameter.grad is None else self.local(parameter.grad)

    def whole(self, local: Tensor) -> Tensor:
        """The whole tensor of ``shape`` on every process, from what :meth:`local` returned on each.

        A collective: every process of the groups has to call it. Without groups, the same memory as ``local``.
        """
        return local.reshape(self.shape)

    def blocks(self, local: Tensor) -> list[Block] | None:
        """What this process holds of the matrix ``(shape[0], -1)``, as rectangles of it; communicates nothing.

        The blocks of all processes of the groups together are the matrix, each entry once. Its columns may be in
        another order than that of the indices, the same on every process, which changes no singular value:
        channels-last weights that FSDP1 has flattened keep their order in memory, and the dimension that is cut, if it
        is not the first of all, becomes the first of those within the rows.

        Args:
            local: What :meth:`local` returned, of a parameter of two or more dimensions.

        Returns:
            Views of ``local`` where its memory order allows; an empty list if this process holds nothing. None, on
            every process alike, if the pieces are not rectangles of the matrix.
        """
        return [Block(0, 0, local.reshape(self.shape).flatten(1))]

    def _checked(self, tensor: Tensor, size: int) -> Tensor:
        if tensor.numel() != size:
            raise ValueError(
                f"got a tensor of local shape {tuple(tensor.shape)} where {self.name!r} keeps {size} numbers on this"
                " process; pass the parameter, its gradient or its optimizer state while the module is sharded"
            )
        return tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class _DTensorShard(Shard):
    """FSDP2 and tensor parallelism: torch knows the layout and has the collectives."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    stride: tuple[int, ...]
    local_shape: torch.Size

    def local(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            if tensor.placements != self.placements:
                tensor = tensor.redistribute(self.mesh, self.placements)
            tensor = tensor.to_local().detach()
        return self._checked(tensor, self.size)

    def whole(self, local: Tensor) -> Tensor:
        piece = local.detach().reshape(self.local_shape)
        spread = DTensor.from_local(
            piece, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        return spread.full_tensor().to(local.device)

    def blocks(self, local: Tensor) -> list[Block] | None:
        cuts = self._cuts()
        inner = {dim for dim, _ in cuts or () if dim > 0}
        if cuts is None or len(inner) > 1:
            return None
        if self.size == 0:
            return []
        start, length = [0] * len(self.shape), list(self.shape)
        for dim, mesh_dim in cuts:  # as torch.chunk does: all pieces but the last are of one length
            chunk = -(-length[dim] // self.mesh.size(mesh_dim))
            begin = chunk * self.mesh.get_local_rank(mesh_dim)
            start[dim], length[dim] = start[dim] + begin, min(chunk, length[dim] - begin)
        first = inner.pop() if inner else 1
        entries = local.reshape(self.local_shape).movedim(first, 1).flatten(1)
        return [Block(start[0], start[first] * (entries.shape[1] // self.local_shape[first]), entries)]

    def _cuts(self) -> list[tuple[int, int]] | None:
        """Dimensions of the tensor, each with the mesh dimension that cuts it, in the order of cutting.

        A mesh dimension cuts before those to its right. One with a ``split_factor`` cuts after those that the factor
        counts, which are all to its right if fully_shard around tensor parallelism has made it. None otherwise.
        """
        cuts: list[tuple[int, int]] = []
        for mesh_dim, placed in reversed(list(enumerate(self.placements))):
            factor = getattr(placed, "split_factor", None)
            dim: int | None = getattr(placed, "dim", None)
            if placed.is_replicate() or self.mesh.size(mesh_dim) == 1:
                continue
            if dim is not None and factor == math.prod(self.mesh.size(right) for cut, right in cuts if cut == dim):
                cuts.append((dim, mesh_dim))
            elif dim is not None and factor is None and placed.is_shard():
                cuts.insert(0, (dim, mesh_dim))
            else:
                return None
        return cuts


@dataclass(frozen=True, eq=False, kw_only=True)
class _FlatShard(Shard):
    """FSDP1: a run of consecutive numbers of the flattened parameter, itself stored within a longer flat tensor."""

    start: int  # in the flattened parameter
    stored_size: int  # of the flat tensor that optimizers see
    offset: int  # in that flat tensor
    stride: tuple[int, ...]  # of the whole parameter: channels-last weights are flattened as they lie in memory
    original: bool  # whether optimizers see one tensor for each original parameter

    def local(self, tensor: Tensor) -> Tensor:
        stored = self._checked(tensor.detach(), self.stored_size).reshape(-1)
        return stored[self.offset : self.offset + self.size]

    def gradient(self, parameter: Tensor) -> Tensor | None:
        if parameter.grad is None and self.original and self.groups and parameter.requires_grad:
            return parameter.detach().new_zeros(self.size)
        return super().gradient(parameter)

    def whole(self, local: Tensor) -> Tensor:
        flat = local.new_zeros(self.shape.numel(), device=self.device if self.groups else local.device)
        flat[self.start : self.start + self.size] = local.reshape(-1)
        for group in self.groups:
            distributed.all_reduce(flat, group=group)  # exact: all other summands are 0
        return flat.as_strided(self.shape, self.stride).to(local.device)

    def blocks(self, local: Tensor) -> list[Block] | None:
        columns, stop = math.prod(self.shape[1:]), self.start + self.size
        if self.shape[0] > 1 and self.stride[0] != columns:
            return None  # a row's numbers are not next to each other
        if self.size == 0:
            return []
        # The end of a row, whole rows, the start of a row; each may be missing.
        body = min(-(-self.start // columns) * columns, stop)
        tail = max(stop // columns * columns, body)
        found = []
        for begin, end in ((self.start, body), (body, tail), (tail, stop)):
            if begin < end:
                entries = local.reshape(-1)[begin - self.start : end - self.start]
                found.append(Block(*divmod(begin, columns), entries.view(-1, min(columns, end - begin))))
        return found


def shards(module: nn.Module) -> dict[int, list[Shard]]:
    """How every parameter of the module is spread over processes.

    Keys and their order are the same on every process up to the ids. A tied parameter is one parameter. Parameters that
    have no shape before the first forward pass are left out.

    Args:
        module: Outside its forward and backward pass.

    Returns:
        Shards by ``id`` of the parameter, for all that ``module.named_parameters()`` yields. Each has one, but for
        FSDP's flat parameters (``use_orig_params=False``), which have one for each original parameter in them.

    Raises:
        RuntimeError: If a parameter is spread in a way that local sums can't be taken of.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(3, 2)
        >>> [shard] = shards(layer)[id(layer.weight)]
        >>> shard.name, shard.shape, shard.groups
        ('weight', torch.Size([2, 3]), ())
    """
    flattened: dict[int, list[Shard]] = {}
    for prefix, owner in module.named_modules():
        if isinstance(owner, FullyShardedDataParallel):
            flattened.update(_flat_shards(prefix, owner))
    found = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            continue
        clean = strip_wrappers(name)
        if id(parameter) in flattened:
            found[id(parameter)] = flattened[id(parameter)]
        elif isinstance(parameter, DTensor):
            found[id(parameter)] = [_dtensor_shard(clean, parameter)]
        else:
            found[id(parameter)] = [Shard.of_whole(clean, parameter)]
    return found


def reduce_sums(sums: Tensor, shards: Sequence[Shard]) -> Tensor:
    """Sums over whole parameters from sums over local pieces.

    Enters one all-reduce for each distinct group among the shards, however many shards there are. Every process has to
    call it with the same shards in the same order.

    Args:
        sums: Floating, shape ``(len(shards), k)``; row i are sums over what this process holds of shard i, 0 where it
            holds nothing.
        shards: Of any parameters.

    Returns:
        A new tensor like ``sums``, equal on all processes of a shard's groups. Rows without groups are copied.

    Raises:
        ValueError: If there is not one row for each shard.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(3, 2)
        >>> reduce_sums(torch.tensor([[1.0], [2.0]]), [s for found in shards(layer).values() for s in found])
        tensor([[1.],
                [2.]])
    """
    if sums.ndim != 2 or len(sums) != len(shards):
        raise ValueError(
            f"got sums of shape {tuple(sums.shape)} for {len(shards)} shards; pass a tensor of shape ({len(shards)}, k)"
        )
    return _reduce(sums, shards, distributed.ReduceOp.SUM)


def _reduce(values: Tensor, shards: Sequence[Shard], operation: distributed.ReduceOp.RedOpType) -> Tensor:
    total = values.detach().clone()
    members: dict[ProcessGroup, list[int]] = {}
    for row, shard in enumerate(shards):
        for group in shard.groups:
            members.setdefault(group, []).append(row)
    # Sums over different groups commute, so their order only has to be the same everywhere: that of first appearance.
    for group, rows in members.items():
        index = torch.tensor(rows, device=total.device)
        part = total[index].to(shards[rows[0]].device)
        distributed.all_reduce(part, operation, group=group)
        total[index] = part.to(total.device)
    return total


def reduce_max(values: Tensor, shards: Sequence[Shard]) -> Tensor:
    """Maxima over whole parameters from those over local pieces; like :func:`reduce_sums`.

    Args:
        values: Floating, shape ``(len(shards),)``.
        shards: Of any parameters.
    """
    return _reduce(values, shards, distributed.ReduceOp.MAX)


def refusal(module: nn.Module, optimizer_parameters: Iterable[Tensor]) -> str | None:
    """Why an optimizer's parameters can't be measured from what the processes hold; None if they can.

    Communicates nothing and answers the same on every process.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(3, 2)
        >>> refusal(layer, layer.parameters()) is None
        True
    """
    for owner in module.modules():
        foreign = _FOREIGN_WRAPPERS.intersection(cls.__name__ for cls in type(owner).__mro__)
        if foreign and not isinstance(owner, FullyShardedDataParallel):
            cls = type(owner)
            return f"parameters are sharded by {cls.__module__}.{cls.__qualname__}, whose layout is not known"
    optimized = list(optimizer_parameters)
    for parameter in chain(module.parameters(), optimized):
        # Stage 3 cuts the parameters and gives each an id; stages 1 and 2 step on flat copies of pieces, to which they
        # link each parameter, and leave it without a gradient.
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return "DeepSpeed ZeRO keeps gradients and the optimizer's weights in partitions of its own"
    try:
        known = shards(module)
    except RuntimeError as error:
        return str(error)
    spread = any(shard.groups for found in known.values() for shard in found)
    for parameter in optimized:
        if spread and id(parameter) not in known:
            return (
                f"the module is sharded, but the optimizer holds a tensor of shape {tuple(parameter.shape)} that is"
                " none of its parameters; make the optimizer after sharding the module"
            )
        if reason := _not_numbers(parameter):
            return reason
    return None


def _not_numbers(parameter: Tensor) -> str | None:
    """Whether the tensor's storage is a code for its values, which sums would misread."""
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if is_traceable_wrapper_subclass(tensor):
        return f"parameters are {type(tensor).__name__}s, which stand for other numbers than those they hold"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"parameters are stored as {tensor.dtype}, as quantised ones are"
    return None


def _dtensor_shard(name: str, parameter: DTensor) -> Shard:
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"parameter {name!r} is on a device mesh that this process is no part of")
    with torch.no_grad():
        local = parameter.to_local()
    sharded = [dim for dim, placed in enumerate(placements) if not placed.is_replicate() and mesh.size(dim) > 1]
    return _DTensorShard(
        name=name,
        shape=parameter.shape,
        size=local.numel(),
        groups=tuple(mesh.get_group(dim) for dim in sharded),
        device=torch.device(mesh.device_type),
        mesh=mesh,
        placements=placements,
        stride=parameter.stride(),
        local_shape=local.shape,
    )


def _flat_shards(prefix: str, owner: FullyShardedDataParallel) -> dict[int, list[Shard]]:
    """The parameters that one FSDP1 wrapper has flattened, by ``id`` of what it hands to optimizers.

    The layout is private to torch; everything that is read of it is read below.
    """
    try:
        # None: a wrapper around nothing but other wrappers.
        return {} if owner._handle is None else _flat_layout(prefix, owner._handle)
    except AttributeError as error:
        raise RuntimeError(f"this version of torch keeps FSDP's layout elsewhere ({error}); use fully_shard") from error


def _flat_layout(prefix: str, handle: Any) -> dict[int, list[Shard]]:
    flat, sharded = handle.flat_param, handle.uses_sharded_strategy
    originals = flat._params  # None under use_orig_params=False
    if any(extension is not None for extension in flat._param_extensions):
        raise RuntimeError("FSDP1 around tensor-parallel parameters can't be measured; use fully_shard")
    if originals is not None and not sharded and not all(flat._contiguities):
        # torch restores the strides of the parameter, but not those of its gradient (seen on 2.14).
        raise RuntimeError(
            "FSDP1 that shards nothing (NO_SHARD, or one process) permutes the gradients of weights that are not"
            " contiguous, such as channels-last ones; use DDP, or contiguous weights"
        )
    pieces: list[Shard] = []
    for name, shape, stride, info in zip(flat._fqns, flat._shapes, flat._strides, flat._shard_param_infos, strict=True):
        size = info.numel_in_shard if info.in_shard else 0
        pieces.append(
            _FlatShard(
                name=strip_wrappers(f"{prefix}.{name}" if prefix else name),
                shape=shape,
                size=size,
                groups=(handle.process_group,) if sharded else (),
                device=handle.device,
                start=info.intra_param_start_idx if info.in_shard else 0,
                stored_size=flat._sharded_size.numel() if originals is None else size,
                offset=info.offset_in_shard if info.in_shard and originals is None else 0,
                stride=stride,
                original=originals is not None,
            )
        )
    if originals is None:
        return {id(flat): pieces}
    return {id(parameter): [piece] for parameter, piece in zip(originals, pieces, strict=True)}
