"""AlignedOptimizer on several ranks equals one process on the whole batch: DDP, FSDP2, HSDP, its own averaging.

Every check below runs on all ranks of two gloo jobs, of two and of four processes; the tests read what came out. A job
is this file run as a program, which forks its ranks before it has computed anything, so that PyTorch is loaded once.
"""

import contextlib
import copy
import faulthandler
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradalign._distributed import Averager
from gradalign.optim import AlignedOptimizer

CHECKS = {}
PER_RANK = 3
# After so many seconds a rank prints its stacks and ends; a job has a little more, to tell about that.
RANK_LIMIT = 240
JOB_LIMIT = RANK_LIMIT + 30


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---- a model, a batch for all ranks, and one training loop ----


def make_model():
    torch.manual_seed(0)
    # 3 outputs over 2 or 4 ranks: the last parameters are cut unevenly, and some ranks hold nothing of them.
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batch(step, samples, count=2):
    gen = torch.Generator().manual_seed(step)
    views = [torch.randn(samples, 6, generator=gen, dtype=torch.float64) * (k + 1) for k in range(count)]
    return views, torch.randint(0, 3, (samples,), generator=gen)


def loss_of(model, view, labels, share=1.0):
    return share * nn.functional.cross_entropy(model(view), labels)


def mine(sizes=None):
    """This rank's samples of the whole batch, and its share of them times the number of ranks."""
    sizes = sizes or [PER_RANK] * dist.get_world_size()
    rank = dist.get_rank()
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank]), sum(sizes), sizes[rank] * len(sizes) / sum(sizes)


def train(model, opt, own=True, steps=3, mode="path", count=2, sizes=None, sync=None, first=0):
    """Train on this rank's samples, or (own=False) on all of them."""
    part, total, share = mine(sizes)
    part, share = (part, share) if own else (slice(None), 1.0)
    for step in range(first, first + steps):
        views, labels = make_batch(step, total, count)
        opt.zero_grad()
        with sync() if sync else contextlib.nullcontext():
            if mode == "path":
                for view in views:
                    with opt.path():
                        if len(labels[part]):
                            loss_of(model, view[part], labels[part], share).backward()
            else:
                opt.backward([loss_of(model, view[part], labels[part], share) for view in views])
        opt.step()
    return whole(model)


def whole(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def make_optimizer(model, method="pcgrad", scope="model", inner=None, **options):
    inner = inner or (lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1))
    params = list(model.parameters())
    scope = {"front": params[:2], "back": [params[4]]} if scope == "groups" else scope
    return AlignedOptimizer(inner(model.parameters()), method, scope=scope, **options)


def assert_same(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_equal_on_all_ranks(*values):
    """Bit for bit."""
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [v.tolist() if isinstance(v, torch.Tensor) else str(v) for v in values])
    assert all(other == everywhere[0] for other in everywhere)


