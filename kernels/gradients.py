"""gram, combine_ and align_ in Triton. Equivalent to the functions of these names in gradalign/reference.py.

K paths of N tensors each are walked by chunks: each program owns one chunk of one parameter, in all paths. Which chunks
there are (the plan) depends on the tensors' sizes and dtypes alone and is kept; where the tensors lie (the addresses)
is sent anew whenever it has changed, from pinned memory, without waiting for the device.
"""
# Triton's language has no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradalign import ops
from gradalign.kernels import backend, launch
from gradalign.kernels.weigh import _is_finite, _weigh_two, weigh

# Elements per chunk: many, so that few partial sums are left; few, so that a small model still fills the device.
CHUNK = 32768
# Plans and address tables kept; a training step uses one of each per op.
KEPT = 64
# A row of the plan: parameter, first element, number of elements, slot of its partial sums, segment.
ROW = tl.constexpr(5)
# align_: elements per item, few, so that what all running programs hold is a part of the second-level cache; items of
# other parameters between the last product of a parameter and its first merge, so that nobody waits for the sum.
ALIGN_CHUNK = 8192
ALIGN_LAG = 256
# A row of its plan: parameter, first element, number of elements, slot of its partial sums, first slot and number of
# slots of the parameter, 1 for merging.
ALIGN_ROW = tl.constexpr(7)

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


# ----------------------------------------------------------------------------------------------------------- the chunks


@dataclass(frozen=True)
class Plan:
    """Which chunks there are; ``rows`` [C, 5] int64 and ``bounds`` [S + 1] int64 are on the device."""

    rows: Tensor
    # Slots bounds[s] .. bounds[s + 1] - 1 belong to segment s.
    bounds: Tensor
    # Per dtype: its first row and its number of rows.
    launches: tuple[tuple[torch.dtype, int, int], ...]
    num_chunks: int


def _make_plan(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    segments: Sequence[int],
    num_segments: int,
    device: torch.device,
) -> Plan:
    chunks = []
    for n, (size, dtype, segment) in enumerate(zip(sizes, dtypes, segments, strict=True)):
        chunks += [(segment, dtype, n, begin, min(CHUNK, size - begin)) for begin in range(0, size, CHUNK)]
    # Slots are in segment order, so that a segment's partial sums are adjacent; rows are in dtype order, so that a
    # launch is a range of them.
    chunks.sort(key=lambda chunk: chunk[0])
    counts = [0] * (num_segments + 1)
    for segment, *_ in chunks:
        counts[segment + 1] += 1
    bounds = [0]
    for count in counts[1:]:
        bounds.append(bounds[-1] + count)
    rows, launches = [], []
    for dtype in dict.fromkeys(dtypes):
        mine = [(n, begin, size, slot, s) for slot, (s, d, n, begin, size) in enumerate(chunks) if d == dtype]
        if mine:
            launches.append((dtype, len(rows), len(mine)))
        rows += mine
    return Plan(_send(rows, device), _send(bounds, device), tuple(launches), len(chunks))


@dataclass(frozen=True)
class AlignPlan:
    """The items of align_ in the order in which they are drawn; ``rows`` [items, 7] int64 is on the device."""

    rows: Tensor
    # Per dtype: its first row and its number of rows.
    launches: tuple[tuple[torch.dtype, int, int], ...]
    num_slots: int


def _make_align_plan(sizes: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device) -> AlignPlan:
    rows, launches, num_slots = align_items(sizes, dtypes)
    return AlignPlan(_send(rows, device), launches, num_slots)


