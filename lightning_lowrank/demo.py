"""The demo: two halves of scikit-learn's digits, two networks, one sum; with weight decay and without."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowrank._compat import quiet
from lightning_lowrank.callbacks import LowRankMonitor
from lightning_lowrank.merging import MergeReport, WeightSumMerger, merge_checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = ("digits 0-4", "digits 5-9")
WEIGHT_DECAY = 5e-3
_WIDTH = 192
_STEPS = 1500
_LEARNING_RATE = 0.2
_MOMENTUM = 0.9
_LOG_EVERY = 50
_FIRST = "net.0.weight"
_NETWORK = "network.ckpt"


class DigitsNetwork(LightningModule):
    """A bias-free ReLU network with two hidden layers, trained by full-batch gradient descent with momentum."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(128, _WIDTH, bias=False),
            nn.ReLU(),
            nn.Linear(_WIDTH, _WIDTH, bias=False),
            nn.ReLU(),
            nn.Linear(_WIDTH, 10, bias=False),
        )
        for weight in self.net.parameters():
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape ``(batch, 10)``, of inputs of shape ``(batch, 128)``."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the whole task."""
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs), targets)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        inputs, targets = batch
        logits = self(inputs)
        self.accuracy(logits, targets)
        self.log("test_loss", nn.functional.cross_entropy(logits, targets))
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        """SGD with momentum, the learning rate falling to 0 along a cosine."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM, weight_decay=self.hparams["weight_decay"]
        )
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)]


class _WholeTask(Dataset[tuple[Tensor, ...]]):
    """One item that is the whole task: a batch is not gathered sample by sample 1,500 times over."""

    def __init__(self, task: TensorDataset) -> None:
        self.tensors = task.tensors

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index:
            raise IndexError(index)
        return self.tensors


@dataclass(frozen=True)
class PairResult:
    """What became of one pair of networks.

    Attributes:
        seed: The pair's seed.
        weight_decay: Its weight decay.
        alignment: Full-batch alignment at the last step, by network and layer.
        norm_spread: Largest over smallest layer norm, by network.
        stable_rank: Stable rank of the first layer, by network.
        leak: First layer's leak on the task's test inputs, by network.
        report: The merge.
    """

    seed: int
    weight_decay: float
    alignment: dict[str, dict[str, float]]
    norm_spread: dict[str, float]
    stable_rank: dict[str, float]
    leak: dict[str, float]
    report: MergeReport

    def accuracy(self, task: str, model: str) -> float:
        """Test accuracy over all ten classes, in percent."""
        return 100 * self.report.value(task, model, "test_acc")

    def lost(self, task: str) -> float:
        """Points that the sum loses against the task's own network."""
        return self.accuracy(task, self.report.tasks[task]) - self.accuracy(task, "sum")

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "report": self.report.to_dict()}


