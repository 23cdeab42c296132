"""The set-ups in which every logged value is recomputed, and the independent recomputation.

`python -m tests.callbacks.matrix` prints the table of docs/matrix.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import mlp

MODES = ("step", "window", "full")
LR, WD, MOMENTUM = 1e-3, 1e-2, 0.9
WINDOW, INTERVAL, BATCH, SAMPLES = 5, 4, 8, 24


def sgd(parameters: Any, **options: Any) -> Any:
    return torch.optim.SGD(parameters, **({"lr": LR, "momentum": MOMENTUM, "weight_decay": WD} | options))


def grouped(parameters: Any) -> Any:
    """Matrices decayed in two different ways, vectors not at all."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices[:1], "weight_decay": 1e-1},
        {"params": matrices[1:], "weight_decay": 1e-3},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return sgd([group for group in groups if group["params"]])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8, bias=False),
        nn.ReLU(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


def tied_and_frozen() -> nn.Module:
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)), nn.ReLU(), nn.Linear(6, 3, bias=False))
    net[1].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    return net


def parametrized() -> nn.Module:
    net = mlp()
    weight_norm(net[2])
    return net


@dataclass
class Setup:
    """One way to train.

    Attributes:
        says: For the table in the documents.
        net: Makes the network; seeded by the caller.
        shape: Of one input.
        optimizer: Takes the parameters.
        trainer: Options of the Trainer; called, as callbacks and plugins are good for one run.
        monitor: Options of the monitor.
        accumulate: Batches per step.
        invariant: Weights that feed a normalisation, and what is scaled with them.
        groups: Bias-free weights that trade a factor.
        decay: "coupled", "decoupled" or "none".
        rtol: Relative accuracy of the recomputation from the same gradients.
        iterated: Whether there are matrices too large for exact spectra.
        loss: Adds to the loss.
        modes: In which gradient modes it is run.
    """

    says: str
    net: Callable[[], nn.Module] = mlp
    shape: tuple[int, ...] = (6,)
    optimizer: Callable[[Any], Any] = sgd
    trainer: Callable[[], dict[str, Any]] = dict
    monitor: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    invariant: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = (("0", "2", "4"),)
    decay: str = "coupled"
    rtol: float = 1e-4
    iterated: bool = False
    loss: Callable[[Any], Any] | None = None
    modes: tuple[str, ...] = MODES
    momentum: float = MOMENTUM


def amp() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=1024.0))]}


SETUPS = {
    "sgd": Setup("SGD with momentum, bias-free MLP"),
    "groups": Setup("parameter groups with different decay, some with none", optimizer=grouped),
    "biases": Setup("biased MLP", net=lambda: mlp(bias=True), groups=()),
    "wide": Setup("layers whose spectra are iterated", net=lambda: mlp((6, 300, 200, 3)), iterated=True),
    "batch norm": Setup(
        "convolution and BatchNorm", net=cnn, shape=(2, 5, 5), invariant=("net.0.weight",),
        groups=(("1.weight+net.1.bias", "4", "6"),),
    ),
    "transformer": Setup("transformer with LayerNorm, GELU and biases", net=Transformer, shape=(5, 4), groups=()),
    "clipping": Setup("gradient clipping", trainer=lambda: {"gradient_clip_val": 1e-3}),
    "accumulation": Setup("accumulation over 3 batches", accumulate=3),
    "accumulation, partial": Setup("accumulation over 2 of 3 batches, last window cut short", accumulate=2),
    "nesterov": Setup("Nesterov momentum", optimizer=lambda p: sgd(p, nesterov=True)),
    "maximize": Setup(
        "maximize=True", optimizer=lambda p: sgd(p, maximize=True), loss=lambda net: -1, modes=("step", "window")
    ),
    "adam": Setup("coupled Adam", optimizer=lambda p: torch.optim.Adam(p, lr=1e-4, weight_decay=WD), momentum=math.nan),
    "adamw": Setup(
        "AdamW", optimizer=lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), decay="decoupled", momentum=0.0,
        trainer=lambda: {"precision": "64-true"},
    ),
    "adamw, clipped": Setup(
        "AdamW with clipping", optimizer=lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), decay="decoupled",
        momentum=0.0, trainer=lambda: {"precision": "64-true", "gradient_clip_val": 1e-2},
    ),
    "no decay": Setup("SGD without decay", optimizer=lambda p: sgd(p, weight_decay=0.0), decay="none"),
    "loss penalty": Setup(
        "a penalty written into the loss",
        optimizer=lambda p: sgd(p, weight_decay=0.0), monitor={"loss_penalty": WD},
        loss=lambda net: WD / 2 * sum(p.square().sum() for p in net.parameters()),
    ),
    "weight_decay=": Setup(
        "weight_decay= in place of the optimizer's",
        optimizer=lambda p: sgd(p, weight_decay=1e-5), monitor={"weight_decay": WD},
    ),
    "amp": Setup("float16 autocast with a gradient scaler", trainer=amp, rtol=2e-3, modes=("step", "window")),
    "amp, fused": Setup(
        "the same with a fused optimizer, which unscales by itself", trainer=amp, rtol=2e-3,
        optimizer=lambda p: sgd(p, fused=True), modes=("step", "window"),
    ),
    "bfloat16": Setup("bfloat16 autocast", trainer=lambda: {"precision": "bf16-mixed"}, modes=("step", "window")),
    "float64": Setup("float64 throughout", trainer=lambda: {"precision": "64-true"}),
    "compiled": Setup("torch.compile", net=lambda: torch.compile(mlp(), backend="eager")),
    "tied, frozen": Setup("tied and frozen weights", net=tied_and_frozen, groups=()),
    "parametrized": Setup(
        "weight_norm", net=parametrized, invariant=("net.2.parametrizations.weight.original1",),
        groups=(("0", "4", "2.parametrizations.weight.original0"),),
    ),
    "stochastic weight averaging": Setup(
        "StochasticWeightAveraging", trainer=lambda: {"callbacks": [StochasticWeightAveraging(LR, 2)]}
    ),
    "accumulation schedule": Setup(
        "GradientAccumulationScheduler", trainer=lambda: {"callbacks": [GradientAccumulationScheduler({3: 3})]},
        modes=("step",),
    ),
    "schedule": Setup("a learning rate schedule", optimizer=lambda p: scheduled(p)),
}  # fmt: skip


