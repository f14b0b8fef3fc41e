"""AlignedOptimizer: merged gradients, state, skipped steps, and everything an optimizer must do."""

import copy
import importlib.util
import json
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path

import measure
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradalign import alignment, detectors, ops
from gradalign.optim import AlignedOptimizer

FIXTURE = Path(__file__).parent / "data" / "alignment_published.npz"
PUBLISHED = os.environ.get("GRADALIGN_PUBLISHED_DPDA")
SHAPES = [(7, 5), (5,), (3, 4, 2), (1,)]


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    parts = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*parts) if dtype == torch.float32 else nn.Sequential(*parts).to(dtype)


def make_batch(seed=0, count=2, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    views = [torch.randn(10, 6, generator=gen).to(dtype) * (k + 1) for k in range(count)]
    return views, torch.randint(0, 2, (10,), generator=gen)


def loss_of(model, view, labels):
    return nn.functional.cross_entropy(model(view), labels)


def collect(model, opt, views, labels, mode):
    if mode == "path":
        for view in views:
            with opt.path():
                loss_of(model, view, labels).backward()
    else:
        opt.backward([loss_of(model, view, labels) for view in views])


def train(model, opt, steps=6, mode="path", count=2, schedulers=()):
    for step in range(steps):
        views, labels = make_batch(step, count)
        opt.zero_grad()
        collect(model, opt, views, labels, mode)
        opt.step()
        for scheduler in schedulers:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def set_paths(opt, params, grads_per_path):
    """Hand over gradients as if they came from backward: a linear loss has its coefficients as gradient."""
    for grads in grads_per_path:
        with opt.path():
            sum((p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None).backward()


def split(flat):
    flat = torch.from_numpy(flat)
    return [part.view(shape) for part, shape in zip(flat.split([int(np.prod(s)) for s in SHAPES]), SHAPES, strict=True)]


# ---- merged gradients ----


@pytest.mark.parametrize(("method", "tolerance"), [("pcgrad", 1e-6), ("gradvac", 1e-5), ("cagrad", 2e-4)])
def test_published_cases_through_the_optimizer(method, tolerance):
    data = np.load(FIXTURE)
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.0), method=method)
    for i in range(8):
        clean, augmented, merged = (data[f"{method}_{i}_{name}"] for name in ("clean", "augmented", "merged"))
        opt.zero_grad()
        set_paths(opt, params, [split(clean), split(augmented)])
        opt.step()
        found = torch.cat([p.grad.flatten() for p in params]).numpy()
        scale = max(1.0, np.abs(clean).max(), np.abs(augmented).max())
        assert np.abs(found - merged).max() <= tolerance * scale, (method, i)


@pytest.mark.parametrize("method", ["mean", "pcgrad", "gradvac", "cagrad"])
@pytest.mark.parametrize("scope", ["model", "parameter", "groups"])
@pytest.mark.parametrize("count", [2, 3])
def test_path_and_backward_merge_alike(method, scope, count):
    merged = []
    for mode in ("path", "backward"):
        model = make_model()
        groups = {"front": list(model[0].parameters()), "back": list(model[4].parameters())}
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = AlignedOptimizer(inner, method=method, scope=groups if scope == "groups" else scope)
        train(model, opt, 4, mode, count)
        merged.append([p.grad for p in model.parameters()])
    assert_same(*merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "parameter", "groups"])
@pytest.mark.parametrize("method", ["pcgrad", "cagrad"])
def test_scope_decides_which_gradients_share_weights(scope, method):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    named = {"a": [params[2], params[0]], "b": [params[1]]}
    segments = {"model": [[0, 1, 2, 3]], "parameter": [[0], [1], [2], [3]], "groups": [[0, 2], [1], [3]]}[scope]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.0), method, scope=named if scope == "groups" else scope)
    paths = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2)]
    set_paths(opt, params, paths)
    opt.step()
    for segment in segments:
        rows = torch.stack([torch.cat([path[n].flatten() for n in segment]) for path in paths])
        expected = alignment.weights(rows @ rows.T, method) @ rows
        found = torch.cat([params[n].grad.flatten() for n in segment])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["model", "parameter", "groups"])
@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad"])
def test_excluded_parameters_are_averaged_and_do_not_count(scope, method):
    """Parameters 1 and 4 are excluded; 4 is reached by path 0 only."""
    torch.manual_seed(0)
    shapes = [*SHAPES, (2,)]
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    paths = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    paths[1][4] = None
    aligned = [0, 2, 3]
    merged = {}
    for exclude in ((), (params[1], params[4])):
        chosen = params if exclude else [params[n] for n in aligned]
        named = {"a": [params[2]]} if scope == "groups" else scope
        opt = AlignedOptimizer(torch.optim.SGD(chosen, lr=0.0), method, scope=named, exclude=iter(exclude))
        set_paths(opt, params, paths)
        opt.step()
        merged[bool(exclude)] = [params[n].grad for n in aligned], opt.stats
        found = params[1].grad, params[4].grad
        for param in params:
            param.grad = None
    assert_same(merged[True][0], merged[False][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0], (paths[0][1] + paths[1][1]) / 2)
    torch.testing.assert_close(found[1], paths[0][4] / 2)
    stats = merged[True][1]
    torch.testing.assert_close(stats.cosine, merged[False][1].cosine)
    assert stats.conflicts == merged[False][1].conflicts
    torch.testing.assert_close(stats.parameter_cosine[aligned], merged[False][1].parameter_cosine)
    assert stats.groups == (("a", "rest", "excluded") if scope == "groups" else ())


def test_excluded_parameters_survive_copies_checkpoints_and_growth():
    def build():
        model = make_model()
        inner = torch.optim.AdamW(model[:3].parameters(), lr=0.05)
        return model, AlignedOptimizer(inner, "gradvac", exclude=model[0].parameters())

    model, opt = build()
    train(model, opt, 2)
    opt.add_param_group({"params": list(model[4].parameters())})
    model.zero_grad()
    train(model, opt, 2)
    other_model, other = copy.deepcopy((model, opt))
    resumed, fresh = build()
    fresh.add_param_group({"params": list(resumed[4].parameters())})
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    expected = train(model, opt, 2)
    assert_same(train(other_model, other, 2), expected)
    assert_same(train(resumed, fresh, 2), expected)


def test_mean_equals_training_on_the_mean_loss():
    plain, aligned = make_model(), make_model()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        views, labels = make_batch(step)
        sgd.zero_grad()
        (sum(loss_of(plain, view, labels) for view in views) / 2).backward()
        sgd.step()
    inner = torch.optim.SGD(aligned.parameters(), lr=0.1, momentum=0.9)
    found = train(aligned, AlignedOptimizer(inner, method="none"))
    assert_same(found, [p.detach() for p in plain.parameters()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["path", "backward", "plain"])
@pytest.mark.parametrize("method", ["mean", "pcgrad", "gradvac", "cagrad"])
def test_one_path_is_the_plain_optimizer_bit_for_bit(mode, method):
    plain, aligned = make_model(), make_model()
    adam = torch.optim.AdamW(plain.parameters(), lr=0.01)
    opt = AlignedOptimizer(torch.optim.AdamW(aligned.parameters(), lr=0.01), method=method)
    for step in range(5):
        (view,), labels = make_batch(step, 1)
        adam.zero_grad()
        loss_of(plain, view, labels).backward()
        adam.step()
        opt.zero_grad()
        loss = loss_of(aligned, view, labels)
        if mode == "path":
            with opt.path():
                loss.backward()
        elif mode == "backward":
            opt.backward([loss])
        else:
            loss.backward()
        opt.step()
    assert_same(list(aligned.parameters()), list(plain.parameters()))
    assert opt.stats.steps == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(4, 3, dtype=dtype)), nn.Parameter(torch.zeros(5))]
    paths = [[torch.randn(4, 3).to(dtype), torch.randn(5)] for _ in range(2)]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.0))
    set_paths(opt, params, paths)
    opt.step()
    rows = torch.stack([torch.cat([g.double().flatten() for g in path]) for path in paths])
    expected = alignment.weights(rows @ rows.T, "pcgrad") @ rows
    torch.testing.assert_close(params[0].grad, expected[:12].view(4, 3).to(dtype))
    torch.testing.assert_close(params[1].grad, expected[12:].float())


