"""The command line: ``lightning-lowrank demo``, ``inspect``, ``merge``, ``report`` and ``dashboard``."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_lowrank import MergeError, __version__

if TYPE_CHECKING:
    from lightning_lowrank.merging.policy import MergePolicy
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
    commands.add_subcommand("merge", _merge_options(), help="merge checkpoints by summing their weights")
    commands.add_subcommand("report", _report_options(), help="one HTML page of a training run, from its logs")
    commands.add_subcommand("dashboard", _dashboard_options(), help="a W&B workspace for the runs of a project")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    runs: dict[str, Callable[[Any], None]] = {"demo": _demo, "inspect": _inspect, "merge": partial(_merge, words)}
    runs |= {"report": _report, "dashboard": _dashboard}
    try:
        runs[options.command](options[options.command])
    except MergeError as error:
        # A list of obstacles, one per line.
        print(f"lightning-lowrank {options.command}: {error}", file=sys.stderr)
        return 1
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
    demo.add_argument(
        "--wandb", type=Literal["online", "offline"] | None, help="write W&B runs of the networks and merges as well"
    )
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
    inspect.add_argument(
        "--include", type=str, nargs="+", action="extend", default=[], help="patterns of names to measure, as 'net.*'"
    )
    inspect.add_argument(
        "--exclude", type=str, nargs="+", action="extend", default=[], help="patterns of names to leave out"
    )
    inspect.add_argument(
        "--matrices",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="how weights are read: pattern=kind, as '*.attn.weight=qkv' or '*.conv.weight=groups:32' (pattern=none"
        " leaves one out), or all in one JSON object",
    )
    inspect.add_argument("--fast", action="store_true", help="the largest singular values alone")
    return inspect


def _merge_options() -> ArgumentParser:
    merge = ArgumentParser(
        description="Merge trained networks in files by summing their weights, or W0 + sum of c (W - W0) with --base."
        " Files are Lightning checkpoints, state dicts of torch.save, safetensors (one, or an index of several) or"
        " folders of torch.distributed.checkpoint. Nothing of them is run, and memory does not grow with them."
    )
    merge.add_argument("checkpoints", type=str, nargs="+", help="two or more files or folders")
    merge.add_argument("-o", "--output", type=Path, required=True, help="the file to write: .ckpt, .pt or .safetensors")
    merge.add_argument("--base", type=str, help="the checkpoint that all of them were trained from")
    merge.add_argument("--coefficients", type=float, nargs="+", help="one number per checkpoint; all 1 by default")
    merge.add_argument(
        "--rule",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="rules by name or kind, as '*.head.*=first' or 'embedding=mean'; rules are sum, mean, first, equal, pooled"
        " and error",
    )
    merge.add_argument("--lora-rank", type=int, help="truncate merged LoRA updates to this rank")
    merge.add_argument("--raw", action="store_true", help="of WeightAveraging checkpoints the raw weights")
    merge.add_argument("--evaluation", type=Path, help="a saved MergeReport of an evaluation, for the merge card")
    merge.add_argument("--hash", type=Literal["blake3", "sha256"], default="blake3", help="used in the merge card")
    merge.add_argument(
        "--dry-run", action="store_true", help="print what would be done with every tensor; no values are read"
    )
    merge.add_argument("--force", action="store_true", help="replace the output if it exists")
    return merge


def _report_options() -> ArgumentParser:
    report = ArgumentParser(
        description="One HTML page of a training run: verdicts, charts, layers and merges, with all that it needs in"
        " itself. Runs are those of CSVLogger, TensorBoardLogger, and WandbLogger as it writes them to disk."
    )
    report.add_argument("run", type=Path, help="the run's folder, or its metrics.csv, event or .wandb file")
    report.add_argument("-o", "--output", type=Path, default=Path("lowrank-report.html"), help="the page to write")
    report.add_argument("--prefix", type=str, default="lowrank", help="what the keys of LowRankMonitor begin with")
    report.add_argument("--merge-prefix", type=str, default="merge", help="what the keys of a merge begin with")
    return report


def _dashboard_options() -> ArgumentParser:
    dashboard = ArgumentParser(
        description="Make a W&B workspace for the runs of a project, or bring the one of that name up to date."
    )
    dashboard.add_argument("--entity", type=str, required=True, help="the team or user that the project belongs to")
    dashboard.add_argument("--project", type=str, required=True, help="the project whose runs are shown")
    dashboard.add_argument(
        "--name", type=str, default="Low-rank training", help="of the workspace, and the report's title"
    )
    dashboard.add_argument("--report", action="store_true", help="make a W&B report that explains each panel as well")
    dashboard.add_argument("--prefix", type=str, default="lowrank", help="what the keys of LowRankMonitor begin with")
    dashboard.add_argument("--merge-prefix", type=str, default="merge", help="what the keys of a merge begin with")
    dashboard.add_argument("--optimizers", type=int, default=1, help="how many optimizers the runs have")
    dashboard.add_argument(
        "--x-axis", type=Literal["global_step", "cumulative_decay"], default="global_step", help="of the line plots"
    )
    dashboard.add_argument(
        "--dry-run", action="store_true", help="print the JSON; nothing is sent and no key is needed"
    )
    return dashboard


def _demo(options: Any) -> None:
    from lightning_lowrank.demo import run

    run(options.output, options.seeds, Console(), options.wandb)


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


def _merge(words: Sequence[str], options: Any) -> None:
    from lightning_lowrank.merging.checkpoints import check_target, merge_checkpoints, prepare
    from lightning_lowrank.merging.report import MergeReport

    policy = _policy(options.rule, options.lora_rank)
    evaluation = None if options.evaluation is None else MergeReport.load(options.evaluation)
    console = Console()
    check_target(options.output, [*options.checkpoints, *([options.base] if options.base else [])], options.force)
    if options.dry_run:
        plan = prepare(options.checkpoints, options.base, options.coefficients, policy, raw=options.raw)[1].plan
        console.print(plan) if console.is_terminal else print(plan)
        return
    with _terminated():
        report = merge_checkpoints(
            options.checkpoints,
            options.output,
            base=options.base,
            coefficients=options.coefficients,
            policy=policy,
            raw=options.raw,
            force=options.force,
            hash_name=options.hash,
            evaluation=evaluation,
            progress=sys.stderr.isatty(),
            command=shlex.join(["lightning-lowrank", *words]),
        )
    console.print(report) if console.is_terminal else print(report)


def _report(options: Any) -> None:
    from lightning_lowrank._json_report import write_text
    from lightning_lowrank.dashboards.page import run_page
    from lightning_lowrank.dashboards.recorded import read_run

    _check_output(options.output, (".html",))
    page = run_page(read_run(options.run), options.prefix, options.merge_prefix)
    print(f"Wrote {write_text(options.output, page)}")


def _dashboard(options: Any) -> None:
    if find_spec("wandb_workspaces") is None:
        raise ModuleNotFoundError("W&B workspaces need wandb-workspaces: pip install 'lightning-lowrank[wandb]'")
    from lightning_lowrank.dashboards.workspace import dashboard

    names = ("report", "name", "prefix", "merge_prefix", "optimizers", "x_axis", "dry_run")
    print(dashboard(options.entity, options.project, **{name: options[name] for name in names}))


def _policy(words: Sequence[str], lora_rank: int | None) -> MergePolicy:
    """The policy of every ``pattern=rule`` and ``kind=rule``."""
    from lightning_lowrank.merging.kinds import Kind
    from lightning_lowrank.merging.policy import MergePolicy

    names: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for word in words:
        pattern, equals, rule = word.rpartition("=")
        if not (pattern and equals):
            raise ValueError(
                f"--rule takes a pattern of names or a kind, and a rule, as '*.head.*=first', got {word!r}"
            )
        (kinds if pattern in {kind.value for kind in Kind} else names)[pattern] = rule
    return MergePolicy(kinds, names, lora_rank=lora_rank)


@contextmanager
def _terminated() -> Iterator[None]:
    """Let a request to end the process unwind it, so that temporary files are removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {end: signal.signal(end, stop) for end in ends}
    try:
        yield
    finally:
        for end, handler in previous.items():
            signal.signal(end, handler)


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
