"""Checkpoint files: tensors and plain values, written whole, read without executing pickled code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gradalign import _ranks
from gradalign._errors import CheckpointError
from gradalign._files import atomic_path


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; the old file stays whole if that fails.

    Raises:
        OSError: naming the file (a full disk).
    """
    # Not torch.save to the file itself: it reports a full disk as "unexpected pos 704 vs 598".
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


# The keys of a detector's weights, best.pt.
WEIGHTS: dict[str, Any] = {"keys": ("config", "model", "epoch", "dev_loss"), "optional": ("averaged_epochs",)}


def load_checkpoint(path: str | Path, keys: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Args:
        path: the file.
        keys: what it must hold; nothing is checked without any.
        optional: what it may hold too.

    Raises:
        CheckpointError: naming the file, when it is missing, damaged, holds more than tensors and plain values, lacks a
            key or has another one.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint; found nothing there")
    try:
        with path.open("rb") as file:
            # PyTorch does not compare the archive's checksums.
            damaged = zipfile.ZipFile(file).testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: expected tensors and plain values only; found pickled code") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint; found a damaged file: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a checkpoint; found {type(content).__name__}")
    missing = [key for key in keys if key not in content]
    unexpected = [str(key) for key in content if keys and key not in keys + optional]
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: expected the keys {', '.join(keys)}; missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(unexpected) or 'none'}"
        )
    return content


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Load a state dict that must fit exactly. Raises CheckpointError naming the file and what does not fit."""
    own = model.state_dict()
    problems = [f"unexpected key {key}" for key in state if key not in own]
    problems += [f"missing key {key}" for key in own if key not in state]
    problems += [
        f"{key} must be {list(own[key].shape)}, found {list(value.shape) if hasattr(value, 'shape') else value!r}"
        for key, value in state.items()
        if key in own and getattr(value, "shape", None) != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: weights do not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({key: _ranks.like(value, own[key]) for key, value in state.items()})
