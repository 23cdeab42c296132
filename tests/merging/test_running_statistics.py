"""Re-estimated statistics, compared with all data in one batch, layer by layer in float64."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_lowrank.merging.running_statistics import batch_norms, mixed, reestimate


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(5 * 16, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3),
    )  # fmt: skip
    for layer in batch_norms(net).values():
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(7)
    return net.eval()


def tasks(count=2, samples=60):
    generator = torch.Generator().manual_seed(1)
    return [(k + 1) * torch.randn(samples, 2, 8, 8, generator=generator) + 2 * k for k in range(count)]


@torch.no_grad()
def exact(net, inputs):
    """Every layer's moments when the layers before already have theirs: all the data as one batch in float64."""
    hidden, found = inputs.double(), {}
    for name, layer in copy.deepcopy(net).double().eval().named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            dims = [0, *range(2, hidden.ndim)]
            found[name] = hidden.mean(dims), hidden.var(dims, correction=0)
            layer.running_mean.copy_(found[name][0]), layer.running_var.copy_(found[name][1])
        hidden = layer(hidden)
    return found


def run_over(net, batches):
    def run():
        net.eval()
        with torch.inference_mode():
            for batch in batches:
                net(batch)

    return run


def test_one_mixed_batch_gives_the_exact_moments():
    net, data = network(), tasks()
    expected = exact(net, torch.cat(data))
    assert reestimate(net, [run_over(net, mixed([[part] for part in data]))]) == []
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(net.get_submodule(name).running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.get_submodule(name).running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_mixed_batches_are_near_the_exact_moments_and_single_tasks_are_not():
    data = tasks()
    errors = {}
    for how in ("mixed", "apart"):
        net = network()
        expected = exact(net, torch.cat(data))
        batches = [part.split(20) for part in data]
        passes = [mixed(batches)] if how == "mixed" else batches
        reestimate(net, [run_over(net, loader) for loader in passes])
        gaps = [(net.get_submodule(name).running_mean - mean).abs().max() for name, (mean, _) in expected.items()]
        errors[how] = max(gaps).item()
        # The first layer depends on no other: there both are exact.
        torch.testing.assert_close(net[1].running_mean.double(), expected["1"][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net[1].running_var.double(), expected["1"][1], rtol=1e-5, atol=1e-5)
    assert errors["mixed"] < 0.1
    assert errors["apart"] > 5 * errors["mixed"]


def test_nothing_else_changes():
    net = network()
    layers = batch_norms(net)
    others = {n: t.clone() for n, t in net.state_dict().items() if "running" not in n}
    settings = [(layer.momentum, layer.training) for layer in layers.values()]
    reestimate(net, [run_over(net, tasks())])
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in others.items())
    assert [(layer.momentum, layer.training) for layer in layers.values()] == settings
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers.values())


def test_an_exception_leaves_the_network_as_it_was():
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def fail():
        net(tasks()[0])
        net(torch.zeros(1, 3, 8, 8))

    with pytest.raises(RuntimeError, match="expected input"):
        reestimate(net, [fail])
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert not net.training
    assert not any(layer.training or layer._forward_pre_hooks for layer in batch_norms(net).values())


def test_layers_that_see_too_little_keep_their_statistics_and_are_named():
    net = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2), "single": nn.BatchNorm1d(2)}).eval()

    def run():
        net["used"](torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        net["single"](torch.ones(1, 2))

    assert reestimate(net, [run]) == ["unused", "single"]
    assert net["used"].running_mean.tolist() == [1.0, 2.0]
    assert net["used"].running_var.tolist() == [1.0, 4.0]
    for name in ("unused", "single"):
        assert net[name].running_mean.tolist() == [0.0, 0.0]


def test_large_numbers_in_half_precision():
    layer = nn.BatchNorm1d(2).to(torch.bfloat16).eval()
    batch = torch.tensor([[10000.0, 3e38], [12000.0, 3e38]]).to(torch.bfloat16)
    reestimate(layer, [lambda: layer(batch)])
    assert torch.equal(layer.running_mean, batch.double().mean(0).bfloat16())
    assert torch.equal(layer.running_var, batch.double().var(0, correction=0).bfloat16())


def test_tasks_weigh_the_same_whatever_their_batches():
    layer = nn.BatchNorm1d(1).eval()
    loaders = [[torch.zeros(250, 1)], torch.ones(53, 1).split(25)]
    assert reestimate(layer, [run_over(layer, mixed(loaders))]) == []
    assert layer.running_mean.item() == pytest.approx(0.5)
    assert layer.running_var.item() == pytest.approx(0.25)


def test_moments_that_do_not_fit_the_type_are_named_and_not_written():
    layer = nn.BatchNorm1d(1).half().eval()
    batch = torch.tensor([[-6e4], [6e4]]).half()
    assert reestimate(layer, [lambda: layer(input=batch)]) == [""]
    assert (layer.running_mean.item(), layer.running_var.item()) == (0.0, 1.0)


def test_layers_without_running_statistics_are_left_alone():
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert batch_norms(net) == {}
    assert reestimate(net, [lambda: net(torch.randn(4, 2))]) == []


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"x": x, "y": y},
        lambda x, y: {"inner": {"x": x}, "names": ["a"] * len(y), "y": y},
        lambda x, y: Pair(x, y),
        lambda x, y: Batch(x, y),
        lambda x, y: x,
    ],
    ids=["tuple", "list", "dict", "nested", "namedtuple", "dataclass", "tensor"],
)
def test_batches_of_many_structures_are_joined(make):
    one = [make(torch.ones(2, 3), torch.zeros(2)) for _ in range(3)]
    two = [make(torch.full((4, 3), 2.0), torch.ones(4))]
    found = list(mixed([one, two]))
    assert len(found) == 3
    assert type(found[0]) is type(one[0])
    # Both tasks weigh the same: the smaller batch is repeated.
    expected = make(torch.cat([torch.ones(4, 3), torch.full((4, 3), 2.0)]), torch.cat([torch.zeros(4), torch.ones(4)]))
    for batch in found:
        for part, wanted in zip(flattened(batch), flattened(expected), strict=True):
            assert torch.equal(part, wanted) if isinstance(part, torch.Tensor) else part == wanted


def flattened(batch):
    if isinstance(batch, Batch):
        batch = vars(batch)
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [leaf for part in batch for leaf in flattened(part)]
    return [batch]


@pytest.mark.parametrize("other", [[torch.ones(2, 4)], [{"x": torch.ones(2, 3)}], []], ids=["shape", "dict", "empty"])
def test_batches_that_cannot_be_joined_are_told(other):
    with pytest.raises(ValueError, match="the tasks' batches can't be joined: "):
        mixed([[torch.ones(2, 3)], other])
