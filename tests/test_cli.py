import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import soundfile

from gradalign import cli, evaluation
from gradalign.config import TrainConfig
from gradalign.fusion import Fusion

COMMANDS = ["train", "score", "evaluate", "conflicts", "augment", "corpus build", "corpus check", "data check"]
COMMANDS += ["pack", "report", "fuse", "table", "info"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Noise against hum: 12 training, 8 dev and 8 test utterances, one attack seen in training and one not."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "flac").mkdir()
    (root / "protocols").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("dev", 8), ("test", 8)):
        lines = []
        for i in range(count):
            bonafide = i % 2 == 0
            wave = rng.normal(0, 0.1, 2500) + (0 if bonafide else 0.3 * np.sin(0.2 * np.arange(2500)))
            soundfile.write(root / "flac" / f"{split}{i}.flac", wave, 16000)
            attack = "-" if bonafide else ("new" if split == "test" and i > 4 else "hum")
            lines.append(f"s{i % 3} {split}{i} - {attack} {'bonafide' if bonafide else 'spoof'}\n")
        (root / "protocols" / f"{split}.txt").write_text("".join(lines))
    return root


SMALL = ["--detector", "light", "--num-samples", "2000", "--batch-size", "4", "--epochs", "2", "--lr", "1e-3"]
SMALL += ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "runs"
    assert cli.main(["train", str(corpus), "--out", str(out), "--align", "none,pcgrad", "--seeds", "0,1", *SMALL]) == 0
    return out


