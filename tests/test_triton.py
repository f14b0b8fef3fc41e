"""The Triton kernels against the float64 reference: through Triton's interpreter here, on the GPU where there is one.

The interpreter has to be chosen before Triton is imported: without a GPU the kernels' tests are skipped here, and
`test_kernels_in_the_interpreter` runs them all in a process of its own.
"""

import functools
import inspect
import os
import subprocess
import sys

import inputs
import numpy as np
import pytest
import torch
from tolerances import DRAWN, RELATIVE, WEIGHED, max_norm_error

import gradalign as ga
from gradalign import ops, reference
from gradalign._dispatch import ops as declared

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKWARD = ("lnl_backward", "isd_backward", "ssi_backward")
OPS = (*BACKWARD, "notch_bank", "notch_filters", "lnl", "isd", "ssi", "rawboost", "gram", "weigh", "combine_", "align_")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The interpreter takes about a millisecond per tap and tile.
SMALL_SAMPLES = {torch.float16: (128,), torch.bfloat16: (2,), torch.float32: (1, 700), torch.float64: (127,)}

kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA GPU, or TRITON_INTERPRET=1 in the environment before Python starts",
)
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")


@pytest.fixture(autouse=INTERPRETED)
def rounding(monkeypatch):
    """Triton 3.6's interpreter cuts float32 off to bfloat16; rounded to the nearest, as on a GPU."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if target != interpreter.tl.bfloat16:
            return convert(values, source, target, mode)
        return torch.from_numpy(np.array(values, np.float32)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


# Two parts, which take about as long as each other.
_LONG = "rawboost or notch or weigh or align or gram or combine_"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("chosen", [_LONG, f"not ({_LONG})"], ids=["long", "others"])
def test_kernels_in_the_interpreter(chosen):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_launchers_have_the_signature_of_the_reference():
    for op in OPS:
        backend = declared()[op].backends["triton"]
        found, expected = (list(inspect.signature(f).parameters) for f in (backend.run, getattr(reference, op)))
        assert found == expected


def test_kernels_and_launchers_are_named_after_their_op():
    from triton.runtime.jit import KernelInterface

    from gradalign.kernels import gradients, rawboost, rawboost_backward, weigh

    for module in (gradients, rawboost, rawboost_backward, weigh):
        defined = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        public = [n for n, v in defined.items() if isinstance(v, KernelInterface) and not n.startswith("_")]
        for name in public:
            owner = next((op for op in OPS if name.startswith(f"{op.rstrip('_')}_")), None)
            assert owner, f"{name} is no kernel of an op"
            assert name.endswith("_kernel")
            assert callable(defined[owner])


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_the_backend_says_so():
    with ga.use_backends("triton"), pytest.raises(RuntimeError, match="no CUDA device is visible"):
        ga.RawBoost(1)(torch.zeros(1, 100), seeds=torch.tensor([1]))


def _tolerance(op, args, dtype):
    if op == "weigh":
        return WEIGHED
    if op == "align_":
        # Weights are as exact as the Gram matrix, which is of float32 sums.
        return RELATIVE[torch.float32 if dtype == torch.float64 else dtype]
    drawn = inputs.draws(op, args)
    if op == "gram":
        # float64 results of float32 sums.
        return RELATIVE[torch.float64 if dtype == torch.float64 else torch.float32]
    return (DRAWN if drawn else RELATIVE)[dtype]


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_equals_float64_reference(op, dtype, monkeypatch):
    if DEVICE == "cpu" and (dtype != torch.float32 or op == "rawboost"):
        monkeypatch.setattr(inputs, "bank", lambda dtype, device="cpu": _short_bank(3, dtype))
    samples = inputs.SAMPLES if DEVICE == "cuda" else SMALL_SAMPLES[dtype]
    for name, args in inputs.CASES[op](dtype, device=DEVICE, samples=samples):
        found = inputs.run(op, "triton", args)
        expected = inputs.run(op, "reference", inputs.widen(args))
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert f.shape == e.shape, name
            assert f.device.type == DEVICE, name
            assert max_norm_error(f, e) <= _tolerance(op, args, dtype), f"{name}, result {i}"


@kernels
@pytest.mark.parametrize("num_taps", [1, 2, 8, 9])
def test_lopsided_filters_of_any_length(num_taps):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(inputs.BATCH, 2, num_taps, generator=generator).to(DEVICE)
    # The last reaches farther than the other.
    bank[:, 0, [0, -1]] = 0
    x = inputs.wave(300, torch.float32, DEVICE)
    grad, level = x.flip(0, 1), torch.zeros(inputs.BATCH, dtype=torch.float64, device=DEVICE)
    for op, args in (
        ("lnl", (x, bank, None)),
        ("lnl_backward", (grad, x, bank, None)),
        ("ssi", (x, bank[:, 1], None, None, grad, level, 0.0, 0.0)),
        ("ssi_backward", (grad, x, bank[:, 1], None, None, grad, level, 0.0, 0.0)),
    ):
        found = inputs.run(op, "triton", args)[0]
        expected = inputs.run(op, "reference", inputs.widen(args))[0]
        assert max_norm_error(found, expected) <= RELATIVE[torch.float32], op


def _short_bank(num_filters, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    notches = reference.notch_draws(
        inputs.seeds(), list(range(num_filters)), [0.0] * num_filters, [0.0] * num_filters,
        2, 20.0, 8000.0, 100.0, 1000.0, 5.0, 16.0,
    )  # fmt: skip
    return reference.notch_bank(*notches, 16000.0, 33, wide).to(DEVICE)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_utterances_of_several_tiles(dtype, monkeypatch):
    # Inner tiles, the edge tiles around them, and tiles beyond an utterance's own length; more tiles and blocks than
    # are added at a time.
    for module in ("rawboost", "rawboost_backward"):
        monkeypatch.setattr(f"gradalign.kernels.{module}.TILE_BLOCK", 1)
    seeds, bank = inputs.seeds(DEVICE), _short_bank(3, dtype)
    # In float64 the third tile's filters reach one sample beyond the row.
    bank[..., [0, -1]] = 0.1
    num_samples = 5000 if dtype == torch.float32 else 3 * 1024 + bank.shape[-1] // 2
    x, lengths = inputs.wave(num_samples, dtype, DEVICE), inputs.lengths(num_samples, DEVICE)
    grad = x.flip(0, 1)
    for own in (None, lengths):
        for op, args in (
            ("lnl", (x, bank, own)),
            ("isd", (x, own, seeds, None, 30.0, 2.0)),
            ("ssi", (x, bank[:, 0], own, seeds, None, None, 10.0, 20.0)),
            ("lnl_backward", (grad, x, bank, own)),
            ("isd_backward", (grad, x, own, seeds, None, 30.0, 2.0)),
            ("ssi_backward", (grad, x, bank[:, 0], own, seeds, None, None, 10.0, 20.0)),
        ):
            found = inputs.run(op, "triton", args)[0]
            expected = inputs.run(op, "reference", inputs.widen(args))[0]
            assert max_norm_error(found, expected) <= _tolerance(op, args, dtype), op
            if own is not None:
                assert not bool(found[1, num_samples // 2 :].any()), op
                assert not bool(found[2].any()), op


@kernels
@pytest.mark.parametrize("algo", range(9))
def test_same_seeds_same_augmentation_and_gradient(algo):
    # A small filter keeps the interpreter quick; the draws are the same for every size.
    boost = ga.RawBoost(algo, n_f=3, n_bands=2, min_coeff=5, max_coeff=16, p=30)
    x, seeds = inputs.wave(600, torch.float32), inputs.seeds()
    for lengths in (None, inputs.lengths(600)):
        found = inputs.augmented(boost, x, seeds, lengths, "triton", DEVICE)
        for backend in ("reference", "cpp"):
            if ops.lnl.why_not(backend):
                continue
            for f, e in zip(found, inputs.augmented(boost, x, seeds, lengths, backend), strict=True):
                assert max_norm_error(f, e) <= DRAWN[torch.float32], backend


@kernels
def test_a_nan_leaves_an_utterance_without_a_peak():
    """A GPU's maximum leaves NaN out, the interpreter's does not."""
    x = torch.tensor([[4.0, 2.0, float("nan"), 1.0] + [0.5] * 300], device=DEVICE)
    with ga.use_backends("triton"):
        found = ga.RawBoost(2, p=0)(x, seeds=torch.tensor([1], device=DEVICE))
    assert torch.equal(found.nan_to_num(-1), x.nan_to_num(-1))


@kernels
@pytest.mark.parametrize("algo", range(1, 9))
def test_nonfinite_samples_stay_in_their_utterance(algo):
    # A gradient is computed in three parts: the last two are an utterance that is whole and one that is not.
    x, filters = inputs.wave(300, torch.float32)[torch.arange(5) % 3], torch.linspace(-1, 1, 5 * 3 * 9).reshape(5, 3, 9)
    x, filters, level = x.to(DEVICE), filters.to(DEVICE), torch.zeros(5, dtype=torch.float64, device=DEVICE)
    # Drawing in the interpreter would take most of the time.
    drawn, broken = (x.flip(0), x.flip(1), level), x.clone()
    broken[2, 100], broken[3, 100] = float("nan"), float("inf")
    results = []
    for wave in (x, broken):
        wave.requires_grad_()
        with ga.use_backends("triton"):
            y = ops.rawboost(wave, filters, None, None, *drawn, algo, 0.0, 2.0, 0.0, 0.0)
            y.square().sum().backward()
        results.append((y.detach(), wave.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[[0, 1, 4]], dirty[[0, 1, 4]])
        assert not bool(torch.isfinite(dirty[2:4]).all(1).any())


@kernels
def test_results_are_written_whole(monkeypatch):
    # Memory that a kernel forgets to write shows up as NaN.
    empty = torch.empty

    def poisoned(*args, **options):
        out = empty(*args, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    x, lengths, bank = inputs.wave(300, torch.bfloat16, DEVICE), inputs.lengths(300, DEVICE), _short_bank(2)
    for op, args in (
        ("lnl", (x, bank, lengths)),
        ("isd", (x, lengths, inputs.seeds(DEVICE), None, 30.0, 2.0)),
        ("ssi", (x, bank[:, 0], lengths, inputs.seeds(DEVICE), None, None, 10.0, 20.0)),
        ("lnl_backward", (x, x, bank, lengths)),
        ("isd_backward", (x, x, lengths, inputs.seeds(DEVICE), None, 30.0, 2.0)),
        ("ssi_backward", (x, x, bank[:, 0], lengths, inputs.seeds(DEVICE), None, None, 10.0, 20.0)),
        ("gram", (inputs.gradients(3, torch.float32, DEVICE), 3, list(inputs.SEGMENTS), 4)),
    ):
        (found,) = inputs.run(op, "triton", args)
        assert bool(torch.isfinite(found).all()), op


@kernels
def test_gram_of_many_chunks_mixed_dtypes_and_layouts():
    from gradalign.kernels.gradients import CHUNK

    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * CHUNK + 5,), (3, 7), (CHUNK,), (40, 30), (0,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    paths = []
    for path in range(2):
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
            # Layouts that differ between the paths, and one with gaps.
            paths.append(g.t().contiguous().t() if i == 3 and path else g.repeat(2, 1)[::2] if i == 1 else g)
    segments = [1, 0, 0, 1, 2]
    found = inputs.run("gram", "triton", (paths, 2, segments, 4))[0]
    expected = inputs.run("gram", "reference", (inputs.widen(paths), 2, segments, 4))[0]
    assert max_norm_error(found, expected) <= RELATIVE[torch.float32]
    assert torch.equal(found, found.mT)
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64, device=DEVICE).reshape(4, 2)
    merged = [paths[0].clone(), paths[1].repeat(2, 1)[::2], *(g.clone() for g in paths[2:5])]
    wanted = inputs.widen(merged)
    reference.combine_(wanted, inputs.widen(paths[5:]), weights, segments)
    with ga.use_backends("triton"):
        ops.combine_(merged, paths[5:], weights, segments)
    for f, e in zip(merged, wanted, strict=True):
        assert max_norm_error(f, e) <= RELATIVE[f.dtype]


@kernels
def test_gram_sign_at_tiny_cosine():
    sizes = (2_000_000, 300_000_000) if DEVICE == "cuda" else (100_000, 400_000)
    for grads, wanted, norms in inputs.nearly_orthogonal(*sizes, DEVICE):
        with ga.use_backends("triton"):
            found = float(ops.gram(grads, 2, [0] * (len(grads) // 2), 1)[0, 0, 1])
        assert (found > 0) == (wanted > 0)
        assert found == pytest.approx(wanted, abs=1e-8 * norms)


@kernels
def test_sums_beyond_a_threads_are_float64():
    # Four squares are exact in float32, sums of more are not.
    a = torch.full((1000,), 2047.0, device=DEVICE)
    a[0] = 1
    with ga.use_backends("triton"):
        gram, (aligned, _) = ops.gram([a], 1, [0], 1), ops.align_([a.clone()], [a], "mean", None, None, 0.5, False, 0.5)
    assert {*gram.flatten().tolist(), *aligned.flatten().tolist()} == {float(a.double() @ a.double())}


@kernels
def test_tables_follow_the_tensors():
    # The same addresses are sent once; other tensors, or the same memory cut otherwise, get their own table.
    a = torch.arange(12.0, device=DEVICE)
    with ga.use_backends("triton"):
        first = ops.gram([a[:6], a[6:]], 2, [0], 1)
        assert torch.equal(ops.gram([a[:6], a[6:]], 2, [0], 1), first)
        shorter = ops.gram([a[:5], a[6:11]], 2, [0], 1)
        moved = ops.gram([a[6:], a[:6]], 2, [0], 1)
        two = ops.gram([a[:3], a[3:6], a[6:9], a[9:]], 2, [0, 1], 2)
    assert float(first[0, 0, 1]) == float(a[:6] @ a[6:])
    assert float(shorter[0, 0, 1]) == float(a[:5] @ a[6:11])
    assert torch.equal(moved, first.flip(1, 2))
    assert torch.equal(two.sum(0), first[0])


@kernels
def test_tables_are_sent_once(monkeypatch):
    from gradalign.kernels import gradients

    sent, send = [], gradients._send
    monkeypatch.setattr(gradients, "_send", lambda *args: sent.append(args) or send(*args))
    monkeypatch.setattr(gradients, "_kept", type(gradients._kept)())
    weights, options = torch.ones(1, 2, dtype=torch.float64, device=DEVICE), ("mean", None, None, 0.5, False, 0.5)
    here, there = ([torch.ones(n, device=DEVICE) for n in (5, 7, 5, 7)] for _ in range(2))
    runs = {
        "gram": lambda g: ops.gram(g, 2, [0, 0], 1),
        "combine_": lambda g: ops.combine_(g[:2], g[2:], weights, [0, 0]),
        "align_": lambda g: ops.align_(g[:2], g[2:], *options),
    }
    found = {}
    with ga.use_backends("triton"):
        for name, run in runs.items():
            found[name] = []
            for tensors in (here, here, there, here, there):
                sent.clear()
                run(tensors)
                found[name].append(len(sent))
    # A plan of two tables, and the addresses; for other tensors those alone; for any once again nothing. combine_ uses
    # what gram has sent; align_, where each parameter is a segment, sends another plan, and a table of its own.
    assert found == {"gram": [3, 0, 1, 0, 0], "combine_": [0] * 5, "align_": [4, 0, 1, 0, 0]}


@kernels
def test_gradients_that_do_not_match_raise():
    a = torch.zeros(4, device=DEVICE)
    with ga.use_backends("triton"):
        with pytest.raises(ValueError, match=r"must share shape and dtype; found \[4\] torch.float32 and \[3\]"):
            ops.gram([a, a[:3]], 2, [0], 1)
        with pytest.raises(RuntimeError, match="takes up to 8 paths, found 9"):
            ops.gram([a] * 9, 9, [0], 1)


def _served(op):
    cases = inputs.CASES[op](torch.float32, device=DEVICE, samples=(4097,))
    return [(name, args) for name, args in cases if not declared()[op].why_not("triton", *args)]


def test_the_items_of_align_are_each_drawn_once_and_never_wait_for_later_ones():
    from gradalign.kernels.gradients import ALIGN_CHUNK, ALIGN_LAG, align_items

    sizes = [3, 0, 40 * ALIGN_CHUNK + 1, 5, ALIGN_CHUNK, 2**31 + 70_001, 1]
    dtypes = [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    rows, launches, num_slots = align_items(sizes, dtypes)
    assert [first for _, first, _ in launches] == [0, launches[0][2]]
    assert sum(count for *_, count in launches) == len(rows) == 2 * num_slots
    for dtype, first, count in launches:
        own = rows[first : first + count]
        for n, size in enumerate(sizes):
            products = [(at, row) for at, row in enumerate(own) if row[0] == n and not row[6]]
            merges = [(at, row) for at, row in enumerate(own) if row[0] == n and row[6]]
            if dtypes[n] != dtype:
                assert not products
                assert not merges
                continue
            # The same chunks, backwards, and every element in one of them.
            assert [row[:6] for _, row in merges] == [row[:6] for _, row in reversed(products)]
            assert sum(row[2] for _, row in products) == size
            assert all(row[1] == i * ALIGN_CHUNK and row[5] == len(products) for i, (_, row) in enumerate(products))
            assert all(row[3] == row[4] + i for i, (_, row) in enumerate(products))
            assert products[-1][0] < merges[0][0]
            # As far apart as there are other items left.
            assert merges[0][0] - products[-1][0] > min(ALIGN_LAG, len(own) - merges[-1][0] - 1) or n == 6
    assert sorted({row[3] for row in rows}) == list(range(num_slots))


@kernels
def test_align_of_many_chunks_mixed_dtypes_and_layouts(monkeypatch):
    # Small chunks: parameters of several of them, and merges between other parameters' products.
    from gradalign.kernels import gradients

    if DEVICE == "cpu":
        monkeypatch.setattr(gradients, "ALIGN_CHUNK", 2048)
        monkeypatch.setattr(gradients, "ALIGN_LAG", 2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * 8192 + 5,), (3, 7), (4096,), (40, 30), (0,), (2,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32, torch.float32]
    paths = []
    for path in range(2):
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
            # Layouts that differ between the paths, and one with gaps.
            paths.append(g.t().contiguous().t() if i == 3 and path else g.repeat(2, 1)[::2] if i == 1 else g)
    count = len(shapes)
    rho = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64).to(DEVICE)
    for method in ("pcgrad", "gradvac", "cagrad"):
        options = (method, rho if method == "gradvac" else None, None, 0.5, False, 0.5)
        merged = [g.clone() if i != 1 else g.repeat(2, 1)[::2] for i, g in enumerate(paths[:count])]
        wanted = [g.double().clone() for g in merged]
        gram, moved = reference.align_(wanted, inputs.widen(paths[count:]), *options)
        with ga.use_backends("triton"):
            found, targets = ops.align_(merged, paths[count:], *options)
        assert max_norm_error(found, gram) <= RELATIVE[torch.float32]
        assert max_norm_error(targets, moved) <= RELATIVE[torch.float32]
        for f, e in zip(merged, wanted, strict=True):
            assert max_norm_error(f, e) <= RELATIVE[torch.float32 if f.dtype == torch.float64 else f.dtype]


@kernels
def test_sums_of_more_chunks_than_are_added_at_a_time(monkeypatch):
    from gradalign.kernels import gradients

    monkeypatch.setattr(gradients, "CHUNK", 16)
    monkeypatch.setattr(gradients, "ALIGN_CHUNK", 16)
    first, second = torch.randn(2, 4200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = torch.stack([first, second]).double() @ torch.stack([first, second]).double().T
    with ga.use_backends("triton"):
        found = ops.gram([first, second], 2, [0], 1), ops.align_([first], [second], "mean", None, None, 0.5, False, 0.5)
    for gram in (found[0], found[1][0]):
        assert max_norm_error(gram[0], expected) <= RELATIVE[torch.float32]


@kernels
def test_the_plan_of_align_is_kept_while_the_sizes_are():
    from gradalign.kernels import gradients

    options = ("pcgrad", None, None, 0.5, False, 0.5)
    whole = torch.randn(2, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    kept = {key for key in gradients._kept if key[0] == "align"}
    # The same sizes at other addresses, then the same memory cut otherwise, in another dtype, and the first again.
    for cuts, shift, dtype in (
        ((5, 7), 0, torch.float32),
        ((5, 7), 12, torch.float32),
        ((7, 5), 0, torch.float32),
        ((5, 7), 0, torch.float64),
        ((5, 7), 0, torch.float32),
    ):
        paths = [list(row[shift : shift + 12].to(dtype, copy=True).split(cuts)) for row in whole]
        expected = [g.double().clone() for g in paths[0]]
        gram, _ = reference.align_(expected, [g.double() for g in paths[1]], *options)
        with ga.use_backends("triton"):
            found, _ = ops.align_(*paths, *options)
        assert max_norm_error(found, gram) <= RELATIVE[torch.float32]
        assert all(max_norm_error(f, e) <= RELATIVE[torch.float32] for f, e in zip(paths[0], expected, strict=True))
    made = {key for key in gradients._kept if key[0] == "align"} - kept
    assert len(made) == 3


def test_plans_of_more_than_2_to_the_31_elements():
    from gradalign.kernels.gradients import CHUNK, _make_plan

    size = 2**31 + 70_001
    plan = _make_plan((5, size), (torch.bfloat16,) * 2, (1, 0), 2, torch.device("cpu"))
    rows = plan.rows[plan.rows[:, 0] == 1]
    assert plan.num_chunks == len(plan.rows) == 1 + -(-size // CHUNK)
    assert torch.equal(rows[:, 1], torch.arange(len(rows)) * CHUNK)
    assert int(rows[:, 2].sum()) == size
    assert plan.bounds.tolist() == [0, len(rows), len(rows) + 1]


@kernels
@pytest.mark.parametrize("num_paths", [4, 7])
def test_weights_of_opposed_and_dependent_gradients(num_paths):
    """Of gradients that nearly cancel, all alike, two of them opposed, and of directions that cancel, the merges are
    compared: where gradients are dependent, other weights may merge them alike.
    """
    rows = torch.randn(4, num_paths, num_paths, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:3, :, -1] = 0
    rows[0] -= 0.99 * rows[0].mean(0)
    rows[1, :, :-1] += 20
    rows[2, 0] = -2 * rows[2, 1]
    rows[3] = torch.arange(1, num_paths + 1)[:, None] * (torch.eye(num_paths) - 1 / num_paths)
    gram = (rows @ rows.mT).to(DEVICE)
    for method in inputs.METHODS:
        args = (gram, method, None, None, 0.5, False, 0.5)
        (found, targets), (expected, moved) = (
            inputs.run("weigh", backend, args) for backend in ("triton", "reference")
        )
        assert max_norm_error(targets, moved) <= WEIGHED, method
        error = ((found - expected).cpu()[:, None] @ rows).square().sum((1, 2)).sqrt() / rows.norm(dim=-1).amax(-1)
        assert error.max() <= WEIGHED, method


@kernels
@pytest.mark.parametrize("targets", ["old", "none"])
def test_align_of_a_nonfinite_parameter_leaves_the_others_alone(targets):
    g = [torch.randn(50, device=DEVICE) for _ in range(4)]
    g[0][3] = float("nan")
    expected = [t.clone() for t in g]
    rho = torch.full((2, 2, 2), 0.3, dtype=torch.float64, device=DEVICE) if targets == "old" else None
    options = ("gradvac", rho, None, 0.5, True, 0.5)
    _, moved = reference.align_(expected[:2], expected[2:], *options)
    with ga.use_backends("triton"):
        gram, targets = ops.align_(g[:2], g[2:], *options)
    assert g[0].isnan().all()
    assert not bool(gram[0].isfinite().all())
    assert max_norm_error(g[1], expected[1]) <= RELATIVE[torch.float32]
    torch.testing.assert_close(targets, moved, rtol=1e-6, atol=1e-6)


@gpu
def test_same_bits_on_every_run():
    for op in OPS:
        for name, args in _served(op):
            first, second = inputs.run(op, "triton", args), inputs.run(op, "triton", args)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"{op}, {name}"


@gpu
def test_launchers_never_wait_for_the_device():
    for op in OPS:
        cases = list(_served(op))
        for _, args in cases:
            inputs.run(op, "triton", args)
        for name, args in cases:
            try:
                torch.cuda.set_sync_debug_mode("error")
                inputs.run(op, "triton", args)
            except RuntimeError as error:
                pytest.fail(f"{op}, {name}: {error}")
            finally:
                torch.cuda.set_sync_debug_mode("default")


@gpu
def test_cuda_graph_capture():
    boost, seeds = ga.RawBoost(4), inputs.seeds(DEVICE)
    x = inputs.wave(4097, torch.float32, DEVICE)
    grads = inputs.gradients(2, torch.float32, DEVICE)
    n = len(inputs.SHAPES)

    def step():
        y = boost(x, seeds=seeds)
        gram = ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
        ops.combine_(grads[:n], grads[n:], (gram / gram.abs().amax()).sum(1), list(inputs.SEGMENTS))
        return y, gram

    with ga.use_backends("triton"):
        before = [g.clone() for g in grads]
        expected = [v.clone() for v in step()]
        merged = [g.clone() for g in grads]
        for g, b in zip(grads, before, strict=True):
            g.copy_(b)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            for g, b in zip(grads, before, strict=True):
                g.copy_(b)
            graph.replay()
            assert all(torch.equal(f, e) for f, e in zip(captured, expected, strict=True))
            assert all(torch.equal(f, e) for f, e in zip(grads, merged, strict=True))
        # Outside the graph nothing of the graph's memory is used.
        for g, b in zip(grads, before, strict=True):
            g.copy_(b)
        assert all(torch.equal(f, e) for f, e in zip(step(), expected, strict=True))


@gpu
@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_align_of_more_items_than_run_at_once(method):
    """Programs wait for each other's sums: the same bits every time, and in a CUDA graph."""
    from gradalign.kernels.gradients import ALIGN_CHUNK

    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [ALIGN_CHUNK * (1 + n % 40) - n for n in range(300)]
    first, second = ([torch.randn(m, generator=generator, device=DEVICE) for m in sizes] for _ in range(2))
    options = (method, None, None, 0.5, False, 0.5)
    expected = [g.double() for g in first]
    reference.align_(expected, [g.double() for g in second], *options)
    merged = [g.clone() for g in first]

    def align():
        for g, start in zip(merged, first, strict=True):
            g.copy_(start)
        return ops.align_(merged, second, *options)[0]

    with ga.use_backends("triton"):
        gram = align()
        for found, wanted in zip(merged, expected, strict=True):
            assert max_norm_error(found, wanted) <= RELATIVE[torch.float32]
        bits = [g.clone() for g in merged]
        for _ in range(30):
            assert torch.equal(align(), gram)
            assert all(torch.equal(a, b) for a, b in zip(merged, bits, strict=True))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = align()
        for _ in range(3):
            graph.replay()
            assert torch.equal(captured, gram)
            assert all(torch.equal(a, b) for a, b in zip(merged, bits, strict=True))


