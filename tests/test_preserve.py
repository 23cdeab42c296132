"""What code changes in a module, in data and in the global generators is put back, in place."""

from __future__ import annotations

import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

from lightning_lowrank.preserve import FixedParameters, preserved
from tests.conftest import make_data, make_trainer


class Transform:
    def __init__(self) -> None:
        self.calls = 0
        self.rng = np.random.default_rng(1)

    def __call__(self, value: float) -> float:
        self.calls += 1
        return value + self.rng.random()


class Holder(nn.Module):
    """State in every place and of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.metric = torchmetrics.MeanMetric()
        self.catalogue = torchmetrics.CatMetric()
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.teacher = [nn.BatchNorm1d(2)]  # hidden from parameters()
        self.kept = torch.zeros(2)
        with torch.inference_mode():
            self.inferred = torch.zeros(2)
        self.array = np.zeros(2)
        self.count, self.last = 0, None
        self.outputs: list[Any] = [[1], {"a": deque([1, 2], maxlen=2)}]
        self.by_name: Any = defaultdict(list, a=[1])
        self.ordered = OrderedDict(a=1, b=2)
        self.counter = Counter("aab")
        self.seen = {1, 2}
        self.transform = Transform()
        self.bound = functools.partial(Transform().__call__, 1.0)
        self.generators = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
            random.Random(1),
            np.random.PCG64(1),
            random.SystemRandom(),
        )

    def disturb(self) -> None:
        self.norm(torch.randn(4, 2))
        self.norm.eval()
        self.teacher[0](torch.randn(4, 2))
        self.metric.update(torch.rand(3))
        self.catalogue.update(torch.rand(3))
        self.queue.data.add_(1)
        self.replaced = torch.ones(4)
        self.register_buffer("new_buffer", torch.ones(1))
        self.new_attribute = 1
        del self.last
        self.kept += 1
        self.array += 1
        self.count += 1
        self.outputs[0].append(2)
        self.outputs[1]["a"].append(3)
        self.outputs.append(torch.ones(1))
        self.by_name["a"].append(2)
        self.by_name["b"].append(2)
        self.ordered.move_to_end("a")
        self.counter.update("b")
        self.seen.add(3)
        self.transform(1.0)
        self.bound()
        with torch.inference_mode():
            self.inferred.add_(1)
        self.draw()

    def draw(self) -> list[float]:
        torch_, numpy, state, python, bits, _ = self.generators
        drawn = [torch.rand(1, generator=torch_).item(), numpy.random(), state.rand(), python.random()]
        return [*drawn, bits.random_raw(), self.transform.rng.random(), self.bound.func.__self__.rng.random()]

    def values(self) -> dict[str, Any]:
        buffers = {name: (id(buffer), buffer.tolist()) for name, buffer in self.named_buffers()}
        teacher = {name: (id(buffer), buffer.tolist()) for name, buffer in self.teacher[0].named_buffers()}
        plain = (
            self.count,
            getattr(self, "last", 0),
            self.outputs,
            dict(self.by_name),
            self.seen,
            self.counter,
            list(self.ordered),
        )
        metrics = (self.metric.mean_value.item(), self.metric.update_count, self.catalogue.value)
        arrays = [(id(value), value.tolist()) for value in (self.kept, self.inferred, self.array)]
        calls = (self.transform.calls, self.bound.func.__self__.calls)
        return {**buffers, "teacher": teacher, "all": repr((plain, metrics, arrays, calls, self.norm.training))}


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_put_back_in_place(fails):
    held, twin = Holder(), Holder()
    names, before, outputs = list(vars(held)), held.values(), held.outputs
    try:
        with preserved(held):
            held.disturb()
            assert held.values() != before
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert held.values() == before
    assert sorted(vars(held)) == sorted(names)
    assert held.outputs is outputs
    assert held.draw() == twin.draw()


def test_global_generators_are_put_back():
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    with preserved(nn.Module()):
        first = draw()
    assert draw() == first


def test_rewinding_keeps_the_generators_going():
    held, twin = Holder(), Holder()
    with preserved(held) as state:
        first = held.draw()
        held.count = 3
        state.rewind()
        assert held.count == 0
        assert held.draw() != first
    assert held.draw() == twin.draw()


def test_a_dataloader_is_put_back_but_data_are_not_copied():
    data: Any = make_data(4)
    data.big, data.small, data.cache, data.transform = torch.zeros(2**19), torch.zeros(2), {}, Transform()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Subset(data, [0, 1, 2]), batch_sampler=BatchSampler(sampler, 2, False))
    order = list(RandomSampler(data, generator=torch.Generator().manual_seed(1)))
    with preserved(nn.Module(), loader):
        list(sampler)
        data.cache["a"] = 1
        data.transform(1.0)
        data.small += 1
        data.big += 1
    assert list(sampler) == order
    assert (data.cache, data.transform.calls, data.small.tolist()) == ({}, 0, [0, 0])
    assert data.big[0] == 1


def test_what_runs_the_training_is_left_alone():
    class Plain(lightning.pytorch.Callback):
        count = 0

    module: Any = lightning.pytorch.LightningModule()
    module.trainer, module.callback = make_trainer(), Plain()
    module.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with preserved(module):
        module.callback.count = 1
        module.optimizer.param_groups[0]["lr"] = 2.0
        module.trainer.should_stop = True
    assert (module.callback.count, module.optimizer.param_groups[0]["lr"]) == (1, 2.0)
    assert module.trainer.should_stop is True


def test_shared_memory_and_odd_tensors_do_not_stop_it():
    module: Any = nn.LSTM(2, 3)
    module.register_buffer("expanded", torch.zeros(1).expand(4))
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    module.register_buffer("empty", torch.zeros(0))
    module.meta = torch.zeros(2, device="meta")
    module.itself, module.long = [module], [[0]] * 20_000
    flat = module._flat_weights
    with preserved(module) as state:
        module.sparse.mul_(2)
        module.long.pop()
    assert module._flat_weights is flat
    assert module.sparse.to_dense().tolist() == [[1, 0], [0, 1]]
    assert len(module.long) == 20_000
    assert {id(parameter) for parameter in state.parameters} == {id(parameter) for parameter in module.parameters()}


WRITES = {
    "in_place": lambda p: p.detach().add_(1),
    "data": lambda p: p.data[0].mul_(0.5),
    "copy": lambda p: p.data.copy_(torch.zeros(2)),
    "foreach": lambda p: torch._foreach_add_([torch.ones(1), p.data], 1.0),
    "out": lambda p: torch.add(torch.ones(2), 1, out=p.data),
    "replaced": lambda p: setattr(p, "data", torch.zeros(2)),
}


@pytest.mark.parametrize("write", list(WRITES))
def test_writes_to_parameters_raise_and_change_nothing(write):
    parameter = nn.Parameter(torch.ones(2))
    pointer = parameter.data_ptr()
    with pytest.raises(ValueError, match="changes the parameter 'w'"), FixedParameters({"w": parameter}):  # noqa: PT012
        WRITES[write](parameter)
        assert write == "replaced"
    assert (parameter.tolist(), parameter.data_ptr()) == ([1.0, 1.0], pointer)


def test_forward_and_backward_run_under_the_watch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))
    inputs = torch.randn(4, 1, 5, 5)
    net(inputs)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(inputs).sum(), list(net.parameters()))

    with FixedParameters(dict(net.named_parameters())):
        watched = gradients()
    torch.testing.assert_close(watched, gradients(), rtol=0, atol=0)
