"""Score files in every official format, and the table of detection errors made from one: `gradalign evaluate`."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradalign import metrics
from gradalign._errors import DataError
from gradalign._files import atomic_path, write_text
from gradalign.data.datasets import ASV_KINDS, AsvTrials, read_asv_trials
from gradalign.data.protocol import LABELS, Utterance, read_protocol, read_text
from gradalign.metrics import AsvRates


@dataclass(frozen=True)
class Scores:
    """The scores of one file, one entry per utterance; higher is more bona fide.

    ``attacks`` holds ``-`` for bona fide utterances (and for every utterance where the file names no attacks),
    ``bonafide`` is bool [N], ``values`` float64 [N]. ``codecs`` and ``speakers`` hold ``-`` where nothing says them.
    """

    utterances: list[str]
    attacks: list[str]
    bonafide: np.ndarray
    values: np.ndarray
    codecs: list[str] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for names in (self.codecs, self.speakers):
            names.extend("-" for _ in range(len(self) - len(names)))

    @classmethod
    def of(cls, utterances: Sequence[Utterance], values: np.ndarray) -> Scores:
        """The scores of utterances, float64 [N]; an utterance whose score is NaN (a bad file) is left out."""
        there = [(u, value) for u, value in zip(utterances, values.tolist(), strict=True) if value == value]
        return cls(
            [u.name for u, _ in there],
            [u.attack for u, _ in there],
            np.array([u.label == 1 for u, _ in there], bool),
            np.array([value for _, value in there], np.float64),
            [u.codec for u, _ in there],
            [u.speaker for u, _ in there],
        )

    def __len__(self) -> int:
        return len(self.utterances)

    def split(self, attacks: Collection[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``(bona fide scores, spoof scores)``, the latter of some attacks, or of one, if they are named."""
        spoof = ~self.bonafide
        if isinstance(attacks, str):
            attacks = {attacks}
        if attacks is not None:
            spoof &= np.array([a in attacks for a in self.attacks], dtype=bool)
        return self.values[self.bonafide], self.values[spoof]

    def attack_names(self) -> list[str]:
        """The attacks of the spoofed utterances, sorted."""
        return sorted({a for a, b in zip(self.attacks, self.bonafide, strict=True) if not b and a != "-"})


def _number(text: str) -> float:
    """The number that a text is, NaN for anything else."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
    for number, line in enumerate(read_text(path, "score file", "surrogateescape").splitlines(), start=1):
        fields = line.split()
        if fields and not fields[0].startswith("#"):
            yield number, fields


def read_scores(
    path: str | Path,
    protocol: str | Path | None = None,
    known: Iterable[Utterance] | None = None,
    others: Collection[str] = (),
) -> Scores:
    """Read a score file.

    Lines are ``utterance attack label score`` (as `gradalign score` and the ASVspoof 2019 baselines write them), or,
    where ``protocol`` or ``known`` gives the labels, ``utterance score`` (ASVspoof 2021) or a table with the columns
    ``filename`` and ``cm-score`` (ASVspoof 5). Both must then name the same utterances.

    Args:
        path: the score file.
        protocol: lines ``speaker utterance - attack label``.
        known: utterances of a data set (`gradalign.data.read_dataset`), with their codecs and speakers.
        others: utterances to leave out: those of the other phases in an ASVspoof 2021 score file, which holds all.

    Raises:
        DataError: naming file, line, expected and found; or a file that is not there.
    """
    path = Path(path)
    if protocol is not None:
        known = read_protocol(protocol)
    labels = None if known is None else {u.name: u for u in known}
    rows: list[tuple[str, str, bool, float, str, str]] = []
    seen: set[str] = set()
    left_out = 0
    for number, fields in _lines(path):
        if fields == ["filename", "cm-score"] and not rows:
            continue
        if fields[0] in others:
            left_out += 1
            continue
        utterance = labels.get(fields[0]) if labels is not None else None
        if len(fields) == 4 and fields[2] in LABELS:
            attack, is_bonafide = fields[1], LABELS[fields[2]] == 1
        elif len(fields) == 2 and labels is not None:
            attack, is_bonafide = "-", utterance is not None and utterance.label == 1
        elif len(fields) == 2:
            raise DataError(
                f"{path}:{number}: found no labels (`utterance score`); `gradalign evaluate` and `gradalign fuse` take "
                "them from --protocol or --dataset"
            )
        else:
            plain = "" if labels is None else ", or `utterance score`"
            raise DataError(
                f"{path}:{number}: expected `utterance attack label score` with label bonafide or spoof{plain}; "
                f"found {' '.join(fields)!r}"
            )
        value = _number(fields[-1])
        if not np.isfinite(value):
            raise DataError(f"{path}:{number}: expected a finite score; found {fields[-1]!r}")
        if fields[0] in seen:
            raise DataError(f"{path}:{number}: expected each utterance once; found {fields[0]!r} again")
        seen.add(fields[0])
        if utterance is not None:
            if (utterance.label == 1) != is_bonafide:
                label = "bonafide" if is_bonafide else "spoof"
                raise DataError(
                    f"{path}:{number}: {fields[0]!r} is {label} here and not so in {protocol or 'the data set'}"
                )
            attack = utterance.attack
        codec, speaker = ("-", "-") if utterance is None else (utterance.codec, utterance.speaker)
        rows.append((fields[0], attack, is_bonafide, value, codec, speaker))
    if not rows:
        there = f"{left_out} of the data set's other subsets only" if left_out else "none"
        raise DataError(f"{path}: expected at least one score{' of this subset' * bool(left_out)}; found {there}")
    if labels is not None:
        extra = [name for name, *_ in rows if name not in labels]
        missing = [name for name in labels if name not in seen]
        if extra or missing:
            examples = " and ".join(repr(names[0]) for names in (extra, missing) if names)
            raise DataError(
                f"{path} and {protocol or 'the data set'} must name the same utterances; found {len(extra)} scores "
                f"without a protocol line and {len(missing)} protocol lines without a score (for example {examples})"
            )
    names, attacks, bonafide, values, codecs, speakers = (list(column) for column in zip(*rows, strict=True))
    return Scores(names, attacks, np.array(bonafide, bool), np.array(values, np.float64), codecs, speakers)


FORMATS = ("2019", "2021", "5")
"""Score files: `utterance attack label score`, `utterance score`, and a table of filename and cm-score."""


def write_scores(path: str | Path, scores: Scores, form: str = "2019") -> None:
    """Write a score file, atomically, in the format of an ASVspoof challenge; ValueError for one not in `FORMATS`."""
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; found {form!r}")
    lines = ["filename\tcm-score\n"] if form == "5" else []
    columns = zip(scores.utterances, scores.attacks, scores.bonafide, scores.values.tolist(), strict=True)
    for name, attack, is_bonafide, value in columns:
        label = "bonafide" if is_bonafide else "spoof"
        between = {"2019": f" {attack} {label} ", "2021": " ", "5": "\t"}[form]
        lines.append(f"{name}{between}{value:.9g}\n")
    write_text(path, "".join(lines))


@dataclass(frozen=True)
class AsvScores:
    """The scores of a speaker verification system, one entry per trial.

    ``kinds`` holds target, nontarget and spoof, ``attacks`` and ``codecs`` hold ``-`` where nothing says them: each an
    array of str [N]. ``values`` is float64 [N].
    """

    kinds: np.ndarray
    attacks: np.ndarray
    codecs: np.ndarray
    values: np.ndarray

    def name_any(self, by: str | None, conditions: Collection[str]) -> bool:
        """Whether any of these attacks or codecs is one of the trials'."""
        known = {"attack": self.attacks[self.kinds == "spoof"], "codec": self.codecs}
        return by in known and not set(known[by].tolist()).isdisjoint({*conditions} - {"-"})

    def rates(self, by: str | None = None, name: str = "") -> AsvRates:
        """The error rates at the equal-error threshold: over all trials, or those of an attack or a codec.

        An attack's are over its own spoofed trials and all others, a codec's over its own trials (as in the ASVspoof
        2021 evaluation package).

        Raises:
            ValueError: where trials of a kind are missing.
        """
        chosen = np.ones(len(self.values), bool)
        if by == "attack":
            chosen = (self.attacks == name) | (self.kinds != "spoof")
        elif by == "codec":
            chosen = self.codecs == name
        found = {kind: self.values[chosen & (self.kinds == kind)] for kind in ASV_KINDS}
        empty = [kind for kind, values in found.items() if len(values) == 0]
        if empty:
            of = f" of the {by} {name}" if by else ""
            raise ValueError(
                f"expected speaker verification scores of target, nontarget and spoof trials{of}; found none of "
                f"{', '.join(empty)}"
            )
        return AsvRates.from_scores(**found)


def read_asv_scores(path: str | Path, root: str | Path | None = None, subset: str = "test") -> AsvScores:
    """Read the scores of a speaker verification system.

    Lines are ``attack kind score`` with kind target, nontarget or spoof (ASVspoof 2019; other columns may stand before
    the attack), or ``speaker trial score`` (ASVspoof 2021 LA). The latter score the trials of
    ``keys/LA/ASV/trial_metadata.txt``, line by line; those of the subset are kept.

    Args:
        path: the score file.
        root: the folder of ASVspoof 2021 LA with its keys, for a file of that form.
        subset: test, progress or hidden, of ASVspoof 2021 LA.

    Raises:
        DataError: naming file, line, expected and found.
    """
    path = Path(path)
    lines = list(_lines(path))
    trials, form = None, "`attack kind score` with kind target, nontarget or spoof and a finite score"
    if lines and not any(word in ASV_KINDS for word in lines[0][1][:-1]):
        if root is None:
            form += ", or `speaker trial score` with --dataset asvspoof2021-la"
        else:
            trials, form = read_asv_trials(root, subset), "`speaker trial score` with a finite score"
    kinds, attacks, values = [], [], []
    for number, fields in lines:
        at = [i for i, word in enumerate(fields[:-1]) if word in ASV_KINDS]
        value = _number(fields[-1])
        if not np.isfinite(value) or (len(at) != 1 if trials is None else len(fields) != 3):
            raise DataError(f"{path}:{number}: expected {form}; found {' '.join(fields)!r}")
        values.append(value)
        if trials is None:
            kinds.append(fields[at[0]])
            attacks.append(fields[at[0] - 1] if at[0] else "-")
    codecs, chosen = ["-"] * len(lines), [True] * len(lines)
    if trials is not None:
        _expect_trials(path, [(number, fields[1]) for number, fields in lines], trials)
        kinds, attacks, codecs, chosen = trials.kinds, trials.attacks, trials.codecs, trials.chosen
    kept = np.array(chosen, bool)
    scores = AsvScores(
        np.array(kinds, str)[kept], np.array(attacks, str)[kept], np.array(codecs, str)[kept], np.array(values)[kept]
    )
    try:
        scores.rates()
    except ValueError as error:
        raise DataError(f"{path}: {error}{'' if trials is None else f' in the subset {subset}'}") from None
    return scores


def _expect_trials(path: Path, found: Sequence[tuple[int, str]], trials: AsvTrials) -> None:
    """DataError where the trials of a score file (line, name) are not those of the keys, in their order."""
    for scored, expected in itertools.zip_longest(found, trials.names):
        if scored is None or scored[1] != expected:
            here = "the end of the file" if scored is None else f"{scored[1]!r} in line {scored[0]}"
            there = "the end of the file" if expected is None else f"{expected!r}"
            raise DataError(
                f"{path}: expected scores of the {len(trials.names)} trials of {trials.source}, in their order; found "
                f"{len(found)} scores, and {here} instead of {there}"
            )


BY = ("attack", "codec", "speaker")
"""What `evaluate` can tell apart."""


def _conditions(scores: Scores, by: str | None) -> list[tuple[str, np.ndarray]]:
    """All scores, then those of each attack, codec or speaker: (name, bool [N])."""
    if by is not None and by not in BY:
        raise ValueError(f"`by` must be None, {', '.join(map(repr, BY))}; found {by!r}")
    everything = np.ones(len(scores), bool)
    conditions = [("all", everything)]
    if by is not None:
        names = np.array({"attack": scores.attacks, "codec": scores.codecs, "speaker": scores.speakers}[by])
        known = sorted({str(name) for name in names} - {"-"})
        if not known:
            where = "the score file or the protocol" if by == "attack" else "--dataset"
            raise ValueError(f"--by {by}: expected {by} names from {where}; found none")
        conditions += [(n, (names == n) | scores.bonafide if by == "attack" else names == n) for n in known]
    return conditions


def evaluate(
    scores: Scores,
    *,
    by: str | None = None,
    asv: AsvRates | AsvScores | None = None,
    tdcf_version: str = "2021",
    resamples: int = 0,
) -> list[dict[str, Any]]:
    """One row of error measures over all scores, and with ``by`` one for each attack, codec or speaker.

    An attack's spoofed utterances are held against all bona fide ones; a codec's or a speaker's against its own. What
    has one of the classes only is left out.

    Each row: ``condition, bonafide, spoof`` (counts), ``eer`` (in [0, 1]), with ``resamples`` its 95% bootstrap
    interval ``eer_low, eer_high`` (over speakers, where all are known and there are two or more; over utterances
    otherwise), ``min_dcf``, ``act_dcf``, ``cllr`` (bits), and ``min_tdcf`` if the rates or scores of a speaker
    verification system are given. ``act_dcf`` and ``cllr`` read the scores as log-likelihood ratios. Where ``asv`` are
    scores that name the attacks (or codecs) of the rows, each row's ``min_tdcf`` takes the rates on its own.

    Raises:
        ValueError: when a class is missing over all, ``by`` names what the scores do not say, or ``asv`` lacks trials
            of a row or leaves the detector no weight there (see `metrics.min_tdcf`).
    """
    conditions = _conditions(scores, by)
    pooled = asv.rates() if isinstance(asv, AsvScores) else asv
    own = asv if isinstance(asv, AsvScores) and asv.name_any(by, [name for name, _ in conditions]) else None
    rows: list[dict[str, Any]] = []
    for condition, chosen in conditions:
        bonafide, spoof = (scores.values[chosen & kind] for kind in (scores.bonafide, ~scores.bonafide))
        row: dict[str, Any] = {"condition": condition, "bonafide": len(bonafide), "spoof": len(spoof)}
        if len(bonafide) == 0 or len(spoof) == 0:
            if condition == "all":
                raise ValueError(
                    f"expected bona fide and spoofed scores; found {len(bonafide)} bona fide and {len(spoof)} spoofed"
                )
            continue
        row["eer"] = float(metrics.eer(bonafide, spoof))
        if resamples:
            row["eer_low"], row["eer_high"] = metrics.eer_interval(
                bonafide, spoof, 0.95, resamples, clusters=_clusters(scores, chosen)
            )
        row |= {
            "min_dcf": float(metrics.min_dcf(bonafide, spoof)),
            "act_dcf": float(metrics.act_dcf(bonafide, spoof)),
            "cllr": float(metrics.cllr(bonafide, spoof)),
        }
        if pooled is not None:
            rates = pooled if own is None or condition == "all" else own.rates(by, condition)
            try:
                row["min_tdcf"] = float(metrics.min_tdcf(bonafide, spoof, asv=rates, version=tdcf_version))
            except ValueError as error:
                raise ValueError(str(error) if condition == "all" else f"{by} {condition}: {error}") from None
        rows.append(row)
    return rows


def one_sided(scores: Scores, by: str | None) -> list[str]:
    """The attacks, codecs or speakers that `evaluate` leaves out, as they have one of the classes only."""
    return [name for name, chosen in _conditions(scores, by) if (chosen & scores.bonafide).sum() in (0, chosen.sum())]


def _clusters(scores: Scores, chosen: np.ndarray) -> tuple[list[str], list[str]] | None:
    """The speakers of the bona fide and of the spoofed scores, which the bootstrap draws; None: utterances instead."""
    speakers = np.array(scores.speakers)
    bonafide, spoof = (speakers[chosen & kind].tolist() for kind in (scores.bonafide, ~scores.bonafide))
    names = set(bonafide + spoof)
    # Unknown speakers are not one: drawn together, they would make the interval far too narrow.
    return (bonafide, spoof) if len(names) > 1 and "-" not in names else None


def drawn(scores: Scores, by: str | None = None) -> str:
    """What the intervals of `evaluate` are drawn over: speakers, utterances, or each in some of the rows."""
    rows = [chosen for _, chosen in _conditions(scores, by) if 0 < (chosen & scores.bonafide).sum() < chosen.sum()]
    by_speaker = [_clusters(scores, chosen) is not None for chosen in rows]
    if not any(by_speaker):
        return "utterances"
    speakers = "speakers (so few that it is too narrow)" if len(set(scores.speakers)) <= 10 else "speakers"
    apart = ", and of utterances in rows with fewer than two of them or an unknown one"
    return speakers if all(by_speaker) else speakers + apart


def write_det(scores: Scores, path: str | Path, by: str | None = None) -> None:
    """Draw the detection error trade-off of the conditions of `evaluate` into a PNG file.

    Raises ValueError as `evaluate` does, and where ``path`` does not end in .png.
    """
    from gradalign import figures

    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"expected a path that ends in .png; found {str(path)!r}")
    curves, texts = {}, {}
    for condition, chosen in _conditions(scores, by):
        bonafide, spoof = (scores.values[chosen & kind] for kind in (scores.bonafide, ~scores.bonafide))
        if len(bonafide) and len(spoof):
            p_miss, p_fa, _ = metrics.det_curve(bonafide, spoof)
            curves[condition] = [(p_fa, p_miss)]
            texts[condition] = f"{condition}: EER {100 * float(metrics.eer(bonafide, spoof)):.1f}%"
    with figures.styled():
        figure = figures.new_figure(9.6, 7)
        colors = dict(zip(curves, itertools.cycle(figures.CATEGORY_COLORS)))
        figures.draw_det(figure.add_subplot(), curves, texts, colors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(figures.to_bytes(figure, "png"))


_HEADINGS = {
    "condition": "condition",
    "bonafide": "bona fide",
    "spoof": "spoof",
    "eer": "EER %",
    "eer_low": "from",
    "eer_high": "to",
    "min_dcf": "min DCF",
    "act_dcf": "act DCF",
    "cllr": "Cllr bits",
    "min_tdcf": "min t-DCF",
}


def _cell(key: str, value: object) -> str:
    if key.startswith("eer") and isinstance(value, float):
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `evaluate` as an aligned text table, EER in percent."""
    keys = list(rows[0])
    cells = [[_HEADINGS.get(k, k) for k in keys]] + [[_cell(k, row[k]) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def format_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `evaluate` as CSV with a header line, every digit kept."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def format_json(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `evaluate` as a JSON list."""
    return json.dumps(list(rows), indent=2) + "\n"