def scheduled(parameters: Any) -> Any:
    optimizer = sgd(parameters)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


def loader(setup: Setup, mode: str) -> DataLoader:
    """Inputs that differ little, so that a window's estimate is no noise; unshuffled where a pass is recomputed."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(setup.shape, generator=generator) + 0.3 * torch.randn(
        SAMPLES, *setup.shape, generator=generator
    )
    return DataLoader(
        TensorDataset(inputs, torch.zeros(SAMPLES, dtype=torch.long)), batch_size=BATCH, shuffle=mode != "full"
    )


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy().copy()


@dataclass
class Seen:
    """One optimizer step as a callback sees it that shares nothing with the monitor."""

    step: int
    epoch: int
    weights: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    decay: dict[str, float]
    lr: float
    part: float
    after: dict[str, np.ndarray] = field(default_factory=dict)


class Recorder(lightning.pytorch.Callback):
    """Weights and gradients of every step in float64, and the full-batch gradient at every epoch's end."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.steps: list[Seen] = []
        self.full: list[dict[str, np.ndarray]] = []
        self.at_full: list[dict[str, np.ndarray]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = scaler.get_scale() if scaler is not None and fused else 1.0
        names = {id(p): name.replace("_orig_mod.", "") for name, p in pl_module.named_parameters()}
        seen = Seen(len(self.steps), trainer.current_epoch, {}, {}, {}, optimizer.param_groups[0]["lr"], 1.0)
        batches = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches + 1
        seen.part = batches / trainer.accumulate_grad_batches
        for group in optimizer.param_groups:
            sign = -1 if group.get("maximize") else 1
            for p in group["params"]:
                if p.grad is not None:
                    seen.weights[names[id(p)]] = wide(p)
                    seen.grads[names[id(p)]] = sign * wide(p.grad) / scale
                    seen.decay[names[id(p)]] = group["weight_decay"]
        self.steps.append(seen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.steps and not self.steps[-1].after:
            parameters = {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters()}
            self.steps[-1].after = {name: wide(parameters[name]) for name in self.steps[-1].weights}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        net = copy.deepcopy(getattr(pl_module.net, "_orig_mod", pl_module.net)).double().train()
        net.zero_grad()
        batches = list(trainer.fit_loop._combined_loader.flattened[0])
        for inputs, labels in batches:
            loss = nn.functional.cross_entropy(net(inputs.double()), labels)
            (loss * len(labels) / SAMPLES).backward()
        self.full.append({f"net.{n}": wide(p.grad) for n, p in net.named_parameters() if p.grad is not None})
        self.at_full.append({f"net.{n}": wide(p) for n, p in net.named_parameters() if p.grad is not None})


def dot(a: dict[str, np.ndarray], b: dict[str, np.ndarray], names: Any) -> float:
    return float(sum((a[name] * b[name]).sum() for name in names))


def stationarity(w: dict, g: dict, wd: dict, names: list[str]) -> dict[str, float]:
    """The formulas by definition, over the decayed ones of these parameters."""
    names = [name for name in names if wd[name] > 0]
    if not names:
        return {"alignment": math.nan, "residual": math.nan, "radial_balance": math.nan}
    pull = {name: wd[name] * w[name] for name in names}
    force = {name: g[name] + pull[name] for name in names}
    size = math.sqrt(dot(pull, pull, names))
    return {
        "alignment": -dot(pull, g, names) / size / math.sqrt(dot(g, g, names)),
        "residual": math.sqrt(dot(force, force, names)) / size,
        "radial_balance": -dot(w, g, names) / dot(w, pull, names),
    }


class Oracle:
    """What the monitor should log, from what the recorder saw, in numpy and float64."""

    def __init__(self, setup: Setup, recorder: Recorder) -> None:
        self.setup, self.recorder = setup, recorder
        self.penalty = setup.monitor.get("loss_penalty", 0.0)
        self.override = setup.monitor.get("weight_decay")

    def decays(self, seen: Seen) -> dict[str, float]:
        own = seen.decay if self.override is None else dict.fromkeys(seen.decay, self.override)
        return {name: value + self.penalty for name, value in own.items()}

    def data(self, seen: Seen) -> dict[str, np.ndarray]:
        return {name: g - self.penalty * seen.weights[name] for name, g in seen.grads.items()}

    def comparable(self, seen: Seen) -> list[str]:
        return [name for name in seen.weights if name not in self.setup.invariant]

    def tau(self, until: int) -> float:
        rate = [
            min((s.lr * wd for wd in self.decays(s).values() if wd > 0), default=0.0) / (1 - self.setup.momentum)
            for s in self.recorder.steps[:until]
        ]
        return float(sum(rate))

    def row(self, layers: bool, step: int, measured: list[int]) -> dict[str, float]:
        """The row of optimizer step ``step``.

        ``measured``: the steps since the last row that were measured."""
        seen = self.recorder.steps[step]
        w, g, wd = seen.weights, self.data(seen), self.decays(seen)
        matrices = [name for name in w if w[name].ndim > 1]
        values: dict[str, float] = {}
        if self.setup.decay != "decoupled":
            now = stationarity(w, g, wd, self.comparable(seen))
            values |= {"alignment_minibatch": now["alignment"], "residual_minibatch": now["residual"]}
            balances = [
                stationarity(s.weights, self.data(s), self.decays(s), self.comparable(s))["radial_balance"]
                for s in (self.recorder.steps[i] for i in measured)
            ]
            values["radial_balance"] = float(np.mean(balances))
            values["radial_balance_stderr"] = (
                float(np.std(balances, ddof=1)) / math.sqrt(len(balances)) if len(balances) > 1 else math.nan
            )
            values["scale_invariant_balance"] = self.invariant_balance(measured)
        else:
            u = {name: ((1 - seen.lr * wd[name]) * w[name] - seen.after[name]) / seen.lr for name in w}
            now = stationarity(seen.after, u, wd, list(w))
            values |= {"update_alignment": now["alignment"], "update_residual": now["residual"]}
            values["linf_decay"] = max(wd[name] * np.abs(seen.after[name]).max() for name in w)
        products = {name: (w[name] * g[name]).sum() for name in matrices}
        norms = {name: np.linalg.norm(w[name]) for name in matrices}
        # What a parametrisation makes a weight from is not the matrix that the network uses.
        spectral = [name for name in matrices if "parametrizations" not in name]
        top = {name: np.linalg.svd(w[name].reshape(len(w[name]), -1), compute_uv=False)[0] for name in spectral}
        values["implied_weight_decay"] = -sum(products.values()) / sum(n**2 for n in norms.values())
        values["stable_rank"] = float(np.mean([(norms[name] / top[name]) ** 2 for name in spectral]))
        values["spectral_ratio"] = float(np.mean([top[name] / norms[name] for name in spectral]))
        values["spectral_age"] = 0.0
        values["cumulative_decay"] = tau = self.tau(step)
        rate = self.tau(step + 1) - tau
        values["steps_to_stationarity"] = max(0.0, (math.log(100) - tau) / rate) if rate > 0 else math.nan
        values |= self.norms(step, tau)
        for name in matrices:
            if layers:
                cosine = -products[name] / norms[name] / np.linalg.norm(g[name])
                values[f"alignment_minibatch/{name}"] = cosine if wd[name] > 0 else math.nan
            values[f"implied_weight_decay/{name}"] = -products[name] / norms[name] ** 2
            values[f"frobenius_norm/{name}"] = norms[name]
        for name in spectral:
            values[f"spectral_norm/{name}"] = top[name]
            values[f"stable_rank/{name}"] = (norms[name] / top[name]) ** 2
        return values

    def invariant_balance(self, measured: list[int]) -> float:
        found: dict[str, list[float]] = {}
        for s in (self.recorder.steps[i] for i in measured):
            for name in self.setup.invariant:
                wd = self.decays(s)[name]
                if wd > 0:
                    ratio = np.linalg.norm(s.grads[name]) ** 2 / np.linalg.norm(s.weights[name]) ** 2
                    found.setdefault(name, []).append(ratio * s.lr / (1 - self.setup.momentum) / (2 * wd))
        return float(np.mean([np.mean(values) for values in found.values()])) if found else math.nan

    def norms(self, step: int, tau: float) -> dict[str, float]:
        """Over the groups that the set-up names; nothing is said where it names none."""
        if not self.setup.groups:
            return {}
        known = self.recorder.steps[step].weights
        [group] = [
            [[part if part in known else f"{part}.weight" for part in f"net.{end}".split("+")] for end in group]
            for group in self.setup.groups
        ]
        seen, first = self.recorder.steps[step], self.recorder.steps[0]
        wd = self.decays(seen)
        uniform = len({wd[part] for end in group for part in end}) == 1

        def squares(at: Seen, weighted: bool) -> list[float]:
            return [
                float(sum((wd[part] if weighted else 1) * (at.weights[part] ** 2).sum() for part in end))
                for end in group
            ]

        now = squares(seen, not uniform)
        values = {"norm_spread": math.sqrt(max(now) / min(now))}
        if not uniform:
            return values | {"norm_gap": math.nan, "norm_gap_predicted": math.nan}
        begun = squares(first, False)
        low, high = begun.index(min(begun)), begun.index(max(begun))
        values["norm_gap"] = abs(now[high] - now[low])
        values["norm_gap_predicted"] = (begun[high] - begun[low]) * math.exp(-2 * tau) if tau == tau else math.nan
        if self.setup.decay == "decoupled":
            values["norm_gap_predicted"] = math.nan
        return values

    def window(self, last: int, steps_per_epoch: int) -> dict[str, float]:
        """theory: |G|^2 = (|sum g|^2 - c sum |g|^2) / (K^2 - c K), c = sum_e k_e (M - k_e) / (M - 1) / K."""
        window = self.recorder.steps[last - WINDOW + 1 : last + 1]
        wd = self.decays(window[-1])
        epochs = [s.epoch for s in window]
        m = steps_per_epoch
        c = sum(epochs.count(e) * (m - epochs.count(e)) for e in set(epochs)) / (m - 1) / WINDOW if m > 1 else 0.0

        def estimate(names: list[str]) -> dict[str, float]:
            names = [name for name in names if wd[name] > 0]
            if not names:
                return {"alignment": math.nan, "residual": math.nan}
            grads = [self.data(s) for s in window]
            total = {name: sum(g[name] for g in grads) for name in names}
            single = sum(dot(g, g, names) for g in grads)
            squared = (dot(total, total, names) - c * single) / (WINDOW**2 - c * WINDOW)
            pull = float(
                np.mean(
                    [
                        sum(wd[n] * (s.weights[n] * g[n]).sum() for n in names)
                        for s, g in zip(window, grads, strict=True)
                    ]
                )
            )
            size = sum(wd[n] ** 2 * (window[-1].weights[n] ** 2).sum() for n in names)
            return {
                "alignment": -pull / math.sqrt(size * squared),
                "residual": math.sqrt(max(0.0, squared + 2 * pull + size) / size),
            }

        values = estimate(self.comparable(window[-1]))
        for name in (n for n, w in window[-1].weights.items() if w.ndim > 1):
            values[f"alignment/{name}"] = estimate([name])["alignment"]
        return values

    def full(self, epoch: int) -> dict[str, float]:
        wd = self.decays(self.recorder.steps[0])
        w, g = self.recorder.at_full[epoch], self.recorder.full[epoch]
        names = [name for name in wd if name in g]
        found = stationarity(w, g, wd, [name for name in names if name not in self.setup.invariant])
        values = {key: found[key] for key in ("alignment", "residual")}
        values |= {"alignment_stderr": 0.0, "residual_stderr": 0.0} if any(wd.values()) else {}
        for name in (n for n in names if w[n].ndim > 1):
            cosine = -(w[name] * g[name]).sum() / np.linalg.norm(w[name]) / np.linalg.norm(g[name])
            values[f"alignment/{name}"] = cosine if wd[name] > 0 else math.nan
        return values


def table() -> str:
    """The set-ups as a Markdown table."""
    lines = ["| set-up | step | window | full |", "|---|---|---|---|"]
    for setup in SETUPS.values():
        marks = " | ".join("yes" if mode in setup.modes else "-" for mode in MODES)
        lines.append(f"| {setup.says} | {marks} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
