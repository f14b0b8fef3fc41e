import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from inputs import config_of

from gradalign import cli
from gradalign._checkpoint import load_checkpoint
from gradalign._parts import open_split
from gradalign.config import TrainConfig
from gradalign.data import (
    AudioError,
    DataError,
    PackedDataset,
    SpeechDataset,
    Utterance,
    is_packed,
    load_batches,
    pack,
    packed_splits,
)
from gradalign.data.packed import verify
from gradalign.trainer import train

# One sample, shorter than, as long as and longer than the crop of 1000.
LENGTHS = [400, 1, 1000, 4000, 1001, 2500, 999]


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def utterances(count=7):
    attacks = ["-", "A01", "A02"]
    return [Utterance(f"u{i}", f"s{i % 2}", attacks[i % 3], int(i % 3 == 0), "alaw") for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("audio")
    for i, length in enumerate(LENGTHS):
        soundfile.write(root / f"u{i}.flac", noise(length, i), 16000, subtype="PCM_16")
    return root


@pytest.fixture
def own(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "audio")


@pytest.fixture
def packed(folder, tmp_path):
    pack({"train": utterances()}, tmp_path / "packed", audio_dir=folder, shard_utterances=3)
    return tmp_path / "packed"


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def assert_same_examples(found, expected):
    assert torch.equal(found.wave, expected.wave)
    assert found.wave.dtype == expected.wave.dtype
    assert found[1:] == expected[1:]


# ---- the same as the files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("num_samples", [1, 1000, 5000])
def test_examples_are_those_of_the_files_bit_for_bit(folder, packed, num_samples, random_crop):
    options = {"num_samples": num_samples, "seed": 5, "random_crop": random_crop}
    files, shards = SpeechDataset(utterances(), folder, **options), PackedDataset(packed, "train", **options)
    assert shards.utterances == files.utterances
    assert (len(shards), shards.sample_rate) == (len(files), files.sample_rate)
    for epoch in (0, 3):
        files.set_epoch(epoch)
        shards.set_epoch(epoch)
        for i in range(len(files)):
            assert_same_examples(shards[i], files[i])


def test_batches_are_those_of_the_files_for_any_number_of_workers(folder, packed):
    plan = [[4, 1, 0], [6], [2, 3]]
    expected = list(load_batches(SpeechDataset(utterances(), folder, num_samples=1000, seed=1), plan))
    for num_workers in (0, 2):
        found = list(
            load_batches(PackedDataset(packed, "train", num_samples=1000, seed=1), plan, num_workers=num_workers)
        )
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def test_raw_examples_are_the_stored_samples_of_the_same_crops(packed):
    options = {"num_samples": 1000, "seed": 2, "random_crop": True}
    raw, whole = PackedDataset(packed, "train", raw=True, **options), PackedDataset(packed, "train", **options)
    for i in range(len(raw)):
        a, b = raw[i], whole[i]
        assert a.wave.dtype == torch.int16
        assert torch.equal(a.wave / 32768, b.wave[: b.length])
        assert (a.length, a.seed, len(a.wave)) == (b.length, b.seed, b.length)
        assert a.wave.untyped_storage().nbytes() == 2 * a.length


def test_every_16_bit_value_survives(tmp_path):
    every = np.arange(-32768, 32768).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", every, 16000)
    pack({"all": [Utterance("a", "s", "-", 1)]}, tmp_path / "packed", audio_dir=tmp_path)
    raw = PackedDataset(tmp_path / "packed", "all", num_samples=65536, raw=True)
    np.testing.assert_array_equal(raw[0].wave.numpy(), every)
    np.testing.assert_array_equal(np.load(tmp_path / "packed" / "all" / "00000.npy"), every)


def test_paths_of_utterances_come_before_the_folder(folder, tmp_path):
    named = [Utterance("other", "s", "-", 1, path=folder / "u3.flac")]
    pack({"dev": named}, tmp_path / "packed", audio_dir=tmp_path / "nowhere")
    found = PackedDataset(tmp_path / "packed", "dev", num_samples=700)[0]
    assert torch.equal(found.wave, SpeechDataset(named, tmp_path, num_samples=700)[0].wave)


def test_a_packed_data_set_can_be_sent_to_another_process(packed):
    data = PackedDataset(packed, "train", num_samples=1000)
    example = data[3]
    sent = pickle.dumps(data)
    assert len(sent) < 5000
    assert_same_examples(pickle.loads(sent)[3], example)


def test_names_that_are_not_utf_8_are_packed(folder, tmp_path):
    names = {"dev": [Utterance("caf\udce9", "s", "-", 1, path=folder / "u3.flac")]}
    for _ in range(2):
        pack(names, tmp_path / "packed")
        assert PackedDataset(tmp_path / "packed", "dev")[0].label == 1
        # As a killed run leaves it: the list of the shard is read again.
        (tmp_path / "packed" / "index.json").rename(tmp_path / "packed" / "plan.json")
    assert pack(names, tmp_path / "packed").kept == 1
    assert PackedDataset(tmp_path / "packed", "dev").utterances[0].name == "caf\udce9"


# ---- samples that 16 bits do not hold ------------------------------------------------------------------------------


def write_floats(path):
    steps = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, -0.5, -1.5, 32766.5], np.float32)
    soundfile.write(path, steps / 32768, 16000, subtype="FLOAT")


