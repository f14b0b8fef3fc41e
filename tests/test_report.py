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


def test_page_explains_and_lists(written, runs):
    page = written.read_text()
    for text in (
        "EER",
        "in conflict",
        "RawBoost",
        "algorithm 4",
        "(6 runs)",
        "hifigan",
        "<td>hifigan</td><td>no (unseen)</td>",
        "<td>world</td><td>yes</td>",
        "gradvac-seed0",
        "unfinished",
    ):
        assert text in page
    assert "cagrad-seed0" in page
    assert "no difference beyond seed spread" in report._short_comparisons(report.summarize(runs))[0]
    # In minutes, of 75, 87.5 and 100 seconds.
    assert "none    1.5 (1.2–1.7)" in report.text_summary(runs)
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
        assert row["best_dev_loss"]["values"][str(seed)] == min(losses)
        assert row["seconds"]["values"][str(seed)] == pytest.approx(12.5 * len(epochs))
        cosines = np.loadtxt(folder / "steps.csv", delimiter=",", skiprows=1)[:, 1]
        assert row["conflict_share"]["values"][str(seed)] == pytest.approx(np.mean(cosines < 0))
        lines = [line.split() for line in (folder / "scores_test.txt").read_text().splitlines()]
        bonafide = np.array([float(f[3]) for f in lines if f[2] == "bonafide"])
        unseen = np.array([float(f[3]) for f in lines if f[1] in ("hifigan", "vits", "kokoro")])
        vits = np.array([float(f[3]) for f in lines if f[1] == "vits"])
        everything = np.array([float(f[3]) for f in lines if f[2] == "spoof"])
        assert row["test_eer"]["values"][str(seed)] == metrics.eer(bonafide, unseen)
        assert row["test_eer_all"]["values"][str(seed)] == metrics.eer(bonafide, everything)
        assert row["attacks"]["vits"]["values"][str(seed)] == metrics.eer(bonafide, vits)
        assert row["test_min_dcf"]["values"][str(seed)] == metrics.min_dcf(bonafide, unseen)
    assert summary["attacks"] == {"hifigan": "unseen", "kokoro": "unseen", "vits": "unseen", "world": "seen"}
    assert report._seen(summary) == {"world"}
    assert {r["name"]: r["status"] for r in summary["runs"]} == {
        **{f"{m}-seed{s}": "finished" for m in ("none", "pcgrad") for s in range(3)},
        "gradvac-seed0": "unfinished",
        "cagrad-seed0": "unreadable",
    }


def test_unseen_are_the_attacks_that_no_run_was_trained_on(tmp_path, write_run, monkeypatch):
    for seed, attacks in enumerate((("espeak", "world", "kokoro"), ("espeak", "world"))):
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


def test_runs_are_read_by_what_they_recorded_and_ordered_by_method(tmp_path, write_run):
    folders = {m: write_run(tmp_path, m, 1, 1) for m in ("cagrad", "gradvac", "mean", "my", "none", "pcgrad")}
    folders["none"].rename(tmp_path / "copy-seed7")
    (folders["pcgrad"] / "config.json").write_text("{")
    (folders["mean"] / "metrics.jsonl").write_text("")
    (folders["gradvac"] / "steps.csv").unlink()
    (folders["gradvac"] / "steps.csv").mkdir()
    assert [(run.name, run.method, run.seed, run.status) for run in report.read_runs(tmp_path)] == [
        ("copy-seed7", "none", 1, "finished"),
        ("mean-seed1", "mean", 1, "unreadable"),
        ("pcgrad-seed1", "pcgrad", 1, "unreadable"),
        ("gradvac-seed1", "gradvac", 1, "unreadable"),
        ("cagrad-seed1", "cagrad", 1, "finished"),
        ("my-seed1", "my", 1, "finished"),
    ]


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
    unknown = {0: 1.0, 1: math.nan, 2: 2.0}, {0: 3.0, 1: 2.0, 2: math.nan}
    assert report.compare(*unknown)["seeds"] == report.compare(*unknown[::-1])["seeds"] == [0]


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
    short = report._short_comparisons(report.summarize(tmp_path))[0]
    assert short.endswith("; epochs to best −3.0 (95% interval −4.0 to −2.0: beyond seed spread)")
    assert report._Measure("dev_eer", "EER, dev", 100, 2, "%").difference({"mean": -0.0123}) == "−1.23 points"
    assert report._Measure("dev_eer", "EER, dev", 100, 2, "%").difference({"mean": -1e-6}) == "+0.00 points"
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
    # Differences that cancel are differences.
    item = {"measure": "dev_eer", "method": "pcgrad", "baseline": "none"}
    item |= report.compare({0: 0.1, 1: 0.2}, {0: 0.2, 1: 0.1})
    assert "+0.00 points on average over 2 paired seeds" in report._comparison_sentence(item, report._MEASURES)
    assert "steps in conflict</td><td>the same in every seed<small>0.0, 0.0</small>" in (
        report.write_report(tmp_path).read_text()
    )


