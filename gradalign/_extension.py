"""The compiled extension gradalign._C: importing it registers the C++ and CUDA kernels; a source tree without it still
works.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from gradalign._dispatch import Op, first_tensor

# csrc/weigh.h and csrc/cuda/gradients.cuh take up to this many paths.
MAX_PATHS = 8
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return (the extension, "") or (None, the reason why it is not there)."""
    try:
        from gradalign import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension gradalign._C is not built or does not load ({error})"
    return _C, ""


def _num_paths(op: str, args: tuple[Any, ...]) -> int:
    if op == "gram":
        return args[1]
    if op == "align_":
        return 1 + len(args[1]) // len(args[0])
    return args[2].shape[1] if op == "combine_" else args[0].shape[1] if op == "weigh" else 1


def _cpp_available() -> str:
    return load()[1]


def _cuda_available() -> str:
    extension, why_not = load()
    if extension is None:
        return why_not
    if not extension.build_info()["cuda"]:
        return "the extension was built without CUDA (nvcc or a CUDA build of PyTorch was missing, or GRADALIGN_CUDA=0)"
    return "" if torch.cuda.is_available() else "no CUDA device is visible"


def _supports(device: str, args: tuple[Any, ...]) -> str:
    tensor = first_tensor(args)
    if tensor.device.type != device:
        return f"takes {device} tensors, found {tensor.device.type}"
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
        return f"takes float16, bfloat16, float32 and float64, found {tensor.dtype}"
    return ""


def _cpp_supports(op: str, args: tuple[Any, ...]) -> str:
    if op in ("weigh", "align_") and (paths := _num_paths(op, args)) > MAX_PATHS:
        return f"takes up to {MAX_PATHS} paths, found {paths}"
    return _supports("cpu", args)


def _cuda_supports(op: str, args: tuple[Any, ...]) -> str:
    if (paths := _num_paths(op, args)) > MAX_PATHS:
        return f"takes up to {MAX_PATHS} paths, found {paths}"
    return _supports("cuda", args)


def register(op: Op) -> None:
    """Offer csrc's kernels of ``op`` as the backends "cpp" and "cuda"."""
    op.native_backend("cpp", _cpp_available, lambda *args: _cpp_supports(op.name, args))
    op.native_backend("cuda", _cuda_available, lambda *args: _cuda_supports(op.name, args))
