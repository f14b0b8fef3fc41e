"""Self-supervised front ends: XLS-R, wav2vec 2.0 and WavLM on torchaudio's models, wave [B, T] to features [B, T', C].

Sources: wav2vec 2.0 (Baevski et al., arXiv 2006.11477), XLS-R (Babu et al., arXiv 2111.09296), WavLM (Chen et al.,
arXiv 2110.13900). Their use here follows the published detectors: Tak et al., arXiv 2202.12233 (SSL_Anti-spoofing), and
those built on it (conformer_tcm, XLSR-Mamba).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradalign._torchaudio import require_torchaudio
from gradalign.detectors._import import load_weights

# Channels, taps and stride of each convolution of every published model: a frame sees 400 samples, and steps by 320.
_CONV_LAYERS = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a wav2vec 2.0 or WavLM encoder and its dropouts in training.

    Attributes:
        width: channels C of the features.
        num_layers: transformer layers.
        num_heads: attention heads of each.
        feed_forward: hidden units of each.
        layer_norm_first: normalise before attention and feed-forward ("stable layer norm"), not after.
        extractor_norm: "layer_norm" after every convolution, or "group_norm" after the first.
        conv_bias: whether convolutions have biases.
        conv_layers: (channels, taps, stride) of each convolution.
        pos_conv_taps: taps of the positional convolution.
        pos_conv_groups: its groups.
        num_buckets: relative positions of WavLM; 0: wav2vec 2.0.
        max_distance: largest relative position of WavLM that is told apart, in frames.
        input_dropout: after the projection of the convolutions' output.
        dropout: after attention, feed-forward and positional convolution.
        attention_dropout: of attention weights.
        layer_drop: chance of a layer to be skipped in a step.
    """

    width: int
    num_layers: int
    num_heads: int
    feed_forward: int
    layer_norm_first: bool
    extractor_norm: str
    conv_bias: bool
    conv_layers: tuple[tuple[int, int, int], ...] = _CONV_LAYERS
    pos_conv_taps: int = 128
    pos_conv_groups: int = 16
    num_buckets: int = 0
    max_distance: int = 0
    input_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_drop: float = 0.0

    @property
    def min_samples(self) -> int:
        """Samples that one frame of features needs."""
        samples = 1
        for _, taps, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + taps
        return samples

    def build(self) -> nn.Module:
        """Build torchaudio's model of this architecture, random, on the default device.

        Raises:
            ImportError: torchaudio is not installed, or does not load with this PyTorch.
        """
        require_torchaudio()
        from torchaudio.models import wav2vec2_model, wavlm_model

        shared: dict[str, Any] = {
            "extractor_mode": self.extractor_norm,
            "extractor_conv_layer_config": list(self.conv_layers),
            "extractor_conv_bias": self.conv_bias,
            "encoder_embed_dim": self.width,
            "encoder_projection_dropout": self.input_dropout,
            "encoder_pos_conv_kernel": self.pos_conv_taps,
            "encoder_pos_conv_groups": self.pos_conv_groups,
            "encoder_num_layers": self.num_layers,
            "encoder_num_heads": self.num_heads,
            "encoder_attention_dropout": self.attention_dropout,
            "encoder_ff_interm_features": self.feed_forward,
            "encoder_ff_interm_dropout": 0.0,
            "encoder_dropout": self.dropout,
            "encoder_layer_norm_first": self.layer_norm_first,
            "encoder_layer_drop": self.layer_drop,
            "aux_num_out": None,
        }
        if not self.num_buckets:
            return wav2vec2_model(**shared)
        return wavlm_model(**shared, encoder_num_buckets=self.num_buckets, encoder_max_distance=self.max_distance)

    def hugging_face_config(self) -> dict[str, Any]:
        """Give this architecture's entries of transformers' ``config.json``."""
        config: dict[str, Any] = {
            "model_type": "wavlm" if self.num_buckets else "wav2vec2",
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.feed_forward,
            "do_stable_layer_norm": self.layer_norm_first,
            "feat_extract_norm": self.extractor_norm.removesuffix("_norm"),
            "conv_bias": self.conv_bias,
            "conv_dim": [channels for channels, _, _ in self.conv_layers],
            "conv_kernel": [taps for _, taps, _ in self.conv_layers],
            "conv_stride": [stride for _, _, stride in self.conv_layers],
            "num_conv_pos_embeddings": self.pos_conv_taps,
            "num_conv_pos_embedding_groups": self.pos_conv_groups,
        }
        if self.num_buckets:
            config |= {"num_buckets": self.num_buckets, "max_bucket_distance": self.max_distance}
        return config


