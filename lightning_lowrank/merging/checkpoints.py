"""merge_checkpoints: networks in files, merged tensor by tensor into a file, whatever their size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn

from lightning_lowrank.merging.adapters import CONFIG, Adapter, adapter_of, adapters_of, merged_config, notes_on
from lightning_lowrank.merging.arithmetic import rounded
from lightning_lowrank.merging.card import card_of, card_paths, write_card
from lightning_lowrank.merging.engine import Merge, check_coefficients
from lightning_lowrank.merging.formats import Part, write_safetensors, write_torch
from lightning_lowrank.merging.kinds import MergeError, describe_module, describe_stored, refusal
from lightning_lowrank.merging.output import FileHashes, Hash, Output
from lightning_lowrank.merging.plan import Entry, MergePlan
from lightning_lowrank.merging.policy import MergePolicy, some
from lightning_lowrank.merging.report import MergeReport
from lightning_lowrank.weights import StoredWeights, stored_weights, with_normalised

_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# What belongs to a training run and not to its network: it means nothing for a merge.
_OF_THE_RUN = re.compile(
    r"(?i).*(optim|sched|scaler|scaling|rng|averaging|ema|loops|callbacks|precision|sampler|grad).*|loss|train_.*"
)
# Bytes beside the tensors that an output may take.
_MARGIN = 1 << 20


def merge_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    coefficients: Sequence[float] | None = None,
    policy: MergePolicy | None = None,
    module: nn.Module | None = None,
    raw: bool = False,
    force: bool = False,
    hash_name: Hash = "blake3",
    evaluation: MergeReport | None = None,
    progress: bool = False,
    command: str | None = None,
) -> MergeReport:
    """Merge networks in files by summing their weights, tensor by tensor.

    Files are Lightning checkpoints, state dicts of ``torch.save``, safetensors (one or several with an index) and
    folders of ``torch.distributed.checkpoint``. They are mapped, not loaded, so private memory does not grow with the
    model. The output is written under a temporary name and renamed when it is whole and on the disk; without an error
    it is there, and after one nothing is. Beside it a merge card says what was merged and how: ``<out>.card.json``,
    which :meth:`MergeReport.load` reads, and ``<out>.card.md``.

    A Lightning checkpoint stays one, with the first network's hyperparameters; optimizer states, callbacks and loops
    are left out. Of a ``WeightAveraging`` checkpoint the averaged weights are merged.

    Args:
        paths: The networks. Tensors are paired by name; the output has the names and types of the first.
        out: The file to write: .ckpt, .pt, .pth or .bin as ``torch.save`` does, or .safetensors.
        base: The common start of all the networks.
        coefficients: One number per network; all 1 by default.
        policy: Other rules for some tensors, see :class:`MergePolicy`. In a file kinds are told by names and shapes;
            what can't be told has to be equal, or named in the policy.
        module: A module of the same architecture, which tells the kinds of tensors, frozen ones included. Its values
            are not read: it may be on the meta device.
        raw: Merge the weights that a ``WeightAveraging`` callback averages instead of the average.
        force: Whether an existing output may be replaced. An input never is.
        hash_name: Of inputs and output, in the card: "blake3", or "sha256", which takes longer than the merge.
        evaluation: A report of :meth:`WeightSumMerger.evaluate` on the same networks, for the card.
        progress: Whether to show a progress bar on standard error.
        command: What the card gives as the command; by default a call of this function.

    Raises:
        MergeError: If the networks can't be merged; the message names every tensor concerned.
        FileExistsError: If the output exists and ``force`` is not set, or is one of the inputs.
        FileNotFoundError: If an input or the output's folder does not exist.
        OSError: If the disk is full or does not take what is written.
        ValueError: If an input is damaged, would run code, or is changed while it is read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> nets = [nn.Linear(3, 2) for _ in range(2)]
        >>> for number, net in enumerate(nets):
        ...     torch.save(net.state_dict(), folder / f"{number}.pt")
        >>> report = merge_checkpoints([folder / "0.pt", folder / "1.pt"], folder / "merged.pt")
        >>> merged = torch.load(folder / "merged.pt")
        >>> torch.equal(merged["weight"], nets[0].weight + nets[1].weight)
        True
    """
    target = check_target(out, [*paths, *([] if base is None else [base])], force)
    stored, merge = prepare(paths, base, coefficients, policy, module, raw)
    adapters = adapters_of(paths, target)
    if adapters:
        _check_absent(target.with_name(CONFIG), force)
    if evaluation is not None:
        _check_same_merge(evaluation, merge)
    files = [file for one in stored for file in one.files]
    if target.exists() and any(target.samefile(file) for file in files):
        raise FileExistsError(f"the output {str(target)!r} is one of the files of an input; name another file")
    size = sum(_bytes(merge, entry) for entry in merge.plan.entries)
    _check_space(target, size)
    settings = {
        "coefficients": list(merge.coefficients),
        "base": None if base is None else str(base),
        "policy": repr(policy or MergePolicy()),
        "raw": raw,
    }
    with FileHashes(files, hash_name) as hashes, Output(target, hash_name) as output, _bar(progress) as bar:
        notes = _write(output, stored[0], merge, partial(bar.advance, bar.add_task("merging", total=size)))
        output.finish()
        card = card_of(
            paths, base, stored, merge, output, hashes.result(), hash_name, command or _call(paths, out, settings)
        )
        notes = [*_notes(stored, merge), *notes_on(adapters or []), *notes]
        report = MergeReport({}, [], {}, notes, settings, card)
        if evaluation is not None:
            report = replace(
                evaluation,
                notes=[*evaluation.notes, *notes],
                settings={**evaluation.settings, **settings},
                card=card,
            )
        write_card(report, target, output.publish, force, _config(adapters, merge, target))
    return report


def prepare(
    paths: Sequence[str | Path],
    base: str | Path | None = None,
    coefficients: Sequence[float] | None = None,
    policy: MergePolicy | None = None,
    module: nn.Module | None = None,
    raw: bool = False,
) -> tuple[list[StoredWeights], Merge]:
    """Open the files and plan their merge; nothing is computed.

    Returns:
        The files' contents, the base's last, and the merge.
    """
    if isinstance(paths, (str, Path)) or len(paths) < 2:
        raise ValueError(f"a merge needs two or more checkpoints, got {paths!r}")
    weights = check_coefficients(coefficients, len(paths))
    labels = _labels(paths)
    stored = [with_normalised(stored_weights(path, raw=raw)) for path in paths]
    kinds = None if module is None else describe_module(module)
    tables = {}
    adapters = adapters_of(paths, None)
    if adapters:
        stored = [replace(o, files=(*o.files, a.path)) for o, a in zip(stored, adapters, strict=True)]
    for number, (label, one) in enumerate(zip(labels, stored, strict=True)):
        _check_mergeable(one, label)
        tables[label] = describe_stored(one, kinds, adapters[number].scale if adapters else None)
    start = None
    if base is not None:
        stored.append(with_normalised(stored_weights(base)))
        _check_mergeable(stored[-1], "base")
        adapter = adapter_of(base)
        start = describe_stored(stored[-1], kinds, adapter.scale if adapter else None)
    return stored, Merge((policy or MergePolicy()).plan_tables(tables, start), weights)


def check_target(out: str | Path, inputs: Sequence[str | Path], force: bool) -> Path:
    """The output's path, if a merge may write it.

    Raises:
        OSError: If it, or its card, is there and ``force`` is not set, is an input, or has no folder.
        ValueError: If its suffix is not known.
    """
    target = Path(out)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"the output {str(target)!r} should end in {', '.join(_SUFFIXES)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} for the output; make it first")
    for path in map(Path, inputs):
        inside = path.is_dir() and target.parent.resolve() == path.resolve()
        if inside or (target.exists() and path.exists() and target.samefile(path)):
            raise FileExistsError(f"the output {str(target)!r} is an input, or in the folder of one; name another file")
    for file in (target, *card_paths(target)):
        _check_absent(file, force)
    return target


def _check_absent(file: Path, force: bool) -> None:
    if file.is_dir():
        raise FileExistsError(f"{str(file)!r} is a folder; name a file")
    if file.exists() and not force:
        raise FileExistsError(f"{str(file)!r} exists; name another output, or pass force (--force) to replace it")


def _check_same_merge(evaluation: MergeReport, merge: Merge) -> None:
    """Refuse the evaluation of another merge: its numbers would stand in this one's card."""
    found = evaluation.settings.get("coefficients"), evaluation.settings.get("base")
    here = list(merge.coefficients), merge.plan.has_base
    for name, theirs, ours in zip(("coefficients", "base"), found, here, strict=True):
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"the evaluation is that of another merge: {name} was {theirs} there and is {ours} here; evaluate this"
                " merge, or leave the evaluation out"
            )


