import errno
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gradalign.data import (
    AudioError,
    DataError,
    SpeechDataset,
    Utterance,
    epoch_plan,
    find_audio,
    fit_length,
    load_batches,
    read_audio,
    read_protocol,
    utterance_draws,
)
from gradalign.data.audio import list_audio, read_header
from gradalign.data.dataset import collate
from gradalign.data.protocol import expect_disjoint


def write(path, samples, rate=16000, subtype="PCM_16"):
    soundfile.write(str(path), samples, rate, subtype=subtype)
    return path


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


# ---- audio ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg"])
def test_read_audio_returns_the_samples_that_were_written(tmp_path, suffix):
    t = np.arange(16000) / 16000
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    path = write(tmp_path / f"a.{suffix}", tone, subtype="VORBIS" if suffix == "ogg" else "PCM_16")
    wave = read_audio(path, 16000)
    assert wave.dtype == torch.float32
    assert wave.shape == (16000,)
    # One 16-bit step (the WAV writer cuts off, it does not round); Vorbis is lossy.
    tolerance = 0.02 if suffix == "ogg" else 1 / 32768
    assert np.abs(wave.numpy() - tone).max() <= tolerance


def test_read_audio_averages_channels(tmp_path):
    left, right = noise(100, 1), noise(100, 2)
    path = write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, 16000).numpy(), (left + right) / 2, rtol=0, atol=1e-8)


