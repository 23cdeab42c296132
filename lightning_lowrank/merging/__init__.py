"""Merging trained networks."""

from lightning_lowrank.merging.checkpoints import merge_checkpoints
from lightning_lowrank.merging.evaluation import WeightSumMerger
from lightning_lowrank.merging.kinds import MergeError
from lightning_lowrank.merging.modules import merge_modules
from lightning_lowrank.merging.policy import MergePolicy
from lightning_lowrank.merging.report import MergeReport

__all__ = ["MergeError", "MergePolicy", "MergeReport", "WeightSumMerger", "merge_checkpoints", "merge_modules"]
