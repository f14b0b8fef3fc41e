"""Several processes of one training, as ``torchrun`` starts them; alone, everything here is free."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradalign._distributed import is_dtensor, num_ranks
from gradalign.data.loader import rank_share

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Join torchrun's process group, if torchrun started this process and it has not joined yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    # Imported once the group is there, this module's default arguments would keep it, and its threads, to the end.
    import torch.distributed.nn

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave)


def _leave() -> None:
    """End the process group and its threads: one that is at work when the interpreter ends aborts the process."""
    dist.destroy_process_group()
    # DTensor's caches keep the group of a model that was shared out, and so its threads: time to let their tensors go.
    time.sleep(0.1)


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


def add_up(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_first(tensors: Sequence[Tensor]) -> None:
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


# ---- a model shared out over the processes (FSDP2) -----------------------------------------------------------------


def shard(model: nn.Module, device: torch.device) -> None:
    """Share a model's parameters out over the processes, in place; alone, leave it as it is.

    The large layers, which are gathered one at a time, are the elements of module lists; the rest is gathered whole.
    """
    if num_ranks() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_ranks(),))
    large = sum(p.numel() for p in model.parameters()) / 100
    layers = [layer for modules in model.modules() if isinstance(modules, nn.ModuleList) for layer in modules]
    # Inner layers first, as fully_shard wants it.
    for layer in reversed(layers):
        if sum(p.numel() for p in layer.parameters()) >= large:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` shared the model out: all processes must then run it equally often."""
    return any(is_dtensor(p) for p in model.parameters())


def whole(state: Any) -> Any:
    """A state dict whose tensors are whole; every process must ask for it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, Tensor) and is_dtensor(state) else state  # type: ignore[attr-defined]


def like(value: Any, own: Tensor) -> Any:
    """This process' part of a whole tensor, as ``own`` is shared out; ``value`` itself where ``own`` is whole."""
    if not isinstance(value, Tensor) or not is_dtensor(own) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
