"""torchaudio, which is needed for resampling, front ends and the corpus alone."""

from __future__ import annotations

import importlib.metadata

import torch


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
        # Its own message asks for a torchaudio that matches, which there may be none of.
        found = importlib.metadata.version("torchaudio")
        raise ImportError(
            f"torchaudio {found} does not load with PyTorch {torch.__version__} ({error}); it needs a PyTorch for the "
            "same CUDA, such as that of `pip install 'torch<2.15'` for torchaudio 2.11"
        ) from error
