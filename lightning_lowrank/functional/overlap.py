"""How much of one network's work another network's weights see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowrank.functional._tensors import as_matrix, wide_dtype


def leak(other: Tensor, own: Tensor, inputs: Tensor) -> float:
    """|W_other X| / |W_own X|: what summing adds to a layer's pre-activations, relative to what was there.

    X are inputs of the task that ``own`` was trained on. 0 means that the other network's layer does not see these
    inputs, so that summing the weights changes nothing; 1 means that it adds as much as there was. For one hidden layer
    this is the quantity that decides whether a sum works (derived in docs/theory.md).

    Args:
        other: The other network's weight, shape ``(out, in)``.
        own: The own network's weight, shape ``(out, in)``.
        inputs: The layer's inputs on the own network's task, shape ``(samples, in)``.

    Returns:
        The ratio of the Frobenius norms over all samples; NaN where ``own`` maps every sample to 0.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> import torch
        >>> own, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 2.0]])
        >>> leak(other, own, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        0.5
    """
    other, own = as_matrix(other), as_matrix(own)
    if other.shape != own.shape:
        raise ValueError(f"the two weights have shapes {tuple(other.shape)} and {tuple(own.shape)}; they must agree")
    if inputs.ndim != 2 or inputs.shape[1] != own.shape[1]:
        raise ValueError(f"inputs must have shape (samples, {own.shape[1]}), got {tuple(inputs.shape)}")
    x = inputs.detach().to(wide_dtype(inputs))
    moved, there = (torch.linalg.vector_norm(x @ w.to(x).mT).item() for w in (other, own))
    return moved / there if there > 0 else math.nan
