"""Stationarity metrics for Lightning runs with weight decay, and merging of trained networks by summing weights."""

from lightning_lowrank.callbacks import LowRankMonitor
from lightning_lowrank.merging import MergeError, MergeReport, WeightSumMerger, merge_modules
from lightning_lowrank.optimizers import register_optimizer
from lightning_lowrank.stationarity import measure_stationarity
from lightning_lowrank.stationarity_report import StationarityReport

__version__ = "0.1.0"

__all__ = [
    "LowRankMonitor",
    "MergeError",
    "MergeReport",
    "StationarityReport",
    "WeightSumMerger",
    "measure_stationarity",
    "merge_modules",
    "register_optimizer",
]
