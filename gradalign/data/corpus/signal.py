"""What makes the classes alike in everything but the speech itself: trimming, filters, noise, level, codec passes.

Waveforms are float64 [T] at 16 kHz unless a rate is given.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile
from scipy.signal import fftconvolve, firwin, resample_poly

RATE = 16000
FRAME = 160
# One low-pass for all: sources differ in bandwidth, and bandwidth must not tell the classes apart.
_LOW_PASS = firwin(255, 7000, fs=RATE)
_HIGH_PASS = firwin(2047, 90, fs=RATE, pass_zero=False)


def resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample by a polyphase filter."""
    if rate == new_rate:
        return np.asarray(wave, dtype=np.float64)
    divisor = np.gcd(rate, new_rate)
    return resample_poly(np.asarray(wave, dtype=np.float64), new_rate // divisor, rate // divisor)


def low_pass(wave: np.ndarray) -> np.ndarray:
    """Keep what lies below 7 kHz."""
    return fftconvolve(wave, _LOW_PASS, "same")


def high_pass(wave: np.ndarray) -> np.ndarray:
    """Keep what lies above 90 Hz, without hum and rumble."""
    return fftconvolve(wave, _HIGH_PASS, "same") if len(wave) else wave


def frame_energy(wave: np.ndarray) -> np.ndarray:
    """Mean square of each 10 ms frame."""
    return (wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME) ** 2).mean(1)


def trim(wave: np.ndarray, range_db: float) -> np.ndarray:
    """Cut leading and trailing frames that are more than ``range_db`` below the loud ones, leaving a frame of margin."""
    energy = frame_energy(wave)
    if len(energy) == 0:
        return wave[:0]
    level_db = np.convolve(10 * np.log10(energy + 1e-12), np.ones(3) / 3, "same")
    loud = np.flatnonzero(level_db > np.percentile(level_db, 98) - range_db)
    return wave[max(0, loud[0] - 1) * FRAME : (loud[-1] + 2) * FRAME] if len(loud) else wave[:0]


def active_rms(wave: np.ndarray) -> float:
    """Root mean square over the frames within 30 dB of the loudest."""
    energy = frame_energy(wave)
    if len(energy) == 0:
        return 0.0
    return float(np.sqrt(energy[energy >= energy.max() * 1e-3].mean()))


def unit_level(wave: np.ndarray) -> np.ndarray:
    """Scale to an active RMS of 1."""
    return wave / (active_rms(wave) + 1e-9)


def noise_like(wave: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Stationary noise with the spectrum and level of the quietest tenth of ``wave``: a recording's background."""
    size = 512
    if len(wave) < 12 * size:
        wave = np.tile(wave, -(-12 * size // max(len(wave), 1)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[:: size // 4]
    quiet = frames[np.argsort((frames**2).mean(1))[: max(4, len(frames) // 10)]]
    window = np.hanning(size)
    power = (np.abs(np.fft.rfft(quiet * window, axis=1)) ** 2).mean(0) / (window**2).sum()
    response = np.roll(np.fft.irfft(np.sqrt(power)), size // 2) * window
    return fftconvolve(rng.standard_normal(num_samples + size), response, "same")[size // 2 : size // 2 + num_samples]


# ------------------------------------------------------------------------------------------------------- codec passes


def _soundfile_pass(wave: np.ndarray, rate: int, **settings: str) -> np.ndarray:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, **settings) as file:
        file.write(np.clip(resample(wave, RATE, rate), -1, 1))
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer)
    return resample(decoded, rate, RATE)[: len(wave)]


def _g722_pass(wave: np.ndarray) -> np.ndarray:
    import av

    encoder, decoder = av.CodecContext.create("g722", "w"), av.CodecContext.create("g722", "r")
    encoder.sample_rate, encoder.format, encoder.layout = RATE, "s16", "mono"
    samples = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None, : len(samples) // 2 * 2], format="s16", layout="mono")
    frame.sample_rate = RATE
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoded = [part.to_ndarray()[0] for packet in packets for part in decoder.decode(packet)]
    return np.concatenate(decoded)[: len(wave)] / 32768


CHANNELS = {
    "g722": _g722_pass,
    "mp3": lambda wave: _soundfile_pass(wave, RATE, format="MP3", subtype="MPEG_LAYER_III"),
    "vorbis": lambda wave: _soundfile_pass(wave, 22050, format="OGG", subtype="VORBIS"),
}


def equalise(wave: np.ndarray, channel: str, background: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Give a clip, human or spoofed, the common treatment of its channel.

    Args:
        wave: the clip [T].
        channel: name of the codec pass.
        background: a human clip of that channel whose noise floor a synthetic clip gets; None for clips made of
            recordings.
        rng: source of the level, the edges and the dither.

    Returns:
        float64 [T'], T' <= T.
    """
    wave = unit_level(wave)
    if background is not None:
        wave = wave + noise_like(unit_level(background), len(wave), rng)
    wave = CHANNELS[channel](wave * 10 ** (rng.uniform(-29, -23) / 20))
    wave = trim(low_pass(high_pass(wave)), 30)
    # Up to 60 ms off either edge hides the trimming habits of each source.
    start, end = rng.integers(0, int(0.06 * RATE), 2)
    wave = wave[start : len(wave) - end]
    wave = unit_level(wave) * 10 ** (rng.uniform(-32, -26) / 20)
    wave = wave / max(1.0, np.abs(wave).max(initial=0) / 0.99)
    ramp = np.minimum(1, np.minimum(np.arange(len(wave)), np.arange(len(wave))[::-1]) / 80)
    # Noise at the level of dither for all: no digital silence in one class only.
    return wave * ramp + rng.standard_normal(len(wave)) * 10 ** (-75 / 20)
