"""The results table over detectors, methods and data sets: `gradalign table`."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradalign._errors import DataError
from gradalign._files import write_text
from gradalign.evaluation import Scores, evaluate, read_scores
from gradalign.report import BASELINE, read_runs

RESAMPLES = 1000
"""Bootstrap samples of a cell's confidence interval where there is one run, without a spread over seeds."""


@dataclass(frozen=True)
class Result:
    """The errors of one detector, trained by one method from one seed, on one data set.

    ``low`` and ``high`` are the EER's 95% bootstrap interval over utterances; EERs are in [0, 1], ``cllr`` is in bits.
    """

    detector: str
    method: str
    seed: int
    dataset: str
    bonafide: int
    spoof: int
    eer: float
    low: float
    high: float
    min_dcf: float
    act_dcf: float
    cllr: float


def measure(detector: str, method: str, seed: int, dataset: str, scores: Scores) -> Result:
    """The row of one score file; ValueError where a class is missing."""
    row = evaluate(scores, resamples=RESAMPLES)[0]
    keys = ("bonafide", "spoof", "eer", "eer_low", "eer_high", "min_dcf", "act_dcf", "cllr")
    return Result(detector, method, seed, dataset, *(row[key] for key in keys))


def read_results(runs_dir: str | Path) -> list[Result]:
    """One row for each score file of each finished run in a folder: its test set, and every one of ``test_sets``.

    Raises:
        FileNotFoundError: when the folder holds no run.
        DataError: when no run is finished or has a test set; naming a score file that cannot be read.
    """
    found = []
    for run in read_runs(runs_dir):
        if run.status != "finished":
            continue
        detector = str(run.config.get("detector", "?"))
        for dataset in ("test", *run.config.get("test_sets", {})):
            path = run.folder / f"scores_{dataset}.txt"
            if path.exists():
                try:
                    found.append(measure(detector, run.method, run.seed, dataset, read_scores(path)))
                except ValueError as error:
                    raise DataError(f"{path}: {error}") from None
    if not found:
        raise DataError(f"{runs_dir}: expected a finished run with scores of a test set; found none")
    return found


def read_item(item: str | Path) -> list[Result]:
    """The rows of a folder of runs, or of ``DETECTOR/METHOD:SET=FILE``, a score file of somebody else's detector.

    Raises as `read_results` and `gradalign.evaluation.read_scores`.
    """
    named = re.fullmatch(r"([^/:=]+)/([^/:=]+):([^/:=]+)=(.+)", str(item))
    if named is None or Path(item).exists():
        return read_results(item)
    detector, method, dataset, path = named.groups()
    return [measure(detector, method, 0, dataset, read_scores(path))]


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One detector and method on one data set, over seeds; ``low`` and ``high`` are as `caption` says."""

    eers: np.ndarray
    low: float
    high: float

    def text(self) -> str:
        limits = f"{100 * self.low:.2f}–{100 * self.high:.2f}"
        return f"{100 * self.eers.mean():.2f} " + (f"({limits})" if len(self.eers) > 1 else f"[{limits}]")


def _cells(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, _Cell]]:
    """By detector and method, in the order given with the baseline first, then by data set."""
    rows: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for detector in dict.fromkeys(r.detector for r in results):
        methods = dict.fromkeys(r.method for r in results if r.detector == detector)
        for method in sorted(methods, key=lambda name: name != BASELINE):
            rows[detector, method] = {}
    for r in results:
        rows[r.detector, r.method].setdefault(r.dataset, []).append(r)
    cells: dict[tuple[str, str], dict[str, _Cell]] = {}
    for key, sets in rows.items():
        cells[key] = {}
        for dataset, group in sets.items():
            eers = np.array([r.eer for r in group])
            seeds = [r.seed for r in group]
            if len(set(seeds)) < len(seeds):
                raise DataError(f"expected one {' '.join(key)} run of each seed on {dataset}; found seeds {seeds}")
            one = group[0]
            low, high = (one.low, one.high) if len(group) == 1 else (float(eers.min()), float(eers.max()))
            cells[key][dataset] = _Cell(eers, low, high)
    return cells


def _grid(results: Sequence[Result]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Headings, the texts of the rows, and the (row, column) of the best entries, one per detector and data set."""
    if not results:
        raise ValueError("expected at least one result; found none")
    cells = _cells(results)
    sets = list(dict.fromkeys(r.dataset for r in results))
    several = len(sets) > 1
    heads = ["detector", "method", "seeds", *sets, *(["mean"] if several else [])]
    rows, values = [], []
    for (detector, method), found in cells.items():
        means = [float(found[s].eers.mean()) if s in found else np.nan for s in sets]
        seeds = sorted({len(cell.eers) for cell in found.values()})
        texts = [found[s].text() if s in found else "" for s in sets]
        if several:
            whole = float(np.mean(means))
            means.append(whole)
            texts.append(f"{100 * whole:.2f}" if np.isfinite(whole) else "")
        rows.append([detector, method, "–".join(map(str, seeds)), *texts])
        values.append(means)
    best: set[tuple[int, int]] = set()
    for detector in dict.fromkeys(r.detector for r in results):
        own = [i for i, row in enumerate(rows) if row[0] == detector]
        for column, entries in enumerate(zip(*(values[i] for i in own), strict=True)):
            there = [e for e in entries if np.isfinite(e)]
            if len(there) > 1:
                best |= {(i, column + 3) for i, e in zip(own, entries, strict=True) if e == min(there)}
    return heads, rows, best


