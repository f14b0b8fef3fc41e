"""Several processes of one training, as ``torchrun`` starts them; alone, everything here is free."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gradalign._distributed import num_ranks
from gradalign.data.loader import rank_share

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Join torchrun's process group, if torchrun started this process and it has not joined yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """This process' number among all; 0 alone."""
    return dist.get_rank() if num_ranks() > 1 else 0


def local_rank() -> int:
    """This process' number among those of its machine; 0 alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share(rows: Sequence[int]) -> list[int]:
    """This process' part of a step's rows."""
    return rank_share(rows, rank(), num_ranks())


def wait() -> None:
    """Wait until every process is here."""
    if num_ranks() > 1:
        dist.barrier()


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_first(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if num_ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: T) -> list[T]:
    """Every process' value, in their order."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found
