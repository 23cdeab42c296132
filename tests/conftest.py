"""Shared modules and trainers. Everything is tiny, seeded and on the CPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank._compat import NAMESPACES

torch.set_num_threads(2)
# W&B reads it when it is first used in a process: later WandbLogger(offline=True) alone would go unheard.
os.environ["WANDB_MODE"] = "offline"

# What other libraries say about themselves in every run; none of it is ours to mend.
FOREIGN_WARNINGS = (
    "does not have many workers",
    "LeafSpec",
    "logging interval",
    "Starting from v1.9.0, `tensorboardX`",
    "GPU available but not used",
    "training_step. returned .None",
)


@contextmanager
def foreign_warnings_ignored() -> Iterator[None]:
    """For fixtures of a module; tests have it by themselves."""
    with warnings.catch_warnings():
        for message in FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


@pytest.fixture(autouse=True)
def _foreign_warnings():
    with foreign_warnings_ignored():
        yield


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Whatever a Trainer writes without being told where lands in tmp_path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=NAMESPACES, ids=lambda namespace: namespace.__name__)
def namespace(request) -> Any:
    return request.param


def make_classifier(net: nn.Module, namespace: Any = lightning.pytorch, optimizer: Any = None) -> Any:
    """A LightningModule around a network that maps inputs to logits; ``optimizer`` takes the parameters."""

    class Classifier(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def test_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.log("test_loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("test_acc", (logits.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters()) if optimizer else sgd(self.parameters())

    return Classifier()


def make_two_optimizers(namespace: Any = lightning.pytorch) -> Any:
    """Two networks under manual optimization, each with an SGD of its own."""

    class Two(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = mlp(seed=0), mlp(seed=1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [sgd(net.parameters()) for net in (self.one, self.two)]

    return Two()


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def mlp(sizes: tuple[int, ...] = (6, 16, 12, 3), bias: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_data(samples: int = 24, shape: tuple[int, ...] = (6,), classes: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(classes, (samples,), generator=generator))


def make_loader(batch_size: int = 8, shuffle: bool = False, **data: Any) -> DataLoader:
    return DataLoader(make_data(**data), batch_size=batch_size, shuffle=shuffle)


def make_trainer(namespace: Any = lightning.pytorch, **options: Any) -> Any:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return namespace.Trainer(**{**defaults, **options})


class RowLogger(lightning.pytorch.loggers.Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def ours(self, prefix: str = "lowrank/") -> list[tuple[int | None, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(key.startswith(prefix) for key in row)]


def wandb_records(run: Any) -> list[dict[str, Any]]:
    """Everything that a finished offline run wrote, read back by W&B's own command."""
    folder = Path(run.dir).parent
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]
