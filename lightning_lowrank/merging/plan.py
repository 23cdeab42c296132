"""MergePlan: what a merge does with every tensor, as data and as a table."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from lightning_lowrank.merging.kinds import Described

_WIDTH = 130


@dataclass(frozen=True)
class Entry:
    """One tensor of the merge.

    Attributes:
        name: Its name, without wrappers' prefixes.
        kind: What it is, as a policy calls it.
        rule: How the merged tensor is made.
        reason: Why it has that rule.
        shape: Its shape in the first network.
        dtype: Its type in the first network, and in the merge.
        tensors: It in every network, the base last; of a head only in the network that keeps it.
        pair: Names of the two factors (down, up) if it is one of a LoRA update.
    """

    name: str
    kind: str
    rule: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[Described, ...] = field(repr=False)
    pair: tuple[str, str] | None = None


@dataclass(frozen=True)
class MergePlan:
    """One rule per tensor of a merge.

    Attributes:
        entries: The tensors in the order of the first network, tied ones once.
        labels: What the networks are called.
        has_base: Whether the networks have a common start.
        lora_rank: The rank of merged LoRA updates; None keeps them exact.
        notes: What to be careful about.
    """

    entries: Sequence[Entry]
    labels: Sequence[str]
    has_base: bool = False
    lora_rank: int | None = None
    notes: Sequence[str] = ()

    def counts(self) -> dict[str, int]:
        """How many tensors have each kind and rule, as "linear: sum"."""
        return dict(Counter(f"{entry.kind}: {entry.rule}" for entry in self.entries))

    def __str__(self) -> str:
        """The plan as a table, a row per tensor."""
        out = io.StringIO()
        Console(file=out, width=_WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        """The table for a rich console, as wide as that is."""
        columns = (Column(name, overflow="fold") for name in ("tensor", "shape", "type", "kind", "rule", "reason"))
        table = Table(*columns, box=SIMPLE_HEAD, show_edge=False)
        table.padding = (0, 1, 0, 0)
        for entry in self.entries:
            shape = "x".join(map(str, entry.shape)) or "scalar"
            cells = (entry.name, shape, str(entry.dtype).removeprefix("torch."), entry.kind, entry.rule, entry.reason)
            table.add_row(*map(escape, cells))
        how = "W0 + sum of c_i (W_i - W0)" if self.has_base else "sum of c_i W_i"
        counted = ", ".join(f"{count} {pair}" for pair, count in self.counts().items())
        summary = Text(f"{len(self.entries)} tensors of {len(self.labels)} networks ({how}): {counted}")
        return Group(table, summary, *(Text(f"Note: {note}") for note in self.notes))
