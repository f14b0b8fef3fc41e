"""Triton kernels; importing this package registers them as the backend "triton"."""
