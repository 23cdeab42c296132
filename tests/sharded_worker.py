"""One of several gloo processes: shards small networks in every way, steps them, and writes what it measures as JSON.

Rank r writes ``folder/r.json``: for each case the sums, reduced, and the tensors, made whole, of every parameter.
"""

from __future__ import annotations

import functools
import itertools
import json
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_lowrank.sharded_matrix import sharded_matrix
from lightning_lowrank.sharding import Shard, reduce_sums, refusal, shards

BATCH, LEARNING_RATE = 8, 0.1
ITERATIONS = 8  # of the power method, on matrices whose second singular value is a tenth of the first

# What FSDP says about itself; none of it is ours to mend.
FOREIGN_WARNINGS = ("FSDP is switching to use `NO_SHARD`", "The `NO_SHARD` sharding strategy is deprecated", "FSDP1")


def mlp(hidden: int = 12) -> nn.Module:
    """Ten and three rows are not divisible by four processes, and three leave one of them without any."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 10), nn.Tanh(), nn.Linear(10, 3))


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(7, 7, bias=False), nn.Linear(7, 7)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(inputs)))


def convolution() -> nn.Module:
    """A kernel that lies in memory in another order than its indices."""
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 4, 3), nn.Unflatten(2, (1, 5)), nn.Conv2d(4, 3, (1, 5))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Tanh()).to(memory_format=torch.channels_last)


def contiguous_convolution() -> nn.Module:
    """As fully_shard demands."""
    return convolution().to(memory_format=torch.contiguous_format)


def transposed() -> nn.Module:
    """Matrices that lie in memory column by column, one of them as a single row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1))
    for layer in net:
        layer.weight = nn.Parameter(layer.weight.detach().t().clone(memory_format=torch.contiguous_format).t())
    return net


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    outputs = net(batch)
    return (outputs - batch[:, : outputs.shape[1]]).square().mean()


@dataclass(frozen=True)
class Case:
    """A network and how it is sharded."""

    shard: Callable[[nn.Module], nn.Module]
    make: Callable[[], nn.Module] = mlp
    data_parallel: int = 1  # into how many parts the batch is split
    dtype: torch.dtype = torch.float64
    reductions: int = 1  # all-reduces in one call of reduce_sums
    relayout: Callable[[DTensor], DTensor] | None = None  # of gradients, after the backward pass


@functools.cache
def mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def fsdp1(
    net: nn.Module,
    original: bool,
    strategy: str = "FULL_SHARD",
    nested: bool = False,
    sizes: tuple[int, ...] = (),
) -> nn.Module:
    return FullyShardedDataParallel(
        net,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}) if nested else None,
        device_mesh=mesh(*sizes) if sizes else None,
    )


def fsdp2(net: nn.Module, sizes: tuple[int, ...], nested: bool = False) -> nn.Module:
    for layer in net.children() if nested else ():
        fully_shard(layer, mesh=mesh(*sizes))
    return fully_shard(net, mesh=mesh(*sizes))


