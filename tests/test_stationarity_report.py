"""measure_stationarity against float64 oracles, and the report that it returns."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import StationarityReport, measure_stationarity
from tests.conftest import RowLogger, make_classifier, make_data, make_loader, make_trainer, mlp, sgd

DECAY = 1e-2


def measure(module, loader, **options):
    return measure_stationarity(module, loader, progress=False, **options)


def full_gradient(net, data):
    """The gradient of the mean loss over all samples in one batch, float64."""
    inputs, labels = data.tensors
    loss = nn.functional.cross_entropy(net(inputs), labels)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def doubled(data):
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def truth(weights, gradients, decay=DECAY):
    w, g = flat(weights), flat(gradients)
    return {
        "alignment": (-(w @ g) / w.norm() / g.norm()).item(),
        "residual": ((g + decay * w).norm() / (decay * w).norm()).item(),
        "radial_balance": (-(w @ g) / (decay * w @ w)).item(),
    }


def descend(net, data, steps, decay=DECAY, lr=0.5):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        for p, g in zip(net.parameters(), full_gradient(net, data), strict=True):
            p.grad = g
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("trained", [0, 300])
def test_full_batch_values_are_those_of_the_oracle_with_an_unequal_last_batch(trained):
    net, data = mlp().double(), doubled(make_data(samples=50))
    descend(net, data, trained)
    report = measure(make_classifier(net), DataLoader(data, batch_size=8))
    gradients = full_gradient(net, data)
    for key, value in truth(net.parameters(), gradients).items():
        assert getattr(report, key) == pytest.approx(value, rel=1e-9), key
        assert getattr(report, f"{key}_interval") == (getattr(report, key),) * 2
    assert (report.samples, report.stochastic, report.weight_decay) == (50, False, DECAY)
    for layer, w, g in zip(report.layers, net.parameters(), gradients, strict=True):
        pull, sigma = -(w * g).sum().item(), torch.linalg.svdvals(w)
        assert layer.frobenius_norm == pytest.approx(w.norm().item())
        expected = math.sqrt(pull / DECAY) if pull > 0 else math.nan
        assert layer.predicted_norm == pytest.approx(expected, nan_ok=True)
        assert layer.implied_weight_decay == pytest.approx(pull / w.square().sum().item())
        assert layer.alignment == pytest.approx(pull / (w.norm() * g.norm()).item())
        assert layer.spectral_norm == pytest.approx(sigma[0].item())
        assert layer.stable_rank == pytest.approx((w.norm() / sigma[0]).item() ** 2)
        assert layer.regime == "homogeneous"
    norms = [layer.frobenius_norm for layer in report.layers]
    assert report.norm_spread == pytest.approx(max(norms) / min(norms))
    assert report.homogeneity_defect < 1e-12


def test_at_a_converged_net_predicted_norms_are_the_norms_and_equal():
    # Linear: a ReLU's kinks hold a network at points where the gradient does not vanish.
    net = nn.Sequential(*(layer for layer in mlp() if isinstance(layer, nn.Linear))).double()
    data = doubled(make_data(samples=24))
    descend(net, data, 2000, decay=0.02, lr=0.1)
    report = measure(make_classifier(net), DataLoader(data, batch_size=5), weight_decay=0.02)
    assert report.alignment == pytest.approx(1, abs=1e-6)
    assert report.radial_balance == pytest.approx(1, abs=1e-3)
    assert report.residual < 1e-3
    assert report.norm_spread == pytest.approx(1, abs=1e-4)
    predicted = [layer.predicted_norm for layer in report.layers]
    assert predicted == pytest.approx([layer.frobenius_norm for layer in report.layers], rel=1e-3)
    assert predicted == pytest.approx([predicted[0]] * 3, rel=1e-6)
    assert predicted[0] > 0.5


def test_a_penalty_within_the_loss_counts_as_decay_and_not_as_data():
    net, data = mlp().double(), doubled(make_data(samples=24))
    module = make_classifier(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    plain = module.training_step
    module.training_step = lambda batch, batch_idx: plain(batch, batch_idx) + 0.02 * flat_square(net)
    report = measure(module, DataLoader(data, batch_size=5), loss_penalty=0.04)
    for key, value in truth(net.parameters(), full_gradient(net, data), 0.04).items():
        assert getattr(report, key) == pytest.approx(value, rel=1e-9), key
    assert {layer.regime for layer in report.layers} == {"homogeneous"}


def flat_square(net):
    return sum(p.square().sum() for p in net.parameters())


def test_with_dropout_the_intervals_cover_the_average_of_many_passes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3, bias=False)).double()
    data = doubled(make_data(samples=64))
    report = measure(make_classifier(net), DataLoader(data, batch_size=8))
    passes = [full_gradient(net, data) for _ in range(1000)]
    average = [torch.stack(each).mean(0) for each in zip(*passes, strict=True)]
    assert report.stochastic
    for key, value in truth(net.parameters(), average).items():
        low, high = getattr(report, f"{key}_interval")
        assert low <= value <= high, key
        # One pass alone is off by about a standard error; an interval is four of them wide.
        spread = torch.tensor([truth(net.parameters(), one)[key] for one in passes]).std().item()
        assert 0 < high - low < 8 * spread, key


def test_scale_invariant_layers_are_left_out():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    data = doubled(make_data(samples=48, shape=(1, 6, 6)))
    loader = DataLoader(data, batch_size=8)
    report = measure(make_classifier(net), loader)
    assert [layer.regime for layer in report.layers] == ["scale-invariant", "other"]
    losses = [nn.functional.cross_entropy(net(x), y) for x, y in loader]
    last = list(net[-1].parameters())
    gradients = torch.autograd.grad(sum(losses) / len(losses), last)
    assert report.alignment == pytest.approx(truth(last, gradients)["alignment"], rel=1e-9)
    assert any("scale-invariant" in note and "net.0.weight" in note for note in report.notes)
    assert math.isnan(report.spectral_ratio_bound)


def networks():
    yield mlp((6, 16, 12, 3)), (6,)
    yield mlp((6, 40, 30, 20, 3), seed=1), (6,)
    conv = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6, 3, bias=False),
    )
    yield conv, (1, 8, 8)
    # One filter that is all of rank one: the bound is met up to the convolutions' factors.
    thin = mlp((6, 1, 1, 3), seed=3)
    for weight in thin.parameters():
        nn.init.ones_(weight)
    yield thin, (6,)


@pytest.mark.parametrize("index", range(4))
def test_the_bound_on_the_spectral_ratio_holds(index):
    net, shape = list(networks())[index]
    data = make_data(samples=30, shape=shape)
    report = measure(make_classifier(net), DataLoader(data, batch_size=8))
    net.eval()
    with torch.no_grad():
        stretch = (net(data.tensors[0]).norm(dim=1) / data.tensors[0].flatten(1).norm(dim=1)).max().item()
    weights = list(net.parameters())
    scale = math.prod(w.norm().item() * math.sqrt(w[0, 0].numel()) for w in weights)
    assert report.spectral_ratio_bound == pytest.approx((stretch / scale) ** (1 / len(weights)), rel=1e-5)
    assert 0 < report.spectral_ratio_bound <= report.spectral_ratio


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (mlp((6, 4, 3), bias=True), "has a bias"),
        (nn.Sequential(nn.Linear(6, 4, bias=False), nn.GELU(), nn.Linear(4, 3, bias=False)), "GELU"),
        (nn.ModuleList([nn.Linear(6, 3, bias=False)]), "not all in one nn.Sequential"),
    ],
)
def test_where_no_bound_is_known_a_note_says_why(net, why):
    module = make_classifier(net)
    if isinstance(net, nn.ModuleList):
        module.forward = lambda inputs: net[0](inputs)
    report = measure(module, make_loader())
    assert math.isnan(report.spectral_ratio_bound)
    assert any(why in note for note in report.notes)


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    module = make_classifier(net)

    def configure():
        net[0].requires_grad_(False)
        torch.rand(1)
        return sgd([p for p in net.parameters() if p.requires_grad])

    module.configure_optimizers = configure
    module.train()
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes, random = [m.training for m in module.modules()], torch.get_rng_state()
    report = measure(module, make_loader(shuffle=True))
    assert [layer.name for layer in report.layers] == ["net.4.weight"]
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in module.modules()]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert [p.grad for p in net.parameters()][1:] == [None] * 5
    assert module._trainer is None


def test_decay_of_a_finished_fit_is_taken_from_its_trainer():
    module = make_classifier(mlp())
    make_trainer(max_epochs=1).fit(module, make_loader())
    module.trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.125
    assert measure(module, make_loader()).weight_decay == 0.125


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: o,
        lambda o: [o],
        lambda o: ([o], []),
        lambda o: {"optimizer": o},
        lambda o: [{"optimizer": o}],
    ],
)
def test_weight_decay_comes_from_configure_optimizers_in_every_form(wrap):
    module = make_classifier(mlp())
    plain = module.configure_optimizers
    module.configure_optimizers = lambda: wrap(plain())
    assert measure(module, make_loader()).weight_decay == DECAY


def test_decoupled_decay_has_no_alignment_unless_a_penalty_is_given():
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.1))
    report = measure(module, make_loader())
    assert all(map(math.isnan, (report.alignment, report.residual, report.radial_balance, *report.alignment_interval)))
    assert any("AdamW" in note for note in report.notes)
    assert all(layer.frobenius_norm > 0 and math.isnan(layer.predicted_norm) for layer in report.layers)
    assert math.isfinite(measure(module, make_loader(), weight_decay=0.1).alignment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1}, "weight_decay must be 'auto' or a number of at least 0, got -1"),
        ({"weight_decay": "none"}, "weight_decay must be 'auto'"),
        ({"loss_penalty": math.nan}, "loss_penalty must be a number of at least 0, got nan"),
        ({"confidence": 95}, "confidence must be between 0 and 1, got 95"),
        ({"include": "nothing*"}, "widen include or exclude"),
    ],
)
def test_refuses_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        measure(make_classifier(mlp()), make_loader(), **options)


def test_refuses_what_has_no_single_weight_decay():
    module = make_classifier(mlp(), optimizer=lambda p: [sgd(list(p)[:1]), sgd([nn.Parameter(torch.ones(1))])])
    with pytest.raises(ValueError, match=r"has 2 optimizers instead of one; pass weight_decay="):
        measure(module, make_loader())
    module = make_classifier(mlp(), optimizer=lambda p: p.missing)
    with pytest.raises(ValueError, match=r"configure_optimizers\(\) of Classifier failed .*; pass weight_decay="):
        measure(module, make_loader())
    module = make_classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))
    with pytest.raises(ValueError, match="only minimised losses"):
        measure(module, make_loader())


def test_refuses_modules_and_data_without_a_pass():
    with pytest.raises(TypeError, match="needs a LightningModule, got Sequential"):
        measure(mlp(), make_loader())
    with pytest.raises(ValueError, match="no batch with a loss"):
        measure(make_classifier(mlp()), [])


@pytest.fixture
def report():
    found = measure(make_classifier(mlp((6, 4, 3), bias=True)), make_loader(samples=48))
    assert math.isnan(found.spectral_ratio_bound)
    return found


def test_a_saved_report_is_loaded_as_it_was(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    loaded = StationarityReport.load(path)
    # NaN differs from itself, but not its text.
    assert repr(loaded) == repr(report)
    assert json.loads(path.read_text())["spectral_ratio_bound"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_files_that_are_no_report_are_refused(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a stationarity report"):
        StationarityReport.load(path)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="is not a stationarity report"):
        StationarityReport.load(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99; this version reads 1"):
        StationarityReport.load(path)
    with pytest.raises(ValueError, match=r"saved as \.json"):
        report.save(tmp_path / "report.txt")


def test_the_table_has_intervals_in_words_and_a_row_per_matrix(report):
    text = str(StationarityReport(**{**vars(report), "alignment": 0.98, "alignment_interval": (0.971, 0.992)}))
    assert "0.980 [0.971, 0.992]" in text
    for layer in report.layers:
        assert layer.name in text
    assert all(f"Note: {note}"[:60] in text for note in report.notes)


def test_the_plot_has_two_bars_per_matrix(report):
    pytest.importorskip("matplotlib")
    figure, axes = report.plot()
    heights = [bar.get_height() for bar in axes.patches]
    expected = [layer.frobenius_norm for layer in report.layers] + [layer.predicted_norm for layer in report.layers]
    assert heights == pytest.approx(expected, nan_ok=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == [layer.name for layer in report.layers]
    assert figure.axes == [axes]


def test_loggers_get_finite_numbers_by_name(report):
    logger = RowLogger()
    report.log([logger], prefix="s")
    [(_, row)] = logger.rows
    assert row["s/alignment"] == report.alignment
    assert row["s/alignment_low"] == report.alignment_interval[0]
    assert row["s/frobenius_norm/net.0.weight"] == report.layers[0].frobenius_norm
    assert "s/spectral_ratio_bound" not in row
    assert all(map(math.isfinite, row.values()))


def test_heads_of_attention_pair_up_within_each_head():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs):
            return self.head(self.attention(inputs, inputs, inputs)[0].mean(1))

    torch.manual_seed(0)
    report = measure(make_classifier(Attention()), make_loader(samples=48, shape=(5, 8)))
    layers = {layer.name: layer for layer in report.layers}
    joint = layers["net.attention.in_proj_weight"]
    assert (joint.regime, layers["net.attention.out_proj.weight"].regime) == ("homogeneous", "homogeneous")
    for head in range(2):
        assert f"key, head {head}" in joint.evidence
        assert f"net.attention.out_proj.weight[head {head}]" in joint.evidence
