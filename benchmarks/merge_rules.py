"""Which rule is right for each kind of tensor: accuracies of merges that differ from the default in one rule.

    python benchmarks/merge_rules.py --mnist_dir PATH

trains pairs of networks on the two halves of MNIST-10k's classes, with weight decay, merges each pair under every rule
and writes benchmarks/results/merge_rules.json and .md. About ten minutes on two cores.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_lowrank import MergePolicy, merge_modules
from lightning_lowrank.merging.running_statistics import batch_norms, mixed, reestimate

HERE = Path(__file__).parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent / "examples"))
from split_task import SplitDataModule, load  # noqa: E402

WEIGHT_DECAY = 5e-3


class Patches(nn.Module):
    """A transformer of one block over 7 x 7 patches."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 7, stride=7)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images of 28 x 28."""
        tokens = self.patch(images).flatten(2).mT + self.pos_embed
        return self.out(self.norm(self.block(tokens).mean(1)))


def mlp(channels: int, *between: Callable[[], nn.Module]) -> nn.Module:
    """One hidden layer of 256 units, with something between it and the output."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784 * channels, 256), *(make() for make in between), nn.Linear(256, 10)
    )


def cnn(channels: int) -> nn.Module:
    """Two convolutions with batch normalisation."""
    layers: list[nn.Module] = []
    for before, after in ((channels, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float, int]] = {
    "MLP with biases": (lambda channels: mlp(channels, nn.ReLU), 0.1, 20),
    "MLP with LayerNorm": (lambda channels: mlp(channels, lambda: nn.LayerNorm(256), nn.ReLU), 0.05, 20),
    "MLP with PReLU": (lambda channels: mlp(channels, lambda: nn.PReLU(256)), 0.05, 20),
    "CNN with BatchNorm": (cnn, 0.05, 8),
    "transformer": (Patches, 0.02, 8),
}
# What differs from the default policy, by what it is called in the table.
RULES: dict[str, dict[str, str]] = {
    "default": {},
    "biases: mean": {"bias": "mean"},
    "gains and shifts of normalisations: sum": {"normalisation": "sum"},
    "gains and shifts of normalisations: first": {"normalisation": "first"},
    "slopes: sum": {"gain": "sum"},
    "embeddings: mean": {"embedding": "mean"},
    "statistics: first": {"statistic": "first"},
    "statistics: pooled": {"statistic": "pooled"},
}
REESTIMATED = "statistics: re-estimated"


def train(net: nn.Module, data: torch.utils.data.Dataset, rate: float, epochs: int, seed: int) -> nn.Module:
    """SGD with momentum, weight decay and a cosine."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.stack(column) for column in zip(*data, strict=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (128,), generator=generator)
        loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, data: torch.utils.data.Dataset) -> float:
    """In percent, over all ten classes."""
    images, labels = (torch.stack(column) for column in zip(*data, strict=True))
    return 100 * (net(images).argmax(1) == labels).float().mean().item()


def merges(
    nets: list[nn.Module], base: nn.Module | None, halves: list[SplitDataModule]
) -> Iterator[tuple[str, nn.Module]]:
    """The pair merged under every rule that changes something for it."""
    kinds = {entry.kind for entry in MergePolicy().plan(*nets).entries}
    for name, changed in RULES.items():
        if set(changed) <= kinds:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield name, merge_modules(*nets, base=base, policy=MergePolicy(kinds=changed))
    if batch_norms(nets[0]):
        merged = merge_modules(*nets, base=base)
        loaders = [torch.utils.data.DataLoader(half.train, 250, shuffle=True) for half in halves]

        @torch.no_grad()
        def run() -> None:
            for images, _ in mixed(loaders):
                merged(images)

        reestimate(merged, [run])
        yield REESTIMATED, merged


def measure(name: str, inputs: str, start: str, seed: int, splits: tuple) -> dict[str, list[float]]:
    """Accuracies on both tasks: of the networks alone, and of the merges."""
    make, rate, epochs = NETWORKS[name]
    halves = [SplitDataModule(*splits, half, inputs) for half in (0, 1)]
    channels = halves[0].train[0][0].shape[0]
    base = None
    if start == "common":
        torch.manual_seed(seed)
        both = torch.utils.data.ConcatDataset([half.train for half in halves])
        base = train(make(channels), both, rate, max(2, epochs // 5), seed)
    nets = []
    for number, half in enumerate(halves):
        torch.manual_seed(2 * seed + number)
        net = make(channels) if base is None else copy.deepcopy(base)
        nets.append(train(net, half.train, rate, epochs if base is None else max(2, epochs // 4), seed))
    found = {"alone": [accuracy(net, half.test) for net, half in zip(nets, halves, strict=True)]}
    for rule, merged in merges(nets, base, halves):
        found[rule] = [accuracy(merged.eval(), half.test) for half in halves]
    return found


def rows(results: list[dict]) -> Iterator[str]:
    """A table: means over seeds, a row per rule."""
    yield "| network | inputs | start | rule | task 1: alone → merged | task 2: alone → merged | mean |"
    yield "|---|---|---|---|---|---|---|"
    places = list(dict.fromkeys((r["network"], r["inputs"], r["start"]) for r in results))
    for place in places:
        runs = [r["accuracy"] for r in results if (r["network"], r["inputs"], r["start"]) == place]
        for rule in (rule for rule in runs[0] if rule != "alone"):
            alone, merged = ([statistics.fmean(run[key][t] for run in runs) for t in (0, 1)] for key in ("alone", rule))
            cells = [f"{a:.1f} → {m:.1f}" for a, m in zip(alone, merged, strict=True)]
            yield f"| {' | '.join([*place, rule, *cells])} | {statistics.fmean(merged):.1f} |"


def main(mnist_dir: Path, seeds: int = 3, only: str = "") -> None:
    """Run everything and write the results.

    Args:
        mnist_dir: Folder that holds torchvision's MNIST files.
        seeds: Pairs per setting.
        only: Run just the networks whose name begins like this, and write nothing.
    """
    torch.set_num_threads(2)
    splits = load("mnist", mnist_dir)
    results = []
    for name in (name for name in NETWORKS if name.startswith(only)):
        for inputs, start in (("disjoint", "own"), ("raw", "own"), ("raw", "common")):
            for seed in range(seeds):
                found = measure(name, inputs, start, seed, splits)
                results.append({"network": name, "inputs": inputs, "start": start, "seed": seed, "accuracy": found})
            print("\n".join([*rows(results[-seeds:])][2:]), flush=True)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "merge_rules.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "merge_rules.md").write_text("\n".join(rows(results)) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
