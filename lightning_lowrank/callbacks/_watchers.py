"""Callbacks and schedulers that watch one of our keys: EarlyStopping, ModelCheckpoint, ReduceLROnPlateau."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lowrank._compat import checks_until_finite, monitored_keys
from lightning_lowrank.callbacks._keys import SPECTRAL_KEYS


class Watchers:
    """Makes sure that nothing stops or raises because one of our keys has no value yet.

    Lightning's EarlyStopping raises on a missing key and stops on NaN, ModelCheckpoint raises on a missing key once a
    validation has run, a plateau scheduler raises on a missing key. Several of our values need more than a step. So
    until a watched key has its first value EarlyStopping passes over its checks, ModelCheckpoint finds NaN, which it
    ranks last, and a scheduler waits.
    """

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._trainer = trainer
        self._watched = monitored_keys(trainer, prefix)
        self._paused: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._watched)

    @property
    def spectra(self) -> bool:
        """Whether a value that needs spectra is watched."""
        return any(part in SPECTRAL_KEYS for key in self._watched for part in key.split("/"))

    def prepare(self, available: Sequence[str], scalars: Sequence[str], *, layers_known: bool) -> None:
        """Say which watched key the run will not have, and make the watchers of all others wait for their first value.

        Args:
            available: Every key of this run.
            scalars: Those without the per-layer ones.
            layers_known: Whether ``available`` has the per-layer keys already.
        """
        for key, watchers in self._watched.items():
            names = ", ".join(type(watcher).__name__ for watcher in watchers)
            if key not in available and (layers_known or key in scalars or key.count("/") == 1):
                rank_zero_warn(
                    f"{names} monitors {key!r}, which this run does not measure{_why_missing(key)}. It measures:"
                    f" {', '.join(scalars)}, and values per layer."
                )
                continue
            self._wait(key, watchers)

    def _wait(self, key: str, watchers: Sequence[Any]) -> None:
        waiting = [watcher for watcher in watchers if checks_until_finite(watcher, self._trainer, key)]
        self._paused += waiting
        if waiting:
            names = ", ".join(type(watcher).__name__ for watcher in waiting)
            rank_zero_info(f"LowRankMonitor: {names} waits for the first value of {key!r}, and checks from then on.")
        if any(watcher not in waiting for watcher in watchers):
            self._trainer.callback_metrics.setdefault(key, torch.tensor(torch.nan))

    def release(self) -> None:
        """Give the watchers back as they were."""
        for watcher in self._paused:
            vars(watcher).pop("_run_early_stopping_check", None)
        self._paused = []


def _why_missing(key: str) -> str:
    if {"alignment", "residual"}.isdisjoint(key.split("/")):
        return ""
    return (
        ": it exists where gradient='window' or 'full', or where one optimizer step sees the whole epoch, and where the"
        " weight decay is coupled"
    )