def tensor_parallel(net: nn.Module, sizes: tuple[int, ...], dim: str = "outer") -> nn.Module:
    return parallelize_module(net, mesh(*sizes)[dim], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel_fsdp2(net: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    return fully_shard(tensor_parallel(net, sizes, "inner"), mesh=mesh(*sizes)["outer"])


def replicated(grad: DTensor) -> DTensor:
    return DTensor.from_local(grad.full_tensor(), grad.device_mesh, [Replicate()], run_check=False)


def unsummed(grad: DTensor) -> DTensor:
    part = grad.full_tensor() / grad.device_mesh.size()
    return DTensor.from_local(part, grad.device_mesh, [Partial()], run_check=False)


def cases(world: int) -> dict[str, Case]:
    """By name; every process goes through them in this order."""
    groups = int(world > 1)  # a mesh of one process shards nothing
    split = partial(Case, data_parallel=world, reductions=groups)
    found = {
        "plain": Case(lambda net: net, reductions=0),
        "fsdp2": split(partial(fsdp2, sizes=(world,))),
        "fsdp2-tied": split(partial(fsdp2, sizes=(world,)), Tied),
        "fsdp2-convolution": split(partial(fsdp2, sizes=(world,)), contiguous_convolution),
        "tp": Case(partial(tensor_parallel, sizes=(world,)), reductions=groups),
    }
    for original in (True, False):
        full, suffix = partial(fsdp1, original=original), "original" if original else "flat"
        found[f"fsdp1-{suffix}"] = split(full)
        found[f"fsdp1-tied-{suffix}"] = split(full, Tied)
        if world > 1 or not original:
            found[f"fsdp1-convolution-{suffix}"] = split(full, convolution)
            found[f"fsdp1-transposed-{suffix}"] = split(full, transposed)
        found[f"fsdp1-nested-{suffix}"] = split(partial(full, nested=True))
        if world == 2:
            found[f"fsdp1-float32-{suffix}"] = split(full, dtype=torch.float32)
            found[f"fsdp1-bfloat16-{suffix}"] = split(full, dtype=torch.bfloat16)
            found[f"fsdp1-grad-op-{suffix}"] = split(partial(full, strategy="SHARD_GRAD_OP"))
            found[f"fsdp1-no-shard-{suffix}"] = split(partial(full, strategy="NO_SHARD"), reductions=0)
    if world == 2:
        found |= _cases_of_two()
    for outer, inner in itertools.product((1, 2, 4), repeat=2):
        if outer * inner == world:
            found |= _cases_2d(outer, inner)
    return found


def _cases_of_two() -> dict[str, Case]:
    """What does not depend on the number of processes."""
    split, whole = partial(Case, data_parallel=2), partial(fsdp2, sizes=(2,))
    tp = partial(tensor_parallel, sizes=(2,))
    return {
        "ddp": split(nn.parallel.DistributedDataParallel, reductions=0),
        "fsdp2-nested": split(partial(whole, nested=True)),
        "fsdp2-float32": split(whole, dtype=torch.float32),
        "fsdp2-bfloat16": split(whole, dtype=torch.bfloat16),
        "fsdp2-replicated-gradient": split(whole, relayout=replicated),
        "fsdp2-unsummed-gradient": split(whole, relayout=unsummed),
        "tp-replicated-gradient": Case(tp, relayout=replicated),
        "tp-unsummed-gradient": Case(tp, relayout=unsummed),
    }


def _cases_2d(outer: int, inner: int) -> dict[str, Case]:
    sizes, name = (outer, inner), f"{outer}x{inner}"
    hybrid = partial(Case, data_parallel=outer * inner, reductions=int(inner > 1))
    combined = partial(
        Case,
        partial(tensor_parallel_fsdp2, sizes=sizes),
        data_parallel=outer,
        reductions=int(outer > 1) + int(inner > 1),
    )
    found = {
        f"fsdp2-hybrid-{name}": hybrid(partial(fsdp2, sizes=sizes)),
        f"fsdp2-tp-{name}": combined(),
        # Seven rows on each tensor-parallel process, which FSDP can't halve.
        f"fsdp2-tp-uneven-{name}": combined(make=partial(mlp, 7 * inner)),
    }
    if outer > 1 and inner > 1:
        for original in (True, False):
            shard = partial(fsdp1, strategy="HYBRID_SHARD", original=original, sizes=sizes)
            found[f"fsdp1-hybrid-{name}-{'original' if original else 'flat'}"] = hybrid(shard)
    return found


def run(case: Case, rank: int, world: int) -> dict[str, Any]:
    """One step of the case's network, measured before and after."""
    net = case.shard(case.make().to(case.dtype))
    module = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)
    known = shards(module)
    found = [(parameter, shard) for parameter in parameters for shard in known[id(parameter)]]
    initial = {shard.name: shard.whole(shard.local(parameter)).tolist() for parameter, shard in found}
    multiplied = {
        shard.name: products(shard, shard.local(parameter)) for parameter, shard in found if len(shard.shape) > 1
    }

    part = rank // (world // case.data_parallel)
    loss_of(net, inputs(case.dtype).chunk(case.data_parallel)[part]).backward()
    for parameter in parameters if case.relayout else ():
        if isinstance(parameter, DTensor):
            parameter.grad = case.relayout(parameter.grad)
    locals_ = [(shard, shard.gradient(parameter)) for parameter, shard in found]
    gradients = {shard.name: shard.whole(local).tolist() for shard, local in locals_}
    if case.relayout is None:
        optimizer.step()
    rows = [
        _sums(shard, parameter, optimizer, local) for (parameter, shard), (_, local) in zip(found, locals_, strict=True)
    ]
    reduced, reductions = _counted(torch.stack(rows), [shard for _, shard in found])
    return {
        "refusal": refusal(module, parameters),
        "sizes": {shard.name: shard.size for _, shard in found},
        "shapes": {shard.name: list(shard.shape) for _, shard in found},
        "reductions": reductions,
        "initial": initial,
        "products": multiplied,
        "gradient": gradients,
        "stepped": {shard.name: shard.whole(shard.local(parameter)).tolist() for parameter, shard in found},
        "sums": {shard.name: row.tolist() for (_, shard), row in zip(found, reduced, strict=True)},
    }


def _sums(shard: Shard, parameter: Tensor, optimizer: Any, gradient: Tensor) -> Tensor:
    """<W, W>, <W, G>, <G, G> and, with V the momentum buffer, <V, V>, of the local numbers."""
    momentum = optimizer.state[parameter].get("momentum_buffer")
    w, g = shard.local(parameter).double().flatten(), gradient.double().flatten()
    v = g if momentum is None else shard.local(momentum).double().flatten()
    return torch.stack([w @ w, w @ g, g @ g, v @ v])


def _counted(sums: Tensor, found: list[Shard]) -> tuple[Tensor, int]:
    calls, own = [], distributed.all_reduce
    distributed.all_reduce = lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs)
    try:
        return reduce_sums(sums, found), len(calls)
    finally:
        distributed.all_reduce = own


