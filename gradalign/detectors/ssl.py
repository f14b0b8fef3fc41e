"""Detectors made of a self-supervised front end and a back end over its features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradalign.detectors._import import fairseq_key
from gradalign.detectors.aasist import AasistBackEnd
from gradalign.detectors.conformer import ConformerTCM
from gradalign.detectors.frontend import create_frontend
from gradalign.detectors.mamba import DualColumnMamba
from gradalign.detectors.pooled import PooledMLP


class SSLDetector(nn.Module):
    """A front end and a back end: waveform [B, T] -> logits [B, 2], index 1 bona fide.

    Args:
        frontend: maps [B, T] to features [B, T', C].
        backend: maps features to logits.
    """

    def __init__(self, frontend: nn.Module, backend: nn.Module) -> None:
        super().__init__()
        self.frontend, self.backend = frontend, backend

    def forward(self, wave: Tensor) -> Tensor:
        """Score a batch; raises as the front end does."""
        return self.backend(self.frontend(wave))


def xlsr_aasist(frontend: dict[str, Any] | None = None) -> SSLDetector:
    """XLS-R and AASIST; ``frontend`` holds keywords of `create_frontend`."""
    features = create_frontend(**frontend or {})
    return SSLDetector(features, AasistBackEnd(features.width))


def xlsr_conformer_tcm(
    frontend: dict[str, Any] | None = None, width: int = 144, heads: int = 4, kernel: int = 31, layers: int = 4
) -> SSLDetector:
    """XLS-R and a Conformer with temporal-channel modelling; see `ConformerTCM`."""
    features = create_frontend(**frontend or {})
    return SSLDetector(features, ConformerTCM(features.width, width, heads, kernel, layers))


def xlsr_mamba(frontend: dict[str, Any] | None = None, width: int = 144, layers: int = 12) -> SSLDetector:
    """XLS-R and two columns of Mamba blocks; see `DualColumnMamba`."""
    features = create_frontend(**frontend or {})
    return SSLDetector(features, DualColumnMamba(features.width, width, layers))


def xlsr_mlp(frontend: dict[str, Any] | None = None, hidden: int = 256) -> SSLDetector:
    """XLS-R, pooled statistics and two layers; see `PooledMLP`."""
    features = create_frontend(**frontend or {})
    return SSLDetector(features, PooledMLP(features.width, hidden))


def published_key(backend_key: Callable[[str], str | None], official: str) -> str | None:
    """Our name of a weight of a published detector over fairseq's XLS-R; "" for one without effect, None unknown.

    >>> from gradalign.detectors.conformer import our_key
    >>> published_key(our_key, "ssl_model.model.encoder.layers.3.fc1.bias")
    'frontend.model.encoder.transformer.layers.3.feed_forward.intermediate_dense.bias'
    >>> published_key(our_key, "module.LL.bias")
    'backend.project.bias'
    """
    # Some were saved from nn.DataParallel.
    official = official.removeprefix("module.")
    if official.startswith("ssl_model.model."):
        ours = fairseq_key(official.removeprefix("ssl_model.model."))
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            ours = ours and ours.replace(f"conv.{old}", f"conv.parametrizations.weight.{new}")
        return ours and f"frontend.model.{ours}"
    ours = backend_key(official)
    return ours and f"backend.{ours}"
