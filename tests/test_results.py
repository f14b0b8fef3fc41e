import csv
import html.parser
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from gradalign import evaluation, metrics, results
from gradalign._errors import DataError


@pytest.fixture
def runs(tmp_path, write_run):
    """Two methods of two seeds, with a further test set; a third method is not finished, though it has scores."""
    for method, gain in (("pcgrad", 0.4), ("none", 0.0)):
        for seed in (0, 1):
            folder = write_run(tmp_path / "runs", method, seed, gain=gain)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"test_sets": {"ITW": {}}}))
            (folder / "scores_ITW.txt").write_text((folder / "scores_dev.txt").read_text())
    unfinished = write_run(tmp_path / "runs", "cagrad", 0, finished=False)
    (unfinished / "scores_test.txt").write_text((folder / "scores_test.txt").read_text())
    return tmp_path / "runs"


def expected_eer(runs, method, seed, name):
    return metrics.eer(*evaluation.read_scores(runs / f"{method}-seed{seed}" / f"scores_{name}.txt").split())


def test_every_finished_run_has_a_row_for_each_set(runs):
    found = results.read_results(runs)
    assert [(r.method, r.seed, r.dataset) for r in found] == [
        (method, seed, name) for method in ("none", "pcgrad") for seed in (0, 1) for name in ("test", "ITW")
    ]
    for r in found:
        assert r.detector == "light"
        assert r.eer == expected_eer(runs, r.method, r.seed, r.dataset)
        assert r.low <= r.eer <= r.high
    for folder in runs.iterdir():
        (folder / "scores_test.txt").unlink()
    assert results.read_results(runs) == found[1::2]


def test_a_cell_is_the_mean_and_range_over_seeds(runs):
    lines = results.format_markdown(results.read_results(runs)).splitlines()
    assert lines[0] == "| detector | method | seeds | test | ITW | mean |"
    for line, method in zip(lines[2:4], ("none", "pcgrad"), strict=True):
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        means = []
        for cell, name in zip(cells[3:5], ("test", "ITW"), strict=True):
            eers = 100 * np.array([expected_eer(runs, method, seed, name) for seed in (0, 1)])
            assert cell == f"{eers.mean():.2f} ({eers.min():.2f}–{eers.max():.2f})"
            means.append(eers.mean())
            bold = "**" in line.split("|")[4 + ("test", "ITW").index(name)]
            others = [np.mean([expected_eer(runs, m, seed, name) for seed in (0, 1)]) for m in ("none", "pcgrad")]
            assert bold == (np.isclose(eers.mean() / 100, min(others)))
        assert cells == ["light", method, "2", *cells[3:5], f"{np.mean(means):.2f}"]
    assert lines[-1].startswith("Equal error rate in percent: mean (lowest–highest) over seeds. Over all attacks of a ")
    assert "| light | pcgrad | 1–2 |" in results.format_markdown(results.read_results(runs)[:-1])


def test_one_seed_has_a_bootstrap_interval_and_other_peoples_scores_a_row(runs, tmp_path):
    scores = runs / "none-seed0" / "scores_test.txt"
    found = results.read_item(f"AASIST/published:test={scores}")
    assert len(found) == 1
    low, high = metrics.eer_interval(*evaluation.read_scores(scores).split(), 0.95, results.RESAMPLES)
    assert (found[0].low, found[0].high) == (low, high)
    text = results.format_markdown(found)
    assert f"| AASIST | published | 1 | {100 * found[0].eer:.2f} [{100 * low:.2f}–{100 * high:.2f}] |" in text
    assert results.caption(found).startswith(
        "Equal error rate in percent: one run [95% bootstrap interval over utterances]. Over all attacks of a data set"
    )
    assert "mean" not in text.splitlines()[0]
    mixed = results.format_markdown([*results.read_item(runs), *found])
    assert "| AASIST | published | 1 |" in mixed
    assert mixed.splitlines()[4].endswith("|  |  |")
    assert mixed.splitlines()[2].count("(") == 2
    assert "over seeds, or one run [95% bootstrap interval over utterances]." in mixed.splitlines()[-1]


def test_each_detector_has_a_best_entry_of_its_own(runs):
    found = results.read_results(runs)
    worse = [replace(r, detector="other", eer=r.eer + 0.2) for r in found]
    lines = [line.split("|") for line in results.format_markdown([*found, *worse]).splitlines()[2:6]]
    bold = [["**" in cell for cell in line[2:]] for line in lines]
    assert bold[:2] == bold[2:]
    assert any(map(any, bold))


def test_names_are_escaped(runs):
    found = results.read_item(f"A|B/<1>:a&b={runs / 'none-seed0' / 'scores_test.txt'}")
    assert results.format_markdown(found).splitlines()[2].startswith("| A\\|B | <1> |")
    page = results.format_html(found)
    assert "<th>a&amp;b</th>" in page
    assert "<td>&lt;1&gt;</td>" in page


def test_csv_and_html_hold_the_same_numbers(runs, tmp_path):
    found = results.read_results(runs)
    paths = results.write_table(found, tmp_path / "table")
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.html"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [float(row["eer"]) for row in rows] == [r.eer for r in found]

    class Cells(html.parser.HTMLParser):
        texts: list[str] = []  # noqa: RUF012

        def handle_data(self, data):
            self.texts.append(data)

    page = Cells()
    page.feed((tmp_path / "table.html").read_text())
    for cell in (tmp_path / "table.md").read_text().splitlines()[2].strip("|").split("|"):
        assert cell.strip().strip("*") in page.texts


def test_what_cannot_be_tabulated_is_named(runs, tmp_path, write_run):
    write_run(tmp_path / "other", "none", 0, finished=False)
    with pytest.raises(DataError, match="other: expected a finished run with scores of a test set; found none"):
        results.read_results(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        results.read_item(tmp_path / "nothing")
    twice = results.read_results(runs) * 2
    with pytest.raises(DataError, match=r"expected one light none run of each seed on test; found seeds \[0, 1, 0, "):
        results.format_markdown(twice)
    with pytest.raises(ValueError, match="expected at least one result; found none"):
        results.format_markdown([])
    (runs / "none-seed0" / "scores_ITW.txt").write_text("h1 - bonafide 1\n")
    with pytest.raises(DataError, match=r"scores_ITW\.txt: expected bona fide and spoofed scores"):
        results.read_results(runs)
