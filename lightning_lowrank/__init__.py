"""Stationarity metrics for Lightning runs with weight decay, and merging of trained networks by summing weights."""

from lightning_lowrank.callbacks import LowRankMonitor
from lightning_lowrank.inspection import inspect_weights
from lightning_lowrank.merging import (
    MergeError,
    MergePolicy,
    MergeReport,
    WeightSumMerger,
    merge_checkpoints,
    merge_modules,
)
from lightning_lowrank.optimizers import register_optimizer
from lightning_lowrank.stationarity import measure_stationarity
from lightning_lowrank.stationarity_report import StationarityReport
from lightning_lowrank.weight_report import WeightReport

__version__ = "0.1.0"

__all__ = [
    "LowRankMonitor",
    "MergeError",
    "MergePolicy",
    "MergeReport",
    "StationarityReport",
    "WeightReport",
    "WeightSumMerger",
    "inspect_weights",
    "measure_stationarity",
    "merge_checkpoints",
    "merge_modules",
    "register_optimizer",
]
