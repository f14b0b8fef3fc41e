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


def _average_spectrum(wave: np.ndarray, share: slice) -> np.ndarray:
    """Power spectrum [257] over a share of the 32 ms frames, ordered from the quietest to the loudest."""
    size = 512
    if len(wave) < 4 * size:
        wave = np.tile(wave, -(-4 * size // max(len(wave), 1)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[:: size // 4]
    order = np.argsort((frames**2).mean(1))
    chosen = frames[order[int(share.start * len(order)) : max(int(share.stop * len(order)), 4)]]
    window = np.hanning(size)
    return (np.abs(np.fft.rfft(chosen * window, axis=1)) ** 2).mean(0) / (window**2).sum()


def _shape(wave: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Filter by the amplitude response ``gain`` [257], with linear phase taken out."""
    size = 2 * (len(gain) - 1)
    return fftconvolve(wave, np.roll(np.fft.irfft(gain), size // 2) * np.hanning(size), "full")[size // 2 :][
        : len(wave)
    ]


def background_noise(wave: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Stationary noise of unit power with the spectrum of the quietest tenth of ``wave``: a recording's background."""
    gain = np.sqrt(_average_spectrum(wave, slice(0.0, 0.1)))
    noise = _shape(rng.standard_normal(num_samples), gain)
    return noise / (np.sqrt((noise**2).mean()) + 1e-12)


def match_spectrum(wave: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Give a clip the smoothed long-term spectrum of another, within 15 dB: the same voice colour and microphone."""
    smooth = np.hanning(7) / np.hanning(7).sum()
    own, wanted = (
        np.convolve(np.pad(np.log(_average_spectrum(v, slice(0.3, 1.0)) + 1e-12), 3, mode="edge"), smooth, "valid")
        for v in (unit_level(wave), unit_level(model))
    )
    limit = 15 / 20 * np.log(10)
    return _shape(wave, np.exp(np.clip((wanted - own) / 2, -limit, limit)))


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


def equalise(
    wave: np.ndarray, channel: str, model: np.ndarray | None, noise: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Give a clip, human or spoofed, the common treatment of its channel.

    Args:
        wave: the clip [T].
        channel: name of the codec pass.
        model: for spoofed clips, the human clip of the channel whose long-term spectrum they get; None for human ones.
        noise: a human clip of the channel that lends its background.
        rng: source of levels, edges, noise and dither.

    Returns:
        float64 [T'], T' <= T.
    """
    wave = trim(high_pass(wave), 30)
    # A random window of the speech: how a system begins and ends an utterance must not show, nor how long it speaks.
    size = int(len(wave) * rng.uniform(0.7, 0.95))
    start = int(rng.integers(0, len(wave) - size + 1))
    wave = unit_level(wave[start : start + size])
    if model is not None:
        # Twice, since the filter's own smoothing leaves a rest.
        wave = unit_level(match_spectrum(match_spectrum(wave, model), model))
    # A soft limiter: vocoders change the crest factor, and peaks must not tell the classes apart.
    wave = 3.0 * np.tanh(wave / 3.0)
    # The same background for all, above what the sources brought along.
    wave = wave + background_noise(noise, len(wave), rng) * 10 ** (rng.uniform(-26, -20) / 20)
    wave = CHANNELS[channel](wave * 10 ** (rng.uniform(-29, -23) / 20))
    wave = low_pass(high_pass(wave))
    wave = unit_level(wave) * 10 ** (rng.uniform(-32, -26) / 20)
    wave = wave / max(1.0, np.abs(wave).max(initial=0) / 0.99)
    ramp = np.minimum(1, np.minimum(np.arange(len(wave)), np.arange(len(wave))[::-1]) / 80)
    # Noise at the level of dither for all: no digital silence in one class only.
    return wave * ramp + rng.standard_normal(len(wave)) * 10 ** (-75 / 20)
