"""Lightning callbacks."""

from lightning_lowrank.callbacks.monitor import LowRankMonitor

__all__ = ["LowRankMonitor"]
