"""Spectra of all weight matrices of a module, a state dict or a file: no data, no training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_lowrank.functional import (
    circular_convolution_norm,
    effective_rank,
    energy_outside,
    frobenius_norm,
    numerical_rank,
    singular_values,
    spectral_norm,
)
from lightning_lowrank.functional._certificate import wide
from lightning_lowrank.matrices import Layout, Overrides, layouts_of_names, weight_layouts
from lightning_lowrank.weight_report import MatrixSpectrum, WeightReport
from lightning_lowrank.weights import (
    StoredWeights,
    stored_weights,
    weights_of_mapping,
    weights_of_module,
    with_normalised,
)

# Types whose numbers are the weights. Integers and bytes are codes, which mean nothing without their scales.
_TYPES = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
_SPECTRA = ("full", "norm")


def inspect_weights(
    source: nn.Module | Mapping[str, Any] | str | Path,
    *,
    matrices: Overrides | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    spectra: Literal["full", "norm"] = "full",
    progress: bool = False,
) -> WeightReport:
    """Norms, ranks and singular values of every weight matrix.

    A matrix is a parameter of two or more dimensions, unfolded to (out, in x kernel area). Grouped convolutions are
    block-diagonal, queries, keys and values of a fused projection are matrices of their own, as are a recurrent layer's
    gates, and behind a parametrisation it is the effective weight that counts. Of files one tensor at a time is read.

    Args:
        source: A module; a state dict, or a loaded checkpoint that holds one; or the path of a file of safetensors, of
            an index or folder of several, of a Lightning checkpoint (distributed or not), or of a state dict that
            ``torch.save`` wrote. In a file only names and shapes are known, so some layers can be told apart less well
            than in a module.
        matrices: How weights are read, where that is decided wrongly: see
            :func:`lightning_lowrank.matrices.weight_layouts`.
        include: Glob pattern or patterns; only weights whose name matches one are measured.
        exclude: Glob pattern or patterns of weights that are left out.
        spectra: "full" computes all singular values. "norm" computes the largest alone, to a thousandth, which is much
            faster for large matrices; what needs the others is NaN.
        progress: Whether to show a progress bar on standard error.

    Warns:
        RuntimeWarning: If a weight has entries that are not finite; its values are NaN.

    Raises:
        ValueError: If no matrix is left, a pattern in ``matrices`` is wrong, or a file's content is not readable or
            would run code.
        FileNotFoundError: If there is no such file.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = nn.init.eye_(net[0].weight)
        >>> report = inspect_weights(net)
        >>> [(row.name, row.shape) for row in report.matrices]
        [('0.weight', (3, 4)), ('2.weight', (2, 3))]
        >>> round(report.matrices[0].stable_rank, 6)
        3.0
    """
    if spectra not in _SPECTRA:
        raise ValueError(f"spectra must be one of {_SPECTRA}, got {spectra!r}")
    where, stored, layouts = _opened(source, matrices)
    left_out = dict(stored.left_out)
    for name, shape in stored.shapes.items():
        if len(shape) > 1 and stored.dtypes[name] not in _TYPES:
            left_out[name] = f"entries of type {stored.dtypes[name]}"
        elif len(shape) > 1 and name not in layouts:
            left_out[name] = "not a matrix"
    wanted = _selected([name for name in layouts if name not in left_out], _patterns(include), _patterns(exclude))
    if not wanted:
        raise ValueError(
            f"{where} has no weight matrix to inspect" + (" that is included" if include or exclude else "")
        )
    rows: list[MatrixSpectrum] = []
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        for name in bar.track(wanted, description="spectra"):
            rows += _rows(name, stored.read(name), layouts[name], spectra == "full")
    notes = [*stored.notes, *_warn_of([row.name for row in rows if not row.finite])]
    return WeightReport(where, spectra, rows, left_out, notes)


def _opened(source: Any, overrides: Overrides | None) -> tuple[str, StoredWeights, dict[str, Layout]]:
    """What the source is called, its tensors, and how they are read."""
    if isinstance(source, nn.Module):
        return type(source).__name__, weights_of_module(source), weight_layouts(source, overrides)
    if isinstance(source, (str, Path)):
        where, stored = str(source), stored_weights(source)
    elif isinstance(source, Mapping):
        where, stored = "state dict", weights_of_mapping(source)
    else:
        raise ValueError(f"inspect_weights takes a module, a state dict or a path, got a {type(source).__name__}")
    stored = with_normalised(stored)
    return where, stored, layouts_of_names(stored.shapes, overrides)


def _patterns(patterns: str | Sequence[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _selected(names: list[str], include: list[str], exclude: list[str]) -> list[str]:
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} matches no weight matrix; there are: {', '.join(names) or 'none'}")
    included = [name for name in names if not include or any(fnmatchcase(name, pattern) for pattern in include)]
    return [name for name in included if not any(fnmatchcase(name, pattern) for pattern in exclude)]


def _rows(name: str, tensor: Tensor, layout: Layout, full: bool) -> Iterator[MatrixSpectrum]:
    """The matrices that a tensor holds."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    for label, piece in layout.pieces(tensor).items():
        yield _measured(f"{name}[{label}]" if label else name, piece, layout, full)


