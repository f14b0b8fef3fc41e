"""Gradient alignment and RawBoost augmentation for speech-deepfake detectors, as fused kernels."""
