"""The command line: ``lightning-lowrank demo`` and ``lightning-lowrank inspect``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_lowrank import __version__

if TYPE_CHECKING:
    from lightning_lowrank.weight_report import WeightReport

_FIGURES = (".png", ".pdf", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command's words; those of the process by default.

    Returns:
        The exit code: 0, or 1 with one sentence on standard error.
    """
    parser = ArgumentParser(
        prog="lightning-lowrank",
        description="Stationarity of training with weight decay, and merging by summing weights.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("demo", _demo_options(), help="the whole product in a minute, on scikit-learn's digits")
    commands.add_subcommand("inspect", _inspect_options(), help="norms, ranks and singular values of a checkpoint")
    options = parser.parse_args(None if arguments is None else list(arguments))
    run = {"demo": _demo, "inspect": _inspect}[options.command]
    try:
        run(options[options.command])
    except (OSError, ValueError, ImportError) as error:
        print(f"lightning-lowrank {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lightning-lowrank {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo_options() -> ArgumentParser:
    demo = ArgumentParser(
        description="Train two networks on two halves of real digits, sum their weights, see if it works."
    )
    demo.add_argument(
        "--output", type=Path, default=Path("lowrank-demo"), help="folder for the results (made if missing)"
    )
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds to repeat it with, such as 0 1 2")
    return demo


def _inspect_options() -> ArgumentParser:
    inspect = ArgumentParser(
        description="Norms, ranks and singular values of every weight matrix in a file; nothing is trained or run."
    )
    inspect.add_argument(
        "checkpoint", type=str, help="a .ckpt, .pt or .safetensors file, an index of several, or their folder"
    )
    inspect.add_argument("--json", type=Path, help="save the report, singular values included, as this .json file")
    inspect.add_argument("--figure", type=Path, help=f"draw the spectra to this file ({', '.join(_FIGURES)})")
    inspect.add_argument("--include", type=str, nargs="+", default=[], help="patterns of names to measure, as 'net.*'")
    inspect.add_argument("--exclude", type=str, nargs="+", default=[], help="patterns of names to leave out")
    inspect.add_argument(
        "--matrices",
        type=str,
        nargs="+",
        default=[],
        help="how weights are read: pattern=kind, as '*.attn.weight=qkv' or '*.conv.weight=groups:32' (pattern=none"
        " leaves one out), or all in one JSON object",
    )
    inspect.add_argument("--fast", action="store_true", help="the largest singular values alone")
    return inspect


def _demo(options: Any) -> None:
    from lightning_lowrank.demo import run

    run(options.output, options.seeds, Console())


def _inspect(options: Any) -> None:
    from lightning_lowrank.inspection import inspect_weights

    # What can't be written is known before an hour of decompositions.
    _check_output(options.json, (".json",))
    _check_output(options.figure, _FIGURES)
    if options.figure is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning-lowrank[examples]'")
    with warnings.catch_warnings():
        # The report has it as a note.
        warnings.filterwarnings("ignore", "entries that are not finite", RuntimeWarning)
        report = inspect_weights(
            options.checkpoint,
            matrices=_overrides(options.matrices),
            include=options.include,
            exclude=options.exclude,
            spectra="norm" if options.fast else "full",
            progress=sys.stderr.isatty(),
        )
    console = Console()
    # Into a file or a pipe as wide as names need it.
    console.print(report) if console.is_terminal else print(report)
    if options.figure is not None:
        _draw(report, options.figure)
    if options.json is not None:
        report.save(options.json)


def _check_output(path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path is not None and path.suffix not in suffixes:
        raise ValueError(f"{str(path)!r} should end in {' or '.join(suffixes)}")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r}; make it first")


def _draw(report: WeightReport, path: Path) -> None:
    # Under its final name once it is whole.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure, _ = report.plot()
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _overrides(words: Sequence[str]) -> dict[str, str | None]:
    """Pattern and kind of every ``pattern=kind``, or of a JSON object."""
    pairs: dict[str, Any] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            try:
                pairs |= json.loads(word)
            except json.JSONDecodeError as error:
                raise ValueError(f"--matrices {word!r} is not JSON: {error}") from error
        else:
            pattern, equals, kind = word.rpartition("=")
            if not (pattern and equals):
                raise ValueError(f"--matrices takes pattern=kind, as '*.attn.weight=qkv', got {word!r}")
            pairs[pattern] = kind
    return {pattern: None if kind in ("none", None) else kind for pattern, kind in pairs.items()}


if __name__ == "__main__":
    sys.exit(main())
