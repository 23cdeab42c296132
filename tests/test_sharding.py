"""Sums and tensors of sharded parameters, on 1, 2 and 4 real processes, against the unsharded network in float64."""

from __future__ import annotations

import json
import multiprocessing
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lowrank.sharded_matrix import sharded_matrix
from lightning_lowrank.sharding import Shard, reduce_sums, refusal, shards
from tests import sharded_worker
from tests.sharded_worker import LEARNING_RATE, Case, as_list, cases, inputs, layouts, loss_of, vectors

WORLDS = (1, 2, 4)
CASES = [(world, name) for world in WORLDS for name in cases(world)]
LAYOUTS = [(world, name) for world in WORLDS for name in layouts(world)]

# bfloat16 has 8 bits, and the gradient went through three layers and a mean over processes in it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
SECONDS = 120  # after which a world is taken to hang


def run_world(world, folder):
    """The reports of all processes, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_lowrank.sharding"])  # import once, for all processes
    processes = [context.Process(target=sharded_worker.main, args=(rank, world, folder)) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
            process.close()
    assert codes == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """By world size; each is started once, when first asked for, and goes through all of its cases."""
    found = {}

    def of(world, name):
        if world not in found:
            found[world] = run_world(world, tmp_path_factory.mktemp(f"world{world}"))
        ours = [report[name] for report in found[world]]
        for report in ours:
            assert report is None or "error" not in report, report["error"]
        return ours

    return of


def unsharded(case: Case):
    """Initial weights, gradients and weights after the step, by name."""
    net = case.make().to(case.dtype)
    initial = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net.double()
    loss_of(net, inputs(case.dtype).double()).backward()
    gradient = {name: parameter.grad for name, parameter in net.named_parameters()}
    rate = LEARNING_RATE if case.relayout is None else 0.0
    return initial, gradient, {name: value.double() - rate * gradient[name] for name, value in initial.items()}


def as_tensors(report):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in report.items()}


@pytest.mark.parametrize(("world", "name"), CASES)
def test_reduced_sums_are_those_of_the_unsharded_network(world, name, reports):
    case = cases(world)[name]
    _, gradient, stepped = unsharded(case)
    expected = {}
    for key, w in stepped.items():
        g = gradient[key]
        expected[key] = torch.stack([(w * w).sum(), (w * g).sum(), (g * g).sum(), (g * g).sum()])
    for report in reports(world, name):
        sums = as_tensors(report["sums"])
        assert sums.keys() == expected.keys()
        for key, (ww, _, gg, vv) in expected.items():
            scale = torch.stack([ww, (ww * gg).sqrt(), gg, vv])
            error = (sums[key] - expected[key]).abs() / scale
            assert error.max() <= TOLERANCE[case.dtype], (key, sums[key], expected[key])


@pytest.mark.parametrize(("world", "name"), CASES)
def test_whole_tensors_are_those_of_the_unsharded_network(world, name, reports):
    case = cases(world)[name]
    initial, gradient, stepped = unsharded(case)
    for report in reports(world, name):
        assert list(report["initial"]) == list(initial)
        assert report["initial"] == {key: value.tolist() for key, value in initial.items()}
        assert report["shapes"] == {key: list(value.shape) for key, value in initial.items()}
        for kind, expected in (("gradient", gradient), ("stepped", stepped)):
            for key, found in as_tensors(report[kind]).items():
                assert (found - expected[key]).norm() <= TOLERANCE[case.dtype] * expected[key].norm(), (kind, key)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_every_process_holds_its_part_and_sees_the_same_numbers(world, name, reports):
    case, ranks = cases(world)[name], reports(world, name)
    whole = {key: torch.Size(shape).numel() for key, shape in ranks[0]["shapes"].items()}
    copies = [sum(report["sizes"][key] for report in ranks) / size for key, size in whole.items()]
    assert all(count == int(count) and 1 <= count <= world for count in copies)
    if case.reductions == 0:
        assert copies == [world] * len(copies)
    for report in ranks:
        assert report["sums"] == ranks[0]["sums"]
        assert report["reductions"] == case.reductions
        assert report["refusal"] is None


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1-original", "fsdp1-flat"])
def test_some_processes_hold_nothing_of_a_parameter(name, reports):
    assert any(size == 0 for report in reports(4, name) for size in report["sizes"].values())


def check_products(ranks, matrix):
    """Every process' products with a matrix are the same bits, and right, by one collective for each group."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    left, right = (vector.to(wide) for vector in vectors(matrix.shape, dtype))
    expected = {"mv": matrix.to(wide) @ right, "rmv": matrix.to(wide).mH @ left}
    for rank, report in enumerate(ranks):
        groups = report["groups"]
        assert report["dtype"] == str(dtype)
        for key, product in expected.items():
            assert report[key] == ranks[0][key]
            error = torch.tensor(report[key], dtype=torch.float64) - torch.tensor(as_list(product))
            assert error.norm() <= 1e-6 * torch.linalg.vector_norm(product)
        for sent in report["collectives"].values():
            assert sent == ({"c10d.allreduce_": groups} if groups else {})
        assert report["all agree"] is True
        assert report["one agrees"] is (rank == 0 and groups == 0)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_products_of_sharded_matrices_are_those_of_the_whole(world, name, reports):
    case, ranks = cases(world)[name], reports(world, name)
    initial, _, _ = unsharded(case)
    assert max(report["groups"] for report in ranks[0]["products"].values() if report) == case.reductions
    for key, found in ranks[0]["products"].items():
        weight = initial[key]
        if name.startswith("fsdp1-transposed") and key == "0.weight":
            assert all(report["products"][key] is None for report in ranks)
            continue
        if name.startswith("fsdp1-convolution"):  # rows as they lie in memory
            weight = weight.as_strided(weight.shape, torch.empty(weight.shape).stride())
        assert found is not None
        check_products([report["products"][key] for report in ranks], weight.flatten(1))