def fails(capsys, arguments, code=2):
    """Run a command that must fail; returns its one line."""
    assert cli.main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("gradalign: error: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help_shows_an_example(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "example" in capsys.readouterr().out


def test_help_shows_the_defaults(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for setting in ("lr", "batch_size", "detector", "path"):
        assert f"(default: {getattr(TrainConfig(), setting)})" in shown
    assert "takes more than 22 GB of memory on a CPU" in shown
    assert "On a small machine: --detector light; a smaller --batch-size; or --accumulate 8" in shown


def test_every_setting_has_a_flag():
    # Sections of sections are for files only.
    covered = {name for name, *_ in cli._SETTINGS} | {"data", "out", "align", "seed", "test_sets"}
    assert covered == {f.name for f in fields(TrainConfig)}


def test_train_leaves_runs_and_their_report(runs):
    assert {p.name for p in runs.iterdir() if p.is_dir()} == {
        "none-seed0",
        "none-seed1",
        "pcgrad-seed0",
        "pcgrad-seed1",
    }
    summary = json.loads((runs / "summary.json").read_text())
    assert {m: row["seeds"] for m, row in summary["methods"].items()} == {"none": [0, 1], "pcgrad": [0, 1]}
    assert summary["attacks"] == {"hum": "seen", "new": "unseen"}
    assert (runs / "report.html").exists()
    assert (runs / "report.png").exists()


def test_report_agrees_with_the_trainer(runs):
    summary = json.loads((runs / "summary.json").read_text())
    for method in ("none", "pcgrad"):
        row = summary["methods"][method]
        for seed in ("0", "1"):
            results = json.loads((runs / f"{method}-seed{seed}" / "results.json").read_text())
            assert row["best_epoch"]["values"][seed] == results["epochs_to_best"]
            assert row["conflict_share"]["values"][seed] == pytest.approx(results["conflict_rate"])
            assert row["dev_eer"]["values"][seed] == pytest.approx(results["dev_eer"])
            assert row["test_eer"]["values"][seed] == pytest.approx(results["test_eer_unseen"])
            assert row["test_eer_all"]["values"][seed] == pytest.approx(results["test_eer"])


def test_train_again_keeps_finished_runs(runs, corpus, capsys):
    before = (runs / "none-seed0" / "best.pt").stat().st_mtime_ns
    arguments = ["train", str(corpus), "--out", str(runs), "--align", "none", "--seeds", "0", *SMALL]
    assert cli.main(arguments) == 0
    assert (runs / "none-seed0" / "best.pt").stat().st_mtime_ns == before
    assert "steps in conflict" in capsys.readouterr().out


def test_flags_override_the_configuration_file(runs, corpus, tmp_path, capsys):
    config = runs / "none-seed0" / "config.json"
    arguments = ["train", "--config", config, "--out", tmp_path, "--epochs", "1", "--algo", "5", "--no-skip-bad"]
    assert cli.main([str(a) for a in [*arguments, "--rawboost", "snr_min=15", "--class-weights", "0.2,0.8"]]) == 0
    written = json.loads((tmp_path / "none-seed0" / "config.json").read_text())
    assert (written["epochs"], written["algo"], written["rawboost"]) == (1, 5, {"snr_min": 15})
    assert (written["num_samples"], written["class_weights"]) == (2000, [0.2, 0.8])


def test_flags_override_the_runs_that_a_file_names(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("gradalign.sweep.sweep", lambda config, *runs: seen.append(runs))
    monkeypatch.setattr(cli, "_print_report", lambda runs: None)
    (tmp_path / "run.yaml").write_text("data: d\nalign: [none, cagrad]\nseed: [1, 2]\njobs: 2\n")
    command = ["train", str(tmp_path / "run.yaml")]
    assert cli.main(command) == cli.main([*command, "--align", "mean", "--seeds", "3", "--jobs", "1"]) == 0
    assert seen == [(["none", "cagrad"], [1, 2], 2), (["mean"], [3], 1)]


@pytest.mark.parametrize("subset", ["test", "dev"])
def test_scores_of_a_folder_are_those_of_training(runs, corpus, tmp_path, subset):
    out, model = tmp_path / "scores.txt", runs / "pcgrad-seed0" / "best.pt"
    command = ["score", str(model), str(corpus), "--subset", subset, "-o", str(out), "--device", "cpu"]
    assert cli.main(command) == 0
    found = evaluation.read_scores(out)
    expected = evaluation.read_scores(runs / "pcgrad-seed0" / f"scores_{subset}.txt")
    assert found.utterances == expected.utterances
    assert found.values == pytest.approx(expected.values, abs=1e-5)


def test_no_folder_for_the_scores_is_seen_before_scoring(tmp_path, capsys):
    out = tmp_path / "absent" / "scores.txt"
    assert cli.main(["score", str(tmp_path / "no model"), str(tmp_path), "-o", str(out)]) == 2
    assert f"{out}: expected a folder to write it into; found none" in capsys.readouterr().err


def test_scores_of_packed_data_are_those_of_the_files(runs, corpus, tmp_path, capsys):
    model, out = str(runs / "pcgrad-seed0"), tmp_path / "scores.txt"
    assert cli.main(["pack", str(corpus), str(tmp_path / "packed")]) == 0
    command = ["score", model, str(tmp_path / "packed"), "--dataset", "corpus", "-o", str(out), "--device", "cpu"]
    assert cli.main(command) == 0
    written = out.read_text()
    assert cli.main([part for part in command if part not in ("--dataset", "corpus")]) == 0
    assert out.read_text() == written
    found, expected = evaluation.read_scores(out), evaluation.read_scores(runs / "pcgrad-seed0" / "scores_test.txt")
    assert found.utterances == expected.utterances
    assert found.values == pytest.approx(expected.values, abs=1e-5)
    assert cli.main([*command, "--subset", "dev"]) == 0
    dev = evaluation.read_scores(runs / "pcgrad-seed0" / "scores_dev.txt")
    assert evaluation.read_scores(out).utterances == dev.utterances
    labels = ["--dataset", "corpus", "--root", str(tmp_path / "packed"), "--subset", "dev"]
    assert cli.main(["evaluate", str(out), *labels]) == 0
    out.write_text(written)
    # The packed folder names its utterances too.
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--csv"]) == 0
    printed = capsys.readouterr().out
    data = ["--dataset", "corpus", "--root", str(tmp_path / "packed")]
    assert cli.main(["evaluate", str(out), *data, "--csv"]) == 0
    assert capsys.readouterr().out == printed


def test_scores_of_single_files_need_no_protocol(runs, corpus, tmp_path, capsys):
    files = [str(corpus / "flac" / f"test{i}.flac") for i in (1, 0)]
    out = tmp_path / "scores.txt"
    assert cli.main(["score", str(runs / "pcgrad-seed0"), *files, "-o", str(out), "--device", "cpu"]) == 0
    expected = evaluation.read_scores(runs / "pcgrad-seed0" / "scores_test.txt")
    known = dict(zip(expected.utterances, expected.values, strict=True))
    lines = [line.split() for line in out.read_text().splitlines()]
    assert [name for name, _ in lines] == files
    assert [float(value) for _, value in lines] == pytest.approx([known["test1"], known["test0"]], abs=1e-5)
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, 0.1 * np.random.default_rng(0).standard_normal(2000), 8000)
    command = ["score", runs / "pcgrad-seed0", slow, "-o", out, "--device", "cpu"]
    assert "expected a sample rate of 16000 Hz; found 8000 Hz" in fails(capsys, command)
    assert cli.main([str(part) for part in [*command, "--resample"]]) == 0


def test_evaluate_prints_a_table_json_and_csv(runs, corpus, capsys):
    scores = str(runs / "none-seed0" / "scores_test.txt")
    assert cli.main(["evaluate", scores, "--by", "attack", "--asv-rates", "0.05,0.05,0.3"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"condition +bona fide +spoof +EER % +min DCF +act DCF +Cllr bits +min t-DCF", table)
    assert re.search(r"^new +4 +2 ", table, re.MULTILINE)
    protocol = str(corpus / "protocols" / "test.txt")
    assert cli.main(["evaluate", scores, "--protocol", protocol, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == evaluation.evaluate(evaluation.read_scores(scores))
    assert cli.main(["evaluate", scores, "--csv"]) == 0
    line = next(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(line["cllr"]) == rows[0]["cllr"]


def test_official_score_files_need_a_data_set_and_tell_codecs(runs, corpus, tmp_path, capsys):
    lines = ["path,label,speaker,attack,codec,split\n"]
    for line in (corpus / "protocols" / "test.txt").read_text().splitlines():
        speaker, name, _, attack, label = line.split()
        lines.append(f"flac/{name}.flac,{label},{speaker},{attack},{('mp3', 'ogg')[int(name[-1]) % 4 > 1]},test\n")
    (corpus / "list.csv").write_text("".join(lines))
    model, out, det = str(runs / "pcgrad-seed0"), tmp_path / "scores.txt", tmp_path / "det.png"
    data = ["--dataset", "csv"]
    options = ["--format", "2021", "--device", "cpu", "-o", str(out)]
    assert cli.main(["score", model, str(corpus / "list.csv"), *data, *options]) == 0
    assert all(len(line.split()) == 2 for line in out.read_text().splitlines())
    capsys.readouterr()
    data += ["--root", str(corpus / "list.csv")]
    assert cli.main(["evaluate", str(out), *data, "--by", "codec", "--interval", "50", "--det", str(det)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"condition +bona fide +spoof +EER % +from +to ", table)
    assert re.search(r"^mp3 +2 +2 .*\nogg +2 +2 ", table, re.MULTILINE)
    assert "50 bootstrap samples, of speakers (so few that it is too narrow).\n" in table
    assert det.stat().st_size > 1000
    assert cli.main(["evaluate", str(out), *data, "--det", str(tmp_path / "whole.png")]) == 0
    assert det.read_bytes() != (tmp_path / "whole.png").read_bytes()
    capsys.readouterr()
    assert "Left out" not in table
    assert cli.main(["evaluate", str(out), *data, "--by", "speaker"]) == 0
    assert len(re.findall(r"^s\d +", capsys.readouterr().out, re.MULTILINE)) == 3
    (corpus / "list.csv").write_text("".join(lines).replace(",spoof,s0,", ",spoof,t0,"))
    assert cli.main(["evaluate", str(out), *data, "--by", "speaker"]) == 0
    assert "\nLeft out, as of one class only: speaker s0 and 1 more.\n" in capsys.readouterr().out
    assert "expected --dataset and --root together" in fails(capsys, ["evaluate", out, "--dataset", "csv"])
    assert "found no labels" in fails(capsys, ["evaluate", out])
    assert "expected one folder with csv; found 2 paths" in fails(
        capsys, ["score", model, corpus, corpus, "--dataset", "csv", "-o", out]
    )


def test_scores_are_fused(runs, tmp_path, capsys):
    out = tmp_path / "fused.txt"
    folders = [runs / f"pcgrad-seed{seed}" for seed in (0, 1)]
    test, dev = ([str(folder / f"scores_{split}.txt") for folder in folders] for split in ("test", "dev"))
    assert cli.main(["fuse", *test, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "+0.5 x" in printed
    assert "\n+0 as the offset\n" in printed
    mean = np.mean([evaluation.read_scores(path).values for path in test], axis=0)
    assert evaluation.read_scores(out).values == pytest.approx(mean, rel=1e-8)
    assert cli.main(["fuse", *test, "--dev", *dev, "-o", str(out)]) == 0
    fitted = Fusion.fit([evaluation.read_scores(path) for path in dev])
    found = fitted([evaluation.read_scores(path) for path in test])
    assert evaluation.read_scores(out).values == pytest.approx(found.values, rel=1e-7)
    assert "expected dev scores of each of 2 detectors" in fails(capsys, ["fuse", *test, "--dev", dev[0], "-o", out])


def test_results_are_tabulated(runs, tmp_path, capsys):
    out = tmp_path / "results"
    theirs = f"RawNet2/published:test={runs / 'none-seed0' / 'scores_test.txt'}"
    assert cli.main(["table", str(runs), theirs, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() in printed
    assert [line.split("|")[2].strip() for line in printed.splitlines()[2:5]] == ["none", "pcgrad", "published"]
    assert "nothing: expected a folder of training runs" in fails(capsys, ["table", tmp_path / "nothing"])


def test_bench_is_the_microbenchmark(capsys):
    small = ["--batch", "1", "--samples", "1000", "--rounds", "2", "--seconds", "0.1", "--threads", "1"]
    assert cli.main(["bench", "--ops", "isd", *small]) == 0
    assert cli.main(["bench", "--ops", "gram", "--parameters", "xlsr-300m/4", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("op ")]
    rows = [line for line in lines if line.startswith(("isd ", "gram "))]
    assert re.match(r"isd +batch=1 samples=1000 +\w+ +[\d.]+ +[\d.]+ to [\d.]+ ", rows[0])
    assert re.match(r"gram +parameters=xlsr-300m/4 paths=2 +\w+ +[\d.]+ ", rows[-1])
    # Everything stands below its heading.
    assert {len(line) for line in rows} == {len(heads[0])}
    assert (
        len({line.index(name) for line, name in ((heads[0], "backend"), *((r, "reference") for r in rows[1::2]))}) == 1
    )
    assert not any("{" in line for line in lines)
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--published RawBoost.py \\\n        --published-processes 16" in shown
    assert cli.main(["bench", "--ops", "nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradalign: error: argument --ops: invalid choice: 'nothing'")
    assert error.count("\n") == 1


def test_unknown_arguments_are_an_error(capsys):
    assert "unrecognized arguments: --nothing (see `gradalign info --help`)" in fails(capsys, ["info", "--nothing"])


def test_conflicts_of_runs_and_of_data(runs, corpus, tmp_path, capsys):
    out = tmp_path / "conflicts"
    small = ["--detector", "light", "--num-samples", "2000", "--batch-size", "4", "--device", "cpu", "--steps", "5"]
    assert cli.main(["conflicts", str(runs), str(corpus), "--out", str(out), *small]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"% of \d+ steps in conflict", text)) == 5
    assert (out / "conflicts.png").read_bytes().startswith(b"\x89PNG")
    steps = list(csv.DictReader((out / "conflicts_steps.csv").open()))
    recorded = list(csv.DictReader((runs / "none-seed1" / "steps.csv").open()))
    found = [(s["step"], s["cosine"]) for s in steps if s["run"] == "none-seed1"]
    assert found == [(r["step"], r["cosine"]) for r in recorded]
    assert len([s for s in steps if s["run"] == str(corpus)]) == 5
    layers = list(csv.DictReader((out / "conflicts_layers.csv").open()))
    parameters = list(csv.DictReader((runs / "none-seed1" / "parameters.csv").open()))
    assert [row["layer"] for row in layers if row["run"] == "none-seed1"] == [p["parameter"] for p in parameters]
    assert all(0 <= float(row["conflict_share"]) <= 1 for row in layers if row["conflict_share"])


def test_conflicts_tell_runs_of_one_name_apart(runs, tmp_path):
    one, other = runs / "none-seed1", tmp_path / "none-seed1"
    shutil.copytree(one, other)
    assert cli.main(["conflicts", str(one), str(other), "--out", str(tmp_path / "conflicts")]) == 0
    steps = list(csv.DictReader((tmp_path / "conflicts" / "conflicts_steps.csv").open()))
    assert {row["run"] for row in steps} == {str(one), str(other)}


def test_augment_reports_what_it_did(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["augment", str(corpus), str(out), "--algo", "5"]) == 0
    assert "28 files written" in capsys.readouterr().out
    assert soundfile.info(str(out / "flac" / "dev3.flac")).frames == 2500
    message = fails(capsys, ["augment", corpus, out])
    assert "already there (28 of 28 outputs)" in message
    before, one = (out / "flac" / "dev3.flac").read_bytes(), [str(corpus / "flac"), str(out / "flac")]
    assert cli.main(["augment", *one, "--algo", "5", "--seed", "1", "--skip-existing"]) == 0
    assert re.search(r"^0 files .*\n28 kept: there already\n", capsys.readouterr().out)
    assert (out / "flac" / "dev3.flac").read_bytes() == before
    assert cli.main(["augment", *one, "--algo", "5", "--seed", "1", "--overwrite"]) == 0
    assert (out / "flac" / "dev3.flac").read_bytes() != before
    capsys.readouterr()
    (tmp_path / "bad.flac").write_bytes(b"fLaC")
    message = fails(capsys, ["augment", tmp_path / "bad.flac", tmp_path / "worse.flac"])
    assert "bad.flac: expected a readable audio file" in message
    assert re.search(r"\w\. --skip-bad lists", message)


def test_report_again(runs, capsys):
    (runs / "report.html").unlink()
    assert cli.main(["report", str(runs)]) == 0
    assert (runs / "report.html").exists()
    assert "EER" in capsys.readouterr().out


def test_info_and_corpus_check(capsys, tmp_path):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("Versions")
    assert "SHA256SUMS" in fails(capsys, ["corpus", "check", tmp_path])


# As argparse names it.
NINE = "'9'" if sys.version_info >= (3, 14) else "9"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "absent.txt"], "absent.txt: expected a score file; found nothing there"),
        (["score", "absent.pt", "x.wav", "-o", "s.txt"], "absent.pt: expected a checkpoint; found nothing there"),
        (["report", "absent"], "absent: expected a folder of training runs"),
        (["conflicts", "absent"], "absent: expected a training run, a folder of runs, or a data folder"),
        (["augment", "absent", "out"], "absent: expected an audio file or a folder"),
        (["train", "absent"], "absent: expected the train protocol at protocols/train.txt; found no such folder"),
        (["train"], "expected DATA, or --train-protocol"),
        (["train", ".", "--config", "absent.json"], "absent.json: expected a configuration file; found nothing there"),
        (["train", ".", "--align", "none,none"], "argument --align: expected different names"),
        (["train", ".", "--align", "pcgard"], "found 'pcgard'"),
        (["train", ".", "--seeds", "0,x"], "argument --seeds: expected different whole numbers"),
        (["train", ".", "--algo", "9"], f"argument --algo: invalid choice: {NINE}"),
        (["train", ".", "--class-weights", "1"], "expected SPOOF,BONAFIDE"),
        (["train", ".", "--rawboost", "x"], "expected NAME=VALUE pairs"),
        (["train", ".", "--epochs", "0"], "`epochs` must be at least 1; found 0"),
        (["augment", "a", "b", "--algo", "9"], f"argument --algo: invalid choice: {NINE}"),
        (["evaluate", "s", "--asv-rates", "1,2"], "expected p_fa,p_miss,p_fa_spoof in [0, 1]; found '1,2'"),
        (["evaluate", "s", "--interval", "-3"], "--interval: expected a whole number of at least 2; found '-3'"),
        (["train", ".", "--align", "pcgrad,foo"], "--align: expected methods among mean, none, "),
        (["train", ".", "--jobs", "0"], "--jobs: expected a whole number of at least 1; found '0'"),
        (["pack", "a", "b", "--jobs", "0"], "--jobs: expected a whole number of at least 1; found '0'"),
        (["data", "check", "csv", ".", "--jobs", "x"], "--jobs: expected a whole number of at least 1; found 'x'"),
        (["score", "m", ".", "-o", "s", "--batch-size", "0"], "--batch-size: expected a whole number of at least 1"),
        (["augment", "a", "b", "--seed", "-1"], "--seed: expected a whole number of at least 0; found '-1'"),
        (["pack", "absent", "out"], "absent: expected a corpus data set; found nothing there"),
        (["evaluate", "."], ".: expected a score file; found a folder"),
        (["fuse", "absent", "-o", "fused"], "absent: expected a score file; found nothing there"),
        (["train", "--bogus"], "unrecognized arguments: --bogus (see `gradalign train --help`)"),
        (["corpus", "check", "a", "b"], "unrecognized arguments: b (see `gradalign corpus check --help`)"),
        (["bake"], "invalid choice: 'bake'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, arguments)


@pytest.mark.parametrize("command", ["score m x -o {}", "fuse a b -o {}", "evaluate s --det {}", "table r -o {}/t"])
def test_files_that_cannot_be_written_are_found_before_work(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    line = fails(capsys, command.format("absent/there").split())
    assert "absent/there" in line
    assert "expected a folder to write it into; found none (see `gradalign " in line
    if not command.startswith("table"):
        line = fails(capsys, command.format("folder").split())
        assert "folder: expected a file to write; found a folder" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def read_in_the_background(path):
    """A thread that reads a FIFO to its end, and what it has read."""
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_text()), daemon=True)
    thread.start()
    return thread, found


def test_scores_go_into_a_fifo(runs, corpus, tmp_path, capsys):
    fifo, file = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    scores = runs / "pcgrad-seed0" / "scores_test.txt"
    for command in (["score", runs / "pcgrad-seed0", corpus, "--device", "cpu"], ["fuse", scores, scores]):
        thread, found = read_in_the_background(fifo)
        for output in (file, fifo):
            assert cli.main([str(a) for a in [*command, "-o", output]]) == 0
        thread.join(30)
        assert found == [file.read_text()]
        printed = capsys.readouterr()
        assert f"scores: {file}" in printed.out
        assert f"scores: {fifo}" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "file"}
    assert fifo.is_fifo()


def test_scores_go_to_stdout(runs, corpus, tmp_path):
    # As /dev/stdout, which no test may touch.
    stdout, file = tmp_path / "stdout", tmp_path / "file"
    stdout.symlink_to("/proc/self/fd/1")
    command = [sys.executable, "-m", "gradalign", "score", str(runs / "pcgrad-seed0"), str(corpus), "--device", "cpu"]
    piped, _ = (
        subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=True).stdout
        for output in (stdout, file)
    )
    assert piped == file.read_text()
    assert stdout.is_symlink()


def test_scores_come_after_what_is_in_a_file_that_stdout_is_appended_to(runs, tmp_path):
    stdout, log, scores = tmp_path / "stdout", tmp_path / "log", runs / "pcgrad-seed0" / "scores_test.txt"
    stdout.symlink_to("/proc/self/fd/1")
    log.write_text("before\n")
    command = [sys.executable, "-m", "gradalign", "fuse", str(scores), "-o", str(stdout)]
    with log.open("a") as file:
        told = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=True).stderr
    assert log.read_text() == "before\n" + scores.read_text()
    assert f"scores: {stdout}" in told


def test_jobs_whose_runs_have_worker_processes_end(corpus, tmp_path):
    command = [sys.executable, "-m", "gradalign", "train", str(corpus), "--out", str(tmp_path / "runs"), *SMALL]
    command += ["--align", "none,pcgrad", "--epochs", "1", "--jobs", "2", "--num-workers", "1"]
    subprocess.run(command, check=True, timeout=120)
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 2


@pytest.mark.parametrize(
    "command",
    ["corpus build {}", "pack absent {}", "train absent --out {}", "conflicts absent --out {}", "augment . {}"],
)
def test_folders_that_cannot_be_made_are_found_before_work(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert "file: expected a folder; found a file" in fails(capsys, command.format("file").split())
    assert "file/x: expected a folder; found the file file" in fails(capsys, command.format("file/x").split())


def test_a_manifest_that_cannot_be_written_is_found_before_work(corpus, capsys, tmp_path):
    line = fails(capsys, ["data", "check", "corpus", corpus, "--hash", tmp_path / "absent" / "sums"])
    assert "sums: expected a folder to write it into; found none" in line


def test_a_file_whose_writer_was_killed_is_skipped_and_named(runs, corpus, tmp_path, capsys):
    whole = (corpus / "flac" / "test0.flac").read_bytes()
    cut = tmp_path / "in" / "cut.flac"
    cut.parent.mkdir()
    (tmp_path / "in" / "good.flac").write_bytes(whole)
    # A FLAC header holds the number of samples in 36 bits from the low half of its byte 21; 0 until it is finished.
    cut.write_bytes(whole[:21] + bytes([whole[21] & 0xF0, 0, 0, 0, 0]) + whole[26:600])
    # What nobody asked for: a killed writer's temporary file, and a hidden folder's.
    (tmp_path / "in" / ".good.1-00000000.tmp.flac").write_bytes(b"fLaC")
    (tmp_path / "in" / ".trash").mkdir()
    (tmp_path / "in" / ".trash" / "old.flac").write_bytes(b"fLaC")
    out = tmp_path / "scores.txt"
    score = ["score", str(runs / "pcgrad-seed0"), str(cut.parent), "-o", str(out), "--device", "cpu"]
    assert "cut.flac: expected the number of samples in its header; found none" in fails(capsys, score)
    assert cli.main([*score, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert f"1 skipped:\n  {cut}: expected the number of samples" in printed
    assert [line.split()[0] for line in out.read_text().splitlines()] == [str(cut.with_name("good.flac"))]
    augment = ["augment", str(cut.parent), str(tmp_path / "out")]
    assert "cut.flac: expected the number of samples in its header; found none" in fails(capsys, augment)
    assert cli.main([*augment, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 file written")
    assert "1 skipped:" in printed


def test_names_that_are_not_utf_8_are_trained_on_scored_and_augmented(runs, corpus, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "runs"
    for split, folder in (("train", "training"), ("dev", "validation"), ("test", "testing")):
        for label, inner in (("bonafide", "real"), ("spoof", "fake")):
            (data / folder / inner).mkdir(parents=True)
            for line in (corpus / "protocols" / f"{split}.txt").read_text().splitlines():
                if line.endswith(label):
                    name = line.split()[1]
                    target = os.fsencode(data / folder / inner / name) + b"\xe9.flac"
                    shutil.copy(corpus / "flac" / f"{name}.flac", target)
    assert cli.main(["train", str(data), "--dataset", "for", "--out", str(out), *SMALL, "--epochs", "1"]) == 0
    assert "unreadable" not in capsys.readouterr().out
    scores = out / "pcgrad-seed0" / "scores_test.txt"
    assert scores.read_bytes().count(b"\xe9.flac ") == 8
    assert cli.main(["evaluate", str(scores)]) == 0
    (data / "testing" / "real" / os.fsdecode(b"bad\xe9.flac")).write_bytes(b"fLaC")
    options = ["-o", str(tmp_path / "scores.txt"), "--device", "cpu", "--skip-bad"]
    assert cli.main(["score", str(out / "pcgrad-seed0"), str(data / "testing"), *options]) == 0
    assert (tmp_path / "scores.txt").read_bytes().count(b"\xe9.flac ") == 8
    assert cli.main(["augment", str(data / "testing"), str(tmp_path / "augmented"), "--skip-bad"]) == 0
    assert capsys.readouterr().out.count("bad\\udce9.flac: expected a readable audio file") == 2


def test_a_terminal_without_the_characters_is_no_error(runs):
    command = [sys.executable, "-m", "gradalign", "report", str(runs)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "mean (lowest\\u2013highest) over seeds" in shown


def test_a_missing_clip_is_found_before_training(corpus, tmp_path, capsys):
    copy, out = tmp_path / "copy", tmp_path / "runs"
    shutil.copytree(corpus, copy)
    (copy / "flac" / "test3.flac").unlink()
    hint = f"(`gradalign data check corpus {copy}` lists them)"
    line = fails(capsys, ["train", copy, "--out", out, *SMALL])
    assert "expected an audio file for each of 8 utterances; found none for 1, such as" in line
    assert f"{copy}/flac/test3.flac {hint}" in line
    named = [x for s in ("train", "dev", "test") for x in (f"--{s}-protocol", copy / f"protocols/{s}.txt")]
    named += [x for s in ("train", "dev", "test") for x in (f"--{s}-audio", copy / "flac")]
    line = fails(capsys, ["train", *named, "--out", out, *SMALL])
    assert line.endswith(f"such as {copy}/flac/test3.flac")
    assert not out.exists()
    assert cli.main([str(a) for a in ["train", copy, "--out", out, "--skip-bad", *SMALL, "--epochs", "1"]]) == 0
    # A finished run is kept, whatever became of its audio.
    assert cli.main([str(a) for a in ["train", copy, "--out", out, "--skip-bad", *SMALL, "--epochs", "1"]]) == 0


def test_broken_inputs_are_named(runs, corpus, tmp_path, capsys):
    scores = runs / "none-seed0" / "scores_test.txt"
    line = fails(capsys, ["evaluate", scores, "--protocol", corpus / "protocols" / "dev.txt"])
    assert "scores_test.txt" in line
    assert "dev.txt must name the same utterances" in line
    whole = (runs / "none-seed0" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt" in fails(capsys, ["score", tmp_path / "cut.pt", corpus, "-o", tmp_path / "s.txt"])
    assert not (tmp_path / "s.txt").exists()
    (tmp_path / "config.json").write_text('{"epoch": 3}')
    line = fails(capsys, ["train", corpus, "--config", tmp_path / "config.json"])
    assert "config.json: unknown setting 'epoch'" in line


def test_data_check_counts_and_fails_where_a_file_is_missing(corpus, tmp_path, capsys):
    assert cli.main(["data", "check", "corpus", str(corpus), "--hash", str(tmp_path / "sums")]) == 0
    printed = capsys.readouterr().out
    assert "dev: 8 utterances (4 bonafide, 4 spoof), 3 speakers, 0.00 h, 16000 Hz" in printed
    assert printed.endswith("nothing is wrong\n")
    assert len((tmp_path / "sums").read_text().splitlines()) == 28
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (copy / "flac" / "dev3.flac").unlink()
    assert cli.main(["data", "check", "corpus", str(copy), "--subset", "dev", "--subset", "test", "--hash"]) == 1
    assert f"  missing: 1\n    {copy}/flac/dev3.flac\n" in capsys.readouterr().out
    assert len((copy / "corpus.sha256").read_text().splitlines()) == 15
    assert "expected a data set among corpus, " in fails(capsys, ["data", "check", "asvspoof", corpus])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("GRADALIGN_DEBUG", "1")
    assert cli.main(["report", "absent"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(corpus, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradalign.sweep.sweep", interrupted)
    assert cli.main(["train", str(corpus), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == (
        "gradalign: interrupted; the same command goes on from the last checkpoint of each run\n"
    )


def test_an_unexpected_error_is_one_line_too(corpus, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr("gradalign.sweep.sweep", broken)
    assert "RuntimeError: no luck" in fails(capsys, ["train", corpus], code=1)


def test_a_closed_pipe_is_no_traceback(runs):
    command = [sys.executable, "-m", "gradalign", "evaluate", str(runs / "none-seed0" / "scores_test.txt")]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_ctrl_c_ends_with_130(corpus, tmp_path):
    arguments = [sys.executable, "-m", "gradalign", "augment", str(corpus), str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "GRADALIGN_DEBUG": "0"})
    while process.poll() is None and not list((tmp_path / "out").rglob("*.flac")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    # It may have been done before the signal came.
    assert process.wait() in (0, 130)
    assert "Traceback" not in error
    assert all(soundfile.info(str(p)).frames == 2500 for p in (tmp_path / "out").rglob("*.flac"))