def test_curves_are_those_of_finished_runs_or_of_all_while_there_are_none(tmp_path, write_run):
    for method, seed, finished in (("none", 0, True), ("none", 1, False), ("pcgrad", 0, False), ("mean", 0, True)):
        write_run(tmp_path, method, seed, 1, finished=finished)
    (tmp_path / "mean-seed0" / "steps.csv").write_text("step\n")
    drawn = report._drawn(report.read_runs(tmp_path))
    assert {method: [run.seed for run in group] for method, group in drawn.items()} == {"none": [0], "pcgrad": [0]}


def test_det_curves_are_those_of_the_attacks_that_the_eer_is_of(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "draw_det", lambda axes, curves, texts: drawn.update(curves=curves, texts=texts))
    summary, found = report.summarize(runs), report.read_runs(runs)
    report._draw_det(None, report._drawn(found), summary)
    assert drawn["texts"]["none"] == f"none: EER {100 * summary['methods']['none']['test_eer']['mean']:.1f}%"
    miss, accept, _ = metrics.det_curve(*found[0].test.split({"hifigan", "vits", "kokoro"}))
    np.testing.assert_array_equal(drawn["curves"]["none"][0], (accept, miss))


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


def test_only_one_method_or_seed_makes_a_report(tmp_path, write_run):
    folder = write_run(tmp_path, "pcgrad", 0, epochs=1)
    (folder / "config.json").write_text(json.dumps({"align": "pcgrad", "data": "a<b>&c"}))
    assert "<code>a&lt;b&gt;&amp;c</code>" in report.write_report(tmp_path).read_text()
    assert report.summarize(tmp_path)["comparisons"] == []
    write_run(tmp_path, "none", 0, epochs=2)
    assert "<small>one common seed: no spread to judge by" in report.write_report(tmp_path).read_text()
    assert "on one common seed: no spread to judge it by." in report.text_summary(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_run_in_progress_whose_losses_are_not_finite_makes_a_report(tmp_path, write_run):
    folder = write_run(tmp_path, "none", 0, finished=False)
    rows = [json.loads(line) | {"dev_loss": None} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.write_report(tmp_path).exists()


def test_perfect_scores_make_a_report(tmp_path, write_run):
    folder = write_run(tmp_path, "none", 0)
    (folder / "scores_test.txt").write_text("h1 - bonafide 1\nh2 - bonafide 2\ns1 new spoof -1\n")
    # Of one class only, there is no error.
    (write_run(tmp_path, "none", 1) / "scores_test.txt").write_text("h1 - bonafide 1\nh2 - bonafide 2\n")
    report.write_report(tmp_path)
    assert report.summarize(tmp_path)["methods"]["none"]["test_eer"]["values"] == {"0": 0}


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
    (tmp_path / "steps.csv").write_text("step,cosine\n1,0.5\n2,\n3,0\n4,-1\n")
    cosines = report.read_cosines(tmp_path / "steps.csv")
    np.testing.assert_array_equal(cosines, [0.5, math.nan, 0, -1])
    # A right angle is no conflict.
    assert report.share_negative(cosines) == pytest.approx(1 / 3)