_BASE: dict[str, Any] = {
    "width": 768,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward": 3072,
    "layer_norm_first": False,
    "extractor_norm": "group_norm",
    "conv_bias": False,
}
_LARGE: dict[str, Any] = {
    "width": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward": 4096,
    "layer_norm_first": True,
    "extractor_norm": "layer_norm",
    "conv_bias": True,
}
_WAVLM: dict[str, Any] = {"num_buckets": 320, "max_distance": 800}
_DROPOUTS: dict[str, Any] = {"input_dropout": 0.1, "dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.05}

# Dropouts are those of torchaudio's pretrained bundles of these names; for XLS-R and wav2vec 2.0 they are also those of
# the fairseq checkpoints, with which the published detectors train.
ARCHITECTURES: dict[str, Architecture] = {
    "xlsr-300m": Architecture(**_LARGE),
    "xlsr-1b": Architecture(**_LARGE | {"width": 1280, "num_layers": 48, "feed_forward": 5120, "input_dropout": 0.1}),
    "wav2vec2-base": Architecture(**_BASE, **_DROPOUTS),
    "wavlm-base": Architecture(**_BASE, **_WAVLM, **_DROPOUTS),
    "wavlm-large": Architecture(**_LARGE | {"conv_bias": False}, **_WAVLM, **_DROPOUTS),
    "tiny": Architecture(
        **_LARGE | {"width": 32, "num_layers": 2, "num_heads": 4, "feed_forward": 64},
        conv_layers=tuple((16, taps, stride) for _, taps, stride in _CONV_LAYERS),
        pos_conv_taps=16,
        # Not 4: oneDNN's bfloat16 convolution of 4 to 12 channels a group gives wrong numbers on CPUs with AMX.
        pos_conv_groups=2,
    ),
}


class Frontend(nn.Module):
    """A self-supervised encoder as a detector's front end.

    The waveform goes in as it is. fairseq's pretraining of XLS-R normalises each waveform to zero mean and unit
    variance, but the published detectors (SSL_Anti-spoofing, conformer_tcm, XLSR-Mamba) do not, and neither does this.
    The features are those of the last layer after the encoder's last layer norm, unmasked, as published.

    A layer that layer drop skips is computed and not used: its gradient is zero rather than absent, all ranks of a
    distributed run do the same work, and the device is never waited for. WavLM's position bias, which its first layer
    computes for all, is there even when that layer is skipped.

    Args:
        architecture: sizes and dropouts.
        tune: what is trained: "all", "none", or the number of last transformer layers (with the norm after them).
            What is not trained has no gradients, keeps no activations and stays in evaluation mode.
        checkpointing: keep only each transformer layer's input for the backward pass, and compute the rest again.

    Raises:
        ValueError: ``tune`` is none of these.
        ImportError: torchaudio is not installed, or does not load with this PyTorch.
    """

    def __init__(self, architecture: Architecture, tune: str | int = "all", checkpointing: bool = False) -> None:
        super().__init__()
        # The first transformer layer that is trained.
        self._first_tuned = _first_tuned(tune, architecture.num_layers)
        self.architecture = architecture
        self.width = architecture.width
        self.tune = tune
        self.checkpointing = checkpointing
        self.model: Any = architecture.build()
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def _frozen(self) -> list[nn.Module]:
        if self.tune == "all":
            return []
        if self.tune == "none":
            return [self.model]
        encoder, transformer = self.model.encoder, self.model.encoder.transformer
        frozen = [self.model.feature_extractor, encoder.feature_projection]
        frozen += [transformer.pos_conv_embed, transformer.dropout, *transformer.layers[: self._first_tuned]]
        if not self.architecture.layer_norm_first:
            # This norm comes before the layers then.
            frozen.append(transformer.layer_norm)
        return frozen

    def train(self, mode: bool = True) -> Frontend:
        """Set the mode of what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, wave: Tensor) -> Tensor:
        """Compute features.

        Args:
            wave: [B, T] floating, 16 kHz, in [-1, 1]; B at least 1, T at least 400 (`Architecture.min_samples`).

        Returns:
            [B, T', C] in the parameters' dtype, under autocast too; one frame per 20 ms: T' = 201 for T = 64600.

        Raises:
            ValueError: another shape, not floating, or too short.
        """
        min_samples = self.architecture.min_samples
        if wave.ndim != 2 or wave.shape[0] == 0 or not wave.is_floating_point():
            raise ValueError(
                f"`wave` must be floating [B, T] with B >= 1; found {str(wave.dtype)[6:]} {list(wave.shape)}"
            )
        if wave.shape[1] < min_samples:
            raise ValueError(f"`wave` must have at least {min_samples} samples; found {wave.shape[1]}")
        encoder, transformer = self.model.encoder, self.model.encoder.transformer
        dtype = encoder.feature_projection.projection.weight.dtype
        with nullcontext() if self.tune == "all" else torch.no_grad():
            x, _ = self.model.feature_extractor(wave.to(dtype), None)
            x = encoder.feature_projection(x)
            x = x + transformer.pos_conv_embed(x)
            if not self.architecture.layer_norm_first:
                x = transformer.layer_norm(x)
            x = transformer.dropout(x)
            position_bias = None
            for layer in transformer.layers[: self._first_tuned]:
                x, position_bias = layer(x, None, position_bias)
        for layer in transformer.layers[self._first_tuned :]:
            x, position_bias = self._layer(layer, x, position_bias)
        if self.architecture.layer_norm_first:
            x = transformer.layer_norm(x)
        return x.to(dtype)

    def _layer(self, layer: nn.Module, x: Tensor, position_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layer_drop = self.architecture.layer_drop if self.training else 0.0
        # Drawn outside the checkpoint, which would have to draw it again.
        dropped = torch.rand((), device=x.device) < layer_drop if layer_drop else None
        if self.checkpointing and torch.is_grad_enabled():
            y, position_bias = checkpoint(layer, x, None, position_bias, use_reentrant=False)
        else:
            y, position_bias = layer(x, None, position_bias)
        return (y if dropped is None else torch.where(dropped, x, y)), position_bias


def _first_tuned(tune: str | int, num_layers: int) -> int:
    if tune == "all":
        return 0
    if tune == "none":
        return num_layers
    if isinstance(tune, int) and not isinstance(tune, bool) and 0 < tune <= num_layers:
        return num_layers - tune
    raise ValueError(f"`tune` must be 'all', 'none' or a number of layers from 1 to {num_layers}; found {tune!r}")


def names() -> list[str]:
    """Return the names that `create_frontend` takes.

    >>> names()
    ['tiny', 'wav2vec2-base', 'wavlm-base', 'wavlm-large', 'xlsr-1b', 'xlsr-300m']
    """
    return sorted(ARCHITECTURES)


def create_frontend(
    name: str = "xlsr-300m",
    weights: str | Path | None = None,
    tune: str | int = "all",
    checkpointing: bool = False,
) -> Frontend:
    """Build a self-supervised front end; see `Frontend` for what it computes.

    Args:
        name: "xlsr-300m", "xlsr-1b", "wav2vec2-base", "wavlm-base", "wavlm-large", or "tiny" for tests.
        weights: pretrained weights: a fairseq checkpoint (``xlsr2_300m.pt``) or Microsoft's of WavLM, a Hugging Face
            folder (``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``), or a state dict that was saved
            from torchaudio's model; None: random. Nothing in a file is executed, and it must hold exactly this model's
            weights, but for those that only pretraining uses (the quantizer and its projections, the loss's projections
            and label embeddings, the mask's embedding).
        tune: "all", "none", or the number of last transformer layers to train.
        checkpointing: compute activations of the transformer again in the backward pass instead of keeping them.

    Returns:
        Module with attribute ``width`` (C) that maps a waveform [B, T] at 16 kHz to features [B, T', C], float32.

    Raises:
        ValueError: an unknown name, or ``tune`` out of range.
        CheckpointError: the file is missing, unreadable or does not fit; the message names it and the keys.
        ImportError: torchaudio is not installed or does not load, or safetensors is not, for a file of its kind.

    >>> frontend = create_frontend("tiny", tune="none")
    >>> frontend(torch.zeros(2, 16000)).shape, frontend.width
    (torch.Size([2, 49, 32]), 32)
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"front end must be one of {', '.join(names())}; found {name!r}")
    architecture = ARCHITECTURES[name]
    if weights is None:
        return Frontend(architecture, tune, checkpointing)
    # Drawing random numbers for 300 million weights that are then overwritten takes seconds.
    with torch.device("meta"):
        frontend = Frontend(architecture, tune, checkpointing)
    frontend.to_empty(device="cpu")
    load_weights(frontend.model, Path(weights), architecture.hugging_face_config())
    return frontend
