"""Pure functions of tensors: no Lightning, no files, no state."""

from lightning_lowrank.functional.overlap import leak
from lightning_lowrank.functional.rescaling import Regime, RescalingGroups, homogeneity_defect
from lightning_lowrank.functional.spectral import (
    SpectralNorm,
    effective_rank,
    frobenius_norm,
    singular_values,
    spectral_norm,
    spectral_ratio,
    stable_rank,
)
from lightning_lowrank.functional.stationarity import (
    InnerProducts,
    alignment,
    implied_weight_decay,
    norm_spread,
    radial_balance,
    residual,
)

__all__ = [
    "InnerProducts",
    "Regime",
    "RescalingGroups",
    "SpectralNorm",
    "alignment",
    "effective_rank",
    "frobenius_norm",
    "homogeneity_defect",
    "implied_weight_decay",
    "leak",
    "norm_spread",
    "radial_balance",
    "residual",
    "singular_values",
    "spectral_norm",
    "spectral_ratio",
    "stable_rank",
]
