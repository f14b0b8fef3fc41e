"""Two columns of Mamba blocks, one per direction of time, over a self-supervised front end.

Source: Xiao & Das, "XLSR-Mamba: A dual-column bidirectional state space model for spoofing attack detection", 2024,
arXiv 2411.10027, with the sizes and the weight layout of its public code; the block is that of Gu & Dao, "Mamba:
Linear-time sequence modeling with selective state spaces", 2023, arXiv 2312.00752.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None


def selective_scan(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y[t] = <c[t], h[t]>, h[t] = exp(step[t] * decay) * h[t - 1] + step[t] * x[t] * b[t], h[-1] = 0.

    In chunks of about the square root of T: within all chunks at once, step after step; then from chunk to chunk. No
    factor is above 1, and nothing is divided by one.

    Args:
        x, step: [B, T, D], T at least 1.
        decay: [D, N], at most 0.
        b, c: [B, T, N].

    Returns:
        [B, T, D].

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(one, one, torch.zeros(1, 1), one, one).flatten()
    tensor([1., 2., 3.])
    """
    batch, length, width = x.shape
    size = math.isqrt(length)
    padding = -length % size
    factor = functional.pad(step, (0, 0, 0, padding))[..., None] * decay
    added = functional.pad((step * x)[..., None] * b[:, :, None], (0, 0, 0, 0, 0, padding))
    factor, added = (v.unflatten(1, (-1, size)) for v in (factor, added))
    # Per chunk: what each position keeps of the state before the chunk, and what the chunk itself has added by then.
    kept = factor.cumsum(2).exp()
    factor = factor.exp()
    inner = [added[:, :, 0]]
    for t in range(1, size):
        inner.append(factor[:, :, t] * inner[-1] + added[:, :, t])
    state = x.new_zeros(batch, width, decay.shape[1])
    before = []
    for chunk in range(added.shape[1]):
        before.append(state)
        state = kept[:, chunk, -1] * state + inner[-1][:, chunk]
    states = torch.stack(inner, 2) + kept * torch.stack(before, 1)[:, :, None]
    return (states.flatten(1, 2)[:, :length] * c[:, :, None]).sum(-1)


