"""Gradients that lie on several ranks: what `AlignedOptimizer` does on torch.distributed.

The Gram matrix is a sum over elements, so a rank takes its part from the elements it holds, an all-reduce of [N, K, K]
float64 adds the parts, and every rank merges its own elements with the same weights. Two kinds of parts:

- DTensors (FSDP2, HSDP, tensor parallelism), averaged by whoever sharded them: `Shards` adds up the Gram matrices.
- Replicas whose gradients nobody has averaged: `Averager` reduce-scatters each path as soon as it is finished, which
  leaves every rank a part of each path's average, and all-gathers the merged gradient. K reduce-scatters and one
  all-gather move (K + 1) / (2 K) of the bytes of K all-reduces, and each rank aligns only its own part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Gradients = list[Tensor | None]

# Each parameter starts at a multiple of this many bytes, as the kernels' wide loads want it.
_ALIGNMENT = 16


def num_ranks(group: Any = None) -> int:
    """Size of the group, by default of all processes; 1 where torch.distributed is not set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor; the module that defines it is not imported for that."""
    return has_dtensors([tensor])


def has_dtensors(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a DTensor is among them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def has_replicas(params: Sequence[Tensor]) -> bool:
    """Whether there are several ranks, and each has all of the model; parameters beside DTensors are others' affair."""
    return num_ranks() > 1 and not has_dtensors(params)


def check(optimizer: torch.optim.Optimizer, group: Any) -> None:
    """Check at construction what can be known then.

    Raises:
        TypeError: for parameters of FullyShardedDataParallel, or something else than a process group.
        ValueError: for a process group and DTensors.
    """
    params = [param for entry in optimizer.param_groups for param in entry["params"]]
    for param in params:
        # Its gradients are pieces that nothing marks as such.
        if type(param).__name__ == "FlatParameter" or getattr(param, "_fsdp_flattened", False):
            raise TypeError(
                "parameters must be whole or DTensors (torch.distributed.fsdp.fully_shard); found some of "
                "FullyShardedDataParallel (FSDP1)"
            )
    if group is None:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"`process_group` must be a torch.distributed.ProcessGroup or None; found {type(group).__name__}"
        )
    if has_dtensors(params):
        raise ValueError("`process_group` must be None where parameters are DTensors, which others average; found one")


def check_apart(grads: Gradients, k: int, paths: Sequence[Any], name: Callable[[int], str]) -> None:
    """Check that path k's gradients have not overwritten another one's, as in DDP's buckets.

    Raises:
        RuntimeError: if they have.
    """
    for j, path in enumerate(paths):
        if j == k:
            continue
        for n, (here, there) in enumerate(zip(grads, path, strict=True)):
            if here is not None and there is not None and here.is_set_to(there):
                raise RuntimeError(
                    f"each path's gradients must have their own memory; found that path {k} has overwritten path {j} "
                    f"in {name(n)} (DDP: leave gradient_as_bucket_view=False, or pass `process_group`)"
                )


# ------------------------------------------------------------------------------------------------------------- DTensors


def settled(grads: Gradients) -> Gradients:
    """The gradients, some of them DTensors: partial sums, as tensor parallelism leaves them of norms, are added up."""
    from torch.distributed.tensor import Replicate

    found: Gradients = []
    for grad in grads:
        placements = grad.placements if grad is not None and is_dtensor(grad) else ()  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            whole = [Replicate() if placement.is_partial() else placement for placement in placements]
            grad = grad.redistribute(placements=whole)  # type: ignore[union-attr]
        found.append(grad)
    return found


def local(grads: Gradients) -> Gradients:
    """Each DTensor's own part, to be read and written in place; gradients must be without autograd history."""
    found: Gradients = []
    for grad in grads:
        if grad is not None and is_dtensor(grad):
            grad = grad.to_local()  # type: ignore[attr-defined]
            if hasattr(grad, "wait"):
                # An AsyncCollectiveTensor: its collective may be under way.
                grad = grad.wait()
        found.append(grad)
    return found


@dataclass(frozen=True)
class _Sum:
    """One all-reduce: the rows of the Gram matrix that it adds up, and which of them this rank counts."""

    group: Any
    # None for all rows.
    rows: Tensor | None
    # Bool [rows, 1, 1]; None for all.
    counted: Tensor | None


