"""RawBoost as one would write it for a batch with plain PyTorch: torch.rand, torch.randn and torch.fft.

The baseline that a fused kernel has to beat; it draws from PyTorch's generator, so an utterance's augmentation depends
on the batch around it. `FIRS` holds the convolutions of the libraries for augmentation, which do the same work within
LnL and SSI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import gradalign as ga
from gradalign import reference


def fast_length(least: int) -> int:
    """The smallest 2**a * 3**b * 5**c that is at least ``least``: what FFT libraries like."""
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 1 << max(0, (-(-least // three) - 1).bit_length())
            if three * two >= least:
                best = min(best, three * two)
            three *= 3
        five *= 5
    return best


def _uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=device) * (high - low) + low


def draw(config: ga.RawBoostConfig, batch: int, samples: int, device: torch.device) -> ga.RawBoostDraws:
    """Draw everything random that the algorithm needs for a batch."""
    c = config

    def notches(*axes: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (batch, *axes, c.n_bands)
        taps = _uniform(shape, c.min_coeff, c.max_coeff, device).long()
        return (
            _uniform(shape, c.min_f, c.max_f, device),
            _uniform(shape, c.min_bw, c.max_bw, device),
            taps + (taps % 2 == 0),
        )

    draws, steps = ga.RawBoostDraws(), reference.STEPS[c.algo]
    if "lnl" in steps:
        first = _uniform((batch, 1), c.min_g, c.max_g, device)
        others = _uniform((batch, c.n_f - 1), c.min_g - c.min_bias, c.max_g - c.max_bias, device)
        draws = replace(draws, lnl=ga.NotchDraws(*notches(c.n_f), torch.cat([first, others], dim=1)))
    if "isd" in steps:
        count = (samples * _uniform((batch, 1), 0, c.p, device) / 100).long()
        chosen = torch.rand(batch, samples, device=device).argsort(1) < count
        one, two = (2 * torch.rand(batch, samples, device=device) - 1 for _ in range(2))
        draws = replace(draws, isd_factor=torch.where(chosen, one * two, 0.0))
    if "ssi" in steps:
        draws = replace(
            draws,
            ssi=ga.NotchDraws(*notches(), _uniform((batch,), c.min_g, c.max_g, device)),
            ssi_noise=torch.randn(batch, samples, device=device),
            snr_db=_uniform((batch,), c.snr_min, c.snr_max, device),
        )
    return draws


def _bank(config: ga.RawBoostConfig, notches: ga.NotchDraws) -> Tensor:
    bands = (notches.center_hz, notches.width_hz, notches.taps, notches.gain_db)
    return reference.notch_bank(*bands, float(config.sample_rate), config.num_taps, torch.float32)


def _fir(x: Tensor, filters: Tensor) -> Tensor:
    """Sum of the filtered rows: x [B, F, T], filters [B, F, P] -> [B, T]."""
    samples, taps = x.shape[-1], filters.shape[-1]
    size = fast_length(samples + taps - 1)
    spectrum = (torch.fft.rfft(x, size) * torch.fft.rfft(filters, size)).sum(1)
    advance = (taps + 1) // 2
    return torch.fft.irfft(spectrum, size)[:, advance : advance + samples]


def _torchaudio_fir(x: Tensor, filters: Tensor) -> Tensor:
    """The same by torchaudio's convolution."""
    from torchaudio.functional import fftconvolve

    advance = (filters.shape[-1] + 1) // 2
    return fftconvolve(x, filters).sum(1)[:, advance : advance + x.shape[-1]]


def _audiomentations_fir(x: Tensor, filters: Tensor) -> Tensor:
    """The same by the convolution of torch-audiomentations' impulse responses."""
    from torch_audiomentations.utils.convolution import convolve

    advance = (filters.shape[-1] + 1) // 2
    return convolve(x, filters, mode="full").sum(1)[:, advance : advance + x.shape[-1]]


FIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batched torch": _fir,
    "torchaudio": _torchaudio_fir,
    "torch-audiomentations": _audiomentations_fir,
}


def lnl(x: Tensor, filters: Tensor, fir: Callable[[Tensor, Tensor], Tensor] = _fir) -> Tensor:
    """Convolutive noise of float32 [B, T] by filters [B, F, P]."""
    y = fir(torch.stack([x**i for i in range(1, filters.shape[1] + 1)], dim=1), filters)
    return _norm(y - y.mean(1, keepdim=True))


def ssi(
    x: Tensor, filters: Tensor, noise: Tensor, snr_db: Tensor, fir: Callable[[Tensor, Tensor], Tensor] = _fir
) -> Tensor:
    """Stationary noise of float32 [B, T]: ``noise`` [B, T] through filters [B, P], ``snr_db`` [B]."""
    colored = fir(noise[:, None], filters[:, None])
    level = torch.linalg.vector_norm(x, dim=1) / torch.linalg.vector_norm(colored, dim=1)
    return x + colored * (level * 10 ** (-snr_db.float() / 20))[:, None]


def _norm(y: Tensor) -> Tensor:
    return y / y.abs().amax(1, keepdim=True).clamp_min(1)


def apply(config: ga.RawBoostConfig, x: Tensor, draws: ga.RawBoostDraws) -> Tensor:
    """Augment float32 [B, T]."""
    c = config

    def convolutive(wave: Tensor) -> Tensor:
        assert draws.lnl is not None
        return lnl(wave, _bank(c, draws.lnl))

    def impulsive(wave: Tensor) -> Tensor:
        assert draws.isd_factor is not None
        return _norm(wave * (1 + c.g_sd * draws.isd_factor))

    def stationary(wave: Tensor) -> Tensor:
        assert draws.ssi is not None
        assert draws.ssi_noise is not None
        assert draws.snr_db is not None
        bands = (v[:, None] for v in (draws.ssi.center_hz, draws.ssi.width_hz, draws.ssi.taps, draws.ssi.gain_db))
        return ssi(wave, _bank(c, ga.NotchDraws(*bands))[:, 0], draws.ssi_noise, draws.snr_db)

    if c.algo == 8:
        return _norm(convolutive(x) + impulsive(x))
    run = {"lnl": convolutive, "isd": impulsive, "ssi": stationary}
    for step in reference.STEPS[c.algo]:
        x = run[step](x)
    return x


def rawboost(config: ga.RawBoostConfig, x: Tensor) -> Tensor:
    """Draw and augment float32 [B, T]."""
    return apply(config, x, draw(config, x.shape[0], x.shape[1], x.device))
