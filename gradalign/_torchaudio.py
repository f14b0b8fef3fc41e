"""torchaudio, which is needed for resampling, front ends and the corpus alone."""

from __future__ import annotations


def require_torchaudio() -> None:
    """Import torchaudio.

    Raises:
        ImportError: it is not installed, or it does not load with this PyTorch; the message says what to install.
    """
    try:
        import torchaudio  # noqa: F401
    except ImportError as error:
        raise ImportError("this needs the package torchaudio: pip install torchaudio") from error
    except (OSError, RuntimeError) as error:
        # Here, as `python -m gradalign.info` warns of a module that `import gradalign` has loaded before.
        from gradalign import info

        # Its own message asks for a torchaudio that matches, which there may be none of; pyproject.toml knows a pair.
        found = info.versions()
        raise ImportError(
            f"torchaudio {found['torchaudio']} does not load with PyTorch {found['torch']}. It says: "
            f"{str(error).rstrip('.')}. `pip install '.[train]'` in a checkout of gradalign takes two that go together"
        ) from error
