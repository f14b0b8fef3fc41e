"""Every backend of every op against the float64 reference, on awkward inputs; the ops' schemas and fake kernels."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import inputs
import pytest
import torch
from tolerances import DRAWN, RELATIVE, WEIGHED, max_norm_error

import gradalign as ga
from gradalign import ops, reference
from gradalign._dispatch import Op
from gradalign._dispatch import ops as declared

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


SERVED = [(backend, op) for backend in ("reference", "cpp") for op in inputs.CASES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "op"), SERVED)
def test_backend_equals_float64_reference(backend, op, dtype):
    for name, args in inputs.CASES[op](dtype):
        found = inputs.run(op, backend, args)
        expected = inputs.run(op, "reference", inputs.widen(args))
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert f.shape == e.shape, name
            drawn = inputs.draws(op, args)
            # gram accumulates and returns float64 for every dtype; a gradient's own rounding is in both sides' input.
            tolerance = 1e-12 if op == "gram" else WEIGHED if op == "weigh" else (DRAWN if drawn else RELATIVE)[dtype]
            if op == "align_":
                # What it wrote, the Gram matrices, GradVac's targets.
                tolerance = (max(RELATIVE[dtype], WEIGHED), 1e-12, WEIGHED)[i]
            assert max_norm_error(f, e) <= tolerance, f"{name}, result {i}"


@pytest.mark.parametrize("op", inputs.CASES)
def test_results_keep_dtype(op):
    for _, args in inputs.CASES[op](torch.bfloat16, samples=(127,)):
        if op in ("lnl", "isd", "ssi"):
            assert inputs.run(op, "cpp", args)[0].dtype == torch.bfloat16
        if op in ("combine_", "align_"):
            assert inputs.run(op, "cpp", args)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("op", inputs.CASES)
def test_opcheck(op):
    # opcheck compares schema, mutation, aliasing and fake kernel with what really happens.
    for _, args in inputs.CASES[op](torch.float32, samples=(127,)):
        torch.library.opcheck(
            declared()[op].public, args, test_utils=("test_schema", "test_faketensor"), raise_exception=True
        )


def test_same_bits_for_every_thread_count():
    native = [op for backend, op in SERVED if backend == "cpp"]
    cases = [(op, args) for op in native for _, args in inputs.CASES[op](torch.float32, samples=(4097,))]
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([inputs.run(op, "cpp", args) for op, args in cases])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for (op, _), a, b in zip(cases, results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), op


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algo", range(9))
def test_nonfinite_samples_stay_in_their_utterance(backend, bad, algo):
    # A gradient is computed in three parts: the last two are an utterance that is whole and one that is not.
    boost, rows = ga.RawBoost(algo), torch.arange(5) % 3
    x, seeds = inputs.wave(700, torch.float32)[rows], inputs.seeds()[rows]
    broken = x.clone()
    broken[2:4, 100] = bad
    results = []
    for wave in (x, broken):
        wave.requires_grad_()
        with ga.use_backends(backend):
            y = boost(wave, seeds=seeds)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wave)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[[0, 1, 4]], dirty[[0, 1, 4]])
        assert not bool(torch.isfinite(dirty[2:4]).all(1).any())


@pytest.mark.parametrize("given", [False, True], ids=["seeds", "draws"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("algo", range(1, 9))
def test_nothing_beyond_an_utterances_end_reaches_it_or_its_gradient(algo, backend, given):
    boost, seeds, lengths = ga.RawBoost(algo), inputs.seeds(), inputs.lengths(700)
    towards, outside = inputs.wave(700, torch.float32).flip(0, 1), torch.arange(700) >= lengths[:, None]
    draws = boost.draw(seeds, 700, lengths)
    of_samples = [name for name in ("isd_factor", "ssi_noise") if getattr(draws, name) is not None]

    def run(scale, value):
        wave = inputs.wave(700, torch.float32, scale=scale).masked_fill(outside, value).requires_grad_()
        filled = {name: getattr(draws, name).masked_fill(outside, value) for name in of_samples}
        drawn = dataclasses.replace(draws, **filled)
        y = boost.apply(wave, drawn, lengths) if given else boost(wave, lengths, seeds)
        return torch.stack([y, *torch.autograd.grad(y, wave, towards.masked_fill(outside, value))]).detach()

    # At the first level the sum of algorithm 8 is divided by its peak, at the second each step's result.
    for scale in (0.3, 2.0):
        with ga.use_backends(backend):
            expected, *others = [run(scale, value) for value in (0.0, float("nan"), float("inf"))]
        assert bool(expected[:, :2].any(2).all())
        assert not bool(expected[:, outside].any())
        assert all(torch.equal(found, expected) for found in others), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_takes_at_most_two_batches_beside_itself(dtype):
    import measure

    wave, seeds, found = torch.full((64, 16000), 0.1, dtype=dtype), torch.arange(64), {}
    with ga.use_backends("cpp"):
        for algo in range(1, 9):
            leaf = wave.clone().requires_grad_()
            run = functools.partial(torch.autograd.grad, ga.RawBoost(algo)(leaf, seeds=seeds), leaf, wave)
            found[algo] = measure.peak_bytes(run, torch.device("cpu")) / wave.nbytes - 1
    assert max(found.values()) <= 2, found


COUNTER = r"""
#include <dlfcn.h>
#include <cstddef>

