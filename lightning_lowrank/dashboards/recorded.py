"""A run's values, read back from what its logger wrote: CSV files, TensorBoard events or a local W&B run."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

# How far below a folder a run is looked for: runs/<run>, lightning_logs/version_0, <project>/wandb/offline-run-...
_DEPTH = 3
# Runs that an error lists; folders can hold thousands.
_LISTED = 20
# Values that a config may have: more are a bomb of YAML aliases, which grows when it is written out.
_MOST_SETTINGS = 10_000
# What W&B's JSON has for numbers that JSON does not know.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_OF_LIGHTNING = "trainer/global_step"


@dataclass(frozen=True)
class Series:
    """What was logged under one key, in the order of logging.

    Attributes:
        steps: The step of each value, as the logger has it.
        values: The values; NaN where NaN was logged.
    """

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RecordedRun:
    """A run as its logger recorded it.

    Attributes:
        name: The run's name: its folder's, or in W&B its display name.
        source: Which logger wrote it: "CSV", "TensorBoard" or "W&B".
        series: Everything numeric that was logged, by key.
        config: The hyperparameters, as plain data; empty where the logger has none.
    """

    name: str
    source: str
    series: dict[str, Series]
    config: dict[str, Any]


def read_run(path: str | Path) -> RecordedRun:
    """Read what a CSVLogger, TensorBoardLogger or WandbLogger wrote.

    A run that is still going on is read as far as it has been written. No code is run from any file.

    Args:
        path: The run's folder, a folder that holds no other run, or the file itself: ``metrics.csv``,
            ``events.out.tfevents...`` or ``run-....wandb``. Of a folder with rows in CSV and in TensorBoard the CSV is
            read, which has all digits.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there is no run in it, or several, or if it can't be read; the sentence names the file.
        ModuleNotFoundError: If reading it needs a package that is not installed.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger(folder := tempfile.mkdtemp())
        >>> logger.log_metrics({"lowrank/alignment": 0.5}, step=49)
        >>> logger.save()
        >>> run = read_run(folder)
        >>> run.name, run.series["lowrank/alignment"]
        ('lightning_logs/version_0', Series(steps=[49], values=[0.5]))
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    if path.is_dir():
        source, files = _only_run(path)
    else:
        source, files = _source(path.name) or "", [path]
    if source == "CSV":
        run = RecordedRun(_name(files[0]), source, _csv_series(files[0]), _hyperparameters(files[0].parent))
    elif source == "TensorBoard":
        run = RecordedRun(_name(files[0]), source, _event_series(files), _hyperparameters(files[0].parent))
    elif source == "W&B":
        run = _wandb_run(files[0])
    else:
        raise ValueError(
            f"{path} is no run: expected metrics.csv of CSVLogger, events.out.tfevents... of TensorBoardLogger, or"
            " run-....wandb of W&B"
        )
    if not run.series:
        raise ValueError(f"{files[0]} holds no logged numbers; if its run is still going on, wait for its first row")
    return run


def _source(name: str) -> str | None:
    """Which logger a file is from, by its name."""
    if name.endswith(".csv"):
        return "CSV"
    if "tfevents" in name:
        return "TensorBoard"
    return "W&B" if name.endswith(".wandb") else None


def _name(file: Path) -> str:
    folder = file.resolve().parent
    # Lightning's own name for the runs of a folder says nothing by itself.
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def _only_run(folder: Path) -> tuple[str, list[Path]]:
    """The one run in a folder: its logger and its files."""
    runs: list[tuple[str, list[Path]]] = []
    for place, below, names in os.walk(folder):
        found = _runs_in(Path(place), sorted(names))
        runs += found
        # A run's own folder is searched no further: TensorBoard has folders in it for values that share a chart.
        below[:] = [] if found or len(Path(place).relative_to(folder).parts) >= _DEPTH else sorted(below)
    if not runs:
        raise ValueError(
            f"there is no run in {folder}: looked for metrics.csv (CSVLogger), events.out.tfevents..."
            f" (TensorBoardLogger) and run-....wandb (W&B), down to {_DEPTH} folders below it"
        )
    if len(runs) > 1:
        places = [str(files[0] if source == "W&B" else files[0].parent) for source, files in runs]
        more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
        raise ValueError(f"{folder} holds {len(runs)} runs, choose one: {', '.join(places[:_LISTED])}{more}")
    return runs[0]


