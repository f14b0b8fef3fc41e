"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host does not wait for a copy to a CUDA device.

    >>> to_device(torch.zeros(2), torch.device("cpu")).device.type
    'cpu'
    """
    # A graph of torch.compile makes no pinned memory.
    if device.type != "cuda" or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor.to(device)
    # The allocator of pinned memory waits for the copy before it hands the memory out again.
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
