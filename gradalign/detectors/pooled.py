"""The smallest back end over a self-supervised front end: pooled statistics and two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PooledMLP(nn.Module):
    """Mean and standard deviation over time, then a hidden layer: [B, T', C_in] -> logits [B, 2].

    Args:
        in_width: features of the front end, C_in.
        hidden: units of the hidden layer.
        dropout: probability before the last layer.
    """

    def __init__(self, in_width: int, hidden: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(2 * in_width),
            nn.Linear(2 * in_width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 2),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Score features [B, T', C_in], T' at least 1."""
        variance = features.float().var(1, correction=0).clamp_min(1e-6)
        return self.layers(torch.cat([features.float().mean(1), variance.sqrt()], dim=1))