static long count = 0;
extern "C" long allocations() { return count; }

#define COUNTED(result, name, parameters, arguments)                        \
  extern "C" result name parameters {                                       \
    static const auto next = (result(*) parameters)dlsym(RTLD_NEXT, #name); \
    ++count;                                                                \
    return next arguments;                                                  \
  }
COUNTED(void*, malloc, (size_t size), (size))
COUNTED(void*, realloc, (void* old, size_t size), (old, size))
COUNTED(void*, aligned_alloc, (size_t alignment, size_t size), (alignment, size))
COUNTED(int, posix_memalign, (void** out, size_t alignment, size_t size), (out, alignment, size))

// dlsym itself calls it.
extern "C" void* __libc_calloc(size_t, size_t);
extern "C" void* calloc(size_t number, size_t size) {
  ++count;
  return __libc_calloc(number, size);
}
"""

COUNT = """
import ctypes, gc, sys
import torch
sys.path.insert(0, sys.argv[1])
import inputs
import gradalign as ga
from gradalign import ops
torch.set_num_threads(1)
counted = ctypes.CDLL(None).allocations
gc.disable()
for algo in (4, 8):
    for dtype in (torch.float32, torch.float16):
        found = []
        for batch in (32, 4, 32):
            rows = torch.arange(batch) % inputs.BATCH
            x, bank = inputs.wave(3000, dtype)[rows], inputs.bank(dtype)[rows]
            with ga.use_backends("cpp"):
                before = counted()
                ops.rawboost(x, bank, None, rows, None, None, None, algo, 30.0, 2.0, 10.0, 20.0)
                found.append(counted() - before)
        # The first call makes the thread's buffers.
        print(algo, dtype, *found[1:])
"""


def test_the_number_of_allocations_does_not_grow_with_the_batch(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler; g++ is not there")
    (tmp_path / "counter.cpp").write_text(COUNTER)
    library = tmp_path / "counter.so"
    build = ["g++", "-O1", "-fPIC", "-shared", "-D_GNU_SOURCE", tmp_path / "counter.cpp", "-o", library, "-ldl"]
    subprocess.run(build, check=True)
    command, environment = [sys.executable, "-c", COUNT, Path(__file__).parent], {**os.environ, "LD_PRELOAD": library}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert len(found) == 4
    for case, few, many in found:
        assert 0 < int(few) == int(many), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algo", range(1, 9))
def test_a_batchs_gradient_is_that_of_its_utterances_bit_for_bit(algo, dtype):
    # A gradient is computed a part of the batch at a time; some parts are empty here. Of the longest utterance two
    # threads would take a part each, if PyTorch added it up.
    boost, seeds, lengths = ga.RawBoost(algo), torch.arange(9), torch.tensor([300, 0, 299, 1, 150, 40_000, 2, 77, 300])
    x = torch.randn(9, 40_000, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(wave, own, rows):
        wave.requires_grad_()
        return torch.autograd.grad(boost(wave, own, seeds[rows]), wave, -(wave.detach() ** 3))[0]

    def alone(i):
        # Without its padding.
        end, rows = int(lengths[i]), slice(i, i + 1)
        return torch.nn.functional.pad(run(x[rows, :end], None, rows), (0, x.shape[1] - end))

    threads = torch.get_num_threads()
    try:
        with ga.use_backends("cpp"):
            torch.set_num_threads(1)
            expected = torch.cat([alone(i) for i in range(9)])
            torch.set_num_threads(2)
            for size in (1, 2, 3, 5, 9):
                rows = slice(9 - size, 9)
                assert torch.equal(run(x[rows], lengths[rows], rows), expected[rows]), size
    finally:
        torch.set_num_threads(threads)


def test_a_nan_leaves_an_utterance_without_a_peak_on_every_backend():
    x = torch.tensor([[4.0, 2.0, float("nan"), 1.0] + [0.5] * 30])
    for backend in ("reference", "cpp"):
        with ga.use_backends(backend):
            found = ga.RawBoost(2, p=0)(x, seeds=torch.tensor([1]))
        assert torch.equal(found.nan_to_num(-1), x.nan_to_num(-1)), backend


def test_gram_sign_at_tiny_cosine():
    # 3e8 parameters, cosine 1e-6 and -1e-6: the sign decides whether anything is projected.
    for grads, wanted, _ in inputs.nearly_orthogonal(2_000_000, 300_000_000):
        num_params = len(grads) // 2
        found = float(ops.gram(grads, 2, [0] * num_params, 1)[0, 0, 1])
        assert (found > 0) == (wanted > 0)
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pairs_product_does_not_depend_on_the_other_paths(dtype):
    """On the CPU each number of paths up to eight has a loop of its own."""
    for size in (1, 15, 16, 17, 1000, 16384, 16401):
        g = [torch.randn(size, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(10)]
        with ga.use_backends("cpp"):
            most = ops.gram(g, 10, [0], 1)
            for k in range(1, 10):
                assert torch.equal(ops.gram(g[:k], k, [0], 1), most[:, :k, :k])


def test_bijection_is_a_permutation():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 15, 16, 17, 1000, 65536, 65537):
        keys = torch.randint(1 << 32, (4, reference.BIJECTION_ROUNDS), generator=generator)
        pi = reference.bijection(keys, torch.arange(size), torch.full((4,), size))
        assert torch.equal(pi.sort(1).values, torch.arange(size).expand(4, size))


def test_philox_known_answers():
    # Random123's published known-answer vectors of philox4x32-10.
    def words(counter, key):
        c0, c1, c2, c3 = counter
        return [
            int(w) for w in reference.philox(torch.tensor(key[0] | key[1] << 32), c3, torch.tensor(c0 | c1 << 32), c2)
        ]

    assert words([0, 0, 0, 0], [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    signed = -1
    found = reference.philox(torch.tensor(signed), 0xFFFFFFFF, torch.tensor(signed), 0xFFFFFFFF)
    assert [int(w) for w in found] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_declaring_another_signature_raises():
    def gram(grads, num_paths):
        return None

    with pytest.raises(
        TypeError,
        match=r"must take \['grads', 'num_paths', 'segments', 'num_segments'\]; found \['grads', 'num_paths'\]",
    ):
        ops.gram.backend("triton", available=lambda: "", supports=lambda *_: "")(gram)


def test_an_argument_of_another_type_is_named_and_not_printed():
    grads = [[torch.ones(10_000)], [torch.ones(10_000)]]
    with pytest.raises(
        TypeError, match=r"'List\[Tensor\]' for argument 'grads'.* Arguments: \(Tensor\[\] grads, "
    ) as raised:
        ops.gram(grads, 2, [0], 1)
    assert len(str(raised.value)) < 300
    with pytest.raises(RuntimeError, match="missing value for argument 'segments'"):
        ops.gram(grads[0] + grads[1], 2)


def test_lists_of_wrong_length_never_reach_a_kernel():
    g = [torch.ones(3), torch.ones(3)]
    weights = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"`grads` must hold num_paths \* len\(segments\) = 2 \* 2 tensors, .* found 2"
    ):
        ops.gram(g, 2, [0, 0], 1)
    with pytest.raises(ValueError, match=r"`grads` must hold .* = 2 \* 0 tensors, at least one; found 0"):
        ops.gram([], 2, [], 1)
    with pytest.raises(ValueError, match=r"`segments` must lie in \[0, 1\); found \[0, 1\]"):
        ops.gram(g, 1, [0, 1], 1)
    with pytest.raises(ValueError, match=r"`others` must hold \(K - 1\) \* len\(out\) = 1 \* 2 tensors; found 1"):
        ops.combine_(g, g[:1], weights, [0, 0])
    with pytest.raises(ValueError, match=r"`out` must hold len\(segments\) = 1 tensors, at least one; found 2"):
        ops.combine_(g, g, weights, [0])
    with pytest.raises(ValueError, match=r"`weights` must be float64 \[S, K\]; found torch.float32 \[1, 2\]"):
        ops.combine_(g, g, weights.float(), [0, 0])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("call", [ops, torch.ops.gradalign], ids=["ops", "torch.ops"])
def test_waves_filters_and_draws_that_do_not_fit_never_reach_a_kernel(backend, call):
    x, one, five = torch.zeros(2, 300), torch.zeros(2, 11), torch.zeros(2, 5, 11)
    seeds, bands = torch.tensor([1, 2]), torch.ones(2, 1, 5)
    design = (bands.long(), torch.zeros(2, 1), 16000.0, 55, torch.float32)
    cases = [
        (lambda: call.isd(x, None, None, None, 10.0, 2.0), ValueError, "expected `seeds`, or `factor`; found None"),
        (
            lambda: call.isd(x, None, None, x[:, 1:], 10.0, 2.0),
            ValueError,
            r"`factor` must be \[2, 300\]",
        ),
        (lambda: call.isd(x, None, seeds.int(), None, 10.0, 2.0), TypeError, "`seeds` must be int64; found int32"),
        (lambda: call.isd(x, seeds[:1], seeds, None, 10.0, 2.0), ValueError, r"`lengths` must be \[2\]; found \[1\]"),
        # Ranks beyond an utterance's end would never be led back into it.
        (lambda: call.isd(x, None, seeds, None, 101.0, 2.0), ValueError, r"`p` must be .* in \[0, 100\]; found 101.0"),
        (lambda: call.ssi(x, one, None, None, x, None, 10.0, 40.0), ValueError, "or `noise`, `snr_db`; found None"),
        (lambda: call.ssi(x, five, None, seeds, None, None, 10.0, 40.0), ValueError, r"`filters` must be \[2, \*\]"),
        (lambda: call.lnl(x, five[:1], None), ValueError, r"`filters` must be \[2, \*, \*\]; found \[1, 5, 11\]"),
        (lambda: call.lnl(x, five[:, :0], None), ValueError, r"a filter of at least one tap; found \[2, 0, 11\]"),
        (lambda: call.ssi(x, one[:, :0], None, seeds, None, None, 10.0, 40.0), ValueError, r"one tap; found \[2, 0\]"),
        (lambda: call.lnl(x.long(), five, None), TypeError, "`x` must be float16, .*; found int64"),
        (lambda: call.lnl_backward(x[:1], x, five, None), ValueError, r"`grad` must be \[2, 300\]; found \[1, 300\]"),
        (lambda: call.notch_bank(*[bands[..., :0]] * 2, bands[..., :0].long(), *design[1:]), ValueError, "found 0"),
        (lambda: call.notch_bank(bands, bands[..., 1:], *design), ValueError, r"`width_hz` must be \[2, 1, 5\]"),
    ]
    with ga.use_backends(backend):
        for run, error, message in cases:
            with pytest.raises(error, match=message):
                run()


@pytest.mark.parametrize(
    "merge",
    [
        lambda out, others: ops.combine_(out, others, torch.ones(1, 2, dtype=torch.float64), [0, 0]),
        lambda out, others: ops.align_(out, others, "mean", None, None, 0.5, False, 0.5),
    ],
    ids=["combine_", "align_"],
)
def test_nothing_is_merged_beside_a_gradient_that_is_refused(merge):
    out, others = ([torch.ones(3), torch.ones(3, dtype=torch.int32)] for _ in range(2))
    with ga.use_backends("cpp"), pytest.raises(RuntimeError):
        merge(out, others)
    assert torch.equal(out[0], torch.ones(3))


def test_wrong_matrices_and_methods_never_reach_a_kernel():
    gram, rest = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1), (0.5, False, 0.5)
    with pytest.raises(ValueError, match=r"`gram` must be float64 \[S, K, K\]; found torch.float32 \[3, 2, 2\]"):
        ops.weigh(gram.float(), "mean", None, None, *rest)
    with pytest.raises(ValueError, match=r"`gram` must be .*; found torch.float64 \[2, 2\]"):
        ops.weigh(gram[0], "mean", None, None, *rest)
    with pytest.raises(ValueError, match="by its first name; found 'none'"):
        ops.weigh(gram, "none", None, None, *rest)
    with pytest.raises(ValueError, match=r"`rho` must be float64 \[3, 2, 2\]; found torch.float64 \[2, 2\]"):
        ops.weigh(gram, "gradvac", gram[0], None, *rest)
    with pytest.raises(ValueError, match=r"`order` must be int64 \[2, 2\]; found torch.float64 \[2, 2\]"):
        ops.weigh(gram, "pcgrad", None, gram[0], *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_paths", [2, 3])
def test_align_is_gram_weigh_combine_bit_for_bit(num_paths, dtype):
    # A parameter of more chunks than one thread takes, strided and channels-last ones, and a scalar.
    generator = torch.Generator().manual_seed(0)
    large = [torch.randn(200_001, generator=generator).to(dtype) for _ in range(num_paths)]
    small = inputs.gradients(num_paths, dtype)
    count = len(inputs.SHAPES)
    first, others = [*small[:count], large[0]], []
    for k in range(1, num_paths):
        others += [*small[k * count : (k + 1) * count], large[k]]
    rho = torch.rand(count + 1, num_paths, num_paths, dtype=torch.float64)
    for method in inputs.METHODS:
        options = (method, rho if method == "gradvac" else None, None, 0.5, False, 0.5)
        merged, expected = ([g.clone() for g in first] for _ in range(2))
        with ga.use_backends("cpp"):
            found, found_rho = ops.align_(merged, others, *options)
            gram = ops.gram([*expected, *others], num_paths, list(range(count + 1)), count + 1)
            weights, new_rho = ops.weigh(gram, *options)
            ops.combine_(expected, others, weights, list(range(count + 1)))
        assert torch.equal(found, gram), method
        assert torch.equal(found_rho, new_rho), method
        assert all(torch.equal(a, b) for a, b in zip(merged, expected, strict=True)), method


def test_thousands_of_tiny_parameters_and_channels_last_ones():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1 + n % 5,) for n in range(3000)] + [(4, 3, 2, 5)] * 3
    paths = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    # Alike in both paths, in one path only, and with gaps.
    for k, grads in enumerate(paths):
        grads[-1] = grads[-1].to(memory_format=torch.channels_last)
        if k:
            grads[-2] = grads[-2].to(memory_format=torch.channels_last)
        grads[-3] = grads[-3].repeat(1, 1, 1, 2)[..., ::2]
    expected = [g.clone() for g in paths[0]]
    options = ("pcgrad", None, None, 0.5, False, 0.5)
    with ga.use_backends("reference"):
        gram, _ = ops.align_(expected, paths[1], *options)
    with ga.use_backends("cpp"):
        found, _ = ops.align_(paths[0], paths[1], *options)
    torch.testing.assert_close(found, gram, rtol=1e-12, atol=0)
    for a, b in zip(paths[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_more_than_2_to_the_31_elements_are_described():
    # Fake kernels only: such tensors are never made here.
    huge = torch.empty(2**31 + 7, dtype=torch.bfloat16, device="meta")
    gram, rho = torch.ops.gradalign.align_([huge], [huge], "gradvac", None, None, 0.5, False, 0.5)
    assert gram.shape == rho.shape == (1, 2, 2)
    assert gram.dtype == torch.float64
    gram = torch.ops.gradalign.gram([huge, huge], 2, [0], 1)
    assert gram.shape == (1, 2, 2)
    weights, rho = torch.ops.gradalign.weigh(gram, "pcgrad", None, None, 0.5, False, 0.5)
    assert weights.shape == (1, 2)
    assert rho.shape == (0,)
    torch.ops.gradalign.combine_([huge], [huge], weights, [0])


def test_wrong_lists_never_reach_align():
    g = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match=r"\(K - 1\) \* len\(out\) tensors, .*; found 1 and 2"):
        ops.align_(g, g[:1], "mean", None, None, 0.5, False, 0.5)
    with pytest.raises(ValueError, match="by its first name; found 'sgd'"):
        ops.align_(g, g, "sgd", None, None, 0.5, False, 0.5)
    with pytest.raises(ValueError, match=r"`rho` must be float64 \[2, 2, 2\]; found torch.float64 \[2\]"):
        ops.align_(g, g, "gradvac", torch.zeros(2, dtype=torch.float64), None, 0.5, False, 0.5)


def test_use_backends_raises_when_it_cannot_serve():
    with ga.use_backends("cuda"), pytest.raises(RuntimeError, match="none of the allowed backends can serve this call"):
        ga.RawBoost(1)(torch.zeros(1, 100), seeds=torch.tensor([1]))
    with pytest.raises(ValueError, match="'numpy'"), ga.use_backends("numpy"):
        pass
    with pytest.raises(ValueError, match="none"), ga.use_backends():
        pass


def test_a_gradient_is_served_by_what_served_the_result():
    """Wherever backward is called: for CUDA tensors PyTorch calls it in a thread of its own."""
    x = torch.randn(2, 300, requires_grad=True)
    with ga.use_backends("reference"):
        expected = ga.RawBoost(5)(x, seeds=torch.tensor([1, 2]))
    for backend, forbidden in (("reference", "cpp"), ("cpp", "reference")):
        with ga.use_backends(backend):
            y = ga.RawBoost(5)(x, seeds=torch.tensor([1, 2]))
        with pytest.MonkeyPatch.context() as patch:
            for op in ("lnl_backward", "isd_backward", "ssi_backward"):
                patch.setitem(declared()[op].backends, forbidden, None)
            thread = threading.Thread(target=y.square().sum().backward)
            thread.start()
            thread.join()
        assert x.grad is not None
        found, x.grad = x.grad, None
        wanted = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0]
        assert max_norm_error(found, wanted) <= RELATIVE[torch.float32]


def test_results_are_contiguous_as_the_fake_kernels_say():
    for op in ("lnl", "isd", "ssi", "lnl_backward", "isd_backward", "ssi_backward"):
        for name, args in inputs.CASES[op](torch.float32, samples=(127,)):
            columns = [a.t().contiguous().t() if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in args]
            for backend in ("reference", "cpp"):
                assert inputs.run(op, backend, columns)[0].is_contiguous(), name
            torch.library.opcheck(
                declared()[op].public, columns, test_utils=("test_schema", "test_faketensor"), raise_exception=True
            )


def test_every_op_has_an_input_generator_and_every_backend():
    assert set(declared()) == set(inputs.CASES)
    for op in declared().values():
        assert isinstance(op, Op)
        assert set(op.backends) == {"reference", "cpp", "cuda", "triton"}
        assert op.backends["reference"].run is getattr(reference, op.name)


def test_arguments_have_names():
    x = torch.randn(2, 100, requires_grad=True)
    filters = torch.randn(2, 2, 5)
    found = ops.lnl(lengths=None, filters=filters, x=x)
    torch.testing.assert_close(found, ops.lnl(x, filters, None))
    found.square().sum().backward()  # the sum itself is zero: the mean is subtracted
    assert x.grad.abs().max() > 0
    assert repr(ops.lnl) == "<op gradalign::lnl(Tensor x, Tensor filters, Tensor? lengths) -> Tensor>"
