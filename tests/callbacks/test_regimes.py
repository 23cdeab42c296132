"""What the monitor says about layers, against the truth: the float64 outputs after scaling each end of each layer."""

import itertools

import pytest
import torch
from torch import nn

from lightning_lowrank import LowRankMonitor
from lightning_lowrank.functional import Regime
from lightning_lowrank.layers import layer_ends
from tests.conftest import RowLogger, make_classifier, make_data, make_trainer, mlp

SCALE = 1e-3
# Relative change of the outputs that counts as none, once the normalisations' epsilons are taken out.
NONE = 1e-9


class Residual(nn.Module):
    """Bias-free, two branches."""

    def __init__(self):
        super().__init__()
        sizes = {
            "first": (6, 16),
            "up": (16, 12),
            "down": (12, 16),
            "up2": (16, 10),
            "down2": (10, 16),
            "last": (16, 3),
        }
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, x):
        h = self.first(x).relu()
        h = h + self.down(self.up(h).relu())
        return self.last(h + self.down2(self.up2(h).relu()))


class Transformer(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.embed(x))).mean(1))


def batch_norm():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


NETWORKS = {
    "batch norm": (batch_norm, (2, 5, 5)),
    "residual": (Residual, (6,)),
    "biased mlp": (lambda: mlp((6, 16, 12, 10, 3), bias=True, seed=torch.initial_seed()), (6,)),
    "transformer, norm first": (lambda: Transformer(True), (5, 4)),
    "transformer, norm last": (lambda: Transformer(False), (5, 4)),
}


def scaled(net, end, factor):
    """Multiply the parts of an end in place."""
    for name, blocks, index in end.parts:
        parameter = net.get_parameter(name)
        (parameter if blocks is None else blocks.of(parameter)[index]).mul_(factor)


@torch.no_grad()
def truth(net, inputs):
    """Which ends have no effect, and which pairs of ends undo each other."""
    net = net.double().train()
    for layer in net.modules():
        if hasattr(layer, "eps"):
            layer.eps = 1e-14
    inputs, ends = inputs[:12].double(), layer_ends(net)
    reference = net(inputs)

    def change(*factors):
        for sign in (1, -1):
            for end, factor in factors:
                scaled(net, end, factor**sign)
            found = ((net(inputs) - reference).norm() / reference.norm()).item()
            for end, factor in factors:
                scaled(net, end, factor**-sign)
            if found > NONE:
                break
        return found

    zero = {end.name + end.kind for end in ends if change((end, 1 + SCALE)) < NONE}
    moving = [end for end in ends if end.name + end.kind not in zero]
    pairs = {
        frozenset((a.name + a.kind, b.name + b.kind))
        for a, b in itertools.combinations(moving, 2)
        if a.weight != b.weight or ("[" in a.name and "[" in b.name)
        if change((a, 1 + SCALE), (b, 1 / (1 + SCALE))) < NONE
    }
    return zero, pairs


def expected_regimes(net, zero, pairs):
    """The regime of each matrix, by the definition in the documents."""
    found = {}
    partnered = set().union(*pairs) if pairs else set()
    for weight in dict.fromkeys(end.weight for end in layer_ends(net)):
        if net.get_parameter(weight).ndim < 2:
            continue
        own = [end for end in layer_ends(net) if end.weight == weight]
        sides = {end.kind: [e.name + e.kind for e in own if e.kind == end.kind] for end in own}
        if any(all(name in zero for name in names) for names in sides.values()):
            found[weight] = Regime.SCALE_INVARIANT
        elif any(all(name in partnered for name in names) for names in sides.values()):
            found[weight] = Regime.HOMOGENEOUS
        else:
            found[weight] = Regime.OTHER
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETWORKS)
def test_regimes_and_groups_agree_with_the_outputs_after_rescaling(name, seed):
    network, shape = NETWORKS[name]
    torch.manual_seed(seed)
    net = network()
    monitor = LowRankMonitor(gradient="step", spectral=None)
    data = make_data(samples=96, shape=shape, seed=seed)
    loader = torch.utils.data.DataLoader(data, batch_size=24, shuffle=True)
    make_trainer(callbacks=[monitor], max_steps=100, max_epochs=-1, log_every_n_steps=50).fit(
        make_classifier(net), loader
    )
    found = {weight.removeprefix("net."): regime for weight, regime in monitor.regimes().items()}
    zero, pairs = truth(net, data.tensors[0])
    assert {weight: regime.regime for weight, regime in found.items()} == expected_regimes(net, zero, pairs)
    tracker = monitor._optimizers[0].regimes
    groups = [[tracker.ends[i] for i in group] for group in tracker._found.groups()]
    found_pairs = {
        frozenset((a.name + a.kind, b.name + b.kind))
        for group in groups
        for a, b in itertools.combinations(group, 2)
        if a.weight != b.weight or ("[" in a.name and "[" in b.name)
    }
    assert {frozenset(name.replace("net.", "") for name in pair) for pair in found_pairs} == pairs


def test_the_truth_knows_what_it_should():
    torch.manual_seed(0)
    zero, pairs = truth(batch_norm(), make_data(samples=96, shape=(2, 5, 5)).tensors[0])
    assert {"0.weightboth", "3.weightin"} <= zero
    assert frozenset(("7.weight with 7.biasout", "9.weightin")) in pairs
    _, pairs = truth(Residual(), make_data().tensors[0])
    assert pairs == {
        frozenset((f"{a}.weightboth", f"{b}.weightboth"))
        for a, b in (("first", "last"), ("up", "down"), ("up2", "down2"))
    }


def test_regimes_are_said_once_with_their_evidence(caplog):
    logger = RowLogger()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(logger=logger, callbacks=[LowRankMonitor()], max_epochs=8, log_every_n_steps=1).fit(
            make_classifier(mlp()), torch.utils.data.DataLoader(make_data(), batch_size=8)
        )
    assert caplog.text.count("regimes of the layers") == 1
    assert (
        "net.0.weight: homogeneous: trades a factor with net.2.weight, net.4.weight (equal in 20 steps)" in caplog.text
    )


def test_named_groups_take_part_as_they_are():
    logger = RowLogger()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    monitor = LowRankMonitor(groups={"mine": ["net.?.weight"]})
    make_trainer(logger=logger, callbacks=[monitor]).fit(
        make_classifier(net), torch.utils.data.DataLoader(make_data(), batch_size=8)
    )
    row = logger.ours()[-1][1]
    norms = [row[f"lowrank/frobenius_norm/net.{layer}.weight"] for layer in (0, 2)]
    assert row["lowrank/norm_spread"] == pytest.approx(max(norms) / min(norms))
    # GELU is not homogeneous, and the named group shows it.
    assert row["lowrank/homogeneity_defect"] > 1e-3