@pytest.mark.parametrize(("world", "name"), LAYOUTS)
def test_largest_singular_values_of_sharded_matrices(world, name, reports):
    layout, ranks = layouts(world)[name], reports(world, f"layout-{name}")
    if not layout.rectangles:
        assert ranks == [None] * world
        return
    matrix = layout.tensor().movedim(layout.first if world > 1 else 1, 1).flatten(1)
    check_products(ranks, matrix)
    sigma = np.linalg.svd(matrix.to(torch.complex128).numpy(), compute_uv=False)
    for report in ranks:
        assert report["top"] == ranks[0]["top"]
        assert report["top"] == pytest.approx(sigma[0], rel=1e-6)


def test_a_matrix_of_one_process_is_the_tensor_itself():
    weight = torch.ones(2, 3)
    matrix = sharded_matrix(Shard.of_whole("weight", weight), weight)
    weight[1, 2] = 5
    assert matrix.shape == (2, 3)
    assert matrix.device == weight.device
    assert matrix.mv(torch.ones(3)).tolist() == [3, 7]
    assert matrix.rmv(torch.ones(2)).tolist() == [2, 2, 6]


def test_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match=r"'bias' has the shape \(3,\), which is not a matrix"):
        sharded_matrix(Shard.of_whole("bias", torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_gathered_parameters_are_not_taken_for_pieces(world, reports):
    for report in reports(world, "gathered"):
        assert (
            "pass the parameter, its gradient or its optimizer state while the module is sharded" in report["message"]
        )


@pytest.mark.parametrize("world", WORLDS[1:])
def test_sharded_modules_that_cannot_be_measured_are_refused(world, reports):
    for report in reports(world, "refusals"):
        assert "around tensor-parallel parameters" in report["flattened"]
        assert "permutes the gradients of weights that are not contiguous" in report["permuted"]
        assert "make the optimizer after sharding the module" in report["stale"]


def deepspeed_stage3(net):
    net.weight.ds_id = 0


def deepspeed_stage2(net):
    net.weight._hp_mapping = None


def foreign_wrapper(net):
    net.inner = type("XlaFullyShardedDataParallel", (nn.Module,), {})()


def integers(net):
    net.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)


class Scaled(torch.Tensor):
    """As quantised tensors of other libraries: what it holds is not what it stands for."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(func(args[0].codes))


def scaled(net):
    net.weight = nn.Parameter(Scaled(torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (deepspeed_stage3, "DeepSpeed ZeRO keeps gradients"),
        (deepspeed_stage2, "DeepSpeed ZeRO keeps gradients"),
        (foreign_wrapper, r"sharded by tests\..*XlaFullyShardedDataParallel"),
        (integers, "stored as torch.int8"),
        (scaled, "parameters are Scaleds"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(change, reason):
    net = nn.Linear(3, 2)
    assert refusal(net, net.parameters()) is None
    change(net)
    assert re.search(reason, refusal(net, net.parameters()))


def test_a_private_layout_that_moved_is_refused():
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.training_state, wrapper._fsdp_wrapped_module = None, nn.Linear(3, 2)
    assert "this version of torch keeps FSDP's layout elsewhere" in refusal(wrapper, [])


def test_lazy_parameters_are_left_out_until_they_have_a_shape():
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    assert [shard.name for [shard] in shards(net).values()] == ["1.weight", "1.bias"]
    net(torch.zeros(1, 3))
    assert [shard.name for [shard] in shards(net).values()] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_tensor_of_another_size_is_refused():
    shard = Shard.of_whole("weight", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"local shape \(5,\) where 'weight' keeps 6 numbers"):
        shard.local(torch.zeros(5))


def test_sums_need_one_row_for_each_shard():
    with pytest.raises(ValueError, match=r"sums of shape \(1, 3\) for 2 shards"):
        reduce_sums(torch.zeros(1, 3), [Shard.of_whole(name, torch.zeros(2)) for name in "ab"])


def test_a_parameter_without_gradient_has_none():
    weight = nn.Parameter(torch.zeros(2))
    assert Shard.of_whole("weight", weight).gradient(weight) is None