def _config(adapters: Sequence[Adapter] | None, merge: Merge, target: Path) -> dict[Path, str]:
    """The configuration that stands beside a merged adapter."""
    if not adapters:
        return {}
    downs = [entry for entry in merge.plan.entries if entry.pair and entry.pair[0] == entry.name]
    ranks = {entry.name: merge.rank(entry) for entry in downs}
    return {target.with_name(CONFIG): merged_config(adapters, downs, ranks)}


def _check_space(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size + _MARGIN:
        raise OSError(
            f"the output takes {size / 1e9:.3g} GB and {str(target.parent)!r} has {free / 1e9:.3g} GB left; make room,"
            " or write to another disk"
        )


def _check_mergeable(stored: StoredWeights, label: str) -> None:
    """Refuse tensors that a merge would leave out silently."""
    parts = {part for pair in stored.normalised.values() for part in pair[:2]}
    if lost := [name for name in stored.keys if name not in {*stored.shapes, *stored.tied, *parts}]:
        reasons = {name: stored.left_out.get(name, "computed by a parametrization") for name in lost}
        raise refusal([f"{name}: {why} in {label}; it has no sum" for name, why in reasons.items()])


def _write(output: Output, first: StoredWeights, merge: Merge, advance: Any) -> list[str]:
    """Write the merged file; what was left out of it is returned as notes."""
    parts = dict(_parts(first, merge, advance))
    if output.path.suffix == ".safetensors":
        by_key = {first.keys[name]: part for name, part in parts.items()}
        is_same = first.format == "safetensors"
        metadata = {str(key): str(value) for key, value in first.rest.items()} if is_same else {"format": "pt"}
        write_safetensors(output, by_key, metadata)
        left_out = [*first.tied, *first.others, *([] if is_same else first.rest)]
        return [f"left out, as safetensors hold only tensors and each once: {some(left_out)}"] if left_out else []
    placeholders = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in parts.items()}
    state: dict[str, Any] = {key: placeholders[first.tied.get(name, name)] for name, key in first.keys.items()}
    content, left_out = _around(first, state | first.others)
    write_torch(output, content, {id(placeholders[name]): part.pieces for name, part in parts.items()})
    where = first.files[0].name
    return [f"left out, as it belongs to the run that made {where}: {some(left_out)}"] if left_out else []


