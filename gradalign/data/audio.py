"""Audio files: soundfile decodes and encodes, several channels are averaged, torchaudio resamples when asked to."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradalign._errors import AudioError
from gradalign._files import atomic_path
from gradalign._torchaudio import require_torchaudio

if TYPE_CHECKING:
    from soundfile import SoundFile

SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
"""Suffixes that `find_audio` tries, in this order."""

# libsndfile's count where a FLAC header gives none; no file holds a part of it.
_UNKNOWN_FRAMES = 2**62

# Coefficients of torchaudio's kernel, which is made anew for each file: the product of both rates, each over their
# greatest common divisor. So many take 0.3 GB and half a second.
_LARGEST_KERNEL = 2**24


def find_audio(folder: str | Path, utterance: str) -> Path:
    """Find an utterance's audio file: ``folder/<utterance>`` as it stands, or with the first of `SUFFIXES` there is.

    An utterance may hold folders (``speaker/a``). Raises AudioError naming what was looked for, also where a folder
    cannot be searched.
    """
    folder = Path(folder)
    for suffix in ("", *SUFFIXES):
        path = folder / f"{utterance}{suffix}"
        try:
            if path.is_file():
                return path
        except OSError as error:
            raise AudioError(f"{path}: expected an audio file; found: {error.strerror}") from None
    raise AudioError(f"{folder / utterance}: expected a file ending in {', '.join(SUFFIXES)}; found none")


def list_audio(folder: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """All audio files below a folder, sorted. Hidden files and folders are left out: no part of one that a killed
    writer left, and nothing a system keeps for itself, is anybody's data.
    """
    found = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, n) for n in names if n.lower().endswith(tuple(suffixes)) and not n.startswith(".")]
    return sorted(found)


class AudioHeader(NamedTuple):
    """What an audio file says of itself: ``frames`` samples per channel, ``sample_rate`` in Hz, ``channels``."""

    frames: int
    sample_rate: int
    channels: int


def read_header(path: str | Path) -> AudioHeader:
    """Read an audio file's header, without decoding the samples.

    Raises:
        AudioError: naming the file, when it is missing, no audio, empty, or a WAV file shorter than its header says (a
            truncated file of another format is only found by decoding it: `read_audio`).
    """
    with opened(path) as file:
        header = AudioHeader(file.frames, file.samplerate, file.channels)
        promised = _promised_frames(Path(path), file)
    _expect_samples(path, header.frames, promised)
    return header


def read_audio(path: str | Path, sample_rate: int, resample: bool = False) -> Tensor:
    """Read a whole audio file as one channel.

    Args:
        path: FLAC, WAV, OGG, MP3 or whatever else libsndfile decodes.
        sample_rate: of the result, Hz.
        resample: convert files of another rate (torchaudio, Hann-windowed sinc); otherwise they are an error.

    Returns:
        float32 [T], full scale at 1; the mean over channels.

    Raises:
        AudioError: naming the file, when it is missing, unreadable, truncated, empty, holds NaN or Inf, or has another
            sample rate (with ``resample``, one that shares so small a factor with ``sample_rate``, such as 44,099 Hz
            with 16,000, that the kernel would take gigabytes).
        ImportError: ``resample`` needs torchaudio, which is not installed or does not load with this PyTorch.
    """
    with opened(path) as file:
        wave, rate = read_channels(path, file), file.samplerate
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError(f"{path}: expected finite samples; found NaN or Inf")
    result = torch.from_numpy(np.ascontiguousarray(mono))
    if rate != sample_rate:
        if not resample:
            raise AudioError(
                f"{path}: expected a sample rate of {sample_rate} Hz; found {rate} Hz (--resample or `resample` "
                "converts such files)"
            )
        common = math.gcd(rate, sample_rate)
        old, new = rate // common, sample_rate // common
        if old * new > _LARGEST_KERNEL:
            raise AudioError(
                f"{path}: expected a sample rate in a ratio to {sample_rate} Hz whose terms have a product of at most "
                f"{_LARGEST_KERNEL}, to be resampled; found {rate} Hz ({old}:{new})"
            )
        require_torchaudio()
        from torchaudio.functional import resample as convert

        result = convert(result, rate, sample_rate)
    return result


def read_channels(path: str | Path, file: SoundFile) -> np.ndarray:
    """All samples float32 [T, channels] of an `opened` file; AudioError where it is truncated or empty."""
    promised = _promised_frames(Path(path), file)
    # All frames by their number: without it soundfile asks for a file it can seek in, as it cannot in GSM 6.10.
    wave = file.read(file.frames, dtype="float32", always_2d=True)
    _expect_samples(path, len(wave), promised)
    return wave


def write_audio(path: str | Path, wave: np.ndarray, sample_rate: int, form: str, subtype: str) -> None:
    """Write [T] or [T, channels] atomically, in a format and a subtype of soundfile.

    Raises:
        OSError: naming the file (a full disk).
    """
    import soundfile

    # Not to the file itself: libsndfile ends a FLAC file that no longer fits the disk without an error.
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, sample_rate, format=form, subtype=subtype)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


@contextmanager
def opened(path: str | Path) -> Iterator[SoundFile]:
    """An open sound file; whatever soundfile says against it in the block becomes an AudioError that names it."""
    import soundfile

    try:
        if not Path(path).is_file():
            raise AudioError(f"{path}: expected an audio file; found nothing there")
        # The name as bytes: soundfile takes no str that is not UTF-8.
        with soundfile.SoundFile(os.fsencode(path)) as file:
            if file.frames > _UNKNOWN_FRAMES:
                raise AudioError(
                    f"{path}: expected the number of samples in its header; found none (a truncated file?)"
                )
            yield file
    except AudioError:
        raise
    # NumPy's errors, too, for a header that promises more samples than memory holds.
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, MemoryError) as error:
        if Path(path).suffix.lower() == ".mp3" and "MP3" not in soundfile.available_formats():
            raise AudioError(
                f"{path}: expected libsndfile 1.1 or newer, to read MP3; found {soundfile.__libsndfile_version__} "
                "(`pip install -U soundfile` brings a newer one)"
            ) from None
        # Without the file's name, which is there already.
        found = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        raise AudioError(f"{path}: expected a readable audio file; found: {found.rstrip('.')}") from None


def _expect_samples(path: str | Path, found: int, promised: int) -> None:
    if found < promised:
        raise AudioError(f"{path}: expected {promised} samples by its header; found {found} (a truncated file?)")
    if found == 0:
        raise AudioError(f"{path}: expected at least one sample; found none")


def _promised_frames(path: Path, file: SoundFile) -> int:
    return max(file.frames, _promised_wav_frames(path)) if file.format in ("WAV", "WAVEX") else file.frames


def _promised_wav_frames(path: Path) -> int:
    """The length a RIFF header announces; libsndfile shortens it silently to what is there. 0 where it is not known."""
    frame_bytes = 0
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return 0
        file.seek(12)
        while len(header := file.read(8)) == 8:
            kind, size = header[:4], int.from_bytes(header[4:], "little")
            if kind == b"fmt ":
                frame_bytes = int.from_bytes(file.read(size)[12:14], "little")
            elif kind == b"data":
                # Writers to a pipe leave the size open: as 0, all ones, or the largest that a signed number holds.
                known = frame_bytes > 0 and size < 0x7FFF0000
                return size // frame_bytes if known else 0
            else:
                file.seek(size, 1)
            file.seek(size % 2, 1)
    return 0


def fit_length(wave: Tensor, num_samples: int = 64600, start: int | None = None) -> Tensor:
    """Crop or repeat an utterance to a fixed length, as the published detectors do.

    Args:
        wave: [T], T > 0.
        num_samples: of the result.
        start: first sample of the crop, 0 <= start <= T - num_samples; None is 0. Shorter utterances are repeated from
            their beginning and take no start above 0.

    Returns:
        [num_samples], of wave's dtype; a view of it where that is possible.

    Raises:
        ValueError: naming expected and found.

    >>> fit_length(torch.tensor([1, 2, 3]), 7)
    tensor([1, 2, 3, 1, 2, 3, 1])
    >>> fit_length(torch.tensor([1, 2, 3]), 2, start=1)
    tensor([2, 3])
    """
    if wave.ndim != 1 or len(wave) == 0:
        raise ValueError(f"`wave` must be [T] with T > 0; found {list(wave.shape)}")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1; found {num_samples}")
    first = 0 if start is None else start
    if not 0 <= first <= max(0, len(wave) - num_samples):
        raise ValueError(f"`start` must be in [0, {max(0, len(wave) - num_samples)}]; found {first}")
    if len(wave) >= num_samples:
        return wave[first : first + num_samples]
    return wave.repeat(num_samples // len(wave) + 1)[:num_samples]