def load_tasks() -> dict[str, tuple[TensorDataset, TensorDataset]]:
    """Train and test set of each half of the digits, 70 and 30 percent.

    Each task has 64 of the 128 input coordinates for its 8 x 8 scans and zeros in the others, so that inputs of
    different tasks are orthogonal.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs scikit-learn: pip install 'lightning-lowrank[examples]'") from error
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.long)
    train, _ = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=digits.target)
    in_train = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, torch.tensor(train), True)
    tasks = {}
    for number, name in enumerate(TASKS):
        inputs = torch.zeros(len(labels), 128)
        inputs[:, 64 * number : 64 * (number + 1)] = pixels
        mine = labels // 5 == number
        tasks[name] = (
            TensorDataset(inputs[mine & in_train], labels[mine & in_train]),
            TensorDataset(inputs[mine & ~in_train], labels[mine & ~in_train]),
        )
    return tasks


@dataclass(frozen=True)
class Boards:
    """Where W&B runs go: one per network, and one per merge with the merged checkpoint and its parents.

    Attributes:
        folder: Of offline runs.
        mode: Whether they are sent. None means that there are none.
        project: Their project.
    """

    folder: Path
    mode: Literal["online", "offline"] | None = None
    project: str = "lightning-lowrank-demo"

    def loggers(self, name: str, kind: str) -> list[Logger]:
        """A logger that starts a run; none without a mode.

        Raises:
            ModuleNotFoundError: If wandb is not installed.
            ValueError: If W&B does not let a run begin.
        """
        if self.mode is None:
            return []
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("--wandb needs wandb: pip install 'lightning-lowrank[wandb]'") from error
        settings = wandb.Settings(silent=self.mode == "offline", console="off")
        logger = WandbLogger(
            name=name,
            project=self.project,
            job_type=kind,
            group="demo",
            save_dir=self.folder,
            # WandbLogger's own offline=True goes unheard where W&B is in use in the process already.
            mode=self.mode,
            settings=settings,
        )
        try:
            logger.experiment  # noqa: B018  (starts the run)
        except wandb.errors.Error as error:
            raise ValueError(
                f"W&B did not start a run ({error}); log in with 'wandb login', or use --wandb offline"
            ) from error
        return [logger]


def run(
    output: Path, seeds: Sequence[int], console: Console, wandb: Literal["online", "offline"] | None = None
) -> list[PairResult]:
    """Train, merge and evaluate a pair with weight decay and one without per seed, and write what was found.

    Args:
        output: Folder for report.json, metrics.csv, demo.png, the networks and their merges; made if it is not there.
        seeds: One seed per repetition.
        console: Where progress and tables go.
        wandb: Whether to write W&B runs as well, and to send them.
    """
    output.mkdir(parents=True, exist_ok=True)
    boards = Boards(output, wandb)
    tasks = load_tasks()
    results: list[PairResult] = []
    with Progress(console=console, transient=True) as progress:
        total = len(seeds) * 2 * len(tasks) * _STEPS
        bar = progress.add_task(f"training {len(seeds) * 4} networks", total=total)
        tick = LambdaCallback(on_train_batch_end=lambda *_: progress.advance(bar))
        for seed in seeds:
            for weight_decay in (WEIGHT_DECAY, 0.0):
                results.append(_pair(tasks, seed, weight_decay, output, tick, boards))
    _write(output, results)
    console.print(results[0].report)
    console.print(summary(results))
    console.print(verdict(results), highlight=False)
    console.print(f"Wrote report.json, metrics.csv and demo.png to {output}", highlight=False)
    if wandb == "offline":
        console.print(f"The W&B runs are in {output / 'wandb'}; 'wandb sync' sends them", highlight=False)
    return results


def _pair(
    tasks: dict[str, tuple[TensorDataset, TensorDataset]],
    seed: int,
    weight_decay: float,
    output: Path,
    tick: Any,
    boards: Boards,
) -> PairResult:
    pair, alignment, spread, ranks = [], {}, {}, {}
    for number, (name, (train, _)) in enumerate(tasks.items()):
        seed_everything(2 * seed + number, verbose=False)
        network = DigitsNetwork(weight_decay)
        metrics = _fit(network, train, _run_folder(output, seed, weight_decay, name), tick, boards)
        key = "lowrank/alignment/"
        alignment[name] = {k.removeprefix(key): v for k, v in metrics.items() if k.startswith(key)}
        spread[name] = metrics["lowrank/norm_spread"]
        ranks[name] = metrics[f"lowrank/stable_rank/{_FIRST}"]
        pair.append(network)
    loaders = {name: DataLoader(test, batch_size=len(test)) for name, (_, test) in tasks.items()}
    report = WeightSumMerger(progress=False).evaluate(pair[0], pair[1], loaders)
    files = [_run_folder(output, seed, weight_decay, name) / _NETWORK for name in tasks]
    _merge_files(files, output / "merges" / f"seed{seed}-wd{weight_decay:g}.ckpt", report, boards)
    leaks = {name: layers[_FIRST] for name, layers in report.leak.items()}
    return PairResult(seed, weight_decay, alignment, spread, ranks, leaks, report)


def _merge_files(networks: Sequence[Path], merged: Path, evaluated: MergeReport, boards: Boards) -> None:
    """The same merge of the checkpoints, with a card that has the evaluation; and a W&B run of it."""
    merged.parent.mkdir(exist_ok=True)
    report = merge_checkpoints(networks, merged, evaluation=evaluated, force=True)
    for logger in boards.loggers(f"merge-{merged.stem}", "merge"):
        report.log(logger, checkpoint=merged)
        logger.experiment.finish()  # type: ignore[attr-defined]


def _fit(network: DigitsNetwork, train: TensorDataset, folder: Path, tick: Any, boards: Boards) -> dict[str, float]:
    """Train on the whole task at every step; the values that the monitor saw last."""
    started = boards.loggers(folder.name, "train")
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=_STEPS,
            callbacks=[LowRankMonitor(spectral="full", spectral_budget=1.0), tick],
            logger=[CSVLogger(folder.parent, name="", version=folder.name), *started],
            log_every_n_steps=_LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(network, DataLoader(_WholeTask(train), batch_size=None))
        trainer.save_checkpoint(folder / _NETWORK, weights_only=False)
    for logger in started:
        logger.experiment.finish()  # type: ignore[attr-defined]
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def _run_folder(output: Path, seed: int, weight_decay: float, task: str) -> Path:
    return output / "runs" / f"seed{seed}-wd{weight_decay:g}-{task.replace(' ', '-')}"


def summary(results: Sequence[PairResult]) -> Table:
    """A row per network, and the means over networks and seeds for each weight decay."""
    table = Table(title="The networks at their last step, and what their sum loses", box=SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for column in (
        "weight\ndecay",
        "seed",
        "digits",
        "align.\nlayer 1",
        "align.\nothers",
        "norm\nspread",
        "st.rank\nlayer 1",
        "leak\nlayer 1",
        "alone\n%",
        "sum\n%",
    ):
        table.add_column(column, justify="right")
    for weight_decay in dict.fromkeys(result.weight_decay for result in results):
        group = [result for result in results if result.weight_decay == weight_decay]
        rows = []
        for result in group:
            for task in result.report.tasks:
                rows.append(_summary_row(result, task))
                table.add_row(
                    f"{weight_decay:g}", str(result.seed), task.removeprefix("digits "), *_formatted(rows[-1])
                )
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        table.add_row(f"{weight_decay:g}", "all", "mean", *_formatted(means), style="bold")
        table.add_section()
    return table


def verdict(results: Sequence[PairResult]) -> str:
    """How many points the sum loses on the worse of its two tasks, with weight decay and without, mean over seeds."""
    losses = {
        weight_decay: [
            max(result.lost(task) for task in result.report.tasks)
            for result in results
            if result.weight_decay == weight_decay
        ]
        for weight_decay in (WEIGHT_DECAY, 0.0)
    }
    with_decay, without = (sum(values) / len(values) for values in losses.values())
    return (
        f"On its worse task the sum loses {with_decay:.2f} points of test accuracy with weight decay {WEIGHT_DECAY:g},"
        f" {without:.2f} without."
    )


def _summary_row(result: PairResult, task: str) -> list[float]:
    layers = result.alignment[task]
    return [
        layers.get(_FIRST, math.nan),
        min((value for name, value in layers.items() if name != _FIRST), default=math.nan),
        result.norm_spread[task],
        result.stable_rank[task],
        result.leak[task],
        result.accuracy(task, result.report.tasks[task]),
        result.accuracy(task, "sum"),
    ]


def _formatted(row: Sequence[float]) -> list[str]:
    formats = (".3f", ".3f", ".3f", ".2f", ".1e", ".2f", ".2f")
    return ["-" if math.isnan(value) else format(value, spec) for value, spec in zip(row, formats, strict=True)]


def _write(output: Path, results: Sequence[PairResult]) -> None:
    content = {"schema_version": 1, "pairs": [_without_nan(result.to_dict()) for result in results]}
    (output / "report.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    rows = []
    for result in results:
        for task in result.report.tasks:
            folder = _run_folder(output, result.seed, result.weight_decay, task)
            with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows += [{"run": folder.name, **row} for row in csv.DictReader(file)]
    with (output / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    seed = results[0].seed
    series = {
        wd: [row for row in rows if row["run"] == _run_folder(output, seed, wd, TASKS[0]).name]
        for wd in (WEIGHT_DECAY, 0.0)
    }
    figure(results, series).savefig(output / "demo.png", dpi=150)


def figure(results: Sequence[PairResult], series: dict[float, list[dict[str, str]]]) -> Figure:
    """Three panels for the first seed: alignment and stable rank over steps, accuracies.

    Args:
        results: Pairs with and without weight decay.
        series: The first network's rows of metrics.csv, by weight decay.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs matplotlib: pip install 'lightning-lowrank[examples]'") from error
    colours = {WEIGHT_DECAY: "#0072B2", 0.0: "#D55E00"}
    labels = {wd: f"weight decay {wd:g}" if wd else "no weight decay" for wd in series}
    result_figure = Figure(figsize=(12, 3.6), layout="constrained")
    alignment, rank, bars = result_figure.subplots(1, 3)
    for layer, style in zip(results[0].alignment[TASKS[0]], ("-", "--", ":"), strict=True):
        points = _points(series[WEIGHT_DECAY], f"lowrank/alignment/{layer}")
        alignment.plot(*points, style, color=colours[WEIGHT_DECAY], label=layer)
    alignment.legend(frameon=False, fontsize=8)
    alignment.set(xlabel="step", ylabel="full-batch alignment", ylim=(0, 1.02), title=f"With weight decay, {TASKS[0]}")
    for wd, rows in series.items():
        rank.plot(*_points(rows, f"lowrank/stable_rank/{_FIRST}"), color=colours[wd], label=labels[wd])
    rank.set(xlabel="step", ylabel="stable rank, first layer", title=f"Low rank, {TASKS[0]}")
    rank.set_ylim(bottom=0)
    seed = results[0].seed
    groups = [result for result in results if result.seed == seed]
    names = [(task, model) for task in TASKS for model in ("alone", "sum")]
    for index, result in enumerate(groups):
        heights = [
            result.accuracy(task, result.report.tasks[task] if model == "alone" else "sum") for task, model in names
        ]
        positions = [place + (index - 0.5) * 0.4 for place in range(len(names))]
        drawn = bars.bar(
            positions, heights, 0.38, color=colours[result.weight_decay], label=labels[result.weight_decay]
        )
        bars.bar_label(drawn, fmt="%.1f", fontsize=7)
    bars.set_xticks(range(len(names)), [f"{task}\n{model}" for task, model in names], fontsize=8)
    bars.set(ylabel="test accuracy, %", ylim=(0, 112), title="Alone and summed")
    for axes in (alignment, rank, bars):
        axes.spines[["top", "right"]].set_visible(False)
    handles, names_shown = rank.get_legend_handles_labels()
    result_figure.legend(handles, names_shown, loc="outside upper center", ncols=2, frameon=False)
    return result_figure


def _points(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[key]) for row in rows]


def _without_nan(value: Any) -> Any:
    """Plain data with NaN as None, as JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