def test_other_samples_are_refused_unless_rounding_is_asked_for(tmp_path):
    write_floats(tmp_path / "a.wav")
    names = {"train": [Utterance("a", "s", "-", 1)]}
    with pytest.raises(DataError, match=r"a\.wav: expected samples that 16 bits hold exactly; found others .*--round"):
        pack(names, tmp_path / "packed", audio_dir=tmp_path, skip_bad=True)
    result = pack(names, tmp_path / "rounded", audio_dir=tmp_path, round_samples=True)
    assert (result.rounded, result.clipped, result.samples) == (1, 0, 10)
    stored = np.load(tmp_path / "rounded" / "train" / "00000.npy")
    assert stored.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, -2, 32766]


def test_samples_beyond_full_scale_are_cut_and_counted(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([1.0, -1.0, 3.0, -3.0], np.float32), 16000, subtype="FLOAT")
    result = pack({"x": [Utterance("a", "s", "-", 1)]}, tmp_path / "p", audio_dir=tmp_path, round_samples=True)
    assert (result.rounded, result.clipped) == (1, 1)
    assert np.load(tmp_path / "p" / "x" / "00000.npy").tolist() == [32767, -32768, 32767, -32768]


def test_files_of_24_bits_and_of_16_bits_in_floats(tmp_path):
    exact = (np.random.default_rng(0).integers(-32768, 32768, 500) / 32768).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", exact, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.flac", exact, 16000, subtype="PCM_24")
    names = [Utterance(n, "s", "-", 1) for n in "ab"]
    assert pack({"x": names}, tmp_path / "p", audio_dir=tmp_path).rounded == 0
    data = PackedDataset(tmp_path / "p", "x", num_samples=500)
    assert all(np.array_equal(data[i].wave.numpy(), exact) for i in range(2))


def test_other_rates_are_refused_unless_resampling_is_asked_for(folder, tmp_path):
    soundfile.write(tmp_path / "slow.wav", noise(800, 1), 8000, subtype="PCM_16")
    names = [Utterance("slow", "s", "-", 1), Utterance("u3", "s", "-", 1, path=folder / "u3.flac")]
    with pytest.raises(AudioError, match=r"slow\.wav: expected a sample rate of 16000 Hz; found 8000 Hz"):
        pack({"x": names}, tmp_path / "p", audio_dir=tmp_path)
    result = pack({"x": names}, tmp_path / "q", audio_dir=tmp_path, resample=True)
    assert result.rounded == 1
    files = SpeechDataset(names, tmp_path, num_samples=1600, resample=True)
    shards = PackedDataset(tmp_path / "q", "x", num_samples=1600)
    assert torch.equal(shards[1].wave, files[1].wave)
    assert 0 < (shards[0].wave - files[0].wave).abs().max() <= 2**-16


# ---- resuming ------------------------------------------------------------------------------------------------------

PACK = """
import sys, time
from gradalign.data import Utterance, packed
names = [Utterance(f"u{i}", "s", "-" if i % 2 else "A01", i % 2) for i in range(int(sys.argv[3]))]
read = packed.read_audio
def slow(*arguments):
    time.sleep(0.02)
    return read(*arguments)
packed.read_audio = slow
packed.pack({"train": names[:4], "dev": names[4:]}, sys.argv[2], audio_dir=sys.argv[1], shard_utterances=2, workers=2)
"""