def align_items(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[list[tuple[int, ...]], tuple[tuple[torch.dtype, int, int], ...], int]:
    """Return the rows of an `AlignPlan`, its launches and the number of slots.

    Each parameter's chunks are multiplied, and ALIGN_LAG items later merged, backwards: what was read last is in the
    cache for certain.
    """
    rows: list[tuple[int, ...]] = []
    launches, num_slots = [], 0
    for dtype in dict.fromkeys(dtypes):
        start, waiting = len(rows), []
        for n, (size, of_tensor) in enumerate(zip(sizes, dtypes, strict=True)):
            if of_tensor != dtype:
                continue
            # A parameter without elements has a Gram matrix too.
            begins = range(0, max(size, 1), ALIGN_CHUNK)
            items = [
                (n, begin, min(ALIGN_CHUNK, size - begin), num_slots + i, num_slots, len(begins))
                for i, begin in enumerate(begins)
            ]
            num_slots += len(items)
            rows.extend((*item, 0) for item in items)
            waiting.append((len(rows) + ALIGN_LAG, items))
            while waiting and waiting[0][0] <= len(rows):
                rows.extend((*item, 1) for item in reversed(waiting.pop(0)[1]))
        for _, items in waiting:
            rows.extend((*item, 1) for item in reversed(items))
        launches.append((dtype, start, len(rows) - start))
    return rows, tuple(launches), num_slots


def _send(values: Sequence, device: torch.device) -> Tensor:
    """Copy int64 values to the device without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        # The graph reads the pinned values again at each replay.
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


# What CUDA graphs read, for as long as they may be replayed.
_captured: list[object] = []
# What was made per key and stream; another stream would not wait for the copies to the device.
_kept: OrderedDict[tuple, dict[int, Any]] = OrderedDict()


def _keep(key: tuple, make: Callable[[], Any], device: torch.device) -> Any:
    """make(), or what it has made for this key before."""
    made = _kept.get(key, {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A capture begins with the device idle: whatever was made before it is complete on every stream. What is made
        # now is filled at replay, in the graph's own memory, and is the graph's alone.
        _captured.append(value := next(iter(made.values())) if made else make())
        return value
    if stream not in made:
        made[stream] = make()
        _kept[key] = made
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return made[stream]


def _is_dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """True when the elements fill their span of memory, in whatever order."""
    expected = 1
    for axis_stride, size in sorted((d, s) for d, s in zip(stride, shape, strict=True) if s > 1):
        if axis_stride != expected:
            return False
        expected *= size
    return True


def _in_memory_order(paths: Sequence[Tensor]) -> bool:
    """Check one parameter's gradients against each other; return whether all can be walked in memory order.

    Raises:
        ValueError: for gradients of different shapes or dtypes.
    """
    first = paths[0]
    for other in paths[1:]:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise ValueError(
                "the paths' gradients of one parameter must share shape and dtype; found "
                f"{list(first.shape)} {first.dtype} and {list(other.shape)} {other.dtype}"
            )
    stride = first.stride()
    return all(other.stride() == stride for other in paths[1:]) and _is_dense(first.shape, stride)


@dataclass(frozen=True)
class Walk:
    """What the chunk kernels need: the plan, the addresses [K, N] int64 and whether all of them divide by 16."""

    plan: Plan
    addresses: Tensor
    aligned: bool
    # Parameters whose gradients have gaps, or layouts that differ between the paths: they are walked as copies.
    copied: tuple[int, ...]


def _walk(tensors: list[Tensor], segments: Sequence[int], num_segments: int) -> Walk:
    """The walk over K*N tensors; those of ``copied`` parameters are replaced by contiguous copies in ``tensors``."""
    device, num_params = tensors[0].device, len(segments)
    # Everything that the walk is made of; comparing it is most of the host's work in a step.
    key = (
        tuple(map(Tensor.data_ptr, tensors)),
        tuple([t.shape for t in tensors]),
        tuple(map(Tensor.stride, tensors)),
        tuple([t.dtype for t in tensors]),
        tuple(segments),
        num_segments,
        device,
    )

    def make() -> Walk:
        copied = tuple(n for n in range(num_params) if not _in_memory_order(tensors[n::num_params]))
        first = tensors[:num_params]
        layout = (tuple(t.numel() for t in first), tuple(t.dtype for t in first), key[4], num_segments)
        plan = _keep((*layout, device), lambda: _make_plan(*layout, device), device)
        return Walk(plan, *_send_addresses(tensors, device), copied)

    walk = _keep(key, make, device)
    if walk.copied:
        for n in walk.copied:
            tensors[n::num_params] = [t.contiguous() for t in tensors[n::num_params]]
        walk = replace(walk, **dict(zip(("addresses", "aligned"), _send_addresses(tensors, device), strict=True)))
    return walk


def _send_addresses(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    addresses = [t.data_ptr() for t in tensors]
    return _send(addresses, device), all(address % 16 == 0 for address in addresses)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _base(addresses, position, begin, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor's element ``begin``, where a chunk begins."""
    pointer = tl.load(addresses + position).to(tl.pointer_type(TYPE)) + begin
    if ALIGNED:
        # Known to divide by 16 bytes: 128-bit loads.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _add_products(sums, paths, NUM_PATHS: tl.constexpr):
    """sums[pair] + paths[i] * paths[j] for each pair i <= j."""
    out = ()
    for i in tl.static_range(NUM_PATHS):
        for j in tl.static_range(i, NUM_PATHS):
            out = out + (sums[i * NUM_PATHS - i * (i - 1) // 2 + j - i] + paths[i] * paths[j],)
    return out


@triton.jit(do_not_specialize=["num_params", "num_chunks", "first_row"])
def gram_kernel(
    addresses,
    rows,
    partials,
    num_params,
    num_chunks,
    first_row,
    NUM_PATHS: tl.constexpr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: the K*(K+1)/2 inner products of its paths' pieces -> partials [pairs, C] float64.

    Each of BLOCK places adds at most CHUNK / BLOCK products per sum in float32 (float64 for float64 gradients); from
    there on everything is float64.
    """
    row = rows + (first_row + tl.program_id(0)).to(tl.int64) * ROW
    n = tl.load(row)
    begin = tl.load(row + 1)
    size = tl.load(row + 2).to(tl.int32)
    slot = tl.load(row + 3)
    offset = tl.arange(0, BLOCK)
    sums = ()
    for _ in tl.static_range(NUM_PATHS * (NUM_PATHS + 1) // 2):
        sums = sums + (tl.zeros([BLOCK], WIDE),)
    bases = ()
    for k in tl.static_range(NUM_PATHS):
        bases = bases + (_base(addresses, k * num_params + n, begin, TYPE, ALIGNED),)
    # Full blocks go without masks, which would split the wide loads.
    full = size // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        paths = ()
        for k in tl.static_range(NUM_PATHS):
            paths = paths + (tl.load(bases[k] + at + offset).to(WIDE),)
        sums = _add_products(sums, paths, NUM_PATHS)
    if full < size:
        paths = ()
        for k in tl.static_range(NUM_PATHS):
            paths = paths + (tl.load(bases[k] + full + offset, mask=offset < size - full, other=0.0).to(WIDE),)
        sums = _add_products(sums, paths, NUM_PATHS)
    for pair in tl.static_range(NUM_PATHS * (NUM_PATHS + 1) // 2):
        tl.store(partials + pair * num_chunks + slot, tl.sum(sums[pair].to(tl.float64), 0))


@triton.jit(do_not_specialize=["num_chunks"])
def gram_sum_kernel(
    partials, bounds, gram, num_chunks, NUM_PATHS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per (segment, pair): its chunks' partial sums in order -> gram [S, K, K], both halves."""
    segment = (tl.program_id(0) // PAIRS).to(tl.int64)
    pair = tl.program_id(0) % PAIRS
    begin = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        total += tl.load(partials + pair.to(tl.int64) * num_chunks + slot, mask=slot < end, other=0.0)
    value = tl.sum(total, 0)
    i = 0
    j = pair
    for k in tl.static_range(NUM_PATHS - 1):
        # Row k of the upper triangle has K - k entries.
        beyond = (i == k) & (j >= NUM_PATHS - k)
        j = tl.where(beyond, j - (NUM_PATHS - k), j)
        i = tl.where(beyond, k + 1, i)
    matrix = gram + segment * NUM_PATHS * NUM_PATHS
    tl.store(matrix + i * NUM_PATHS + (i + j), value)
    tl.store(matrix + (i + j) * NUM_PATHS + i, value)


@triton.jit(do_not_specialize=["num_params", "first_row"])
def combine_kernel(
    addresses,
    rows,
    weights,
    num_params,
    first_row,
    NUM_PATHS: tl.constexpr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: path 0's piece becomes the weighted sum of all paths' pieces.

    The weights [S, K] float64 are read here, on the device.
    """
    row = rows + (first_row + tl.program_id(0)).to(tl.int64) * ROW
    n = tl.load(row)
    begin = tl.load(row + 1)
    size = tl.load(row + 2).to(tl.int32)
    segment = tl.load(row + 4)
    offset = tl.arange(0, BLOCK)
    bases = ()
    w = ()
    for k in tl.static_range(NUM_PATHS):
        bases = bases + (_base(addresses, k * num_params + n, begin, TYPE, ALIGNED),)
        w = w + (tl.load(weights + segment * NUM_PATHS + k).to(WIDE),)
    # Full blocks go without masks, which would split the wide loads.
    full = size // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        total = w[0] * tl.load(bases[0] + at + offset).to(WIDE)
        for k in tl.static_range(1, NUM_PATHS):
            total += w[k] * tl.load(bases[k] + at + offset).to(WIDE)
        tl.store(bases[0] + at + offset, total.to(TYPE))
    if full < size:
        mask = offset < size - full
        total = w[0] * tl.load(bases[0] + full + offset, mask=mask, other=0.0).to(WIDE)
        for k in tl.static_range(1, NUM_PATHS):
            total += w[k] * tl.load(bases[k] + full + offset, mask=mask, other=0.0).to(WIDE)
        tl.store(bases[0] + full + offset, total.to(TYPE), mask=mask)


@triton.jit(do_not_specialize=["num_params", "num_slots", "first_row", "index", "num_launches"])
def align_kernel(
    addresses,
    rows,
    counters,
    partials,
    weights,
    gram,
    rho,
    targets,
    num_params,
    num_slots,
    first_row,
    index,
    num_launches,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    BETA: tl.constexpr,
    ALWAYS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program draws an item of two paths, in order.

    Whoever has multiplied a parameter's last chunk adds up its sums, in a fixed order, and finds its weights; whoever
    is to merge a chunk waits for them. All of a parameter's products are drawn before any of its merges, by programs
    that run and do not wait themselves; so it does not matter how many programs run at once, nor in which order they
    start. ``counters`` are zero at the start: the next item per launch, then per parameter how many of its chunks are
    multiplied, then per parameter whether its weights are there.
    """
    drawn = tl.atomic_add(counters + index, 1)
    row = rows + (first_row + drawn).to(tl.int64) * ALIGN_ROW
    n = tl.load(row)
    begin = tl.load(row + 1)
    size = tl.load(row + 2).to(tl.int32)
    multiplied = counters + num_launches + n
    ready = multiplied + num_params
    offset = tl.arange(0, BLOCK)
    base_a = _base(addresses, n, begin, TYPE, ALIGNED)
    base_b = _base(addresses, num_params + n, begin, TYPE, ALIGNED)
    full = size // BLOCK * BLOCK
    if tl.load(row + 6) == 0:
        slot = tl.load(row + 3)
        first_slot = tl.load(row + 4)
        num_chunks = tl.load(row + 5).to(tl.int32)
        aa = tl.zeros([BLOCK], WIDE)
        ab = tl.zeros([BLOCK], WIDE)
        bb = tl.zeros([BLOCK], WIDE)
        for at in range(0, full, BLOCK):
            a = tl.load(base_a + at + offset).to(WIDE)
            b = tl.load(base_b + at + offset).to(WIDE)
            aa += a * a
            ab += a * b
            bb += b * b
        if full < size:
            a = tl.load(base_a + full + offset, mask=offset < size - full, other=0.0).to(WIDE)
            b = tl.load(base_b + full + offset, mask=offset < size - full, other=0.0).to(WIDE)
            aa += a * a
            ab += a * b
            bb += b * b
        tl.store(partials + slot, tl.sum(aa.to(tl.float64), 0))
        tl.store(partials + num_slots + slot, tl.sum(ab.to(tl.float64), 0))
        tl.store(partials + 2 * num_slots.to(tl.int64) + slot, tl.sum(bb.to(tl.float64), 0))
        tl.debug_barrier()
        if tl.atomic_add(multiplied, 1) == num_chunks - 1:
            sum_aa = tl.zeros([256], tl.float64)
            sum_ab = tl.zeros([256], tl.float64)
            sum_bb = tl.zeros([256], tl.float64)
            for at in range(0, num_chunks, 256):
                place = at + tl.arange(0, 256)
                source = partials + first_slot + place
                # Past the first-level cache, which may hold what was there before.
                sum_aa += tl.load(source, mask=place < num_chunks, other=0.0, cache_modifier=".cg")
                source += num_slots
                sum_ab += tl.load(source, mask=place < num_chunks, other=0.0, cache_modifier=".cg")
                source += num_slots
                sum_bb += tl.load(source, mask=place < num_chunks, other=0.0, cache_modifier=".cg")
            total_aa = tl.sum(sum_aa, 0)
            total_ab = tl.sum(sum_ab, 0)
            total_bb = tl.sum(sum_bb, 0)
            good = _is_finite(total_aa) & _is_finite(total_ab) & _is_finite(total_bb)
            nothing = tl.full([], 0.0, tl.float64)
            rho_ab = nothing
            rho_ba = nothing
            if METHOD == "gradvac" and rho is not None:
                rho_ab = tl.load(rho + n * 4 + 1)
                rho_ba = tl.load(rho + n * 4 + 2)
            one, two, new_ab, new_ba = _weigh_two(
                tl.where(good, total_aa, 1.0),
                tl.where(good, total_ab, 0.0),
                tl.where(good, total_bb, 1.0),
                rho_ab,
                rho_ba,
                METHOD,
                BETA,
                ALWAYS,
                C,
            )
            if METHOD == "gradvac":
                for i in tl.static_range(0, 4, 3):
                    old = nothing
                    if rho is not None:
                        old = tl.load(rho + n * 4 + i)
                    tl.store(targets + n * 4 + i, old)
                tl.store(targets + n * 4 + 1, tl.where(good, new_ab, rho_ab))
                tl.store(targets + n * 4 + 2, tl.where(good, new_ba, rho_ba))
            tl.store(gram + n * 4, total_aa)
            tl.store(gram + n * 4 + 1, total_ab)
            tl.store(gram + n * 4 + 2, total_ab)
            tl.store(gram + n * 4 + 3, total_bb)
            tl.store(weights + n * 2, tl.where(good, one, float("nan")))
            tl.store(weights + n * 2 + 1, tl.where(good, two, float("nan")))
            tl.debug_barrier()
            tl.atomic_xchg(ready, 1)
    else:
        done = tl.atomic_add(ready, 0)
        while done == 0:
            done = tl.atomic_add(ready, 0)
        w_a = tl.load(weights + n * 2, cache_modifier=".cg").to(WIDE)
        w_b = tl.load(weights + n * 2 + 1, cache_modifier=".cg").to(WIDE)
        for at in range(0, full, BLOCK):
            total = w_a * tl.load(base_a + at + offset).to(WIDE) + w_b * tl.load(base_b + at + offset).to(WIDE)
            tl.store(base_a + at + offset, total.to(TYPE))
        if full < size:
            mask = offset < size - full
            a = tl.load(base_a + full + offset, mask=mask, other=0.0).to(WIDE)
            b = tl.load(base_b + full + offset, mask=mask, other=0.0).to(WIDE)
            tl.store(base_a + full + offset, (w_a * a + w_b * b).to(TYPE), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launchers


@backend(ops.gram)
def gram(grads: Sequence[Tensor], num_paths: int, segments: Sequence[int], num_segments: int) -> Tensor:
    """K*N gradients, path after path -> float64 [S, K, K]. Equivalent to `reference.gram`."""
    num_params, flat = len(segments), list(grads)
    walk = _walk(flat, segments, num_segments)
    plan, device, pairs = walk.plan, flat[0].device, num_paths * (num_paths + 1) // 2
    partials = torch.empty(pairs, plan.num_chunks, dtype=torch.float64, device=device)
    for dtype, first_row, count in plan.launches:
        launch(
            gram_kernel,
            count,
            device,
            walk.addresses,
            plan.rows,
            partials,
            num_params,
            plan.num_chunks,
            first_row,
            NUM_PATHS=num_paths,
            TYPE=_TYPES[dtype],
            WIDE=_wide(dtype),
            ALIGNED=walk.aligned,
            BLOCK=_gram_block(num_paths, dtype),
            num_warps=4,
        )
    out = torch.empty(num_segments, num_paths, num_paths, dtype=torch.float64, device=device)
    launch(
        gram_sum_kernel,
        num_segments * pairs,
        device,
        partials,
        plan.bounds,
        out,
        plan.num_chunks,
        NUM_PATHS=num_paths,
        PAIRS=pairs,
        BLOCK=256,
        num_warps=4,
    )
    return out


def _wide(dtype: torch.dtype) -> tl.dtype:
    """The type that sums are kept in: float64 stays, everything else is float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _gram_block(num_paths: int, dtype: torch.dtype) -> int:
    """Elements in flight per program of 128 threads, as many as the accumulators leave registers for."""
    block = 2048 if num_paths <= 2 else 1024 if num_paths <= 4 else 512
    return block // 2 if dtype == torch.float64 else block


@backend(ops.combine_)
def combine_(out: Sequence[Tensor], others: Sequence[Tensor], weights: Tensor, segments: Sequence[int]) -> None:
    """N gradients of path 0, written, (K-1)*N further ones, weights [S, K]. Equivalent to `reference.combine_`."""
    num_params, num_paths = len(segments), weights.shape[1]
    flat = [*out, *others]
    walk = _walk(flat, segments, weights.shape[0])
    weights = weights.contiguous()
    for dtype, first_row, count in walk.plan.launches:
        launch(
            combine_kernel,
            count,
            weights.device,
            walk.addresses,
            walk.plan.rows,
            weights,
            num_params,
            first_row,
            NUM_PATHS=num_paths,
            TYPE=_TYPES[dtype],
            WIDE=_wide(dtype),
            ALIGNED=walk.aligned,
            # With eight paths' addresses in registers, eight elements of each per thread are too many.
            BLOCK=1024 if num_paths <= 4 else 512,
            num_warps=4,
        )
    for n in walk.copied:
        if flat[n] is not out[n]:
            out[n].copy_(flat[n])


@backend(ops.align_)
def align_(
    out: Sequence[Tensor],
    others: Sequence[Tensor],
    method: str,
    rho: Tensor | None,
    order: Tensor | None,
    beta: float,
    always: bool,
    c: float,
) -> tuple[Tensor, Tensor]:
    """K paths of N gradients, the first written. Equivalent to `reference.align_`.

    Two paths are read once, and merged while they are in the cache; others are read a second time.
    """
    num_params, flat, moves, device = len(out), [*out, *others], method == "gradvac", out[0].device
    if len(others) != num_params:
        segments = list(range(num_params))
        matrices = gram(flat, len(flat) // num_params, segments, num_params)
        weights, targets = weigh(matrices, method, rho, order, beta, always, c)
        combine_(out, others, weights, segments)
        return matrices, targets
    walk = _walk(flat, range(num_params), num_params)
    layout = (tuple(t.numel() for t in out), tuple(t.dtype for t in out))
    plan = _keep(("align", *layout, device), lambda: _make_align_plan(*layout, device), device)
    counters = torch.zeros(len(plan.launches) + 2 * num_params, dtype=torch.int32, device=device)
    partials = torch.empty(3, plan.num_slots, dtype=torch.float64, device=device)
    weights = torch.empty(num_params, 2, dtype=torch.float64, device=device)
    matrices = torch.empty(num_params, 2, 2, dtype=torch.float64, device=device)
    targets = torch.empty(matrices.shape if moves else (0,), dtype=torch.float64, device=device)
    for index, (dtype, first_row, count) in enumerate(plan.launches):
        launch(
            align_kernel,
            count,
            device,
            walk.addresses,
            plan.rows,
            counters,
            partials,
            weights,
            matrices,
            rho.contiguous() if moves and rho is not None else None,
            targets,
            num_params,
            plan.num_slots,
            first_row,
            index,
            len(plan.launches),
            TYPE=_TYPES[dtype],
            WIDE=_wide(dtype),
            ALIGNED=walk.aligned,
            METHOD=method,
            # What a method does not read must not compile it anew.
            BETA=beta if moves else 0.0,
            ALWAYS=always if moves else False,
            C=c if method == "cagrad" else 0.0,
            BLOCK=1024 if dtype == torch.float64 else 2048,
            num_warps=4,
        )
    for n in walk.copied:
        if flat[n] is not out[n]:
            out[n].copy_(flat[n])
    return matrices, targets