def sharded(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_trains_like_one_process(wrap, methods=("pcgrad", "gradvac", "cagrad"), scopes=("model",), **how):
    """``wrap`` makes (what is called, optimizer, how to train it) of a model, a method and a scope."""
    combinations = list(itertools.product(methods, scopes))
    if dist.get_world_size() > 2:
        # Each method and each scope once; all combinations run on two ranks.
        combinations = [
            both for i, both in enumerate(combinations) if i % len(scopes) == i // len(scopes) % len(scopes)
        ]
    for method, scope in combinations:
        alone = make_model()
        reference = make_optimizer(alone, method, scope)
        expected = train(alone, reference, own=False, count=how.get("count", 2), sizes=how.get("sizes"))
        model, opt, sync = wrap(make_model(), method, scope)
        found = train(model, opt, sync=sync, **how)
        assert_same(found, expected)
        assert_equal_on_all_ranks(opt.stats, *found)
        stats, wanted = opt.stats, reference.stats
        assert (stats.steps, stats.conflicts) == (wanted.steps, wanted.conflicts)
        assert stats.parameter_conflicts.tolist() == wanted.parameter_conflicts.tolist()
        assert_same([stats.cosine, stats.parameter_cosine], [wanted.cosine, wanted.parameter_cosine])
        if scope == "groups":
            assert_same([stats.group_cosine], [wanted.group_cosine])


def with_ddp(model, method, scope):
    model = DistributedDataParallel(model)
    return model, make_optimizer(model, method, scope), None


def with_group(model, method, scope):
    return model, make_optimizer(model, method, scope, process_group=dist.group.WORLD), None


def with_ddp_and_group(model, method, scope):
    model = DistributedDataParallel(model)
    return model, make_optimizer(model, method, scope, process_group=dist.group.WORLD), model.no_sync


def with_fsdp(model, method, scope):
    sharded(model)
    return model, make_optimizer(model, method, scope), None


ALL_SCOPES = ("model", "parameter", "groups")


# ---- equal to one process ----


@check
def ddp_paths():
    assert_trains_like_one_process(with_ddp, scopes=ALL_SCOPES)


@check
def ddp_backward_of_a_joint_graph():
    assert_trains_like_one_process(with_ddp_and_group, scopes=ALL_SCOPES, mode="backward")


@check
def ddp_options():
    for option in ("find_unused_parameters", "static_graph"):

        def wrap(model, method, scope, option=option):
            model = DistributedDataParallel(model, **{option: True})
            return model, make_optimizer(model, method, scope), None

        assert_trains_like_one_process(wrap, ["gradvac"])


@check
def ddp_join():
    """A rank that has run out of batches shadows the others' all-reduces, one per path."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(make_model())
    opt = make_optimizer(model, "gradvac")
    with model.join():
        train(model, opt, steps=2 + (rank > 0))
    # The last steps of the others have divided by all ranks; they end alike, on the rank that had no more too.
    assert_equal_on_all_ranks(*whole(model))
    assert opt.stats.steps == 2 + (rank > 0)
    alone = make_model()
    reference = make_optimizer(alone, "gradvac")
    train(alone, reference, own=False, steps=2)
    views, labels = make_batch(2, world * PER_RANK)
    reference.zero_grad()
    for view in views:
        with reference.path():
            loss_of(alone, view[PER_RANK:], labels[PER_RANK:], (world - 1) / world).backward()
    reference.step()
    assert_same(whole(model), whole(alone))


@check
def ddp_that_averages_too_does_no_harm():
    def wrap(model, method, scope):
        return (*with_ddp_and_group(model, method, scope)[:2], None)

    for mode in ("path", "backward"):
        assert_trains_like_one_process(wrap, ["gradvac"], mode=mode)


@check
def ddp_with_gradients_as_bucket_views_and_a_group():
    def wrap(model, method, scope):
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model, make_optimizer(model, method, scope, process_group=dist.group.WORLD), None

    for mode in ("path", "backward"):
        assert_trains_like_one_process(wrap, ["pcgrad"], mode=mode)


@check
def own_averaging_of_paths():
    assert_trains_like_one_process(with_group, scopes=ALL_SCOPES)


@check
def three_paths():
    for wrap in (with_ddp, with_group, with_fsdp):
        assert_trains_like_one_process(wrap, count=3)


@check
def fsdp_paths():
    assert_trains_like_one_process(with_fsdp, scopes=ALL_SCOPES)


@check
def fsdp_backward_of_a_joint_graph():
    assert_trains_like_one_process(with_fsdp, scopes=ALL_SCOPES, mode="backward")


@check
def hsdp():
    world = dist.get_world_size()
    for shape in {(world, 1), (1, world), (world // 2, 2)}:

        def wrap(model, method, scope, shape=shape):
            sharded(model, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
            return model, make_optimizer(model, method, scope), None

        assert_trains_like_one_process(wrap, ["gradvac"], scopes=("parameter",))


@check
def replicated_dtensors_and_plain_tensors_count_once():
    """Some parameters sharded by rows or columns, some replicated, some no DTensors: as under tensor parallelism."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("a", "b"))
    line = init_device_mesh("cpu", (world,))
    placed = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Replicate(), Replicate()]),
        (None, None),
        (line, [Shard(0)]),
        (line, [Replicate()]),
    ]
    torch.manual_seed(0)
    values = [torch.randn(2, 6, 5, dtype=torch.float64) for _ in placed]
    results = []
    for spread in (False, True):
        params, grads = [], []
        for (on, placements), value in zip(placed, values, strict=True):
            put = (
                (lambda t, on=on, to=placements: distribute_tensor(t, on, to)) if spread and on else torch.Tensor.clone
            )
            params.append(nn.Parameter(put(torch.zeros(6, 5, dtype=torch.float64))))
            grads.append([put(g) for g in value])
        opt = AlignedOptimizer(torch.optim.SGD(params, lr=1.0), "cagrad", scope={"some": [params[0], params[3]]})
        for k in range(2):
            with opt.path():
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad[k]
        opt.step()
        results.append([p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params])
        results[-1] += [opt.stats.parameter_cosine, opt.stats.group_cosine]
    assert_same(results[1], results[0])
    partial = nn.Parameter(distribute_tensor(torch.zeros(4), line, [Replicate()]))
    opt = AlignedOptimizer(torch.optim.SGD([partial], lr=1.0))
    for _ in range(2):
        with opt.path():
            partial.grad = DTensor.from_local(torch.ones(4), line, [Partial()])
    opt.step()
    assert_same([partial.full_tensor()], [torch.full((4,), -float(world))])


