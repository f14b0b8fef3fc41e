"""RawNet2 for anti-spoofing, the raw-waveform baseline of ASVspoof 2021.

Source: Tak et al., "End-to-end anti-spoofing with RawNet2", ICASSP 2021, arXiv 2011.01108, with the sizes and the
weight layout of the public ASVspoof 2021 baseline. Fixed band-pass filters spaced on the mel scale, six residual blocks
with filter-wise scaling of their feature maps, and a recurrent layer whose last state is classified.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradalign.detectors.aasist import SAMPLE_RATE, sinc_filterbank

# As published: 20 filters of 1025 taps (1024, made odd).
NUM_FILTERS = 20
NUM_TAPS = 1025
CHANNELS = (20, 20, 128, 128, 128, 128)


class ScaledResidualBlock(nn.Module):
    """Two convolutions with a residual, max-pooling by 3, and filter-wise feature map scaling."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(num_inputs, num_outputs, 3, padding=1)
        self.norm = nn.BatchNorm1d(num_outputs)
        self.second = nn.Conv1d(num_outputs, num_outputs, 3, padding=1)
        self.shortcut = nn.Identity() if num_inputs == num_outputs else nn.Conv1d(num_inputs, num_outputs, 1)
        self.scale = nn.Linear(num_outputs, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, T] -> [B, C_out, T // 3]."""
        # The published block also normalises its input, and then convolves the input that was not normalised.
        inner = self.second(functional.leaky_relu(self.norm(self.first(x)), 0.3, inplace=True))
        pooled = functional.max_pool1d(inner + self.shortcut(x), 3)
        scale = torch.sigmoid(self.scale(pooled.mean(2)))[:, :, None]
        return pooled * scale + scale


class RawNet2(nn.Module):
    """The published network has 17.6 million parameters, nearly all of them in its recurrent layers.

    Args:
        gru_width: units of each recurrent layer.
        gru_layers: how many of them.
        embedding: units of the layer before the last.
    """

    filters: Tensor

    def __init__(self, gru_width: int = 1024, gru_layers: int = 3, embedding: int = 1024) -> None:
        super().__init__()
        self.register_buffer("filters", sinc_filterbank(NUM_FILTERS, NUM_TAPS, SAMPLE_RATE), persistent=False)
        self.first_norm = nn.BatchNorm1d(NUM_FILTERS)
        inputs = (NUM_FILTERS, *CHANNELS[:-1])
        self.blocks = nn.Sequential(*(ScaledResidualBlock(a, b) for a, b in zip(inputs, CHANNELS, strict=True)))
        self.last_norm = nn.BatchNorm1d(CHANNELS[-1])
        self.gru = nn.GRU(CHANNELS[-1], gru_width, gru_layers, batch_first=True)
        self.embedding = nn.Linear(gru_width, embedding)
        self.head = nn.Linear(embedding, 2)

    @property
    def min_samples(self) -> int:
        """The shortest input: one frame is left after the poolings."""
        return NUM_TAPS - 1 + 3 ** (1 + len(CHANNELS))

    def forward(self, wave: Tensor) -> Tensor:
        """Score a batch.

        Args:
            wave: [B, T] at 16 kHz, floating, T at least `min_samples` (3211).

        Returns:
            Logits [B, 2], index 1 bona fide (the published model returns their log-softmax).

        Raises:
            TypeError: for integer samples.
            ValueError: for another shape.
        """
        if wave.dim() != 2 or wave.shape[1] < self.min_samples:
            raise ValueError(f"`wave` must be [B, T] with T >= {self.min_samples}; found {list(wave.shape)}")
        if not wave.is_floating_point():
            raise TypeError(f"`wave` must be floating; found {wave.dtype}")
        bands = functional.conv1d(wave[:, None], self.filters.to(wave.dtype))
        x = functional.selu(self.first_norm(functional.max_pool1d(bands.abs(), 3)))
        x = functional.selu(self.last_norm(self.blocks(x)))
        states, _ = self.gru(x.transpose(1, 2))
        return self.head(self.embedding(states[:, -1]))


_PARTS = {
    "conv1": "first",
    "bn2": "norm",
    "conv2": "second",
    "conv_downsample": "shortcut",
}
_OUTER = {
    "first_bn": "first_norm",
    "bn_before_gru": "last_norm",
    "gru": "gru",
    "fc1_gru": "embedding",
    "fc2_gru": "head",
}


def our_key(official: str) -> str | None:
    """Our name of a published RawNet2 weight; "" for one that the published model holds and never uses.

    >>> our_key("block2.0.conv1.weight"), our_key("fc_attention2.0.bias"), our_key("block3.0.bn1.weight")
    ('blocks.2.first.weight', 'blocks.2.scale.bias', '')
    """
    if found := re.fullmatch(r"block([0-5])\.0\.(\w+)\.(\w+)", official):
        block, part, name = found.groups()
        if part == "bn1" and block != "0":
            return ""
        return f"blocks.{block}.{_PARTS[part]}.{name}" if part in _PARTS else None
    if found := re.fullmatch(r"fc_attention([0-5])\.0\.(\w+)", official):
        return f"blocks.{found[1]}.scale.{found[2]}"
    part, _, name = official.partition(".")
    return f"{_OUTER[part]}.{name}" if part in _OUTER else None