def test_killed_at_any_point_and_resumed_gives_the_same_bytes(folder, tmp_path):
    names = [Utterance(f"u{i}", "s", "-" if i % 2 else "A01", i % 2) for i in range(len(LENGTHS))]
    splits = {"train": names[:4], "dev": names[4:]}
    options = {"audio_dir": folder, "shard_utterances": 2}
    pack(splits, tmp_path / "whole", workers=1, **options)
    expected = content(tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PACK, str(folder), str(out), str(len(LENGTHS))]
    process = subprocess.Popen(command)
    # Kill it as soon as the first shard is whole: the second is under way.
    deadline = time.monotonic() + 60
    while not (out / "train" / "00000.tsv").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    kept = (out / "train" / "00000.npy").stat().st_mtime_ns
    with pytest.raises(DataError, match=r"killed: expected a finished packed data set; found one begun"):
        PackedDataset(out, "train")
    assert is_packed(out)
    # What a kill between two steps, or within one, may leave.
    (out / "train" / ".00001.123.tmp.npy").write_bytes(b"half")
    (out / "train" / "00001.npy").write_bytes(b"whole, but without its list")
    (out / "train" / "00001.tsv").unlink(missing_ok=True)
    pack(splits, out, **options)
    assert content(out) == expected
    assert (out / "train" / "00000.npy").stat().st_mtime_ns == kept


