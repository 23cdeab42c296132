"""Stationarity metrics for Lightning runs with weight decay, and merging of trained networks by summing weights."""

from lightning_lowrank.callbacks import LowRankMonitor
from lightning_lowrank.merging import MergeError, MergeReport, WeightSumMerger, merge_modules

__version__ = "0.1.0"

__all__ = ["LowRankMonitor", "MergeError", "MergeReport", "WeightSumMerger", "merge_modules"]
