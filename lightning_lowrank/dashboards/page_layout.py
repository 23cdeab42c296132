"""What the HTML page is made of, and how it becomes one file: styles, scripts and numbers are all within it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import lightning_lowrank
from lightning_lowrank.dashboards.charts import Chart
from lightning_lowrank.dashboards.verdicts import Verdict, shown

# What the bundle of Vega hands to the page's script.
_EXPOSED = "window.vegaEmbed = vegaEmbed;"
# Of a configuration's entries, their lengths and their depth: enough to recognise a run by.
_MOST_SETTINGS, _MOST_LETTERS, _DEEPEST = 200, 200, 6

_LOADER = PackageLoader("lightning_lowrank", "dashboards/templates")

Cell = float | str  # counts are int, and are written in full


class Column(NamedTuple):
    """A table's column: its heading, whether it holds numbers, and a remark below the heading."""

    title: str
    numeric: bool = True
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that a reader can sort by any column; the first cell names the row.

    Attributes:
        title: Its heading.
        text: What the numbers are.
        columns: One per cell of a row.
        rows: Numbers and texts.
        of_layers: Whether rows are layers, which charts can highlight.
    """

    title: str
    text: str
    columns: list[Column]
    rows: list[list[Cell]]
    of_layers: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with what explains it.

    Attributes:
        title: Its heading.
        text: How to read it.
        label: What it shows, for those who don't see it.
        chart: Specification and numbers.
        columns: Of the table of its last values; empty where a table of the page has them.
        rows: Of that table.
    """

    title: str
    text: str
    label: str
    chart: Chart
    columns: list[Column] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass
class Block:
    """A question with its figures and tables, the titles of what was not measured, and remarks."""

    heading: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Part:
    """What belongs together: an optimizer's verdicts and blocks, or a report's.

    Attributes:
        heading: Empty where the page has but one part.
        verdicts: Its headlines.
        blocks: Its questions.
        decay: The cumulative decay ``y`` at steps ``x``, where it can take the place of the steps.
    """

    heading: str
    verdicts: list[Verdict] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    decay: dict[str, list[float]] | None = None


def described(title: str, kind: str, names: Sequence[str], ends: Sequence[float]) -> str:
    """A chart in words: what it is, and its last value or the range of them.

    Example:
        >>> described("Stable rank", "lines", ["a", "b"], [3.0, 2.0])
        'Stable rank. Chart of 2 lines. Last values from 2 (b) to 3 (a).'
    """
    found = [(value, name) for value, name in zip(ends, names, strict=True) if math.isfinite(value)]
    if not found:
        return f"{title}. Chart without values."
    if len(found) == 1:
        return f"{title}. Chart of one of {kind}. Last value {shown(found[0][0])}."
    (low, of_low), (high, of_high) = min(found), max(found)
    return (
        f"{title}. Chart of {len(found)} {kind}. Last values from {shown(low)} ({of_low}) to {shown(high)} ({of_high})."
    )


def settings_of(config: Mapping[str, Any], within: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """A configuration's entries as names and texts, nested ones with dots; long texts are cut.

    Args:
        config: Plain data.
        within: What names begin with.
        depth: How deep it lies in the whole; what lies very deep is one text.

    Example:
        >>> settings_of({"lr": 0.1, "net": {"widths": [8, 8]}})
        [('lr', '0.1'), ('net.widths', '[8, 8]')]
    """
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            found += settings_of(value, f"{within}{key}.", depth + 1)
        else:
            text = str(value)
            found.append((f"{within}{key}", text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"))
    return found[:_MOST_SETTINGS]


def render(
    title: str,
    kind: str,
    facts: Sequence[tuple[str, str]],
    parts: Sequence[Part],
    settings: Sequence[tuple[str, str]],
    command: str,
) -> str:
    """The page as one text of HTML.

    Args:
        title: Of the run or report.
        kind: What it is of.
        facts: Names and texts that stand below the title.
        parts: In their order.
        settings: Names and texts of a configuration.
        command: What made the page.

    Raises:
        ModuleNotFoundError: If vl-convert-python is not installed.
    """
    environment = Environment(
        loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(typeset=_typeset, breakable=_breakable)
    figures = [(n, figure) for n, part in enumerate(parts) for block in part.blocks for figure in block.figures]
    tables = [table for part in parts for block in part.blocks for table in block.tables if table.of_layers]
    layers = list(dict.fromkeys(row[0] for table in tables for row in table.rows)) if figures else []
    scripts = [*([_bundle()] if figures else []), _source(environment, "page.js")]
    numbered = {id(figure): index for index, (_, figure) in enumerate(figures)}
    drawn = [{"part": part, **_drawn(figure.chart)} for part, figure in figures]
    return environment.get_template("page.html.jinja").render(
        title=title,
        kind=kind,
        facts=facts,
        parts=parts,
        settings=settings,
        command=command,
        number_of=lambda figure: numbered[id(figure)],
        exchangeable=any(part.decay for part in parts),
        layers=layers,
        style=Markup(_source(environment, "page.css")),
        scripts=[Markup(text) for text in scripts],
        policy=_policy(scripts),
        data=Markup(_json({"decay": [part.decay for part in parts], "layers": layers, "charts": drawn})),
        version=lightning_lowrank.__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        text_of=_text_of,
        is_number=lambda cell: not isinstance(cell, str) and math.isfinite(cell),
    )


def _drawn(chart: Chart) -> dict[str, Any]:
    """What the page's script needs of a chart."""
    return {"kind": chart.kind, "steps": chart.steps, "spec": chart.spec, "legend": chart.legend, **chart.data}


def _source(environment: Environment, name: str) -> str:
    """A file as the browser reads it, and hashes it: with plain ends of lines, whatever they are on the disk."""
    return _LOADER.get_source(environment, name)[0].replace("\r\n", "\n")


def _typeset(text: str) -> Markup:
    """A text as HTML, the norms |W|_F and |W|_2 and squares in it as they are written by hand.

    Example:
        >>> str(_typeset("|W|_F^2 < 1"))
        '|W|<sub>F</sub>² &lt; 1'
    """
    indexed = re.sub(r"\|_([F2])(?![\w.])", r"|<sub>\1</sub>", str(escape(text)))
    return Markup(indexed.replace("^2", "²"))


def _breakable(name: str) -> Markup:
    """A parameter's name as HTML that may be broken after its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))


def _text_of(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else shown(cell)


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script; putting it together takes a second."""
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the HTML page needs vl-convert-python: pip install 'lightning-lowrank[html]'"
        ) from error
    # The page ends a script at the first such letters, wherever they stand; and the bundle's many names are its own.
    return f"(() => {{{javascript_bundle(_EXPOSED)}\n}})();".replace("</script", "<\\/script")


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy: nothing is fetched, and no script runs but the page's own.

    Vega compiles its expressions, which are the specifications' own and hold no name from the run, by ``eval``.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    own = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-eval' {own}"


def _json(data: Any) -> str:
    """JSON that nothing in it can end the script element of: no tag, and ASCII alone."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
