"""Merge cards: what was merged and how, beside the merged file, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_lowrank._json_report import json_text
from lightning_lowrank.merging.atomic import Draft
from lightning_lowrank.merging.engine import Merge
from lightning_lowrank.merging.output import Output
from lightning_lowrank.merging.report import MergeReport
from lightning_lowrank.weights import StoredWeights

_PACKAGES = ("lightning-lowrank", "torch", "lightning", "safetensors")
_MISSING, _UNKNOWN = "missing", "unknown"


def card_paths(out: Path) -> tuple[Path, Path]:
    """Where the card of a merged file is: JSON and Markdown."""
    return out.with_name(f"{out.name}.card.json"), out.with_name(f"{out.name}.card.md")


def card_of(
    paths: Sequence[str | Path],
    base: str | Path | None,
    stored: Sequence[StoredWeights],
    merge: Merge,
    output: Output,
    hashes: Mapping[Path, str],
    hash_name: str,
    command: str,
) -> dict[str, Any]:
    """Everything about a merge that a reader may want to check, as plain data."""

    def files_of(path: str | Path, one: StoredWeights) -> dict[str, Any]:
        files = {file.name: {hash_name: hashes[file], "bytes": file.stat().st_size} for file in one.files}
        return {"path": str(path), "format": one.format, "files": files}

    inputs = [files_of(path, one) for path, one in zip(paths, stored, strict=False)]
    return {
        "inputs": inputs,
        "base": None if base is None else files_of(base, stored[-1]),
        "output": {"name": output.path.name, hash_name: output.digest(), "bytes": output.position},
        "rules": merge.plan.counts(),
        "tensors": [
            {"name": e.name, "kind": e.kind, "rule": e.rule, "shape": list(merge.shape(e)), "type": str(e.dtype)[6:]}
            for e in merge.plan.entries
        ],
        "hyper_parameters": differences([one.rest.get("hyper_parameters") for one in stored[: len(paths)]]),
        "versions": {name: _version(name) for name in _PACKAGES},
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def differences(hyper_parameters: Sequence[Any]) -> dict[str, list[str]]:
    """The hyperparameters that differ between networks: their values, in the order of the networks.

    Example:
        >>> differences([{"width": 8, "lr": 0.1}, {"width": 8}])
        {'lr': ['0.1', 'missing']}
    """
    tables = [dict(found) if isinstance(found, Mapping) else {} for found in hyper_parameters]
    names = dict.fromkeys(str(name) for table in tables for name in table)
    # A network without any has not saved them: that is no difference.
    values = {
        name: [repr(table[name]) if name in table else _MISSING if table else _UNKNOWN for table in tables]
        for name in names
    }
    return {name: found for name, found in values.items() if len({*found} - {_UNKNOWN}) > 1}


def write_card(
    report: MergeReport, out: Path, publish_output: Callable[[bool], None], force: bool, beside: Mapping[Path, str]
) -> None:
    """Write a merged file's card beside it.

    An old card is removed before the file gets its name, so that no card ever stands beside a file that it does not
    describe.

    Args:
        report: With a card.
        out: The merged file.
        publish_output: Gives the merged file its name, replacing another one or not.
        force: Whether another one is replaced. If not, its card is not this merge's to remove either.
        beside: Texts of other files that belong to it, by path.
    """
    texts = zip(card_paths(out), (json_text(report.to_dict()), markdown(report)), strict=True)
    drafts = []
    with ExitStack() as stack:
        for path, text in (*texts, *beside.items()):
            drafts.append(stack.enter_context(Draft(path)))
            drafts[-1].write(text)
        if force:
            for draft in drafts:
                draft.path.unlink(missing_ok=True)
        publish_output(force)
        for draft in drafts:
            draft.publish()


def markdown(report: MergeReport) -> str:
    """The card as model hubs show it: YAML in front, then text and tables."""
    card, name = report.card, report.card["output"]["name"]
    sources = [*card["inputs"], *([card["base"]] if card["base"] else [])]
    hash_name = next(key for key in card["output"] if key not in ("name", "bytes"))
    lines = ["---", "library_name: lightning", "tags:", "- merge", "- lightning-lowrank", "---", "", f"# {name}", ""]
    sign = "W0 + sum of c_i (W_i - W0)" if card["base"] else "sum of c_i W_i"
    lines += [f"A merge by weights: {sign} with c = {report.settings['coefficients']}.", ""]
    lines += [f"Policy: `{report.settings['policy']}`.", ""]
    lines += ["## Files", "", f"| role | file | bytes | {hash_name} |", "|---|---|---|---|"]
    roles = [f"network {number}" for number in range(1, len(card["inputs"]) + 1)] + ["base"]
    for role, source in zip(roles, sources, strict=False):
        for file, found in source["files"].items():
            lines.append(f"| {role} | {_cell(file)} | {found['bytes']} | `{found[hash_name]}` |")
    lines += [f"| output | {_cell(name)} | {card['output']['bytes']} | `{card['output'][hash_name]}` |", ""]
    lines += ["## Rules", "", "| kind: rule | tensors |", "|---|---|"]
    lines += [f"| {pair} | {count} |" for pair, count in card["rules"].items()]
    if card["hyper_parameters"]:
        lines += ["", "## Hyperparameters that differ", "", "| name | " + " | ".join(roles[:-1]) + " |"]
        lines += ["|---" * len(roles) + "|"]
        lines += [f"| {_cell(k)} | " + " | ".join(map(_cell, v)) + " |" for k, v in card["hyper_parameters"].items()]
    lines += _evaluation(report)
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    lines += ["", "## How it was made", "", f"    {card['command']}", ""]
    lines += [", ".join(f"{package} {found}" for package, found in card["versions"].items()) + f", {card['created']}"]
    return "\n".join(lines) + "\n"


def _evaluation(report: MergeReport) -> list[str]:
    if not report.tasks:
        return ["", "## Evaluation", "", "None was given."]
    lines = ["", "## Evaluation", "", "| task | metric | " + " | ".join(report.models) + " |"]
    lines.append("|---" * (2 + len(report.models)) + "|")
    for task in report.tasks:
        for metric in report.metric_names(task):
            values = [report.metrics.get(f"{task}/{model}/{metric}", math.nan) for model in report.models]
            shown = ["-" if math.isnan(value) else f"{value:.4g}" for value in values]
            lines.append(f"| {_cell(task)} | {_cell(metric)} | " + " | ".join(shown) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING
