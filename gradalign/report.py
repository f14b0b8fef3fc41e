"""The report over a folder of training runs: ``report.html``, ``report.png`` and ``summary.json``.

Numbers are computed from what each run recorded (``metrics.jsonl``, ``steps.csv``, ``scores_*.txt``), per method over
seeds. Finished runs make the numbers; unfinished and unreadable ones are listed.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradalign import figures, metrics
from gradalign._errors import DataError
from gradalign._files import atomic_path, read_json
from gradalign.evaluation import Scores, read_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "none"
"""The method that the others are compared with, when it was trained."""

_METHOD_ORDER = ("none", "mean", "pcgrad", "gradvac", "cagrad")
# Student's t at 97.5%, by degrees of freedom from 1 on; the last for all above.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


# ---- runs ----------------------------------------------------------------------------------------------------------


def share_negative(cosines: np.ndarray) -> float:
    """The share of negative values among the finite ones; NaN when there are none.

    >>> share_negative(np.array([-0.5, 0.5, np.nan, 0.1, 0.2]))
    0.25
    """
    finite = cosines[np.isfinite(cosines)]
    return float(np.mean(finite < 0)) if len(finite) else math.nan


@dataclass(frozen=True)
class Run:
    """One training run as recorded in its folder.

    ``status`` is ``finished``, ``unfinished`` or ``unreadable``, ``reason`` says why. ``epochs`` holds the rows of
    ``metrics.jsonl``, ``cosines`` float64 [steps] the cosine between the views' gradients (NaN where undefined),
    ``train_attacks`` the attacks of the training set (None where an older version did not record them).
    """

    name: str
    folder: Path
    method: str
    seed: int
    status: str
    reason: str = ""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    cosines: np.ndarray = field(default_factory=lambda: np.zeros(0))
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    dev: Scores | None = None
    test: Scores | None = None
    train_attacks: list[str] | None = None

    def curve(self, key: str) -> np.ndarray:
        """One column of ``metrics.jsonl``, float64 [epochs]; NaN where a row lacks it."""
        return np.array([math.nan if row.get(key) is None else float(row[key]) for row in self.epochs])

    def best_epoch(self) -> int:
        """How many epochs it took to the lowest dev loss (1 is the first epoch); 0 when no dev loss is finite."""
        losses = self.curve("dev_loss")
        return int(np.nanargmin(losses)) + 1 if np.isfinite(losses).any() else 0

    def conflict_share(self) -> float:
        """The share of steps whose two gradients had a negative cosine, in [0, 1]; NaN without steps."""
        return share_negative(self.cosines)


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise DataError(f"{path}:{number}: expected one JSON object per line; found {line[:40]!r}") from None
    return rows


def read_cosines(path: Path) -> np.ndarray:
    """The ``cosine`` column of a run's ``steps.csv``: float64 [steps]; empty entries are NaN."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "cosine" not in (reader.fieldnames or []):
            raise DataError(f"{path}: expected the columns step, cosine; found {', '.join(reader.fieldnames or [])}")
        try:
            return np.array([float(row["cosine"] or "nan") for row in reader], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: expected a number in every `cosine` entry; {error}") from None


def read_run(folder: str | Path) -> Run:
    """Read one run folder; what cannot be read makes the run ``unreadable``, with the reason."""
    folder = Path(folder)
    named = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
    method, seed = (named[1], int(named[2])) if named else (folder.name, 0)
    parts: dict[str, Any] = {}
    try:
        parts["config"] = read_json(folder / "config.json", DataError)
        method = str(parts["config"].get("align", method))
        seed = int(parts["config"].get("seed", seed))
        for key, name, read in (
            ("environment", "environment.json", partial(read_json, error=DataError)),
            ("epochs", "metrics.jsonl", _read_epochs),
            ("cosines", "steps.csv", read_cosines),
            ("dev", "scores_dev.txt", read_scores),
            ("test", "scores_test.txt", read_scores),
        ):
            if (folder / name).exists():
                parts[key] = read(folder / name)
        if not (folder / "results.json").exists():
            status, reason = "unfinished", f"{len(parts.get('epochs', []))} epochs so far, no results.json yet"
        elif not parts.get("epochs"):
            status, reason = "unreadable", "results.json without epochs in metrics.jsonl"
        else:
            status, reason = "finished", ""
            parts["train_attacks"] = read_json(folder / "results.json", DataError).get("train_attacks")
    except (ValueError, OSError) as error:
        status, reason = "unreadable", str(error)
    return Run(folder.name, folder, method, seed, status, reason, **parts)


def read_runs(runs_dir: str | Path) -> list[Run]:
    """All runs below a folder (sub-folders with a ``config.json``), ordered by method and seed.

    Raises FileNotFoundError when there are none.
    """
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise FileNotFoundError(f"{runs_dir}: expected a folder of training runs; found nothing there")
    runs = [read_run(path.parent) for path in runs_dir.glob("*/config.json")]
    if not runs:
        raise FileNotFoundError(f"{runs_dir}: expected run folders with a config.json; found none")
    return sorted(runs, key=lambda run: (_rank(run.method), run.method, run.seed, run.name))


def _rank(method: str) -> int:
    return _METHOD_ORDER.index(method) if method in _METHOD_ORDER else len(_METHOD_ORDER)


def group_by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


# ---- numbers -------------------------------------------------------------------------------------------------------


def spread(values: dict[int, float]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1; None for one seed), minimum, maximum and the value of every seed.

    >>> spread({0: 1.0, 1: 3.0})
    {'mean': 2.0, 'sd': 1.4142135623730951, 'min': 1.0, 'max': 3.0, 'values': {'0': 1.0, '1': 3.0}}
    """
    known = {str(seed): value for seed, value in values.items() if math.isfinite(value)}
    if not known:
        return None
    array = np.array(list(known.values()))
    return {
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if len(array) > 1 else None,
        "min": min(known.values()),
        "max": max(known.values()),
        "values": known,
    }


def compare(baseline: dict[int, float], other: dict[int, float], resolution: float = 0.0) -> dict[str, Any] | None:
    """The mean difference ``other - baseline`` over the seeds both have, with its 95% interval (paired t).

    ``resolution`` is the step in which values are counted (1 for whole epochs); the variance of rounding both to it is
    added, or three seeds that happen to agree would look certain.

    ``verdict`` is ``difference``, ``within spread`` (the interval holds 0) or ``too few seeds`` (fewer than two in
    common, so there is no spread to judge by). None without a common seed.

    >>> compare({0: 10.0, 1: 12.0, 2: 11.0}, {0: 9.0, 1: 13.0, 2: 11.0})["verdict"]
    'within spread'
    """
    seeds = sorted(s for s in baseline if s in other and math.isfinite(baseline[s]) and math.isfinite(other[s]))
    if not seeds:
        return None
    differences = np.array([other[s] - baseline[s] for s in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": seeds, "verdict": "too few seeds"}
    freedom = len(seeds) - 1
    quantile = _T_95[min(freedom, len(_T_95)) - 1]
    variance = float(differences.var(ddof=1)) + resolution**2 / 6
    half = quantile * math.sqrt(variance / len(seeds))
    verdict = "difference" if abs(mean) > half else "within spread"
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": seeds, "verdict": verdict}


def _seen_attacks(runs: Sequence[Run]) -> set[str] | None:
    """The attacks that some run was trained on; None where a run did not record them."""
    found: set[str] = set()
    for run in runs:
        if run.train_attacks is None:
            return None
        found |= set(run.train_attacks)
    return found


def _error(metric: Callable[..., float], scores: Scores | None, attacks: Collection[str] | None = None) -> float:
    """A metric over all attacks or some; NaN without scores of both classes."""
    bonafide, spoof = ((), ()) if scores is None else scores.split(attacks)
    return metric(bonafide, spoof) if len(bonafide) and len(spoof) else math.nan


class _Measure(NamedTuple):
    """A column of the tables: its key in summary.json, and how it is printed."""

    key: str
    heading: str
    factor: float
    digits: int
    unit: str

    @property
    def title(self) -> str:
        return f"{self.heading} [{self.unit}]" if self.unit else self.heading

    def value(self, value: float) -> str:
        """The value of one seed; a count has no digits behind the point."""
        return str(value) if isinstance(value, int) else f"{self.factor * value:.{self.digits}f}"

    def values(self, stat: dict[str, Any]) -> str:
        """The values of all seeds of a `spread`."""
        return ", ".join(map(self.value, stat["values"].values()))

    def text(self, stat: dict[str, Any] | None) -> str:
        """Mean, lowest and highest seed of a `spread`."""
        if stat is None:
            return "–"
        if stat["sd"] is None:
            return f"{self.values(stat)} (one seed)"
        mean = f"{self.factor * stat['mean']:.{self.digits}f}"
        return f"{mean} ({self.value(stat['min'])}–{self.value(stat['max'])})"

    def difference(self, item: dict[str, Any]) -> str:
        """The mean difference of a comparison."""
        return self._signed(item["mean"]) + (" points" if self.unit == "%" else "")

    def interval(self, item: dict[str, Any]) -> str:
        """The interval of a comparison."""
        return f"95% interval {self._signed(item['low'])} to {self._signed(item['high'])}"

    def _signed(self, value: float) -> str:
        """A number with its sign, minus as the typographic sign; never a negative zero."""
        text = f"{self.factor * value:+.{self.digits}f}"
        return ("+" + text[1:] if float(text) == 0 else text).replace("-", "−")


_MEASURES = (
    _Measure("conflict_share", "steps in conflict", 100.0, 1, "%"),
    _Measure("test_eer", "EER, unseen-attack test", 100.0, 2, "%"),
    _Measure("dev_eer", "EER, dev", 100.0, 2, "%"),
    _Measure("test_min_dcf", "min DCF, unseen-attack test", 1.0, 3, ""),
    _Measure("best_epoch", "epochs to best dev loss", 1.0, 1, ""),
    _Measure("seconds", "wall time per run", 1 / 60, 1, "min"),
)
_ATTACK_EER = _Measure("eer", "EER", 100, 2, "%")
_COMPARED = ("test_eer", "dev_eer", "best_epoch", "conflict_share")


def summarize(runs_dir: str | Path) -> dict[str, Any]:
    """All numbers of the report (the content of ``summary.json``); rates are in [0, 1], times in seconds."""
    return _summarize(Path(runs_dir), read_runs(runs_dir))


def _summarize(runs_dir: Path, runs: list[Run]) -> dict[str, Any]:
    finished = [run for run in runs if run.status == "finished"]
    seen = _seen_attacks(finished)
    tested = {attack for run in finished if run.test is not None for attack in run.test.attack_names()}
    unseen = tested - seen if seen is not None else set()
    # A test set of which no attack is known to be new is still a test set: then the headline is over all of it, and
    # says so.
    headline = unseen or tested
    methods: dict[str, Any] = {}
    values: dict[str, dict[str, dict[int, float]]] = {}
    for method, group in group_by_method(finished).items():
        measured: dict[str, dict[int, float]] = {
            "conflict_share": {run.seed: run.conflict_share() for run in group},
            "test_eer": {run.seed: _error(metrics.eer, run.test, headline) for run in group},
            "test_eer_all": {run.seed: _error(metrics.eer, run.test) for run in group},
            "dev_eer": {run.seed: _error(metrics.eer, run.dev) for run in group},
            "test_min_dcf": {run.seed: _error(metrics.min_dcf, run.test, headline) for run in group},
            "best_epoch": {run.seed: run.best_epoch() for run in group},
            "best_dev_loss": {run.seed: float(np.nanmin(run.curve("dev_loss"))) for run in group},
            "seconds": {run.seed: float(np.nansum(run.curve("seconds"))) for run in group},
        }
        values[method] = measured
        methods[method] = {
            "runs": len(group),
            "seeds": [run.seed for run in group],
            **{key: spread(by_seed) for key, by_seed in measured.items()},
            "attacks": {
                attack: spread({run.seed: _error(metrics.eer, run.test, {attack}) for run in group})
                for attack in sorted(tested)
            },
        }
    comparisons = []
    if BASELINE in values:
        for method in values:
            for key in _COMPARED:
                step = 1.0 if key == "best_epoch" else 0.0
                result = compare(values[BASELINE][key], values[method][key], step) if method != BASELINE else None
                if result is not None:
                    comparisons.append({"measure": key, "method": method, "baseline": BASELINE, **result})
    settings = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        found = {json.dumps(run.config.get(key)) for run in runs if run.config}
        settings[key] = json.loads(found.pop()) if len(found) == 1 else "differs between runs"
    return {
        "runs_dir": str(runs_dir),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "methods": methods,
        "comparisons": comparisons,
        "attacks": {a: "unknown" if seen is None else "seen" if a in seen else "unseen" for a in sorted(tested)},
        "unseen_attacks_only": bool(unseen),
        "runs": [
            {
                "name": run.name,
                "method": run.method,
                "seed": run.seed,
                "status": run.status,
                "reason": run.reason,
                "epochs": len(run.epochs),
            }
            for run in runs
        ],
        "settings": settings,
        "environment": next((run.environment for run in runs if run.environment), {}),
    }


def _same(item: dict[str, Any]) -> bool:
    """Whether no seed differs at all, so that there is no interval to speak of."""
    return bool(item["low"] == item["high"] == 0)


def _comparison_sentence(item: dict[str, Any], measures: Sequence[_Measure]) -> str:
    measure = next(m for m in measures if m.key == item["measure"])
    title = f"{item['method']} against {item['baseline']}, {measure.heading}:"
    count = len(item["seeds"])
    if _same(item):
        return f"{title} the same in each of {count} paired seeds."
    text = f"{title} {measure.difference(item)}{' epochs' if measure.key == 'best_epoch' else ''}"
    if item["low"] is None:
        return f"{text} on one common seed: no spread to judge it by."
    verdict = f"{'a' if item['verdict'] == 'difference' else 'no'} difference beyond the seed spread"
    return f"{text} on average over {count} paired seeds ({measure.interval(item)}): {verdict}."


def _measures(summary: dict[str, Any]) -> list[_Measure]:
    """The columns, by what the test set of these runs is."""
    if summary["unseen_attacks_only"]:
        return list(_MEASURES)
    return [m._replace(heading=m.heading.replace("unseen-attack test", "test")) for m in _MEASURES]


def _attacks_unknown(summary: dict[str, Any]) -> list[str]:
    """A sentence for runs of which it is not known what attacks they were trained on; none for others."""
    if "unknown" not in summary["attacks"].values():
        return []
    return [
        "Which attacks are unseen is not known: some run, of an older version, did not record those of its training. "
        "Test errors are over all attacks. Remove results.json from the runs and give the same `gradalign train` "
        "again: it scores anew, without training."
    ]


def text_summary(runs_dir: str | Path) -> str:
    """The summary as plain text for a terminal: one line per method, then the comparisons."""
    summary = summarize(runs_dir)
    measures, methods, lines = _measures(summary), summary["methods"], []
    if methods:
        seeds = ", ".join(f"{method} {row['runs']}" for method, row in methods.items())
        lines.append(f"mean (lowest–highest) over seeds: {seeds}")
        width = max(map(len, ("method", *methods)))
        for measure in measures:
            lines.append(measure.title)
            lines += [f"  {method:<{width}}  {measure.text(row[measure.key])}" for method, row in methods.items()]
    compared = [item for item in summary["comparisons"] if item["measure"] != "conflict_share"]
    lines += [_comparison_sentence(item, measures) for item in compared]
    lines += _attacks_unknown(summary)
    lines += [f"{r['name']}: {r['status']}: {r['reason']}" for r in summary["runs"] if r["status"] != "finished"]
    return "\n".join(lines)


# ---- pictures ------------------------------------------------------------------------------------------------------


def _drawn(runs: list[Run]) -> dict[str, list[Run]]:
    """Per method the runs whose curves are drawn: the finished ones, or while there are none, all that have epochs."""
    groups = group_by_method(run for run in runs if run.epochs and run.status != "unreadable")
    return {m: [r for r in group if r.status == "finished"] or group for m, group in groups.items()}


def _draw_conflict_share(axes: Axes, groups: dict[str, list[Run]]) -> None:
    curves = {m: [100 * run.curve("conflict_rate") for run in g] for m, g in groups.items()}
    ends = figures.draw_epochs(axes, curves)
    figures.percent_from_zero(axes)
    axes.set_ylabel("steps in conflict [%]")
    figures.label(axes, ends)


def _draw_loss(axes: Axes, groups: dict[str, list[Run]]) -> None:
    best = {m: [run.best_epoch() for run in g] for m, g in groups.items()}
    ends = figures.draw_epochs(axes, {m: [run.curve("dev_loss") for run in g] for m, g in groups.items()}, best=best)
    figures.draw_epochs(axes, {m: [run.curve("train_loss") for run in g] for m, g in groups.items()}, dashed=True)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cross-entropy [nat]")
    figures.label(axes, ends)


def _draw_dev_eer(axes: Axes, groups: dict[str, list[Run]]) -> None:
    ends = figures.draw_epochs(axes, {m: [100 * run.curve("dev_eer") for run in g] for m, g in groups.items()})
    figures.percent_from_zero(axes)
    axes.set_ylabel("EER on dev [%]")
    figures.label(axes, ends)


def _draw_det(axes: Axes, groups: dict[str, list[Run]], summary: dict[str, Any]) -> None:
    attacks = {a for a, kind in summary["attacks"].items() if kind == "unseen" or not summary["unseen_attacks_only"]}
    curves, texts = {}, {}
    for method, group in groups.items():
        pairs = []
        for run in group:
            if run.test is not None:
                bonafide, spoof = run.test.split(attacks)
                if len(bonafide) and len(spoof):
                    p_miss, p_fa, _ = metrics.det_curve(bonafide, spoof)
                    pairs.append((p_fa, p_miss))
        stat = summary["methods"].get(method, {}).get("test_eer")
        if pairs:
            curves[method] = pairs
            texts[method] = f"{method}: EER {100 * stat['mean']:.1f}%" if stat else method
    figures.draw_det(axes, curves, texts)


def _percent(stat: dict[str, Any]) -> dict[str, float]:
    return {seed: 100 * value for seed, value in stat["values"].items()}


def _test_eers(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {m: _percent(row["test_eer"]) for m, row in summary["methods"].items() if row["test_eer"]}


def _attack_eers(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        method: {attack: _percent(stat) for attack, stat in row["attacks"].items() if stat}
        for method, row in summary["methods"].items()
    }


def _seen(summary: dict[str, Any]) -> set[str]:
    return {attack for attack, kind in summary["attacks"].items() if kind == "seen"}


def _test_name(summary: dict[str, Any]) -> str:
    return "unseen-attack test" if summary["unseen_attacks_only"] else "test"


def _draw_table(axes: Axes, summary: dict[str, Any]) -> None:
    axes.set_axis_off()
    measures = _measures(summary)
    left = [0.0, 0.10] + [0.155 + 0.143 * i for i in range(len(measures))]
    heads = ["method", "seeds", *(measure.title for measure in measures)]
    notes = _short_comparisons(summary)
    rows = len(summary["methods"]) + 0.8 * len(notes)
    step = 1.0 / (max(rows, 2) + 1.2)
    top = 1.0 - step / 2
    for x, text in zip(left, heads, strict=True):
        axes.text(x, top, text, transform=axes.transAxes, color="#666666", va="center", fontsize=9.5)
    for i, (method, row) in enumerate(summary["methods"].items()):
        y = top - step * (i + 1)
        cells = [method, str(row["runs"]), *(measure.text(row[measure.key]) for measure in measures)]
        for j, (x, text) in enumerate(zip(left, cells, strict=True)):
            axes.text(
                x,
                y,
                text,
                transform=axes.transAxes,
                va="center",
                fontsize=11,
                color=figures.color(method) if j == 0 else "#222222",
                fontweight="bold" if j == 0 else "normal",
            )
    for i, note in enumerate(notes):
        y = top - step * (len(summary["methods"]) + 1.1 + 0.8 * i)
        axes.text(0.0, y, note, transform=axes.transAxes, va="center", color="#444444", fontsize=10)


def _short_comparisons(summary: dict[str, Any]) -> list[str]:
    """One line per method: its test EER and epochs to the best against the baseline's."""
    lines = []
    for method in summary["methods"]:
        items = {i["measure"]: i for i in summary["comparisons"] if i["method"] == method and i["low"] is not None}
        texts = []
        for measure in (
            _Measure("test_eer", "test EER", 100, 1, "%"),
            _Measure("best_epoch", "epochs to best", 1, 1, ""),
        ):
            item = items.get(measure.key)
            if item and _same(item):
                texts.append(f"{measure.heading} the same in every seed")
            elif item:
                within = "beyond" if item["verdict"] == "difference" else "no difference beyond"
                found = f"{measure.difference(item)} ({measure.interval(item)}: {within} seed spread)"
                texts.append(f"{measure.heading} {found}")
        if texts:
            lines.append(f"{method} against {BASELINE}, paired by seed: {'; '.join(texts)}")
    return lines


def draw_overview(runs: list[Run], summary: dict[str, Any]) -> Figure:
    """The one picture of a report, 1600 x 1000 pixels at 100 dpi: conflicts, losses, EERs, DET curves and a table."""
    groups = _drawn(runs)
    with figures.styled():
        figure = figures.new_figure(16, 10)
        figure.suptitle(_overview_title(runs, summary), x=0.012, ha="left", fontsize=14, fontweight="bold")
        # The table in a part of its own: the layout would make all gaps below it as wide as the widest.
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.12, 0.12 + 0.22 * max(2, len(summary["methods"]))])
        panels = top.subplots(2, 3, height_ratios=[1, 1.12]).ravel()
        panels[0].set_title("Conflict: the two views' gradients disagree")
        _draw_conflict_share(panels[0], groups)
        panels[1].set_title("Loss: dev solid (ring: best), training dashed")
        _draw_loss(panels[1], groups)
        panels[2].set_title("Error on the dev set")
        _draw_dev_eer(panels[2], groups)
        if any(run.test is not None for group in groups.values() for run in group):
            panels[3].set_title(f"DET curve, {_test_name(summary)} set")
            _draw_det(panels[3], groups, summary)
        else:
            panels[3].set_axis_off()
        if summary["methods"] and summary["attacks"]:
            panels[4].set_title(f"EER on the {_test_name(summary)} set [%], one dot per seed")
            figures.draw_seeds(panels[4], _test_eers(summary))
            panels[5].set_title("EER per attack: mean, lowest to highest seed")
            figures.draw_attacks(panels[5], _attack_eers(summary), _seen(summary))
        else:
            panels[4].set_axis_off()
            panels[5].set_axis_off()
        _draw_table(bottom.add_subplot(), summary)
    return figure


def _overview_title(runs: list[Run], summary: dict[str, Any]) -> str:
    detector = summary["settings"].get("detector", "detector")
    count = sum(r["status"] == "finished" for r in summary["runs"])
    methods = ", ".join(summary["methods"]) or ", ".join(group_by_method(runs))
    algo = summary["settings"].get("algo", "?")
    return f"Detector “{detector}” trained on clean and RawBoost-{algo} speech; alignment: {methods} ({count} runs)"


def draw_conflicts(groups: dict[str, list[Run]], figure: Any = None) -> Any:
    """The cosine between the two views' gradients against steps, one panel per method, over all its seeds.

    Draws into ``figure`` (a figure or sub-figure), or into a new one; returns it.
    """
    groups = {m: g for m, g in groups.items() if any(len(run.cosines) for run in g)}
    with figures.styled():
        if figure is None:
            figure = figures.new_figure(max(6.4, 3.6 * len(groups)), 3.6)
        axes = figure.subplots(1, max(len(groups), 1), sharey=True, squeeze=False)[0]
        for panel, (method, group) in zip(axes, groups.items(), strict=False):
            figures.draw_cosines(panel, [run.cosines for run in group], method)
            share = share_negative(np.concatenate([run.cosines for run in group]))
            panel.set_title(f"{method}: {share:.1%} in conflict", color=figures.color(method))
        axes[0].set_ylabel("cosine, clean against augmented")
    return figure


# ---- page ----------------------------------------------------------------------------------------------------------

_PAGE_STYLE = """
body{font:16px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#222;background:#fff;
max-width:1120px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;line-height:1.25;margin:.2rem 0 1rem} h2{font-size:1.25rem;margin:2.2rem 0 .6rem}
p,li{max-width:78ch} table{border-collapse:collapse;font-size:.92rem;margin:.6rem 0}
th,td{text-align:right;padding:.32rem .7rem;border-bottom:1px solid #e4e4e4;vertical-align:top;
white-space:nowrap;font-variant-numeric:tabular-nums}
th{white-space:normal;color:#555;font-weight:600;border-bottom:2px solid #bbb}
td:first-child,th:first-child{text-align:left}
td small{color:#777;display:block;font-size:.8rem} .wide{overflow-x:auto} figure{margin:1rem 0}
figure img{max-width:100%;height:auto} figcaption{color:#555;font-size:.9rem;max-width:78ch}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:0 1.4rem}
.key{color:#777} details summary{cursor:pointer;color:#555} code{font-size:.9em}
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of already escaped cells; the first row is the heading."""
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(figure: Figure, caption: str, alt: str) -> str:
    data = base64.b64encode(figures.to_bytes(figure, "svg")).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{_text(alt)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _panel(draw: Callable[[Axes], None], caption: str, alt: str, height: float = 4.0) -> str:
    with figures.styled():
        figure = figures.new_figure(6.4, height)
        draw(figure.add_subplot())
    return _picture(figure, caption, alt)


def _method_cell(method: str) -> str:
    return f'<b style="color:{figures.color(method)}">{_text(method)}</b>'


def _stat_cell(stat: dict[str, Any] | None, measure: _Measure) -> str:
    return "–" if stat is None else f"{_text(measure.text(stat))}<small>{measure.values(stat)}</small>"


def _comparison_table(summary: dict[str, Any]) -> str:
    methods = [m for m in summary["methods"] if m != BASELINE]
    rows = [["mean difference, seed by seed", *[_method_cell(m) for m in methods]]]
    items = {(i["measure"], i["method"]): i for i in summary["comparisons"]}
    for measure in _measures(summary):
        if measure.key in _COMPARED:
            cells = [
                _comparison_cell(items.get((measure.key, m)), summary["methods"][m][measure.key], measure)
                for m in methods
            ]
            rows.append([_text(measure.heading), *cells])
    return _table(rows)


def _comparison_cell(item: dict[str, Any] | None, stat: dict[str, Any], measure: _Measure) -> str:
    if item is None:
        return "–"
    if _same(item):
        return f"the same in every seed<small>{measure.values(stat)}</small>"
    value = measure.difference(item)
    if item["low"] is None:
        return f"{value}<small>one common seed: no spread to judge by</small>"
    if item["verdict"] == "difference":
        return f"<b>{value}</b><small>{measure.interval(item)}<br><b>beyond the seed spread</b></small>"
    return f"{value}<small>{measure.interval(item)}<br>no difference beyond the seed spread</small>"


def _explanation(runs: list[Run], summary: dict[str, Any]) -> str:
    settings, methods = summary["settings"], summary["methods"]
    sample = next((run for run in runs if run.test is not None and run.dev is not None), None)
    data = ""
    if sample is not None and sample.test is not None and sample.dev is not None:
        kinds = list(summary["attacks"].values())
        data = (
            f" The dev set has {int(sample.dev.bonafide.sum())} bona fide and {int((~sample.dev.bonafide).sum())} "
            f"spoofed utterances; the test set has {int(sample.test.bonafide.sum())} and "
            f"{int((~sample.test.bonafide).sum())}, from {len(kinds)} attacks"
            + (f" of which {kinds.count('unseen')} do not occur in training." if "unknown" not in kinds else ".")
        )
    seeds = max((row["runs"] for row in methods.values()), default=0)
    names = ", ".join(f"<b>{_text(m)}</b>" for m in (methods or group_by_method(runs)))
    detector, speech = _text(settings.get("detector", "unknown")), _text(settings.get("data", "unknown data"))
    algo = _text(settings.get("algo", "?"))
    return f"""
<p>A speech-deepfake detector (<b>{detector}</b>) was trained to tell human from synthetic speech on
<code>{speech}</code>. Every training step sees each utterance twice: as recorded (clean), and distorted by RawBoost
algorithm {algo} (augmented). Each view gives its own gradient, the direction in which it would change the detector.
When the two point against each other (negative cosine), the step is <b>in conflict</b>: what helps one view hurts the
other. The methods compared here, {names}, differ only in how they merge the two gradients; <b>none</b> is plain
training on the mean of both losses. Each method was trained from up to {seeds} random seeds, since results differ
between seeds even when nothing else changes.{data}</p>
<p><b>EER</b> (equal error rate) is the error where as many spoofs pass as human recordings are refused; 50% is
guessing, lower is better. <b>Min DCF</b> weighs the two errors by their cost; 1 is no better than giving every
utterance the same answer. <b>Epochs to best dev loss</b> tells how soon training was as good as it got. Numbers are
means over seeds, in brackets the lowest and the highest seed.</p>"""


def _page(runs: list[Run], summary: dict[str, Any]) -> str:
    measures, methods, groups = _measures(summary), summary["methods"], _drawn(runs)
    parts = [f"<h1>{_text(_overview_title(runs, summary))}</h1>", _explanation(runs, summary)]

    if summary["comparisons"]:
        parts.append(f"<h2>Compared with {_text(BASELINE)}</h2>")
        parts.append(_comparison_table(summary))
        parts.append(
            "<p class='key'>Runs of the same seed start from the same weights and see the same data in the same order, "
            "so differences are taken seed by seed. The interval is the 95% t interval of their mean; with few seeds "
            "it is wide, and a difference inside it may be chance. It does not cover the choice of data.</p>"
        )
    if methods:
        parts.append("<h2>Results per method</h2>")
        rows = [["method", "seeds", *(_text(measure.title) for measure in measures)]]
        for method, row in methods.items():
            cells = [_stat_cell(row[measure.key], measure) for measure in measures]
            seeds = f"{row['runs']}<small>{', '.join(map(str, row['seeds']))}</small>"
            rows.append([_method_cell(method), seeds, *cells])
        parts.append(_table(rows))
        parts.append("<p class='key'>Mean (lowest–highest seed); small: every seed's value.</p>")
    if methods and summary["attacks"]:
        parts.append("<h2>EER per attack of the test set [%]</h2>")
        rows = [["attack", "in training", *[_method_cell(m) for m in methods]]]
        for attack, kind in sorted(summary["attacks"].items(), key=lambda item: (item[1] == "seen", item[0])):
            cells = [_stat_cell(row["attacks"][attack], _ATTACK_EER) for row in methods.values()]
            known = {"seen": "yes", "unseen": "no (unseen)", "unknown": "not known"}
            rows.append([_text(attack), known[kind], *cells])
        everything = [_stat_cell(row["test_eer_all"], _ATTACK_EER) for row in methods.values()]
        rows.append(["<b>all attacks pooled</b>", "", *everything])
        parts.append(_table(rows))
        notes = ["Each attack against all bona fide utterances of the test set.", *_attacks_unknown(summary)]
        parts.append(f"<p class='key'>{_text(' '.join(notes))}</p>")

    unfinished = [r for r in summary["runs"] if r["status"] != "finished"]
    if unfinished:
        parts.append("<h2>Runs not counted</h2>")
        rows = [["run", "status", "epochs", "why"]]
        rows += [[_text(r["name"]), _text(r["status"]), str(r["epochs"]), _text(r["reason"])] for r in unfinished]
        parts.append(_table(rows))

    if groups:
        parts.append("<h2>Curves</h2><div class='pair'>")
        parts.append(
            _panel(
                lambda axes: _draw_conflict_share(axes, groups),
                "Share of each epoch's steps in which the two views' gradients have a negative cosine. Line: mean over "
                "seeds, as far as every seed trained; band: lowest to highest seed; thin: each seed.",
                "conflict share against epochs",
            )
        )
        parts.append(
            _panel(
                lambda axes: _draw_loss(axes, groups),
                "Class-weighted cross-entropy: dev solid, with a ring at each seed's best epoch; training (mean of "
                "both views) dashed.",
                "loss against epochs",
            )
        )
        parts.append(
            _panel(
                lambda axes: _draw_dev_eer(axes, groups),
                "EER on the dev set after each epoch.",
                "dev EER against epochs",
            )
        )
        if methods and summary["attacks"]:
            parts.append(
                _panel(
                    lambda axes: figures.draw_seeds(axes, _test_eers(summary)),
                    f"EER [%] on the {_test_name(summary)} set. One dot per seed, joined across methods; bar: mean. "
                    "The axis need not begin at 0.",
                    "test EER per seed",
                )
            )
            parts.append(
                _panel(
                    lambda axes: _draw_det(axes, groups, summary),
                    f"Detection error trade-off on the {_test_name(summary)} set, axes in probit scale: lower left is "
                    "better, the dotted diagonal holds the EER. Bold: mean over seeds; thin: each seed.",
                    "DET curves",
                    5.6,
                )
            )
            parts.append(
                _panel(
                    lambda axes: figures.draw_attacks(axes, _attack_eers(summary), _seen(summary)),
                    "EER per attack: mean over seeds, line from the lowest to the highest seed.",
                    "EER per attack",
                    max(5.6, 1.5 + 0.4 * len(summary["attacks"])),
                )
            )
        parts.append("</div>")
        if any(len(run.cosines) for group in groups.values() for run in group):
            parts.append(
                _picture(
                    draw_conflicts(groups),
                    "Cosine between the gradients of the clean and the augmented view over training: median over "
                    "steps and seeds, band from the 10% to the 90% quantile. Below 0 the views are in conflict.",
                    "cosine against steps",
                )
            )
    parts.append("<h2>How it was made</h2>")
    for title, content in (("Settings", summary["settings"]), ("Versions and machine", summary["environment"])):
        rows = [["", ""]] + [[_text(k), f"<code>{_text(_plain(v))}</code>"] for k, v in content.items()]
        parts.append(f"<details><summary>{title}</summary>{_table(rows)}</details>")
    parts.append(f"<p class='key'>Made by gradalign on {_text(summary['created'])}. Numbers in full: summary.json.</p>")
    title = _text(_overview_title(runs, summary))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'><style>{_PAGE_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_report(runs_dir: str | Path) -> Path:
    """Write ``report.html``, ``report.png`` and ``summary.json`` into ``runs_dir``; returns the path of the first.

    The page is self-contained: figures are embedded, nothing is loaded from elsewhere, no script is needed. Raises
    FileNotFoundError when there are no runs.
    """
    runs_dir = Path(runs_dir)
    runs = read_runs(runs_dir)
    summary = _summarize(runs_dir, runs)
    contents = {
        "summary.json": (json.dumps(summary, indent=2) + "\n").encode(),
        "report.png": figures.to_bytes(draw_overview(runs, summary), "png", dpi=100),
        "report.html": _page(runs, summary).encode(),
    }
    for name, content in contents.items():
        with atomic_path(runs_dir / name) as temporary:
            temporary.write_bytes(content)
    return runs_dir / "report.html"
