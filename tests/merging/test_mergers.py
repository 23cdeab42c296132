"""WeightSumMerger with real kinds of networks: batch normalisation, tied embeddings, LoRA, heads per task."""

import copy

import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowrank import MergePolicy, MergeReport, WeightSumMerger, merge_modules
from tests.conftest import make_trainer

CLASSES = 4


class Classifier(lightning.pytorch.LightningModule):
    """Trains, evaluates and logs as users do; subclasses are networks."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("acc", self.accuracy)
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-2)


class Convolutional(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)


class Transformer(Classifier):
    """A small language model whose output layer is its token embedding; batches are dicts."""

    def __init__(self, vocabulary=12, width=16):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 6, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(self.norm(self.block(self.tokens(ids) + self.positions)))

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch["ids"]).flatten(0, 1), batch["labels"].flatten())

    def predict_step(self, batch, batch_idx=0):
        return self(batch["ids"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def test_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))


class Adapted(nn.Module):
    """A frozen layer with a trained update of low rank beside it."""

    def __init__(self, layer, rank=2, alpha=4.0):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, inputs):
        return self.layer(inputs) + self.scaling * (inputs @ self.lora_A.mT) @ self.lora_B.mT


class LoRA(Classifier):
    def __init__(self, rank=2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(7)
        hidden, out = nn.Linear(16, 24), nn.Linear(24, CLASSES)
        self.net = nn.Sequential(Adapted(hidden, rank), nn.ReLU(), Adapted(out, rank))

    def forward(self, inputs):
        return self.net(inputs.flatten(1))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=0.01)


class Headed(Classifier):
    """A trunk, and a head with as many classes as the task has."""

    def __init__(self, classes):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=classes)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU())
        self.head = nn.Linear(24, classes)

    def forward(self, inputs):
        return self.head(self.trunk(inputs))


def images(seed, task, classes=CLASSES):
    """Four clusters; the tasks use different pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (64,), generator=generator)
    centres = torch.randn(classes, 2, 4, generator=torch.Generator().manual_seed(task))
    inputs = torch.zeros(64, 1, 4, 4)
    inputs[:, 0, 2 * task : 2 * task + 2] = 2 * centres[labels] + 0.1 * torch.randn(64, 2, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=16)


def sentences(seed, task):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (32, 6), generator=generator) + 6 * task
    rows = [{"ids": row, "labels": row.roll(1)} for row in ids]
    return DataLoader(rows, batch_size=8)


def trained(net, loader, epochs=15):
    make_trainer(max_epochs=epochs).fit(net, loader)
    return net


def networks(make, loaders, epochs=15):
    nets = []
    for seed, loader in enumerate(loaders):
        torch.manual_seed(seed)
        nets.append(trained(make(), loader, epochs))
    return nets


def states(*nets):
    return [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]


def assert_untouched(nets, before):
    for net, kept in zip(nets, before, strict=True):
        assert all(torch.equal(kept[name], tensor) for name, tensor in net.state_dict().items())


def own_metric(net, loader, name):
    return make_trainer().test(copy.deepcopy(net), loader, verbose=False)[0][name]


