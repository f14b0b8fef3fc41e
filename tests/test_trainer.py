import csv
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from inputs import config_of
from torch.utils._python_dispatch import TorchDispatchMode

from gradalign import _files, _parts, trainer
from gradalign._checkpoint import load_checkpoint, save_checkpoint
from gradalign._errors import AudioError, CheckpointError, ConfigError, DataError, GradalignError
from gradalign._parts import open_split, training_views
from gradalign.config import METHODS, TrainConfig
from gradalign.data import SpeechDataset, Utterance, fit_length, read_protocol
from gradalign.data.dataset import augmented_view
from gradalign.data.packed import PackedDataset, pack
from gradalign.detectors import frontend
from gradalign.detectors.frontend import create_frontend
from gradalign.optim import AlignedOptimizer
from gradalign.rawboost import RawBoost
from gradalign.scoring import choose_device, load_detector, predict, score, scores_of
from gradalign.sweep import sweep
from gradalign.trainer import train

SPLITS = {"train": (16, ("tts",)), "dev": (8, ("tts",)), "test": (12, ("tts", "vc"))}


def write_corpus(root):
    """A folder in corpus layout: noise that is coloured (bona fide) or white (spoof), 0.1 to 0.4 s."""
    rng = np.random.default_rng(0)
    (root / "protocols").mkdir(parents=True)
    (root / "flac").mkdir()
    for split, (count, attacks) in SPLITS.items():
        lines = []
        for i in range(count):
            bonafide = i % 2 == 0
            samples = rng.standard_normal(rng.integers(1600, 6400))
            samples = np.cumsum(samples) * 0.1 if bonafide else samples
            samples = 0.3 * samples / np.abs(samples).max()
            soundfile.write(root / "flac" / f"{split}{i:02d}.flac", samples, 16000, subtype="PCM_16")
            attack = "-" if bonafide else attacks[i // 2 % len(attacks)]
            lines.append(f"s{i % 3} {split}{i:02d} - {attack} {'bonafide' if bonafide else 'spoof'}\n")
        (root / "protocols" / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def own_corpus(corpus, tmp_path):
    return Path(shutil.copytree(corpus, tmp_path / "data"))


# With the detector's own dropout, whose random numbers a run must keep.
SHORT = {"num_samples": 4000, "detector_options": {}}


@pytest.fixture
def config(corpus, tmp_path):
    return config_of(tmp_path / "runs", data=str(corpus), epochs=2, **SHORT)


def weights(path):
    return load_checkpoint(path)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_seconds(table):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


class NoReads(TorchDispatchMode):
    """Raise where a tensor's values would decide what the host does next."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        if name == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["split", "joint"])
def test_a_step_never_waits_for_the_device(config, monkeypatch, path):
    """But for RawBoost and the inner optimizer, which have tests of their own."""

    def fused(config, model, device):
        optimizer = AlignedOptimizer(torch.optim.Adam(model.parameters(), fused=True), config.align)
        # As after its first step, in which the flag is read once.
        optimizer._stepped = set(range(len(optimizer.param_groups[0]["params"])))
        return optimizer

    step, taken = trainer._Training._step, []

    def watched(self, batch, total):
        with NoReads():
            taken.append(step(self, batch, total))
        return taken[-1]

    monkeypatch.setitem(sys.modules, "my_views", sys.modules[__name__])
    monkeypatch.setattr(trainer, "make_optimizer", fused)
    monkeypatch.setattr(trainer._Training, "_step", watched)
    train(replace(config, views=["clean", "my_views:louder"], path=path, epochs=1), progress=False)
    assert len(taken) == 4


def louder(wave, seeds):
    return wave * (1 + (seeds % 3)[:, None] / 10)


@pytest.mark.parametrize("path", ["split", "joint"])
def test_a_compiled_detector_trains_alike(config, monkeypatch, path):
    # Traced and split into forward and backward as always; only no code is made, which would take a while.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    runs = [
        train(replace(config, path=path, epochs=1, compile=on, out=f"{config.out}-{on}"), progress=False)
        for on in (False, True)
    ]
    (plain,), (compiled,) = map(rows, runs)
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_gpu_trains_as_the_cpu_does(config, tmp_path, amp, monkeypatch):
    # In full float32, as the CPU (cuDNN's convolutions take TF32 by default), and without dropout, whose draws are each
    # device's own.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    here = train(replace(config, out=str(tmp_path / "cpu"), amp=amp), progress=False)
    there = train(replace(config, out=str(tmp_path / "gpu"), amp=amp, device="cuda"), progress=False)
    for a, b in zip(rows(here), rows(there), strict=True):
        for key in ("train_loss_clean", "train_loss_augmented", "dev_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3 if amp == "off" else 3e-2), key
    utterances = read_protocol(Path(config.data) / "protocols" / "test.txt")
    found, bad = score(there, utterances, Path(config.data) / "flac", device="cpu", progress=False)
    assert np.isfinite(found).all()
    assert not bad


@gpu
def test_a_gpu_step_never_waits(config, tmp_path, monkeypatch):
    step, taken = trainer._Training._step, []

    def watched(self, batch, total):
        # In the first step the state is made, and the flag read once.
        torch.cuda.set_sync_debug_mode("error" if taken else "default")
        try:
            taken.append(step(self, batch, total))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return taken[-1]

    monkeypatch.setattr(trainer._Training, "_step", watched)
    train(replace(config, device="cuda", epochs=1), progress=False)
    assert len(taken) == 4


# ---- settings ------------------------------------------------------------------------------------------------------


def test_config_survives_json(tmp_path):
    config = TrainConfig(
        data="d", align="cagrad", align_options={"c": 0.4}, rawboost={"p": 5}, class_weights=(0.2, 0.8)
    )
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path) == config
    assert list(json.loads(config.to_json())) == [f.name for f in fields(TrainConfig)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, r"config\.json: unknown setting 'learning_rate'; expected data, "),
        ({"epochs": "3"}, r"config\.json: `epochs` must be a whole number; found '3'"),
        ({"epochs": 0}, r"`epochs` must be at least 1; found 0"),
        ({"lr": math.inf}, r"`lr` must be a finite number"),
        ({"algo": 9}, r"`algo` must be one of 0\.\.8; found 9"),
        ({"align": "pcgard"}, r"`align` must be one of mean, none, pcgrad, .*; found 'pcgard'"),
        ({"class_weights": [1]}, r"`class_weights` must be two numbers above 0; found \[1\]"),
        ({"skip_bad": 1}, r"`skip_bad` must be true or false; found 1"),
        ({"seed": -1}, r"`seed` must be at least 0; found -1"),
        ({"rawboost": [1]}, r"`rawboost` must be a dict"),
    ],
)
def test_wrong_settings_are_named(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_json(path)


def test_a_config_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: expected JSON"):
        TrainConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": "resnet9000"}, "resnet9000"),
        ({"rawboost": {"snr": 3}}, r"rawboost: .*'snr'"),
        ({"align_options": {"momentum": 1}}, r"align_options: .*momentum"),
        ({"device": "cuda:77"}, r"`device` must be one that is here; found 'cuda:77'"),
        ({"data": None}, r"expected `data`, or `train_protocol` and `train_audio`; found neither"),
        ({"data": "/nowhere"}, r"/nowhere: expected the train protocol at protocols/train.txt; found no such folder"),
    ],
)
def test_settings_that_cannot_be_met_are_named(config, change, message):
    with pytest.raises(GradalignError, match=message):
        train(replace(config, **change), progress=False)


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(ConfigError, match="found 'cuda:77'"):
        choose_device("cuda")


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("finished"), data=str(corpus), **SHORT)
    return config, train(config, progress=False)


def test_a_run_leaves_everything_in_its_folder(finished):
    config, run = finished
    assert run == Path(config.out) / "pcgrad-seed0"
    assert {p.name for p in run.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "metrics.csv", "steps.csv", "checkpoint.pt", "best.pt",
        "scores_dev.txt", "scores_test.txt", "parameters.csv", "results.json",
    }  # fmt: skip
    assert TrainConfig.from_json(run / "config.json") == config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    table = rows(run)
    assert [row["epoch"] for row in table] == [1, 2, 3]
    assert [row["steps"] for row in table] == [4, 8, 12]
    with (run / "metrics.csv").open() as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == table
    with (run / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [int(row["step"]) for row in steps] == list(range(1, 13))
    cosines = np.array([float(row["cosine"]) for row in steps])
    assert (np.abs(cosines) <= 1 + 1e-9).all()
    for i, row in enumerate(table):
        mine = cosines[4 * i : 4 * i + 4]
        assert row["conflict_rate"] == (mine < 0).mean()
        assert row["cosine_mean"] == pytest.approx(mine.mean(), abs=1e-6)
        assert row["train_loss"] == pytest.approx((row["train_loss_clean"] + row["train_loss_augmented"]) / 2)
    results = json.loads((run / "results.json").read_text())
    losses = [row["dev_loss"] for row in table]
    assert results["best_dev_loss"] == min(losses)
    assert results["epochs_to_best"] == 1 + losses.index(min(losses))
    assert results["conflict_rate"] == (cosines < 0).mean()
    assert results["train_attacks"] == ["tts"]
    assert set(results["test_eer_by_attack"]) == {"tts", "vc"}
    assert 0 <= results["test_eer"] <= 1
    assert results["test_eer_unseen"] == results["test_eer_by_attack"]["vc"]


def test_best_weights_give_the_recorded_dev_loss_and_scores(finished):
    config, run = finished
    detector = load_detector(run, device="cpu")
    assert not detector.model.training
    utterances = read_protocol(Path(config.data) / "protocols" / "dev.txt")
    data = SpeechDataset(utterances, Path(config.data) / "flac", num_samples=4000)
    logits, bad = predict(detector.model, data, batch_size=4)
    assert bad == []
    # A model in training is scored alike, and goes on training.
    assert torch.equal(predict(detector.model.train(), data, batch_size=4)[0], logits)
    assert detector.model.training
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor([u.label for u in utterances]), torch.tensor([0.1, 0.9])
    )
    results = json.loads((run / "results.json").read_text())
    assert float(loss) == pytest.approx(results["best_dev_loss"], rel=1e-5)
    lines = [line.split() for line in (run / "scores_dev.txt").read_text().splitlines()]
    assert [line[:3] for line in lines] == [[u.name, u.attack, u.label_name] for u in utterances]
    np.testing.assert_allclose([float(line[3]) for line in lines], scores_of(logits), rtol=1e-5, atol=1e-5)


def test_scores_agree_with_the_run_and_bad_files_have_none(finished, tmp_path):
    config, run = finished
    data = Path(config.data)
    utterances = read_protocol(data / "protocols" / "test.txt")
    found, bad = score(run / "best.pt", utterances, data / "flac", batch_size=4, device="cpu", progress=False)
    assert bad == []
    expected = [float(line.split()[3]) for line in (run / "scores_test.txt").read_text().splitlines()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"no audio")
    paths = [data / "flac" / "test00.flac", broken, data / "flac" / "test01.flac"]
    files = [Utterance(path.name, "-", "-", 0, path=path) for path in paths]
    scores, messages = score(run, files, skip_bad=True, device="cpu", progress=False)
    np.testing.assert_allclose(scores[[0, 2]], expected[:2], rtol=1e-5, atol=1e-5)
    assert np.isnan(scores[1])
    assert len(messages) == 1
    assert str(broken) in messages[0]
    with pytest.raises(AudioError, match=r"broken\.flac"):
        score(run, files, device="cpu", progress=False)


def test_packed_data_are_scored_from_their_start_whatever_they_are_opened_for(finished, tmp_path):
    config, run = finished
    data = Path(config.data)
    utterances = read_protocol(data / "protocols" / "test.txt")
    pack({"test": utterances}, tmp_path / "packed", audio_dir=data / "flac")
    opened = PackedDataset(tmp_path / "packed", "test", num_samples=2000, raw=True, random_crop=True)
    found, _ = score(run, opened, batch_size=4, device="cpu", progress=False)
    expected = [float(line.split()[3]) for line in (run / "scores_test.txt").read_text().splitlines()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (opened.num_samples, opened.raw, opened.random_crop) == (2000, True, True)


def test_a_run_is_scored_by_its_last_checkpoint_too(finished):
    config, run = finished
    detector = load_detector(run / "checkpoint.pt", device="cpu")
    assert_same_weights(detector.model.state_dict(), weights(run / "checkpoint.pt"))
    assert detector.config["num_samples"] == config.num_samples


def test_a_finished_run_is_left_alone_and_more_epochs_go_on_as_if_unbroken(finished, config):
    _, done = finished
    shutil.copytree(done, config.run_dir)
    before = {p.name: p.stat().st_mtime_ns for p in config.run_dir.iterdir()}
    same = replace(config, epochs=3)
    train(same, progress=False)
    assert before["checkpoint.pt"] == (config.run_dir / "checkpoint.pt").stat().st_mtime_ns
    assert before["scores_test.txt"] == (config.run_dir / "scores_test.txt").stat().st_mtime_ns
    train(replace(config, epochs=4), progress=False)
    unbroken = train(replace(config, epochs=4, out=config.out + "-unbroken"), progress=False)
    assert_same_weights(weights(config.run_dir / "checkpoint.pt"), weights(unbroken / "checkpoint.pt"))
    assert without_seconds(rows(config.run_dir)) == without_seconds(rows(unbroken))


def test_training_is_the_same_every_time_with_workers_and_without_the_cache(finished, config):
    _, run = finished
    again = train(replace(config, epochs=3, num_workers=2, cache_mb=0), progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), weights(again / "checkpoint.pt"))
    assert without_seconds(rows(run)) == without_seconds(rows(again))
    other = train(replace(config, epochs=3, seed=1), progress=False)
    assert rows(other)[0]["train_loss"] != rows(run)[0]["train_loss"]


def test_audio_is_kept_in_memory_only_where_it_is_read_again(config):
    def kept(split, **changes):
        return open_split(replace(config, cache_mb=3, **changes), split)._cache_bytes_left

    assert [kept(split) for split in ("train", "dev", "test")] == [3 * 2**20, 3 * 2**20, 0]
    # Worker processes end with the epoch, and what they keep with them.
    assert [kept(split, num_workers=1) for split in ("train", "dev", "test")] == [0, 0, 0]


def test_training_learns(config):
    run = train(replace(config, epochs=12, lr=3e-3), progress=False)
    table = rows(run)
    assert min(row["dev_loss"] for row in table) < 0.5 * table[0]["train_loss"]


@pytest.mark.parametrize("path", ["split", "joint"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_path_runs(config, method, path):
    run = train(replace(config, align=method, path=path, epochs=1), progress=False)
    row = rows(run)[0]
    assert row["skipped_steps"] == 0
    assert math.isfinite(row["dev_loss"])


def test_training_on_real_clips(config):
    clips = Path(__file__).parent / "data" / "clips"
    run = train(replace(config, data=str(clips), num_samples=16000), progress=False)
    results = json.loads((run / "results.json").read_text())
    assert results["bad_files"] == results["skipped_steps"] == 0
    assert set(results["test_eer_by_attack"]) == {"hifigan", "flite"}
    protocol = read_protocol(clips / "protocols" / "test.txt")
    lines = [line.split() for line in (run / "scores_test.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [u.name for u in protocol]


def test_none_is_mean(config):
    none = train(replace(config, align="none"), progress=False)
    mean = train(replace(config, align="mean"), progress=False)
    assert_same_weights(weights(none / "checkpoint.pt"), weights(mean / "checkpoint.pt"))
    assert (none / "steps.csv").read_text() == (mean / "steps.csv").read_text()


@pytest.mark.parametrize(
    "change", [{"scope": "parameter"}, {"optimizer": "sgd"}, {"optimizer": "adamw"}, {"amp": "bf16"}, {"amp": "fp16"}]
)
def test_other_settings_train(config, change):
    assert math.isfinite(rows(train(replace(config, epochs=1, **change), progress=False))[0]["dev_loss"])


def test_training_stops_when_the_dev_loss_does_not_fall(config):
    # Without steps only the running statistics settle, and the dev loss with them.
    run = train(replace(config, epochs=100, lr=0.0, patience=2), progress=False)
    losses = [row["dev_loss"] for row in rows(run)]
    best = 1 + losses.index(min(losses))
    assert len(losses) == best + 2 < 100
    assert json.loads((run / "results.json").read_text())["epochs_to_best"] == best


def test_augmented_view_repeats_the_augmented_utterance():
    rng = torch.Generator().manual_seed(0)
    short, long = 0.1 * torch.randn(700, generator=rng), 0.1 * torch.randn(2000, generator=rng)
    boost, seeds = RawBoost(algo=4), torch.tensor([5, 6])
    wave = torch.stack([fit_length(short, 2000), long])
    view = augmented_view(boost, wave, torch.tensor([700, 2000]), seeds)
    alone = boost(short[None], seeds=seeds[:1])[0]
    torch.testing.assert_close(view[0], fit_length(alone, 2000), rtol=0, atol=1e-5)
    torch.testing.assert_close(view[1], boost(long[None], seeds=seeds[1:])[0], rtol=0, atol=1e-5)
    assert not torch.allclose(view[1], long, atol=1e-3)


def test_training_views_are_what_the_steps_of_an_epoch_see(config, monkeypatch):

    seen = []

    def watched(boost, wave, length, seed):
        seen.append((wave, augmented_view(boost, wave, length, seed)))
        return seen[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(_parts, "augmented_view", watched)
        train(config, progress=False)
    found = [(clean, augmented) for epoch in (0, 1) for clean, augmented, _ in training_views(config, epoch)]
    assert len(found) == len(seen) == 8
    for mine, theirs in zip(found, seen, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert not torch.equal(found[0][1], found[4][1])


class WithBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 64, 16), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, 2)

    def forward(self, wave):
        return self.head(self.layers(wave[:, None]).mean(2))


def test_steps_that_are_not_finite_are_skipped_and_counted(config, monkeypatch):
    from gradalign import detectors

    monkeypatch.setattr(detectors, "create", lambda name: WithBatchNorm())
    calls = []

    def poisoned(boost, wave, length, seed):
        calls.append(1)
        view = augmented_view(boost, wave, length, seed)
        return view * math.nan if len(calls) == 2 else view

    monkeypatch.setattr(_parts, "augmented_view", poisoned)
    run = train(replace(config, epochs=1), progress=False)
    row = rows(run)[0]
    assert row["skipped_steps"] == 1
    assert row["steps"] == 4
    assert math.isfinite(row["train_loss"])
    assert all(torch.isfinite(value).all() for value in weights(run / "checkpoint.pt").values())
    with (run / "steps.csv").open() as file:
        assert [row["cosine"] == "" for row in csv.DictReader(file)] == [False, True, False, False]


def test_a_detector_that_gives_nan_is_an_error_and_no_best_epoch(config, monkeypatch):
    from gradalign import detectors

    class Diverging(WithBatchNorm):
        def forward(self, wave):
            logits = super().forward(wave)
            return logits if self.training else logits * math.nan

    monkeypatch.setattr(detectors, "create", lambda name: Diverging())
    with pytest.raises(GradalignError, match="the dev loss was never finite"):
        train(config, progress=False)
    assert [(row["dev_loss"], row["dev_eer"]) for row in rows(config.run_dir)] == [(None, None)] * 2
    assert not (config.run_dir / "best.pt").exists()


def test_an_epoch_without_a_finite_step_is_an_error(config, monkeypatch):

    monkeypatch.setattr(_parts, "augmented_view", lambda boost, wave, length, seed: wave * math.nan)
    with pytest.raises(
        GradalignError, match=r"pcgrad-seed0: epoch 1 had no step: 4 had losses or gradients that are not"
    ):
        train(config, progress=False)


# ---- data that are not as expected ---------------------------------------------------------------------------------


def test_bad_audio_stops_training_by_name_or_is_left_out_and_listed(own_corpus, config):
    config = replace(config, data=str(own_corpus))
    (own_corpus / "flac" / "train03.flac").write_bytes(b"no audio")
    soundfile.write(own_corpus / "flac" / "dev02.wav", np.full(3000, np.nan), 16000, subtype="FLOAT")
    (own_corpus / "flac" / "dev02.flac").unlink()
    with pytest.raises(AudioError, match=r"train03\.flac: expected a readable audio file"):
        train(config, progress=False)
    (own_corpus / "flac" / "test05.flac").unlink()
    # What is not there is found before the first step.
    with pytest.raises(AudioError, match=r"found none for 1, such as .*test05\.flac"):
        train(config, progress=False)
    run = train(replace(config, skip_bad=True, out=config.out + "-skip"), progress=False)
    listed = (run / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3
    for name in ("train03.flac: expected a readable", "dev02.wav: expected finite samples", "test05.flac: expected an"):
        assert sum(name in line for line in listed) == 1
    assert json.loads((run / "results.json").read_text())["bad_files"] == 3
    assert len((run / "scores_test.txt").read_text().splitlines()) == 11


def test_a_bad_file_of_the_test_set_does_not_lose_the_training(own_corpus, config):
    """It is only read after the last epoch; the same run then goes on without it."""
    config = replace(config, data=str(own_corpus), epochs=1)
    (own_corpus / "flac" / "test05.flac").write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"test05\.flac: expected a readable audio file"):
        train(config, progress=False)
    trained = weights(config.run_dir / "checkpoint.pt")
    run = train(replace(config, skip_bad=True), progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), trained)
    assert len((run / "scores_test.txt").read_text().splitlines()) == 11


def test_a_front_end_without_pretrained_weights_is_not_silent(config, tmp_path, capsys):
    tiny = {"detector": "xlsr-mlp", "detector_options": {"frontend": {"name": "tiny"}}}
    for name, changes, warned in (("light", {}, False), ("tiny", tiny, True)):
        train(replace(config, out=str(tmp_path / name), num_samples=2000, epochs=1, **changes))
        assert ("warning: the front end starts from random weights" in capsys.readouterr().err) is warned


def test_an_empty_front_end_is_the_default_one(config, monkeypatch):
    monkeypatch.setitem(frontend.ARCHITECTURES, "xlsr-300m", frontend.ARCHITECTURES["tiny"])
    settings = {"detector": "xlsr-mlp", "detector_options": {"frontend": None}, "num_samples": 2000, "epochs": 1}
    run = train(replace(config, **settings), progress=False)
    assert load_detector(run, device="cpu").config["detector_options"] == {"frontend": None}


def test_a_trained_detector_needs_no_pretrained_weights(config, tmp_path):
    pretrained = tmp_path / "pretrained.pt"
    torch.save(create_frontend("tiny").model.state_dict(), pretrained)

    def at(path, **changes):
        options = {"frontend": {"name": "tiny", "tune": 1, "weights": str(path)}}
        return replace(config, detector="xlsr-mlp", detector_options=options, num_samples=2000, **changes)

    unbroken = train(at(pretrained, out=config.out + "-unbroken"), progress=False)
    run = train(at(pretrained, epochs=1), progress=False)
    pretrained.rename(tmp_path / "moved.pt")
    # Finished, then gone on with; by the old name and by another one.
    train(at(tmp_path / "absent.pt", epochs=1), progress=False)
    train(at(pretrained), progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), weights(unbroken / "checkpoint.pt"))
    assert (run / "scores_test.txt").read_text() == (unbroken / "scores_test.txt").read_text()
    assert_same_weights(load_detector(run, device="cpu").model.state_dict(), weights(run / "best.pt"))
    with pytest.raises(CheckpointError, match="this run was started with `detector_options`"):
        train(replace(at(pretrained), detector_options={"frontend": {"name": "tiny"}}), progress=False)
    with pytest.raises(GradalignError, match=r"absent\.pt"):
        train(at(tmp_path / "absent.pt", out=config.out + "-new"), progress=False)


def test_another_sample_rate_stops_training_by_name_or_is_converted(own_corpus, config):
    config = replace(config, data=str(own_corpus))
    soundfile.write(own_corpus / "flac" / "dev01.flac", 0.1 * np.random.default_rng(0).standard_normal(4000), 8000)
    with pytest.raises(AudioError, match=r"dev01\.flac: expected a sample rate of 16000 Hz; found 8000 Hz"):
        train(config, progress=False)
    assert rows(train(replace(config, epochs=1, resample=True, out=config.out + "-converted"), progress=False))


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", "", r"train\.txt: expected at least one line"),
        ("dev", "s dev00 - - bonafied\n", r"dev\.txt:1: expected the label bonafide or spoof; found 'bonafied'"),
        ("dev", "s dev00 - - bonafide\n", r"data: expected both bonafide and spoof utterances in dev; found no spoof"),
        ("test", "s test00 -\n", r"test\.txt:1: expected the 5 columns"),
    ],
)
def test_a_wrong_protocol_stops_training_by_name(own_corpus, config, split, content, message):
    (own_corpus / "protocols" / f"{split}.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        train(replace(config, data=str(own_corpus)), progress=False)


@pytest.mark.parametrize(("split", "other"), [("dev", "train"), ("test", "train"), ("test", "dev")])
def test_splits_that_share_audio_stop_training(own_corpus, config, split, other):
    protocols = own_corpus / "protocols"
    line = (protocols / f"{other}.txt").read_text().splitlines()[3]
    with (protocols / f"{split}.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        DataError, match=rf"data: expected other files in {split} than in {other}; found 1 in both, .*03'"
    ):
        train(replace(config, data=str(own_corpus)), progress=False)


def test_splits_can_be_given_one_by_one_and_without_a_test_set(corpus, config):
    named = {f"{s}_protocol": str(corpus / "protocols" / f"{s}.txt") for s in ("train", "dev")}
    named |= {f"{s}_audio": str(corpus / "flac") for s in ("train", "dev")}
    run = train(replace(config, data=None, **named), progress=False)
    whole = train(replace(config, out=config.out + "-whole"), progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), weights(whole / "checkpoint.pt"))
    assert not (run / "scores_test.txt").exists()
    assert "test_eer" not in json.loads((run / "results.json").read_text())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_other_settings_on_resume_are_named(config):
    run = train(config, progress=False)
    message = r"this run was started with `lr` 0\.001; found 0\.01 now"
    with pytest.raises(CheckpointError, match=r"config\.json: " + message):
        train(replace(config, lr=0.01), progress=False)
    (run / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: " + message):
        train(replace(config, lr=0.01), progress=False)
    train(replace(config, num_workers=1, cache_mb=0), progress=False)


def test_other_data_on_resume_are_named(own_corpus, config):
    config = replace(config, data=str(own_corpus))
    train(config, progress=False)
    path = own_corpus / "protocols" / "train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(CheckpointError, match="the train or dev protocol is not the one this run was started with"):
        train(config, progress=False)


def test_a_damaged_checkpoint_is_named(finished, config, tmp_path):
    _, run = finished
    shutil.copytree(run, config.run_dir)
    whole = (run / "checkpoint.pt").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", bytes(changed)):
        (config.run_dir / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: expected a checkpoint; found a damaged file"):
            train(replace(config, epochs=4), progress=False)
    content = load_checkpoint(run / "checkpoint.pt")
    del content["rng_cpu"]
    save_checkpoint(config.run_dir / "checkpoint.pt", content)
    with pytest.raises(CheckpointError, match=r"expected the keys .*rng_cpu.*; missing rng_cpu; unexpected none"):
        train(replace(config, epochs=4), progress=False)
    with pytest.raises(CheckpointError, match=r"nothing\.pt: expected a checkpoint; found nothing there"):
        load_detector(tmp_path / "nothing.pt")


def test_a_checkpoint_is_never_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"config": {}, "model": Attack()}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"best\.pt: expected tensors and plain values only; found pickled code"):
        load_detector(tmp_path / "best.pt")
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_are_named(finished, tmp_path):
    _, run = finished
    content = load_checkpoint(run / "best.pt")
    name = next(iter(content["model"]))
    content["model"]["surprise.weight"] = content["model"].pop(name)
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=rf"unexpected key surprise\.weight; missing key {name}$"):
        load_detector(tmp_path / "best.pt")
    torch.save([content], tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"best\.pt: expected a checkpoint; found list"):
        load_detector(tmp_path / "best.pt")
    del content["config"]
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(
        CheckpointError, match=r"best\.pt: expected the keys config and model; found model, epoch, dev_"
    ):
        load_detector(tmp_path / "best.pt")


def test_a_detector_that_scores_nan_is_an_error(finished, tmp_path):
    config, run = finished
    content = load_checkpoint(run / "best.pt")
    content["model"]["head.bias"].fill_(math.nan)
    torch.save(content, tmp_path / "best.pt")
    path = Path(config.data) / "flac" / "test00.flac"
    with pytest.raises(GradalignError, match=r"test00\.flac: expected finite scores; the detector gave NaN or Inf"):
        score(tmp_path / "best.pt", [Utterance(path.name, "-", "-", 0, path=path)], progress=False)


def test_a_full_disk_is_one_error_and_the_old_checkpoint_stays(config, monkeypatch):
    train(replace(config, epochs=1), progress=False)
    before = (config.run_dir / "checkpoint.pt").read_bytes()

    def full(handle):
        # File systems that allocate late report a full disk here.
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*pcgrad-seed0/") as caught:
            train(config, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert (config.run_dir / "checkpoint.pt").read_bytes() == before
    assert not list(config.run_dir.glob(".*"))
    run = train(config, progress=False)
    unbroken = train(replace(config, out=config.out + "-unbroken"), progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), weights(unbroken / "checkpoint.pt"))


@pytest.mark.parametrize("average_best", [1, 2])
@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("full", ["checkpoint", "best"])
def test_a_stop_between_checkpoint_and_best_weights_loses_nothing(config, monkeypatch, full, epochs, average_best):
    config = replace(config, average_best=average_best)
    unbroken = train(replace(config, epochs=3, out=config.out + "-unbroken"), progress=False)
    first, second, third = (row["dev_loss"] for row in rows(unbroken))
    assert first > second > third
    train(config, progress=False)

    def save(path, content):
        if path.name.startswith(full) and content.get("epoch", 3) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save)
        with pytest.raises(OSError, match="No space left on device"):
            train(replace(config, epochs=3), progress=False)
    run = train(replace(config, epochs=epochs), progress=False)
    # Where only its best weights could not be written, the third epoch was finished.
    assert json.loads((run / "results.json").read_text())["epochs"] == (3 if full == "best" else epochs)
    run = train(replace(config, epochs=3), progress=False)
    for name in ("checkpoint.pt", "best.pt"):
        assert_same_weights(weights(run / name), weights(unbroken / name))
    assert (run / "scores_test.txt").read_text() == (unbroken / "scores_test.txt").read_text()
    assert {path.name for path in run.glob("*.pt")} == {path.name for path in unbroken.glob("*.pt")}


LITTLE_SPACE = """
import resource, sys
from gradalign.config import TrainConfig
from gradalign.trainer import train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    train(TrainConfig.from_json(sys.argv[1]), progress=False)
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_write_that_the_kernel_cuts_short_leaves_the_old_checkpoint(finished, config, tmp_path):
    _, run = finished
    shutil.copytree(run, config.run_dir)
    before = (config.run_dir / "checkpoint.pt").read_bytes()
    (tmp_path / "config.json").write_text(replace(config, epochs=4).to_json())
    # The limit lets the small files pass and cuts the checkpoint.
    command = [sys.executable, "-c", LITTLE_SPACE, tmp_path / "config.json", str(len(before) // 2)]
    code, filename = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(code) == errno.EFBIG
    assert Path(filename).name in ("best.pt", "checkpoint.pt")
    assert (config.run_dir / "checkpoint.pt").read_bytes() == before


def test_two_processes_cannot_train_one_run(config, monkeypatch):
    monkeypatch.setattr(trainer, "_LOCK_WAIT_S", 0.0)
    config.run_dir.mkdir(parents=True)
    with (
        _files.locked(config.run_dir, RuntimeError()),
        pytest.raises(GradalignError, match="pcgrad-seed0: another process is training this run"),
    ):
        train(config, progress=False)


# ---- kills ---------------------------------------------------------------------------------------------------------


def test_ten_kills_change_nothing(config):
    config = replace(config, epochs=6, checkpoint_steps=1, align="gradvac")
    unbroken = train(replace(config, out=config.out + "-unbroken"), progress=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gradalign.trainer", "gradalign.detectors", "gradalign.metrics", "soundfile", "tqdm"]
    )
    draw = random.Random(0)
    run = config.run_dir
    kills = positions = torn = 0
    while kills < 10:
        process = context.Process(target=train, args=(config, False))
        process.start()
        # The first kill comes before there is a checkpoint, or close to it.
        _wait_for_checkpoints(run, draw.randint(1, 2) if kills else 0, process)
        if kills % 2:
            _wait_for_temporary_file(run, process)
        else:
            time.sleep(draw.uniform(0, 0.03))
        assert process.is_alive(), "training ended before the tenth kill"
        process.kill()
        process.join()
        kills += 1
        torn += any(run.glob(".checkpoint.*"))
        if (run / "checkpoint.pt").exists():
            positions += load_checkpoint(run / "checkpoint.pt")["progress"]["position"] > 0
    # Some kills came in the middle of an epoch, and some in the middle of writing a checkpoint.
    assert positions >= 3
    assert torn >= 1
    train(config, progress=False)
    assert_same_weights(weights(run / "checkpoint.pt"), weights(unbroken / "checkpoint.pt"))
    assert_same_weights(weights(run / "best.pt"), weights(unbroken / "best.pt"))
    assert without_seconds(rows(run)) == without_seconds(rows(unbroken))
    for name in ("steps.csv", "parameters.csv", "scores_dev.txt", "scores_test.txt"):
        assert (run / name).read_text() == (unbroken / name).read_text()
    assert not list(run.glob(".*"))


def _wait_for_checkpoints(run, count, process):
    def stamp():
        try:
            return (run / "checkpoint.pt").stat().st_ino, (run / "checkpoint.pt").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    last = stamp()
    while count and process.is_alive():
        now = stamp()
        count -= now != last
        last = now
        time.sleep(0.0005)


def _wait_for_temporary_file(run, process):
    while process.is_alive() and not any(run.glob(".checkpoint.*")):
        pass


# ---- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_every_method_from_every_seed_and_only_once(config, capfd):
    config = replace(config, epochs=1, threads=0)
    alone = train(replace(config, align="none", seed=1, threads=1), progress=False)
    runs = sweep(config, ["none", "pcgrad"], [0, 1], jobs=2)
    assert [run.name for run in runs] == ["none-seed0", "none-seed1", "pcgrad-seed0", "pcgrad-seed1"]
    assert all((run / "results.json").exists() for run in runs)
    shown = capfd.readouterr().err
    assert [f"{run.name:<12}  epoch 1/1  train loss 0." in shown for run in runs] == [run != alone for run in runs]
    assert "bad audio files" not in shown
    sweep(config, ["none", "pcgrad"], [0, 1], jobs=2)
    assert capfd.readouterr().err == ""


def test_a_failed_run_of_a_sweep_is_named_and_the_others_finish(own_corpus, config):
    config = replace(config, epochs=1, data=str(own_corpus))
    run = train(replace(config, align="none"), progress=False)
    (run / "results.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(GradalignError, match=r"1 of 2 runs failed \(none-seed0\): .*checkpoint\.pt: .*damaged"):
        sweep(config, ["none", "pcgrad"], [0], jobs=2, progress=False)
    pcgrad = train(replace(config, align="pcgrad", out=config.out + "-alone"), progress=False)
    assert_same_weights(weights(pcgrad / "best.pt"), weights(Path(config.out) / "pcgrad-seed0" / "best.pt"))
    # Finished runs are not tested again.
    (own_corpus / "flac" / "test00.flac").unlink()
    sweep(config, ["pcgrad"], [0], progress=False)


@pytest.mark.parametrize("split", SPLITS)
def test_audio_that_every_run_of_a_sweep_would_miss_is_named_before_the_first(own_corpus, config, split):
    (own_corpus / "flac" / f"{split}00.flac").unlink()
    config = replace(config, data=str(own_corpus))
    with pytest.raises(AudioError, match=f"{split}00"):
        sweep(config, ["none"], [0], progress=False)
    assert not Path(config.out).exists()


def test_a_sweep_has_every_method_before_the_next_seed(config, monkeypatch):
    seen = []
    monkeypatch.setattr("gradalign.sweep.train", lambda run, progress: seen.append((run.run_dir.name, progress)))
    runs = sweep(config, ["none", "pcgrad"], [1, 0], progress=False)
    assert seen == [(f"{method}-seed{seed}", False) for seed in (1, 0) for method in ("none", "pcgrad")]
    assert [run.name for run in runs] == ["none-seed1", "none-seed0", "pcgrad-seed1", "pcgrad-seed0"]
    # One run needs no process of its own, however many may run.
    sweep(config, ["mean"], [0], jobs=4)
    assert seen[4:] == [("mean-seed0", True)]


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that sets the shell commands that a sweep runs in place of Python; the configuration is in $config."""

    def write(commands):
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\nread -r config\n{commands}\n")
        script.chmod(0o755)
        monkeypatch.setattr("gradalign.sweep.sys", SimpleNamespace(executable=str(script), stderr=sys.stderr))

    return write


def test_a_sweep_shows_every_epoch(config, child, capfd):
    row = {"train_loss": None, "dev_loss": 0.5, "dev_eer": 0.25, "conflict_rate": None, "seconds": 2.4}
    # The first is that of a resumed run.
    rows = [
        {"epoch": 3, **row},
        {"epoch": 12, **row, "train_loss": 0.75, "conflict_rate": 0.5},
    ]
    child("\n".join(f"echo '{json.dumps({'row': row})}'" for row in rows) + "\necho '{\"bad\": 2}'")
    config = replace(config, epochs=12)
    sweep(config, ["none", "pcgrad"], [0], jobs=2)
    out, shown = capfd.readouterr()
    assert out == ""
    assert "none-seed0    epoch  3/12  train loss -  dev loss 0.5000  dev EER 25.00%  in conflict -  2 s\n" in shown
    assert (
        "pcgrad-seed0  epoch 12/12  train loss 0.7500  dev loss 0.5000  dev EER 25.00%  in conflict  50%  2 s" in shown
    )
    assert f"none-seed0    2 bad audio files left out, see {config.out}/none-seed0/skipped.txt" in shown
    assert "2 runs, 2 at a time: 100%" in shown
    assert "24/24 [" in shown.split("\r")[-1]
    sweep(config, ["none", "pcgrad"], [0], jobs=2, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ("kill -9 $$", "ended by SIGKILL; the same command goes on from its last checkpoint"),
        ("exit 3", "ended with exit code 3"),
        ("""echo '{"error": "no luck"}'; exit 1""", "no luck"),
    ],
)
def test_how_a_run_of_a_sweep_ended_is_named(config, child, commands, reason, capfd):
    child(commands)
    with pytest.raises(GradalignError, match=rf"2 of 2 runs failed \((none|pcgrad)-seed0, .*-seed0\): {reason}$"):
        sweep(config, ["none", "pcgrad"], [0], jobs=2)
    assert f"none-seed0    failed: {reason}\n" in capfd.readouterr().err


@pytest.mark.parametrize(("threads", "cores", "each"), [(0, 8, 4), (0, 1, 1), (3, 8, 3)])
def test_runs_of_a_sweep_share_the_cores(config, child, tmp_path, monkeypatch, threads, cores, each):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    child(f'echo "$OMP_NUM_THREADS $OMP_WAIT_POLICY" >> {tmp_path}/env; echo "$config" >> {tmp_path}/configs')
    sweep(replace(config, threads=threads), ["none", "pcgrad"], [0], jobs=2, progress=False)
    assert (tmp_path / "env").read_text() == 2 * f"{each} PASSIVE\n"
    configs = [json.loads(line) for line in (tmp_path / "configs").read_text().splitlines()]
    assert {(c["align"], c["threads"]) for c in configs} == {("none", each), ("pcgrad", each)}


def test_ctrl_c_ends_every_run_of_a_sweep(config, child, tmp_path, capfd):
    began, ended = tmp_path / "began", tmp_path / "ended"
    child(f"trap 'echo >> {ended}; exit 1' TERM; echo >> {began}; sleep 9 >/dev/null 2>&1 & wait")

    def interrupt():
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not (began.exists() and len(began.read_text()) == 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background jobs ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(config, ["none", "pcgrad"], [0, 1], jobs=2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert began.read_text() == ended.read_text() == "\n\n"
    assert "failed" not in capfd.readouterr().err


def test_a_run_of_a_sweep_tells_events_alone_and_ends_with_its_parent(config):
    program = """if True:
        import os, signal, time
        from gradalign import sweep
        def train(config, progress, on_epoch):
            print("a library")
            os.system("echo a program")
            os.kill(os.getpid(), signal.SIGINT)
            if config.seed == 1:
                raise RuntimeError("no\\nluck")
            on_epoch({"epoch": 1})
            time.sleep(60)
        sweep.train = train
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(sweep._child())
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for seed, process in enumerate(processes):
        process.stdin.write(json.dumps(asdict(replace(config, seed=seed))) + "\nmore\n")
        process.stdin.flush()
    assert json.loads(processes[0].stdout.readline()) == {"row": {"epoch": 1}}
    assert processes[0].poll() is None
    processes[0].stdin.close()
    assert processes[0].stdout.read() == ""
    assert processes[0].wait() == 1
    # Its standard input stays open: this one ends by itself.
    assert json.loads(processes[1].stdout.read()) == {"error": "RuntimeError: no luck"}
    assert processes[1].wait() == 1
    processes[1].stdin.close()


def test_what_a_run_of_a_sweep_could_not_foresee_is_named_too(config, capfd):
    config = replace(config, detector="rawnet2", num_samples=2000)
    message = r"2 of 2 runs failed \([^)]*\): `wave` must be \[B, T\] with T >= 3211; found"
    with pytest.raises(GradalignError, match=message):
        sweep(config, ["none", "pcgrad"], [0], jobs=2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("methods", "seeds", "jobs", "message"),
    [
        (["none", "sgd"], [0], 1, r"`align` must be one of mean, none, .*; found 'sgd'"),
        (["none"], [], 1, r"`seeds` must name at least one, each once; found \[\]"),
        (["none", "none"], [0], 1, r"`methods` must name at least one, each once"),
        (["none"], [0], 0, r"`jobs` must be at least 1; found 0"),
    ],
)
def test_a_wrong_sweep_is_named(config, methods, seeds, jobs, message):
    with pytest.raises(ConfigError, match=message):
        sweep(config, methods, seeds, jobs)


def test_a_sweep_is_no_torchrun_and_its_options_are_of_one_method(config, monkeypatch):
    with pytest.raises(ConfigError, match="`align_options` belong to one method; found 2 methods"):
        sweep(replace(config, align="cagrad", align_options={"c": 0.5}), ["cagrad", "cagrad-fast"], [0])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match=r"`jobs` must be 1 under torchrun, .*; found 2"):
        sweep(config, ["none", "pcgrad"], [0], jobs=2)
