"""Detectors: waveform [B, T] at 16 kHz in, logits [B, 2] out; index 1 is bona fide."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gradalign.detectors._published import load_official
from gradalign.detectors.aasist import aasist, aasist_l
from gradalign.detectors.aasist import our_key as _aasist_key
from gradalign.detectors.conformer import our_key as _conformer_key
from gradalign.detectors.light import LightDetector
from gradalign.detectors.mamba import our_key as _mamba_key
from gradalign.detectors.rawnet2 import RawNet2
from gradalign.detectors.rawnet2 import our_key as _rawnet2_key
from gradalign.detectors.ssl import published_key, xlsr_aasist, xlsr_conformer_tcm, xlsr_mamba, xlsr_mlp

# One line per detector: its name and what builds it.
_DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "aasist": aasist,
    "aasist-l": aasist_l,
    "light": LightDetector,
    "rawnet2": RawNet2,
    "xlsr-aasist": xlsr_aasist,
    "xlsr-conformer-tcm": xlsr_conformer_tcm,
    "xlsr-mamba": xlsr_mamba,
    "xlsr-mlp": xlsr_mlp,
}
# Detectors whose published checkpoints load, and their key maps.
_PUBLISHED: dict[str, Callable[[str], str | None]] = {
    "aasist": _aasist_key,
    "aasist-l": _aasist_key,
    "rawnet2": _rawnet2_key,
    "xlsr-aasist": partial(published_key, _aasist_key),
    "xlsr-conformer-tcm": partial(published_key, _conformer_key),
    "xlsr-mamba": partial(published_key, _mamba_key),
}


def names() -> list[str]:
    """Return the names that `create` takes.

    >>> names()[:4]
    ['aasist', 'aasist-l', 'light', 'rawnet2']
    """
    return sorted(_DETECTORS)


def create(name: str, **options: Any) -> nn.Module:
    """Build a detector with random weights from PyTorch's global generator.

    Args:
        name: one of `names`.
        options: keyword arguments of that detector; those with a self-supervised front end take ``frontend``, the
            keywords of `frontend.create_frontend`.

    Returns:
        Module that maps a waveform [B, T] at 16 kHz (floating, in [-1, 1]) to logits [B, 2], index 1 bona fide.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an option the detector does not have.

    >>> import torch
    >>> create("light").eval()(torch.zeros(2, 16000)).shape
    torch.Size([2, 2])
    """
    if name not in _DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(names())}; found {name!r}")
    known = list(inspect.signature(_DETECTORS[name]).parameters)
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(
            f"detector {name!r} takes {', '.join(known) or 'no options'}; found {', '.join(map(repr, unknown))}"
        )
    return _DETECTORS[name](**options)


def load_published(name: str, path: str | Path, **options: Any) -> nn.Module:
    """Build a detector from its officially published weights.

    Args:
        name: "aasist", "aasist-l", "rawnet2", "xlsr-aasist", "xlsr-conformer-tcm" or "xlsr-mamba".
        path: the official checkpoint, such as ``AASIST.pth`` of https://github.com/clovaai/aasist, or that
            of the ASVspoof 2021 baseline RawNet2, of SSL_Anti-spoofing, of tcm_add or of XLSR-Mamba; loaded without
            executing anything in it.
        options: keywords of `create`, where the published model was made with others than its defaults.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: for a name without published weights, or a file that does not hold exactly this model's weights,
            naming the file and the keys.
        FileNotFoundError: when the file is not there.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"published weights load into {', '.join(sorted(_PUBLISHED))}; found {name!r}")
    model = create(name, **options)
    load_official(model, Path(path), _PUBLISHED[name])
    return model.eval()
