"""RawBoost augmentation and gradient alignment for speech-deepfake detectors: CUDA, Triton and C++ kernels."""

from gradalign import alignment, data, detectors, metrics, ops
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
    "ops",
    "use_backends",
]
