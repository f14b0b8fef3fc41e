"""AASIST: spectro-temporal graph attention on the raw waveform.

Source: Jung et al., "AASIST: Audio anti-spoofing using integrated spectro-temporal graph attention networks",
ICASSP 2022, arXiv 2110.01200, with the sizes of the public configurations AASIST.conf and AASIST-L.conf. The published
option of masking random filters in training ("Freq_aug", off in those configurations) is left out.

Shapes: B utterances, C channels, N_s spectral and N_t temporal nodes, D node features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SAMPLE_RATE = 16000
NUM_FILTERS = 70
FILTER_TAPS = 129
# Frequency rows after the front end's 3 x 3 pooling, and the factor by which each residual block shortens time.
SPECTRAL_NODES = NUM_FILTERS // 3
POOL = 3
# Softmax temperatures of the attention within one graph, and of the combined attention.
TEMPERATURE = 2.0
COMBINED_TEMPERATURE = 100.0


def sinc_filterbank(num_filters: int, num_taps: int, sample_rate: int) -> Tensor:
    """Return float32 [num_filters, 1, num_taps]: Hamming-windowed ideal band-passes, equally wide on the mel scale."""
    mel_max = 2595 * math.log10(1 + (sample_rate / 2) / 700)
    mel = torch.linspace(0, mel_max, num_filters + 1, dtype=torch.float64)
    edges_hz = 700 * (10 ** (mel / 2595) - 1)
    n = torch.arange(num_taps, dtype=torch.float64) - (num_taps - 1) / 2
    low_pass = 2 * edges_hz[:, None] / sample_rate * torch.sinc(2 * edges_hz[:, None] * n / sample_rate)
    window = torch.hamming_window(num_taps, periodic=False, dtype=torch.float64)
    return ((low_pass[1:] - low_pass[:-1]) * window)[:, None].float()


class ResidualBlock(nn.Module):
    """[B, C_in, F, T] -> [B, C_out, F, T // pool]: two 2 x 3 convolutions beside a shortcut, then pooling over time."""

    def __init__(self, channels_in: int, channels_out: int, first: bool, pool: int = POOL) -> None:
        super().__init__()
        self.pool = pool
        # The published block normalises its input and then drops the result; the parameters are kept, unused, so that
        # the published weights load whole and the number of parameters is the published one.
        self.unused_norm = None if first else nn.BatchNorm2d(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, (2, 3), padding=(1, 1))
        self.norm = nn.BatchNorm2d(channels_out)
        self.conv_out = nn.Conv2d(channels_out, channels_out, (2, 3), padding=(0, 1))
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, (1, 3), padding=(0, 1))
            if channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        # In place where no gradient needs what is overwritten: a fifth of a training step's memory.
        y = self.conv_out(functional.selu(self.norm(self.conv_in(x)), inplace=True))
        y += self.shortcut(x)
        return functional.max_pool2d(y, (1, self.pool)) if self.pool > 1 else y


def _score_parameter(size: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(size, 1)))


def _normed(norm: nn.BatchNorm1d, nodes: Tensor) -> Tensor:
    """Batch-normalise the features of nodes [B, N, D] over both B and N, then SELU."""
    return functional.selu(norm(nodes.flatten(0, 1)).view_as(nodes))


class GraphAttention(nn.Module):
    """Attention among the nodes of one graph: [B, N, D_in] -> [B, N, D_out]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.pair = nn.Linear(dim_in, dim_out)
        self.score = _score_parameter(dim_out)
        self.attended = nn.Linear(dim_in, dim_out)
        self.own = nn.Linear(dim_in, dim_out)
        self.norm = nn.BatchNorm1d(dim_out)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the updated nodes."""
        nodes = functional.dropout(nodes, 0.2, self.training)
        pairs = torch.tanh(self.pair(nodes[:, :, None] * nodes[:, None]))
        attention = torch.softmax((pairs @ self.score).squeeze(-1) / TEMPERATURE, dim=-1)
        return _normed(self.norm, self.attended(attention @ nodes) + self.own(nodes))