class Block(nn.Module):
    """A layer norm and two linear layers on [samples, frames, features]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 4)
        self.double()

    def forward(self, frames):
        return self.down(self.up(self.norm(frames)).tanh())


@check
def tensor_parallelism():
    """All ranks see the whole batch; with a sequence-parallel norm the gradients of that are partial sums."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def steps(model, opt, mode):
        for step in range(2):
            gen = torch.Generator().manual_seed(step)
            views = torch.randn(2, 5, 4, 6, generator=gen, dtype=torch.float64)
            opt.zero_grad()
            if mode == "path":
                for view in views:
                    with opt.path():
                        model(view).square().mean().backward()
            elif mode == "index":
                for part in (slice(0, 2), slice(2, 5)):
                    for k, view in enumerate(views):
                        with opt.path(k):
                            (model(view[part]).square().mean() * len(view[part]) / 5).backward()
            else:
                opt.backward([model(view).square().mean() for view in views])
            opt.step()
        return whole(model)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for mode, sequence in itertools.product(("path", "index", "backward"), (False, True)):
        alone = Block()
        expected = steps(alone, make_optimizer(alone, "gradvac", "parameter"), "path")
        model = Block()
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan |= {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
            }
        parallelize_module(model, mesh, plan)
        opt = make_optimizer(model, "gradvac", "parameter")
        assert_same(steps(model, opt, mode), expected)
        assert_equal_on_all_ranks(opt.stats)


# ---- batches ----


@check
def uneven_batches():
    sizes = [2 + rank for rank in range(dist.get_world_size())]
    for wrap in (with_ddp, with_group, with_fsdp):
        assert_trains_like_one_process(wrap, ["gradvac"], sizes=sizes)


@check
def a_rank_without_samples():
    sizes = [0, *[2] * (dist.get_world_size() - 1)]
    assert_trains_like_one_process(with_group, scopes=("parameter",), sizes=sizes)


@check
def nobody_has_samples():
    opt = make_optimizer(make_model(), process_group=dist.group.WORLD)
    for _ in range(2):
        with opt.path():
            pass
    with pytest.raises(RuntimeError, match="at least one parameter on some rank; found none"):
        opt.step()


@check
def accumulation():
    """Micro-batches within a path, and over calls of backward(losses)."""
    part, total, _ = mine()
    views, labels = make_batch(0, total)
    alone = make_model()
    train(alone, make_optimizer(alone, "gradvac"), own=False, steps=1)
    for mode, wrap in (
        *itertools.product(("path", "index"), (with_ddp, with_group, with_fsdp)),
        ("no_sync", with_ddp),
        ("backward", with_group),
        ("backward", with_fsdp),
    ):
        model, opt, _ = wrap(make_model(), "gradvac", "model")
        pieces = [range(part.start, part.stop)[0:1], range(part.start, part.stop)[1:]]

        def loss(view, piece, model=model):
            return loss_of(model, view[list(piece)], labels[list(piece)], len(piece) / PER_RANK)

        if mode == "path":
            for view in views:
                with opt.path():
                    for piece in pieces:
                        loss(view, piece).backward()
        elif mode == "no_sync":
            for view in views:
                with opt.path():
                    with model.no_sync():
                        loss(view, pieces[0]).backward()
                    loss(view, pieces[1]).backward()
        elif mode == "index":
            for piece in pieces:
                for k, view in enumerate(views):
                    with opt.path(k):
                        loss(view, piece).backward()
        else:
            for piece in pieces:
                opt.backward([loss(view, piece) for view in views])
        opt.step()
        assert_same(whole(model), whole(alone))