def test_a_network_with_batch_normalisation():
    loaders = [images(task, task) for task in range(2)]
    nets = networks(Convolutional, loaders)
    before = states(*nets)
    merger = WeightSumMerger(make_trainer())
    report = merger.evaluate(*nets, {"top": loaders[0], "bottom": loaders[1]})
    assert_untouched(nets, before)
    assert report.models == ["m1", "m2", "sum", "sum_pooled", "sum_reestimated", "average", "ensemble"]
    merged = merger.merge(*nets)
    pooled = merge_modules(*nets, policy=MergePolicy(kinds={"statistic": "pooled"}))
    measured = merger.reestimate(merged, loaders)
    for name, net in (("sum", merged), ("sum_pooled", pooled), ("sum_reestimated", measured), ("m1", nets[0])):
        assert report.value("top", name, "loss") == pytest.approx(own_metric(net, loaders[0], "loss"), rel=1e-5)
    # Re-estimated statistics are the moments of the first layer's outputs on both tasks' images together.
    both = torch.cat([batch[0] for loader in loaders for batch in loader])
    outputs = measured.net[0](both).double()
    mean = outputs.mean((0, 2, 3))
    torch.testing.assert_close(measured.net[1].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    variance = outputs.var((0, 2, 3), correction=0)
    torch.testing.assert_close(measured.net[1].running_var.double(), variance, rtol=1e-2, atol=1e-5)
    for parameter, kept in zip(measured.parameters(), merged.parameters(), strict=True):
        assert torch.equal(parameter, kept)
    assert str(report).count("sum_reestimated") == 1


def test_a_transformer_with_tied_embeddings():
    loaders = [sentences(task, task) for task in range(2)]
    nets = networks(Transformer, loaders, epochs=4)
    before = states(*nets)
    report = WeightSumMerger(make_trainer()).evaluate(*nets, {"low": loaders[0], "high": loaders[1]})
    assert_untouched(nets, before)
    merged = merge_modules(*nets)
    assert merged.out.weight is merged.tokens.weight
    assert torch.equal(merged.tokens.weight, before[0]["tokens.weight"] + before[1]["tokens.weight"])
    assert report.value("low", "sum", "loss") == pytest.approx(own_metric(merged, loaders[0], "loss"), rel=1e-4)
    assert 0 <= report.value("low", "m1", "joint_accuracy") <= 1
    assert "sum_pooled" not in report.models
    assert report.notes == []


def test_two_modules_tuned_with_lora():
    loaders = [images(task, task) for task in range(2)]
    nets = networks(LoRA, loaders)
    before = states(*nets)
    merger = WeightSumMerger(make_trainer())
    report = merger.evaluate(*nets, {"top": loaders[0], "bottom": loaders[1]})
    assert_untouched(nets, before)
    merged = merger.merge(*nets)
    for index in (0, 2):
        layers = [net.net[index] for net in (*nets, merged)]
        one, two, both = (layer.scaling * layer.lora_B.double() @ layer.lora_A.double() for layer in layers)
        torch.testing.assert_close(both, one + two, rtol=1e-5, atol=1e-6)
        assert torch.equal(layers[2].layer.weight, layers[0].layer.weight)
    for task, loader in zip(("top", "bottom"), loaders, strict=True):
        assert report.value(task, "sum", "loss") == pytest.approx(own_metric(merged, loader, "loss"), rel=1e-5)
    cut = WeightSumMerger(make_trainer(), policy=MergePolicy(lora_rank=1))
    report = cut.evaluate(*nets, {"top": loaders[0], "bottom": loaders[1]})
    assert set(report.settings["discarded"]) == {"net.0.lora_A", "net.2.lora_A"}
    assert all(0 < share < 1 for share in report.settings["discarded"].values())
    assert "lora_rank=1" in report.settings["policy"]
    assert any("net.0.lora_A: truncation left out" in note for note in report.notes)


def test_adapters_with_another_scale_keep_their_update():
    torch.manual_seed(0)
    one, two = LoRA(), LoRA(rank=3)
    for net in (one, two):
        for index in (0, 2):
            nn.init.normal_(net.net[index].lora_B)
    two.net[0].scaling = 0.5
    merged = merge_modules(one, two)
    for index in (0, 2):
        updates = [net.net[index].scaling * net.net[index].lora_B @ net.net[index].lora_A for net in (one, two, merged)]
        torch.testing.assert_close(updates[2], updates[0] + updates[1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def headed():
    loaders = {"three": images(0, 0, 3), "four": images(1, 1, 4)}
    nets = []
    for seed, (classes, loader) in enumerate(zip((3, 4), loaders.values(), strict=True)):
        torch.manual_seed(seed)
        nets.append(trained(Headed(classes), loader))
    return nets, loaders


def test_heads_of_different_sizes_are_kept_per_task(headed):
    nets, loaders = headed
    before = states(*nets)
    merger = WeightSumMerger(make_trainer(), heads={"three": "head.*", "four": "head.*"})
    report = merger.evaluate(*nets, loaders)
    assert_untouched(nets, before)
    for index, (task, loader) in enumerate(loaders.items()):
        merged = merger.merge(*nets, task=task)
        assert torch.equal(merged.head.weight, nets[index].head.weight)
        assert torch.equal(merged.trunk[1].weight, nets[0].trunk[1].weight + nets[1].trunk[1].weight)
        assert report.value(task, "sum", "acc") == pytest.approx(own_metric(merged, loader, "acc"))
        assert report.value(task, f"m{index + 1}", "acc") == pytest.approx(own_metric(nets[index], loader, "acc"))
        # The other network, with this task's head.
        other = copy.deepcopy(nets[index])
        other.trunk.load_state_dict(nets[1 - index].trunk.state_dict())
        assert report.value(task, f"m{2 - index}", "acc") == pytest.approx(own_metric(other, loader, "acc"))
        assert report.value(task, f"m{index + 1}", "output_change") == 0
        assert report.value(task, "ensemble", "joint_accuracy") >= 0
    assert report.settings["heads"] == merger.heads
    assert report.notes == []


def test_a_network_with_both_heads_holds_both_after_the_merge():
    nets = []
    for _ in range(2):
        net = Headed(3)
        net.heads = nn.ModuleDict({"a": nn.Linear(24, 3), "b": nn.Linear(24, 5)})
        nets.append(net)
    merged = WeightSumMerger(heads={"a": "heads.a.*", "b": "heads.b.*"}).merge(*nets)
    assert torch.equal(merged.heads["a"].weight, nets[0].heads["a"].weight)
    assert torch.equal(merged.heads["b"].weight, nets[1].heads["b"].weight)
    assert torch.equal(merged.head.weight, nets[0].head.weight + nets[1].head.weight)


def test_heads_of_different_names():
    one, two = Headed(3), Headed(3)
    one.first, two.second = nn.Linear(24, 3), nn.Linear(24, 5)
    merger = WeightSumMerger(heads={"one": "first.*", "two": "second.*"})
    for task, source, name in (("one", one, "first"), ("two", two, "second")):
        merged = merger.merge(one, two, task=task)
        assert torch.equal(getattr(merged, name).weight, getattr(source, name).weight)
        assert torch.equal(merged.trunk[1].bias, one.trunk[1].bias + two.trunk[1].bias)


def test_mistakes_with_heads_are_told(headed):
    nets, loaders = headed
    with pytest.raises(TypeError, match=r'heads must be \{"task": pattern\}, one per network, got \'head'):
        WeightSumMerger(heads="head.*")
    with pytest.raises(ValueError, match=r"heads: the pattern 'top\.\*' matches no tensor of model 2; there are: "):
        WeightSumMerger(heads={"three": "head.*", "four": "top.*"}).merge(*nets)
    with pytest.raises(ValueError, match=r"heads must have one pattern per network, 2, got"):
        WeightSumMerger(heads={"three": "head.*"}).merge(*nets)
    with pytest.raises(ValueError, match=r"tasks and heads must have the same names in the same order"):
        WeightSumMerger(heads={"four": "head.*", "three": "head.*"}).evaluate(*nets, loaders)
    with pytest.raises(ValueError, match=r"task 'five' has no head; heads are"):
        WeightSumMerger(heads={"three": "head.*", "four": "head.*"}).merge(*nets, task="five")


def test_three_networks():
    loaders = [images(0, 0), images(1, 1), images(2, 0)]
    nets = networks(Convolutional, loaders, epochs=2)
    report = WeightSumMerger(make_trainer()).evaluate(
        nets[0], nets[1], dict(zip("abc", loaders, strict=True)), more=nets[2:]
    )
    assert report.tasks == {"a": "m1", "b": "m2", "c": "m3"}
    assert report.value("c", "sum", "loss") == pytest.approx(
        own_metric(merge_modules(*nets), loaders[2], "loss"), rel=1e-4
    )
    average = merge_modules(*nets, coefficients=[1 / 3] * 3)
    assert report.value("b", "average", "loss") == pytest.approx(own_metric(average, loaders[1], "loss"), rel=1e-4)


def test_coefficients_are_swept_on_held_out_data(tmp_path):
    loaders = [images(task, task) for task in range(2)]
    nets = networks(lambda: Headed(CLASSES), loaders)
    held_out = {"top": images(10, 0), "bottom": images(11, 1)}
    merger = WeightSumMerger(make_trainer())
    candidates = [[0.1, 0.1], [1.0, 1.0], [0.0, 1.0]]
    sweep = merger.sweep(*nets, held_out, candidates=candidates, metric="loss", minimize=True)
    assert sweep.candidates == candidates
    for candidate, values in zip(candidates, sweep.values, strict=True):
        merged = merge_modules(*nets, coefficients=candidate)
        assert values == pytest.approx([own_metric(merged, loader, "loss") for loader in held_out.values()], rel=1e-5)
    means = [sum(values) / 2 for values in sweep.values]
    assert sweep.best == candidates[means.index(min(means))]
    assert str(sweep).count("best") == 1
    sweep.save(tmp_path / "sweep.json")
    assert len(merger.sweep(*nets, held_out).candidates) == 12
    with pytest.raises(ValueError, match=r"no metric 'f1' on task 'top'; there are: acc, loss, joint_accuracy"):
        merger.sweep(*nets, held_out, metric="f1")
    with pytest.raises(ValueError, match="candidates is empty"):
        merger.sweep(*nets, held_out, candidates=[])


def test_what_differs_and_what_is_shared_is_said():
    torch.manual_seed(0)
    start = Headed(CLASSES)
    start.trunk[1] = nn.Linear(16, 64)
    start.trunk.append(nn.Linear(64, 64)), start.trunk.append(nn.Linear(64, 24))
    loaders = [images(task, task) for task in range(2)]
    nets = [trained(copy.deepcopy(start), loader, epochs=1) for loader in loaders]
    report = WeightSumMerger(make_trainer()).evaluate(*nets, loaders)
    assert report.settings["start"] == "shared"
    assert any("shared start" in note and "pass it as base=" in note for note in report.notes)
    report = WeightSumMerger(make_trainer(), base=start).evaluate(*nets, loaders)
    assert not any("pass it as base=" in note for note in report.notes)
    one, two = LoRA(rank=2), LoRA(rank=2)
    two.hparams["lr"] = 0.5
    report = WeightSumMerger(make_trainer()).evaluate(one, two, loaders)
    assert report.settings["hyper_parameters"] == {"lr": ["missing", "0.5"]}
    assert "hyperparameters that differ: lr" in report.notes


def test_reports_are_saved_with_everything(tmp_path, headed):
    nets, loaders = headed
    report = WeightSumMerger(make_trainer(), heads={"three": "head.*", "four": "head.*"}).evaluate(*nets, loaders)
    report.save(tmp_path / "report.json")
    assert MergeReport.load(tmp_path / "report.json").settings == report.settings