class HeterogeneousAttention(nn.Module):
    """Attention within and between temporal and spectral nodes, with a stack node that listens to all of them.

    temporal [B, N_t, D_in], spectral [B, N_s, D_in], stack [B or 1, 1, D_in] -> the three with D_out features.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.lift_temporal = nn.Linear(dim_in, dim_in)
        self.lift_spectral = nn.Linear(dim_in, dim_in)
        self.pair = nn.Linear(dim_in, dim_out)
        self.pair_stack = nn.Linear(dim_in, dim_out)
        self.score_temporal = _score_parameter(dim_out)
        self.score_spectral = _score_parameter(dim_out)
        self.score_between = _score_parameter(dim_out)
        self.score_stack = _score_parameter(dim_out)
        self.attended = nn.Linear(dim_in, dim_out)
        self.own = nn.Linear(dim_in, dim_out)
        self.attended_stack = nn.Linear(dim_in, dim_out)
        self.own_stack = nn.Linear(dim_in, dim_out)
        self.norm = nn.BatchNorm1d(dim_out)

    def forward(self, temporal: Tensor, spectral: Tensor, stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the updated temporal, spectral and stack nodes."""
        split = temporal.shape[1]
        nodes = torch.cat([self.lift_temporal(temporal), self.lift_spectral(spectral)], dim=1)
        nodes = functional.dropout(nodes, 0.2, self.training)

        pairs = torch.tanh(self.pair(nodes[:, :, None] * nodes[:, None]))
        # Every pair is scored by each of the three vectors in one product; which score counts depends on the pair's
        # kinds.
        scores = pairs @ torch.cat([self.score_temporal, self.score_spectral, self.score_between], dim=1)
        is_temporal = torch.arange(nodes.shape[1], device=nodes.device) < split
        same = is_temporal[:, None] == is_temporal[None]
        board = torch.where(same, torch.where(is_temporal[:, None], scores[..., 0], scores[..., 1]), scores[..., 2])
        attention = torch.softmax(board / COMBINED_TEMPERATURE, dim=-1)

        heard = torch.tanh(self.pair_stack(nodes * stack)) @ self.score_stack
        to_stack = torch.softmax(heard / COMBINED_TEMPERATURE, dim=1).transpose(1, 2)
        stack = self.attended_stack(to_stack @ nodes) + self.own_stack(stack)

        nodes = _normed(self.norm, self.attended(attention @ nodes) + self.own(nodes))
        return nodes[:, :split], nodes[:, split:], stack