@check
def one_path_is_the_average():
    alone = make_model()
    train(alone, make_optimizer(alone), own=False, count=1)
    model = make_model()
    found = train(model, make_optimizer(model, process_group=dist.group.WORLD), count=1)
    assert_same(found, whole(alone))


@check
def float32_and_other_dtypes():
    """Buckets by dtype, a channels-last parameter, a scalar; to the accuracy of each dtype."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for process_group in (None, dist.group.WORLD):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.zeros((), dtype=torch.float64)),
            nn.Parameter(torch.zeros(7, dtype=torch.bfloat16)),
            nn.Parameter(torch.zeros(5, 3)),
        ]
        grads = [[[torch.randn_like(p) for p in params] for _ in range(2)] for _ in range(world)]
        opt = AlignedOptimizer(
            torch.optim.SGD(params, lr=1.0, fused=True), "mgda", "parameter", process_group=process_group
        )
        for k in range(2):
            with opt.path():
                for n, param in enumerate(params):
                    average = torch.stack([grads[r][k][n].double() for r in range(world)]).mean(0)
                    given = grads[rank][k][n] if process_group else average
                    # Fused optimizers take gradients only in their parameter's memory order.
                    param.grad = (
                        torch.empty_like(param).copy_(given) if process_group is None else given.to(param.dtype)
                    )
        opt.step()
        if process_group is None:
            expected = [p.detach().clone() for p in params]
        else:
            assert params[0].grad.stride() == params[0].stride()
    for found, wanted, tolerance in zip(params, expected, (1e-6, 1e-6, 2e-2, 1e-6), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def float16_average(value):
    """The float16 gradient, and the steps skipped, where both paths have ``value`` on this rank (None: no gradient)."""
    param = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    opt = AlignedOptimizer(torch.optim.SGD([param], lr=2.0**-10), process_group=dist.group.WORLD)
    for _ in range(2):
        with opt.path():
            if value is not None:
                param.grad = torch.full_like(param, value)
    opt.step()
    return param.grad, opt.stats.skipped


@check
def an_average_of_large_float16_gradients():
    """Their sum over the ranks would be infinite."""
    grad, skipped = float16_average(40000.0)
    assert skipped == 0
    assert_same([grad], [torch.full_like(grad, 40000.0)], 1e-3)


@check
def a_rank_without_float16_gradients():
    grad, _ = float16_average(2.0 * dist.get_world_size() if dist.get_rank() == 0 else None)
    assert_same([grad], [torch.full_like(grad, 2.0)], 1e-3)


# ---- parameters that not every path on every rank reaches ----


@check
def parameters_missing_on_some_ranks():
    """A missing gradient counts as zero in the average; what no rank reaches keeps ``grad is None``."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    grads = torch.randn(2, world, 5, 4, dtype=torch.float64)
    # Parameter 1: path 0 on rank 0 only. 2: path 1 on the last rank only. 3: no path. 4 is frozen.
    reached = torch.ones(2, world, 5, dtype=torch.bool)
    reached[0, 1:, 1] = reached[1, :, 1] = reached[0, :, 2] = reached[1, :-1, 2] = reached[:, :, 3:] = False
    for method in ("mean", "pcgrad", "gradvac", "cagrad"):
        results = []
        for process_group in (None, dist.group.WORLD):
            params = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(5)]
            params[4].requires_grad_(False)
            inner = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
            opt = AlignedOptimizer(inner, method, scope="parameter", process_group=process_group)
            for k in range(2):
                with opt.path():
                    for n, param in enumerate(params):
                        average = (grads[k, :, n] * reached[k, :, n, None]).mean(0)
                        if process_group is None and reached[k, :, n].any():
                            param.grad = average
                        elif process_group is not None and reached[k, rank, n]:
                            param.grad = grads[k, rank, n].clone()
            opt.step()
            for n in (3, 4):
                assert params[n].grad is None
                assert torch.equal(params[n], torch.ones(4, dtype=torch.float64))
            results.append([p.detach() for p in params] + [opt.stats.parameter_cosine])
        assert_same(results[1], results[0])


