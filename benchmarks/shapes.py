"""The workloads: batches of waveforms, lists of parameters, and what each op must at least compute and move.

B, T, P, L, K mean batch, samples, a filter row's length, a filter's taps and paths, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradalign as ga
from gradalign import reference

ALGORITHMS = (1, 2, 3, 4, 5, 6, 7, 8)
# A bank's mean number of taps with the published ranges: five bands of 55 taps in series.
MEAN_TAPS = 271
# Algorithms that run LnL (five filters over powers of the signal) and SSI (one filter over noise).
_WITH_LNL, _WITH_SSI = (1, 4, 5, 6, 8), (3, 4, 6, 7)
WAVE_OPS = ("notch_bank", "notch_filters", "lnl", "isd", "ssi", "lnl_backward", "isd_backward", "ssi_backward")
GRADIENT_OPS = ("gram", "combine_")
PARAMETER_LISTS = ("aasist", "xlsr-300m/4", "xlsr-300m", "xlsr-1b")


@dataclass(frozen=True)
class Work:
    """The least an op must do: arithmetic of the direct form, and each input read and each output written once."""

    flop: float
    bytes: float


def wave(batch: int, samples: int, device: torch.device, seed: int) -> Tensor:
    """Noise at speech's level, float32 [B, T]."""
    generator = torch.Generator(device).manual_seed(seed)
    return 0.1 * torch.randn(batch, samples, generator=generator, device=device)


def seeds(batch: int, device: torch.device, seed: int) -> Tensor:
    """int64 [B]."""
    return torch.arange(batch, device=device) + 1_000_003 * seed


def arguments(op: str, batch: int, samples: int, device: torch.device, seed: int) -> tuple:
    """Return the arguments of one of `WAVE_OPS`, as `ga.RawBoost` with the published parameters gives them."""
    boost, own_seeds = ga.RawBoost(algo=4), seeds(batch, device, seed)
    c, x = boost.config, wave(batch, samples, device, seed)
    notches, design = boost._notches(), boost._design(x)
    if op == "notch_bank":
        return (*reference.notch_draws(own_seeds, **notches), *design.values())
    if op == "notch_filters":
        return (own_seeds, *notches.values(), *design.values())
    lnl_filters, ssi_filters = reference.split_filters(ga.ops.notch_filters(own_seeds, **notches, **design), c.algo)
    rest: dict[str, tuple] = {
        "lnl": (x, lnl_filters, None),
        "isd": (x, None, own_seeds, None, float(c.p), float(c.g_sd)),
        "ssi": (x, ssi_filters, None, own_seeds, None, None, float(c.snr_min), float(c.snr_max)),
    }
    if op in rest:
        return rest[op]
    grad = wave(batch, samples, device, seed + 1)
    return (grad, *rest[op.removesuffix("_backward")])


def wave_work(op: str, batch: int, samples: int, algo: int = 4) -> Work:
    """Work of one of `WAVE_OPS`, or of "rawboost" with the algorithm ``algo``; only filtering counts as arithmetic."""
    c = ga.RawBoostConfig()
    fir = 2.0 * MEAN_TAPS * batch * samples
    row = 4.0 * batch * samples
    bank = 4.0 * batch * c.num_taps
    if op == "rawboost":
        filters = c.n_f * (algo in _WITH_LNL) + (algo in _WITH_SSI)
        return Work(filters * fir, 2 * row)
    return {
        "notch_bank": Work(0, batch * (c.n_f + 1) * (c.n_bands * 24.0 + 8) + (c.n_f + 1) * bank),
        "notch_filters": Work(0, 8.0 * batch + (c.n_f + 1) * bank),
        "lnl": Work(c.n_f * fir, 2 * row + c.n_f * bank),
        "isd": Work(0, 2 * row),
        "ssi": Work(fir, 2 * row + bank),
        # The forward is computed again for the norm, and each power has its own adjoint filter.
        "lnl_backward": Work(2 * c.n_f * fir, 3 * row + c.n_f * bank),
        "isd_backward": Work(0, 3 * row),
        "ssi_backward": Work(fir, 3 * row + bank),
    }[op]


def parameter_shapes(name: str) -> list[torch.Size]:
    """Shapes of a model's parameters: "aasist", "xlsr-300m", "xlsr-1b", and "/4" behind a name for a quarter of every
    width (for machines too small for the model).
    """
    name, _, divisor = name.partition("/")
    if name == "aasist":
        return [p.shape for p in ga.detectors.create("aasist").parameters()]
    import torchaudio

    make: Callable[[], torch.nn.Module] = {
        "xlsr-300m": torchaudio.models.wav2vec2_xlsr_300m,
        "xlsr-1b": torchaudio.models.wav2vec2_xlsr_1b,
    }[name]
    with torch.device("meta"):
        found = [p.shape for p in make().parameters()]
    if not divisor:
        return found
    return [torch.Size(size // int(divisor) if size > 16 else size for size in shape) for shape in found]


def gradients(shapes: list[torch.Size], num_paths: int, device: torch.device, seed: int) -> list[list[Tensor]]:
    """One list of float32 gradients per path; every later path conflicts with the first (cosine about -0.3)."""
    generator = torch.Generator(device).manual_seed(seed)
    first = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    later = [
        [torch.randn(g.shape, generator=generator, device=device).sub_(g, alpha=0.3) for g in first]
        for _ in range(num_paths - 1)
    ]
    return [first, *later]


def gradient_work(op: str, num_params: int, num_paths: int) -> Work:
    """Work of "gram", "combine_", or of "align", both in succession."""
    pairs = num_paths * (num_paths + 1) / 2
    parts = {
        "gram": Work(2 * pairs * num_params, 4.0 * num_paths * num_params),
        "combine_": Work(2.0 * num_paths * num_params, 4.0 * (num_paths + 1) * num_params),
    }
    if op == "align":
        return Work(*(sum(getattr(p, field) for p in parts.values()) for field in ("flop", "bytes")))
    return parts[op]


def rows(value: Any, batch: int, chosen: list[int]) -> Any:
    """An op's argument cut to the chosen utterances."""
    return value[chosen] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value
