"""Merging trained networks."""

from lightning_lowrank.merging.evaluation import WeightSumMerger
from lightning_lowrank.merging.modules import merge_modules
from lightning_lowrank.merging.policy import MergeError
from lightning_lowrank.merging.report import MergeReport

__all__ = ["MergeError", "MergeReport", "WeightSumMerger", "merge_modules"]