@pytest.mark.parametrize("step", range(8))
def test_a_run_that_stops_between_any_two_files_goes_on(folder, tmp_path, monkeypatch, step):
    """Each file that is written is one point to stop at: the plan, three times samples and list, the index."""
    names = {"train": utterances()}
    options = {"audio_dir": folder, "shard_utterances": 3, "workers": 1}
    pack(names, tmp_path / "whole", **options)
    replace, calls = os.replace, []

    def stop(*arguments):
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(arguments)
        replace(*arguments)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(names, tmp_path / "out", **options)
    monkeypatch.undo()
    pack(names, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def change(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damaged", "damage"),
    [
        ("00001.npy", lambda path: os.truncate(path, 60)),
        ("00001.npy", lambda path: flip(path, 128 + 2 * 4000 + 1)),
        ("00001.npy", lambda path: flip(path, 100)),
        ("00001.npy", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        ("00001.tsv", lambda path: os.truncate(path, 60)),
        ("00001.tsv", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("00001.tsv", change(b"label", b"label2")),
        ("00001.tsv", change(b"\tspoof", b"\tbonafide")),
        ("00001.tsv", change(b"\t4000\t1001\t", b"\t4001\t1001\t")),
        ("00001.tsv", change(b"\t4000\t1001\t", b"\t4000\t1002\t")),
    ],
    ids=["cut", "sample", "header", "more", "list cut", "no line end", "columns", "label", "offset", "length"],
)
def test_a_shard_damaged_before_the_end_is_written_anew(folder, packed, damaged, damage):
    whole = content(packed)
    # As a kill before the index leaves it.
    plan = json.loads((packed / "index.json").read_text())["plan"]
    (packed / "plan.json").write_text(json.dumps({"plan": plan}))
    (packed / "index.json").unlink()
    damage(packed / "train" / damaged)
    assert content(packed)[f"train/{damaged}"] != whole[f"train/{damaged}"]
    # The others are kept: all utterances but the three of this shard.
    assert pack({"train": utterances()}, packed, audio_dir=folder, shard_utterances=3).kept == len(LENGTHS) - 3
    assert content(packed) == whole


def test_packing_again_changes_nothing_and_other_data_are_refused(folder, packed):
    before = {p: p.stat().st_mtime_ns for p in packed.rglob("*")}
    again = pack({"train": utterances()}, packed, audio_dir=folder, shard_utterances=3)
    assert (again.utterances, again.samples, again.bad) == (len(LENGTHS), sum(LENGTHS), [])
    assert {p: p.stat().st_mtime_ns for p in packed.rglob("*")} == before
    for splits, options in (
        ({"train": utterances(5)}, {"shard_utterances": 3}),
        ({"dev": utterances()}, {"shard_utterances": 3}),
        ({"train": utterances()}, {"shard_utterances": 4}),
        ({"train": utterances()}, {"shard_utterances": 3, "sample_rate": 8000, "round_samples": True}),
    ):
        with pytest.raises(DataError, match=r"index\.json: expected the same data and settings as now; found others"):
            pack(splits, packed, audio_dir=folder, **options)
    assert {p: p.stat().st_mtime_ns for p in packed.rglob("*")} == before


LENIENT = ("resample", "round_samples", "skip_bad")


def write_refused(folder, lenient):
    """A file that is refused without one of the settings."""
    if lenient == "skip_bad":
        (folder / "u5.flac").write_bytes(b"no audio")
        return "expected a readable audio file"
    rate = 8000 if lenient == "resample" else 16000
    soundfile.write(folder / "u5.flac", noise(LENGTHS[5], 5), rate, subtype="PCM_24")
    return "expected a sample rate of" if lenient == "resample" else "expected samples that 16 bits hold"


@pytest.mark.parametrize("lenient", LENIENT)
def test_a_refused_file_loses_no_finished_shard(own, tmp_path, lenient):
    refused = write_refused(own, lenient)
    names, out = {"train": utterances()}, tmp_path / "out"
    options = {"audio_dir": own, "shard_utterances": 2}
    pack(names, tmp_path / "whole", **options, **{lenient: True})
    with pytest.raises(DataError, match=rf"u5\.flac: {refused}"):
        pack(names, out, **options)
    before = {p: p.stat().st_mtime_ns for p in (out / "train").iterdir()}
    assert sorted(p.name for p in before) == ["00000.npy", "00000.tsv", "00001.npy", "00001.tsv"]
    result = pack(names, out, **options, **{lenient: True})
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (result.utterances, result.kept) == (7, 4)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("lenient", LENIENT)
def test_a_folder_begun_with_looser_settings_is_not_gone_on_with(own, tmp_path, monkeypatch, lenient):
    """Also where the looser run stopped before its first shard: a finished one may hold what is refused now."""
    refused = write_refused(own, lenient)
    names, out = {"train": utterances()}, tmp_path / "out"
    options = {"audio_dir": own, "shard_utterances": 2, "workers": 1}
    with pytest.raises(DataError, match=refused):
        pack(names, out, **options)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradalign.data.packed._write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(names, out, **options, **{lenient: True})
    monkeypatch.undo()
    others = {name: True for name in LENIENT if name != lenient}
    for name in ("plan", "index"):
        for settings in ({}, others):
            message = rf"{name}\.json: expected settings no looser than now; found `{lenient}` \(--[a-z-]+\) \(give the"
            with pytest.raises(DataError, match=message):
                pack(names, out, **options, **settings)
        pack(names, out, **options, **{lenient: True})


@pytest.mark.parametrize("lenient", LENIENT)
def test_a_finished_folder_serves_looser_settings_as_it_is(folder, packed, lenient):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in packed.rglob("*") if p.is_file()}
    options = {"audio_dir": folder, "shard_utterances": 3}
    assert pack({"train": utterances()}, packed, **options, **{lenient: True}).kept == len(LENGTHS)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in packed.rglob("*") if p.is_file()} == before
    # And the strict ones still.
    assert pack({"train": utterances()}, packed, **options).kept == len(LENGTHS)


def test_a_folder_packed_by_an_earlier_version_is_known(packed):
    assert json.loads((packed / "index.json").read_text())["plan"] == "a25909d1ffefb31e07a7b518983118ab"


def test_a_folder_with_something_else_in_it_is_refused(own):
    (own / ".unfinished.tmp").write_bytes(b"somebody else's")
    before = content(own)
    with pytest.raises(DataError, match=r"expected a new or empty folder; found 'u0\.flac' in it"):
        pack({"train": utterances()}, own, audio_dir=own)
    assert content(own) == before


def test_the_number_of_threads_changes_nothing(folder, tmp_path):
    for workers in (1, 4):
        pack({"a": utterances()}, tmp_path / str(workers), audio_dir=folder, shard_utterances=2, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "4")


# ---- with the rest -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "protocols").mkdir()
    (root / "flac").symlink_to(folder)
    for split, rows in (("train", range(4)), ("dev", range(4, 7))):
        lines = [f"{u.speaker} {u.name} - {u.attack} {u.label_name}\n" for u in utterances() if int(u.name[1]) in rows]
        (root / "protocols" / f"{split}.txt").write_text("".join(lines))
    return root


def test_training_on_a_packed_folder_is_training_on_its_files(corpus, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert cli.main(["pack", str(corpus), str(packed), "--jobs", "2"]) == 0
    assert f"{packed}: 7 utterances, 0.0 MiB" in capsys.readouterr().out
    weights = []
    for data in (corpus, packed):
        config = config_of(tmp_path / f"runs-{data.name}", data=str(data), num_samples=1500, batch_size=2, epochs=1)
        weights.append(load_checkpoint(train(config, progress=False) / "best.pt")["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(DataError, match="packed: expected a sample rate of 8000 Hz; found 16000 Hz"):
        open_split(TrainConfig(data=str(packed), sample_rate=8000), "train")
    assert open_split(TrainConfig(data=str(packed)), "test") is None
    further = {"other": {"dataset": "corpus", "data": str(packed), "subset": "dev"}}
    assert len(open_split(TrainConfig(test_sets=further), "other")) == 3


def test_the_command_verifies_and_reports(corpus, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert cli.main(["pack", str(corpus), str(packed), "--splits", "train"]) == 0
    assert packed_splits(packed) == ["train"]
    assert cli.main(["pack", "--verify", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert "packed: 4 utterances, as written" in printed
    assert "kept" not in printed
    flip(packed / "train" / "00000.npy", 140)
    assert cli.main(["pack", "--verify", str(packed)]) == 2
    assert "00000.npy: expected the samples of 'u0' as they were written" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path)]) == 2
    assert "expected DATA and OUT, or --verify and OUT" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path), str(tmp_path / "q")]) == 2


@pytest.mark.parametrize(
    ("lenient", "flag"), [("resample", "--resample"), ("round_samples", "--round"), ("skip_bad", "--skip-bad")]
)
def test_the_command_goes_on_with_the_flag_that_its_error_calls_for(own, tmp_path, capsys, lenient, flag):
    write_refused(own, lenient)
    (tmp_path / "flac").symlink_to(own)
    (tmp_path / "protocols").mkdir()
    lines = [f"{u.speaker} {u.name} - {u.attack} {u.label_name}\n" for u in utterances()]
    (tmp_path / "protocols" / "train.txt").write_text("".join(lines))
    command = ["pack", str(tmp_path), str(tmp_path / "packed"), "--jobs", "1"]
    assert cli.main(command) == 2
    assert "u5.flac: expected" in capsys.readouterr().err
    assert cli.main([*command, flag]) == 0
    assert "packed: 7 utterances" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert f"({flag}) (give the same, pack into another folder, or remove this one)" in capsys.readouterr().err


def test_the_command_says_what_it_kept_unread_and_how_to_pack_it_anew(corpus, tmp_path, capsys):
    command = ["pack", str(corpus), str(tmp_path / "packed"), "--splits", "train"]
    assert cli.main(command) == 0
    assert "kept" not in capsys.readouterr().out
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "4 of them in shards that were finished before, which are kept: their audio is not read again" in printed
    assert f"(where their audio has changed since, remove {tmp_path / 'packed'} and pack again)" in printed
    assert cli.main(["pack", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "finished are kept: audio that has changed since is not packed anew; remove OUT for that" in text


# ---- what is wrong is named ----------------------------------------------------------------------------------------


def test_bad_files_stop_or_are_kept_as_bad_utterances(own, tmp_path):
    (own / "u1.flac").write_bytes(b"no audio")
    (own / "u5.flac").unlink()
    with pytest.raises(AudioError, match=r"u1\.flac: expected a readable audio file"):
        pack({"train": utterances()}, tmp_path / "p", audio_dir=own)
    result = pack({"train": utterances()}, tmp_path / "q", audio_dir=own, skip_bad=True, shard_utterances=2)
    assert len(result.bad) == 2
    assert "u5: expected a file ending in" in result.bad[1]
    shards, files = PackedDataset(tmp_path / "q", "train"), SpeechDataset(utterances(), own)
    a, b = (next(load_batches(data, [list(range(7))])) for data in (shards, files))
    assert a.row.tolist() == b.row.tolist() == [0, 2, 3, 4, 6]
    assert [(row, message[:40]) for row, message in a.bad] == [(row, message[:40]) for row, message in b.bad]


def test_a_shard_of_bad_utterances_alone(tmp_path):
    names = [Utterance("a", "s", "-", 1)]
    assert len(pack({"x": names}, tmp_path / "p", audio_dir=tmp_path / "none", skip_bad=True).bad) == 1
    with pytest.raises(AudioError, match="a: expected a file"):
        PackedDataset(tmp_path / "p", "x")[0]
    assert len(verify(tmp_path / "p").bad) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "train/00001.npy").unlink(),
            r"train/00001\.npy: expected a shard of 7501 samples; found nothing",
        ),
        (lambda p: os.truncate(p / "train/00001.npy", 9000), r"00001\.npy: expected 15130 bytes; found 9000 \(a trunc"),
        (lambda p: (p / "train/00000.tsv").unlink(), r"train/00000\.tsv: expected the list of a shard; found nothing"),
        (lambda p: flip(p / "train/00002.tsv", 90), r"train/00002\.tsv: expected the list .* found another checksum"),
        (lambda p: (p / "index.json").write_text("{"), r"index\.json: expected JSON; found"),
        (lambda p: (p / "index.json").write_text("[]"), r"index\.json: expected a JSON object; found list"),
        (
            lambda p: (p / "index.json").write_text("{}"),
            r"index\.json: expected 'gradalign packed speech' of version 1",
        ),
        (lambda p: (p / "index.json").unlink(), r"index\.json: expected the index of a packed data set; found nothing"),
    ],
    ids=["no shard", "truncated", "no list", "list changed", "no JSON", "a list", "another format", "no index"],
)
def test_damage_is_named_when_the_data_set_is_opened(packed, damage, message):
    damage(packed)
    with pytest.raises(DataError, match=message):
        PackedDataset(packed, "train")


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "of another type"])
@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("sample_rate", "int", "16000"),
        ("splits", "dict", ["train"]),
        ("shards", "list", {}),
        ("file", "str", 1),
        ("samples", "int", 7501.0),
        ("list_checksum", "str", 1),
    ],
)
def test_a_wrong_field_of_the_index_is_named(packed, name, kind, wrong, missing):
    index = json.loads((packed / "index.json").read_text())
    split = index["splits"]["train"]
    table = next(table for table in (index, split, split["shards"][1]) if name in table)
    if missing:
        del table[name]
    else:
        table[name] = wrong
    (packed / "index.json").write_text(json.dumps(index))
    found = re.escape(repr(None if missing else wrong))
    for read in (lambda p: PackedDataset(p, "train"), verify):
        with pytest.raises(DataError, match=rf"index\.json: expected `{name}`, {kind}; found {found}"):
            read(packed)


