"""Measure what the monitor costs, next to what a step costs anyway.

    python benchmarks/step_cost.py

Every contender runs once per round, in turn, so that whatever else the machine does meets all of them; the table has
the medians over the rounds. Writes benchmarks/results/step_cost.json and .md.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from models import GPT, machine
from torch import nn
from torchvision.models import ResNet, resnet18

from lightning_lowrank.callbacks._optimizer import OptimizerMonitor, Settings
from lightning_lowrank.callbacks._window import GradientWindow
from lightning_lowrank.callbacks.monitor import _STEPS_PER_ROW_BESIDE_WINDOWS
from lightning_lowrank.functional._tensors import accumulate_products, inner_products
from lightning_lowrank.sampling import Draws, Sampling, Step

RESULTS = Path(__file__).parent / "results"

Contenders = dict[str, Callable[[], object]]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 blocks": lambda: GPT().blocks,
    "ResNet-18": resnet18,
}


def contenders(model: nn.Module) -> Contenders:
    """What is timed, by name: one line each. Gradients are there, and stay."""
    weights = list(model.parameters())
    if isinstance(model, ResNet):
        # Real gradients: the monitor treats a convolution in front of a normalisation in its own way.
        inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        nn.functional.cross_entropy(model(inputs), targets).backward()
    else:
        for weight in weights:
            weight.grad = torch.randn_like(weight) * 1e-3
    grads = [weight.grad for weight in weights if weight.grad is not None]
    sums = [torch.zeros_like(weight) for weight in weights]
    # A step too small to move the weights, so that every round sees the same ones.
    optimizer = torch.optim.SGD(weights, lr=1e-12, weight_decay=1e-4)
    pairs = list(zip(weights, grads, strict=True))
    in_step = monitor_of(model, optimizer)
    in_window = monitor_of(model, optimizer, windowed=True)
    every: Contenders = {
        "measured step": lambda: measure(in_step, model),
        "row without spectra": lambda: measure(in_step, model, in_full=True),
        "step in a window": lambda: measure(in_window, model, drawn=Step(64)),
        "products": lambda: inner_products(pairs, exact=False),
        "products, exact": lambda: inner_products(pairs),
        "accumulate": lambda: accumulate_products(weights, grads, sums, 0.5),
        "SGD.step": optimizer.step,
        "sum()": lambda: sum(weight.detach().sum() for weight in weights) + sum(grad.sum() for grad in grads),
    }
    if isinstance(model, ResNet):
        every["training step"] = training_step(resnet18(num_classes=10))
    return every


def monitor_of(model: nn.Module, optimizer: torch.optim.Optimizer, *, windowed: bool = False) -> OptimizerMonitor:
    """The monitor's part for one optimizer, past the first steps in which it looks for rescaling groups."""
    window = None
    if windowed:
        window = GradientWindow(size=10**9)
        window._consider(Sampling(Draws.WITH_REPLACEMENT, math.inf, 10**9, 10**9, Step(64), Step(64)), model)
    monitor = OptimizerMonitor(
        optimizer, Settings(spectral=None), "window" if windowed else None, torch.finfo(torch.float32).eps, window
    )
    monitor.name_layers(model)
    for _ in range(21):
        measure(monitor, model, drawn=Step(64) if windowed else None)
    return monitor


def measure(
    monitor: OptimizerMonitor, model: nn.Module, *, in_full: bool = False, drawn: Step | None = None
) -> dict[str, float]:
    """What the callback does in ``on_before_optimizer_step`` once a step is due."""
    return monitor.step(monitor.view(model, 1.0), whole=False, in_full=in_full, spectra=None, drawn=drawn)


def share_of_training(times: dict[str, float], interval: int = 50) -> float:
    """Of a run with ``gradient="window"`` and Lightning's logging interval, at the defaults: one window in seven."""
    window = GradientWindow(size=500)
    window._consider(Sampling(Draws.WITH_REPLACEMENT, math.inf, 1, 1), resnet18())
    busy = window.size / (window.size + window.rest)
    outside = times["measured step"] * (_STEPS_PER_ROW_BESIDE_WINDOWS - 1) / interval
    rows = times["row without spectra"] / interval
    return (busy * times["step in a window"] + (1 - busy) * outside + rows) / times["training step"]


def training_step(model: nn.Module, batch: int = 64, pixels: int = 32) -> Callable[[], object]:
    """Forward, backward and SGD on one batch of small images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=1e-4)
    inputs, targets = torch.randn(batch, 3, pixels, pixels), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def medians(every: Contenders, rounds: int) -> dict[str, float]:
    """Median time of each contender in milliseconds, over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in every}
    for name in list(every) * (rounds + 1):
        start = time.perf_counter()
        every[name]()
        times[name].append((time.perf_counter() - start) * 1e3)
    # The first round allocates and wakes threads.
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """The times of all models, and each contender's share of the step, the sum and the training step."""
    lines = ["| model | contender | ms | / SGD.step | / sum() | / training step |", "|---|---|---|---|---|---|"]
    for model, times in results.items():
        for name, value in times.items():
            shares = [
                f"{value / times[unit]:.2f}" if unit in times else "" for unit in ("SGD.step", "sum()", "training step")
            ]
            lines.append(f"| {model} | {name} | {value:.2f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(rounds: int = 21, threads: int = 2) -> None:
    """Time all contenders on all models.

    Args:
        rounds: Interleaved rounds per model.
        threads: Threads torch may use.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = {name: medians(contenders(make()), rounds) for name, make in MODELS.items()}
    setting = machine(rounds=rounds)
    title = ", ".join(f"{key}: {value}" for key, value in setting.items())
    share = share_of_training(results["ResNet-18"])
    summary = f"ResNet-18 at batch 64, gradient='window' at the defaults: {share:.2%} of training"
    text = f"{title}\n\n{table(results)}\n\n{summary}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_cost.md").write_text(text)
    (RESULTS / "step_cost.json").write_text(json.dumps({**setting, "milliseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
