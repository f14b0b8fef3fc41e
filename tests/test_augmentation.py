import os
import resource
import time

import numpy as np
import pytest
import soundfile
import torch

from gradalign import RawBoost, augmentation
from gradalign._errors import AudioError


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    rng = np.random.default_rng(1)
    soundfile.write(source / "a.wav", rng.uniform(-0.5, 0.5, 4000), 16000, subtype="FLOAT")
    soundfile.write(source / "sub" / "b.flac", rng.uniform(-0.5, 0.5, (3000, 2)), 8000, subtype="PCM_24")
    return source


def run(source, target, **options):
    return augmentation.augment_files(augmentation.plan(source, target), **options)


def test_keeps_paths_rates_channels_and_formats(folder, tmp_path):
    result = run(folder, tmp_path / "out")
    assert (result.written, result.kept, result.skipped) == (2, 0, [])
    for name in ("a.wav", "sub/b.flac"):
        before, after = soundfile.info(str(folder / name)), soundfile.info(str(tmp_path / "out" / name))
        for key in ("samplerate", "channels", "frames", "format", "subtype"):
            assert getattr(before, key) == getattr(after, key)


def test_is_rawboost_with_the_seed_of_the_name(folder, tmp_path):
    run(folder, tmp_path / "out", algo=5, seed=3)
    wave, _ = soundfile.read(folder / "a.wav", dtype="float32")
    found, _ = soundfile.read(tmp_path / "out" / "a.wav", dtype="float32")
    seeds = torch.tensor([augmentation.file_seed("a.wav", 3)])
    expected = RawBoost(algo=5)(torch.from_numpy(wave)[None], seeds=seeds)[0].numpy()
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, wave)


def test_a_file_alone_gets_what_it_gets_in_its_folder(folder, tmp_path):
    run(folder, tmp_path / "all")
    run(folder / "a.wav", tmp_path / "alone.wav")
    assert (tmp_path / "all" / "a.wav").read_bytes() == (tmp_path / "alone.wav").read_bytes()


def test_seeds_differ_by_name_and_seed():
    seeds = {augmentation.file_seed(name, seed) for name in ("a", "b", "sub/a") for seed in range(3)}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_integer_formats_are_scaled_not_clipped(tmp_path):
    wave = np.where(np.arange(4000) % 40 < 20, 0.99, -0.99)
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="PCM_16")
    # SSI alone adds noise and normalises nothing, so its peak is above 1.
    result = run(tmp_path / "loud.wav", tmp_path / "out.wav", algo=3)
    assert result.scaled == 1
    found, _ = soundfile.read(tmp_path / "out.wav")
    assert np.abs(found).max() == pytest.approx(1.0, abs=1e-3)
    assert np.count_nonzero(np.abs(found) > 0.9995) <= 2


def test_never_overwrites_silently(folder, tmp_path):
    run(folder, tmp_path / "out")
    before = (tmp_path / "out" / "a.wav").read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.wav: already there \(2 of 2 outputs\); --overwrite"):
        run(folder, tmp_path / "out", seed=1)
    assert (tmp_path / "out" / "a.wav").read_bytes() == before
    assert run(folder, tmp_path / "out", seed=1, skip_existing=True).kept == 2
    assert (tmp_path / "out" / "a.wav").read_bytes() == before
    assert run(folder, tmp_path / "out", seed=1, overwrite=True).written == 2
    assert (tmp_path / "out" / "a.wav").read_bytes() != before


@pytest.mark.parametrize("kind", ["junk", "nan", "empty"])
def test_bad_files_are_named_or_skipped(folder, tmp_path, kind):
    bad = folder / "bad.wav"
    if kind == "junk":
        bad.write_bytes(b"RIFFjunk")
    else:
        soundfile.write(bad, np.full(100 if kind == "nan" else 0, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav: expected"):
        run(folder, tmp_path / "out")
    result = run(folder, tmp_path / "out", skip_bad=True, overwrite=True)
    assert result.written == 2
    assert [path for path, _ in result.skipped] == [bad]
    assert not (tmp_path / "out" / "bad.wav").exists()
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("slow", r"bad\.wav: expected a sample rate of at least 40 Hz; found 39 Hz"),
        ("loud", r"bad\.wav: expected a finite result; found NaN or Inf \(samples up to 5e\+08 going in\)"),
    ],
)
def test_files_that_cannot_be_augmented_are_named_or_skipped(folder, tmp_path, kind, message):
    wave = np.random.default_rng(2).uniform(-0.5, 0.5, 4000)
    bad = folder / "bad.wav"
    soundfile.write(bad, wave if kind == "slow" else 1e9 * wave, 39 if kind == "slow" else 16000, subtype="DOUBLE")
    with pytest.raises(AudioError, match=message):
        run(bad, tmp_path / "alone.wav")
    assert not list(tmp_path.glob("*alone*"))
    result = run(folder, tmp_path / "out", skip_bad=True)
    assert result.written == 2
    assert [path for path, _ in result.skipped] == [bad]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["a.wav", "b.flac"]


def test_outputs_inside_the_input_folder_are_no_inputs(folder):
    run(folder, folder / "out")
    assert [name for name, _, _ in augmentation.plan(folder, folder / "out")] == ["a.wav", "sub/b.flac"]


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"skip_existing": True}])
def test_an_input_is_never_replaced(folder, tmp_path, options):
    before = (folder / "a.wav").read_bytes()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.wav").symlink_to(folder / "a.wav")
    targets = [folder, tmp_path / "link", tmp_path / "links"]
    for source, target in [(folder / "a.wav", folder), *((folder, target) for target in targets)]:
        with pytest.raises(ValueError, match=r"a\.wav: expected another file than the inputs; found one of them"):
            run(source, target, **options)
    assert (folder / "a.wav").read_bytes() == before


@pytest.mark.parametrize("name", ["a.wav", "sub/b.flac"])
def test_a_full_disk_is_an_error_that_names_the_file(folder, tmp_path, name):
    run(folder, tmp_path / "whole")
    size, (soft, hard) = (tmp_path / "whole" / name).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '.*/out/{name}'"):
            run(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / name).exists()


def test_what_killed_runs_left_is_removed(folder, tmp_path):
    out = tmp_path / "out" / "sub"
    out.mkdir(parents=True)
    # The first is two hours old, the next is being written; the others are another file's, and none of ours.
    left = [".b.12-0123abcd.tmp.flac", ".b.34-0123abcd.tmp.flac", ".other.12-0123abcd.tmp.flac", ".b.tmp.flac"]
    for name in left:
        (out / name).touch()
        if "34" not in name:
            os.utime(out / name, (time.time() - 7200,) * 2)
    run(folder, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted([*left[1:], "b.flac"])


def test_impossible_plans(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent: expected an audio file or a folder"):
        augmentation.plan(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected '\.wav', found '\.flac'"):
        augmentation.plan(folder / "a.wav", tmp_path / "a.flac")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void: expected files ending in"):
        augmentation.plan(tmp_path / "void", tmp_path / "out")
