import csv
import gzip
import json
import os
import subprocess

import numpy as np
import pytest
import soundfile
from inputs import CLIPS
from scipy.signal import butter, sosfilt

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


def test_trim_cuts_silence_and_keeps_the_speech():
    rng = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(4000), 0.1 * rng.standard_normal(8000), np.zeros(6400)])
    kept = signal.trim(wave, 30)
    assert 8000 <= len(kept) <= 8000 + 6 * signal.FRAME
    np.testing.assert_array_equal(signal.trim(3 * wave, 30), 3 * kept)
    assert len(signal.trim(np.zeros(100), 30)) == 0


def test_unit_level_ignores_pauses():
    rng = np.random.default_rng(1)
    wave = 0.03 * rng.standard_normal(RATE)
    padded = np.concatenate([np.zeros(RATE), wave, np.zeros(RATE)])
    assert signal.active_rms(wave) == pytest.approx(signal.active_rms(padded), rel=1e-12)
    assert signal.active_rms(signal.unit_level(padded)) == pytest.approx(1, rel=1e-6)
    assert signal.active_rms(np.zeros(50)) == 0


def test_shorten_pauses_leaves_short_ones_alone():
    rng = np.random.default_rng(2)
    speech = 0.1 * rng.standard_normal(3200)

    def with_pause(seconds):
        return np.concatenate([speech, np.zeros(int(seconds * RATE)), speech])

    np.testing.assert_array_equal(signal.shorten_pauses(with_pause(0.05)), with_pause(0.05))
    # 80 ms of the pause, and a frame of margin at either side.
    assert len(signal.shorten_pauses(with_pause(0.7))) == 6400 + int(0.08 * RATE) + 2 * signal.FRAME


@pytest.mark.parametrize("crest_db", [7.0, 9.0])
def test_limit_crest_reaches_the_wanted_crest(crest_db):
    wave = speech_like(np.random.default_rng(3))
    limited = signal.limit_crest(wave, crest_db)
    assert 20 * np.log10(np.abs(limited).max() / signal.active_rms(limited)) == pytest.approx(crest_db, abs=0.01)
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
    assert tilt_db(signal.match_spectrum(bright, dark)) == pytest.approx(tilt_db(dark), abs=1)


def test_background_noise_has_the_spectrum_of_the_quiet_part():
    rng = np.random.default_rng(5)
    low = sosfilt(butter(4, 1000, fs=RATE, output="sos"), 0.001 * rng.standard_normal(RATE))
    wave = np.concatenate([low, rng.standard_normal(RATE)])
    noise = signal.background_noise(wave, RATE, rng)
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert np.sqrt((noise**2).mean()) == pytest.approx(1)
    assert power[:1500].sum() > 100 * power[1500:].sum()


@pytest.mark.parametrize("channel", sorted(signal.CHANNELS))
def test_codec_passes_keep_length_and_content(channel):
    wave = speech_like(np.random.default_rng(6))
    wave = signal.low_pass(wave)
    passed = signal.CHANNELS[channel](wave)
    assert len(passed) == len(wave) - (channel == "g722") * (len(wave) % 2)
    correlation = np.fft.irfft(np.fft.rfft(passed) * np.conj(np.fft.rfft(wave)))
    peak = np.abs(correlation).max() / np.sqrt((passed**2).sum() * (wave**2).sum())
    assert 0.9 < peak < 1 - 1e-6
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


def test_equalise_refuses_too_little_speech():
    rng = np.random.default_rng(8)
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


@pytest.mark.parametrize(("name", "language"), [("espeak-ng", "fr"), ("pico", "it")])
def test_speech_synthesis_speaks(name, language, tmp_path):
    spoken = [
        attacks.SPEAK[name]("un due tre quattro", language, np.random.default_rng(s), tmp_path) for s in (0, 0, 1)
    ]
    assert 0.8 * RATE < len(spoken[0]) < 5 * RATE
    assert 0.005 < signal.active_rms(spoken[0]) < 1
    np.testing.assert_array_equal(spoken[0], spoken[1])
    assert len(spoken[0]) != len(spoken[2])


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
    seen = [a for a in chosen.attacks if a.clips[0]]
    unseen = [a for a in chosen.attacks if not a.clips[0] and not a.clips[1] and a.clips[2]]
    assert len(seen) >= 4
    assert len(unseen) >= 4
    assert any(a.neural for a in unseen)
    assert len({s.name for s in chosen.speakers}) >= 8
    assert sum(s.clips for s in chosen.speakers) + sum(sum(a.clips) for a in chosen.attacks) >= 1500


