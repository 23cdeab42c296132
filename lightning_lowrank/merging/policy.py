"""MergePolicy: one rule per tensor, decided before anything is computed."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lowrank.merging.kinds import Described, Kind, describe_module, describe_stored, refusal
from lightning_lowrank.merging.plan import Entry, MergePlan
from lightning_lowrank.weights import stored_weights, with_normalised

Table = Mapping[str, Described]


class Rule(enum.Enum):
    """How a merged tensor is made. The value is what a policy calls it."""

    SUM = "sum"
    MEAN = "mean"
    FIRST = "first"
    EQUAL = "equal"
    POOLED = "pooled"
    ERROR = "error"


# What a kind's tensors get, and why; docs/merging.md has the measurements.
DEFAULTS: dict[Kind, tuple[Rule, str]] = {
    Kind.LINEAR: (Rule.SUM, "what a network learned adds up"),
    Kind.CONVOLUTION: (Rule.SUM, "what a network learned adds up"),
    Kind.BIAS: (Rule.SUM, "what a network learned adds up"),
    Kind.EMBEDDING: (Rule.SUM, "what a network learned adds up"),
    Kind.OTHER: (Rule.SUM, "what a network learned adds up"),
    Kind.LORA: (Rule.SUM, "the updates add up: factors are concatenated, not summed"),
    Kind.NORMALISATION: (Rule.MEAN, "gains of about 1 would sum to 2; the shift follows its gain"),
    Kind.GAIN: (Rule.MEAN, "it multiplies what passes through: two would double it"),
    Kind.STATISTIC: (Rule.MEAN, "moments of data, not learned; re-estimate them where they matter"),
    Kind.INTEGER: (Rule.FIRST, "counters and indices have no sum"),
    Kind.FROZEN: (Rule.EQUAL, "not trained: kept once, a sum would double it"),
    Kind.BUFFER: (Rule.EQUAL, "part of the architecture, not learned"),
    Kind.UNKNOWN: (Rule.EQUAL, "may be a buffer or a parameter"),
    Kind.HEAD: (Rule.FIRST, "each task keeps its own"),
}
# Rules that have no meaning for a kind, with the reason.
_MEANINGLESS = {
    (Kind.INTEGER, Rule.SUM): "integers count or index something; a sum may leave their type",
    (Kind.INTEGER, Rule.MEAN): "integers count or index something; a mean is none",
    (Kind.BUFFER, Rule.SUM): "it belongs to the architecture; a sum is a different one",
}
# Why the magnitudes of weight-decomposed updates can't be merged.
_DORA = "DoRA's updates have no sum in their factors; merge each adapter into its base first (merge_and_unload)"


class MergePolicy:
    """Which rule a tensor gets in a merge: by name pattern, else by kind, else the default of its kind.

    Rules: "sum" (with the coefficients, around the base if there is one), "mean", "first" (the first network's),
    "equal" (must be equal in all networks, kept once), "pooled" (running means and variances as those of the networks'
    data together), "error" (refused). LoRA factors are concatenated under "sum" and "mean", so that the update is the
    sum or mean of the updates.

    Kinds: "linear", "convolution", "bias", "normalisation" (gain and shift), "gain" (PReLU's slope, LayerScale, a
    temperature), "statistic" (running mean and variance), "integer" (buffer), "embedding", "lora", "frozen", "buffer",
    "other" (a parameter that is none of these), "unknown" (in files: neither name nor shape tells).

    Args:
        kinds: Rules by kind, for those that should not have the default.
        names: Rules by glob pattern of tensor names; the first pattern that fits decides.
        lora_rank: The largest rank of a merged LoRA update; a higher one is truncated, by its singular values. None
            keeps them exact, with the sum of the ranks.

    Raises:
        ValueError: If a kind or rule does not exist or has no meaning for the kind, or the rank is below 1.

    Example:
        >>> policy = MergePolicy(kinds={"bias": "mean"}, names={"1.*": "first"})
        >>> nets = [nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(2)]
        >>> [(entry.name, entry.rule) for entry in policy.plan(*nets).entries]
        [('0.weight', 'sum'), ('0.bias', 'mean'), ('1.weight', 'first'), ('1.bias', 'first')]
    """

    def __init__(
        self,
        kinds: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
        *,
        lora_rank: int | None = None,
    ) -> None:
        settable = [kind for kind in Kind if kind is not Kind.HEAD]
        self.kinds = {_one_of(settable, kind, "kind"): _one_of(Rule, rule, "rule") for kind, rule in _items(kinds)}
        self.names = {str(pattern): _one_of(Rule, rule, "rule") for pattern, rule in _items(names)}
        if lora_rank is not None and (isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 1):
            raise ValueError(f"lora_rank must be a positive integer or None, got {lora_rank!r}")
        self.lora_rank = lora_rank
        for kind, rule in self.kinds.items():
            if obstacle := _obstacle(kind, rule):
                raise ValueError(f"rule {rule.value!r} has no meaning for kind {kind.value!r}: {obstacle}")

    def __repr__(self) -> str:
        kinds = {kind.value: rule.value for kind, rule in self.kinds.items()}
        names = {pattern: rule.value for pattern, rule in self.names.items()}
        return f"MergePolicy(kinds={kinds}, names={names}, lora_rank={self.lora_rank})"

    def with_pooled(self) -> MergePolicy:
        """The same policy with running statistics pooled."""
        copied = MergePolicy(lora_rank=self.lora_rank)
        copied.kinds, copied.names = {**self.kinds, Kind.STATISTIC: Rule.POOLED}, self.names
        return copied

    def plan(
        self,
        m1: nn.Module | str | Path,
        m2: nn.Module | str | Path,
        *more: nn.Module | str | Path,
        base: nn.Module | str | Path | None = None,
    ) -> MergePlan:
        """What a merge would do with every tensor; nothing is computed or written. ``print`` it.

        Args:
            m1: The first network: a module, or the path of a checkpoint.
            m2: The second.
            more: Further networks.
            base: Their common start.

        Raises:
            MergeError: If the networks can't be merged; the message lists every obstacle.
        """
        named = {**{f"model {number}": source for number, source in enumerate((m1, m2, *more), 1)}}
        tables = {label: _described(source, label) for label, source in named.items()}
        return self.plan_tables(tables, None if base is None else _described(base, "base"))

    def plan_tables(
        self, tables: Mapping[str, Table], base: Table | None = None, heads: Sequence[str | None] | None = None
    ) -> MergePlan:
        """The plan for networks that are described already.

        Args:
            tables: What each network holds, by the label that messages call it by.
            base: What the common start holds.
            heads: Per network a glob pattern of the tensors that it alone has a say in, or None.
        """
        everything = {**tables, **({} if base is None else {"base": base})}
        labels = list(tables)
        first = everything[labels[0]]
        owners = _owners_of_heads(tables, heads or [None] * len(labels))
        problems = _differences(everything, owners)
        self._check_patterns(first)
        entries = []
        for name, one in first.items():
            if one.tied_to != name:
                continue
            names = [alias for alias, tensor in first.items() if tensor.tied_to == name]
            kind, rule, reason = self._decide(names, one) if name not in owners else _head(owners[name])
            if len(names) > 1:
                reason += f"; tied to {some(names[1:])}"
            if rule is Rule.ERROR:
                problems.append(f"{name}: the policy refuses it ({reason})")
            if obstacle := _obstacle(kind, rule):
                problems.append(f"{name}: {kind.label} can't have rule {rule.value!r}: {obstacle}")
            holders = [everything[owners[name]]] if name in owners else everything.values()
            tensors = tuple(table[name] for table in holders if name in table)
            shape, dtype = tensors[0].shape, tensors[0].dtype
            entries.append(Entry(name, kind.value, rule.value, reason, shape, dtype, tensors, one.pair))
        problems += _split_pairs(entries)
        problems += [f"{name}: {_DORA}" for name in first if "lora_magnitude_vector" in name]
        if problems:
            raise refusal(problems)
        return MergePlan(entries, labels, base is not None, self.lora_rank, _cautions(entries, base is not None))

    def _decide(self, names: Sequence[str], described: Described) -> tuple[Kind, Rule, str]:
        kind = described.kind
        told = f" ({described.why})" if described.why else ""
        for pattern, rule in self.names.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return kind, rule, f"asked for by the pattern {pattern!r}"
        if kind in self.kinds:
            return kind, self.kinds[kind], f"asked for by the kind {kind.value!r}{told}"
        rule, reason = DEFAULTS[kind]
        return kind, rule, f"{reason}{told}"

    def _check_patterns(self, table: Table) -> None:
        for pattern in self.names:
            if not any(fnmatchcase(name, pattern) for name in table):
                kinds = ", ".join(kind.value for kind in Kind if kind is not Kind.HEAD)
                raise ValueError(
                    f"the policy's pattern {pattern!r} matches no tensor; there are: {some(list(table))} (and kinds:"
                    f" {kinds})"
                )


def _items(mapping: Mapping[str, str] | None) -> list[tuple[str, str]]:
    if not isinstance(mapping, (Mapping, type(None))):
        raise ValueError(f"a policy's kinds and names are dicts of rules, got {mapping!r}")
    return list((mapping or {}).items())


def _one_of(choices: Any, value: Any, what: str) -> Any:
    by_value = {choice.value: choice for choice in choices}
    if value not in by_value:
        raise ValueError(f"there is no {what} {value!r}; there are {', '.join(by_value)}")
    return by_value[value]


def _obstacle(kind: Kind, rule: Rule) -> str | None:
    if rule is Rule.POOLED and kind is not Kind.STATISTIC:
        return "only running statistics are pooled"
    return _MEANINGLESS.get((kind, rule))


def _described(source: Any, label: str) -> Table:
    if isinstance(source, nn.Module):
        return describe_module(source, label)
    return describe_stored(with_normalised(stored_weights(source)))


def _owners_of_heads(tables: Mapping[str, Table], heads: Sequence[str | None]) -> dict[str, str]:
    """Which network keeps each head tensor; where several patterns fit, the first network's."""
    owners: dict[str, str] = {}
    for (label, table), pattern in zip(tables.items(), heads, strict=True):
        if pattern is None:
            continue
        found = [name for name in table if fnmatchcase(name, pattern)]
        if not found:
            there = some(list(table))
            raise ValueError(f"heads: the pattern {pattern!r} matches no tensor of {label}; there are: {there}")
        for name in found:
            # A head that is tied to another tensor takes that with it.
            owners.setdefault(table[name].tied_to, label)
            owners.setdefault(name, label)
    return owners


def _head(label: str) -> tuple[Kind, Rule, str]:
    rule, reason = DEFAULTS[Kind.HEAD]
    return Kind.HEAD, rule, f"{reason}: that of {label}"


def _differences(tables: Mapping[str, Table], heads: Collection[str]) -> list[str]:
    """Everything in which the networks do not fit together, heads aside."""
    (one, first), *others = tables.items()
    problems = []
    for other, table in others:
        # A second name of a tied tensor may be absent: some formats store the tensor once.
        missing = [name for name in first if name not in table and first[name].tied_to == name]
        extra = [name for name in table if name not in first and table[name].tied_to == name]
        problems += [f"{name}: only in {one}, not in {other}" for name in missing if name not in heads]
        problems += [f"{name}: only in {other}, not in {one}" for name in extra if name not in heads]
        for name in (name for name in first if name in table and name not in heads):
            problems += _difference(name, first[name], table[name], one, other)
    return problems


def _difference(name: str, one: Described, other: Described, first: str, label: str) -> list[str]:
    problems = []
    if not _shapes_fit(one, other):
        problems.append(f"{name}: shape {one.shape} in {first} and {other.shape} in {label}")
    if one.kind != other.kind and label != "base":
        problems.append(f"{name}: {one.kind.label} in {first} and {other.kind.label} in {label}")
    if one.tied_to != other.tied_to:
        ties = [f"tied to {tensor.tied_to}" if tensor.tied_to != name else "not tied" for tensor in (one, other)]
        problems.append(f"{name}: {ties[0]} in {first} and {ties[1]} in {label}")
    return problems


def _shapes_fit(one: Described, other: Described) -> bool:
    """Equal, or factors of updates of one shape with different ranks."""
    if one.shape == other.shape or not (one.kind is other.kind is Kind.LORA and one.pair):
        return one.shape == other.shape
    return len(one.shape) == len(other.shape) and sum(a != b for a, b in zip(one.shape, other.shape, strict=True)) == 1


def _split_pairs(entries: Sequence[Entry]) -> list[str]:
    rules = {entry.name: entry.rule for entry in entries}
    problems = []
    for down, up in {entry.pair for entry in entries if entry.pair}:
        if rules.get(down) != rules.get(up):
            problems.append(f"{down} has rule {rules.get(down)!r} and {up} {rules.get(up)!r}; a pair has one rule")
    return problems


def _cautions(entries: Sequence[Entry], has_base: bool) -> list[str]:
    """What a policy asks for that has no meaning without a common start."""
    risky = {Kind.NORMALISATION.value, Kind.GAIN.value, Kind.FROZEN.value, Kind.STATISTIC.value}
    names = [entry.name for entry in entries if entry.rule == Rule.SUM.value and entry.kind in risky]
    if has_base or not names:
        return []
    return [
        f"{some(names)}: gains, statistics or frozen parameters are summed because the policy says so; without base="
        " that multiplies what the networks have in common"
    ]


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, in one line."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