class Shards:
    """Adds up Gram matrices of sharded gradients, over each mesh dimension along which some parameter is sharded.

    A parameter that is replicated along such a dimension is counted on its first rank only. Along a dimension without
    any sharded parameter (the replicas of HSDP) all ranks hold the same, and nothing is sent.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._sums: list[_Sum] = []

    def sum(self, gram: Tensor, grads: Gradients) -> Tensor:
        """Add up [N, K, K] over the ranks; ``grads`` are [N] gradients it was made from, None where there are none."""
        key = [
            (grad.device_mesh, grad.placements) if grad is not None and is_dtensor(grad) else None  # type: ignore[attr-defined]
            for grad in grads
        ]
        if key != self._key:
            self._sums, self._key = self._plan(key, gram.device), key
        for one in self._sums:
            part = gram if one.rows is None else gram.index_select(0, one.rows)
            if one.counted is not None:
                part = torch.where(one.counted, part, 0.0)
            dist.all_reduce(part, group=one.group)
            if one.rows is not None:
                gram.index_copy_(0, one.rows, part)
            else:
                gram = part
        return gram

    @staticmethod
    def _plan(key: list[Any], device: torch.device) -> list[_Sum]:
        meshes: dict[Any, list[int]] = {}
        for n, entry in enumerate(key):
            if entry is not None:
                meshes.setdefault(entry[0], []).append(n)
        sums = []
        for mesh, rows in meshes.items():
            for dim in range(mesh.ndim):
                sharded = [not key[n][1][dim].is_replicate() for n in rows]
                if not any(sharded):
                    continue
                first = mesh.get_local_rank(dim) == 0
                counted = [first or one for one in sharded]
                sums.append(
                    _Sum(
                        mesh.get_group(dim),
                        None if len(rows) == len(key) else torch.tensor(rows, device=device),
                        None if all(counted) else torch.tensor(counted, device=device)[:, None, None],
                    )
                )
        return sums


# ------------------------------------------------------------------------------------------------------------- replicas


@dataclass(frozen=True)
class _Bucket:
    """All parameters of one dtype, one after the other in a flat buffer that is cut into equal parts, one per rank."""

    members: list[int]
    # Per member: its first element, and its shape and strides (the parameter's, where it has no gaps).
    layouts: list[tuple[int, torch.Size, tuple[int, ...]]]
    # Per member: where it lies in this rank's part, [begin, end).
    spans: list[tuple[int, int]]
    part_size: int
    like: Tensor

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(shape, stride, begin) for begin, shape, stride in self.layouts]


@dataclass
class Averaged:
    """One path's gradients, on their way to the ranks' parts."""

    group: Any
    buckets: list[_Bucket]
    # This rank's part of each bucket: first the sum, then the average.
    parts: list[Tensor]
    # How many ranks reach each parameter, int32 [N] on the device; it is read only where this rank misses one.
    counts: Tensor
    reached: list[bool]
    # Work in flight, with the buffers it reads.
    pending: list[tuple[Any, Tensor]]
    # Per parameter, its piece of the parts; made when they are there.
    pieces: Gradients = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.reached)

    def add(self, more: Averaged) -> None:
        """Accumulate what a further backward has given this path."""
        self._finish()
        more._finish()
        torch._foreach_add_(self.parts, more.parts)
        self.counts += more.counts
        self.reached = [a or b for a, b in zip(self.reached, more.reached, strict=True)]

    def wait(self) -> Gradients:
        """This rank's part of each parameter's average gradient (it may be empty); None where no rank reaches it.

        Raises:
            RuntimeError: if no rank reaches any parameter.
        """
        self._finish()
        if not all(self.reached[n] for bucket in self.buckets for n in bucket.members):
            self.reached = [count > 0 for count in self.counts.tolist()]
            if not any(self.reached):
                raise RuntimeError("a path must give a gradient to at least one parameter on some rank; found none")
        self.pieces = [None] * len(self.reached)
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            for n, (begin, end) in zip(bucket.members, bucket.spans, strict=True):
                self.pieces[n] = part[begin:end]
        return [piece if here else None for piece, here in zip(self.pieces, self.reached, strict=True)]

    def gather(self, merged: Gradients) -> Gradients:
        """All ranks' parts of the merged gradients, whole. They are sent from this path's buffers."""
        whole: Gradients = [None] * len(merged)
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            for n in bucket.members:
                own, piece = self.pieces[n], merged[n]
                if own is not None and piece is not None and own is not piece:
                    # Another path was the first to reach this parameter.
                    own.copy_(piece)
            flat = part.new_empty(bucket.part_size * dist.get_world_size(self.group))
            dist.all_gather_into_tensor(flat, part, group=self.group)
            for n, view in zip(bucket.members, bucket.views(flat), strict=True):
                whole[n] = None if merged[n] is None else view
        return whole

    def _finish(self) -> None:
        if self.pending:
            for work, _ in self.pending:
                work.wait()
            self.pending = []
            # The sum is divided here, where a rank has only its part of it.
            if sums := [part for part in self.parts if part.dtype != torch.float16]:
                torch._foreach_div_(sums, float(dist.get_world_size(self.group)))


class Averager:
    """Averages each path's gradients over the ranks of a group; every rank gets one part of them."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._key: Any = None
        self._buckets: list[_Bucket] = []
        self._flags: dict[tuple[bool, ...], Tensor] = {}

    def start(self, params: Sequence[Tensor], grads: Gradients, first: bool) -> Averaged:
        """Send a finished path, without waiting. What it does not reach on this rank counts as zero here.

        Raises:
            RuntimeError: if parameters were frozen, say, since the ``first`` path of the step.
        """
        buckets = self._layout(params, first)
        reached = tuple(grad is not None for grad in grads)
        parts: list[Tensor] = []
        pending: list[tuple[Any, Tensor]] = []
        for bucket in buckets:
            # The gaps between parameters are sent as they are, and never read.
            flat = bucket.like.new_empty(bucket.part_size * self.num_ranks)
            into: list[Tensor] = []
            source: list[Tensor] = []
            for n, view in zip(bucket.members, bucket.views(flat), strict=True):
                grad = grads[n]
                if grad is None:
                    view.zero_()
                else:
                    into.append(view)
                    source.append(grad)
            if into:
                torch._foreach_copy_(into, source)
            if into and flat.dtype == torch.float16:
                # Before the sum, which might overflow.
                torch._foreach_div_(into, float(self.num_ranks))
            part = flat.new_empty(bucket.part_size)
            pending.append((dist.reduce_scatter_tensor(part, flat, group=self.group, async_op=True), flat))
            parts.append(part)
        counts = self._flag(reached, params[0].device).clone()
        pending.append((dist.all_reduce(counts, group=self.group, async_op=True), counts))
        return Averaged(self.group, buckets, parts, counts, list(reached), pending)

    def sum(self, gram: Tensor) -> Tensor:
        """Add up the Gram matrices [N, K, K] of the ranks' parts, in place."""
        dist.all_reduce(gram, group=self.group)
        return gram

    def _flag(self, reached: tuple[bool, ...], device: torch.device) -> Tensor:
        # Kept, since a copy to the device would wait for it.
        if reached not in self._flags:
            self._flags[reached] = torch.tensor(reached, dtype=torch.int32, device=device)
        return self._flags[reached]

    def _layout(self, params: Sequence[Tensor], may_change: bool) -> list[_Bucket]:
        key = [(id(param), param.requires_grad, param.dtype) for param in params]
        if key == self._key:
            return self._buckets
        if not may_change:
            changed = next(i for i, (a, b) in enumerate(zip(key, self._key, strict=True)) if a != b)
            raise RuntimeError(
                "with `process_group`, each parameter's requires_grad and dtype must be the same in all paths of a "
                f"step; found another in parameter {changed}"
            )
        self._buckets, self._key, self._flags = [], key, {}
        dtypes = dict.fromkeys(param.dtype for param in params if param.requires_grad)
        for dtype in dtypes:
            members = [n for n, param in enumerate(params) if param.requires_grad and param.dtype == dtype]
            step = _ALIGNMENT // dtype.itemsize
            end, layouts = 0, []
            for n in members:
                layouts.append((end, params[n].shape, _dense_strides(params[n])))
                end += -(-params[n].numel() // step) * step
            part_size = -(-end // (step * self.num_ranks)) * step
            low, high = self.rank * part_size, (self.rank + 1) * part_size
            spans = []
            for n, (begin, _, _) in zip(members, layouts, strict=True):
                first, last = max(begin, low), min(begin + params[n].numel(), high)
                spans.append((first - low, last - low) if first < last else (0, 0))
            self._buckets.append(_Bucket(members, layouts, spans, part_size, params[members[0]].detach()))
        return self._buckets


def _dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's strides in a buffer without gaps, in its own memory order (channels last, say)."""
    return torch.empty_like(param, device="meta").stride()