def vectors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One for each side of a matrix, the same in every process."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.complex128 if dtype.is_complex else torch.float64
    left, right = (torch.randn(size, generator=generator, dtype=draw).to(dtype) for size in shape)
    return left, right


def products(shard: Shard, local: Tensor, iterations: int = 0) -> dict[str, Any] | None:
    """A parameter's products with vectors, what was sent for them, and its largest singular value."""
    matrix = sharded_matrix(shard, local)
    if matrix is None:
        return None
    left, right = vectors(matrix.shape, matrix.dtype)
    report: dict[str, Any] = {"dtype": str(matrix.dtype), "groups": len(shard.groups), "collectives": {}}
    calls = {
        "mv": lambda: as_list(matrix.mv(right)),
        "rmv": lambda: as_list(matrix.rmv(left)),
        "all agree": lambda: matrix.agree(True),
        "one agrees": lambda: matrix.agree(distributed.get_rank() == 0),
    }
    for name, call in calls.items():
        with CommDebugMode() as sent:
            report[name] = call()
        report["collectives"][name] = {str(kind): count for kind, count in sent.get_comm_counts().items()}
    for _ in range(iterations):
        right = matrix.rmv(matrix.mv(right))
        right = right / torch.linalg.vector_norm(right)
    report["top"] = torch.linalg.vector_norm(matrix.mv(right)).item()
    return report


def as_list(tensor: Tensor) -> list[Any]:
    return torch.view_as_real(tensor.resolve_conj()).tolist() if tensor.is_complex() else tensor.tolist()