def test_read_audio_resamples_only_when_asked(tmp_path):
    t = np.arange(8000) / 8000
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 300 * t), rate=8000)
    with pytest.raises(AudioError, match=r"a\.wav: expected a sample rate of 16000 Hz; found 8000 Hz"):
        read_audio(path, 16000)
    wave = read_audio(path, 16000, resample=True).numpy()
    assert wave.shape == (16000,)
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    assert np.abs(wave - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("rate", [44100, 22050, 11025, 48000, 8000, 32000, 24000])
def test_usual_rates_are_resampled_both_ways(tmp_path, rate):
    for old, new in ((rate, 16000), (16000, rate)):
        path = write(tmp_path / "a.wav", noise(old // 10), rate=old)
        assert abs(len(read_audio(path, new, resample=True)) - new / 10) <= 1


def test_rates_that_share_no_factor_are_named(tmp_path):
    path = write(tmp_path / "a.wav", noise(4410), rate=44099)
    with pytest.raises(AudioError, match=r"a\.wav: expected .* to 16000 Hz .*; found 44099 Hz \(44099:16000\)"):
        read_audio(path, 16000, resample=True)


def test_missing_audio_is_named(tmp_path):
    with pytest.raises(AudioError, match=r"nothing\.flac: expected an audio file; found nothing there"):
        read_audio(tmp_path / "nothing.flac", 16000)


def test_unreadable_audio_is_named(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(b"this is no FLAC file at all" * 20)
    with pytest.raises(AudioError, match=r"a\.flac: expected a readable audio file; found: "):
        read_audio(path, 16000)


@pytest.mark.parametrize("suffix", ["flac", "wav"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_audio_is_named(tmp_path, suffix, share):
    path = write(tmp_path / f"a.{suffix}", noise(16000))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(AudioError, match=rf"a\.{suffix}: expected"):
        read_audio(path, 16000)


@pytest.mark.parametrize("promised", [0, 2**36 - 1])
def test_a_header_without_the_number_of_samples_or_with_too_many_is_named(tmp_path, promised):
    path = write(tmp_path / "a.flac", noise(5000))
    content = bytearray(path.read_bytes())
    # STREAMINFO: 36 bits, from the low half of byte 21.
    content[21:26] = ((content[21] >> 4 << 36) | promised).to_bytes(5, "big")
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.flac: expected "):
        read_audio(path, 16000)
    if promised == 0:
        with pytest.raises(AudioError, match=r"a\.flac: expected the number of samples in its header; found none"):
            read_header(path)


def test_hidden_files_and_folders_are_not_listed(tmp_path):
    for name in ("t.wav", "sub/a.FLAC", ".b.wav", "sub/._a.flac", ".git/c.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_audio(tmp_path) == [tmp_path / "sub" / "a.FLAC", tmp_path / "t.wav"]
    assert list_audio(tmp_path, (".flac",)) == [tmp_path / "sub" / "a.FLAC"]


def test_wav_with_trailing_and_odd_chunks_is_not_taken_for_truncated(tmp_path):
    path = write(tmp_path / "a.wav", noise(333))
    content = path.read_bytes()
    path.write_bytes(content[:12] + b"note" + (3).to_bytes(4, "little") + b"abc\0" + content[12:] + b"junk\0\0\0\0")
    assert read_audio(path, 16000).shape == (333,)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AudioError, match=r"a\.wav: expected 333 samples by its header; found 2\d\d"):
        read_audio(path, 16000)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_written_to_a_pipe_is_not_taken_for_truncated(tmp_path, size):
    path = write(tmp_path / "a.wav", noise(333))
    content = path.read_bytes()
    at = content.index(b"data") + 4
    path.write_bytes(content[:at] + size.to_bytes(4, "little") + content[at + 4 :])
    assert read_header(path).frames == 333
    np.testing.assert_allclose(read_audio(path, 16000).numpy(), noise(333), rtol=0, atol=1 / 32768)


@pytest.mark.parametrize("subtype", ["GSM610", "NMS_ADPCM_16", "NMS_ADPCM_32", "G721_32"])
def test_wav_that_libsndfile_cannot_seek_in_is_read(tmp_path, subtype):
    t = np.arange(8000) / 8000
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 300 * t), rate=8000, subtype=subtype)
    wave = read_audio(path, 8000).numpy()
    assert len(wave) == read_header(path).frames >= 8000
    assert wave.std() == pytest.approx(0.5 / 2**0.5, rel=0.2)


@pytest.mark.parametrize("read", [lambda path: read_audio(path, 16000), read_header])
def test_empty_audio_is_named(tmp_path, read):
    path = write(tmp_path / "a.wav", np.zeros(0))
    with pytest.raises(AudioError, match=r"a\.wav: expected at least one sample; found none"):
        read(path)


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3", "ogg"])
def test_read_header_says_what_read_audio_finds(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([noise(4000, 1), noise(4000, 2)], 1), 8000)
    header = read_header(path)
    assert header == (4000, 8000, 2)
    assert read_audio(path, 8000).shape == (4000,)


@pytest.mark.parametrize("form", ["WAV", "WAVEX"])
def test_read_header_finds_truncated_wav_files(tmp_path, form):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(16000), 16000, format=form)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(AudioError, match=r"a\.wav: expected 16000 samples by its header; found 44\d\d"):
        read_header(path)


def test_an_old_libsndfile_is_named_where_it_cannot_read_mp3(tmp_path, monkeypatch):
    (tmp_path / "a.mp3").write_bytes(b"whatever such a libsndfile cannot read")
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "FLAC": ""})
    monkeypatch.setattr(soundfile, "__libsndfile_version__", "1.0.31")
    with pytest.raises(AudioError, match=r"a\.mp3: expected libsndfile 1\.1 or newer, to read MP3; found 1\.0\.31"):
        read_audio(tmp_path / "a.mp3", 16000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_audio_that_is_not_finite_is_named(tmp_path, value):
    samples = noise(100)
    samples[57] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: expected finite samples; found NaN or Inf"):
        read_audio(path, 16000)


def test_find_audio_tries_suffixes_and_names_what_it_looked_for(tmp_path):
    (tmp_path / "speaker").mkdir()
    (tmp_path / "speaker" / "a.wav").touch()
    (tmp_path / "b.c.flac").touch()
    assert find_audio(tmp_path, "speaker/a") == tmp_path / "speaker" / "a.wav"
    assert find_audio(tmp_path, "speaker/a.wav") == tmp_path / "speaker" / "a.wav"
    assert find_audio(tmp_path, "b.c") == tmp_path / "b.c.flac"
    with pytest.raises(AudioError, match=r"c: expected a file ending in \.flac, .*; found none"):
        find_audio(tmp_path, "c")


@pytest.mark.parametrize("own", [True, False], ids=["path", "name"])
def test_audio_in_a_folder_that_cannot_be_searched_is_named_and_skipped(tmp_path, monkeypatch, own):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Root may search every folder.
    monkeypatch.setattr(Path, "is_file", refuse)
    utterance = Utterance("a", "s", "-", 1, path=tmp_path / "a.wav" if own else None)
    with pytest.raises(AudioError, match=r"a(\.wav)?: expected .*; found: .*Permission denied"):
        SpeechDataset([utterance], tmp_path)[0]
    assert "Permission denied" in SpeechDataset([utterance], tmp_path, skip_bad=True)[0].bad


@pytest.mark.parametrize("length", [1, 2, 127, 500, 999, 1000])
def test_fit_length_repeats_as_published(length):
    wave = torch.arange(length)
    published = np.tile(wave.numpy(), (1, int(1000 / length) + 1))[:, :1000][0]
    np.testing.assert_array_equal(fit_length(wave, 1000).numpy(), published)


def test_fit_length_crops_from_the_start_given():
    wave = torch.arange(70000)
    assert fit_length(wave).shape == (64600,)
    assert fit_length(wave)[0] == 0
    assert fit_length(wave, 64600, start=5400)[-1] == 69999
    with pytest.raises(ValueError, match=r"`start` must be in \[0, 5400\]; found 5401"):
        fit_length(wave, 64600, start=5401)
    with pytest.raises(ValueError, match=r"`start` must be in \[0, 5400\]; found -1"):
        fit_length(wave, 64600, start=-1)
    for wrong in (torch.zeros(0), torch.zeros(1, 70000)):
        with pytest.raises(ValueError, match=r"`wave` must be \[T\] with T > 0; found \[(0|1, 70000)\]"):
            fit_length(wrong)
    with pytest.raises(ValueError, match=r"`num_samples` must be at least 1; found 0"):
        fit_length(wave, 0)


# ---- protocol ------------------------------------------------------------------------------------------------------


def test_read_protocol_of_the_published_form(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("LA_0079 LA_T_1138215 - - bonafide\n\n# a remark\n#another\nLA_0079 LA_T_1004644 - A01 spoof\n")
    assert read_protocol(path) == [
        Utterance("LA_T_1138215", "LA_0079", "-", 1),
        Utterance("LA_T_1004644", "LA_0079", "A01", 0),
    ]
    assert [u.label_name for u in read_protocol(path)] == ["bonafide", "spoof"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("s a - - bonafide\ns b - A01 spoofed\n", r":2: expected the label bonafide or spoof; found 'spoofed'"),
        ("s a - - bonafide\ns b A01 spoof\n", r":2: expected the 5 columns `.*`; found 4: 's b A01 spoof'"),
        (
            "s a - - bonafide\n\ns a - A01 spoof\n",
            r":3: expected each utterance once; found 'a' again \(see line 1\)",
        ),
        ("", r": expected at least one line `speaker utterance - attack label`; found none"),
        ("# only a remark\n\n", r": expected at least one line"),
    ],
)
def test_a_wrong_protocol_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "dev.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"dev\.txt" + message):
        read_protocol(path)


def test_a_protocol_that_is_missing_or_binary_is_named(tmp_path):
    with pytest.raises(DataError, match=r"dev\.txt: expected a protocol file; found nothing there"):
        read_protocol(tmp_path / "dev.txt")
    (tmp_path / "dev.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"dev\.txt: expected a text file; found bytes that are not UTF-8"):
        read_protocol(tmp_path / "dev.txt")
    (tmp_path / "dev.txt").write_bytes(b"s a\0 - - bonafide\n")
    with pytest.raises(DataError, match=r"dev\.txt: expected a text file; found binary data"):
        read_protocol(tmp_path / "dev.txt")


def test_a_protocol_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path):
    (tmp_path / "dev.txt").write_bytes(b"\xef\xbb\xbfs a - - bonafide\r\ns b - A01 spoof\r\n")
    assert read_protocol(tmp_path / "dev.txt") == [Utterance("a", "s", "-", 1), Utterance("b", "s", "A01", 0)]


@pytest.mark.parametrize("own", [True, False], ids=["path", "name"])
def test_files_are_shared_by_where_they_are_not_by_what_they_are_called(tmp_path, monkeypatch, own):
    def split(folder, name):
        return folder, [Utterance(name, "s", "-", 1, path=tmp_path / folder / name if own else None)]

    monkeypatch.chdir(tmp_path)
    splits = {"train": split(tmp_path / "a", "x"), "dev": split(tmp_path / "b", "x")}
    expect_disjoint(splits)
    # A path of its own counts, whatever the utterance is called; a folder may be written in several ways.
    again = split(Path("b/../a"), "x")
    if own:
        again = tmp_path / "c", [Utterance("y", "s", "-", 1, path=tmp_path / "a" / "x")]
    with pytest.raises(DataError, match=r"expected other files in test than in train; found 1 in both, such as '[xy]'"):
        expect_disjoint({**splits, "test": again})


# ---- data set ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i, length in enumerate([400, 2500, 1000, 4000, 1500]):
        write(tmp_path / f"u{i}.flac", noise(length, i))
    return tmp_path


def utterances(count=5):
    return [Utterance(f"u{i}", "s", "-" if i % 2 else "A01", i % 2) for i in range(count)]


def dataset(folder, **options):
    return SpeechDataset(utterances(), folder, num_samples=1000, **{"seed": 3, "random_crop": True, **options})


def test_examples_hold_crops_of_the_files(folder):
    data = dataset(folder)
    for i in range(5):
        example, whole = data[i], read_audio(folder / f"u{i}.flac", 16000).numpy()
        assert example.wave.shape == (1000,)
        assert (example.label, example.row, example.length) == (i % 2, i, min(len(whole), 1000))
        windows = np.lib.stride_tricks.sliding_window_view(np.tile(whole, 3), 1000)[: max(1, len(whole) - 999)]
        assert (windows == example.wave.numpy()).all(1).any()


def test_an_utterance_may_name_its_own_file(folder, tmp_path):
    own = write(tmp_path / "elsewhere.wav", noise(700, 7))
    data = SpeechDataset(
        [Utterance("u1", "s", "-", 1, path=own), Utterance("u1", "s", "-", 1)], folder, num_samples=700
    )
    assert torch.equal(data[0].wave, read_audio(own, 16000))
    assert torch.equal(data[1].wave, read_audio(folder / "u1.flac", 16000)[:700])


def test_crops_depend_on_seed_epoch_and_utterance_alone(folder):
    def first(epoch=0, order=(0, 1, 2, 3, 4), **options):
        data = dataset(folder, **options)
        data.set_epoch(epoch)
        found = {i: data[i] for i in order}
        return torch.stack([found[i].wave for i in range(5)]), [found[i].seed for i in range(5)]

    waves, seeds = first()
    again, seeds_again = first(order=(4, 2, 0, 1, 3))
    assert torch.equal(waves, again)
    assert seeds == seeds_again
    assert len(set(seeds)) == 5
    for other, other_seeds in (first(epoch=1), first(seed=4)):
        # Utterances 0 and 2 are not longer than the crop: they are the same in every epoch, their augmentation is not.
        assert (waves == other).all(1).tolist() == [True, False, True, False, False]
        assert not set(seeds) & set(other_seeds)
    assert utterance_draws(1, 11, "a") != utterance_draws(11, 1, "a")
    start, _ = first(random_crop=False)
    assert torch.equal(start[3], read_audio(folder / "u3.flac", 16000)[:1000])


def test_crop_starts_are_uniform():
    starts = np.array([utterance_draws(0, epoch, f"u{i}")[1] % 10 for epoch in range(50) for i in range(200)])
    counts = np.bincount(starts, minlength=10)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    # 99.9% quantile of chi-square with 9 degrees of freedom.
    assert chi_square < 27.9


def test_the_cache_changes_nothing(folder):
    write(folder / "u0.wav", noise(700, 9), subtype="FLOAT")
    (folder / "u0.flac").unlink()
    plain, cached = dataset(folder), dataset(folder, cache_mb=1)
    for _ in range(2):
        for i in range(5):
            assert torch.equal(plain[i].wave, cached[i].wave)
    for path in folder.iterdir():
        path.unlink()
    assert torch.equal(cached[3].wave, cached[3].wave)
    with pytest.raises(AudioError):
        plain[3]


def test_the_cache_holds_no_more_than_it_may(tmp_path):
    """16-bit audio takes two bytes a sample: of three files of 0.6 MB, one fits into 1 MB, and then a small one."""
    sizes = {"a": 300_000, "b": 300_000, "c": 1000}
    paths = [write(tmp_path / f"{name}.flac", noise(size)) for name, size in sizes.items()]
    data = SpeechDataset([Utterance(name, "s", "-", 1) for name in sizes], tmp_path, cache_mb=1)
    waves = [data[i].wave for i in range(3)]
    for path in paths:
        path.unlink()
    assert torch.equal(data[0].wave, waves[0])
    assert torch.equal(data[2].wave, waves[2])
    with pytest.raises(AudioError, match="expected a file"):
        data[1]


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_16"])
def test_changing_an_example_does_not_change_the_cache(folder, subtype):
    write(folder / "u1.wav", noise(2500, 9), subtype=subtype)
    (folder / "u1.flac").unlink()
    data, plain = dataset(folder, cache_mb=1), dataset(folder)
    for _ in range(3):
        wave = data[1].wave
        assert torch.equal(wave, plain[1].wave)
        wave.mul_(0.5)


def test_file_names_that_are_not_utf_8_can_be_used(folder):
    expected = read_audio(folder / "u1.flac", 16000)[:1000]
    path = (folder / "u1.flac").rename(folder / "caf\udce9.flac")
    for utterance in (Utterance("caf\udce9", "s", "-", 1), Utterance("caf\udce9", "s", "-", 1, path=path)):
        data = SpeechDataset([utterance], folder, num_samples=1000)
        assert torch.equal(data[0].wave, expected)
    assert utterance_draws(0, 0, "caf\udce9") != utterance_draws(0, 0, "caf\udce8")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_load_batches_reads_a_plan_in_order_and_lists_bad_files(folder, num_workers):
    (folder / "u1.flac").write_bytes(b"no audio")
    data = dataset(folder)
    state = torch.get_rng_state()
    batches = list(load_batches(data, [[4, 1, 0], [1], [2, 3]], num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [b.row.tolist() for b in batches] == [[4, 0], [], [2, 3]]
    assert [[row for row, _ in b.bad] for b in batches] == [[1], [1], []]
    assert "u1.flac: expected a readable audio file" in batches[0].bad[0][1]
    assert "Traceback" not in batches[0].bad[0][1]
    assert [tuple(b.wave.shape) for b in batches] == [(2, 1000), (0, 1000), (2, 1000)]
    assert torch.equal(batches[2].wave[1], data[3].wave)
    assert batches[2].label.tolist() == [0, 1]
    assert batches[2].seed.tolist() == [data[2].seed, data[3].seed]
    assert batches[0].length.tolist() == [1000, 400]
    views = load_batches(data, [[1], [2]], num_workers=num_workers, augment=lambda wave, lengths, seeds: -wave)
    assert [torch.equal(batch.augmented, -batch.wave) for batch in views] == [True, True]


def test_batches_are_made_of_examples_only():
    with pytest.raises(TypeError, match=r"those of a gradalign data set \(Example\); found tuple"):
        collate([(torch.zeros(4), 1)])


def test_epoch_plans_are_permutations_that_follow_from_seed_and_epoch():
    plan = epoch_plan(103, 10, seed=1, epoch=2)
    assert [len(b) for b in plan] == [10] * 10
    assert len({i for b in plan for i in b}) == 100
    assert plan == epoch_plan(103, 10, seed=1, epoch=2)
    assert plan != epoch_plan(103, 10, seed=1, epoch=3)
    assert plan != epoch_plan(103, 10, seed=2, epoch=2)
    assert sorted(epoch_plan(7, 10, seed=0, epoch=0)[0]) == list(range(7))
