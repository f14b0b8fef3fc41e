"""The CUDA kernels: every op, dtype and awkward shape against the float64 reference; same bits on every run; on a GPU
also side streams, CUDA graphs, no wait for the device.

Without a GPU the same kernels run on the host (see cuda_on_host), where "on every run" means: in every order of blocks
and threads.
"""

import contextlib
import itertools

import cuda_on_host
import inputs
import pytest
import torch
from tolerances import DRAWN, RELATIVE, WEIGHED, max_norm_error

import gradalign as ga
from gradalign import ops, reference
from gradalign._dispatch import first_tensor

BACKWARD = ("lnl_backward", "isd_backward", "ssi_backward")
OPS = tuple(inputs.CASES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ON_HOST = bool(ops.lnl.why_not("cuda"))
DEVICE = "cpu" if ON_HOST else "cuda"
gpu = pytest.mark.skipif(ON_HOST, reason=f"needs a CUDA GPU: {ops.lnl.why_not('cuda')}")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not ON_HOST:
        yield
        return
    if cuda_on_host.why_not():
        pytest.skip(cuda_on_host.why_not())
    with cuda_on_host.as_backend():
        yield


def _same_bits(run, orders=cuda_on_host.ORDERS if ON_HOST else ("first", "second")):
    """The tensors that run() returns, after checking that it returns the same bits every time."""
    first = None
    for order in orders:
        with cuda_on_host.schedule(order) if ON_HOST else contextlib.nullcontext():
            found = run()
        first = found if first is None else first
        for i, (a, b) in enumerate(zip(first, found, strict=True)):
            assert torch.equal(*(v.reshape(-1).view(torch.uint8) for v in (a, b))), f"result {i}, order {order}"
    return first


def _tolerance(op, args, dtype):
    if op == "weigh":
        return WEIGHED
    if op == "align_":
        # Weights are as exact as the Gram matrix, which is of float32 sums.
        return RELATIVE[torch.float32 if dtype == torch.float64 else dtype]
    if op == "gram":
        # float64 results of float32 sums.
        return RELATIVE[torch.float64 if dtype == torch.float64 else torch.float32]
    return (DRAWN if inputs.draws(op, args) else RELATIVE)[dtype]


def _check(op, args, dtype, name):
    def run():
        return inputs.run(op, "cuda", args)

    # On a GPU, whether other runs return the same bits is a test of its own.
    found = _same_bits(run) if ON_HOST else run()
    expected = inputs.run(op, "reference", inputs.widen(args))
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape, name
        assert f.device.type == DEVICE, name
        assert max_norm_error(f, e) <= _tolerance(op, args, dtype), f"{name}, result {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_equals_float64_reference(op, dtype):
    for name, args in inputs.CASES[op](dtype, device=DEVICE):
        # float64 is filtered tap by tap, however long an utterance is: on the host that takes too long.
        if ON_HOST and dtype == torch.float64 and first_tensor(args).numel() > 60_000:
            continue
        _check(op, args, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_filters", [2, 5, 7])
def test_lnl_of_other_numbers_of_branches(num_filters, dtype):
    bank = inputs.bank(dtype, DEVICE)[:, torch.arange(num_filters) % 3]
    for num_samples in (700, 4097):
        x = inputs.wave(num_samples, dtype, DEVICE)
        own = inputs.lengths(num_samples, DEVICE)
        _check("lnl", (x, bank, own), dtype, f"{num_samples} samples")
        _check("lnl_backward", (x.flip(0, 1), x, bank, own), dtype, f"{num_samples} samples")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_longer_than_a_pass(dtype):
    # Lopsided filters of even and odd length, and of more taps than shared memory takes at once.
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = inputs.wave(3000, dtype, DEVICE)
    for num_taps in (1, 2, 64, 1301):
        filters = torch.randn(inputs.BATCH, 5, num_taps, generator=generator, dtype=torch.float64) / num_taps**0.5
        for i in range(5):
            # The last reaches farther than the others.
            filters[:, i, : num_taps // (3 + i)] = 0
        filters = filters.to(wide).to(DEVICE)
        _check("lnl", (x, filters, None), dtype, f"{num_taps} taps")
        _check("lnl_backward", (x.flip(0, 1), x, filters, None), dtype, f"{num_taps} taps")
        level = torch.tensor([10.0, 0.0, -10.0], dtype=torch.float64, device=DEVICE)
        args = (x, filters[:, 0], inputs.lengths(3000, DEVICE), None, x.flip(1), level, 0.0, 0.0)
        _check("ssi", args, dtype, f"{num_taps} taps")
        _check("ssi_backward", (x.flip(0, 1), *args), dtype, f"{num_taps} taps")


@pytest.mark.parametrize("num_taps", [1, 2, 491, 1024, 1025])
@pytest.mark.parametrize("num_samples", [20_479, 20_480, 30_011])
def test_filters_of_long_utterances(num_samples, num_taps):
    # Around the smallest size that is filtered by FFT, and with filters that are too long for it.
    generator = torch.Generator().manual_seed(num_taps)
    wave = inputs.strided_wave if num_samples == 30_011 else inputs.wave
    x, own = wave(num_samples, torch.float32, DEVICE), inputs.lengths(num_samples, DEVICE)
    filters = (torch.randn(inputs.BATCH, 5, num_taps, generator=generator) / num_taps**0.5).to(DEVICE)
    # On the host, where this takes seconds, without lengths of their own only in test_equals_float64_reference.
    for lengths in (own,) if ON_HOST else (None, own):
        _check("lnl", (x, filters, lengths), torch.float32, "lnl")
        _check("lnl_backward", (x.flip(0, 1), x, filters, lengths), torch.float32, "lnl_backward")
        _check("ssi", (x, filters[:, 1], lengths, inputs.seeds(DEVICE), None, None, 0.0, 9.0), torch.float32, "ssi")
    level = torch.tensor([10.0, 0.0, -10.0], dtype=torch.float64, device=DEVICE)
    _check("ssi", (x, filters[:, 2], own, None, x.flip(1), level, 0.0, 0.0), torch.float32, "ssi, noise given")


def test_a_peak_after_more_blocks_than_a_block_has_threads():
    x = inputs.wave(530_000, torch.float32, DEVICE)[:1]
    x[0, -1] = -3
    args = (x, None, inputs.seeds(DEVICE)[:1], None, 0.0, 2.0)
    for op, given in (("isd", args), ("isd_backward", (x.flip(1), *args))):
        found, expected = inputs.run(op, "cuda", given)[0], inputs.run(op, "reference", inputs.widen(given))[0]
        assert max_norm_error(found, expected) <= RELATIVE[torch.float32], op


@pytest.mark.parametrize("num_bands", [2, 11])
@pytest.mark.parametrize("num_taps", [491, 2001])
def test_notch_bank_with_more_taps_than_shared_memory(num_taps, num_bands):
    # Eleven bands are more than are designed at once.
    ranges = (20.0, 8000.0, 100.0, 1000.0, 800.0 / num_bands, 1800.0 / num_bands)
    draws = reference.notch_draws(inputs.seeds(), [0], [0.0], [0.0], num_bands, *ranges)
    args = (*(v.to(DEVICE) for v in draws), 16000.0, num_taps, torch.float64)
    # The shorter row has less room than the bands have taps.
    _check("notch_bank", args, torch.float64, f"{num_taps} taps, {num_bands} bands")
    args = (inputs.seeds(DEVICE), [0], [0.0], [0.0], num_bands, *ranges, 16000.0, num_taps, torch.float64)
    _check("notch_filters", args, torch.float64, f"{num_taps} taps, {num_bands} bands")


def test_more_filters_than_a_launch_takes():
    count = 150
    gains = [float(i) for i in range(count)]
    args = (inputs.seeds(DEVICE), list(range(count)), gains, gains, 2, 20.0, 8000.0, 100.0, 1000.0, 5.0, 16.0)
    _check("notch_filters", (*args, 16000.0, 29, torch.float64), torch.float64, "150 filters")


@pytest.mark.parametrize("algo", range(9))
def test_same_seeds_same_augmentation_and_gradient(algo):
    boost, seeds, x = ga.RawBoost(algo), inputs.seeds(), inputs.wave(4097, torch.float32)
    for lengths in (None, inputs.lengths(4097)):
        found = _same_bits(lambda lengths=lengths: inputs.augmented(boost, x, seeds, lengths, "cuda", DEVICE))
        for backend in ("reference", "cpp"):
            for f, e in zip(found, inputs.augmented(boost, x, seeds, lengths, backend), strict=True):
                assert max_norm_error(f, e) <= DRAWN[torch.float32], backend


@pytest.mark.parametrize("algo", range(1, 9))
def test_float16_as_loud_as_it_can_be(algo):
    # Of 16-bit integers, say: with its impulses up to three times as much.
    x, seeds = (1e6 * inputs.wave(700, torch.float64)).clamp(-32_768, 32_767).half(), inputs.seeds()
    boost = ga.RawBoost(algo, p=100)
    expected = boost(x.double(), seeds=seeds)
    with ga.use_backends("cuda"):
        found = boost(x.to(DEVICE), seeds=seeds.to(DEVICE))
    assert max_norm_error(found.cpu(), expected) <= RELATIVE[torch.float16]


def test_a_nan_leaves_an_utterance_without_a_peak():
    x = torch.tensor([[4.0, 2.0, float("nan"), 1.0] + [0.5] * 3000])
    with ga.use_backends("cuda"):
        found = ga.RawBoost(2, p=0)(x.to(DEVICE), seeds=torch.tensor([1], device=DEVICE))
    assert torch.equal(found.cpu().nan_to_num(-1), x.nan_to_num(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
# The last is long enough to be filtered by FFT.
@pytest.mark.parametrize(("algo", "num_samples"), [*((algo, 3000) for algo in range(1, 9)), (4, 20_480)])
def test_nonfinite_samples_stay_in_their_utterance(bad, algo, num_samples):
    # A gradient is computed in three parts: the last two are an utterance that is whole and one that is not.
    boost, rows = ga.RawBoost(algo), torch.arange(5) % 3
    x, seeds = inputs.wave(num_samples, torch.float32)[rows].to(DEVICE), inputs.seeds()[rows].to(DEVICE)
    broken = x.clone()
    broken[2:4, 100] = bad
    results = []
    for wave in (x, broken):
        wave.requires_grad_()
        with ga.use_backends("cuda"):
            y = boost(wave, seeds=seeds)
            y.square().sum().backward()
        results.append((y.detach(), wave.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[[0, 1, 4]], dirty[[0, 1, 4]])
        assert not bool(torch.isfinite(dirty[2:4]).all(1).any())


# rawboost draws, at these levels: p, g_sd, snr_min, snr_max.
_RAWBOOST, _LEVELS = (None, None, None), (30.0, 2.0, 10.0, 20.0)


def test_results_are_written_whole():
    # Kernels allocate from the same pool: what a freed block of NaN leaves behind shows where nothing is written.
    x, lengths, bank = (
        inputs.wave(4097, torch.float32, DEVICE),
        inputs.lengths(4097, DEVICE),
        inputs.bank(torch.float32, DEVICE),
    )
    cases = [
        ("lnl", (x, bank, lengths)),
        ("isd", (x, lengths, inputs.seeds(DEVICE), None, 30.0, 2.0)),
        ("ssi", (x, bank[:, 0], lengths, inputs.seeds(DEVICE), None, None, 10.0, 20.0)),
        ("lnl_backward", (x, x, bank, lengths)),
        ("isd_backward", (x, x, lengths, inputs.seeds(DEVICE), None, 30.0, 2.0)),
        ("ssi_backward", (x, x, bank[:, 0], lengths, inputs.seeds(DEVICE), None, None, 10.0, 20.0)),
        *(("rawboost", (x, bank, lengths, inputs.seeds(DEVICE), *_RAWBOOST, algo, *_LEVELS)) for algo in (4, 6, 8)),
        ("gram", (inputs.gradients(3, torch.float32, DEVICE), 3, list(inputs.SEGMENTS), 4)),
    ]
    for op, args in cases:
        before = [torch.full((n,), float("nan"), device=DEVICE) for n in (16, 512, 4096, 65536) for _ in range(8)]
        del before
        (found,) = inputs.run(op, "cuda", args)
        assert bool(torch.isfinite(found).all()), op
        if op != "gram":
            assert not bool(found[1, 2048:].any()), op
            assert not bool(found[2].any()), op


def test_gram_of_many_chunks_tensors_segments_dtypes_and_layouts():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * 32768 + 5,), (3, 7), (32768,), (40, 30), (0,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    # More tensors than a launch takes, more segments than a launch takes, none of them in order; in one segment more
    # chunks than are added at a time.
    shapes, dtypes = shapes + [(17,)] * 1400, dtypes + [torch.float32] * 1400
    segments = [1, 0, 0, 1, 2] + [3 + (7 * i) % 1100 for i in range(1100)] + [1] * 300
    paths = []
    for path in range(2):
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
            # Layouts that differ between the paths, and one with gaps.
            paths.append(g.t().contiguous().t() if i == 3 and path else g.repeat(2, 1)[::2] if i == 1 else g)
    (found,) = _same_bits(lambda: inputs.run("gram", "cuda", (paths, 2, segments, 1104)))
    expected = inputs.run("gram", "reference", (inputs.widen(paths), 2, segments, 1104))[0]
    assert max_norm_error(found, expected) <= RELATIVE[torch.float32]
    # A segment of one tensor on its own, whatever the size of the others.
    for s in (0, 2, 3, 1103):
        assert max_norm_error(found[s], expected[s]) <= RELATIVE[torch.float32]
    assert torch.equal(found, found.mT)
    weights = torch.linspace(-1, 1, 2 * 1104, dtype=torch.float64, device=DEVICE).reshape(1104, 2)
    count = len(shapes)
    merged = [g.repeat(2, 1)[::2] if i == 1 else g.clone() for i, g in enumerate(paths[:count])]
    wanted = inputs.widen([g.clone() for g in merged])
    reference.combine_(wanted, inputs.widen(paths[count:]), weights, segments)
    with ga.use_backends("cuda"):
        ops.combine_(merged, paths[count:], weights, segments)
    for f, e in zip(merged, wanted, strict=True):
        assert max_norm_error(f, e) <= RELATIVE[f.dtype]


@pytest.mark.parametrize("num_paths", [1, 2, 3, 8])
def test_align_of_many_chunks_tensors_dtypes_and_layouts(num_paths):
    # Parameters of many items and of one, of eight paths more of them than a launch takes, and layouts that differ
    # between the paths.
    generator = torch.Generator().manual_seed(0)
    shapes = [(300 * 4096 + 5,), (3, 7), (32768,), (40, 30), (0,), *[(17,)] * 400]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, *[torch.float32] * 401]
    paths = []
    for path in range(num_paths):
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
            paths.append(g.t().contiguous().t() if i == 3 and path else g.repeat(2, 1)[::2] if i == 1 else g)
    count = len(shapes)
    rho = torch.rand(count, num_paths, num_paths, generator=generator, dtype=torch.float64).to(DEVICE)

    def first_path():
        return [g.repeat(2, 1)[::2] if i == 1 else g.clone() for i, g in enumerate(paths[:count])]

    # On the host, where this takes seconds, one that moves targets and one that iterates.
    for method in ("gradvac", "nashmtl") if ON_HOST else ("pcgrad", "gradvac", "cagrad", "nashmtl"):
        options = (method, rho if method == "gradvac" else None, None, 0.5, False, 0.5)

        def run(options=options):
            merged = first_path()
            with ga.use_backends("cuda"):
                return [*ops.align_(merged, paths[count:], *options), *merged]

        # The same bits, in whichever order threads and blocks come.
        gram, targets, *merged = _same_bits(run)
        before = inputs.widen(first_path())
        expected, moved = reference.align_(before, inputs.widen(paths[count:]), *options)
        assert max_norm_error(gram, expected) <= RELATIVE[torch.float32]
        assert max_norm_error(targets, moved) <= RELATIVE[torch.float32]
        for f, e in zip(merged, before, strict=True):
            assert max_norm_error(f, e) <= RELATIVE[torch.float32 if f.dtype == torch.float64 else f.dtype]


# Of many parameters of a few items, each has a block that comes last, and all must see what it has written.
@pytest.mark.parametrize("sizes", [[20 * 4096 + 5, *[20_011] * 8, *[17] * 20], [5000]], ids=["many", "one"])
@pytest.mark.parametrize("num_paths", [2, 3])
def test_align_whichever_block_comes_when(num_paths, sizes):
    generator = torch.Generator().manual_seed(0)
    paths = [torch.randn(n, generator=generator).to(DEVICE) for _ in range(num_paths) for n in sizes]

    def run():
        merged = [g.clone() for g in paths[: len(sizes)]]
        with ga.use_backends("cuda"):
            gram, _ = ops.align_(merged, paths[len(sizes) :], "pcgrad", None, None, 0.5, False, 0.5)
        return [gram, *merged]

    _same_bits(run, ["ascending", *range(1, 20)])


@pytest.mark.skipif(not ON_HOST, reason="a GPU has as many multiprocessors as it has")
@pytest.mark.parametrize("num_paths", [3, 8])
def test_align_on_more_multiprocessors_than_a_warp_has_lanes(num_paths):
    generator = torch.Generator().manual_seed(0)
    paths = [torch.randn(n, generator=generator) for _ in range(num_paths) for n in (40_000, 17)]
    with cuda_on_host.multiprocessors(40):
        _check("align_", (paths[:2], paths[2:], "pcgrad", None, None, 0.5, False, 0.5), torch.float32, "40 blocks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_align_of_parameters_that_just_stay_on_the_chip_and_that_do_not(dtype):
    # Items per block that stay until they are merged: csrc/cuda/align.cu, with the host's shared memory and an H100's.
    blocks, held = (3, 10) if ON_HOST else (torch.cuda.get_device_properties(0).multi_processor_count, 19)
    item = 480 * 16 // dtype.itemsize
    around = ((held - 1, 7), (held, 0), (held, 1), (held + 1, 0), (2 * held + 1, 777))
    sizes = [size for items, more in around for size in (items * blocks * item + more, 5, item, 0)]
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(n, generator=generator).to(dtype).to(DEVICE) for n in sizes] for _ in range(2))
    expected = inputs.widen([g.clone() for g in first])
    gram, _ = reference.align_(expected, inputs.widen(second), "pcgrad", None, None, 0.5, False, 0.5)

    def run():
        merged = [g.clone() for g in first]
        with ga.use_backends("cuda"):
            found, _ = ops.align_(merged, second, "pcgrad", None, None, 0.5, False, 0.5)
        return [found, *merged]

    found, *merged = _same_bits(run)
    assert max_norm_error(found, gram) <= RELATIVE[torch.float32]
    for f, e in zip(merged, expected, strict=True):
        assert max_norm_error(f, e) <= RELATIVE[dtype]


def test_align_of_a_nonfinite_parameter_leaves_the_others_alone():
    g = [torch.randn(50, device=DEVICE) for _ in range(4)]
    g[0][3] = float("nan")
    expected = [t.clone() for t in g]
    options = ("gradvac", torch.full((2, 2, 2), 0.3, dtype=torch.float64, device=DEVICE), None, 0.5, False, 0.5)
    _, moved = reference.align_(expected[:2], expected[2:], *options)
    with ga.use_backends("cuda"):
        gram, targets = ops.align_(g[:2], g[2:], *options)
    assert g[0].isnan().all()
    assert not bool(gram[0].isfinite().all())
    assert max_norm_error(g[1], expected[1]) <= RELATIVE[torch.float32]
    torch.testing.assert_close(targets, moved, rtol=1e-6, atol=1e-6)


@gpu
def test_cuda_graph_of_weigh_and_align():
    first, second = ([torch.randn(n, device="cuda") for n in (100_000, 7, 4096)] for _ in range(2))
    before = [g.clone() for g in first]
    rho = torch.full((3, 2, 2), 0.3, dtype=torch.float64, device="cuda")
    options = ("gradvac", rho, None, 0.5, False, 0.5)

    def restore():
        for g, b in zip(first, before, strict=True):
            g.copy_(b)

    def step():
        gram, targets = ops.align_(first, second, *options)
        return gram, targets, ops.weigh(gram, *options)[0]

    with ga.use_backends("cuda"):
        expected = [v.clone() for v in step()]
        merged = [g.clone() for g in first]
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            restore()
            graph.replay()
            assert all(torch.equal(f, e) for f, e in zip(captured, expected, strict=True))
            assert all(torch.equal(f, e) for f, e in zip(first, merged, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_paths", range(1, 9))
@pytest.mark.parametrize("op", ["gram", "combine_", "align_"])
def test_addresses_that_forbid_wide_accesses(op, num_paths, dtype):
    generator = torch.Generator().manual_seed(num_paths)
    sizes = (1, 7, 40_001)
    whole = [torch.randn(n + 1, generator=generator).to(dtype).to(DEVICE) for _ in range(num_paths) for n in sizes]
    # Every other tensor begins one element after its allocation.
    grads = [g[1:] if i % 2 else g[:-1] for i, g in enumerate(whole)]
    weights = torch.linspace(-1, 1, 2 * num_paths, dtype=torch.float64, device=DEVICE).reshape(2, num_paths)
    args = {
        "gram": (grads, num_paths, [0, 1, 1], 2),
        "combine_": (grads[:3], grads[3:], weights, [0, 1, 1]),
        "align_": (grads[:3], grads[3:], "pcgrad", None, None, 0.5, False, 0.5),
    }
    _check(op, args[op], dtype, "unaligned")


def test_gram_sign_at_tiny_cosine():
    sizes = (500_000, 2_000_000) if ON_HOST else (2_000_000, 300_000_000)
    for grads, wanted, norms in inputs.nearly_orthogonal(*sizes, DEVICE):
        with ga.use_backends("cuda"):
            found = float(ops.gram(grads, 2, [0] * (len(grads) // 2), 1)[0, 0, 1])
        assert (found > 0) == (wanted > 0)
        assert found == pytest.approx(wanted, abs=1e-8 * norms)


@pytest.mark.parametrize("op", ["gram", "align_"])
def test_sums_beyond_a_threads_are_float64(op):
    # Four squares are exact in float32, sums of more are not.
    a = torch.full((1000,), 2047.0, device=DEVICE)
    a[0] = 1
    args = ([a], 1, [0], 1) if op == "gram" else ([a.clone()], [a], "mean", None, None, 0.5, False, 0.5)
    gram, *_ = inputs.run(op, "cuda", args)[-2:]
    assert set(gram.flatten().tolist()) == {float(a.double() @ a.double())}


def test_mistakes_are_named():
    a = torch.zeros(4, device=DEVICE)
    with ga.use_backends("cuda"):
        with pytest.raises(RuntimeError, match=r"must share a shape; found \[4\] and \[3\]"):
            ops.gram([a, a[:3]], 2, [0], 1)
        with pytest.raises(RuntimeError, match="must share a dtype"):
            ops.gram([a, a.half()], 2, [0], 1)
        with pytest.raises(RuntimeError, match="takes up to 8 paths, found 9"):
            ops.gram([a] * 9, 9, [0], 1)


@gpu
def test_tensors_on_another_device_are_named():
    with ga.use_backends("cuda"), pytest.raises(RuntimeError, match="`seeds` must be on the same CUDA device"):
        ops.isd(torch.zeros(3, 10, device="cuda"), None, inputs.seeds(), None, 10.0, 2.0)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_every_run(op):
    for _, args in inputs.CASES[op](torch.float32, device=DEVICE, samples=(4097, 64600)):
        _same_bits(lambda args=args: inputs.run(op, "cuda", args))


@gpu
def test_launchers_never_wait_for_the_device():
    for op in OPS:
        for name, args in inputs.CASES[op](torch.float32, device="cuda", samples=(4097,)):
            try:
                torch.cuda.set_sync_debug_mode("error")
                inputs.run(op, "cuda", args)
            except RuntimeError as error:
                pytest.fail(f"{op}, {name}: {error}")
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extra_memory_is_at_most_two_batches(dtype):
    batch, num_samples = 2 if ON_HOST else 64, 64600
    # The published number of filters, whose spectra take memory, and a seed each.
    bank = inputs.bank(dtype, DEVICE)[torch.arange(batch) % 3][:, torch.arange(6) % 3]
    wave, seeds = torch.randn(batch, num_samples).to(dtype).to(DEVICE), torch.arange(batch, device=DEVICE)
    cases = [
        ("lnl", (wave, bank[:, :5], None)),
        ("isd", (wave, None, seeds, None, 10.0, 2.0)),
        ("ssi", (wave, bank[:, 0], None, seeds, None, None, 10.0, 40.0)),
        ("lnl_backward", (wave, wave, bank[:, :5], None)),
        ("isd_backward", (wave, wave, None, seeds, None, 10.0, 2.0)),
        ("ssi_backward", (wave, wave, bank[:, 0], None, seeds, None, None, 10.0, 40.0)),
        *(("rawboost", (wave, bank, None, seeds, *_RAWBOOST, algo, *_LEVELS)) for algo in (4, 6, 7)),
        *(("rawboost", (wave, bank[:, :5], None, seeds, *_RAWBOOST, algo, *_LEVELS)) for algo in (5, 8)),
    ]
    for op, args in cases:
        args = tuple(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args)
        if ON_HOST:
            cuda_on_host.peak_bytes()
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        (y,) = inputs.run(op, "cuda", args)
        extra = cuda_on_host.peak_bytes() if ON_HOST else torch.cuda.max_memory_allocated() - before
        # With the filters that `RawBoost` designs, of the published length.
        filters = batch * 6 * ga.RawBoostConfig().num_taps * bank.element_size()
        assert extra - y.nbytes + filters <= 2 * y.nbytes, (op, args[7:8])
        del y


counted = pytest.mark.skipif(not ON_HOST, reason="launches are counted on the host, without a GPU")


@counted
def test_a_whole_models_gradients_take_a_handful_of_launches():
    # As many parameters as XLS-R 300M has: gram and combine_ take a hundred of two paths at a time.
    first, second = ([torch.ones(3) for _ in range(422)] for _ in range(2))
    segments, options = list(range(422)), ("pcgrad", None, None, 0.5, False, 0.5)
    with ga.use_backends("cuda"):
        cuda_on_host.launched()
        gram = ops.gram([*first, *second], 2, segments, 422)
        assert 0 < len(cuda_on_host.launched()) <= 6
        weights, _ = ops.weigh(gram, *options)
        assert cuda_on_host.launched() == ["weigh_kernel"]
        ops.combine_(first, second, weights, segments)
        assert 0 < len(cuda_on_host.launched()) <= 5
        ops.align_(first, second, *options)
        assert cuda_on_host.launched() == ["align_kernel"]


@counted
@pytest.mark.parametrize("algo", range(1, 9))
def test_the_chain_takes_a_handful_of_launches(algo):
    boost = ga.RawBoost(algo)
    steps = reference.STEPS[algo]
    with ga.use_backends("cuda"):
        cuda_on_host.launched()
        boost(inputs.wave(64600, torch.float32)[:1], seeds=inputs.seeds()[:1])
    filters = ["notch_bank_kernel", "spectra_kernel", "filter_fft_kernel"] if {"lnl", "ssi"} & set(steps) else []
    marks = ["isd_mark_kernel"] if "isd" in steps else []
    passes = ["isd_kernel"] if "isd" in steps or steps == ("lnl", "ssi") else []
    expected = [*filters, *marks, *passes, "rawboost_finish_kernel"]
    # The sum of two steps takes a pass more, and a norm before it.
    expected += ["isd_kernel", "rawboost_finish_kernel"] if algo == 8 else []
    assert sorted(cuda_on_host.launched()) == sorted(expected)


def _step(boost, x, seeds, grads):
    n = len(inputs.SHAPES)
    y = boost(x, seeds=seeds)
    gram = ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
    ops.combine_(grads[:n], grads[n:], (gram / gram.abs().amax()).sum(1), list(inputs.SEGMENTS))
    return y, gram


@gpu
def test_cuda_graph_capture():
    boost, seeds = ga.RawBoost(4), inputs.seeds("cuda")
    x, grads = inputs.wave(24_000, torch.float32, "cuda"), inputs.gradients(2, torch.float32, "cuda")
    before = [g.clone() for g in grads]

    def restore():
        for g, b in zip(grads, before, strict=True):
            g.copy_(b)

    with ga.use_backends("cuda"):
        expected = [v.clone() for v in _step(boost, x, seeds, grads)]
        merged = [g.clone() for g in grads]
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(boost, x, seeds, grads)
        for _ in range(2):
            restore()
            graph.replay()
            assert all(torch.equal(f, e) for f, e in zip(captured, expected, strict=True))
            assert all(torch.equal(f, e) for f, e in zip(grads, merged, strict=True))
        # Other inputs in the same memory.
        x.mul_(-0.5)
        seeds.add_(1)
        restore()
        graph.replay()
        replayed = captured[0].clone()
        restore()
        assert torch.equal(replayed, _step(boost, x, seeds, grads)[0])


@gpu
def test_each_replay_of_a_cuda_graph_draws_other_seeds():
    """Without seeds, PyTorch's generator of the device counts on, in a graph too."""
    boost, x = ga.RawBoost(4), inputs.wave(24_000, torch.float32, "cuda").requires_grad_()
    with ga.use_backends("cuda"):
        boost(x).sum().backward()
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = boost(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append((y.detach().clone(), slope.clone()))
    for i, (first, second) in enumerate(itertools.pairwise(seen)):
        assert all(bool(torch.isfinite(v).all()) for v in first), i
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), i


@gpu
def test_side_stream():
    boost, seeds = ga.RawBoost(4), inputs.seeds("cuda")
    x, grads = inputs.wave(64600, torch.float32, "cuda"), inputs.gradients(2, torch.float32, "cuda")
    with ga.use_backends("cuda"):
        expected = boost(x * 0.5, seeds=seeds), ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # The kernels read what this stream is still to write.
            late = torch.zeros_like(x)
            torch.cuda._sleep(10_000_000)
            late.add_(x, alpha=0.5)
            found = boost(late, seeds=seeds), ops.gram(grads, 2, list(inputs.SEGMENTS), 3)
        torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


huge = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 30 * 2**30,
    reason="needs a CUDA GPU with 30 GiB",
)
HUGE = 2**31 + 70_001


@huge
def test_align_of_tensors_over_2_to_the_31_elements():
    a = torch.ones(HUGE, dtype=torch.bfloat16, device="cuda")
    a[-1] = 3
    with ga.use_backends("cuda"):
        gram, _ = ops.align_([a], [a * -2], "mean", None, None, 0.5, False, 0.5)
    assert float(gram[0, 0, 1]) == -2 * (HUGE + 8.0)
    assert [float(a[0]), float(a[2**31 + 5]), float(a[-1])] == [-0.5, -0.5, -1.5]


@huge
def test_tensors_over_2_to_the_31_elements():
    a = torch.ones(HUGE, dtype=torch.bfloat16, device="cuda")
    a[-1] = 3
    with ga.use_backends("cuda"):
        assert ops.gram([a, a], 2, [0], 1).flatten().tolist() == [HUGE + 8.0] * 4
        ops.combine_([a], [a], torch.tensor([[2.0, -1.5]], dtype=torch.float64, device="cuda"), [0])
        assert [float(a[0]), float(a[2**31 + 5]), float(a[-1])] == [0.5, 0.5, 1.5]
        del a
        # 40000 utterances of 64600 samples: the last rows start beyond 2**31.
        x = torch.zeros(40_000, 64_600, dtype=torch.float16, device="cuda")
        tail = inputs.wave(64_600, torch.float16, "cuda")
        x[-3:] = tail
        seeds = torch.zeros(40_000, dtype=torch.int64, device="cuda")
        seeds[-3:] = inputs.seeds("cuda")
        found = ops.isd(x, None, seeds, None, 10.0, 2.0)[-3:]
        assert torch.equal(found, ops.isd(tail, None, inputs.seeds("cuda"), None, 10.0, 2.0))
        bank = inputs.bank(torch.float32, "cuda")[:1, :, 200:300]
        found = ops.lnl(x, bank.expand(40_000, -1, -1), None)[-3:]
        assert torch.equal(found, ops.lnl(tail, bank.expand(3, -1, -1), None))