def test_gradients_accumulate_inside_a_path_and_over_backward_calls():
    merged = {}
    for mode in ("whole", "path", "index", "backward"):
        model = make_model(dtype=torch.float64)
        opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        views, labels = make_batch(dtype=torch.float64)
        halves = [slice(0, 5), slice(5, 10)]
        if mode == "whole":
            opt.backward([loss_of(model, view, labels) for view in views])
        elif mode == "path":
            for view in views:
                with opt.path():
                    for half in halves:
                        (loss_of(model, view[half], labels[half]) / 2).backward()
        elif mode == "index":
            for half in halves:
                for k, view in enumerate(views):
                    with opt.path(k):
                        (loss_of(model, view[half], labels[half]) / 2).backward()
        else:
            for half in halves:
                opt.backward([loss_of(model, view[half], labels[half]) / 2 for view in views])
        opt.step()
        merged[mode] = [p.grad for p in model.parameters()]
        assert opt.stats.steps == 1
    assert_same(merged["path"], merged["whole"], rtol=1e-12, atol=1e-14)
    assert_same(merged["index"], merged["whole"], rtol=1e-12, atol=1e-14)
    assert_same(merged["backward"], merged["whole"], rtol=1e-12, atol=1e-14)


def test_gradients_without_a_version_accumulate():
    param = nn.Parameter(torch.zeros(2))
    opt = AlignedOptimizer(torch.optim.SGD([param], lr=1.0))
    for _ in range(2):
        with opt.path(0), torch.inference_mode():
            param.grad = torch.ones(2) if param.grad is None else param.grad.add_(1)
    opt.step()
    assert param.tolist() == [-2, -2]


# ---- parameters that not every path reaches ----


def partial_setup(method, scope="model", seed=0):
    """Parameters 0 and 3 are reached by both paths, 1 by path 0, 2 by path 1, 4 by none, 5 is frozen."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(6)]
    params[5].requires_grad_(False)
    paths = [[torch.randn(4, dtype=torch.float64) for _ in range(6)] for _ in range(2)]
    if paths[0][0] @ paths[1][0] + paths[0][3] @ paths[1][3] > 0:
        paths[1] = [-g for g in paths[1]]
    for path, missing in zip(paths, ((2, 4, 5), (1, 4, 5)), strict=True):
        for n in missing:
            path[n] = None
    opt = AlignedOptimizer(torch.optim.AdamW(params, lr=0.1, weight_decay=0.5), method=method, scope=scope)
    set_paths(opt, params, paths)
    opt.step()
    return params, paths, opt


@pytest.mark.parametrize("add", [lambda a, b: torch.stack([a, b]).sum(0), lambda a, b: a[None] + b[None]])
@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_gradients_that_autograd_lets_share_memory(add, scope):
    """Each is merged once: the gradients of both parameters are views of one tensor."""
    params = [nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=1.0), "mean", scope=scope)
    factors = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        for k, factor in enumerate(factors):
            with opt.path(k):
                (add(*params) * factor).sum().backward()
    opt.step()
    assert params[0].grad.data_ptr() != params[1].grad.data_ptr()
    assert_same(params, [-factors.sum(0)] * 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_unreached_and_frozen_parameters_are_left_alone(scope):
    for method in ("mean", "pcgrad", "gradvac", "cagrad"):
        params, _, opt = partial_setup(method, scope)
        for n in (4, 5):
            assert params[n].grad is None
            assert torch.equal(params[n], torch.ones(4, dtype=torch.float64))
            assert params[n] not in opt.state


@pytest.mark.parametrize("method", alignment.METHODS)
def test_parameters_on_their_own_beside_one_that_no_path_reaches(method):
    """Where all others are reached by every path, which is merged in one pass without the unreached one."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    paths = [[torch.randn(4, 3, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    merged, conflicts = [], []
    for unreached in (None, 1):
        kept = [n for n in range(3) if unreached is None or n != unreached]
        params = [nn.Parameter(value.clone()) for value in start]
        opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.1), method, scope="parameter")
        set_paths(opt, params, [[g if n in kept else None for n, g in enumerate(path)] for path in paths])
        opt.step()
        assert unreached is None or torch.equal(params[unreached], start[unreached])
        merged.append([params[n] for n in (0, 2)])
        conflicts.append(opt.stats.parameter_conflicts[[0, 2]])
    assert_same(*merged, rtol=1e-12, atol=1e-12)
    assert torch.equal(*conflicts)


@pytest.mark.parametrize("method", ["mean", "pcgrad", "gradvac", "cagrad"])
def test_rules_for_partly_reached_parameters(method):
    params, paths, _ = partial_setup(method)
    zero = torch.zeros(4, dtype=torch.float64)
    shared = (0, 3) if method == "cagrad" else (0, 1, 2, 3)
    rows = torch.stack([torch.cat([zero if p[n] is None else p[n] for n in shared]) for p in paths])
    w = alignment.weights(rows @ rows.T, method)
    factor = {"mean": w, "gradvac": w, "pcgrad": 2 * w, "cagrad": torch.ones(2)}[method]
    torch.testing.assert_close(params[1].grad, factor[0] * paths[0][1])
    torch.testing.assert_close(params[2].grad, factor[1] * paths[1][2])
    for n in (0, 3):
        torch.testing.assert_close(params[n].grad, w[0] * paths[0][n] + w[1] * paths[1][n])


def test_two_of_three_paths():
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
    torch.manual_seed(0)
    paths = [[torch.randn(3, dtype=torch.float64) for _ in range(2)] for _ in range(3)]
    paths[1][1] = None
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.0), method="mean")
    set_paths(opt, params, paths)
    opt.step()
    torch.testing.assert_close(params[1].grad, (paths[0][1] + paths[2][1]) / 3)
    gram = opt.stats.parameter_cosine
    assert gram[1, 1, 0] == 0
    assert gram[1, 0, 2] == pytest.approx(nn.functional.cosine_similarity(paths[0][1], paths[2][1], dim=0).item())


@pytest.mark.skipif(not PUBLISHED, reason="GRADALIGN_PUBLISHED_DPDA must name a checkout of ductuantruong/dpda_ga")
@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "CAGrad"])
def test_published_aligners_merge_a_real_model_alike(name, monkeypatch):
    """Both on one network with a head per path: equal but where the published code is wrong (see the asserts)."""
    path = Path(PUBLISHED) / "grad_align" / f"{name.lower()}.py"
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    trunk = nn.Linear(6, 8).double()
    heads = [nn.Linear(8, 2).double() for _ in range(2)]
    unused = nn.Linear(3, 3).double()
    params = [p for part in (trunk, *heads, unused) for p in part.parameters()]
    labels = torch.randint(0, 2, (10,))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
        theirs = getattr(module, name)(torch.optim.SGD(params, lr=0.0))
    if name == "GradVac":
        theirs.rho_T = theirs.rho_T.double()
    ours = AlignedOptimizer(torch.optim.SGD(params, lr=0.0), method=name.lower())
    conflicts = 0
    for _ in range(8):
        views = [torch.randn(10, 6, dtype=torch.float64) for _ in range(2)]

        def losses(views=views):
            return [nn.functional.cross_entropy(h(trunk(v).tanh()), labels) for h, v in zip(heads, views, strict=True)]

        theirs.ga_backward(losses())
        expected = [p.grad for p in params]
        ours.zero_grad()
        ours.backward(losses())
        ours.step()
        # Its solver stops early, at 1e-6 of the objective; ours does not.
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if name == "CAGrad" else {"rtol": 1e-9, "atol": 1e-10}
        assert_same([p.grad for p in params[:4]], expected[:4], **tolerance)
        if name == "CAGrad":
            assert all((g == 0).all() for g in expected[4:6])
            assert all((p.grad != 0).any() for p in params[4:6])
        else:
            assert_same([p.grad for p in params[4:6]], expected[4:6], rtol=1e-9, atol=1e-10)
        assert all(p.grad is None for p in params[6:])
        assert all((g == 0).all() for g in expected[6:])
        conflicts = ours.stats.conflicts
    assert 0 < conflicts < 8


