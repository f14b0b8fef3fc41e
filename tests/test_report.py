import base64
import json
import math
import re
import struct

import numpy as np
import pytest

from gradalign import figures, metrics, report
from gradalign._errors import DataError


def trained_on(folder, *attacks):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"train_attacks": attacks}))
    return folder


@pytest.fixture(scope="module")
def runs(write_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method, gain in (("none", 0.0), ("pcgrad", 0.5)):
        for seed in range(3):
            trained_on(write_run(folder, method, seed, epochs=6 + seed, gain=gain), "espeak", "world")
    write_run(folder, "gradvac", 0, epochs=2, finished=False)
    broken = write_run(folder, "cagrad", 0, epochs=2)
    (broken / "metrics.jsonl").write_text('{"epoch": 1, "dev_l')
    return folder


@pytest.fixture(scope="module")
def written(runs):
    return report.write_report(runs)


def test_writes_page_picture_and_numbers(written, runs):
    assert written == runs / "report.html"
    header = (runs / "report.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:]) == (1600, 1000)
    assert json.loads((runs / "summary.json").read_text())["methods"].keys() == {"none", "pcgrad"}
    assert not list(runs.glob(".*"))


def test_page_is_self_contained(written):
    page = written.read_text()
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "url(" not in re.sub(r"base64,[^\"]*", "", page)
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(pictures) == 7
    assert all(b"<svg" in picture for picture in pictures)


def test_page_explains_and_lists(written):
    page = written.read_text()
    for text in (
        "EER",
        "in conflict",
        "RawBoost",
        "algorithm 4",
        "hifigan",
        "no (unseen)",
        "gradvac-seed0",
        "unfinished",
    ):
        assert text in page
    assert "cagrad-seed0" in page
    assert re.search(r"metrics\.jsonl:1: expected one JSON object per line", page)


def test_numbers_are_those_of_the_run_files(runs):
    summary = report.summarize(runs)
    row = summary["methods"]["none"]
    assert row["seeds"] == [0, 1, 2]
    for seed in range(3):
        folder = runs / f"none-seed{seed}"
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [e["dev_loss"] for e in epochs]
        assert row["best_epoch"]["values"][str(seed)] == losses.index(min(losses)) + 1
        assert row["seconds"]["values"][str(seed)] == pytest.approx(12.5 * len(epochs))
        cosines = np.loadtxt(folder / "steps.csv", delimiter=",", skiprows=1)[:, 1]
        assert row["conflict_share"]["values"][str(seed)] == pytest.approx(np.mean(cosines < 0))
        lines = [line.split() for line in (folder / "scores_test.txt").read_text().splitlines()]
        bonafide = np.array([float(f[3]) for f in lines if f[2] == "bonafide"])
        unseen = np.array([float(f[3]) for f in lines if f[1] in ("hifigan", "vits", "kokoro")])
        everything = np.array([float(f[3]) for f in lines if f[2] == "spoof"])
        assert row["test_eer"]["values"][str(seed)] == metrics.eer(bonafide, unseen)
        assert row["test_eer_all"]["values"][str(seed)] == metrics.eer(bonafide, everything)
        assert row["test_min_dcf"]["values"][str(seed)] == metrics.min_dcf(bonafide, unseen)
    assert summary["attacks"] == {"hifigan": "unseen", "kokoro": "unseen", "vits": "unseen", "world": "seen"}
    assert {r["name"]: r["status"] for r in summary["runs"]} == {
        **{f"{m}-seed{s}": "finished" for m in ("none", "pcgrad") for s in range(3)},
        "gradvac-seed0": "unfinished",
        "cagrad-seed0": "unreadable",
    }


def test_unseen_are_the_attacks_that_no_run_was_trained_on(tmp_path, write_run, monkeypatch):
    for seed, attacks in enumerate((("espeak", "world"), ("espeak", "world", "kokoro"))):
        trained_on(write_run(tmp_path / "runs", "none", seed), *attacks)
    # Neither the dev set's attacks nor files that happen to lie in the current folder count.
    (tmp_path / "corpus" / "protocols").mkdir(parents=True)
    (tmp_path / "corpus" / "protocols" / "train.txt").write_text("s u - hifigan spoof\n")
    monkeypatch.chdir(tmp_path)
    found = report.summarize("runs")["attacks"]
    assert found == {"hifigan": "unseen", "kokoro": "seen", "vits": "unseen", "world": "seen"}


def test_runs_that_did_not_record_their_attacks_have_them_pooled(tmp_path, write_run):
    for method in ("none", "pcgrad"):
        for seed in range(2):
            write_run(tmp_path, method, seed)
    trained_on(tmp_path / "none-seed0", "espeak", "world")
    summary = report.summarize(tmp_path)
    assert set(summary["attacks"].values()) == {"unknown"}
    assert summary["methods"]["none"]["test_eer"] == summary["methods"]["none"]["test_eer_all"]
    text = report.text_summary(tmp_path)
    assert "Which attacks are unseen is not known" in text
    assert "pcgrad against none, EER, test: " in text
    assert "unseen-attack" not in text
    page = report.write_report(tmp_path).read_text()
    assert page.count("<td>not known</td>") == 4
    assert "Which attacks are unseen is not known" in page
    assert "do not occur in training" not in page


def test_settings_that_differ_are_said_to(runs):
    settings = report.summarize(runs)["settings"]
    assert settings["algo"] == 4
    assert settings["seed"] == "differs between runs"


def test_spread_of_one_seed_has_no_deviation():
    assert report.spread({4: 0.25}) == {"mean": 0.25, "sd": None, "min": 0.25, "max": 0.25, "values": {"4": 0.25}}
    assert report.spread({0: math.nan}) is None


def test_compare_is_the_paired_t_interval():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for count in (2, 3, 5, 10):
        base = dict(enumerate(rng.normal(10, 1, count)))
        other = {seed: value + rng.normal(0.3, 0.2) for seed, value in base.items()}
        result = report.compare(base, other)
        differences = np.array([other[s] - base[s] for s in base])
        expected = scipy_stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert result["low"] == pytest.approx(expected.low, rel=1e-3)
        assert result["high"] == pytest.approx(expected.high, rel=1e-3)
        assert (result["verdict"] == "difference") == (expected.low > 0 or expected.high < 0)


def test_compare_does_not_trust_agreement_of_rounded_values():
    base, other = {0: 5.0, 1: 7.0, 2: 6.0}, {0: 4.0, 1: 6.0, 2: 5.0}
    assert report.compare(base, other)["verdict"] == "difference"
    assert report.compare(base, other, resolution=1.0)["verdict"] == "within spread"


def test_compare_uses_common_seeds_only():
    assert report.compare({0: 1.0, 1: 2.0}, {1: 5.0, 2: 9.0}) == {
        "mean": 3.0,
        "low": None,
        "high": None,
        "seeds": [1],
        "verdict": "too few seeds",
    }
    assert report.compare({0: 1.0}, {1: 1.0}) is None


def test_wording_of_a_difference_follows_the_interval(tmp_path, write_run):
    for method in ("none", "pcgrad"):
        for seed in range(3):
            folder = write_run(tmp_path, method, seed)
            rows = [{"epoch": e + 1, "dev_loss": abs(e - (5 if method == "none" else 2)) + 1.0} for e in range(8)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.text_summary(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("pcgrad against none, epochs to best"))
    assert "−3.0 epochs on average over 3 paired seeds (95% interval −4.0 to −2.0): a difference beyond" in line
    dev = next(line for line in text.splitlines() if line.startswith("pcgrad against none, EER, dev"))
    assert "no difference beyond the seed spread" in dev
    # Whole epochs of each seed, but for their mean.
    assert "none    6.0 (6–6)" in text
    assert "3.0 (3–3)<small>3, 3, 3</small>" in report.write_report(tmp_path).read_text()


def test_what_is_the_same_in_every_seed_has_no_interval(tmp_path, write_run):
    for seed in range(2):
        folders = [write_run(tmp_path, method, seed) for method in ("none", "pcgrad")]
        for name in ("scores_dev.txt", "scores_test.txt"):
            (folders[1] / name).write_text((folders[0] / name).read_text())
        for folder in folders:
            (folder / "steps.csv").write_text("step,cosine\n1,0.5\n2,0.25\n")
    assert "pcgrad against none, EER, dev: the same in each of 2 paired seeds.\n" in report.text_summary(tmp_path)
    assert "seed: test EER the same in every seed; epochs" in report._short_comparisons(report.summarize(tmp_path))[0]
    assert "steps in conflict</td><td>the same in every seed<small>0.0, 0.0</small>" in (
        report.write_report(tmp_path).read_text()
    )


def test_no_conflict_has_an_axis_of_a_sensible_length(tmp_path):
    run = report.Run("none-seed0", tmp_path, "none", 0, "finished", epochs=[{"conflict_rate": 0.0, "dev_eer": 0.0}] * 3)
    for draw in (report._draw_conflict_share, report._draw_dev_eer):
        axes = figures.new_figure(4, 3).add_subplot()
        draw(axes, {"none": [run]})
        assert axes.get_ylim() == (0, 1)


def test_runs_in_progress_alone_make_a_report(tmp_path, write_run):
    write_run(tmp_path, "pcgrad", 0, epochs=1, finished=False)
    empty = write_run(tmp_path, "none", 0, epochs=0, finished=False)
    (empty / "steps.csv").unlink()
    page = report.write_report(tmp_path).read_text()
    assert "none-seed0" in page
    assert report.summarize(tmp_path)["methods"] == {}


def test_only_one_method_makes_a_report(tmp_path, write_run):
    write_run(tmp_path, "pcgrad", 0, epochs=1)
    assert report.write_report(tmp_path).exists()
    assert report.summarize(tmp_path)["comparisons"] == []


def test_perfect_scores_make_a_report(tmp_path, write_run):
    folder = write_run(tmp_path, "none", 0)
    (folder / "scores_test.txt").write_text("h1 - bonafide 1\nh2 - bonafide 2\ns1 new spoof -1\n")
    report.write_report(tmp_path)
    assert report.summarize(tmp_path)["methods"]["none"]["test_eer"]["mean"] == 0


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected run folders with a config\.json; found none"):
        report.write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: expected a folder of training runs"):
        report.write_report(tmp_path / "absent")


def test_cosines_with_a_wrong_column_or_entry_are_named(tmp_path):
    (tmp_path / "steps.csv").write_text("step,value\n1,0.5\n")
    with pytest.raises(DataError, match=r"steps\.csv: expected the columns step, cosine; found step, value"):
        report.read_cosines(tmp_path / "steps.csv")
    (tmp_path / "steps.csv").write_text("step,cosine\n1,0.5\n2,\n3,x\n")
    with pytest.raises(DataError, match=r"steps\.csv: expected a number"):
        report.read_cosines(tmp_path / "steps.csv")
