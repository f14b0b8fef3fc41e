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
            f"torchaudio {found} does not load with PyTorch {torch.__version__}. It says: {str(error).rstrip('.')}. "
            "torchaudio 2.11 wants a PyTorch for CUDA 13.0: pip install 'torch<2.15'"
        ) from error