# ---- what it holds ----


@pytest.fixture
def peak_saved_bytes():
    """A function that runs another and returns the peak bytes of distinct storages that autograd keeps for backward."""

    def measure(run, exclude=()):
        known = {p.untyped_storage().data_ptr() for p in exclude}
        users, live, peak = Counter(), 0, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal live, peak
                self.tensor, storage = tensor, tensor.untyped_storage()
                self.key, self.size = storage.data_ptr(), storage.nbytes()
                if self.key not in known:
                    live += self.size * (users[self.key] == 0)
                    users[self.key] += 1
                    peak = max(peak, live)

            def __del__(self):
                nonlocal live
                if self.key not in known:
                    users[self.key] -= 1
                    live -= self.size * (users[self.key] == 0)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            run()
        return peak

    return measure


def test_exactly_one_more_gradient_set_for_two_paths():
    """Gradients are kept by reference: the merged one is the very tensor that autograd wrote in the first path."""
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    views, labels = make_batch()
    written = []
    for view in views:
        with opt.path():
            loss_of(model, view, labels).backward()
            written.append([p.grad for p in model.parameters()])
        assert all(p.grad is None for p in model.parameters())
    assert [[g is h for g, h in zip(a, b, strict=True)] for a, b in zip(written, opt._paths, strict=True)] == [
        [True] * 6
    ] * 2
    opt.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), written[0], strict=True))
    assert opt._paths == []


@pytest.mark.parametrize(("scope", "exclude"), [("model", False), ("parameter", False), ("groups", True)])
def test_a_merge_allocates_less_than_a_hundredth_of_a_gradient_set(scope, exclude):
    """No flattened copy, in one pass (parameters on their own) or in turn, where path 1 does not reach all."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((300, 500), (100_000,), (50_000,))]
    chosen = {"front": params[:1]} if scope == "groups" else scope
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.1), scope=chosen, exclude=params[1:2] if exclude else ())
    for k in range(2):
        reached = params if k == 0 or scope == "parameter" else params[:2]
        with opt.path():
            sum((p + 1).square().sum() for p in reached).backward()
    assert measure.peak_bytes(opt.align, torch.device("cpu")) < 0.01 * sum(p.nbytes for p in params)


def assert_split_needs_less(model, views, labels, peak_saved_bytes):
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.001))

    def joint():
        logits = model(torch.cat([*views]))
        opt.backward([nn.functional.cross_entropy(part, labels) for part in logits.chunk(2)])

    def one_after_the_other():
        for view in views:
            with opt.path():
                nn.functional.cross_entropy(model(view), labels).backward()

    peaks = []
    for run in (joint, one_after_the_other):
        peaks.append(peak_saved_bytes(run, exclude=model.parameters()))
        opt.step()
        opt.zero_grad()
    print(f"peak saved for backward: joint {peaks[0]:,} bytes, split {peaks[1]:,} bytes, {peaks[1] / peaks[0]:.3f}")
    assert peaks[0] > 1_000_000
    assert peaks[1] <= 0.6 * peaks[0]


def test_path_needs_at_most_six_tenths_of_the_activation_memory(peak_saved_bytes):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[layer for i in range(6) for layer in (nn.Conv1d(1 if i == 0 else 16, 16, 9, padding=4), nn.SELU())],
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    views, labels = torch.randn(2, 4, 1, 4000), torch.tensor([0, 1, 1, 0])
    assert_split_needs_less(model, views, labels, peak_saved_bytes)


def test_path_needs_at_most_six_tenths_of_the_activation_memory_of_aasist(peak_saved_bytes):
    torch.manual_seed(0)
    model = detectors.create("aasist")
    assert_split_needs_less(model, 0.1 * torch.randn(2, 2, 8000), torch.tensor([0, 1]), peak_saved_bytes)


# ---- statistics ----


def test_stats_count_conflicts_and_report_cosines():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    scope = {"first": params[:1], "second": params[1:]}
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.1), scope=scope)
    assert opt.stats.conflict_rate == 0
    assert opt.stats.cosine is None
    assert str(opt.stats) == "Stats(steps=0, skipped=0, conflict_rate=0)"
    assert opt.cosine is None
    one = torch.ones(1)
    for second in (
        [torch.tensor([-1.0, 0.0]), one],
        [torch.tensor([-1.0, 0.0]), 3 * one],
        [torch.tensor([0.0, 2.0]), -one],
    ):
        opt.zero_grad()
        set_paths(opt, params, [[torch.tensor([2.0, 0.0]), one], second])
        opt.step()
    stats = opt.stats
    assert (stats.steps, stats.skipped, stats.conflicts) == (3, 0, 2)
    assert stats.conflict_rate == pytest.approx(2 / 3)
    assert stats.groups == ("first", "second")
    assert stats.group_conflicts.tolist() == stats.parameter_conflicts.tolist() == [2, 1]
    assert stats.cosine[0, 1].item() == pytest.approx(-1 / 5)
    assert stats.parameter_cosine[:, 0, 1].tolist() == stats.group_cosine[:, 0, 1].tolist() == [0.0, -1.0]
    assert torch.equal(opt.cosine, stats.cosine)
    assert str(stats) == "Stats(steps=3, skipped=0, conflict_rate=0.667, last_mean_cosine=-0.2)"
    assert "parameter_cosine=tensor(" in repr(stats)
    opt.zero_grad()
    set_paths(opt, params, [[torch.ones(2), one], [-torch.ones(2), one]])
    opt.step()
    assert stats.parameter_conflicts.tolist() == [2, 1]
    assert opt.stats.parameter_conflicts.tolist() == [3, 1]


# ---- non-finite gradients ----

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "fused sgd, dampened": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "fused sgd, no momentum": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
}


def snapshot(params, opt):
    state = [copy.deepcopy(dict(opt.state[p])) if p in opt.state else None for p in params]
    rho = opt._tally.counters["rho"].clone() if "rho" in opt._tally.counters else None
    return [p.detach().clone() for p in params], state, rho


@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_nonfinite_path_skips_the_whole_step(inner, bad, first):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2))]
    opt = AlignedOptimizer(OPTIMIZERS[inner](params), method="gradvac")
    paths = [[torch.randn(5), torch.randn(3, 2)] for _ in range(2)]
    # The optimizer without the bad step, for what comes after it.
    twin_params = copy.deepcopy(params)
    twin = AlignedOptimizer(OPTIMIZERS[inner](twin_params), method="gradvac")
    if not first:
        for o, p in ((opt, params), (twin, twin_params)):
            set_paths(o, p, paths)
            o.step()
            o.zero_grad()
    before = snapshot(params, opt)
    paths[1][1][2, 1] = bad
    set_paths(opt, params, paths)
    opt.step()
    after = snapshot(params, opt)
    assert_same(after[0], before[0])
    assert str(after[1]) == str(before[1])
    if before[2] is not None:
        assert torch.equal(after[2], before[2])
    assert (opt.stats.steps, opt.stats.skipped) == (0 if first else 1, 1)
    paths[1][1][2, 1] = 0.5
    for o, p in ((opt, params), (twin, twin_params)):
        o.zero_grad()
        set_paths(o, p, paths)
        o.step()
    assert_same(params, twin_params)
    assert torch.equal(opt._tally.counters["rho"], twin._tally.counters["rho"])


def assert_only_skipped_moved(opt, before):
    """Of the counts and the method's state; before the first step there is none, which is zero."""
    for name in opt._tally.counters.keys() - {"skipped"}:
        counter = opt._tally.counters[name]
        assert torch.equal(counter, before.get(name, torch.zeros_like(counter))), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("scope", ["model", "parameter", "groups"])