def caption(results: Sequence[Result]) -> str:
    """What the numbers in the table are."""
    counts = [len(cell.eers) for row in _cells(results).values() for cell in row.values()]
    forms = ["mean (lowest–highest) over seeds"] if max(counts) > 1 else []
    if min(counts) == 1:
        forms.append("one run [95% bootstrap interval over utterances]")
    return (
        f"Equal error rate in percent: {', or '.join(forms)}. Over all attacks of a data set, those seen in training "
        "too, which the first number of a report leaves out. Bold: the lowest of a detector on a data set."
    )


def format_markdown(results: Sequence[Result]) -> str:
    """The table as Markdown: a row per detector and method, a column per data set."""
    heads, rows, best = _grid(results)
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|" + "---:|" * (len(heads) - 3)]
    for i, row in enumerate(rows):
        cells = [f"**{text}**" if (i, j) in best else text for j, text in enumerate(row)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines) + f"\n\n{caption(results)}\n"


def format_html(results: Sequence[Result]) -> str:
    """The table as a page that needs no other file."""
    heads, rows, best = _grid(results)
    parts = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    for i, row in enumerate(rows):
        texts = [html.escape(text) for text in row]
        parts.append("".join(f"<td{' class=best' if (i, j) in best else ''}>{t}</td>" for j, t in enumerate(texts)))
    table = "\n".join(f"<tr>{part}</tr>" for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Results</title>\n<style>\n'
        "body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }\n"
        "table { border-collapse: collapse } th, td { padding: .3rem .9rem; text-align: right }\n"
        "th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } .best { font-weight: bold }\n"
        "th { border-bottom: 2px solid #444 } td { border-bottom: 1px solid #ddd }\n"
        f"</style>\n<table>\n{table}\n</table>\n<p>{html.escape(caption(results))}</p>\n"
    )


def format_csv(results: Sequence[Result]) -> str:
    """A row per detector, method, seed and data set, every digit kept."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(Result.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(r) for r in results)
    return out.getvalue()


def write_table(results: Sequence[Result], out: str | Path) -> list[Path]:
    """Write ``out``.md, ``out``.csv and ``out``.html; returns their paths."""
    forms = {".md": format_markdown, ".csv": format_csv, ".html": format_html}
    texts = {Path(f"{out}{suffix}"): form(results) for suffix, form in forms.items()}
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
