"""Weights wherever they are, read one tensor at a time: modules, state dicts, files and folders of checkpoints."""

from lightning_lowrank.weights.files import stored_weights
from lightning_lowrank.weights.modules import Weight, named_weights, weights_of_module
from lightning_lowrank.weights.source import StoredWeights, weights_of_mapping, with_normalised

__all__ = [
    "StoredWeights",
    "Weight",
    "named_weights",
    "stored_weights",
    "weights_of_mapping",
    "weights_of_module",
    "with_normalised",
]