def test_a_nonfinite_step_only_counts_as_skipped(scope, exclude, bad):
    """Although other parameters, with inf all together, conflict in it, from which the paper's GradVac would learn."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    opt = AlignedOptimizer(
        torch.optim.SGD(params, lr=0.1),
        "gradvac",
        scope={"front": params[:1]} if scope == "groups" else scope,
        exclude=params[2:] if exclude else (),
        variant="paper",
    )
    one = torch.ones(2)
    agreeing, skipped = [[one] * 3] * 2, [[one, one, one * bad], [-one] * 3]
    for paths in (skipped, agreeing, skipped):
        before = copy.deepcopy(opt._tally.counters)
        set_paths(opt, params, paths)
        opt.step()
        opt.zero_grad()
        if paths is skipped:
            assert_only_skipped_moved(opt, before)
    assert (opt.stats.steps, opt.stats.skipped) == (1, 2)


@pytest.mark.parametrize("method", alignment.METHODS)
@pytest.mark.parametrize("scope", ["model", "parameter", "groups"])
@pytest.mark.parametrize(("mode", "count"), [("path", 2), ("backward", 3)])
def test_step_never_reads_a_value_on_the_host(method, scope, mode, count):
    """Fake tensors hold no data, so that any read of a value raises; with a fused optimizer a whole step needs none."""
    with FakeTensorMode():
        model = make_model()
        chosen = {"front": list(model[0].parameters())} if scope == "groups" else scope
        inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        # Parameters on their own are merged in one pass where none is excluded.
        opt = AlignedOptimizer(inner, method, scope=chosen, exclude=[model[4].bias] if count == 3 else [])
        # As after its first step, in which the state is created and the flag is read once.
        opt._stepped = set(range(6))
        train(model, opt, 2, mode, count)
        assert opt.cosine.shape == (count, count)
        opt._stepped = set()
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            train(model, opt, 1, mode, count)


@pytest.mark.parametrize("inner", ["sgd", "fused sgd"])
def test_the_flag_is_all_that_is_ever_read(inner, monkeypatch):
    """Optimizers that are not fused read whether to skip, one number per step; fused ones in their first step only."""
    read = []
    with FakeTensorMode():
        model = make_model()
        opt = AlignedOptimizer(OPTIMIZERS[inner](model.parameters()), "gradvac")

        def item(tensor):
            assert tensor.numel() == 1
            read.append(tensor)
            return 0.0

        monkeypatch.setattr(torch.Tensor, "item", item)
        flags = []
        opt.register_step_pre_hook(lambda optimizer, args, kwargs: flags.append(optimizer._nonfinite))
        train(model, opt, 3)
    assert [id(tensor) for tensor in read] == [id(flag) for flag in flags[: 3 if inner == "sgd" else 1]]


def test_a_plain_step_after_a_skipped_one_is_taken():
    param = nn.Parameter(torch.zeros(2))
    opt = AlignedOptimizer(torch.optim.SGD([param], lr=1.0))
    set_paths(opt, [param], [[torch.ones(2)], [torch.full((2,), float("nan"))]])
    opt.step()
    assert param.tolist() == [0, 0]
    param.grad = torch.ones(2)
    opt.step()
    assert param.tolist() == [-1, -1]


def test_raise_names_path_and_parameter():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), on_nonfinite="raise")
    plain = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), on_nonfinite="raise")
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]
    grouped = AlignedOptimizer(torch.optim.SGD(groups, lr=0.1), on_nonfinite="raise")
    train(model, opt, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for o, name in (
        (opt, "parameter '2.weight'"),
        (plain, r"parameter 2 of group 0, shape \[8, 16\]"),
        (grouped, r"parameter 0 of group 1, shape \[8, 16\]"),
    ):
        o.zero_grad()
        grads = [[torch.ones_like(p) for p in model.parameters()] for _ in range(2)]
        grads[1][2][3, 3] = float("nan")
        set_paths(o, list(model.parameters()), grads)
        with pytest.raises(FloatingPointError, match=f"NaN or infinity in path 1, {name}"):
            o.step()
    assert_same(list(model.parameters()), before)
    assert opt.stats.steps == 1


# ---- a real optimizer ----


def test_it_is_an_optimizer_and_shares_everything():
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = AlignedOptimizer(inner)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    assert repr(opt).startswith("AlignedOptimizer(method='pcgrad', scope='model', optimizer=AdamW (")
    assert "lr: 0.1" in repr(opt)
    inner.load_state_dict(inner.state_dict())
    assert opt.param_groups is inner.param_groups


SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=10),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error")
def test_schedulers(name):
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = AlignedOptimizer(inner)
    scheduler = SCHEDULERS[name](opt)
    bare = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    bare_scheduler = SCHEDULERS[name](bare)
    for _ in range(5):
        train(model, opt, 1)
        bare.step()
        for s in (scheduler, bare_scheduler):
            s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
        assert inner.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
    assert inner.param_groups[0]["lr"] != 0.1


def test_hooks_see_aligned_gradients():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []

    def before(optimizer, args, kwargs):
        assert optimizer is opt
        assert all(p.grad is not None for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        calls.append("before")

    handles = [
        opt.register_step_pre_hook(before),
        opt.register_step_post_hook(lambda optimizer, args, kwargs: calls.append("after")),
    ]
    start = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 2)
    assert calls == ["before", "after"] * 2
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start, strict=True)]).norm()
    assert 0 < moved <= 0.1 * 0.02 * 1.001
    for handle in handles:
        handle.remove()
    train(model, opt, 1)
    assert len(calls) == 4


def test_state_dict_hooks():
    opt = AlignedOptimizer(torch.optim.SGD(make_model().parameters(), lr=0.1))
    calls = []
    opt.register_state_dict_pre_hook(lambda optimizer: calls.append("save"))
    opt.register_load_state_dict_post_hook(lambda optimizer: calls.append("load"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["save", "load"]


def test_closure():
    models = [make_model(), make_model()]
    opts = [AlignedOptimizer(torch.optim.SGD(m.parameters(), lr=0.1)) for m in models]
    train(models[0], opts[0], 3)
    for step in range(3):
        views, labels = make_batch(step)

        def closure(views=views, labels=labels):
            opts[1].zero_grad()
            losses = [loss_of(models[1], view, labels) for view in views]
            opts[1].backward(losses)
            return sum(losses)

        with torch.no_grad():
            assert opts[1].step(closure).item() > 0
    assert_same(list(models[0].parameters()), list(models[1].parameters()), rtol=0, atol=1e-6)


def test_clip_after_align_equals_clip_of_the_merged_gradient():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    views, labels = make_batch()
    opt.backward([loss_of(model, view, labels) for view in views])
    opt.align()
    merged = [p.grad.clone() for p in model.parameters()]
    opt.align()
    assert_same([p.grad for p in model.parameters()], merged)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert opt.stats.steps == 1
    expected = [p - g * (0.05 / (norm + 1e-6)) for p, g in zip(before, merged, strict=True)]
    assert_same(list(model.parameters()), expected, rtol=1e-6, atol=1e-8)


def test_add_param_group_grows_the_state():
    model = make_model()
    for scope in ("parameter", {"front": list(model[0].parameters())}):
        opt = AlignedOptimizer(torch.optim.SGD(model[:3].parameters(), lr=0.1), method="gradvac", scope=scope)
        for added in (False, True):
            if added:
                old = opt._tally.counters["rho"].clone()
                opt.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
            train(model, opt, 2)
            model.zero_grad()
        rho = opt._tally.counters["rho"]
        assert rho.shape == ((6 if scope == "parameter" else 2), 2, 2)
        assert old.shape == ((4 if scope == "parameter" else 2), 2, 2)
        assert opt.stats.steps == 4
        assert opt.stats.parameter_conflicts.shape == (6,)


@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_parameters_may_all_come_later(scope):
    opt = AlignedOptimizer(torch.optim.SGD([{"params": []}], lr=0.1), scope=scope)
    assert opt.cosine is opt.stats.cosine is None
    model = make_model()
    opt.add_param_group({"params": list(model.parameters())})
    train(model, opt, 2)
    assert opt.stats.steps == 2


@pytest.mark.parametrize("what", ["model", "scope", "exclude"])
@pytest.mark.parametrize("inner", [False, True])
def test_statistics_and_checkpoints_right_after_add_param_group(what, inner):
    def build():
        model = make_model()
        front = list(model[0].parameters())
        options = {"model": {}, "scope": {"scope": {"front": front}}, "exclude": {"exclude": front}}[what]
        return model, AlignedOptimizer(torch.optim.SGD(model[:3].parameters(), lr=0.1), "gradvac", **options)

    model, opt = build()
    train(model, opt, 2)
    cosine = opt.cosine
    (opt.optimizer if inner else opt).add_param_group({"params": list(model[4].parameters())})
    # Of a copy whose statistics nobody has read since.
    state = copy.deepcopy(opt).state_dict()
    assert torch.equal(opt.cosine, cosine)
    assert opt.stats.steps == 2
    assert torch.equal(opt.stats.cosine, cosine)
    assert opt.stats.parameter_cosine.shape == (6, 2, 2)
    assert (opt.stats.parameter_cosine[4:] == 0).all()
    other, fresh = build()
    fresh.add_param_group({"params": list(other[4].parameters())})
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    for trained, its in ((model, opt), (other, fresh)):
        trained.zero_grad()
        train(trained, its, 2)
    assert_same(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_another_parameter_in_the_place_of_one_is_noticed():
    """As wrappers that shard a model put theirs into the optimizer's groups."""
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), exclude=model[0].parameters())
    train(model, opt, 1)
    opt.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(16, 6))
    with pytest.raises(ValueError, match="parameters of the optimizer; found 1 of others"):
        _ = opt.stats


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_weights_that_are_not_finite_are_not_applied(on_nonfinite):
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    opt = AlignedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), lambda gram: gram[0] * float("nan"), on_nonfinite=on_nonfinite
    )
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"weights must be finite; found \[\[nan, nan\]\] from <lambda>"):
            train(model, opt, 1)
    else:
        train(model, opt, 1)
        assert (opt.stats.steps, opt.stats.skipped) == (0, 1)
    assert_same(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("count", [2, 3])
def test_state_dict_resumes_bit_for_bit(method, count, tmp_path):
    def build():
        model = make_model()
        return model, AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), method, scope="parameter")

    whole, opt = build()
    train(whole, opt, 4, "path", count)
    torch.save({"model": whole.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    expected = train(whole, opt, 4, "path", count)

    resumed, fresh = build()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["opt"])
    assert_same(train(resumed, fresh, 4, "path", count), expected)
    assert repr(fresh.stats) == repr(opt.stats)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint_resumes_bit_for_bit(method, inner, flatten, tmp_path):
    """torch.distributed.checkpoint with its state-dict helpers, into an optimizer that has not seen a path."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build():
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.02}]
        return model, AlignedOptimizer(OPTIMIZERS[inner](groups), method, scope="parameter")

    def content(model, opt):
        return dict(zip(("model", "optimizer"), get_state_dict(model, opt, options=options), strict=True))

    whole, opt = build()
    train(whole, opt, 4)
    checkpoint.save(content(whole, opt), checkpoint_id=tmp_path)
    expected = train(whole, opt, 4)

    resumed, fresh = build()
    target = content(resumed, fresh)
    checkpoint.load(target, checkpoint_id=tmp_path)
    set_state_dict(
        resumed, fresh, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options
    )
    assert_same(train(resumed, fresh, 4), expected)
    assert repr(fresh.stats) == repr(opt.stats)


def test_load_state_dict_is_strict_and_changes_nothing_when_it_fails():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.AdamW(model.parameters()), method="gradvac")
    train(model, opt, 2)
    good = copy.deepcopy(opt.state_dict())

    first = good["param_groups"][0]
    own = json.loads(first["alignment"])

    def change(**entries):
        changed = {k: v for k, v in {**own, **entries}.items() if v != "left out"}
        return {**good, "param_groups": [{**first, "alignment": json.dumps(changed)}]}

    for bad, message in (
        (opt.optimizer.state_dict(), "'alignment' entry; found none"),
        (change(extra=1), "must hold conflicts, method, num_paths, .*; found conflicts, extra, "),
        (change(method="pcgrad"), "method 'gradvac'; found 'pcgrad'"),
        (change(scope="parameter"), "scope 'model'; found 'parameter'"),
        (change(rho=own["rho"][0]), r"'rho': \(1, 2, 2\).*found.*'rho': \(2, 2\)"),
        (change(rho="left out"), "must hold .* rho, .*found"),
        (change() | {"param_groups": [{**change()["param_groups"][0], "params": [0]}]}, "doesn't match the size"),
        ({**good, "param_groups": []}, "found none"),
        ({}, "found none"),
        ({**good, "param_groups": [{**first, "alignment": "[1]"}]}, r"what state_dict\(\) wrote; found '\[1\]'"),
        ({**good, "param_groups": [{**first, "alignment": own}]}, "'alignment' entry; found none"),
        ({**good, "param_groups": [{**first, "alignment": "no json"}]}, "what state_dict.* wrote; found 'no json'"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(bad)
    assert str(opt.state_dict()) == str(good)
    # A fresh optimizer has seen nothing, and its state loads too.
    fresh = AlignedOptimizer(torch.optim.AdamW(make_model().parameters()), method="gradvac")
    opt.load_state_dict(fresh.state_dict())
    assert opt.stats.steps == 0


def test_load_state_dict_comes_between_steps(setup):
    _, opt, _ = setup
    with pytest.raises(RuntimeError, match="found an open path 0"), opt.path():
        opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("index", ["0", 0.0])
def test_a_path_is_named_by_an_integer(setup, index):
    with pytest.raises(TypeError, match=f"`index` must be an integer, or None for a new path; found {index!r}"):
        setup[1].path(index).__enter__()


def test_load_state_dict_forgets_the_unfinished_step():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    views, labels = make_batch()
    opt.zero_grad()
    with opt.path():
        loss_of(model, views[0], labels).backward()
    opt.load_state_dict(state)
    train(model, opt, 1)
    opt.zero_grad()
    for factor in (1.0, float("nan")):
        with opt.path():
            (factor * loss_of(model, views[0], labels)).backward()
    opt.align()
    opt.load_state_dict(state)
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, views[0], labels).backward()
    opt.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_state_of_other_groups_is_named():
    model = make_model()
    opt, other = (
        AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scope={name: [model[0].weight]})
        for name in ("front", "back")
    )
    with pytest.raises(ValueError, match="scope 'groups back'; found 'groups front'"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent_and_continue_alike(clone):
    model = make_model()
    opt = AlignedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.05), "gradvac", scope={"front": list(model[0].parameters())}
    )
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
    train(model, opt, 2, schedulers=[scheduler])
    other_model, other = clone((model, opt))
    assert other.param_groups[0]["params"][0] is next(other_model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    found = train(other_model, other, 3)
    assert_same(list(model.parameters()), before)
    assert opt.stats.steps == 2
    assert_same(train(model, opt, 3), found)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """Scaled losses, aligned, unscaled and clipped equal unscaled ones; an overflow skips and lowers the scale.

    In a path it only counts as skipped, although the paths conflict. After alignment only the scaler sees it, in the
    first step of a fused optimizer, which reads whether to skip, and in later ones.
    """
    models = [make_model(), make_model()]
    opts = [AlignedOptimizer(torch.optim.AdamW(m.parameters(), lr=0.05, fused=fused), "gradvac") for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(7):
        views, labels = make_batch(step)
        overflow = {0: "path", 1: "merged", 3: "path", 5: "merged"}.get(step)
        counted = copy.deepcopy(opts[0]._tally.counters)
        opts[0].zero_grad()
        for k, view in enumerate(views):
            with opts[0].path():
                loss = loss_of(models[0], views[0] if overflow == "path" else view, labels)
                scaler.scale(-loss if overflow == "path" and k else loss).backward()
                if overflow == "path" and not k:
                    models[0][4].bias.grad *= float("inf")
        opts[0].align()
        if overflow == "path":
            assert_only_skipped_moved(opts[0], counted)
        elif overflow == "merged":
            models[0][0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(opts[0])
        nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
        before = [p.detach().clone() for p in models[0].parameters()]
        scaler.step(opts[0])
        scaler.update()
        if overflow:
            assert_same(list(models[0].parameters()), before)
        if overflow == "path":
            continue
        opts[1].zero_grad()
        opts[1].backward([loss_of(models[1], view, labels) for view in views])
        opts[1].align()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
        if not overflow:
            opts[1].step()
    assert_same(list(models[0].parameters()), list(models[1].parameters()), rtol=1e-4, atol=1e-5)
    assert (opts[0].stats.steps, opts[0].stats.skipped) == (5, 2)
    assert scaler.get_scale() == 2.0**6
    torch.testing.assert_close(opts[0]._tally.counters["rho"], opts[1]._tally.counters["rho"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_without_unscale_or_align(fused):
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = make_model()
    train(plain, AlignedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1)), 1, "backward")
    views, labels = make_batch()
    opt.backward([scaler.scale(loss_of(model, view, labels)) for view in views])
    with pytest.raises(RuntimeError, match=r"call align\(\) before scaler.step\(optimizer\)"):
        scaler.step(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.zero_grad()
    opt.backward([scaler.scale(loss_of(model, view, labels)) for view in views])
    opt.align()
    scaler.step(opt)
    scaler.update()
    assert_same(list(model.parameters()), list(plain.parameters()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_that_unscales_before_align(fused):
    """Another optimizer's gradients, which it has seen, do not hide that ours it has not."""
    model, other = make_model(), make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    beside = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    views, labels = make_batch()
    before = [p.detach().clone() for p in model.parameters()]
    for view in views:
        with opt.path():
            scaler.scale(loss_of(model, view, labels)).backward()
    scaler.scale(loss_of(other, views[0], labels)).backward()
    scaler.unscale_(opt)
    scaler.unscale_(beside)
    scaler.step(beside)
    opt.align()
    with pytest.raises((RuntimeError, AssertionError), match=r"align\(\) before scaler.unscale_|No inf checks"):
        scaler.step(opt)
    assert_same(list(model.parameters()), before)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"capturable": False}])