def _runs_in(folder: Path, names: list[str]) -> list[tuple[str, list[Path]]]:
    """The runs whose files lie in this folder; those of TensorBoard and CSVLogger are one run, which both logged."""
    if "metrics.csv" in names:
        return [("CSV", [folder / "metrics.csv"])]
    if events := [folder / name for name in names if _source(name) == "TensorBoard"]:
        return [("TensorBoard", events)]
    return [("W&B", [folder / name]) for name in names if _source(name) == "W&B"]


def _empty() -> defaultdict[str, Series]:
    return defaultdict(lambda: Series([], []))


def _csv_series(path: Path) -> dict[str, Series]:
    """Rows of CSVLogger; an empty cell was not logged in that row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # A last line without an end is still being written, and its last number may be cut.
            rows = csv.reader(line for line in file if line.endswith(("\n", "\r")))
            header = next(rows, [])
            if "step" not in header:
                raise ValueError(f"{path} has no column 'step', so it is not from CSVLogger; or it is empty")
            if "run" in header:
                raise ValueError(f"{path} holds several runs, as its column 'run' says; choose the folder of one")
            columns = [Series([], []) for _ in header]
            for row in filter(None, rows):
                _add_cells(columns, header.index("step"), row, f"{path}, line {rows.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of comma-separated values: {error}") from error
    return {key: found for key, found in zip(header, columns, strict=True) if found.steps and key != "step"}


def _add_cells(columns: list[Series], place: int, row: list[str], where: str) -> None:
    if len(row) != len(columns):
        raise ValueError(f"{where}: {len(row)} cells under {len(columns)} columns")
    step = _number(row[place], where)
    if not step.is_integer():
        raise ValueError(f"{where}: step {row[place]!r} is no whole number")
    for column, cell in zip(columns, row, strict=True):
        if cell:
            column.steps.append(int(step))
            column.values.append(_number(cell, where))


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"{where}: {cell[:40]!r} is no number") from error


def _event_series(paths: list[Path]) -> dict[str, Series]:
    """Scalars of TensorBoard, of one file after the other."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.compat.proto import event_pb2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading a TensorBoard run needs tensorboard: pip install tensorboard") from error
    series = _empty()
    for path in paths:
        for record in _event_records(path):
            try:
                event = event_pb2.Event.FromString(record)
            except DecodeError as error:
                raise ValueError(f"{path} is damaged: it holds something that is no event of TensorBoard") from error
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                # SummaryWriter(purge_step=...): the run went back to this step, and what was logged since is void.
                _drop_from(series, event.step)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    series[value.tag].steps.append(event.step)
                    series[value.tag].values.append(value.simple_value)
    return {key: found for key, found in series.items() if found.steps}


def _event_records(path: Path) -> Iterator[bytes]:
    """The records of an event file: length (8 bytes), its checksum (4), data, checksum of the data (4).

    TensorBoard's own reader is ten times slower, for it computes the checksums in Python.
    """
    left = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            left -= 12 + length + 4
            if left < 0:
                return  # cut off, or still being written
            yield file.read(length)
            file.read(4)


def _drop_from(series: dict[str, Series], step: int) -> None:
    for key, found in series.items():
        kept = [(s, v) for s, v in zip(found.steps, found.values, strict=True) if s < step]
        series[key] = Series([s for s, _ in kept], [v for _, v in kept])


