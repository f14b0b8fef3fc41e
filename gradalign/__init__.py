"""Gradient alignment and RawBoost augmentation for speech-deepfake detectors, as fused Triton and CUDA kernels."""

from gradalign import alignment, data, detectors, metrics
from gradalign._dispatch import use_backends
from gradalign.optim import AlignedOptimizer
from gradalign.rawboost import NotchDraws, RawBoost, RawBoostConfig, RawBoostDraws

__version__ = "0.1.0"

__all__ = [
    "AlignedOptimizer",
    "NotchDraws",
    "RawBoost",
    "RawBoostConfig",
    "RawBoostDraws",
    "alignment",
    "data",
    "detectors",
    "metrics",
    "use_backends",
]