def test_inner_optimizer_variants(options):
    reference = make_model()
    expected = train(reference, AlignedOptimizer(torch.optim.AdamW(reference.parameters(), lr=0.01)))
    model = make_model()
    found = train(model, AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, **options)))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["path", "backward"])
def test_bfloat16_autocast(mode):
    """Parameters and gradients stay float32; the merge is that of the gradients autocast gives."""
    models = [make_model(), make_model()]
    opt = AlignedOptimizer(torch.optim.SGD(models[0].parameters(), lr=0.1))
    views, labels = make_batch()

    def losses(model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = [model(view) for view in views]
        assert logits[0].dtype == torch.bfloat16
        return [nn.functional.cross_entropy(part.float(), labels) for part in logits]

    if mode == "backward":
        opt.backward(losses(models[0]))
    else:
        for k in range(2):
            with opt.path():
                losses(models[0])[k].backward()
    opt.align()
    params = list(models[1].parameters())
    paths = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses(models[1])]
    rows = torch.stack(paths).double()
    expected = alignment.weights(rows @ rows.T, "pcgrad") @ rows
    found = torch.cat([p.grad.flatten() for p in models[0].parameters()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["path", "backward"])
def test_compiled_model(mode):
    """Through the compiler's front end and its ahead-of-time differentiation, without its slow code generation."""
    from torch._dynamo.backends.debugging import aot_eager

    plain, compiled = make_model(), make_model()
    expected = train(plain, AlignedOptimizer(torch.optim.AdamW(plain.parameters(), lr=0.05)), 3, mode)
    opt = AlignedOptimizer(torch.optim.AdamW(compiled.parameters(), lr=0.05))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    train(torch.compile(compiled, backend=backend, fullgraph=True), opt, 3, mode)
    assert len(graphs) == 1
    assert_same(list(compiled.parameters()), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["path", "backward"])
def test_compiled_training_step(mode):
    """The graph breaks where the optimizer is called; what is compiled is the model."""

    def run(compiler):
        model = make_model()
        opt = AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), "gradvac")

        def step(views, labels):
            opt.zero_grad()
            collect(model, opt, views, labels, mode)
            opt.align()
            opt.step()

        step = compiler(step)
        for k in range(3):
            step(*make_batch(k))
        assert opt.stats.steps == 3
        return list(model.parameters())

    assert_same(run(lambda f: torch.compile(f, backend="eager")), run(lambda f: f), rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad"])
@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_whole_step_without_syncs_and_in_a_cuda_graph(method, scope):
    """Forward, both paths, alignment and the fused optimizer: no wait for the device, and the same when captured."""

    def build():
        model = make_model().cuda()
        inner = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True, capturable=True)
        return model, AlignedOptimizer(inner, method, scope=scope)

    batches = [make_batch(step) for step in range(8)]
    batches = [([view.cuda() for view in views], labels.cuda()) for views, labels in batches]
    views, labels = [view.clone() for view in batches[0][0]], batches[0][1].clone()

    def step(model, opt):
        opt.zero_grad()
        for view in views:
            with opt.path():
                loss_of(model, view, labels).backward()
        opt.step()

    def run(model, opt, do):
        for batch in batches[3:]:
            for view, new in zip(views, batch[0], strict=True):
                view.copy_(new)
            labels.copy_(batch[1])
            do(model, opt)
        return [p.detach().clone() for p in model.parameters()], opt.stats

    def warm_up(model, opt):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(model, opt)
        torch.cuda.current_stream().wait_stream(side)

    eager, captured = build(), build()
    warm_up(*eager)
    torch.cuda.synchronize()

    def without_syncs(model, opt):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, opt)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    expected, stats = run(*eager, without_syncs)
    for view, first in zip(views, batches[0][0], strict=True):
        view.copy_(first)
    labels.copy_(batches[0][1])
    warm_up(*captured)
    graph = torch.cuda.CUDAGraph()
    captured[1].zero_grad()
    with torch.cuda.graph(graph):
        step(*captured)
    found, counted = run(*captured, lambda model, opt: graph.replay())
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
    assert (counted.steps, counted.conflicts) == (stats.steps, stats.conflicts)
    # A step whose gradients are not finite is skipped on the device, in the graph too.
    views[1][0, 0] = float("nan")
    graph.replay()
    assert_same(list(captured[0].parameters()), found)
    assert captured[1].stats.skipped == 1


