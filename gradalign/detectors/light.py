"""A light detector for two CPU cores: a small convolutional network on linear-frequency log spectra.

Linear rather than mel frequency, as in the LFCC baselines of ASVspoof: much of what gives a vocoder away lies high.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

# 50 ms windows and 31 Hz bands resolve the harmonics, which synthesis from coarse spectra smears.
FFT_SIZE = 1024
WINDOW = 800
HOP = 320
BANDS = 256


def linear_filterbank(num_bands: int, fft_size: int) -> Tensor:
    """Overlapping triangles equally spaced from 0 Hz to Nyquist: float32 [fft_size // 2 + 1, num_bands]."""
    center = torch.linspace(0, fft_size / 2, num_bands + 2)
    bins = torch.arange(fft_size // 2 + 1)[:, None]
    return (1 - (bins - center[1:-1]).abs() / (center[1] - center[0])).clamp_min(0)


class LightDetector(nn.Module):
    """About 83,000 parameters; independent of level and of a fixed channel, since spectra are centred over time.

    Group rather than batch normalisation: an utterance's score does not depend on the batch around it, so that the
    clean and the augmented view never meet in a statistic, in joint and in split mode alike.

    Args:
        width: channels of the first convolution, a multiple of 24; the others scale with it.
        dropout: probability before the last layer.

    Raises:
        ValueError: for another width.
    """

    window: Tensor
    filterbank: Tensor

    def __init__(self, width: int = 24, dropout: float = 0.2) -> None:
        super().__init__()
        # Every layer's channels are whole and fall into eight groups.
        if width <= 0 or width % 24:
            raise ValueError(f"`width` must be a positive multiple of 24; found {width}")
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filterbank", linear_filterbank(BANDS, FFT_SIZE), persistent=False)
        sizes = (1, width, 4 * width // 3, 2 * width, 8 * width // 3)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            kernel = (9, 5) if i == 0 else (3, 3)
            stride = (4 if i == 0 else 2, 2 if i < 3 else 1)
            padding = (kernel[0] // 2, kernel[1] // 2)
            layers += [nn.Conv2d(a, b, kernel, stride, padding, bias=False), nn.GroupNorm(8, b), nn.SiLU()]
        self.encoder = nn.Sequential(*layers)
        self.project = nn.Conv1d(sizes[-1] * BANDS // 32, sizes[-1], 1)
        # No bias: the softmax would take it away.
        self.attention = nn.Conv1d(sizes[-1], 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * sizes[-1], 2)

    def features(self, wave: Tensor) -> Tensor:
        """Log spectra [B, BANDS, frames] of a waveform [B, T], centred over time and scaled to unit variance."""
        window = self.window.to(wave.dtype)
        spectrum = torch.stft(
            wave, FFT_SIZE, HOP, WINDOW, window, center=True, pad_mode="constant", return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        # A floor relative to the utterance, so that neither level nor digital silence shows.
        power = power / power.mean((1, 2), keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
        bands = torch.log(power.transpose(1, 2) @ self.filterbank.to(wave.dtype) + 1e-6).transpose(1, 2)
        bands = bands - bands.mean(2, keepdim=True)
        return bands / bands.square().mean((1, 2), keepdim=True).add(1e-6).sqrt()

    def forward(self, wave: Tensor) -> Tensor:
        """Score a batch.

        Args:
            wave: [B, T] at 16 kHz, floating, B and T at least 1.

        Returns:
            Logits [B, 2], index 1 bona fide.

        Raises:
            TypeError: for integer samples.
            ValueError: for another shape.
        """
        return self.head(self.dropout(self.embed(wave)))

    def embed(self, wave: Tensor) -> Tensor:
        """Return the attention-weighted mean and standard deviation of the frames: [B, T] -> [B, D]."""
        if wave.dim() != 2 or wave.numel() == 0:
            raise ValueError(f"`wave` must be [B, T] with B and T >= 1; found {list(wave.shape)}")
        if not wave.is_floating_point():
            raise TypeError(f"`wave` must be floating; found {wave.dtype}")
        # float32 under autocast too: the spectrum of a float16 power overflows.
        with torch.autocast(wave.device.type, enabled=False):
            bands = self.features(wave if wave.dtype == torch.float64 else wave.float())
        frames = functional.silu(self.project(self.encoder(bands[:, None]).flatten(1, 2)))
        weight = torch.softmax(self.attention(frames), dim=2)
        mean = (weight * frames).sum(2)
        variance = (weight * frames.square()).sum(2) - mean.square()
        return torch.cat([mean, variance.clamp_min(1e-6).sqrt()], dim=1)
