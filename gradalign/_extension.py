"""The compiled extension gradalign._C: importing it registers the C++ and CUDA kernels; a source tree without it still
works.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

import torch

from gradalign._dispatch import FLOATS, Op, first_tensor

# What the CUDA kernels take for granted: asynchronous copies, and more shared memory than older devices have.
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return (the extension, "") or (None, the reason why it is not there)."""
    try:
        from gradalign import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension gradalign._C is not built or does not load ({error})"
    return _C, ""


def _cpp_available() -> str:
    return load()[1]


def _cuda_available() -> str:
    extension, why_not = load()
    if extension is None:
        return why_not
    if not extension.build_info()["cuda"]:
        return "the extension was built without CUDA (nvcc or a CUDA build of PyTorch was missing, or GRADALIGN_CUDA=0)"
    return "" if torch.cuda.is_available() else "no CUDA device is visible"


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs`` (such as "8.0;9.0+PTX") runs on a device of this compute capability.

    Machine code does on devices of its major number and at least its minor one, PTX on all later ones, too. Names of
    architectures are taken to be right.

    >>> runs_on("8.0;9.0+PTX", (8, 6)), runs_on("9.0", (8, 0)), runs_on("9.0", (10, 0))
    (True, False, False)
    """
    if capability < _LEAST_CAPABILITY:
        return False
    for arch in re.split(r"[;,\s]+", archs):
        number = re.match(r"(\d+)\.(\d)(a?)", arch)
        if number is None:
            return True
        built = int(number[1]), int(number[2])
        if number[3]:
            # With features of this very device.
            if built == capability:
                return True
        elif built <= capability and (built[0] == capability[0] or arch.endswith("+PTX")):
            return True
    return False


@functools.cache
def _why_not_on(device: int) -> str:
    extension, _ = load()
    assert extension is not None
    archs, capability = extension.build_info()["cuda_archs"], torch.cuda.get_device_capability(device)
    if runs_on(archs, capability):
        return ""
    return f"was built for compute capability {archs} and needs 8.0 or later, found {capability[0]}.{capability[1]}"


def _supports(device: str, args: tuple[Any, ...]) -> str:
    tensor = first_tensor(args)
    if tensor.device.type != device:
        return f"takes {device} tensors, found {tensor.device.type}"
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        return f"takes float16, bfloat16, float32 and float64, found {tensor.dtype}"
    return _why_not_on(tensor.get_device()) if tensor.is_cuda else ""


def register(op: Op) -> None:
    """Offer csrc's kernels of ``op`` as the backends "cpp" and "cuda"."""
    # C++ adds up and merges any number of paths.
    limited = op.name in ("weigh", "align_")
    op.native_backend(
        "cpp", _cpp_available, lambda *args: (limited and op.why_too_many(*args)) or _supports("cpu", args)
    )
    op.native_backend("cuda", _cuda_available, lambda *args: op.why_too_many(*args) or _supports("cuda", args))
