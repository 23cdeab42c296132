"""What a default LowRankMonitor takes of a training run's time, beside wandb.watch.

    pip install -e ".[bench]"
    python benchmarks/overhead.py

Trains a ResNet-18 on 3 x 32 x 32 images and a small GPT on text with a default Trainer, and measures the wall time
within our hooks from outside: every hook of the callback is timed. Beside it the same run under
``wandb.watch(log="all")`` in an offline run, at the Trainer's logging interval; its time is that of its histograms,
which its hooks compute in the forward and backward pass. Writes benchmarks/results/overhead.json and .md.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import auto_cli
from models import GPT, digits, machine, text
from spectra import watching
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_lowrank import LowRankMonitor

RESULTS = Path(__file__).parent / "results"
CONTEXT = 128


class Module(lightning.LightningModule):
    """A network with its optimizer."""

    def __init__(self, net: nn.Module, optimizer: functools.partial[Any]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, of every place of a text."""
        logits = self.net(batch[0])
        return cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        """The one that was given."""
        return self.optimizer(self.parameters())


def runs() -> dict[str, tuple[Any, functools.partial[Any], TensorDataset, int]]:
    """Network, optimizer, data and batch size of each run."""
    images, labels = digits()
    data = text()
    windows = data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    # As many samples as CIFAR-10 has, so that epochs have a usual length.
    repeated = TensorDataset(images.repeat(28, 1, 1, 1), labels.repeat(28))
    texts = TensorDataset(windows[:, :-1].repeat(8, 1), windows[:, 1:].repeat(8, 1))
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    adamw = functools.partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.1)
    return {
        "ResNet-18, batch 128": (functools.partial(resnet18, num_classes=10), sgd, repeated, 128),
        "GPT, 4.9 M, batch 16": (functools.partial(GPT, 256, 6, 8, CONTEXT), adamw, texts, 16),
    }


def timed(monitor: LowRankMonitor) -> list[float]:
    """Wrap all hooks of the callback; collects the seconds within."""
    spent: list[float] = []

    def wrap(hook: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return inner

    for name in dir(type(monitor)):
        if name.startswith("on_") or name in ("setup", "teardown"):
            setattr(monitor, name, wrap(getattr(monitor, name)))
    return spent


def fit(name: str, steps: int, *, monitored: bool) -> dict[str, float]:
    """Train with the monitor, or with wandb.watch; seconds in all and within it."""
    net, optimizer, data, batch = runs()[name]
    torch.manual_seed(0)
    module = Module(net(), optimizer)
    loader = DataLoader(data, batch_size=batch, shuffle=True)
    monitor = LowRankMonitor()
    spent = timed(monitor)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=lightning.pytorch.loggers.CSVLogger(folder),
            callbacks=[monitor] if monitored else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        if monitored:
            trainer.fit(module, loader)
        else:
            with watching(module, log_freq=50) as spent:
                trainer.fit(module, loader)
        whole = time.perf_counter() - start
    found = {"steps": steps, "seconds": whole, "within": sum(spent), "share": sum(spent) / whole}
    if monitored:
        for key in ("overhead", "spectral_age"):
            found[key] = float(trainer.callback_metrics.get(f"lowrank/{key}", torch.tensor(torch.nan)))
    return found


def main(steps: int = 400, threads: int = 2, only: str = "") -> None:
    """Measure all runs.

    Args:
        steps: Optimizer steps of each run.
        threads: Threads torch may use.
        only: Measure just the runs whose name contains it, and keep nothing.
    """
    torch.set_num_threads(threads)
    results = {
        name: {
            "LowRankMonitor()": fit(name, steps, monitored=True),
            'wandb.watch(log="all", log_freq=50)': fit(name, steps, monitored=False),
        }
        for name in runs()
        if only in name
    }
    lines = ["| run | with | steps | seconds | within it | share |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        for what, r in found.items():
            lines.append(
                f"| {name} | {what} | {steps} | {r['seconds']:.1f} | {r['within']:.3f} | {100 * r['share']:.2f} % |"
            )
    setting = machine()
    title = ", ".join(f"{key}: {value}" for key, value in setting.items())
    report = f"{title}\n\n" + "\n".join(lines) + "\n"
    print(report)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "overhead.md").write_text(report)
        (RESULTS / "overhead.json").write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
