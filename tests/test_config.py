"""Settings from YAML files and key=value, and what the trainer makes of the newer ones."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from inputs import CLIPS, config_of

from gradalign import detectors
from gradalign._checkpoint import load_checkpoint
from gradalign._errors import AudioError, ConfigError, DataError
from gradalign._parts import open_split, training_views
from gradalign.cli import main
from gradalign.config import TrainConfig, read_sweep
from gradalign.data.packed import pack
from gradalign.data.protocol import read_protocol
from gradalign.sweep import sweep
from gradalign.trainer import train

CONFIGS = Path(__file__).parents[1] / "configs"


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- files ----


def test_yaml_with_changes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {name: asvspoof2019-la}\nalign: [none, pcgrad]\nseed: [1, 2]\njobs: 2\nlr: 1e-6\n"
        "detector_options:\n  frontend: {name: tiny}\ntest_sets:\n  ITW: {dataset: in-the-wild, data: /itw}\n"
    )
    changes = [
        "data.root=/la",
        "detector_options.frontend.tune=2",
        "views=[clean, rawboost:5]",
        "amp=bf16",
        "align=mgda",
    ]
    plan = read_sweep(path, changes)
    assert (plan.methods, plan.seeds, plan.jobs) == (["mgda"], [1, 2], 2)
    config = plan.config
    assert (config.dataset, config.data, config.lr, config.amp) == ("asvspoof2019-la", "/la", 1e-6, "bf16")
    assert config.detector_options == {"frontend": {"name": "tiny", "tune": 2}}
    assert config.views == ["clean", "rawboost:5"]
    assert config.test_sets["ITW"]["data"] == "/itw"
    # YAML takes it for false.
    assert read_sweep(path, [*changes, "amp=off"]).config.amp == "off"
    named = read_sweep(path, ["data=/mine.csv", "dataset=csv"]).config
    assert (named.dataset, named.data) == ("csv", "/mine.csv")
    # A merged section may give a key anew.
    path.write_text("rawboost: &a {p: 1, g_sd: 3}\ndetector_options: {<<: *a, p: 2}\n")
    assert read_sweep(path).config.detector_options == {"p": 2, "g_sd": 3}
    # Also one that is merged itself before it is read.
    path.write_text("rawboost: &a {p: 1}\ndetector_options: {frontend: &b {<<: *a, p: 2}}\nalign_options: {<<: *b}\n")
    assert read_sweep(path).config.align_options == {"p": 2}
    # What a run writes is read again.
    (tmp_path / "config.json").write_text(config.to_json())
    again = read_sweep(tmp_path / "config.json")
    assert (again.config, again.methods, again.seeds, again.jobs) == (config, ["mgda"], [1], 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_committed_configurations_are_whole(path):
    plan = read_sweep(path, ["data.root=/somewhere"])
    options = dict(plan.config.detector_options)
    if "frontend" in options:
        assert options["frontend"] == {"name": "xlsr-300m", "tune": "all"}
        options["frontend"] = {"name": "tiny"}
        # Truong et al., section 4, and their public code.
        assert (plan.config.lr, plan.config.weight_decay, plan.config.batch_size) == (1e-6, 1e-4, 5)
        assert (plan.config.num_samples, plan.config.patience, plan.config.average_best) == (66800, 7, 5)
    detectors.create(plan.config.detector, **options)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("lr: [1", (), "run.yaml: expected YAML; found: "),
        ("lr: 1\nseed: 2\nlr: 3", (), r"run.yaml:3: expected each key once; found 'lr' again \(see line 1\)"),
        ("rawboost: {p: 1, p: 2}", (), "run.yaml:1: expected each key once; found 'p' again"),
        ("- 1", (), "run.yaml: expected settings by name; found list"),
        ("learning_rate: 1", (), "run.yaml: unknown setting 'learning_rate'; expected data, "),
        ("lr: high", (), "run.yaml: `lr` must be a finite number, 0 or above; found 'high'"),
        ("data: {path: x}", (), "run.yaml: `data` must hold name and root; found path"),
        ("data: 5", (), "run.yaml: `data` must be a folder, or a section with name and root; found 5"),
        ("data:", (), "run.yaml: `data` must be a folder, or a section with name and root; found None"),
        ("align: [none, foo]", (), "run.yaml: `align` must be one of .*; found 'foo'"),
        ("seed: [0, -1]", (), "run.yaml: `seed` must be at least 0; found -1"),
        ("lr: 1", ("lr",), "expected key=value; found 'lr'"),
        ("lr: 1", ("=2",), "expected key=value; found '=2'"),
        ("lr: 1", ("lr.x=2",), "lr.x=2: expected `lr` to be a section; found 1"),
        ("jobs: two", (), "`jobs` a number; found .*, two"),
        ("seed: []", (), "`align` and `seed` must name at least one each"),
        ("align: []", (), "`align` and `seed` must name at least one each"),
        ("views: [clean]", (), r"`views` must be at least two; found \['clean'\]"),
        ("accumulate: 5", (), "`accumulate` must be a divisor of 24; found 5"),
        ("test_sets: {a: {data: b}}", (), "`test_sets.a` must be a section with dataset, data and perhaps subset"),
        ("test_sets: {a: {dataset: csv, data: b, split: dev}}", (), "`test_sets.a` must be a section with .* subset;"),
        ("test_sets: {a: {dataset: csv, data: 5}}", (), "`test_sets.a` must be a section with .*; found .*5"),
        ("test_sets: {a/b: {dataset: csv, data: c}}", (), "`test_sets` must be names without a slash, .*; found 'a/b'"),
        ("test_sets: {dev: {dataset: csv, data: c}}", (), "`test_sets` must be names .* dev .*; found 'dev'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, changes, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(tmp_path / "run.yaml", changes)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, 0, "at least 1") for name in ("sample_rate", "num_samples", "batch_size", "epochs", "average_best")),
        *((name, -1, "at least 0") for name in ("patience", "threads", "num_workers", "cache_mb", "checkpoint_steps")),
        ("path", "jiont", "one of split, joint"),
        ("scope", "layer", "one of model, parameter"),
        ("crop", "end", "one of random, start"),
        ("optimizer", "adamax", "one of adam, adamw, sgd"),
        ("amp", "fp8", "one of off, bf16, fp16"),
        *(("lr", value, "a finite number, 0 or above") for value in (None, True, -1.0)),
        ("epochs", True, "a whole number"),
        ("class_weights", [0, 1], "two numbers above 0"),
        ("views", ["clean", 5], "a list of names"),
        ("rawboost", {1: 2}, "a dict with names as keys"),
    ],
)
def test_values_that_a_setting_cannot_have_are_named(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^`{name}` must be {expected}; found {re.escape(repr(value))}"):
        TrainConfig(**{name: value})


def test_defaults_are_those_of_the_published_detector():
    """AASIST.conf and main.py of https://github.com/clovaai/aasist: the weights are of spoof and bona fide."""
    config = TrainConfig()
    assert (config.detector, config.batch_size, config.num_samples) == ("aasist", 24, 64600)
    assert (config.optimizer, config.lr, config.weight_decay) == ("adam", 1e-4, 1e-4)
    assert config.class_weights == (0.1, 0.9)