@check
def dtensors_that_autograd_lets_share_memory():
    """Each is merged once: the gradients of both parameters are views of one tensor on each rank."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, target = init_device_mesh("cpu", (dist.get_world_size(),)), torch.arange(2 * 4.0).view(2, 4).double()
    params = [nn.Parameter(distribute_tensor(torch.zeros(4).double(), mesh, [Shard(0)])) for _ in range(2)]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=1.0), "mean")
    for row in target:
        with opt.path():
            ((params[0][None] + params[1][None]) * distribute_tensor(row, mesh, [Shard(0)])).sum().backward()
    opt.step()
    assert_same([param.full_tensor() for param in params], [-target.mean(0)] * 2)


@check
def frozen_after_the_paths():
    """What is frozen before the step is still averaged over the ranks, one of which has not reached it."""
    params = [nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=1.0), process_group=dist.group.WORLD)
    for _ in range(2):
        with opt.path():
            for param in params[: 1 if dist.get_rank() else 2]:
                param.grad = torch.ones_like(param)
    params[1].requires_grad_(False)
    opt.step()
    assert_same(params, [torch.full((4,), -1.0).double(), torch.full((4,), -1.0 / dist.get_world_size()).double()])


class TwoHeads(nn.Sequential):
    """A trunk, and one head per path."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3))
        self.double()

    def forward(self, views, only=None):
        return [self[1 + k](self[0](view).tanh()) for k, view in enumerate(views) if only in (None, k)]


@check
def a_head_per_path():
    part, total, _ = mine()

    def steps(model, opt, mode, part):
        for step in range(2):
            views, labels = make_batch(step, total)
            views = [view[part] for view in views]
            opt.zero_grad()
            if mode == "path":
                for k in range(2):
                    with opt.path():
                        nn.functional.cross_entropy(model(views, k)[0], labels[part]).backward()
            else:
                opt.backward([nn.functional.cross_entropy(logits, labels[part]) for logits in model(views)])
            opt.step()
        return whole(model)

    def unused(model, method, scope):
        model = DistributedDataParallel(model, find_unused_parameters=True)
        return model, make_optimizer(model, method, scope), None

    for mode in ("path", "backward"):
        for method in ("pcgrad", "cagrad"):
            alone = TwoHeads()
            expected = steps(alone, make_optimizer(alone, method, "parameter"), mode="path", part=slice(None))
            for wrap in (unused, with_group, with_fsdp)[mode == "backward" :]:
                model, opt, _ = wrap(TwoHeads(), method, "parameter")
                assert_same(steps(model, opt, mode, part), expected)
                assert_equal_on_all_ranks(opt.stats)


# ---- non-finite gradients ----

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
}


@check
def a_nonfinite_gradient_on_one_rank_skips_on_all():
    for wrap in (with_ddp, with_group, with_fsdp):
        for inner in list(INNER.values())[0 if dist.get_world_size() == 2 else -1 :]:
            for first in (True, False):
                model, opt, _ = wrap(make_model(), "gradvac", "parameter")
                opt = make_optimizer(
                    model, "gradvac", inner=inner, process_group=dist.group.WORLD if wrap is with_group else None
                )
                if not first:
                    train(model, opt, steps=2)
                before, rho = whole(model), opt._tally.counters["rho"].clone() if not first else None
                views, labels = make_batch(9, PER_RANK)
                if dist.get_rank() == dist.get_world_size() - 1:
                    views[1][0, 0] = float("nan")
                opt.zero_grad()
                for view in views:
                    with opt.path():
                        loss_of(model, view, labels).backward()
                opt.step()
                assert_same(whole(model), before, 0.0)
                assert (opt.stats.steps, opt.stats.skipped) == (0 if first else 2, 1)
                assert rho is None or torch.equal(opt._tally.counters["rho"], rho)
                after = train(model, opt, steps=1)
                assert all(p.isfinite().all() for p in after)
                assert_equal_on_all_ranks(opt.stats, *after)