@dataclass(frozen=True)
class Layout:
    """A tensor on a device mesh."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    dtype: torch.dtype = torch.float64
    first: int = 1  # the dimension that comes first within the rows of the matrix, if it is cut
    rectangles: bool = True  # whether the pieces are some

    def tensor(self) -> Tensor:
        """Of top singular value 1 and others below .1: an outer product and a little noise."""
        generator = torch.Generator().manual_seed(3)
        draw = torch.complex128 if self.dtype.is_complex else torch.float64
        left, right, noise = (
            torch.randn(shape, generator=generator, dtype=draw) for shape in (self.shape[0], self.shape[1:], self.shape)
        )
        top = torch.tensordot(left / left.norm(), right / right.norm(), dims=0)
        return (top + 0.1 * noise / noise.norm()).to(self.dtype)


def layouts(world: int) -> dict[str, Layout]:
    """By name; on a mesh of one dimension for each placement."""
    line = {
        "rows": Layout((7, 5), (Cut(0),)),
        "columns": Layout((7, 5), (Cut(1),)),
        "few-rows": Layout((1, 5), (Cut(0),)),
        "few-columns": Layout((7, 1), (Cut(1),)),
        "copies": Layout((7, 5), (Replicate(),)),
        "complex": Layout((7, 5), (Cut(0),), torch.complex64),
        "complex-columns": Layout((7, 5), (Cut(1),), torch.complex128),
        "float16": Layout((7, 5), (Cut(1),), torch.float16),
        "kernel-out": Layout((5, 3, 2, 3), (Cut(0),)),
        "kernel-in": Layout((5, 3, 2, 3), (Cut(1),)),
        "kernel-height": Layout((5, 3, 2, 3), (Cut(2),), first=2),
        "kernel-width": Layout((5, 3, 2, 3), (Cut(3),), first=3),
        "unsummed": Layout((7, 5), (Partial(),), rectangles=world == 1),
    }
    plane = {
        "rows-columns": Layout((7, 5), (Cut(0), Cut(1))),
        "columns-rows": Layout((7, 5), (Cut(1), Cut(0))),
        "rows-rows": Layout((7, 5), (Cut(0), Cut(0))),
        "columns-columns": Layout((5, 7), (Cut(1), Cut(1))),
        "copies-columns": Layout((7, 5), (Replicate(), Cut(1))),
        "rows-width": Layout((5, 3, 2, 3), (Cut(0), Cut(3)), first=3),
        "in-width": Layout((5, 3, 2, 3), (Cut(1), Cut(3)), rectangles=False),
        "rows-late": Layout((8, 5), (_StridedShard(0, split_factor=2), Cut(0))),
        "columns-late": Layout((5, 8), (_StridedShard(1, split_factor=2), Cut(1))),
        "rows-strided": Layout((12, 5), (_StridedShard(0, split_factor=3), Cut(0)), rectangles=False),
        "rows-strided-columns": Layout((8, 5), (_StridedShard(0, split_factor=2), Cut(1)), rectangles=False),
    }
    return line | (plane if world == 4 else {})


def laid_out(layout: Layout, rank: int, world: int) -> dict[str, Any] | None:
    sizes = (world,) if len(layout.placements) == 1 else (2, world // 2)
    module = nn.Module()
    if any(placed.is_partial() for placed in layout.placements):
        spread = DTensor.from_local(layout.tensor() / world, mesh(*sizes), layout.placements, run_check=False)
    else:
        spread = distribute_tensor(layout.tensor(), mesh(*sizes), layout.placements)
    module.weight = nn.Parameter(spread)
    [[shard]] = shards(module).values()
    return products(shard, shard.local(module.weight), ITERATIONS)


def gathered(rank: int, world: int) -> dict[str, str]:
    """What measuring says while FSDP1 has all parameters gathered."""
    net = fsdp1(mlp(), original=True)
    known = shards(net)
    with FullyShardedDataParallel.summon_full_params(net):
        try:
            for parameter in net.parameters():
                known[id(parameter)][0].local(parameter)
        except ValueError as error:
            return {"message": str(error)}
    return {"message": "none"}


def refusals(rank: int, world: int) -> dict[str, str | None]:
    """Of modules that are really sharded, but can't be measured."""
    both = mesh(world, 1)
    flattened = FullyShardedDataParallel(
        tensor_parallel(mlp(), (world, 1), "inner"), device_id=torch.device("cpu"), device_mesh=both["outer"]
    )
    permuted = fsdp1(convolution(), original=True, strategy="NO_SHARD")
    early = mlp()
    stale = list(early.parameters())
    return {
        "flattened": refusal(flattened, flattened.parameters()),
        "permuted": refusal(permuted, permuted.parameters()),
        "stale": refusal(fsdp2(early, (world,)), stale),
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=40))
    jobs: dict[str, Callable[..., Any]] = {name: partial(run, case) for name, case in cases(world).items()}
    jobs |= {f"layout-{name}": partial(laid_out, layout) for name, layout in layouts(world).items()}
    jobs |= {"gathered": gathered, "refusals": refusals} if world > 1 else {}
    report = {}
    for name, job in jobs.items():
        try:
            report[name] = job(rank=rank, world=world)
        except Exception:
            report[name] = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()
