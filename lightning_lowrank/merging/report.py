"""MergeReport: what an evaluation found, as a table, a dict, a figure, a file or a log entry."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from lightning_lowrank._compat import as_list, is_wandb_logger, key_prefix
from lightning_lowrank._json_report import Saved, read_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the printed table: wide enough for five models and long names.
_WIDTH = 110
# Layers whose leak is printed.
_WORST = 5


@dataclass(frozen=True)
class MergeReport(Saved):
    """How two networks and their merges do on both networks' tasks.

    Attributes:
        tasks: Task names, each with the name of the network that was trained on it ("m1" or "m2").
        models: "m1", "m2", "sum", "average" and "ensemble".
        metrics: Values by ``<task>/<model>/<metric>``; NaN where a metric does not exist for a model.
        notes: What could not be measured and why.
        settings: How the merge was made.
        card: Of merged files: inputs and output with their hashes, rules, versions, the command.
        leak: By task and layer: what the sum adds to a layer's pre-activations on the task, relative to what was there
            (|(W_sum - W_own) h| / |W_own h|, h the layer's inputs within the task's own network).

    Example:
        >>> report = MergeReport(
        ...     tasks={"even": "m1"}, models=["m1", "sum"],
        ...     metrics={"even/m1/test_acc": 0.98, "even/sum/test_acc": 0.97},
        ... )
        >>> report.value("even", "sum", "test_acc")
        0.97
    """

    tasks: dict[str, str]
    models: list[str]
    metrics: dict[str, float]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    leak: dict[str, dict[str, float]] = field(default_factory=dict)

    def value(self, task: str, model: str, metric: str) -> float:
        """One value.

        Raises:
            KeyError: If there is none of that name.
        """
        return self.metrics[f"{task}/{model}/{metric}"]

    def metric_names(self, task: str) -> list[str]:
        """The metrics of a task, in the order in which they were measured."""
        parts = (key.split("/", 2) for key in self.metrics)
        return list(dict.fromkeys(metric for of_task, _, metric in parts if of_task == task))

    @property
    def headline_metric(self) -> str | None:
        """The metric to look at first: the joint accuracy of classifiers, else the first one there is."""
        names = list(dict.fromkeys(name for task in self.tasks for name in self.metric_names(task)))
        return "joint_accuracy" if "joint_accuracy" in names else next(iter(names), None)

    @classmethod
    def load(cls, path: str | Path) -> MergeReport:
        """Read a report that :meth:`save` wrote.

        Raises:
            ValueError: If the file is no report, or of a newer schema.
        """
        try:
            content = read_report(path, cls.schema_version)
            content["metrics"] = _numbers(content["metrics"])
            content["leak"] = {task: _numbers(layers) for task, layers in content.get("leak", {}).items()}
            return cls(**content)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a merge report: it is no text") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a merge report: {error!r}") from error

    def __str__(self) -> str:
        """The report as a table: a row per task and metric, a column per model."""
        out = io.StringIO()
        Console(file=out, width=_WIDTH, force_terminal=False, color_system=None).print(self)
        return out.getvalue().rstrip()

    def __rich__(self) -> RenderableType:
        """The table for a rich console, as wide as that is."""
        table = Table(
            "task",
            Column("metric", overflow="fold"),
            *(Column(model, justify="right") for model in self.models),
            box=SIMPLE_HEAD,
            show_edge=False,
        )
        table.padding = (0, 1, 0, 0)
        for task, own in self.tasks.items():
            for index, metric in enumerate(self.metric_names(task)):
                values = [self.metrics.get(f"{task}/{model}/{metric}", math.nan) for model in self.models]
                table.add_row(escape(f"{task} ({own})") if index == 0 else "", escape(metric), *map(_shown, values))
            table.add_section()
        parts: list[RenderableType] = [table] if self.tasks else []
        return Group(*parts, *self._leaks(), *self._of_files(), *(Text(f"Note: {note}") for note in self.notes))

    def _leaks(self) -> list[Text]:
        """The layers in which the sum changes most, by task."""
        found = []
        for task, layers in self.leak.items():
            worst = sorted(layers.items(), key=lambda one: -one[1] if math.isfinite(one[1]) else math.inf)
            shown = ", ".join(f"{name} {_shown(value)}" for name, value in worst[:_WORST])
            rest = f" and {len(worst) - _WORST} layers with less" if len(worst) > _WORST else ""
            if shown:
                found.append(Text(f"Leak on {task}: {shown}{rest}"))
        return found

    def _of_files(self) -> list[Text]:
        if not self.card:
            return []
        output = self.card["output"]
        names = ", ".join(Path(source["path"]).name for source in self.card["inputs"])
        rules = ", ".join(f"{count} {pair}" for pair, count in self.card["rules"].items())
        differing = ", ".join(self.card["hyper_parameters"])
        return [
            Text(f"{output['name']} ({output['bytes'] / 1e6:,.1f} MB): {names} merged; {rules}"),
            *([Text(f"Hyperparameters that differ: {differing}")] if differing else []),
        ]

    def plot(self, metric: str | None = None) -> tuple[Figure, Axes]:
        """Bars of one metric: a group per task, a bar per model.

        Args:
            metric: A metric's name; by default the joint accuracy of classifiers, else the first one there is.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If no task has the metric.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plots need matplotlib: pip install 'lightning-lowrank[examples]'") from error
        names = list(dict.fromkeys(name for task in self.tasks for name in self.metric_names(task)))
        metric = metric or self.headline_metric
        if metric not in names:
            raise ValueError(f"no metric {metric!r} in this report; it has {', '.join(names) or 'none'}")
        # A figure of its own, not pyplot's: nothing global is left behind.
        figure = Figure(figsize=(1.6 + 2.8 * len(self.tasks), 3.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(self.models)
        for index, model in enumerate(self.models):
            heights = [self.metrics.get(f"{task}/{model}/{metric}", math.nan) for task in self.tasks]
            left = [position + (index - (len(self.models) - 1) / 2) * width for position in range(len(self.tasks))]
            bars = axes.bar(
                left, heights, width * 0.92, label=model, color=_COLOURS.get(model, _GREYS[index % len(_GREYS)])
            )
            axes.bar_label(bars, labels=[_shown(height) for height in heights], fontsize=7, padding=1)
        axes.set_xticks(range(len(self.tasks)), [f"{task}\n(trained: {own})" for task, own in self.tasks.items()])
        axes.set_ylabel(metric.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(self.models), frameon=False, fontsize=8)
        return figure, axes

    def log(
        self,
        logger: Any,
        prefix: str = "merge",
        *,
        checkpoint: str | Path | None = None,
        parents: Sequence[str] | None = None,
    ) -> None:
        """Send the metrics to a logger, or to each of several.

        W&B gets more: a table of models and tasks, a bar chart, the leak by layer, summary values; and with
        ``checkpoint`` the merged file as an artifact, with its card and with its parents as lineage. docs/dashboards.md
        shows them.

        Args:
            logger: A Lightning logger or a list of them.
            prefix: What the keys begin with.
            checkpoint: The file that :func:`merge_checkpoints` wrote, its card beside it. For W&B only.
            parents: Names of the parents' own W&B artifacts, as ``"entity/project/name:version"``, base last; without
                them the parents are recorded by reference to their files. Offline there is no lineage: their digests
                stand in the merged artifact's metadata in any case.

        Raises:
            ValueError: If there is no card of the checkpoint, or not a name for each parent.
        """
        named = {f"{prefix}/{key}": value for key, value in self.metrics.items()}
        for one in as_list(logger):
            if is_wandb_logger(one):
                from lightning_lowrank.dashboards.merges import log_artifact, log_report

                log_report(one.experiment, self, f"{key_prefix(one)}{prefix}")
                if checkpoint is not None:
                    log_artifact(one.experiment, self, Path(checkpoint), parents)
            else:
                one.log_metrics(named)
                one.save()


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else float(value) for key, value in values.items()}


# Okabe and Ito's colours, told apart by colour-blind readers too: the networks grey, the merges in colour.
_GREYS = ("#999999", "#555555", "#bbbbbb", "#333333")
_COLOURS = {
    "sum": "#0072B2",
    "sum_pooled": "#009E73",
    "sum_reestimated": "#CC79A7",
    "average": "#56B4E9",
    "ensemble": "#E69F00",
}


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
