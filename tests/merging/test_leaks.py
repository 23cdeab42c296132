"""The leak of each layer against the definition, in float64 and by hand."""

import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import MergeReport, WeightSumMerger
from lightning_lowrank.functional import leak
from tests.conftest import make_classifier, make_trainer, mlp
from tests.merging.test_evaluation import pair, task_loader


def inputs_of_layers(module, layers, inputs):
    """What each layer gets, one layer after the other."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        module(inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_of_a_sum_it_is_what_the_other_network_adds():
    one, two = pair()
    loaders = {"first": task_loader(0), "second": task_loader(1)}
    report = WeightSumMerger(make_trainer()).evaluate(one, two, loaders)
    for task, own, other in (("first", one, two), ("second", two, one)):
        layers = {name: layer for name, layer in own.named_modules() if isinstance(layer, nn.Linear)}
        seen = inputs_of_layers(own, layers, loaders[task].dataset.tensors[0])
        expected = {
            f"{name}.weight": leak(other.get_submodule(name).weight, layer.weight, seen[name])
            for name, layer in layers.items()
        }
        assert list(report.leak[task]) == list(expected)
        assert report.leak[task] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("coefficients", [[0.5, 0.5], [1.0, -2.0]])
def test_with_coefficients_and_a_base_it_is_what_the_merge_changes(coefficients):
    one, two = pair()
    base = make_classifier(mlp((6, 16, 12, 6), bias=True, seed=5))
    merger = WeightSumMerger(make_trainer(), base=base, coefficients=coefficients, progress=False)
    report = merger.evaluate(one, two, {"first": task_loader(0), "second": task_loader(1)})
    inputs = task_loader(0).dataset.tensors[0].double()
    own = one.net[0].weight.double()
    merged = merger.merge(one, two).net[0].weight.double()
    expected = torch.linalg.norm(inputs @ (merged - own).T) / torch.linalg.norm(inputs @ own.T)
    assert report.leak["first"]["net.0.weight"] == pytest.approx(expected.item(), rel=1e-5)


class Convolutions(lightning.pytorch.LightningModule):
    """A strided, a depthwise and a circular convolution, one of them called twice, and a layer that is never called."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(1, 4, 3, stride=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs):
        hidden = self.depthwise(self.first(inputs).relu())
        return self.head(self.circular(self.circular(hidden)).mean((2, 3)))

    def test_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_convolutions_without_their_biases():
    one, two = Convolutions(0), Convolutions(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(7, 1, 8, 8, generator=generator), torch.tensor([0, 1, 0, 1, 0, 1, 0]))
    report = WeightSumMerger(make_trainer()).evaluate(one, two, {"a": DataLoader(data, 3), "b": DataLoader(data, 3)})
    found = report.leak["a"]
    assert list(found) == ["first.weight", "depthwise.weight", "circular.weight", "head.weight"]
    hidden = []
    one.depthwise.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach().double()))
    one.circular.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach().double()))
    one(data.tensors[0])

    def ratio(inputs, layer, **options):
        sums = [
            sum(
                nn.functional.conv2d(x, m.get_submodule(layer).weight.detach().double(), **options).square().sum()
                for x in inputs
            )
            for m in (two, one)
        ]
        return (sums[0] / sums[1]).sqrt().item()

    assert found["first.weight"] == pytest.approx(ratio([data.tensors[0].double()], "first", stride=2), rel=1e-5)
    assert found["depthwise.weight"] == pytest.approx(ratio(hidden[:1], "depthwise", groups=4, padding=1), rel=1e-5)
    padded = [nn.functional.pad(x, (1, 1, 1, 1), mode="circular") for x in hidden[1:]]
    assert len(padded) == 2
    assert found["circular.weight"] == pytest.approx(ratio(padded, "circular"), rel=1e-5)


def test_inputs_that_the_own_weight_maps_to_zero_have_no_leak():
    one, two = pair()
    with torch.no_grad():
        one.net[0].weight.zero_()
    report = WeightSumMerger(make_trainer()).evaluate(one, two, [task_loader(0), task_loader(1)])
    assert report.leak["task_1"]["net.0.weight"] != report.leak["task_1"]["net.0.weight"]
    assert "net.0.weight -" in str(report)


def test_it_is_printed_saved_and_loaded(tmp_path):
    layers = {f"net.{i}.weight": i / 10 for i in range(8)}
    report = MergeReport({"a": "m1"}, ["m1"], {"a/m1/loss": 1.0}, leak={"a": layers | {"x": float("nan")}})
    printed = " ".join(str(report).split())
    assert "Leak on a: net.7.weight 0.7, net.6.weight 0.6, net.5.weight 0.5" in printed
    assert "and 4 layers with less" in printed
    loaded = MergeReport.load(report.save(tmp_path / "report.json"))
    assert str(loaded) == str(report)
    old = '{"schema_version": 1, "tasks": {}, "models": [], "metrics": {}}'
    (tmp_path / "old.json").write_text(old)
    assert MergeReport.load(tmp_path / "old.json").leak == {}