@check
def raise_names_the_parameter_on_all_ranks():
    for wrap in (with_group, with_fsdp):
        model, opt, _ = wrap(make_model(), "pcgrad", "model")
        opt.on_nonfinite = "raise"
        views, labels = make_batch(9, PER_RANK)
        for k, view in enumerate(views):
            with opt.path():
                loss = loss_of(model, view, labels)
                if k == 1 and dist.get_rank() == 0:
                    loss = loss * float("inf")
                loss.backward()
        with pytest.raises(FloatingPointError, match="path 1, parameter 0 of group 0"):
            opt.step()


@check
def grad_scaler():
    """Scaled, aligned, unscaled, clipped; an overflow on one rank skips on all."""
    for wrap in (with_ddp, with_group, with_fsdp):
        model, opt, _ = wrap(make_model(), "gradvac", "model")
        alone = make_model()
        reference = make_optimizer(alone, "gradvac")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        part, total, _ = mine()
        for step in range(3):
            views, labels = make_batch(step, total)
            overflow = step == 1
            opt.zero_grad()
            for view in views:
                with opt.path():
                    factor = float("inf") if overflow and dist.get_rank() == 0 else 1.0
                    scaler.scale(factor * loss_of(model, view[part], labels[part])).backward()
            opt.align()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            if not overflow:
                reference.zero_grad()
                for view in views:
                    with reference.path():
                        loss_of(alone, view, labels).backward()
                reference.align()
                nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
                reference.step()
        assert_same(whole(model), whole(alone))
        assert (opt.stats.steps, opt.stats.skipped, scaler.get_scale()) == (2, 1, 2.0**9)


# ---- state ----


@check
def state_dict_resumes_bit_for_bit():
    for wrap in (with_ddp, with_group, with_fsdp):
        model, opt, _ = wrap(make_model(), "gradvac", "parameter")
        train(model, opt, steps=2)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        expected = train(model, opt, steps=2, first=2)
        resumed, fresh, _ = wrap(make_model(), "gradvac", "parameter")
        resumed.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        # A new DDP sends its first gradients in other buckets, so that sums of four are rounded otherwise.
        assert_same(train(resumed, fresh, steps=2, first=2), expected, 1e-12 if wrap is with_ddp else 0.0)
        assert wrap is with_ddp or str(fresh.stats) == str(opt.stats)