def _parts(first: StoredWeights, merge: Merge, advance: Any) -> Iterator[tuple[str, Part]]:
    """Everything that is stored of the merged network, by name; of a normalised weight its length and direction."""
    for entry in merge.plan.entries:
        part = Part(entry.dtype, merge.shape(entry), partial(_tracked, merge, entry, advance))
        if entry.name not in first.normalised:
            yield entry.name, part
            continue
        length, direction, shape = first.normalised[entry.name]
        yield direction, part
        yield length, Part(entry.dtype, shape, partial(_length, merge, entry, shape))


def _length(merge: Merge, entry: Entry, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The norms of a merged weight over the dimensions in which its length has size 1."""
    fixed = [axis for axis, size in enumerate(shape) if size == 1]
    norms = torch.linalg.vector_norm(merge.tensor(entry).double(), dim=fixed or None, keepdim=True)
    yield rounded(norms, entry.dtype).reshape(-1)


def _around(first: StoredWeights, state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint around a state dict, and what of it belongs to the run alone."""
    if not first.holder:
        return state, []
    kept = {key: value for key, value in first.rest.items() if not _OF_THE_RUN.fullmatch(str(key))}
    return {**kept, first.holder: state}, [str(key) for key in first.rest if key not in kept]


def _tracked(merge: Merge, entry: Entry, advance: Any) -> Iterator[Tensor]:
    """The pieces of an entry, counted, with its name in errors."""
    done = 0
    try:
        for piece in merge.pieces(entry):
            done += piece.numel() * piece.element_size()
            if done > _MARGIN:
                advance(done)
                done = 0
            yield piece
    except MergeError as error:
        raise refusal([f"{entry.name}: {error}"]) from error
    advance(done)


def _bytes(merge: Merge, entry: Entry) -> int:
    return entry.dtype.itemsize * torch.Size(merge.shape(entry)).numel()


def _notes(stored: Sequence[StoredWeights], merge: Merge) -> list[str]:
    """What a reader of the report has to know."""
    plan: MergePlan = merge.plan
    notes = [*dict.fromkeys(note for one in stored for note in one.notes), *plan.notes]
    if shared := merge.shared():
        notes.append(
            f"{some(shared)}: equal in all networks, so the sum multiplied them by {sum(merge.coefficients):g}. If"
            " the networks share them (a frozen backbone), merge again with the rule 'equal' for their names, or with a"
            " base"
        )
    if tables := merge.differing_integers():
        notes.append(f"{some(tables)}: integers that differ between the networks; the first network's are kept")
    notes += merge.truncations()
    grown = [entry.name for entry in plan.entries if merge.shape(entry) != entry.shape]
    if grown and not any(file.name == CONFIG for file in stored[0].files):
        notes.append(
            f"{some(grown)}: of another rank than in the first network; build the module with that rank and with the"
            " first network's scale, which is alpha / rank in most (so alpha grows with the rank)"
        )
    if stored[0].others:
        notes.append(f"{some([*stored[0].others])}: no tensors, so the first network's are kept")
    return notes


def _labels(paths: Sequence[str | Path]) -> list[str]:
    """What messages call the networks: their files' names, numbered where those are equal."""
    names = [Path(path).name for path in paths]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown, transient=True)


def _call(paths: Sequence[str | Path], out: str | Path, settings: dict[str, Any]) -> str:
    policy = settings["policy"]
    options = "".join(f", {name}={settings[name]!r}" for name in ("base", "coefficients", "raw"))
    return f"merge_checkpoints({[str(path) for path in paths]}, {str(out)!r}{options}, policy={policy})"