class MambaMixer(nn.Module):
    """The selective state space block: [B, T, D] -> [B, T, D], causal.

    Args:
        width: features, D.
        states: of each inner feature.
        kernel: steps of the causal convolution.
        expansion: inner features per feature.
    """

    def __init__(self, width: int, states: int = 16, kernel: int = 4, expansion: int = 2) -> None:
        super().__init__()
        inner, self.rank, self.states = expansion * width, -(-width // 16), states
        self.in_project = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.step = nn.Linear(self.rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_project = nn.Linear(inner, width, bias=False)
        # Steps between 0.001 and 0.1, log-uniformly: softplus of the bias at the start of training (Gu & Dao, 3.6).
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        start = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.step.bias.copy_(start + torch.log(-torch.expm1(-start)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Mix over time."""
        x, gate = self.in_project(hidden).chunk(2, dim=-1)
        x = functional.silu(self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.select(x).split([self.rank, self.states, self.states], dim=-1)
        step = functional.linear(step, self.step.weight)
        # The recurrence runs in float32 under autocast too.
        decay = -self.log_decay.float().exp()
        if selective_scan_fn is not None and x.is_cuda:
            channels_first = (v.transpose(1, 2).contiguous() for v in (x, step))
            states = (v.transpose(1, 2).contiguous() for v in (b, c))
            bias = self.step.bias.float()
            y = selective_scan_fn(*channels_first, decay, *states, delta_bias=bias, delta_softplus=True).transpose(1, 2)
        else:
            step = functional.softplus(step.float() + self.step.bias.float())
            y = selective_scan(x.float(), step, decay, b.float(), c.float())
        return self.out_project((y + self.skip * x).to(gate.dtype) * functional.silu(gate))


class Column(nn.Module):
    """Mamba blocks in one direction, each after RMS normalisation and with a residual."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(layers))
        self.mixers = nn.ModuleList(MambaMixer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T', D] -> the sum of the input and every mixer's result."""
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


class DualColumnMamba(nn.Module):
    """The back end: [B, T', C_in] -> logits [B, 2].

    The published network leaves the result of each column's last block unused, and adds its input a second time
    instead; that is kept, so that its weights give its scores, without building the blocks that have no effect.

    Args:
        in_width: features of the front end, C_in.
        width: features inside.
        layers: published number of blocks, an even number from 4 on; half of them per direction, of which all but the
            last count.
        dropout: probability after the projection and before the last layer.

    Raises:
        ValueError: for another number of layers.
    """

    def __init__(self, in_width: int, width: int = 144, layers: int = 12, dropout: float = 0.1) -> None:
        super().__init__()
        if layers < 4 or layers % 2:
            raise ValueError(f"`layers` must be an even number from 4 on; found {layers}")
        self.project = nn.Linear(in_width, width)
        self.front_norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(dropout)
        self.forwards, self.backwards = (Column(width, layers // 2 - 1) for _ in range(2))
        # As published: what a block adds starts smaller the more blocks a column has.
        with torch.no_grad():
            for mixer in (*self.forwards.mixers, *self.backwards.mixers):
                mixer.out_project.weight /= math.sqrt(layers // 2)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        # The published biases have no effect: the softmax takes them away.
        self.forwards_pool, self.backwards_pool = (nn.Linear(width, 1, bias=False) for _ in range(2))
        self.merge = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Score features [B, T', C_in], T' at least 1."""
        x = self.dropout(functional.selu(self.front_norm(self.project(features)[:, None])[:, 0]))
        pooled = []
        columns = ((self.forwards, self.forwards_pool, x), (self.backwards, self.backwards_pool, x.flip(1)))
        for column, pool, sequence in columns:
            # Both columns add the sequence as it runs forwards, as published.
            hidden = self.norm(x + column(sequence))
            pooled.append((pool(hidden).softmax(1) * hidden).sum(1))
        return self.head(self.dropout(self.merge(torch.cat(pooled, dim=1))))


_MIXER = {
    "in_proj.weight": "in_project.weight",
    "conv1d.weight": "convolution.weight",
    "conv1d.bias": "convolution.bias",
    "x_proj.weight": "select.weight",
    "dt_proj.weight": "step.weight",
    "dt_proj.bias": "step.bias",
    "A_log": "log_decay",
    "D": "skip",
    "out_proj.weight": "out_project.weight",
}
_OUTER = {
    "LL": "project",
    "first_bn": "front_norm",
    "conformer.norm_f": "norm",
    "conformer.f_attention_pool": "forwards_pool",
    "conformer.b_attention_pool": "backwards_pool",
    "conformer.LL": "merge",
    "conformer.classifier": "head",
}


def our_key(official: str) -> str | None:
    """Our name of a published back-end weight, of 12 layers; "" for those that have no effect.

    >>> our_key("conformer.forward_layers.4.mixer.A_log"), our_key("conformer.backward_layers.5.norm.weight")
    ('forwards.mixers.4.log_decay', '')
    """
    if found := re.fullmatch(r"conformer\.(forward|backward)_layers\.(\d+)\.(mixer|norm)\.(.+)", official):
        column, block, part, name = found.groups()
        if part == "norm":
            ours = f"norms.{block}.{name}" if name == "weight" else None
        else:
            ours = f"mixers.{block}.{_MIXER[name]}" if name in _MIXER else None
        if ours is None or int(block) > 5:
            return None
        return "" if block == "5" else f"{column}s.{ours}"
    if official in ("conformer.f_attention_pool.bias", "conformer.b_attention_pool.bias"):
        return ""
    module, _, name = official.rpartition(".")
    return f"{_OUTER[module]}.{name}" if module in _OUTER else None
