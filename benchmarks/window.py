"""Measure how well a window of mini-batch gradients knows the full-batch alignment, and when it does not.

    python benchmarks/window.py

Every case takes K steps of SGD at batch 32 from a common start and compares what the window says with the gradient over
all the data at the last weights. Starts are points at which training with a decaying step size has come to rest
(alignment above .95), and points early in training. Prints every case, and writes benchmarks/results/window.json and
.md.

The data decide what a short window can know: near 1 the standard error of an alignment from K gradients, drawn with
replacement, is about tr(C^2)^(1/2) / (sqrt(2) |G|^2 K), C the covariance of one of them. The clusters were chosen so
that 100 gradients are enough; under the noisy teacher only whole epochs are, and most of the rest has to be NaN.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lowrank.functional.mean_gradient import MeanGradient

RESULTS = Path(__file__).parent / "results"
WEIGHT_DECAY = 5e-3
BATCH, EPOCH = 32, 200
SAMPLES = BATCH * EPOCH
CONVERGED, FAR = 0.95, 0.5
# Learning rate and momentum of the steps within a window.
AT_REST = [(1e-3, 0.0)]
ON_THE_WAY = [(1e-4, 0.0), (0.05, 0.9), (0.2, 0.9)]
SWEEP = [(lr, 0.0) for lr in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]


@dataclass(frozen=True)
class Case:
    """One window and the truth at its end; ``moved`` is in units of |G|, as the window sees it."""

    data: str
    seed: int
    start: str
    lr: float
    momentum: float
    replacement: bool
    steps: int
    truth: float
    naive: float
    raw: float
    alignment: float
    stderr: float
    moved: float
    balance: float
    balance_stderr: float

    @property
    def error(self) -> float:
        """Of what is reported; NaN where nothing is."""
        return self.alignment - self.truth

    @property
    def passed(self) -> bool | None:
        """As promised: within .05 where converged, within .1 or NaN far from it; None in between."""
        if self.truth >= CONVERGED:
            return abs(self.error) <= 0.05
        if self.truth < FAR:
            return math.isnan(self.alignment) or abs(self.error) <= 0.1
        return None

    def __str__(self) -> str:
        draws = "with" if self.replacement else "without"
        verdict = {True: "ok", False: "OUTLIER", None: "-"}[self.passed]
        cells = [self.data, self.seed, self.start, f"{self.lr:g}, {self.momentum:g}", draws, self.steps]
        cells += [f"{x:.3f}" for x in (self.truth, self.naive, self.raw, self.stderr)]
        cells += [f"{self.moved:.3g}", f"{self.alignment:.3f}", f"{self.balance:.3f} ± {self.balance_stderr:.3f}"]
        return f"| {' | '.join(map(str, [*cells, verdict]))} |"


HEADER = """\
| data | seed | start | lr, momentum | replacement | steps | truth | naive | estimate | stderr | moved / \\|G\\| | reported | balance | |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def clusters(seed: int) -> tuple[Tensor, Tensor]:
    """Ten Gaussian clusters in 32 dimensions that hardly overlap."""
    generator = torch.Generator().manual_seed(seed)
    centers = 1.3 * torch.randn(10, 32, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    return centers[labels] + torch.randn(SAMPLES, 32, generator=generator), labels


def teacher(seed: int) -> tuple[Tensor, Tensor]:
    """The labels of a random network: hard samples all along its boundaries, and so a noisy gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, 32, generator=generator)
    hidden = (inputs @ torch.randn(32, 32, generator=generator)).relu()
    return inputs, (hidden @ torch.randn(32, 10, generator=generator)).argmax(1)


def network(seed: int) -> nn.Sequential:
    """A bias-free ReLU network."""
    torch.manual_seed(seed)
    sizes = (32, 48, 48, 10)
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def indices(steps: int, replacement: bool, seed: int, batch: int = BATCH) -> list[Tensor]:
    """The batches of as many steps."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / SAMPLES)
    if replacement:
        return [torch.randint(SAMPLES, (batch,), generator=generator) for _ in range(steps)]
    return [rows for _ in range(epochs) for rows in torch.randperm(SAMPLES, generator=generator).split(batch)][:steps]


def sgd(net: nn.Module, lr: float, momentum: float) -> torch.optim.SGD:
    """With the weight decay of every case."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=WEIGHT_DECAY)


def train(net: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, batches: Iterable) -> None:
    """One step per batch of row numbers."""
    for rows in batches:
        optimizer.zero_grad()
        cross_entropy(net(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All of them as one float64 vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def starts(data: tuple[Tensor, Tensor], seed: int) -> dict[str, dict[str, Tensor]]:
    """Weights after 20 and 100 steps, and after a decaying step size has ended in full-batch descent."""
    net, found = network(seed), {}
    for steps in (20, 80):
        train(net, data, sgd(net, 0.1, 0.9), indices(steps, False, seed + steps, 256))
        found[f"step {steps + 20 * (steps > 20)}"] = {key: value.clone() for key, value in net.state_dict().items()}
    for lr, steps in ((0.1, 1400), (0.02, 300)):
        train(net, data, sgd(net, lr, 0.9), indices(steps, False, seed, 256))
    for lr, steps in ((0.2, 150), (0.05, 100)):
        train(net, data, sgd(net, lr, 0.9), [slice(None)] * steps)
    return {**found, "at rest": {key: value.clone() for key, value in net.state_dict().items()}}


def measure(net: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, case: dict) -> Case:
    """Run one window."""
    steps, replacement = case["steps"], case["replacement"]
    window = MeanGradient(math.inf if replacement else SAMPLES)
    theta = start = flat(net.parameters())
    total, moved, cosines = torch.zeros_like(start), 0.0, []
    for step, rows in enumerate(indices(steps, replacement, 1000 * case["seed"] + steps)):
        optimizer.zero_grad()
        cross_entropy(net(data[0][rows]), data[1][rows]).backward()
        g, theta = flat(p.grad for p in net.parameters()), flat(net.parameters())
        window.update(theta @ g, g @ g, total @ g, samples=len(rows), epoch=step // EPOCH)
        total += len(rows) * g
        moved = max(moved, (theta - start).norm().item())
        cosines.append((-(theta @ g) / theta.norm() / g.norm()).item())
        optimizer.step()
    theta = flat(net.parameters())
    optimizer.zero_grad()
    cross_entropy(net(data[0]), data[1]).backward()
    truth = flat(p.grad for p in net.parameters())
    found = window.estimate(theta @ theta, WEIGHT_DECAY)
    share = moved / found.gradient_squared.sqrt().item()
    return Case(
        **case,
        truth=(-(theta @ truth) / theta.norm() / truth.norm()).item(),
        naive=sum(cosines) / len(cosines),
        raw=found.alignment.item(),
        alignment=found.trusted(share).alignment.item(),
        stderr=found.alignment_stderr.item(),
        moved=share,
        balance=found.radial_balance.item(),
        balance_stderr=found.radial_balance_stderr.item(),
    )


def run(name: str, seed: int, wanted: dict[str, Sequence[tuple[float, float]]]) -> Iterator[Case]:
    """Every window of one training run; ``wanted`` has the step sizes from each start."""
    data = {"clusters": clusters, "teacher": teacher}[name](seed)
    states = starts(data, seed)
    for start, settings in wanted.items():
        for (lr, momentum), replacement, steps in itertools.product(settings, (False, True), (100, 200, 500)):
            net = network(seed)
            net.load_state_dict(states[start])
            case = {"data": name, "seed": seed, "start": start, "lr": lr, "momentum": momentum}
            yield measure(net, data, sgd(net, lr, momentum), {**case, "replacement": replacement, "steps": steps})


def summary(title: str, cases: Sequence[Case]) -> list[str]:
    """What came of the promises over these cases."""
    lines = [f"{title}: {len(cases)} windows"]
    for name, chosen in (
        ("truth >= .95, within .05", [c for c in cases if c.truth >= CONVERGED]),
        ("truth < .5, within .1 or NaN", [c for c in cases if c.truth < FAR]),
    ):
        given = [c for c in chosen if not math.isnan(c.alignment)]
        worst = max((abs(c.error) for c in given), default=math.nan)
        lines.append(
            f"- {name}: {sum(bool(c.passed) for c in chosen)} of {len(chosen)}; {len(given)} with a value, the largest"
            f" error of those {worst:.3f}"
        )
    # Whole epochs have no sampling error, so there is nothing to compare a distance with.
    sampled = [c for c in cases if c.truth >= CONVERGED and c.balance_stderr > 0]
    near = [abs(c.balance - 1) <= 3 * c.balance_stderr for c in sampled]
    largest = max((c.balance_stderr for c in sampled), default=math.nan)
    lines.append(
        f"- truth >= .95, radial balance within 3 standard errors of 1: {sum(near)} of {len(near)}; largest standard"
        f" error {largest:.3f}"
    )
    return lines


def main(seeds: int = 5) -> None:
    """Run every case.

    Args:
        seeds: Seeds of the clusters; the noisy teacher and the sweep of step sizes have two.
    """
    # Layers this small are slower on two threads than on one.
    torch.set_num_threads(1)
    usual = {"at rest": AT_REST, "step 20": ON_THE_WAY, "step 100": ON_THE_WAY}
    parts = {
        "Clusters": [("clusters", seed, usual) for seed in range(seeds)],
        "Noisy gradients (teacher)": [("teacher", seed, usual) for seed in range(min(2, seeds))],
        "How far may the weights move": [(name, 0, {"at rest": SWEEP}) for name in ("clusters", "teacher")],
    }
    report, every = [], []
    for title, runs in parts.items():
        print(f"\n{title}\n{HEADER}")
        cases = []
        for arguments in runs:
            for case in run(*arguments):
                cases.append(case)
                print(case, flush=True)
        lines = summary(title, cases)
        print("\n" + "\n".join(lines))
        report += [f"## {title}", "", *lines[1:], "", HEADER, *map(str, cases), ""]
        every += [{**asdict(case), "passed": case.passed} for case in cases]
    RESULTS.mkdir(exist_ok=True)
    # JSON has no NaN.
    clean = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in e.items()} for e in every]
    (RESULTS / "window.json").write_text(json.dumps(clean, indent=1) + "\n")
    (RESULTS / "window.md").write_text("\n".join(report))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
