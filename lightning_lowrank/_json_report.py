"""Reports as files: JSON with a schema version and NaN as null, or an HTML page; written whole or not at all."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar


class Saved:
    """A dataclass that can be written as JSON and as a page, and shown in a notebook; the base of every report."""

    schema_version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data with a schema version; NaN stays NaN."""
        return {"schema_version": self.schema_version, **asdict(self)}  # type: ignore[call-overload]

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, NaN as null, or as an HTML page with all that it needs in itself.

        Args:
            path: A name that ends in .json, which ``load`` reads again, or in .html.

        Raises:
            ValueError: If the name ends in neither, or the folder does not exist.
            ModuleNotFoundError: If a page is wanted and vl-convert-python is not installed.
        """
        if Path(path).suffix != ".html":
            return write_report(path, self.to_dict())
        from lightning_lowrank.dashboards.page import report_page

        return write_text(path, report_page(self))  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f'<pre style="white-space: pre; overflow-x: auto">{html.escape(str(self))}</pre>'


def write_report(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a report's dict as JSON; numbers that are not finite become null.

    Raises:
        ValueError: If the name does not end in .json, or the folder does not exist.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"a report is saved as .json, or as an .html page, got {Path(path).name!r}")
    return write_text(path, json_text(content))


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file under its final name only once it is whole.

    Raises:
        ValueError: If the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to save a report in; make it first")
    # A crash while writing must not leave half a report under the final name.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def json_text(content: dict[str, Any]) -> str:
    """A report's dict as the text of a file; numbers that are not finite become null."""
    return json.dumps(_nulled(content), indent=2, allow_nan=False) + "\n"


def read_report(path: str | Path, version: int) -> dict[str, Any]:
    """Read what :func:`write_report` wrote, without its schema version; null stays None.

    Raises:
        ValueError: If the file is of another schema, or no JSON.
        KeyError: If it has no schema version.
        TypeError: If it holds no object.
    """
    content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"holds a {type(content).__name__}, not an object")
    found = content.pop("schema_version")
    if found != version:
        raise ValueError(f"{path} has schema version {found}; this version reads {version}")
    return content


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