def _measured(name: str, tensor: Tensor, layout: Layout, full: bool) -> MatrixSpectrum:
    """One row: the spectrum of a block-diagonal matrix is that of its blocks together."""
    blocks = layout.blocks(tensor)
    groups, rows, columns = blocks.shape
    finite = bool(torch.isfinite(blocks).all())
    nan = math.nan
    sigma = torch.zeros(0, dtype=torch.float64)
    frobenius = frobenius_norm(blocks) if finite else nan
    if finite and full and blocks.numel():
        sigma = _singular_values(blocks).sort(descending=True).values
    top = nan
    if finite:
        top = sigma[0].item() if len(sigma) else _largest(blocks)
    known = len(sigma) > 0
    return MatrixSpectrum(
        name=name,
        kind=layout.kind,
        shape=(rows, columns),
        groups=groups,
        dtype=str(tensor.dtype).removeprefix("torch."),
        finite=finite,
        rms_entry=frobenius / math.sqrt(blocks.numel()) if blocks.numel() else nan,
        frobenius_norm=frobenius,
        spectral_norm=top,
        operator_norm=_operator_norm(tensor, layout) if finite else nan,
        stable_rank=(frobenius / top) ** 2 if top > 0 else nan,
        effective_rank=effective_rank(sigma) if known else nan,
        numerical_rank=numerical_rank(sigma, (rows, columns), tensor.dtype) if known else nan,
        energy_outside_1=energy_outside(sigma, 1) if known else nan,
        energy_outside_8=energy_outside(sigma, 8) if known else nan,
        singular_values=tuple(sigma.tolist()),
    )


def _singular_values(blocks: Tensor) -> Tensor:
    """Of all blocks, in any order."""
    return _lengths(blocks) if _is_thin(blocks) else torch.cat([singular_values(block) for block in blocks])


def _largest(blocks: Tensor) -> float:
    """The largest singular value of all blocks, to a thousandth."""
    if not blocks.numel():
        return 0.0
    if _is_thin(blocks):
        return _lengths(blocks).max().item()
    return max(spectral_norm(block).value for block in blocks)


def _is_thin(blocks: Tensor) -> bool:
    """Whether it is a depthwise convolution: hundreds of vectors, which need no decomposition each."""
    return len(blocks) > 1 and min(blocks.shape[1:]) == 1


def _lengths(blocks: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(wide(blocks), dim=(1, 2))
    return lengths.cpu()


def _operator_norm(tensor: Tensor, layout: Layout) -> float:
    """The norm of a circular convolution on inputs of the size that the layout names, else NaN."""
    if layout.circular is None:
        return math.nan
    kernels = tensor.reshape(layout.groups, tensor.shape[0] // layout.groups, *tensor.shape[1:])
    return max(circular_convolution_norm(kernel, layout.circular) for kernel in kernels)


def _warn_of(names: list[str]) -> list[str]:
    """One warning that names what is not finite, and the same as a note."""
    if not names:
        return []
    note = f"entries that are not finite, so values are NaN: {', '.join(names)}"
    warnings.warn(note, RuntimeWarning, stacklevel=3)
    return [note]