def test_zero_grad_between_paths_is_noticed():
    """Else each view would throw away the one before, and the last alone be trained on."""
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    views, labels = make_batch(0)
    opt.zero_grad()
    with opt.path():
        loss_of(model, views[0], labels).backward()
    with pytest.warns(UserWarning, match=r"dropped the gradients of 1 finished path\(s\).*once per step") as caught:
        opt.zero_grad()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 2)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_none_for_the_paths_to_fill(set_to_none):
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    views, labels = make_batch(0)
    for _ in range(2):
        for view in views:
            with opt.path():
                loss_of(model, view, labels).backward()
        opt.step()
        opt.zero_grad(set_to_none)
        assert all(param.grad is None for param in model.parameters())
    assert opt.stats.steps == 2


def test_complex_gradients_are_named():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    opt = AlignedOptimizer(torch.optim.SGD([param], lr=0.1))
    with pytest.raises(TypeError, match="must be real floating-point numbers; found complex64 in"), opt.path():
        (param * param.conj()).real.sum().backward()


@pytest.mark.parametrize("exclude", [torch.nn.Parameter(torch.zeros(2)), torch.nn.BatchNorm1d(2)])
def test_exclude_takes_parameters_in_a_list(exclude):
    with pytest.raises(TypeError, match=f"such as .*; found {type(exclude).__name__}"):
        AlignedOptimizer(torch.optim.SGD(make_model().parameters(), lr=0.1), exclude=exclude)