def _wandb_run(path: Path) -> RecordedRun:
    """History, summary and config of a local W&B run, finished or not."""
    series, name, step = _empty(), path.stem, None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in _wandb_records(path):
        content = record[record["type"]]
        if record["type"] == "history":
            step = _add_history(series, content["item"], step)
            continue
        if record["type"] == "summary":
            summary |= content.get("update", {})
            continue
        if record["type"] == "run":
            name = content.get("display_name") or content.get("run_id") or name
            content = content.get("config", {})
        config |= content.get("update", {})
    for key, value in _only_in_summary(summary, series).items():
        series[key] = Series([step or 0], [value])
    # W&B's own entries: "_wandb", and "_wandb.visualize...." of charts.
    own = {key: value for key, value in config.items() if key.split(".")[0] != "_wandb"}
    return RecordedRun(name, "W&B", dict(series), own)


def _wandb_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records that hold history, config, and what was put into the summary, printed by W&B's own command."""
    executable = shutil.which("wandb", path=str(Path(sys.executable).parent)) or shutil.which("wandb")
    install = "pip install -U 'lightning-lowrank[wandb]'"
    if executable is None:
        raise ModuleNotFoundError(f"reading a W&B run needs wandb: {install}")
    command = [executable, "leet", "inspect", "--json", str(path.resolve())]
    quiet = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    wanted = [f'"type":"{kind}"'.encode() for kind in ("history", "run", "config", "summary")]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=quiet) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            # A summary with the time is the client's own copy of the row before.
            if any(kind in line for kind in wanted) and not (wanted[-1] in line and b'"_timestamp"' in line):
                yield json.loads(line)
        code = process.wait()
        errors.seek(0)
        said = " ".join(errors.read().decode(errors="replace").split())
    if code and "No such command" in said:
        raise ModuleNotFoundError(f"this wandb has no command `leet inspect` to read a run with: {install}")
    if code:
        raise ValueError(f"{path} can't be read by `wandb leet inspect`: {said}")
    if "corrupt" in said:
        rank_zero_warn(f"{path} is damaged, and some rows may be missing: {said}")


def _only_in_summary(summary: Mapping[str, Any], series: Mapping[str, Series]) -> dict[str, float]:
    """Numbers that were never in a row, as a merge's; the best of those that were are no series."""
    found = {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in summary.items()}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in series and key != _OF_LIGHTNING and not key.startswith("_") and "/best/" not in key
    }


def _add_history(series: dict[str, Series], item: dict[str, Any], before: int | None) -> int | None:
    """One row of W&B: its numbers, without W&B's own and without the parts of tables, histograms and media.

    Args:
        series: Takes the numbers.
        item: The row.
        before: Lightning's step in the row before, which one without it belongs to; None if there was none.

    Returns:
        Lightning's step in this row or before.
    """
    of_lightning = item.get(_OF_LIGHTNING)
    seen = of_lightning if isinstance(of_lightning, int) else before
    step = item["_step"] if seen is None else seen
    media = tuple(key.removesuffix("_type") for key in item if key.endswith("._type"))
    for key, value in item.items():
        if isinstance(value, str):
            value = _NOT_FINITE.get(value, value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if key != _OF_LIGHTNING and not key.startswith(("_", *media)):
            series[key].steps.append(step)
            series[key].values.append(float(value))
    return seen


def _hyperparameters(folder: Path) -> dict[str, Any]:
    """Lightning's hparams.yaml as plain data; empty where there is none, or none that plain YAML can say."""
    import yaml

    try:
        content = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
        return _plain(content, iter(range(_MOST_SETTINGS))) if isinstance(content, dict) else {}
    # ValueError: not UTF-8, or a date that is none. StopIteration, RecursionError: aliases that grow, or go in circles.
    except (OSError, ValueError, yaml.YAMLError, StopIteration, RecursionError):
        return {}


def _plain(value: Any, room: Iterator[int]) -> Any:
    """The value in dicts, lists, strings and numbers; StopIteration when there are more of them than room."""
    next(room)
    if isinstance(value, dict):
        return {str(key): _plain(item, room) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item, room) for item in list(value)]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