# --------------------------------------------------------------------------------------------------------------- fetch


@pytest.fixture
def fake_debian(tmp_path, monkeypatch):
    """apt-get and dpkg-deb as scripts: a package is a file that holds its name; `log.txt` lists the calls."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    log = tmp_path / "log.txt"
    bodies = {
        "apt-get": 'case "$*" in *missing*) echo "E: Unable to locate package missing" >&2; exit 100;; '
        f'*download*) for n; do :; done; echo "$n" >> {log}; echo "$n" > "${{n}}_1.0_all.deb";; esac',
        "dpkg-deb": f'echo unpack >> {log}; mkdir -p "$3/usr"; cp "$2" "$3/usr/$(cat "$2")"',
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
    assert fake_debian.read_text().split() == ["one", "unpack", "two", "unpack"]
    sources.fetch(plan.Plan((), (), ("one", "two", "three"), (), {}), folder, reported.append)
    assert fake_debian.read_text().split()[4:] == ["three", "unpack"]


def test_fetch_names_the_package_that_cannot_be_had(fake_debian, tmp_path):
    with pytest.raises(DataError, match=r"downloading the Debian package missing failed.*Unable to locate"):
        sources.fetch(plan.Plan((), (), ("missing",), (), {}), tmp_path, lambda name: None)


def test_missing_tools_and_modules_are_named(monkeypatch):
    found = subprocess.run

    def run(command, **options):
        if command[-1] in broken:
            return subprocess.CompletedProcess(command, 1, stderr=f"Traceback\n{broken[command[-1]]}\n")
        return subprocess.CompletedProcess(command, 0) if command[1] == "-c" else found(command, **options)

    broken = {"import av": "ModuleNotFoundError: No module named 'av'", "import torchaudio": "RuntimeError: other CUDA"}
    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    named = r"av, torchaudio \(RuntimeError: other CUDA\); install them with `pip install '\.\[corpus\]'`"
    with pytest.raises(DataError, match=named):
        sources.check_tools()
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="`apt-get`, which is not on the PATH"):
        sources.check_tools()


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
    assert build_corpus("torn", progress=False) == torn  # a relative folder is the same folder
    assert before == {clip: clip.stat().st_mtime_ns for clip in before}
    assert not list((torn / "flac").glob(".*"))
    assert (torn / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()

    # Finished: verified, nothing fetched, nothing written.
    monkeypatch.setattr(sources, "fetch", die)
    assert build_corpus(whole, progress=False) == whole
    assert check_corpus(whole) == 26 + 6
    with pytest.raises(DataError, match="holds the profile 'default'; found profile='broken'"):
        build_corpus(whole, profile="broken")
    changed = clips[3].name
    (whole / "flac" / changed).write_bytes(b"")
    with pytest.raises(DataError, match=rf"1 of 32 files are missing or changed: flac/{changed}"):
        build_corpus(whole)


def test_a_spoofing_system_that_fails_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="spoofing system 'no-such' failed on 4 of 4 clips: KeyError"):
        build_corpus(tmp_path / "data", profile="broken", progress=False)


def test_another_plan_does_not_inherit_clips_of_a_killed_build(tmp_path):
    (tmp_path / "flac").mkdir()
    clip = build._Clip("GA_TRAIN_0001", "train", "june", "g722", "fr", "-", "a.g722", "", "b.g722")
    old = tmp_path / "flac" / "GA_TRAIN_0001.flac"
    build._forget_other_plan([clip], tmp_path, tmp_path)
    old.write_bytes(b"")
    build._forget_other_plan([clip], tmp_path, tmp_path)
    assert old.exists()
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
