"""The dashboard in W&B: a saved workspace, and a report that explains it, both made from ``panels.SECTIONS``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import pydantic
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    from lightning_lowrank.dashboards._wandb_panels import Keys, XAxis, draw, guide
    from lightning_lowrank.dashboards._wandb_views import REPORT, WORKSPACE, save_report, save_workspace
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("wandb", "wandb_workspaces", "pydantic"):
        raise
    raise ModuleNotFoundError("the dashboard needs W&B: pip install 'lightning-lowrank[wandb]'") from error
from lightning_lowrank.dashboards.panels import SECTIONS, Section

__all__ = ["bound_keys", "dashboard", "report_spec", "save_report", "save_workspace", "to_json", "workspace_spec"]

NAME = "Low-rank training"
_USUAL = Keys()
_COLUMNS = 3
# So many panels of a report, two by two, are on a screen together with the text that explains them.
_GROUP = 4
# A report's grid is 24 units wide.
_WIDTH, _HEIGHT = 12, 8


def dashboard(
    entity: str,
    project: str,
    *,
    report: bool = False,
    name: str = NAME,
    prefix: str = "lowrank",
    merge_prefix: str = "merge",
    optimizers: int = 1,
    x_axis: XAxis = "global_step",
    dry_run: bool = False,
) -> str:
    """Save the workspace, and the report if asked for; each in place of the saved one of its name.

    Args:
        entity: Who owns the project: a user or a team.
        project: The project of the runs.
        report: Whether a report is saved as well.
        name: The name of the workspace and the title of the report.
        prefix: What the monitor's keys begin with.
        merge_prefix: What the keys of logged merges begin with.
        optimizers: How many optimizers the runs have.
        x_axis: Whether values are drawn over optimizer steps or over the summed decay tau.
        dry_run: Whether to return what would be sent instead. Needs neither an API key nor a network.

    Returns:
        What to print: a URL a line, or the JSON of ``{"workspace": ..., "report": ...}``.

    Raises:
        ValueError: If an argument is no good, if there is no API key or no such project, or if several saved
            workspaces or reports have the name.
        OSError: If W&B can't be reached or refuses.
    """
    keys = Keys(prefix, merge_prefix, optimizers, x_axis)
    workspace = workspace_spec(entity, project, keys, name)
    explained = report_spec(entity, project, keys, name) if report else None
    if dry_run:
        views = {"workspace": workspace, "report": explained}
        return json.dumps({kind: _request(view) for kind, view in views.items() if view is not None}, indent=2)
    urls = [save_workspace(workspace)]
    return "\n".join([*urls, save_report(explained)] if explained else urls)


def workspace_spec(entity: str, project: str, keys: Keys = _USUAL, name: str = NAME) -> ws.Workspace:
    """The workspace: a section per question, each with a text that says how to read its panels.

    Args:
        entity: Who owns the project: a user or a team.
        project: The project of the runs.
        keys: How the keys of the runs are called.
        name: What it is called in W&B; no emoji.

    Raises:
        ValueError: If a name is no good.

    Example:
        >>> workspace = workspace_spec("team", "digits")
        >>> [section.name for section in workspace.sections][0]
        'Is it stationary?'
    """
    sections = [_section(section, keys) for section in SECTIONS]
    settings = ws.WorkspaceSettings(x_axis=keys.x)
    with _names(entity, project, name):
        return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def report_spec(entity: str, project: str, keys: Keys = _USUAL, name: str = NAME) -> wr.Report:
    """The report: the same panels, a few at a time, below the text that explains them.

    Args:
        entity: Who owns the project: a user or a team.
        project: The project of the runs.
        keys: How the keys of the runs are called.
        name: Its title, of at most 128 characters.

    Raises:
        ValueError: If a name is no good.

    Example:
        >>> report_spec("team", "digits").title
        'Low-rank training'
    """
    blocks = [wr.TableOfContents(), *(block for section in SECTIONS for block in _blocks(section, keys))]
    about = "Is training stationary, are norms balanced, how low is the rank, and what does a merge do?"
    with _names(entity, project, name):
        return wr.Report(entity=entity, project=project, title=name, description=about, width="fluid", blocks=blocks)


def to_json(view: ws.Workspace | wr.Report) -> str:
    """What W&B would be sent to save a view, its ``spec`` (which is sent as a string) as an object.

    Args:
        view: A workspace or a report.

    Example:
        >>> import json
        >>> json.loads(to_json(workspace_spec("team", "digits")))["displayName"]
        'Low-rank training'
    """
    return json.dumps(_request(view), indent=2)


def bound_keys(keys: Keys = _USUAL) -> tuple[set[str], list[str]]:
    """What the workspace's panels show of a run, read from what W&B would be sent.

    Args:
        keys: How the keys of the runs are called.

    Returns:
        Exact keys, the axes' included, and regular expressions of others.

    Example:
        >>> exact, patterns = bound_keys()
        >>> "lowrank/alignment" in exact, patterns[0]
        (True, '^lowrank/alignment/.+$')
    """
    exact: set[str] = set()
    patterns: list[str] = []
    spec = _request(workspace_spec("entity", "project", keys))["spec"]
    for section in spec["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            if panel["viewType"] == "Run History Line Plot":
                exact |= {config["xAxis"], *config["metrics"]}
                patterns += [config["metricRegex"]] if config.get("useMetricRegex") else []
            elif panel["viewType"] == "Weave":
                exact.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
            elif panel["viewType"] == "Vega2":
                exact.add(_table_of_chart(config))
    return exact, patterns


@contextmanager
def _names(entity: str, project: str, name: str) -> Iterator[None]:
    for what, given in (("entity", entity), ("project", project)):
        if not given or "/" in given:
            raise ValueError(f"{what} must be a single name, as team and digits of wandb.ai/team/digits, got {given!r}")
    if not name.strip():
        raise ValueError("the workspace needs a name, by which it is found again")
    try:
        yield
    except pydantic.ValidationError as error:
        raise ValueError(f"W&B does not take the name {name!r}: {error.errors()[0]['msg']}") from error


def _section(section: Section, keys: Keys) -> ws.Section:
    panels = [wr.MarkdownPanel(markdown=guide(section)), *(draw(panel, section, keys) for panel in section.panels)]
    rows = math.ceil(len(panels) / _COLUMNS)  # all on one page
    layout = ws.SectionLayoutSettings(columns=_COLUMNS, rows=rows)
    return ws.Section(name=section.name, panels=panels, is_open=True, layout_settings=layout)


def _blocks(section: Section, keys: Keys) -> list[Any]:
    blocks: list[Any] = [wr.H1(section.name), wr.P(section.text)]
    for start in range(0, len(section.panels), _GROUP):
        group = section.panels[start : start + _GROUP]
        for panel in group:
            blocks += [wr.H2(panel.title), wr.P(panel.text)]
        places = [
            wr.Layout(x=_WIDTH * (index % 2), y=_HEIGHT * (index // 2), w=_WIDTH, h=_HEIGHT)
            for index in range(len(group))
        ]
        panels = [draw(panel, section, keys, place) for panel, place in zip(group, places, strict=True)]
        # Of the report's own project; naming it would make wandb-workspaces ask the server for its number.
        blocks.append(wr.PanelGrid(runsets=[wr.Runset()], panels=panels))
    return blocks


def _request(view: ws.Workspace | wr.Report) -> dict[str, Any]:
    # Private, but only saving would give it in public, and that needs a server.
    model = view._to_model()
    return {
        "entityName": view.entity,
        "projectName": view.project,
        "displayName": model.display_name,
        "type": WORKSPACE if isinstance(view, ws.Workspace) else REPORT,
        "spec": model.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _table_of_chart(config: dict[str, Any]) -> str:
    (query,) = config["userQuery"]["queryFields"]
    (table,) = [field for field in query["fields"] if field["name"] == "summaryTable"]
    (key,) = [argument["value"] for argument in table["args"] if argument["name"] == "tableKey"]
    return str(key)
