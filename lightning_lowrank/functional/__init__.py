"""Pure functions of tensors: no Lightning, no files, no state."""

from lightning_lowrank.functional.low_rank import LowRank, merge_factors
from lightning_lowrank.functional.overlap import leak
from lightning_lowrank.functional.rescaling import Regime, RescalingGroups, homogeneity_defect
from lightning_lowrank.functional.spectral import (
    Bounded,
    SpectralNorm,
    frobenius_norm,
    spectral_norm,
    spectral_norms,
    spectral_ratio,
    stable_rank,
)
from lightning_lowrank.functional.spectrum import (
    circular_convolution_norm,
    effective_rank,
    energy_outside,
    numerical_rank,
    singular_values,
)
from lightning_lowrank.functional.start import SharedStart, UnitMatch, shared_start, unit_match
from lightning_lowrank.functional.stationarity import (
    InnerProducts,
    alignment,
    implied_weight_decay,
    norm_spread,
    radial_balance,
    residual,
)

__all__ = [
    "Bounded",
    "InnerProducts",
    "LowRank",
    "Regime",
    "RescalingGroups",
    "SharedStart",
    "SpectralNorm",
    "UnitMatch",
    "alignment",
    "circular_convolution_norm",
    "effective_rank",
    "energy_outside",
    "frobenius_norm",
    "homogeneity_defect",
    "implied_weight_decay",
    "leak",
    "merge_factors",
    "norm_spread",
    "numerical_rank",
    "radial_balance",
    "residual",
    "shared_start",
    "singular_values",
    "spectral_norm",
    "spectral_norms",
    "spectral_ratio",
    "stable_rank",
    "unit_match",
]
