"""A parameter that is spread over processes, as a matrix that is known by its products: nobody gathers it.

Each process multiplies what it holds into its part of a vector of zeros, and one all-reduce over each group of the
parameter adds up the parts. What travels is as long as one side of the matrix, instead of the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from lightning_lowrank.sharding import Block, Shard


class ShardedMatrix:
    """The matrix ``(shape[0], -1)`` of a parameter; made by :func:`sharded_matrix`.

    Every method is a collective over the shard's groups, in their order: each of their processes has to call it, with
    the same vector, and gets the same bits. A process that holds nothing takes part. Without groups nothing is
    communicated.

    Attributes:
        shape: Rows and columns of the whole matrix.
        dtype: Of vectors: the parameter's, or float32 for narrower ones, complex for complex ones.
        device: Of vectors: where the parameter is.
    """

    def __init__(self, shard: Shard, local: Tensor, blocks: Sequence[Block]) -> None:
        self.shape: tuple[int, int] = (shard.shape[0], math.prod(shard.shape[1:]))
        self.dtype = torch.promote_types(local.dtype, torch.float32)
        self.device = local.device
        self._blocks = [block._replace(entries=block.entries.to(self.dtype)) for block in blocks]
        self._groups = shard.groups
        # Parameters that are kept on the CPU may be cut by groups that communicate on GPUs.
        self._meeting_place = shard.device if shard.groups else local.device

    def mv(self, vector: Tensor) -> Tensor:
        """W v, shape ``(rows,)``."""
        product = vector.new_zeros(self.shape[0])
        for row, column, entries in self._blocks:
            rows, columns = entries.shape
            product[row : row + rows].addmv_(entries, vector[column : column + columns])
        return self._added_up(product)

    def rmv(self, vector: Tensor) -> Tensor:
        """W^H u, shape ``(columns,)``."""
        product = vector.new_zeros(self.shape[1])
        for row, column, entries in self._blocks:
            rows, columns = entries.shape
            product[column : column + columns].addmv_(entries.mH, vector[row : row + rows])
        return self._added_up(product)

    def agree(self, flag: bool) -> bool:
        """Whether every process of the groups says True; without groups, ``flag``."""
        if not self._groups:
            return flag
        answer = torch.tensor(int(flag), dtype=torch.int32, device=self._meeting_place)
        for group in self._groups:
            distributed.all_reduce(answer, distributed.ReduceOp.MIN, group=group)
        return bool(answer.item())

    def _added_up(self, part: Tensor) -> Tensor:
        total = part.to(self._meeting_place)
        for group in self._groups:
            distributed.all_reduce(total, group=group)
        return total.to(self.device)


def sharded_matrix(shard: Shard, local: Tensor) -> ShardedMatrix | None:
    """A parameter as a matrix, from what each process holds of it.

    Communicates nothing. The result shares memory with ``local`` where its numbers have four or more bytes and its
    memory order allows, so it is of use until the parameter changes.

    Its columns may be in another order than the parameter's, the same on every process, which changes no singular
    value and no left singular vector: see :meth:`Shard.blocks`.

    Args:
        shard: Of a parameter of two or more dimensions, spread over processes or not.
        local: What ``shard.local`` returned: the parameter, its gradient, or an optimizer's state like it.

    Returns:
        None, on every process alike, where the pieces are not rectangles of the matrix; ``shard.whole(local)`` gathers
        it then. Those are: FSDP1's pieces of a weight whose first dimension is not the outermost in memory, such as a
        transposed one; DTensors that are cut along two dimensions besides the first, that are still to be summed, or
        whose dimension is cut by several mesh dimensions in an order that is neither the mesh's nor fully_shard's.

    Raises:
        ValueError: If the parameter has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from lightning_lowrank.sharding import shards
        >>> layer = torch.nn.Linear(3, 2).requires_grad_(False)
        >>> [shard] = shards(layer)[id(layer.weight)]
        >>> matrix = sharded_matrix(shard, shard.local(layer.weight.fill_(1)))
        >>> matrix.shape, matrix.mv(torch.ones(3)), matrix.rmv(torch.ones(2))
        ((2, 3), tensor([3., 3.]), tensor([2., 2., 2.]))
    """
    if len(shard.shape) < 2:
        raise ValueError(
            f"{shard.name!r} has the shape {tuple(shard.shape)}, which is not a matrix; pass a parameter of two or more"
            " dimensions"
        )
    blocks = shard.blocks(local)
    return None if blocks is None else ShardedMatrix(shard, local, blocks)
