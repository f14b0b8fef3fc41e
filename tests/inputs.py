"""One generator of awkward inputs per op: `CASES[op]` yields (name, arguments) with float tensors of the dtype and
device asked for. And a short training on a few clips.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import gradalign as ga
from gradalign import alignment, reference
from gradalign.config import TrainConfig

CLIPS = Path(__file__).parent / "data" / "clips"
BATCH = 3
# Shorter than any filter, around tile and vector edges, and the field's usual 64600.
SAMPLES = (1, 2, 15, 127, 500, 2047, 4097, 64600)
SMALL_SAMPLES = (1, 2, 127, 700)


def config_of(out: Path, **changes) -> TrainConfig:
    """A short training on the clips, without dropout, whose random numbers are each process' own."""
    settings = TrainConfig(
        data=str(CLIPS),
        out=str(out),
        detector="light",
        detector_options={"dropout": 0.0},
        num_samples=8000,
        batch_size=4,
        epochs=3,
        lr=1e-3,
        threads=1,
        device="cpu",
    )
    return replace(settings, **changes)


def seeds(device="cpu") -> torch.Tensor:
    # Negative and larger than 32 bits: the key has two words.
    return torch.tensor([3, -1, (1 << 40) + 7], dtype=torch.int64, device=device)


def wave(num_samples: int, dtype: torch.dtype, device="cpu", scale: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return (scale * torch.randn(BATCH, num_samples, generator=generator, dtype=torch.float64)).to(dtype).to(device)


def strided_wave(num_samples: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """Rows and samples with gaps between them."""
    return wave(2 * num_samples, dtype, device).repeat(2, 1)[::2][:, ::2]


def lengths(num_samples: int, device="cpu") -> torch.Tensor:
    return torch.tensor([num_samples, num_samples // 2, 0], dtype=torch.int64, device=device)


def augmented(boost: ga.RawBoost, x, seeds, lengths, backend: str, device="cpu") -> tuple[torch.Tensor, ...]:
    """What a backend makes of a batch and, but for algorithm 0, of a gradient: both on the CPU."""
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    # A leaf of its own: on the CPU, `to` alone would hand out x, and its gradients would add up over the runs.
    wave = x.clone().to(device).requires_grad_()
    with ga.use_backends(backend):
        y = boost(wave, lengths=None if lengths is None else lengths.to(device), seeds=seeds.to(device))
        if boost.config.algo == 0:
            return (y.detach().cpu(),)
        (y * towards.to(device)).sum().backward()
    return y.detach().cpu(), wave.grad.cpu()


def nearly_orthogonal(size: int, total: int, device="cpu") -> Iterator[tuple[list[torch.Tensor], float, float]]:
    """Two paths of ``total`` elements in tensors of ``size``; their cosine is 1e-6, then -1e-6.

    Half of the tensors agree, half disagree, with cosines near 0.45. Yields (gradients path after path, their inner
    product, the product of their norms).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    b -= (a @ b) / (a @ a) * a
    pairs = total // (2 * size)
    first = a.float()
    for cosine in (1e-6, -1e-6):
        second = [(b + (share + 1.2 * cosine) * a).float() for share in (0.5, -0.5)]
        inner = pairs * sum(float(first.double() @ s.double()) for s in second)
        norms = pairs * float(2 * first.double().square().sum() * sum(s.double().square().sum() for s in second)) ** 0.5
        assert 0.5e-6 < inner / norms / (cosine / 1e-6) < 2e-6
        grads = [first] * 2 * pairs + second * pairs
        yield _on(grads, device), inner, norms


def _on(tensors: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Copies on the device, one of each tensor."""
    there = {id(t): t.to(device) for t in tensors}
    return [there[id(t)] for t in tensors]


def notches(device="cpu") -> tuple[torch.Tensor, ...]:
    return tuple(v.to(device) for v in reference.notch_draws(seeds(), *_ranges()))


def _ranges():
    return (
        [0, 1, reference.SSI_FILTER],
        [0.0, -5.0, 3.0],
        [0.0, -20.0, 9.0],
        5,
        20.0,
        8000.0,
        100.0,
        1000.0,
        10.0,
        100.0,
    )


def bank(dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """[BATCH, 3, 491] in the dtype that waveforms of ``dtype`` are computed in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return reference.notch_bank(*notches(), 16000.0, 491, wide).to(device)


def notch_bank(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    yield "three filters", (*notches(device), 16000.0, 491, wide)
    edge = torch.tensor([[[10.0, 7999.0, 4000.0]]], dtype=torch.float64, device=device)
    width, taps = torch.full_like(edge, 500.0), torch.tensor([[[1, 99, 3]]], device=device)
    yield "edges beyond 0 Hz and Nyquist, one tap", (edge, width, taps, edge[..., 0] * 0 - 30, 16000.0, 295, wide)
    long = torch.tensor([[[201, 99, 3]]], device=device)
    yield "a band longer than its room", (edge, width, long, edge[..., 0] * 0, 16000.0, 295, wide)
    yield "no utterance", (*(v[:0] for v in notches(device)), 16000.0, 491, wide)


def notch_filters(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    yield "three filters", (seeds(device), *_ranges(), 16000.0, 491, wide)
    one = ([4], [0.0], [1.0], 1, 20.0, 8000.0, 100.0, 1000.0, 1.0, 3.0)
    yield "one filter, one band", (seeds(device), *one, 16000.0, 3, wide)
    yield "no utterance", (seeds(device)[:0], *_ranges(), 16000.0, 491, wide)


def lnl(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    b = bank(dtype, device)
    for t in samples:
        yield f"{t} samples", (wave(t, dtype, device), b, None)
        yield f"{t} samples, lengths", (wave(t, dtype, device), b, lengths(t, device))
    yield "strided", (strided_wave(700, dtype, device), b.repeat_interleave(2, 2)[..., ::2], None)
    yield "one branch", (wave(700, dtype, device), b[:, :1], None)
    yield "loud", (wave(700, dtype, device, scale=2.0), b, None)
    yield "silence, lengths", (wave(700, dtype, device) * 0, b, lengths(700, device))
    yield "no utterance", (wave(700, dtype, device)[:0], b[:0], None)


def isd(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    for t in samples:
        yield f"{t} samples", (wave(t, dtype, device), None, seeds(device), None, 10.0, 2.0)
        # Lengths that lie outside [0, T] are clamped.
        own = lengths(t, device) + torch.tensor([9, 0, -9], device=device)
        yield f"{t} samples, lengths, all positions", (wave(t, dtype, device), own, seeds(device), None, 100.0, 2.0)
    factor = wave(700, torch.float32, device)
    yield "strided, factor given", (strided_wave(700, dtype, device), None, None, factor, 10.0, 2.0)
    yield "loud", (wave(700, dtype, device, scale=2.0), None, seeds(device), None, 100.0, 5.0)
    # Several samples have the largest magnitude, and the last block of samples is one short.
    for peak in (1.0, 1.5):
        clipped = wave(2047, dtype, device, scale=2.0).clamp(-peak, peak)
        yield f"clipped at {peak}", (clipped, None, seeds(device), None, 0.0, 2.0)
    yield "silence", (wave(700, dtype, device) * 0, None, seeds(device), None, 10.0, 2.0)
    yield "no utterance", (wave(700, dtype, device)[:0], None, seeds(device)[:0], None, 10.0, 2.0)


def ssi(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    b = bank(dtype, device)[:, 2]
    for t in samples:
        yield f"{t} samples", (wave(t, dtype, device), b, None, seeds(device), None, None, 10.0, 40.0)
        yield (
            f"{t} samples, lengths",
            (wave(t, dtype, device), b, lengths(t, device), seeds(device), None, None, -5.0, 0.0),
        )
    noise, level = (
        wave(700, torch.float32, device, scale=1.0),
        torch.tensor([10.0, 20.0, -3.0], dtype=torch.float64, device=device),
    )
    yield "strided, noise given", (strided_wave(700, dtype, device), b, None, None, noise, level, 0.0, 0.0)
    yield "silence", (wave(700, dtype, device) * 0, b, None, seeds(device), None, None, 10.0, 40.0)
    if dtype != torch.float16:
        # Squares vanish in float32, products of two of them in float64.
        quiet = wave(700, dtype, device, scale=1e-100 if dtype == torch.float64 else 1e-25)
        yield "very quiet", (quiet, b, None, None, quiet.flip(1), level, 0.0, 0.0)
    yield "silent noise", (wave(700, dtype, device), b, None, None, noise * 0, level, 0.0, 0.0)
    yield (
        "no utterance",
        (wave(700, dtype, device)[:0], b.new_zeros(0, b.shape[1]), None, seeds(device)[:0], None, None, 10.0, 40.0),
    )


def rawboost(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    filters = bank(dtype, device)
    for algo in range(1, 9):
        own = None if algo == 2 else filters
        levels = (algo, 30.0, 2.0, -5.0, 5.0)
        # Long utterances are filtered by other means than short ones.
        for t in sorted({samples[0], samples[-1]}):
            yield (
                f"algorithm {algo}, {t} samples",
                (wave(t, dtype, device), own, None, seeds(device), *[None] * 3, *levels),
            )
        loud = wave(700, dtype, device, scale=1.5)
        yield f"algorithm {algo}, lengths", (loud, own, lengths(700, device), seeds(device), *[None] * 3, *levels)
        given = (wave(700, torch.float32, device), wave(700, torch.float32, device, scale=1.0))
        snr_db = torch.tensor([10.0, 20.0, -3.0], dtype=torch.float64, device=device)
        given = (strided_wave(700, dtype, device), own, lengths(700, device), None, *given, snr_db, *levels)
        yield f"algorithm {algo}, strided, draws given", given
        silence = wave(700, dtype, device) * 0
        yield f"algorithm {algo}, silence", (silence, own, None, seeds(device), *[None] * 3, *levels)
        none = (silence[:0], None if own is None else own[:0], None, seeds(device)[:0], *[None] * 3, *levels)
        yield f"algorithm {algo}, no utterance", none


def _with_gradient(cases) -> Iterator[tuple[str, tuple]]:
    for name, (x, *rest) in cases:
        grad = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape).to(x)
        yield name, (grad, x, *rest)


def lnl_backward(dtype, device="cpu", samples=SMALL_SAMPLES) -> Iterator[tuple[str, tuple]]:
    return _with_gradient(lnl(dtype, device, samples))


def isd_backward(dtype, device="cpu", samples=SMALL_SAMPLES) -> Iterator[tuple[str, tuple]]:
    return _with_gradient(isd(dtype, device, samples))


def ssi_backward(dtype, device="cpu", samples=SMALL_SAMPLES) -> Iterator[tuple[str, tuple]]:
    return _with_gradient(ssi(dtype, device, samples))


# Scalars, tails around every vector width, a convolution's weight, an empty tensor, one with gaps in memory.
SHAPES = ((), (1,), (3, 5), (127,), (64, 3, 3, 3), (0,), (20011,), (2, 5))
SEGMENTS = (0, 1, 0, 2, 2, 1, 0, 1)


def gradients(num_paths: int, dtype: torch.dtype, device="cpu", scale: float = 1.0) -> list[torch.Tensor]:
    """num_paths * len(SHAPES) gradients, path after path, some of them strided."""
    generator = torch.Generator().manual_seed(num_paths)
    out = []
    for path in range(num_paths):
        for shape in SHAPES:
            g = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)
            if len(shape) == 4:
                g = g.to(memory_format=torch.channels_last)
            if shape == (2, 5):
                g = torch.nn.functional.pad(g, (0, 2))[:, :5]
            elif len(shape) == 2 and path % 2 == 0:
                g = g.t().contiguous().t()
            out.append(g)
    return out


def gram(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    for k in (1, 2, 3, 8):
        segments = [2 * s for s in SEGMENTS]
        yield f"{k} paths, 5 segments, two of them empty", (gradients(k, dtype, device), k, segments, 5)
    scales = (1e-3, 1e3) if dtype == torch.float16 else (1e-10, 1e10)
    for scale in scales:
        yield f"2 paths, one segment, norm {scale:g}", (gradients(2, dtype, device, scale), 2, [0] * len(SHAPES), 1)


def combine_(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    n = len(SHAPES)
    for k in (1, 2, 3, 8):
        g = gradients(k, dtype, device)
        weights = torch.linspace(-1, 1, 3 * k, dtype=torch.float64, device=device).reshape(3, k)
        yield f"{k} paths, 3 segments", (g[:n], g[n:], weights, list(SEGMENTS))


METHODS = ("mean", "pcgrad", "gradvac", "cagrad", "mgda", "dualproj", "upgrad", "imtlg", "alignedmtl", "nashmtl")


def grams(num_paths: int, device="cpu", count: int = 40) -> torch.Tensor:
    """Gram matrices [count, K, K] of random gradients of all lengths, with a conflict in about half of the pairs; the
    first is of zeros, the last but one has a zero gradient, the last an infinity.
    """
    generator = torch.Generator().manual_seed(num_paths)
    rows = torch.randn(count, num_paths, 30, generator=generator, dtype=torch.float64)
    rows *= 10 ** torch.linspace(-8, 8, count, dtype=torch.float64)[:, None, None]
    rows[0] = 0
    rows[-2, 0] = 0
    gram = rows @ rows.mT
    gram[-1, 0, 0] = float("inf")
    return gram.to(device)


def weigh(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    # Gram matrices are float64 whatever the gradients are.
    for k in (1, 2, 3, 8) if dtype == torch.float64 else (2,):
        # Of two paths more than a block, or a program, takes.
        count = 150 if k == 2 else 40 if samples is SAMPLES else 3
        gram, order = grams(k, device, count), alignment.random_order(k, 0, 0, device)
        for method in METHODS:
            yield f"{method}, {k} paths", (gram, method, None, None, 0.5, False, 0.5)
        # Targets of 1 too, which no angle reaches.
        rho = torch.linspace(-0.5, 2.5, k * k, dtype=torch.float64, device=device).reshape(k, k).clamp(max=1.0)
        rho = rho.expand(count, k, k)
        for method in ("pcgrad", "gradvac"):
            yield f"{method}, {k} paths, order", (gram, method, rho, order, 0.3, method == "gradvac", 0.0)
    yield "no segment", (grams(2, device)[:0], "pcgrad", None, None, 0.5, False, 0.5)


def align_(dtype, device="cpu", samples=SAMPLES) -> Iterator[tuple[str, tuple]]:
    n = len(SHAPES)
    for k in (1, 2, 3, 8):
        g = gradients(k, dtype, device)
        cases = [(method, None, None, 0.5, False, 0.5) for method in (METHODS if k == 2 else ("mean", "pcgrad"))]
        rho = torch.linspace(0, 1, k * k, dtype=torch.float64, device=device).reshape(k, k).expand(n, k, k)
        order = alignment.random_order(k, 0, 0, torch.device(device))
        cases += [("pcgrad", None, order, 0.5, False, 0.0), ("gradvac", rho, order, 0.3, True, 0.0)]
        for method, rho, *rest in cases:
            # Scalars are parallel. Of such gradients Aligned-MTL tells the smallest eigenvalue, and GradVac the cosine
            # with a path that was pulled to zero, from the rounding of float32 products.
            whole = method not in ("alignedmtl", "gradvac")
            kept = [i for i in range(n) if whole or len(SHAPES[i]) > 1 or SHAPES[i][:1] > (1,)]
            own = [[g[path * n + i] for i in kept] for path in range(k)]
            rho = None if rho is None else rho[: len(kept)]
            yield f"{method}, {k} paths", (own[0], [t for path in own[1:] for t in path], method, rho, *rest)


# Ops that draw, and the place of their seeds.
_SEEDS = {"isd": 2, "ssi": 3, "isd_backward": 3, "ssi_backward": 4, "rawboost": 3}


def draws(op: str, args: tuple) -> bool:
    """Whether an op draws float32 numbers of its own for these arguments."""
    return op in _SEEDS and args[_SEEDS[op]] is not None


CASES = {
    "notch_bank": notch_bank,
    "notch_filters": notch_filters,
    "lnl": lnl,
    "isd": isd,
    "ssi": ssi,
    "lnl_backward": lnl_backward,
    "isd_backward": isd_backward,
    "ssi_backward": ssi_backward,
    "rawboost": rawboost,
    "gram": gram,
    "weigh": weigh,
    "combine_": combine_,
    "align_": align_,
}


def widen(value):
    """The arguments of an op with every floating tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(widen, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


def run(op: str, backend: str, args: tuple) -> list[torch.Tensor]:
    """The op's results as a list of tensors; for an op that writes its argument, first what it wrote."""
    from gradalign._dispatch import ops

    written = op in ("combine_", "align_")
    if written:
        # With their strides.
        args = (copy.deepcopy(args[0]), *args[1:])
    with ga.use_backends(backend):
        result = ops()[op](*args)
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    if written:
        # One gradient: its error is relative to all of it, not to a scalar parameter whose terms happen to cancel.
        results.insert(0, torch.cat([g.reshape(-1) for g in args[0]]))
    # Where one side has no weights, the other must have none either.
    return [torch.nan_to_num(value, nan=2.0) for value in results] if op == "weigh" else results


class Twice(torch.nn.Module):
    """Stands for a dropout: shows where it is."""

    def forward(self, x):
        return 2 * x