@check
def distributed_checkpoint_resumes_bit_for_bit():
    """Saved by FSDP2 ranks; loaded by FSDP2 ranks, by one whole copy per rank, and from one rank's whole state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    names = ("model", "optimizer")

    def build(wrap):
        return wrap(make_model(), "gradvac", "parameter")[:2]

    model, opt = build(with_fsdp)
    train(model, opt, steps=2)
    checkpoint.save(dict(zip(names, get_state_dict(model, opt), strict=True)), checkpoint_id=folder[0])
    on_rank_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = dict(zip(names, copy.deepcopy(get_state_dict(model, opt, options=on_rank_0)), strict=True))
    expected = train(model, opt, steps=2, first=2)
    for wrap in (with_fsdp, with_group):
        resumed, fresh = build(wrap)
        target = dict(zip(names, get_state_dict(resumed, fresh), strict=True))
        checkpoint.load(target, checkpoint_id=folder[0])
        set_state_dict(resumed, fresh, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
        assert_same(train(resumed, fresh, steps=2, first=2), expected, 0.0 if wrap is with_fsdp else 1e-12)
        assert (fresh.stats.steps, fresh.stats.conflicts) == (opt.stats.steps, opt.stats.conflicts)
    resumed, fresh = build(with_fsdp)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if dist.get_rank() > 0:
        full = {"model": {}, "optimizer": {}}
    set_model_state_dict(resumed, full["model"], options=options)
    set_optimizer_state_dict(resumed, fresh, full["optimizer"], options=options)
    assert_same(train(resumed, fresh, steps=2, first=2), expected, 0.0)
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


# ---- how it is sent ----


@check
def averaging_starts_when_a_path_ends():
    """Every path is on its way before the next one runs, and nobody waits for it before the last one has run; what is
    sent is K reduce-scatters and one all-gather.
    """
    log = []
    sent = {}

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            log.append("wait")
            self.work.wait()

    with pytest.MonkeyPatch.context() as patch:
        names = ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce")
        calls = {name: getattr(dist, name) for name in names}
        for name in names:

            def logged(*args, name=name, call=calls[name], **kwargs):
                log.append(name)
                sent[name] = sent.get(name, 0) + max(t.nbytes for t in args if isinstance(t, torch.Tensor))
                work = call(*args, **kwargs)
                return work and Work(work)

            patch.setattr(dist, name, logged)
        model, opt, _ = with_group(make_model(), "pcgrad", "model")
        views, labels = make_batch(0, PER_RANK)
        for view in views:
            with opt.path():
                loss_of(model, view, labels).backward()
            log.append("path")
        opt.step()
    paths = ["reduce_scatter_tensor", "all_reduce", "path"] * 2
    assert log == [*paths, *["wait"] * 4, "all_reduce", "all_gather_into_tensor"]
    model_bytes = sum(p.nbytes for p in model.parameters())
    padded = sent["all_gather_into_tensor"]
    assert model_bytes <= padded <= model_bytes + 16 * (6 + dist.get_world_size())
    assert sent["reduce_scatter_tensor"] == 2 * padded
    assert sent["all_reduce"] == 2 * 6 * 4 + 6 * 4 * 8


@check
def no_value_is_read_on_the_host():
    """After a fused optimizer's first step, on CPU tensors that would allow it."""

    def refuse(tensor):
        raise AssertionError(f"a value was read: {tensor}")

    for wrap in (with_ddp, with_group, with_fsdp):
        model, _, _ = wrap(make_model(), "pcgrad", "model")
        group = dist.group.WORLD if wrap is with_group else None
        opt = make_optimizer(model, "gradvac", "parameter", INNER["fused adamw"], process_group=group)
        train(model, opt, steps=1)
        views, labels = make_batch(1, PER_RANK)
        opt.zero_grad()
        for view in views:
            with opt.path():
                loss_of(model, view, labels).backward()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__"):
                patch.setattr(torch.Tensor, name, refuse)
            opt.step()
        assert opt.stats.steps == 2


# ---- misuse ----


@check
def what_would_be_wrong_is_refused():
    world = dist.group.WORLD
    model = DistributedDataParallel(make_model())
    opt = make_optimizer(model)
    views, labels = make_batch(0, PER_RANK)
    with pytest.raises(RuntimeError, match=r"on several ranks needs `process_group`.*found None"):
        opt.backward([loss_of(model, view, labels) for view in views])
    opt.backward([loss_of(model, views[0], labels)])
    opt.step()
    model, opt, _ = with_group(make_model(), "pcgrad", "model")
    with opt.path():
        loss_of(model, views[0], labels).backward()
    model[2].requires_grad_(False)
    with (
        pytest.raises(RuntimeError, match=r"the same in all paths of a step; found another in parameter 2"),
        opt.path(),
    ):
        loss_of(model, views[1], labels).backward()
    model[2].requires_grad_(True)
    with opt.path():
        loss_of(model, views[1], labels).backward()
    opt.step()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    separate = make_model()
    train(separate, make_optimizer(separate, process_group=alone), mode="backward", steps=1)
    for wrap in (with_ddp, with_fsdp):
        model, opt, _ = wrap(make_model(), "pcgrad", "model")
        with opt.path():
            loss_of(model, views[0], labels).backward()
        with pytest.raises(RuntimeError, match=r"path 0 must give a gradient .* found none"), opt.path(0):
            pass
    with pytest.raises(TypeError, match="ProcessGroup or None; found str"):
        make_optimizer(make_model(), process_group="gloo")
    with pytest.raises(ValueError, match="`process_group` must be None where parameters are DTensors"):
        make_optimizer(sharded(make_model()), process_group=world)
    flat = nn.Parameter(torch.zeros(3))
    flat._fsdp_flattened = True
    with pytest.raises(TypeError, match=r"whole or DTensors .* found some of FullyShardedDataParallel"):
        AlignedOptimizer(torch.optim.SGD([flat], lr=0.1))
    views_model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    with pytest.raises(RuntimeError, match=r"path 1 has overwritten path 0 .*gradient_as_bucket_view=False"):
        train(views_model, make_optimizer(views_model))
    # What only one path reaches is not overwritten, the trunk is.
    heads = DistributedDataParallel(TwoHeads(), gradient_as_bucket_view=True, find_unused_parameters=True)
    opt = make_optimizer(heads)

    def step():
        opt.zero_grad()
        for k in range(2):
            with opt.path():
                loss_of(lambda view, k=k: heads([view] * 2, k)[0], views[k], labels).backward()
        opt.step()

    with pytest.raises(RuntimeError, match="has overwritten path 0"):
        step()


