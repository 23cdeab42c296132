"""Saved views of a W&B project, workspaces and reports: finding the one of a name, and replacing what is ours in it."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydantic
import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces.errors import SpecVersionError, UnsupportedViewError

# What W&B calls them.
WORKSPACE, REPORT = "project-view", "runs"
_NAMES = {WORKSPACE: "workspace", REPORT: "report"}
# Seconds. Where a process ends right after a request was given up, wandb's core process may miss the message that it is
# to end too (seen in one of twenty, at wandb 0.31), and both wait for each other for ever.
_SETTLE = 0.5


def save_workspace(workspace: ws.Workspace) -> str:
    """Save a workspace, in place of the saved one of its name where there is one.

    What others set in the saved one stays: their filters, colours and settings, and sections of other names.

    Args:
        workspace: What to save.

    Returns:
        Its URL.

    Raises:
        ValueError: If there is no API key, no such project, more than one saved workspace of that name, or if the one
            that there is can't be read.
        OSError: If W&B can't be reached or refuses.
    """
    with _client():
        found = _the_only(workspace.entity, workspace.project, workspace.name, WORKSPACE)
        if found is None:
            return str(workspace.save().url)
        with _readable(workspace.name, WORKSPACE):
            # Of the address only the last part counts; the name in it is the inner one without its ends.
            inner = found.name.removeprefix("nw-").removesuffix("-v")
            saved = ws.Workspace.from_url(f"https://wandb.ai/{workspace.entity}/{workspace.project}?nw={inner}")
        ours = {section.name for section in workspace.sections}
        saved.sections = [*workspace.sections, *(section for section in saved.sections if section.name not in ours)]
        saved.settings.x_axis = workspace.settings.x_axis
        return str(saved.save().url)


def save_report(report: wr.Report) -> str:
    """Save a report, in place of the saved one of its title where there is one; readers' comments stay.

    Args:
        report: What to save.

    Returns:
        Its URL.

    Raises:
        ValueError: If there is no API key, no such project, more than one report of that title, or if the one that
            there is can't be read.
        OSError: If W&B can't be reached or refuses.
    """
    with _client():
        found = _the_only(report.entity, report.project, report.title, REPORT)
        if found is None:
            return str(report.save().url)
        with _readable(report.title, REPORT):
            saved = wr.Report.from_url(found.url)
        saved.blocks, saved.description, saved.width = report.blocks, report.description, report.width
        return str(saved.save().url)


def _the_only(entity: str, project: str, name: str, kind: str) -> Any:
    """The saved view of a name, or None."""
    views = wandb.Api().reports(f"{entity}/{project}")
    # The client lists reports only; saved workspaces are views of another type, under the same query.
    views.variables["viewType"] = kind
    try:
        found = [view for view in views if view.display_name == name]
    except ValueError as error:
        raise ValueError(
            f"W&B has no project {entity}/{project} that this API key may see; a project begins with its first run"
        ) from error
    if len(found) > 1:
        raise ValueError(
            f"{entity}/{project} has {len(found)} {_NAMES[kind]}s of the name {name!r}, and either may be meant: rename"
            " or delete all but one in W&B, or choose another name with --name"
        )
    return found[0] if found else None


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Rather than overwrite what it can't read, say so."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, SpecVersionError, UnsupportedViewError) as error:
        raise ValueError(
            f"wandb-workspaces can't read the saved {_NAMES[kind]} {name!r}, which was changed elsewhere"
            f" ({_line(error)}): update the package, rename the {_NAMES[kind]}, or choose another name with --name"
        ) from error


@contextmanager
def _client() -> Iterator[None]:
    """Errors of W&B's clients, which have no common class, become ours; and nobody is asked for an API key."""
    # The client asks where standard input is a terminal, and takes an empty file for none.
    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    except pydantic.ValidationError as error:
        raise OSError(f"W&B's answer was not understood; a newer wandb may do: {_line(error)}") from error
    except ValueError:
        raise
    except wandb.errors.UsageError as error:
        raise ValueError(f"no W&B API key: run `wandb login`, or set WANDB_API_KEY ({_line(error)})") from error
    except Exception as error:
        time.sleep(_SETTLE)
        raise OSError(f"W&B could not be reached, or refused: {_line(error)}") from error
    finally:
        sys.stdin = terminal


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
