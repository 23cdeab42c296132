"""Reading back everything that an offline W&B run wrote."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import wandb_records


class OfflineRun:
    """The records of a run's folder, by what they mean."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = wandb_records(SimpleNamespace(dir=str(folder / "files")))
        self.history = [record["history"]["item"] for record in self.records if record["type"] == "history"]

    @property
    def name(self) -> str:
        return re.findall(r'"display_name": ?"([^"]+)"', json.dumps(self.records))[0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of the monitor."""
        return [row for row in self.history if "lowrank/overhead" in row]

    @property
    def keys(self) -> set[str]:
        """Everything in the history; a table is one key."""
        every = {key for row in self.history for key in row}
        tables = {key.removesuffix("._type") for key in every if key.endswith("._type")}
        return tables | {key for key in every if not any(key.startswith(f"{table}.") for table in tables)}

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.records:
            update = record.get("config", record.get("run", {}).get("config", {})).get("update", {})
            for key, value in update.items():
                old = found.get(key)
                found[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return found

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.records:
            if record["type"] == "summary":
                found |= record["summary"].get("update", {})
        return found

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        return [record["artifact"] for record in self.records if record["type"] == "artifact"]

    def tables(self, key: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Every version of a table with its row, in the order in which they were written."""
        found = []
        for row in self.history:
            path = row.get(f"{key}.path") or (row.get(key) or {}).get("path")
            if path:
                found.append((row, json.loads((self.folder / "files" / path).read_text())))
        return found


def offline_runs(folder: Path) -> list[OfflineRun]:
    return [OfflineRun(found) for found in sorted((folder / "wandb").glob("offline-run-*"))]


def number(value: Any) -> float:
    """NaN reads back as the string."""
    return float(value) if isinstance(value, (int, float)) else {"NaN": math.nan}[value]
