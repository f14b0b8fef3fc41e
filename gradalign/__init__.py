"""Gradient alignment and RawBoost augmentation for speech-deepfake detectors, as fused Triton and CUDA kernels."""

from gradalign._dispatch import use_backends
from gradalign.rawboost import NotchDraws, RawBoost, RawBoostConfig, RawBoostDraws

__all__ = ["NotchDraws", "RawBoost", "RawBoostConfig", "RawBoostDraws", "use_backends"]
