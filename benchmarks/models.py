"""What the benchmarks measure on: networks, real data that every machine has, and what the machine is."""

from __future__ import annotations

import argparse
import inspect
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, scaled_dot_product_attention
from torchvision.models import resnet18

BYTES = 256


class Block(nn.Module):
    """One of GPT-2's blocks, with four matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention, then the feed-forward part."""
        batch, length, width = x.shape
        parts = self.attention(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """A byte-level language model of GPT-2's shape: 85 million parameters in the blocks at the defaults."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, context: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            # GPT-2's own initialisation.
            if parameter.ndim == 2:
                nn.init.normal_(
                    parameter, std=0.02 / ((2 * depth) ** 0.5 if "projection" in name or "down" in name else 1)
                )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next byte."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))


def text() -> Tensor:
    """Some hundred thousand bytes of Python's own library."""
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, json, platform))
    return torch.frombuffer(bytearray(source.encode()), dtype=torch.uint8).long()


def text_batch(count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of the text, and the same moved by one byte."""
    data = text()
    starts = torch.randint(len(data) - context - 1, (count,), generator=generator).tolist()
    windows = torch.stack([data[start : start + context + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, enlarged to CIFAR's 3 x 32 x 32."""
    inputs, labels = load_digits(return_X_y=True)
    images = torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return interpolate(images, scale_factor=4).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def trainers(seed: int = 0) -> dict[str, Callable[[], tuple[nn.Module, Callable[[], None]]]]:
    """For each model what makes it, with a function that takes one optimizer step on real data."""

    def of_resnet() -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(seed)
        model, generator = resnet18(num_classes=10), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        images, labels = digits()

        def step() -> None:
            chosen = torch.randint(len(images), (64,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()

        return model, step

    def of_gpt() -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(seed)
        model, generator = GPT(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)

        def step() -> None:
            inputs, targets = text_batch(4, 128, generator)
            optimizer.zero_grad()
            cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()

        return model, step

    return {"ResNet-18": of_resnet, "GPT-2 shape, 85 M": of_gpt}


def matrices_of(model: nn.Module) -> list[Tensor]:
    """The weights of two or more dimensions as matrices; of a GPT those of its blocks, 48 at the defaults."""
    inner = model.blocks if isinstance(model, GPT) else model
    return [p.detach().flatten(1) for p in inner.parameters() if p.ndim > 1]


def machine(**more: Any) -> dict[str, Any]:
    """What has to be known about the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **more}