def test_the_state_of_another_method_is_named():
    states = {}
    for method in ("gradvac", "pcgrad"):
        model = make_model()
        opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method)
        train(model, opt, 1)
        states[method] = opt.state_dict()
    with pytest.raises(ValueError, match="the state must be of method 'pcgrad'; found 'gradvac'"):
        opt.load_state_dict(states["gradvac"])


@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_a_method_may_overwrite_its_matrix(scope):
    found = []
    for method in ("mean", lambda gram: gram.fill_(0.5)[0]):
        model = make_model()
        opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, scope)
        train(model, opt, 2)
        found.append((opt.stats.cosine, opt.stats.parameter_cosine, opt.stats.conflicts))
    assert_same(found[0][:2], found[1][:2])
    assert found[0][2] == found[1][2]


def test_callable_method_and_options():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method=lambda gram: 1 / gram.diagonal())
    train(model, opt, 2)
    assert opt.stats.steps == 2
    for method, options in (
        ("gradvac", {"variant": "paper", "beta": 0.1, "seed": 3}),
        ("cagrad", {"c": 0.2}),
        ("pcgrad", {"seed": 1}),
    ):
        train(model, AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, **options), 2, "path", 3)


def test_seed_decides_the_order_of_three_paths():
    found = []
    for seed in ({}, {"seed": 0}, {"seed": 1}):
        model = make_model()
        opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), "pcgrad", scope="parameter", **seed)
        found.append(torch.cat([p.flatten() for p in train(model, opt, 6, "path", 3)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- misuse ----


@pytest.fixture
def setup():
    model = make_model()
    opt = AlignedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    views, labels = make_batch()
    return model, opt, lambda k=0: loss_of(model, views[k], labels)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "pc"}, ValueError, r"one of mean, .*found 'pc'"),
        ({"scope": "layer"}, ValueError, "'model', 'parameter' or groups of parameters; found 'layer'"),
        ({"scope": {}}, ValueError, "found no group"),
        ({"scope": {"a": []}}, ValueError, "group 'a' holds none"),
        ({"scope": {"a": ["weight"]}}, ValueError, "group 'a' holds str"),
        ({"scope": {"a": nn.Linear(2, 2)}}, TypeError, "group 'a' is a Linear"),
        ({"scope": [[nn.Parameter(torch.ones(1))]]}, ValueError, "parameters of the optimizer; found 1 of others"),
        ({"on_nonfinite": "ignore"}, ValueError, "'skip' or 'raise'; found 'ignore'"),
        ({"method": "cagrad", "alpha": 1}, TypeError, "the options c; found alpha"),
        ({"method": "mean", "seed": 1}, TypeError, "found seed"),
        ({"method": "gradvac", "variant": "v2"}, ValueError, "found 'v2'"),
        ({"method": "gradvac", "rho": 1}, TypeError, "found rho"),
        ({"exclude": ["0.weight"]}, TypeError, "`exclude` must hold parameters; found str"),
        ({"exclude": None}, TypeError, "`exclude` must hold parameters; found None"),
        ({"scope": 5}, TypeError, "`scope` must hold parameters; found 5"),
        ({"method": "pcgrad", "seed": 1.5}, ValueError, "`seed` must be an integer of 64 bits; found 1.5"),
        ({"method": "pcgrad", "seed": 2**63}, ValueError, "`seed` must be an integer of 64 bits; found 9223"),
        ({"method": "cagrad", "c": float("inf")}, ValueError, r"`c` must be in \[0, 1e100\]; found inf"),
        (
            {"exclude": [nn.Parameter(torch.ones(1))]},
            ValueError,
            "hold, parameters of the optimizer; found 1 of others",
        ),
    ],
)
def test_construction_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        AlignedOptimizer(torch.optim.SGD(make_model().parameters(), lr=0.1), **arguments)


def test_what_can_be_wrapped(setup):
    model, opt, _ = setup
    with pytest.raises(TypeError, match="found one already wrapped"):
        AlignedOptimizer(opt)
    with pytest.raises(TypeError, match="found list"):
        AlignedOptimizer(list(model.parameters()))
    with pytest.raises(TypeError, match="found LBFGS"):
        AlignedOptimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="no parameter of a group; found some of front"):
        AlignedOptimizer(opt.optimizer, scope={"front": [model[0].weight]}, exclude=[model[0].weight])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        doubled = torch.optim.SGD([model[0].weight, model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="must be distinct; found one twice"):
        AlignedOptimizer(doubled)
    twice = [model[0].weight]
    with pytest.raises(ValueError, match="distinct parameters; found a parameter twice"):
        AlignedOptimizer(opt.optimizer, scope=[twice, twice])


def test_an_optimizer_can_be_wrapped_again():
    """For another method later on; each wrapper counts its own steps, and the state goes on."""
    found = []
    for again in (False, True):
        model = make_model()
        opt = AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05))
        train(model, opt, 2)
        if again:
            opt = AlignedOptimizer(opt.optimizer)
        opt.zero_grad()
        found.append(train(model, opt, 2))
        assert opt.stats.steps == (2 if again else 4)
    assert_same(*found)


def test_a_missing_path_is_an_error(setup):
    model, opt, loss = setup
    train(model, opt, 1)
    opt.zero_grad()
    with opt.path():
        loss().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="takes 2 paths, as the steps before; found 1"):
        opt.step()
    assert_same(list(model.parameters()), before)
    # The path that is there is kept for it.
    with opt.path():
        loss(1).backward()
    opt.step()
    assert opt.stats.steps == 2