def flip(path, at):
    changed = bytearray(path.read_bytes())
    changed[at] ^= 1
    path.write_bytes(changed)


def test_damage_to_samples_is_found_by_their_checksum(packed):
    assert verify(packed).samples == sum(LENGTHS)
    flip(packed / "train" / "00001.npy", 128 + 2 * 4000 + 1)
    with pytest.raises(DataError, match=r"train/00001\.npy: expected the samples of 'u4' as they were written"):
        verify(packed)
    flip(packed / "train" / "00001.npy", 128 + 2 * 4000 + 1)
    flip(packed / "train" / "00001.npy", 100)
    with pytest.raises(DataError, match=r"train/00001\.npy: expected the header of 7501 samples"):
        verify(packed)


def test_a_shard_truncated_after_opening_is_named(packed):
    data = PackedDataset(packed, "train")
    os.truncate(packed / "train" / "00001.npy", 200)
    with pytest.raises(DataError, match=r"00001\.npy: expected 15130 bytes; found 200"):
        data[3]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "expected at least one split to pack; found none"),
        ({"train": []}, "train: expected at least one utterance; found none"),
        ({"../a": utterances()}, r"expected split names that can be folders; found '\.\./a'"),
        ({"train": [Utterance("a\tb", "s", "-", 1)]}, "train: expected names without tabs and line ends"),
        (
            {"train": utterances(3), "dev": utterances(1)},
            "expected other files in dev than in train; found 1 in both, such as 'u0'",
        ),
    ],
)
def test_wrong_splits_are_named(folder, tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        pack(splits, tmp_path / "p", audio_dir=folder)


def test_unknown_splits_and_wrong_numbers_are_named(folder, packed, tmp_path):
    with pytest.raises(DataError, match=r"index\.json: expected a split 'dev'; found train"):
        PackedDataset(packed, "dev")
    with pytest.raises(ValueError, match="must be at least 1; found 16000, 0 and None"):
        pack({"train": utterances()}, tmp_path / "p", audio_dir=folder, shard_utterances=0)
    with pytest.raises(ValueError, match="must be at least 1; found 16000, 1000 and 0"):
        pack({"train": utterances()}, tmp_path / "p", audio_dir=folder, workers=0)
    assert packed_splits(packed) == ["train"]
    assert not is_packed(folder)


def test_two_packers_keep_out_of_one_folder(folder, tmp_path):
    out = tmp_path / "p"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is packing into this folder"):
            pack({"train": utterances()}, out, audio_dir=folder)
    finally:
        os.close(handle)
    assert content(out) == {}