def test_the_command_takes_a_file_with_changes(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("detector: light\nnum_samples: 4000\nbatch_size: 4\nepochs: 1\nthreads: 1\nseed: [0, 1]\n")
    command = ["train", str(path), f"data.root={CLIPS}", f"out={tmp_path / 'runs'}", "align=[none, pcgrad]"]
    assert main(command) == 0
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 4
    assert main([*command, "--seeds", "2"]) == 0
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 6
    capsys.readouterr()
    for bad, message in (
        (["train", "lr=1"], "expected DATA or CONFIG before key=value; found 'lr=1'"),
        (["train", str(CLIPS), "lr=1"], "expected a configuration file before 'lr=1'"),
        (["train", str(tmp_path / "absent.yaml")], "absent.yaml"),
        (["train", str(path), "--config", str(path)], "expected one configuration"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err


# ---- what the trainer makes of it ----


@pytest.fixture
def one_thread():
    """PyTorch on one thread: more of them add up in another order, which shows in a score's last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", detectors.names())
def test_every_detector_trains_resumes_scores_and_evaluates(name, tmp_path, capsys, one_thread):
    """Through the command line, on real clips; a run that goes on after an epoch is the unbroken one bit for bit."""
    options = {"rawnet2": {"gru_width": 16, "gru_layers": 1, "embedding": 8}}.get(name, {})
    if name.startswith("xlsr-"):
        options = {"frontend": {"name": "tiny", "tune": 1}}
    settings = {"detector": name, "detector_options": options, "num_samples": 4000, "batch_size": 4, "threads": 1}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings | {"data": str(CLIPS)}))
    for out, epochs in (("whole", (2,)), ("broken", (1, 2))):
        for count in epochs:
            assert main(["train", str(path), f"out={tmp_path / out}", f"epochs={count}"]) == 0
    whole, broken = (load_checkpoint(tmp_path / out / "pcgrad-seed0" / "checkpoint.pt") for out in ("whole", "broken"))
    assert all(torch.equal(value, broken["model"][key]) for key, value in whole["model"].items())
    model, scores = tmp_path / "whole" / "pcgrad-seed0" / "best.pt", tmp_path / "scores.txt"
    assert main(["score", str(model), str(CLIPS), "-o", str(scores), "--device", "cpu"]) == 0
    assert scores.read_text() == (model.parent / "scores_test.txt").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(scores), "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)[0]["eer"] <= 1


def test_accumulated_parts_are_the_whole_batch(tmp_path):
    for path in ("split", "joint"):
        whole = rows_of(train(config_of(tmp_path / f"a-{path}", path=path), progress=False))
        parts = rows_of(train(config_of(tmp_path / f"b-{path}", path=path, accumulate=2), progress=False))
        for a, b in zip(whole, parts, strict=True):
            for key in ("train_loss_clean", "train_loss_augmented", "dev_loss", "cosine_mean"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (path, key)


def test_the_best_epochs_are_averaged(tmp_path):
    run = train(config_of(tmp_path / "runs", epochs=4, average_best=2, patience=0), progress=False)
    losses = {row["epoch"]: row["dev_loss"] for row in rows_of(run)}
    best = sorted(losses, key=losses.__getitem__)[:2]
    kept = {int(path.stem.removeprefix("best-")): load_checkpoint(path)["model"] for path in run.glob("best-*.pt")}
    assert sorted(kept) == sorted(best)
    final = load_checkpoint(run / "best.pt")
    assert final["averaged_epochs"] == best
    for key, value in final["model"].items():
        torch.testing.assert_close(value, (kept[best[0]][key] + kept[best[1]][key]) / 2, rtol=1e-6, atol=1e-7)


def louder(wave, seeds):
    return wave * (1 + (seeds % 3)[:, None] / 10)


def shorter(wave, seeds):
    return wave[:, 1:]


def test_any_callable_is_a_view_and_several_are_paths(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_views", sys.modules[__name__])
    views = ["clean", "rawboost:5", "rawboost", "my_views:louder"]
    run = train(config_of(tmp_path / "runs", views=views, align="gradvac"), progress=False)
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["config"]["views"] == views
    assert all(row["conflict_rate"] is not None for row in rows_of(run))
    clean, loud, _ = next(training_views(config_of(tmp_path, views=["clean", "my_views:louder"])))
    assert not torch.equal(clean, loud)
    for name, message in (
        (
            "my_views:absent",
            r"`views` must name clean, rawboost, rawboost:ALGO or module:function; found 'my_views:absent'",
        ),
        ("rawboost:9", "views: rawboost:9: "),
        ("my_views:shorter", r"view my_views:shorter must return \[4, 8000\], as it gets; found \[4, 7999\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config_of(tmp_path / "bad", views=["clean", name]), progress=False)


def test_public_data_sets_and_further_test_sets(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    lines = ["path,label,attack,split"]
    for split in ("train", "dev", "test"):
        for line in (CLIPS / "protocols" / f"{split}.txt").read_text().splitlines():
            _, name, _, attack, label = line.split()
            shutil.copy(CLIPS / "flac" / f"{name}.flac", root)
            lines.append(f"{name}.flac,{label},{'' if attack == '-' else attack},{split}")
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    plain = train(config_of(tmp_path / "plain"), progress=False)
    tests = {"mine": {"dataset": "csv", "data": str(root / "list.csv"), "subset": "dev"}}
    run = train(
        config_of(tmp_path / "runs", dataset="csv", data=str(root / "list.csv"), test_sets=tests), progress=False
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test_eer"] == json.loads((plain / "results.json").read_text())["test_eer"]
    assert results["test_sets"]["mine"]["eer"] == results["dev_eer"]
    assert (run / "scores_mine.txt").read_text().split()[3::4] == (run / "scores_dev.txt").read_text().split()[3::4]
    with pytest.raises(ConfigError, match=r"`dataset` must be one of corpus, .*; found 'vctk'"):
        config_of(tmp_path / "bad", dataset="vctk")
    with pytest.raises(DataError):
        train(config_of(tmp_path / "bad", dataset="csv", data=str(tmp_path / "absent.csv")), progress=False)


@pytest.fixture
def clips(tmp_path):
    return Path(shutil.copytree(CLIPS, tmp_path / "clips"))


def test_audio_that_a_run_cannot_use_is_found_before_training(tmp_path):
    protocol = CLIPS / "protocols" / "train.txt"
    pack({"train": read_protocol(protocol)}, tmp_path / "p", audio_dir=CLIPS / "flac", sample_rate=8000, resample=True)
    with pytest.raises(DataError, match=r"/p: expected a sample rate of 16000 Hz; found 8000 Hz"):
        open_split(TrainConfig(data=str(tmp_path / "p")), "train")
    config = TrainConfig(train_protocol=str(protocol), train_audio=str(tmp_path / "audio"))
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=r"/audio: expected a folder of audio files; found nothing there"):
            open_split(replace(config, skip_bad=skip_bad), "train")
    (tmp_path / "audio").mkdir()
    with pytest.raises(
        AudioError, match=r"/audio: expected an audio file for each of (\d+) .*; found none for \1, such"
    ):
        open_split(config, "train")
    assert open_split(replace(config, skip_bad=True), "train") is not None


def test_only_training_audio_is_cropped_at_random(tmp_path):
    splits = {name: read_protocol(CLIPS / "protocols" / f"{name}.txt") for name in ("train", "dev", "test")}
    pack(splits, tmp_path / "p", audio_dir=CLIPS / "flac")
    for data in (CLIPS, tmp_path / "p"):
        for crop, expected in (("random", [True, False, False]), ("start", [False] * 3)):
            config = TrainConfig(data=str(data), crop=crop)
            assert [open_split(config, name).random_crop for name in splits] == expected


def test_test_sets_that_cannot_be_read_are_found_before_training(clips, tmp_path):
    (clips / "flac" / f"{(clips / 'protocols' / 'test.txt').read_text().split()[1]}.flac").unlink()
    for values, message in (
        ({"dataset": "corpus", "data": str(tmp_path / "absent")}, f"{tmp_path / 'absent'}: expected .* no such folder"),
        ({"dataset": "csv", "data": str(tmp_path / "a.csv")}, f"{tmp_path / 'a.csv'}: .*found nothing there"),
        ({"dataset": "vctk", "data": str(clips)}, "expected a data set among corpus, .*; found 'vctk'"),
        (
            {"dataset": "corpus", "data": str(clips), "subset": "half"},
            "corpus: expected a subset among .*; found 'half'",
        ),
        (
            {"dataset": "corpus", "data": str(clips)},
            ".*test.txt: expected an audio file for each of .* found none for 1, such as",
        ),
    ):
        config = config_of(tmp_path / "absent" / "runs", test_sets={"more": values})
        with pytest.raises(DataError, match=rf"^test_sets\.more: {message}"):
            sweep(config, ["none", "pcgrad"], [0], progress=False)
        assert not Path(config.out).exists()
        config = replace(config, out=str(tmp_path / "runs"))
        with pytest.raises(DataError, match=rf"^test_sets\.more: {message}"):
            train(config, progress=False)
        assert not list(config.run_dir.iterdir())
    run = train(replace(config, skip_bad=True, epochs=1), progress=False)
    assert json.loads((run / "results.json").read_text())["bad_files"] == 1


def test_test_sets_of_a_finished_run_are_scored_without_training(clips, tmp_path):
    config = config_of(tmp_path / "runs", epochs=1)
    run = train(config, progress=False)
    before, scores = (run / "checkpoint.pt").stat().st_mtime_ns, (run / "scores_test.txt").read_text()
    tests = {"more": {"dataset": "corpus", "data": str(clips)}}
    with_more = replace(config, test_sets=tests)
    sweep(with_more, ["pcgrad"], [0], progress=False)
    assert (run / "checkpoint.pt").stat().st_mtime_ns == before
    assert (run / "scores_more.txt").read_text() == scores == (run / "scores_test.txt").read_text()
    results = json.loads((run / "results.json").read_text())
    assert results["test_sets"]["more"]["eer"] == results["test_eer"]
    written = (run / "results.json").stat().st_mtime_ns
    # Once, and a set that is no longer asked for is no reason to score again.
    train(with_more, progress=False)
    train(config, progress=False)
    assert (run / "results.json").stat().st_mtime_ns == written
    # A set that cannot be scored leaves what is there.
    (clips / "flac" / f"{scores.split()[0]}.flac").write_bytes(b"no audio")
    with pytest.raises(DataError, match="expected a readable audio file"):
        train(replace(config, test_sets=tests | {"again": tests["more"]}), progress=False)
    assert (run / "results.json").stat().st_mtime_ns == written


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(config_of(tmp_path / "runs", tensorboard=True), progress=False)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    with (run / "metrics.csv").open() as file:
        expected = [float(row["dev_loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in events.Scalars("dev_loss")] == pytest.approx(expected, rel=1e-6)


def test_a_compiled_detector_trains_alike(tmp_path, monkeypatch):
    # Generating code for it would take most of a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = rows_of(train(config_of(tmp_path / "plain", epochs=1), progress=False))
    run = train(config_of(tmp_path / "compiled", epochs=1, compile=True), progress=False)
    assert rows_of(run)[0]["dev_loss"] == pytest.approx(plain[0]["dev_loss"], rel=1e-4)
    assert not any("_orig_mod" in key for key in load_checkpoint(run / "best.pt")["model"])