def test_path_errors(setup):
    model, opt, loss = setup
    with pytest.raises(RuntimeError, match=r"path 0 must give a gradient .* found none"), opt.path():
        pass
    with opt.path():
        loss().backward()
    # Nor does a further block that adds nothing to a path; as after any error in it, the step starts anew.
    with pytest.raises(RuntimeError, match=r"path 0 must give a gradient .* found none"), opt.path(0):
        pass
    opt.backward([loss()])
    with pytest.raises(RuntimeError, match=r"losses\[0\] must give a gradient .* found none"):
        opt.backward([torch.zeros((), requires_grad=True) * 1])
    with pytest.raises(RuntimeError, match=r"path\(\) cannot be called inside path\(\)"), opt.path(), opt.path():
        pass
    with pytest.raises(RuntimeError, match=r"backward\(losses\) cannot be called inside path\(\)"), opt.path():
        opt.backward([loss()])
    with pytest.raises(RuntimeError, match="found an open path 0"), opt.path():
        opt.step()
    with pytest.raises(RuntimeError, match="before the first path"), opt.path():
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    loss().backward()
    with (
        pytest.raises(RuntimeError, match=r"zero_grad\(\) must first clear .* found \.grad of parameter 0"),
        opt.path(),
    ):
        pass
    opt.zero_grad()
    with opt.path():
        loss().backward()
    loss(1).backward()
    with pytest.raises(RuntimeError, match=r"align\(\): zero_grad\(\) must first clear"):
        opt.step()
    opt.zero_grad()
    train(model, opt, 1)


def test_a_wrapper_that_imitates_the_class_is_refused(setup):
    """As Lightning's, which keeps its own attributes."""
    _, opt, loss = setup

    class Wrapper:
        def __init__(self, wrapped):
            self._wrapped = wrapped
            self.__class__ = type("WrappedAlignedOptimizer", (Wrapper, AlignedOptimizer), {})

        optimizer = property(lambda self: self._wrapped)

        def __getattr__(self, name):
            return getattr(self._wrapped, name)

    wrapper = Wrapper(opt)
    wrapper.zero_grad()
    with (
        pytest.raises(RuntimeError, match=r"the AlignedOptimizer itself; found WrappedAlignedOptimizer"),
        wrapper.path(),
    ):
        loss().backward()
    with pytest.raises(RuntimeError, match=r"Lightning: self\.optimizers\(\)\.optimizer"):
        wrapper.backward([loss(), loss(1)])
    with wrapper.optimizer.path():
        loss().backward()


def test_a_path_that_raises_can_be_tried_again(setup):
    model, opt, loss = setup
    with opt.path():
        loss().backward()
    failing = loss(1) * 1
    failing.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError), opt.path():
        (loss(1) + failing).backward()
    assert all(p.grad is None for p in model.parameters())
    with opt.path():
        loss(1).backward()
    opt.step()
    other = make_model()
    train(other, AlignedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1)), 1)
    assert_same(list(model.parameters()), list(other.parameters()))


def test_a_path_that_raises_while_it_accumulates_drops_the_step(setup):
    model, opt, loss = setup
    with pytest.raises(ValueError, match=r"`index` must be in \[0, 0\], or None for a new path; found 1"), opt.path(1):
        pass
    for k in range(2):
        with opt.path(k):
            loss(k).backward()
    failing = loss() * 1
    failing.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError), opt.path(0):
        (loss() + failing).backward()
    assert all(p.grad is None for p in model.parameters())
    train(model, opt, 1)
    other = make_model()
    train(other, AlignedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1)), 1)
    assert_same(list(model.parameters()), list(other.parameters()))


def test_backward_errors(setup):
    model, opt, loss = setup
    with pytest.raises(TypeError, match=r"sequence of scalar tensors.*found Tensor"):
        opt.backward(loss())
    with pytest.raises(TypeError, match="sequence of scalar tensors, one per path; found NoneType"):
        opt.backward(None)
    with pytest.raises(TypeError, match=r"losses\[1\] must be a scalar tensor; found float"):
        opt.backward([loss(), 1.0])
    with pytest.raises(ValueError, match="one loss per path; found none"):
        opt.backward([])
    with pytest.raises(ValueError, match=r"losses\[1\] must be a scalar; found shape \[10, 2\]"):
        opt.backward([loss(), model(make_batch()[0][0])])
    with pytest.raises(ValueError, match=r"losses\[1\] must require a gradient"):
        opt.backward([loss(), loss().detach()])
    opt.backward([loss(), loss(1)])
    with pytest.raises(ValueError, match="must hold 2 losses, one per path as before; found 1"):
        opt.backward([loss()])
    with pytest.raises(RuntimeError, match=r"found a path\(\) after backward"), opt.path():
        pass
    opt.step()
    opt.zero_grad()
    with pytest.raises(ValueError, match="must hold 2 losses, one per path as before; found 3"):
        opt.backward([loss(), loss(1), loss()])
    with opt.path():
        loss().backward()
    with pytest.raises(RuntimeError, match=r"found backward\(losses\) after a path"):
        opt.backward([loss(), loss()])


def test_parameters_added_between_paths(setup):
    _, opt, loss = setup
    with opt.path():
        loss().backward()
    extra = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="found 1 paths"):
        opt.add_param_group({"params": [extra]})
    opt.optimizer.add_param_group({"params": [extra]})
    for index in (None, 0):
        with pytest.raises(RuntimeError, match="share their parameters, 6 so far; found 7"), opt.path(index):
            loss(1).backward()
    with pytest.raises(RuntimeError, match="share their parameters, 6 so far; found 7"):
        opt.step()
    with pytest.warns(UserWarning, match="dropped the gradients"):
        opt.zero_grad()
    opt.backward([loss(), loss(1)])
    opt.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="share their parameters, 7 so far; found 8"):
        opt.backward([loss(), loss(1)])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    opt = AlignedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1))
    with (
        pytest.raises(TypeError, match=r"dense; found sparse_coo in parameter 0 of group 0, shape \[5, 3\]"),
        opt.path(),
    ):
        table(torch.tensor([1])).sum().backward()


def test_gradients_on_several_devices_are_refused():
    params = [nn.Parameter(torch.zeros(2, device=device)) for device in ("meta", "cpu")]
    opt = AlignedOptimizer(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="all gradients must be on one device; found cpu, meta"), opt.path():
        torch.autograd.backward([param.sum() for param in params])


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad", "nashmtl"])
@pytest.mark.parametrize("num_paths", [2, 3])
def test_parameters_on_their_own_are_aligned_in_one_pass(method, num_paths, monkeypatch):
    """The op `align_` where each parameter has every path's gradient, with what the three ops in turn give."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (7,), (300,)]
    steps = [[[torch.randn(s, generator=generator) for s in shapes] for _ in range(num_paths)] for _ in range(3)]

    def run():
        params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        optimizer = AlignedOptimizer(torch.optim.SGD(params, lr=1.0), method=method, scope="parameter")
        for paths in steps:
            optimizer.zero_grad()
            for grads in paths:
                with optimizer.path():
                    sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
            optimizer.step()
        return params, optimizer.stats

    with monkeypatch.context() as patch:
        patch.setattr(ops, "gram", None)
        patch.setattr(ops, "combine_", None)
        found, stats = run()

    def in_turn(first, others, method, rho, order, *options):
        count = len(first)
        gram = ops.gram([*first, *others], num_paths, list(range(count)), count)
        weights, rho = ops.weigh(gram, method, rho, order, *options)
        ops.combine_(first, others, weights, list(range(count)))
        return gram, rho

    monkeypatch.setattr(ops, "align_", in_turn)
    expected, expected_stats = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(stats.parameter_cosine, expected_stats.parameter_cosine)
    assert stats.steps == 3