class GraphPool(nn.Module):
    """Keep the best-scored share of the nodes, best first: [B, N, D] -> [B, max(int(N * ratio), 1), D]."""

    def __init__(self, ratio: float, dim: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.score = nn.Linear(dim, 1)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the kept nodes, weighted by their scores."""
        scores = torch.sigmoid(self.score(functional.dropout(nodes, 0.3, self.training)))
        keep = scores.topk(max(int(nodes.shape[1] * self.ratio), 1), dim=1).indices
        return (nodes * scores).gather(1, keep.expand(-1, -1, nodes.shape[2]))


class StackingBranch(nn.Module):
    """One of the two parallel branches: attention, pooling, attention again with a residual."""

    def __init__(self, dim_in: int, dim_out: int, ratio: float) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(1, 1, dim_in))
        self.first = HeterogeneousAttention(dim_in, dim_out)
        self.second = HeterogeneousAttention(dim_out, dim_out)
        self.pool_spectral = GraphPool(ratio, dim_out)
        self.pool_temporal = GraphPool(ratio, dim_out)

    def forward(self, temporal: Tensor, spectral: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the branch's temporal, spectral and stack nodes."""
        temporal, spectral, stack = self.first(temporal, spectral, self.stack)
        spectral, temporal = self.pool_spectral(spectral), self.pool_temporal(temporal)
        temporal_more, spectral_more, stack_more = self.second(temporal, spectral, stack)
        return (
            functional.dropout(temporal + temporal_more, 0.2, self.training),
            functional.dropout(spectral + spectral_more, 0.2, self.training),
            functional.dropout(stack + stack_more, 0.2, self.training),
        )


class GraphReadout(nn.Module):
    """The second half of AASIST: from spectral and temporal nodes to a readout and logits.

    Args:
        dim: features of a node.
        num_spectral: spectral nodes.
        graph_dims: node features after the first and second kind of graph attention.
        pool_ratios: share of nodes kept of the spectral graph, the temporal graph and the combined graphs.
    """

    def __init__(
        self,
        dim: int,
        num_spectral: int,
        graph_dims: tuple[int, int],
        pool_ratios: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.spectral_position = nn.Parameter(torch.randn(1, num_spectral, dim))
        self.spectral_attention = GraphAttention(dim, graph_dims[0])
        self.temporal_attention = GraphAttention(dim, graph_dims[0])
        self.pool_spectral = GraphPool(pool_ratios[0], graph_dims[0])
        self.pool_temporal = GraphPool(pool_ratios[1], graph_dims[0])
        self.branches = nn.ModuleList(StackingBranch(*graph_dims, pool_ratios[2]) for _ in range(2))
        self.head = nn.Linear(5 * graph_dims[1], 2)

    def readout(self, spectral: Tensor, temporal: Tensor) -> Tensor:
        """Spectral nodes [B, N_s, D] and temporal nodes [B, N_t, D] -> the readout before the head [B, 5 * D_out]."""
        spectral = self.pool_spectral(self.spectral_attention(spectral + self.spectral_position))
        temporal = self.pool_temporal(self.temporal_attention(temporal))
        (t1, s1, m1), (t2, s2, m2) = (branch(temporal, spectral) for branch in self.branches)
        temporal, spectral, stack = torch.maximum(t1, t2), torch.maximum(s1, s2), torch.maximum(m1, m2)
        readout = [temporal.abs().amax(1), temporal.mean(1), spectral.abs().amax(1), spectral.mean(1), stack[:, 0]]
        return torch.cat(readout, dim=1)

    def classify(self, readout: Tensor) -> Tensor:
        """The readout -> logits [B, 2]."""
        return self.head(functional.dropout(readout, 0.5, self.training))


class Aasist(GraphReadout):
    """The AASIST detector.

    Args:
        channels: output channels of the residual encoder's blocks.
        graph_dims, pool_ratios: see `GraphReadout`.
    """

    filters: Tensor

    def __init__(
        self,
        channels: tuple[int, ...],
        graph_dims: tuple[int, int],
        pool_ratios: tuple[float, float, float],
    ) -> None:
        super().__init__(channels[-1], SPECTRAL_NODES, graph_dims, pool_ratios)
        filters = sinc_filterbank(NUM_FILTERS, FILTER_TAPS, SAMPLE_RATE)
        self.register_buffer("filters", filters, persistent=False)
        self.front_norm = nn.BatchNorm2d(1)
        pairs = zip((1, *channels[:-1]), channels, strict=True)
        self.encoder = nn.Sequential(*(ResidualBlock(a, b, first=i == 0) for i, (a, b) in enumerate(pairs)))
        # Time steps that leave one column after the front end's and every block's pooling.
        self.min_samples = FILTER_TAPS - 1 + POOL ** (len(channels) + 1)

    def forward(self, wave: Tensor) -> Tensor:
        """Score a batch.

        Args:
            wave: [B, T] at 16 kHz, floating, T at least 2,315 samples (`min_samples`).

        Returns:
            Logits [B, 2], index 1 bona fide.

        Raises:
            TypeError: for integer samples.
            ValueError: for another shape or fewer samples.
        """
        return self.classify(self.embed(wave))

    def embed(self, wave: Tensor) -> Tensor:
        """Return the readout before the linear head: [B, T] -> [B, 5 * D]."""
        if wave.dim() != 2 or wave.shape[1] < self.min_samples:
            raise ValueError(f"`wave` must be [B, T] with T >= {self.min_samples}; found {list(wave.shape)}")
        if not wave.is_floating_point():
            raise TypeError(f"`wave` must be floating; found {wave.dtype}")
        bands = functional.conv1d(wave[:, None], self.filters.to(wave.dtype)).abs()[:, None]
        bands = functional.selu(self.front_norm(functional.max_pool2d(bands, POOL)), inplace=True)
        if bands.device.type == "cpu":
            # One channel is channels-last as it lies, once its strides say so; every later layer then stays in that
            # layout, in which a step on a CPU takes 0.7 of the time. The parameters keep theirs.
            bands = bands.squeeze(1).unsqueeze(-1).movedim(-1, 1)
        features = self.encoder(bands).abs()
        return self.readout(features.amax(3).transpose(1, 2), features.amax(2).transpose(1, 2))


class AasistBackEnd(GraphReadout):
    """AASIST over the features of a self-supervised front end: [B, T', C_in] -> logits [B, 2].

    Source: Tak et al., "Automatic speaker verification spoofing and deepfake detection using wav2vec 2.0 and data
    augmentation", Odyssey 2022, arXiv 2202.12233, and its public code. In place of the filter bank, a projection to 128
    features; in place of the maxima over time and frequency, attention over each.

    Args:
        in_width: features of the front end, C_in.
    """

    def __init__(self, in_width: int) -> None:
        width, channels = 128, (32, 32, 64, 64, 64, 64)
        super().__init__(channels[-1], width // POOL, (64, 32), (0.5, 0.5, 0.5))
        self.project = nn.Linear(in_width, width)
        self.front_norm = nn.BatchNorm2d(1)
        pairs = zip((1, *channels[:-1]), channels, strict=True)
        self.encoder = nn.Sequential(*(ResidualBlock(a, b, first=i == 0, pool=1) for i, (a, b) in enumerate(pairs)))
        self.encoder_norm = nn.BatchNorm2d(channels[-1])
        self.attention = nn.Sequential(
            nn.Conv2d(channels[-1], 128, 1), nn.SELU(), nn.BatchNorm2d(128), nn.Conv2d(128, channels[-1], 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Score features [B, T', C_in], T' at least 3; ValueError for fewer frames."""
        if features.shape[1] < POOL:
            raise ValueError(f"`features` must be [B, T', C] with T' >= {POOL}; found {list(features.shape)}")
        x = functional.max_pool2d(self.project(features).transpose(1, 2)[:, None], POOL)
        x = functional.selu(self.encoder_norm(self.encoder(functional.selu(self.front_norm(x)))))
        attention = self.attention(x)
        spectral = (x * attention.softmax(3)).sum(3).transpose(1, 2)
        temporal = (x * attention.softmax(2)).sum(2).transpose(1, 2)
        return self.classify(self.readout(spectral, temporal))


def aasist() -> Aasist:
    """AASIST as published: 297,866 parameters."""
    return Aasist((32, 32, 64, 64, 64, 64), (64, 32), (0.5, 0.7, 0.5))


def aasist_l() -> Aasist:
    """AASIST-L, the light variant as published: 85,306 parameters."""
    return Aasist((32, 32, 24, 24, 24, 24), (24, 32), (0.4, 0.5, 0.7))


# Official names, piece by piece, and ours.
_ATTENTION = {
    "att_proj": "pair",
    "att_weight": "score",
    "proj_with_att": "attended",
    "proj_without_att": "own",
    "bn": "norm",
}
_HETEROGENEOUS = {
    "proj_type1": "lift_temporal",
    "proj_type2": "lift_spectral",
    "att_proj": "pair",
    "att_projM": "pair_stack",
    "att_weight11": "score_temporal",
    "att_weight22": "score_spectral",
    "att_weight12": "score_between",
    "att_weightM": "score_stack",
    "proj_with_att": "attended",
    "proj_without_att": "own",
    "proj_with_attM": "attended_stack",
    "proj_without_attM": "own_stack",
    "bn": "norm",
}
_BLOCK = {"bn1": "unused_norm", "conv1": "conv_in", "bn2": "norm", "conv2": "conv_out", "conv_downsample": "shortcut"}
_MODULES = {
    "first_bn": ("front_norm", {}),
    **{f"encoder.{i}.0": (f"encoder.{i}", _BLOCK) for i in range(6)},
    "pos_S": ("spectral_position", {}),
    "master1": ("branches.0.stack", {}),
    "master2": ("branches.1.stack", {}),
    "GAT_layer_S": ("spectral_attention", _ATTENTION),
    "GAT_layer_T": ("temporal_attention", _ATTENTION),
    **{
        f"HtrgGAT_layer_ST{branch}{layer}": (f"branches.{branch - 1}.{name}", _HETEROGENEOUS)
        for branch in (1, 2)
        for layer, name in ((1, "first"), (2, "second"))
    },
    "pool_S": ("pool_spectral", {"proj": "score"}),
    "pool_T": ("pool_temporal", {"proj": "score"}),
    **{f"pool_hS{i}": (f"branches.{i - 1}.pool_spectral", {"proj": "score"}) for i in (1, 2)},
    **{f"pool_hT{i}": (f"branches.{i - 1}.pool_temporal", {"proj": "score"}) for i in (1, 2)},
    "out_layer": ("head", {}),
    # Over a self-supervised front end.
    "LL": ("project", {}),
    "first_bn1": ("encoder_norm", {}),
    "attention": ("attention", {}),
}


def our_key(official: str) -> str | None:
    """Return our name of an official state-dict key, None where there is none.

    >>> our_key("HtrgGAT_layer_ST12.att_weight11")
    'branches.0.second.score_temporal'
    """
    for prefix, (module, pieces) in _MODULES.items():
        if official == prefix or official.startswith(prefix + "."):
            first, _, rest = official[len(prefix) + 1 :].partition(".")
            return ".".join(part for part in (module, pieces.get(first, first), rest) if part)
    return None