# ---- the jobs ----


def rank_main(rank, world, folder):
    faulthandler.dump_traceback_later(RANK_LIMIT, exit=True)
    # It comes when the job has been killed: end even within a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        # After a failure the ranks no longer agree on what comes next.
        failed = [None] * world
        dist.all_gather_object(failed, results[name])
        if any(failed):
            results[name] = "\n".join(failed)
            break
        (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def jobs():
    """Start both jobs at once; a function that waits for one and returns its ranks' results."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs a PyTorch with torch.distributed and gloo")
    started, found = {}, {}
    with contextlib.ExitStack() as stack:
        for world in (2, 4):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            command = [sys.executable, str(Path(__file__).resolve()), str(world), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            started[world] = (
                folder,
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
            )

        def results(world):
            if world not in found:
                folder, job = started[world]
                try:
                    output = job.communicate(timeout=JOB_LIMIT)[0]
                except subprocess.TimeoutExpired as error:
                    # What it has printed comes as bytes, or as None.
                    output = f"not done after {JOB_LIMIT} s\n{(error.output or b'').decode(errors='replace')}"
                    job.kill()
                files = sorted(Path(folder).glob("*.json"))
                found[world] = [json.loads(file.read_text()) for file in files], output
            return found[world]

        yield results
        for _, job in started.values():
            job.kill()
            job.wait()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_on_all_ranks(name, world, jobs):
    ranks, output = jobs(world)
    assert len(ranks) == world, output[-4000:]
    for rank in ranks:
        assert rank.get(name, "it was not reached") == "", rank.get(name, output[-4000:])


@pytest.fixture
def one_rank(tmp_path):
    """A function that sets up a backend with one rank.

    The group ends when the test's models are gone. A DDP that holds the last reference to a gloo group ends its threads
    without releasing the GIL, for which they may be waiting: a deadlock (pytorch/pytorch#56297).
    """
    yield lambda backend: dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [with_group, with_fsdp])
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", "cpu"),
        pytest.param(
            "nccl", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and NCCL")
        ),
    ],
)
def test_one_rank_of_a_backend_sends_to_itself(wrap, backend, device, one_rank):
    """Every collective in the form it has on many ranks; on a GPU no step waits for the device."""
    one_rank(backend)
    batches = [make_batch(step, 4) for step in range(4)]
    batches = [([view.to(device) for view in views], labels.to(device)) for views, labels in batches]
    results = []
    for spread in (False, True):
        model = make_model().to(device)
        if spread and wrap is with_fsdp:
            sharded(model, init_device_mesh(device, (1,)))
        opt = make_optimizer(model, "gradvac", "parameter", INNER["fused adamw"])
        if spread and wrap is with_group:
            # A group of one rank averages nothing by itself.
            opt._averager = Averager(dist.group.WORLD)
        for step, (views, labels) in enumerate(batches):
            opt.zero_grad()
            for view in views:
                with opt.path():
                    loss_of(model, view, labels).backward()
            if device == "cuda" and step > 1:
                torch.cuda.set_sync_debug_mode("error")
            try:
                opt.step()
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        results.append([*whole(model), opt.stats.parameter_cosine])
    assert_same(results[1], results[0])


def test_one_rank_of_ddp_does_not_overwrite_a_path(one_rank):
    one_rank("gloo")
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    with pytest.raises(RuntimeError, match=r"path 1 has overwritten path 0 .*gradient_as_bucket_view=False"):
        train(model, make_optimizer(model))


def main():
    import torch.multiprocessing as mp

    world, folder = int(sys.argv[1]), sys.argv[2]
    mp.start_processes(rank_main, (world, folder), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
