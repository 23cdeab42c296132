"""Algebraic laws of merging, over random architectures; of modules, and of the same networks in files."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lowrank import MergePolicy, merge_checkpoints, merge_modules
from tests.merging.architectures import architectures, build, is_averaged, reference

laws = settings(max_examples=60, deadline=None)
coefficients_of = st.lists(st.floats(-2, 2), min_size=3, max_size=3)
seeds = st.integers(0, 10_000)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gains, statistics or frozen parameters are summed because the policy says so"),
    pytest.mark.filterwarnings("ignore:.*equal in all networks, so the sum multiplies them"),
]
# Kinds whose default is not a sum, for laws that hold for sums.
SUMS = MergePolicy(kinds={"normalisation": "sum", "gain": "sum"})


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_close(found, expected, dtype=torch.float32):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-12}
        torch.testing.assert_close(
            found[name].double(), tensor.double(), **tolerance, msg=partial("{}: {}".format, name)
        )


def assert_equal(one, other):
    assert all(torch.equal(one[name], other[name]) for name in other)


@given(
    architectures,
    seeds,
    coefficients_of,
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@laws
def test_every_tensor_is_the_float64_reference(names, seed, coefficients, with_base, dtype):
    *nets, base = (build(names, seed + k, dtype=dtype) for k in range(4))
    before = [state(net) for net in (*nets, base)]
    merged = merge_modules(*nets, base=base if with_base else None, coefficients=coefficients)
    expected = reference(before[:3], coefficients, before[3] if with_base else None)
    assert_close(state(merged), expected, dtype)
    for net, kept in zip((*nets, base), before, strict=True):
        assert_equal(state(net), kept)


@given(architectures, seeds)
@laws
def test_two_networks_commute_but_for_counters(names, seed):
    one, two = build(names, seed), build(names, seed + 1)
    left, right = state(merge_modules(one, two)), state(merge_modules(two, one))
    assert_equal(*({n: t for n, t in side.items() if t.is_floating_point()} for side in (left, right)))


@given(architectures, seeds)
@laws
def test_a_network_of_zeros_changes_no_sum(names, seed):
    net = build(names, seed)
    zero = copy.deepcopy(net)
    for tensor in (*zero.parameters(), *zero.buffers()):
        tensor.data.zero_()
    merged, own = state(merge_modules(net, zero)), state(net)
    assert_equal(merged, {name: tensor for name, tensor in own.items() if not is_averaged(name)})


@given(architectures, seeds, st.floats(-2, 2), st.floats(-2, 2))
@laws
def test_linear_in_the_coefficients_and_in_the_networks(names, seed, one, two):
    names = [name for name in names if name != "batch_norm"] or ["linear"]
    a, b, c = (build(names, seed + k, dtype=torch.float64) for k in range(3))
    together = state(merge_modules(a, b, coefficients=[one, two], policy=SUMS))
    parts = [state(merge_modules(net, zeros(net), coefficients=[f, 1], policy=SUMS)) for net, f in ((a, one), (b, two))]
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, parts[0][name] + parts[1][name], rtol=1e-12, atol=1e-12)
    nested = merge_modules(merge_modules(a, b, policy=SUMS), c, policy=SUMS)
    flat = merge_modules(a, b, c, policy=SUMS)
    for name, tensor in state(flat).items():
        torch.testing.assert_close(state(nested)[name], tensor, rtol=1e-12, atol=1e-12)


def zeros(net):
    zero = copy.deepcopy(net)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    return zero


@given(architectures, seeds)
@laws
def test_the_base_is_neutral(names, seed):
    net, base = build(names, seed), build(names, seed + 1)
    for merged in (
        merge_modules(base, net, base=base, policy=SUMS),
        merge_modules(net, base, base=base, policy=SUMS),
        merge_modules(net, net, base=base, coefficients=[0.5, 0.5], policy=SUMS),
    ):
        found, own = state(merged), state(net)
        for name, tensor in own.items():
            if "running" not in name and tensor.is_floating_point():
                torch.testing.assert_close(found[name], tensor, rtol=2e-7, atol=1e-12)
    same = state(merge_modules(base, base, base=base))
    assert_equal(same, state(base))


@given(architectures, seeds, st.randoms(use_true_random=False))
@laws
def test_names_are_paired_and_not_positions(names, seed, random):
    one, two = build(names, seed), build(names, seed + 1)
    keys = list(two)
    random.shuffle(keys)
    shuffled = nn.ModuleDict({key: two[key] for key in keys})
    assert_equal(state(merge_modules(one, shuffled)), state(merge_modules(one, two)))


@given(architectures, seeds, coefficients_of, st.booleans(), st.sampled_from([".pt", ".safetensors"]))
@settings(max_examples=25, deadline=None)
def test_files_merge_to_what_modules_do(tmp_path_factory, names, seed, coefficients, with_base, suffix):
    folder = tmp_path_factory.mktemp("merge")
    *nets, base = (build(names, seed + k) for k in range(4))
    for number, net in enumerate((*nets, base)):
        order = list(net.state_dict().items())
        torch.save(dict(order if number % 2 else reversed(order)), folder / f"{number}.pt")
    paths = [folder / f"{number}.pt" for number in range(3)]
    options = {"coefficients": coefficients}
    start = folder / "3.pt" if with_base else None
    merge_checkpoints(paths, folder / f"m{suffix}", base=start, **options)
    if suffix == ".pt":
        found = torch.load(folder / "m.pt", weights_only=True)
    else:
        from safetensors.torch import load_file

        found = load_file(folder / "m.safetensors")
    merged = merge_modules(*nets, base=base if with_base else None, **options)
    assert set(found) == set(merged.state_dict())
    assert_equal(found, state(merged))
