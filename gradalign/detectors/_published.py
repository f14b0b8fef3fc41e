"""Officially published checkpoints, loaded into our modules by a key map; nothing in them is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from gradalign.detectors._import import expect_weights, read_torch_file


def load_official(model: nn.Module, path: Path, our_key: Callable[[str], str | None]) -> None:
    """Load an official checkpoint into ``model``: every key is used, every weight is set.

    ``our_key`` gives our name of an official key, "" for one that is known to be without effect, None where there is
    none.

    Raises:
        FileNotFoundError: when the file is not there.
        ValueError: for an unreadable or damaged file, or other keys or shapes, naming the file and them.
    """
    official = read_torch_file(path)
    # Keys that have no name here keep their own, and are unexpected below.
    named = {str(key): our_key(str(key)) for key in official}
    state = {named[str(key)] or str(key): value for key, value in official.items() if named[str(key)] != ""}
    no_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    expect_weights(path, state, model.state_dict(), no_tensors)
    model.load_state_dict(state)
