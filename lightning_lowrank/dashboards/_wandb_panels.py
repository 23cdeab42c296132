"""The dashboard's panels as W&B's own: which keys of a run each is bound to, and how it is drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import wandb_workspaces.reports.v2 as wr

from lightning_lowrank.dashboards.panels import Panel, Section
from lightning_lowrank.dashboards.weights_and_biases import X_AXIS

XAxis = Literal["global_step", "cumulative_decay"]

# These are of the whole run; with several optimizers every other key is in a section of its optimizer.
_OF_THE_RUN = frozenset({"overhead"})
# What Markdown would take for its own: |W|_F, <W, G> and wd * theta are meant as they stand.
_MARKUP = re.compile(r"([\\`*_<>\[\]$~|])")


@dataclass(frozen=True)
class Keys:
    """How the keys of runs are called.

    Attributes:
        prefix: What the monitor's keys begin with.
        merge_prefix: What those of a merge begin with.
        optimizers: How many optimizers the runs have.
        x_axis: Against what values are drawn: optimizer steps, or the summed decay tau.

    Raises:
        ValueError: If a prefix is no name, if there are no optimizers, if the axis is neither, or if it is the decay of
            several optimizers.
    """

    prefix: str = "lowrank"
    merge_prefix: str = "merge"
    optimizers: int = 1
    x_axis: XAxis = "global_step"

    def __post_init__(self) -> None:
        for name in ("prefix", "merge_prefix"):
            value = getattr(self, name)
            if not value or value != value.strip("/"):
                raise ValueError(f"{name} must be a name without a slash at either end, got {value!r}")
        if self.optimizers < 1:
            raise ValueError(f"optimizers must be at least 1, got {self.optimizers}")
        if self.x_axis not in ("global_step", "cumulative_decay"):
            raise ValueError(f"x_axis must be 'global_step' or 'cumulative_decay', got {self.x_axis!r}")
        if self.x_axis == "cumulative_decay" and self.optimizers > 1:
            raise ValueError("each optimizer has a cumulative decay of its own: with several, use x_axis='global_step'")

    @property
    def x(self) -> str:
        """The key of the x-axis."""
        return X_AXIS if self.x_axis == "global_step" else f"{self.prefix}/{self.x_axis}"

    def scalars(self, panel: Panel) -> list[str]:
        """The keys of the lines of a panel, an optimizer's after the other's."""
        if self.optimizers == 1:
            return [f"{self.prefix}/{key}" for key in panel.keys]
        own = [f"{self.prefix}/{key}" for key in panel.keys if key in _OF_THE_RUN]
        sections = [f"{self.prefix}/optimizer_{index}" for index in range(self.optimizers)]
        return own + [f"{section}/{key}" for section in sections for key in panel.keys if key not in _OF_THE_RUN]

    def layers(self, panel: Panel) -> str:
        """A regular expression of the keys of layers, and of no others."""
        section = "optimizer_[0-9]+/" if self.optimizers > 1 else ""
        return f"^{re.escape(self.prefix)}/{section}{_any_of(panel.keys)}/.+$"

    def table(self, panel: Panel, section: Section) -> str:
        """The key of a panel's table."""
        (key,) = panel.keys
        return f"{self.prefix if section.source == 'run' else self.merge_prefix}/{key}"


def draw(panel: Panel, section: Section, keys: Keys, layout: wr.Layout | None = None) -> Any:
    """A panel of wandb-workspaces, bound to keys of runs.

    Args:
        panel: What to show.
        section: The section that it is in.
        keys: How the keys are called.
        layout: Its place in a report's grid; workspaces flow.
    """
    place = {"layout": layout} if layout else {}
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=keys.table(panel, section), **place)
    if panel.kind == "chart":
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": keys.table(panel, section)}},
            chart_name=panel.preset,
            chart_fields=dict(panel.fields),
            chart_strings={"title": panel.title},
            **place,
        )
    lines = keys.scalars(panel) if panel.kind == "line" else []
    return wr.LinePlot(
        title=panel.title,
        # Against itself the decay would be a diagonal.
        x=X_AXIS if keys.x in lines else keys.x,
        y=lines,
        metric_regex=keys.layers(panel) if panel.kind == "layers" else None,
        log_y=panel.log or None,
        # W&B's line plots have no constant lines.
        title_y=None if panel.target is None else f"target: {panel.target:g}",
        **place,
    )


def guide(section: Section) -> str:
    """Markdown that says what a section means and how to read each of its panels."""
    lines = [f"- **{_plain(panel.title)}**: {_plain(panel.text)}" for panel in section.panels]
    return "\n".join([_plain(section.text), "", *lines])


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)


def _any_of(names: tuple[str, ...]) -> str:
    return re.escape(names[0]) if len(names) == 1 else f"(?:{'|'.join(map(re.escape, names))})"
