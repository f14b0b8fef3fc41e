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
    divisor = np.gcd(rate, new_rate)
    return resample_poly(np.asarray(wave, dtype=np.float64), new_rate // divisor, rate // divisor)


def low_pass(wave: np.ndarray) -> np.ndarray:
    """Keep what lies below 7 kHz."""
    return fftconvolve(wave, _LOW_PASS, "same")


def high_pass(wave: np.ndarray) -> np.ndarray:
    """Keep what lies above 90 Hz, without hum and rumble."""
    return fftconvolve(wave, _HIGH_PASS, "same")


def frame_energy(wave: np.ndarray) -> np.ndarray:
    """Mean square of each 10 ms frame."""
    return (wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME) ** 2).mean(1)


def trim(wave: np.ndarray, range_db: float) -> np.ndarray:
    """Cut leading and trailing frames more than ``range_db`` below the loud ones, leaving a frame of margin."""
    energy = frame_energy(wave)
    if len(energy) == 0:
        return wave[:0]
    # The first and the last frame are repeated: zeros, which are full scale in dB, would pass for speech.
    level_db = np.convolve(np.pad(10 * np.log10(energy + 1e-12), 1, mode="edge"), np.ones(3) / 3, "valid")
    loud = np.flatnonzero(level_db > np.percentile(level_db, 98) - range_db)
    # None is where samples are not finite.
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
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[:: size // 4]
    order = np.argsort((frames**2).mean(1))
    chosen = frames[order[int(share.start * len(order)) : int(share.stop * len(order))]]
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
    """Give a clip the smoothed long-term spectrum of another, within 15 dB; the active RMS becomes 1."""
    smooth = np.hanning(7) / np.hanning(7).sum()
    own, wanted = (
        np.convolve(np.pad(np.log(_average_spectrum(v, slice(0.3, 1.0)) + 1e-12), 3, mode="edge"), smooth, "valid")
        for v in (unit_level(wave), unit_level(model))
    )
    limit = 15 / 20 * np.log(10)
    return unit_level(_shape(wave, np.exp(np.clip((wanted - own) / 2, -limit, limit))))


def shorten_pauses(wave: np.ndarray, longest_s: float = 0.08) -> np.ndarray:
    """Cut what lies within pauses after their first ``longest_s`` seconds; a pause is 28 dB below the speech."""
    count = len(wave) // FRAME
    wave = wave[: count * FRAME]
    if count < 3:
        return wave
    quiet = 10 * np.log10(frame_energy(wave) + 1e-12) < 20 * np.log10(active_rms(wave) + 1e-9) - 28
    # Onsets and endings of speech are quiet too: keep a frame at either side of it.
    quiet = np.convolve(quiet, np.ones(3), "same") >= 3
    keep, run = np.ones(count, dtype=bool), 0
    for index, is_quiet in enumerate(quiet):
        run = run + 1 if is_quiet else 0
        keep[index] = run * FRAME <= longest_s * RATE
    return wave.reshape(count, FRAME)[keep].ravel()


def limit_crest(wave: np.ndarray, crest_db: float) -> np.ndarray:
    """Bend the peaks down to ``crest_db`` above the active RMS, which becomes 1; quieter peaks stay as they are."""
    wave, wanted = unit_level(wave), 10 ** (crest_db / 20)
    if np.abs(wave).max() <= wanted:
        return wave
    low, high = 0.01, 100.0
    # The crest grows with the threshold of the hyperbolic tangent: bisect it.
    for _ in range(30):
        middle = np.sqrt(low * high)
        bent = middle * np.tanh(wave / middle)
        if np.abs(bent).max() > wanted * active_rms(bent):
            high = middle
        else:
            low = middle
    return unit_level(bent)


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


def equalise(wave: np.ndarray, channel: str, lender: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give a clip the treatment that all clips of its channel get, human and spoofed alike.

    Only a random window of the speech is kept, its pauses shortened and others put around it; the long-term spectrum
    and the background are those of a random human clip; crest factor and level are drawn; the codec and the filters
    are the channel's. What is left to tell the classes apart is the speech.

    Args:
        wave: the clip [T].
        channel: name of the codec pass.
        lender: the human clip of the channel that lends long-term spectrum and background.
        rng: source of window, pauses, levels, noise and dither.

    Returns:
        float64 [T'].

    Raises:
        ValueError: when less than 0.8 s of speech is left.
    """
    # A random window of the speech: how a system begins and ends an utterance must not show, nor how long it speaks.
    wave = shorten_pauses(trim(high_pass(wave), 30))
    size = int(len(wave) * rng.uniform(0.7, 0.95))
    if size < 0.8 * RATE:
        raise ValueError(f"expected 0.8 s of speech after trimming; found {size / RATE:.2f} s")
    start = int(rng.integers(0, len(wave) - size + 1))
    wave = wave[start : start + size]
    # Three times, since the filter's own smoothing leaves a rest.
    for _ in range(3):
        wave = match_spectrum(wave, lender)
    # Vocoders change the crest factor.
    wave = limit_crest(wave, rng.uniform(8.0, 9.5))
    ramp = np.minimum(1, np.minimum(np.arange(size), np.arange(size)[::-1]) / 80)
    before, after = (int(seconds * RATE) for seconds in rng.uniform(0.06, 0.25, 2))
    wave = np.pad(wave * ramp, (before, after))
    # Above the backgrounds that the sources brought along.
    wave = wave + background_noise(lender, len(wave), rng) * 10 ** (rng.uniform(-36, -30) / 20)
    wave = CHANNELS[channel](wave * 10 ** (rng.uniform(-29, -23) / 20))
    wave = unit_level(low_pass(high_pass(wave))) * 10 ** (rng.uniform(-32, -26) / 20)
    # Noise at the level of dither for all: no digital silence in one class only.
    return wave + rng.standard_normal(len(wave)) * 10 ** (-75 / 20)