@kernels
@pytest.mark.parametrize("num_taps", [9, 33])
def test_toeplitz_forms_of_the_filters(num_taps):
    import filter_forms

    x = inputs.wave(300, torch.float32, DEVICE)
    filters = torch.randn(len(x), 6, num_taps, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, :5]
    expected = filter_forms.exact(filter_forms.ALONE, x, filters)
    # The interpreter knows no bfloat16 parts.
    for form in (form for form in filter_forms.FORMS if form.precision in ("tf32x3", "split")):
        assert max_norm_error(filter_forms.toeplitz(x, filters, form), expected) < RELATIVE[torch.float32], form


@gpu
def test_side_stream():
    boost, seeds = ga.RawBoost(4), inputs.seeds(DEVICE)
    x, grads = inputs.wave(4097, torch.float32, DEVICE), inputs.gradients(2, torch.float32, DEVICE)
    with ga.use_backends("triton"):
        expected = boost(x, seeds=seeds), ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = boost(x, seeds=seeds), ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
        torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extra_memory_is_at_most_two_batches(dtype, monkeypatch):
    import measure

    if INTERPRETED:
        # What is allocated does not depend on what the kernels write.
        for module in ("rawboost", "rawboost_backward"):
            monkeypatch.setattr(f"gradalign.kernels.{module}.launch", lambda *args, **meta: None)
    batch, num_samples = 64, 64600
    seeds = torch.arange(batch, device=DEVICE)
    wave = torch.zeros(batch, num_samples, dtype=dtype, device=DEVICE)
    bank = torch.zeros(batch, 6, 491, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    # With the design of the filters.
    runs = {f"algorithm {algo}": functools.partial(ga.RawBoost(algo), wave, seeds=seeds) for algo in range(1, 9)}
    runs["lnl_backward"] = functools.partial(ops.lnl_backward, wave, wave, bank[:, :5].contiguous(), None)
    runs["isd_backward"] = functools.partial(ops.isd_backward, wave, wave, None, seeds, None, 10.0, 2.0)
    runs["ssi_backward"] = functools.partial(
        ops.ssi_backward, wave, wave, bank[:, 5].contiguous(), None, seeds, None, None, 10.0, 40.0
    )
    found = {}
    with ga.use_backends("triton"):
        for algo in range(1, 9):
            leaf = wave.clone().requires_grad_()
            y = ga.RawBoost(algo)(leaf, seeds=seeds)
            runs[f"gradient of algorithm {algo}"] = functools.partial(torch.autograd.grad, y, leaf, wave, True)
        for name, run in runs.items():
            found[name] = measure.peak_bytes(run, torch.device(DEVICE)) / wave.nbytes - 1
    assert max(found.values()) <= 2, found


@gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 30 * 2**30,
    reason="needs a CUDA GPU with 30 GiB",
)
def test_tensors_over_2_to_the_31_elements():
    size = 2**31 + 70_001
    a = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    a[-1] = 3
    with ga.use_backends("triton"):
        assert ops.gram([a, a], 2, [0], 1).flatten().tolist() == [size + 8.0] * 4
        ops.combine_([a], [a], torch.tensor([[2.0, -1.5]], dtype=torch.float64, device=DEVICE), [0])
        assert [float(a[0]), float(a[2**31 + 5]), float(a[-1])] == [0.5, 0.5, 1.5]
        gram, _ = ops.align_([a], [a * -2], "mean", None, None, 0.5, False, 0.5)
        assert float(gram[0, 0, 1]) == -2 * (0.25 * (size - 1) + 2.25)
        assert [float(a[0]), float(a[2**31 + 5]), float(a[-1])] == [-0.25, -0.25, -0.75]
        del a
        # 40000 utterances of 64600 samples: the last rows start beyond 2**31.
        x = torch.zeros(40_000, 64_600, dtype=torch.float16, device=DEVICE)
        tail = inputs.wave(64_600, torch.float16, DEVICE)
        x[-3:] = tail
        bank, seeds = inputs.bank(torch.float32, DEVICE), torch.zeros(40_000, dtype=torch.int64, device=DEVICE)
        seeds[-3:] = inputs.seeds(DEVICE)
        found = ops.isd(x, None, seeds, None, 10.0, 2.0)[-3:]
        assert torch.equal(found, ops.isd(tail, None, inputs.seeds(DEVICE), None, 10.0, 2.0))
        found = ops.lnl(x, bank[:1].expand(40_000, -1, -1), None)[-3:]
        assert torch.equal(found, ops.lnl(tail, bank[:1].expand(3, -1, -1), None))
