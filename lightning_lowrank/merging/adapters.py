"""PEFT's LoRA adapters in folders: the scale of each update, and the configuration of a merged adapter."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lowrank.merging.engine import Merge
from lightning_lowrank.merging.kinds import MergeError
from lightning_lowrank.merging.plan import Entry

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT puts before and after the name of an adapted module.
_MODULE = re.compile(r"(.*?base_model\.model\.)?(?P<module>.*?)\.lora_(embedding_)?[AB](\..*)?")
# What makes an update something else than scale * B A.
_OTHERWISE = ("use_dora", "use_bdlora", "lora_bias", "megatron_config", "layer_replication", "use_qalora")


@dataclass(frozen=True)
class Adapter:
    """The configuration of an adapter.

    Attributes:
        path: Its file.
        content: What is in it.
    """

    path: Path
    content: dict[str, Any]

    def scale(self, name: str) -> float:
        """The number that PEFT multiplies B A with, for a factor of this name: alpha / r, or alpha / sqrt(r)."""
        rank = self._of("rank_pattern", "r", name)
        root = math.sqrt(rank) if self.content.get("use_rslora") else rank
        return self._of("alpha_pattern", "lora_alpha", name) / root

    def _of(self, patterns: str, default: str, name: str) -> float:
        module = module_of(name)
        for pattern, value in (self.content.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
        return float(self.content[default])


def adapter_of(path: str | Path) -> Adapter | None:
    """The adapter's configuration beside weights that are one; None for other checkpoints.

    Raises:
        ValueError: If it can't be read.
        MergeError: If it is not LoRA of the plain kind.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file() or not (path.is_dir() or path.name in _WEIGHTS):
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        adapter = Adapter(file, content)
        adapter.scale("")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{file} is not the configuration of a LoRA adapter: it has no readable r and lora_alpha"
        ) from error
    used = [name for name in _OTHERWISE if content.get(name)]
    if content.get("peft_type", "LORA") != "LORA" or used:
        what = ", ".join(used) or content["peft_type"]
        raise MergeError(
            f"{file}: only plain LoRA adapters are merged, and this one uses {what}; merge it into its base first"
        )
    return adapter


def adapters_of(paths: Sequence[str | Path], out: Path | None) -> list[Adapter] | None:
    """The configurations of all networks, or None if they are no adapters.

    Raises:
        MergeError: If only some are, or the output would not be found by PEFT.
    """
    found = [adapter_of(path) for path in paths]
    adapters = [adapter for adapter in found if adapter is not None]
    if not adapters:
        return None
    if len(adapters) < len(found):
        raise MergeError("some of the networks are PEFT adapters and some are not; merge adapters with adapters")
    if out is not None and out.name not in _WEIGHTS:
        raise ValueError(
            f"a merged adapter must be called {_WEIGHTS[0]}, so that PEFT finds it; name the output"
            f" {str(out.with_name(_WEIGHTS[0]))!r}, got {out.name!r}"
        )
    return adapters


def notes_on(adapters: Sequence[Adapter]) -> list[str]:
    """What a reader of a merge of adapters has to know."""
    bases = dict.fromkeys(str(adapter.content.get("base_model_name_or_path")) for adapter in adapters)
    return [f"the adapters name different base models: {', '.join(bases)}"] if len(bases) > 1 else []


def merged_config(adapters: Sequence[Adapter], entries: Sequence[Entry], ranks: Mapping[str, int]) -> str:
    """The configuration of a merged adapter: the first one's, with the ranks of the merge and the first one's scales.

    Args:
        adapters: The configurations.
        entries: Of the factors next to the input.
        ranks: Their merged ranks by name.
    """
    scales = {entry.name: adapters[0].scale(entry.name) for entry in entries}
    return json.dumps({**adapters[0].content, **_ranks_and_scales(entries, ranks, scales)}, indent=2) + "\n"


def update_configs(merged: nn.Module, merge: Merge) -> None:
    """Let PEFT's configurations in a merged module say what its adapters are now, so that they can be saved."""
    downs = [entry for entry in merge.plan.entries if entry.pair and entry.pair[0] == entry.name]
    for owner in merged.modules():
        configs = getattr(owner, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, Mapping) else ():
            own = [entry for entry in downs if f".{adapter}." in f"{entry.name}."]
            if own:
                ranks = {entry.name: merge.rank(entry) for entry in own}
                scales = {entry.name: entry.tensors[0].scale for entry in own}
                for name, value in _ranks_and_scales(own, ranks, scales).items():
                    setattr(config, name, value)


def _ranks_and_scales(
    entries: Sequence[Entry], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> dict[str, Any]:
    """The part of a configuration that says which rank and scale each module has."""
    modules = {module_of(entry.name): (ranks[entry.name], scales[entry.name]) for entry in entries}
    rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
    alpha = rank * Counter(scale for _, scale in modules.values()).most_common(1)[0][0]
    alphas = {module: rank * scale for module, (rank, scale) in modules.items()}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): found for name, (found, _) in modules.items() if found != rank},
        "alpha_pattern": {re.escape(name): found for name, found in alphas.items() if found != alpha},
        "use_rslora": False,
    }


def module_of(name: str) -> str:
    """The adapted module of a factor.

    Example:
        >>> module_of("base_model.model.layers.0.q.lora_A.weight")
        'layers.0.q'
    """
    match = _MODULE.fullmatch(name)
    return match["module"] if match else name
