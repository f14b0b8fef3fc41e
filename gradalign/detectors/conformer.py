"""Conformer with a class token and temporal-channel modelling, over a self-supervised front end.

Source: Truong et al., "Temporal-channel modeling in multi-head self-attention for synthetic speech detection",
Interspeech 2024, arXiv 2406.17376, with the sizes and the weight layout of its public code. Each attention layer sees,
beside the frames and the class token, one token per head that summarises the frames' channels of that head.
"""

from __future__ import annotations

import re
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional


def sinusoids(num_positions: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal position embeddings: float32 [num_positions, width], sines at even and cosines at odd places.

    >>> sinusoids(2, 4)[1]
    tensor([0.8415, 0.5403, 0.0100, 0.9999])
    """
    pair = torch.arange(width, device=device) // 2
    angle = torch.arange(num_positions, device=device)[:, None] / 10000 ** (2 * pair / width)
    return torch.where(torch.arange(width, device=device) % 2 == 0, angle.sin(), angle.cos())


class FeedForward(nn.Module):
    """Layer normalisation and two layers of which the first is ``expansion`` times as wide, halved."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return 0.5 * self.down(functional.silu(self.up(self.norm(x))))


class HeadTokenAttention(nn.Module):
    """Multi-head self-attention with one more token per head; the class token then takes in the mean of those tokens
    and of the frames.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        head_width = width // heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.head_project = nn.Linear(head_width, width)
        self.head_norm = nn.LayerNorm(head_width)
        self.head_position = nn.Parameter(torch.zeros(1, heads, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + T', D], the class token first -> the same shape."""
        x = self.norm(x)
        batch, count, _ = x.shape
        # A head's token is made of the mean of its channels over all tokens.
        tokens = self.head_project(x.mean(1).view(batch, self.heads, -1)).view(batch, self.heads, self.heads, -1)
        tokens = functional.gelu(self.head_norm(tokens)).flatten(2) + self.head_position
        x = torch.cat([x, tokens], dim=1)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(x).chunk(3, dim=2)
        )
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        first, frames, tokens = self.project(attended).split([1, count - 1, self.heads], dim=1)
        first = first + tokens.mean(1, keepdim=True) + frames.mean(1, keepdim=True)
        return torch.cat([first, frames], dim=1)


class Convolution(nn.Module):
    """Gated pointwise and depthwise convolution over time."""

    def __init__(self, width: int, kernel: int, expansion: int = 2) -> None:
        super().__init__()
        inner = expansion * width
        # An even kernel reaches one frame farther back.
        self.padding = (kernel // 2, kernel // 2 - (kernel + 1) % 2)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Conv1d(width, 2 * inner, 1)
        self.depthwise = nn.Conv1d(inner, inner, kernel, groups=inner)
        self.inner_norm = nn.BatchNorm1d(inner)
        self.project = nn.Conv1d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        y = functional.glu(self.gate(self.norm(x).transpose(1, 2)), dim=1)
        y = functional.silu(self.inner_norm(self.depthwise(functional.pad(y, self.padding))))
        return self.project(y).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each with a residual; then normalisation."""

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.before = FeedForward(width)
        self.attention = HeadTokenAttention(width, heads)
        self.convolution = Convolution(width, kernel)
        self.after = FeedForward(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + T', D] -> the same shape."""
        for part in (self.before, self.attention, self.convolution, self.after):
            x = x + part(x)
        return self.norm(x)


class ConformerTCM(nn.Module):
    """The back end: [B, T', C_in] -> logits [B, 2].

    Args:
        in_width: features of the front end, C_in.
        width: features inside, a multiple of ``heads``.
        heads: of the attention.
        kernel: frames of the depthwise convolution.
        layers: Conformer blocks.

    Raises:
        ValueError: for a width that the heads do not divide.
    """

    def __init__(self, in_width: int, width: int = 144, heads: int = 4, kernel: int = 31, layers: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"`width` must be a multiple of heads = {heads}; found {width}")
        self.project = nn.Linear(in_width, width)
        self.front_norm = nn.BatchNorm2d(1)
        self.class_token = nn.Parameter(torch.rand(1, width))
        # As published, all blocks start from the same weights.
        block = ConformerBlock(width, heads, kernel)
        self.blocks = nn.Sequential(*(deepcopy(block) for _ in range(layers)))
        self.head = nn.Linear(width, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Score features [B, T', C_in], T' at least 1."""
        x = functional.selu(self.front_norm(self.project(features)[:, None])[:, 0])
        x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return self.head(self.blocks(x)[:, 0])


_FEED_FORWARD = {"fn.norm": "norm", "fn.fn.net.0": "up", "fn.fn.net.3": "down"}
_PIECES = {
    **{f"ff1.{official}": f"before.{ours}" for official, ours in _FEED_FORWARD.items()},
    **{f"ff2.{official}": f"after.{ours}" for official, ours in _FEED_FORWARD.items()},
    "attn.norm": "attention.norm",
    "attn.fn.qkv": "attention.query_key_value",
    "attn.fn.proj": "attention.project",
    "attn.fn.ht_proj": "attention.head_project",
    "attn.fn.ht_norm": "attention.head_norm",
    "conv.net.0": "convolution.norm",
    "conv.net.2": "convolution.gate",
    "conv.net.4.conv": "convolution.depthwise",
    "conv.net.5": "convolution.inner_norm",
    "conv.net.7": "convolution.project",
    "post_norm": "norm",
}
_OUTER = {"LL": "project", "first_bn": "front_norm", "conformer.fc5": "head"}


def our_key(official: str) -> str | None:
    """Our name of a published back-end weight; "" for the table of positions, which is computed.

    >>> our_key("conformer.encoder_blocks.3.ff1.fn.fn.net.0.weight")
    'blocks.3.before.up.weight'
    """
    if official == "conformer.positional_emb":
        return ""
    if official == "conformer.class_token":
        return "class_token"
    if found := re.fullmatch(r"conformer\.encoder_blocks\.(\d+)\.(.+)", official):
        block, rest = found.groups()
        if rest == "attn.fn.pos_embed":
            return f"blocks.{block}.attention.head_position"
        module, _, name = rest.rpartition(".")
        return f"blocks.{block}.{_PIECES[module]}.{name}" if module in _PIECES else None
    module, _, name = official.rpartition(".")
    return f"{_OUTER[module]}.{name}" if module in _OUTER else None
