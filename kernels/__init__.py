"""Triton kernels; importing this package registers them as the backend "triton" of the ops.

Layout of a kernel file: device functions, then per op its kernels `<op>_kernel`, `<op>_<part>_kernel` and its launcher
`<op>`. Nothing here reads a tensor's value on the host, and no kernel uses a float atomic: partial results are
stored and added in a fixed order, so that the same inputs give the same bits on every run of one device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradalign import _dispatch
from gradalign._dispatch import Op, tensors

try:
    import triton
except ImportError as error:
    _missing = f"Triton is not installed ({error})"
else:
    _missing = ""

# Waveforms and gradients; seeds, lengths and tap counts.
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64}


def interpreting() -> bool:
    """True when Triton runs its kernels on the host (TRITON_INTERPRET=1 at import), on tensors of any device."""
    return not _missing and bool(triton.knobs.runtime.interpret)


def available() -> str:
    """Return why no Triton kernel can run here, empty when they can."""
    if _missing:
        return _missing
    return "" if interpreting() or torch.cuda.is_available() else "no CUDA device is visible"


def backend(op: Op, why_not: Callable[..., str] | None = None) -> Callable[[Callable], Callable]:
    """Register a launcher as the backend "triton" of an op; ``why_not`` tells what it does not take beside what no
    kernel here does.
    """

    def supports(*args: Any) -> str:
        return op.why_too_many(*args) or (why_not(*args) if why_not else "") or _why_unsupported(args)

    return op.backend("triton", available, supports)


def _why_unsupported(args: Sequence[Any]) -> str:
    present = tensors(args)
    # Whole passes over the list: a model has thousands of gradients, and each is looked at in every step.
    if not (interpreting() or all(t.is_cuda for t in present)):
        return f"takes cuda tensors, found {next(t.device for t in present if not t.is_cuda)}"
    if len({t.get_device() for t in present}) > 1:
        return f"takes tensors on one device, found {', '.join(sorted({str(t.device) for t in present}))}"
    if other := {t.dtype for t in present} - _DTYPES:
        return f"takes float16, bfloat16, float32, float64 and int64, found {', '.join(map(str, other))}"
    return ""


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, enable_fp_fusion: bool = True, **meta: Any
) -> None:
    """Launch ``programs`` programs of ``kernel`` on ``device``'s current stream: the one door for every kernel.

    The grid has one axis, because the others end at 65535. Fusing products into sums is Triton's own default up to 3.9.
    """
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, enable_fp_fusion=enable_fp_fusion, **meta)


if _missing:
    # The ops still know a backend "triton" and say why it is not there; its body is never reached.
    for _op in _dispatch.ops().values():
        backend(_op)(_op.reference)
else:
    # Their import registers the launchers.
    from gradalign.kernels import gradients, rawboost, rawboost_backward, weigh  # noqa: F401
