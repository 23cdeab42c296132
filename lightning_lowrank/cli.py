"""The command line: ``lightning-lowrank demo``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_lowrank import __version__


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
    demo = ArgumentParser(
        description="Train two networks on two halves of real digits, sum their weights, see if it works."
    )
    demo.add_argument(
        "--output", type=Path, default=Path("lowrank-demo"), help="folder for the results (made if missing)"
    )
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds to repeat it with, such as 0 1 2")
    commands.add_subcommand("demo", demo, help="the whole product in a minute, on scikit-learn's digits")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        return _demo(options.demo.output, options.demo.seeds)
    except (OSError, ValueError, ImportError) as error:
        print(f"lightning-lowrank {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lightning-lowrank {options.command}: interrupted", file=sys.stderr)
        return 130


def _demo(output: Path, seeds: list[int]) -> int:
    from lightning_lowrank.demo import run

    run(output, seeds, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
