"""Detectors: waveform [B, T] at 16 kHz in, logits [B, 2] out; index 1 is bona fide."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gradalign.detectors.aasist import aasist, aasist_l, load_aasist
from gradalign.detectors.light import LightDetector

# One line per detector: its name and what builds it.
_DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "aasist": aasist,
    "aasist-l": aasist_l,
    "light": LightDetector,
}
# Detectors whose published checkpoints load by a key map.
_PUBLISHED: dict[str, Callable[[nn.Module, Path], None]] = {"aasist": load_aasist, "aasist-l": load_aasist}


def names() -> list[str]:
    """Return the names that `create` takes.

    >>> names()
    ['aasist', 'aasist-l', 'light']
    """
    return sorted(_DETECTORS)


def create(name: str, **options: Any) -> nn.Module:
    """Build a detector with random weights from PyTorch's global generator.

    Args:
        name: one of `names`.
        options: keyword arguments of that detector.

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


def load_published(name: str, path: str | Path) -> nn.Module:
    """Build a detector from its officially published weights.

    Args:
        name: "aasist" or "aasist-l".
        path: the official checkpoint, such as ``AASIST.pth`` of https://github.com/clovaai/aasist; loaded without
            executing anything in it.

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: for a name without published weights, or a file that does not hold exactly this model's weights,
            naming the file and the keys.
        FileNotFoundError: when the file is not there.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"published weights load into {', '.join(sorted(_PUBLISHED))}; found {name!r}")
    model = create(name)
    _PUBLISHED[name](model, Path(path))
    return model.eval()
