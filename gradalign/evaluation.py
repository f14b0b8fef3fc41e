"""Score files, and the table of detection errors made from one: what ``gradalign evaluate`` prints."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradalign import metrics
from gradalign._errors import DataError
from gradalign.data.protocol import LABELS, read_protocol
from gradalign.metrics import AsvRates


@dataclass(frozen=True)
class Scores:
    """The scores of one file, one entry per utterance; higher is more bona fide.

    ``attacks`` holds ``-`` for bona fide utterances (and for every utterance where the file names no attacks),
    ``bonafide`` is bool [N], ``values`` float64 [N].
    """

    utterances: list[str]
    attacks: list[str]
    bonafide: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.utterances)

    def split(self, attack: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``(bona fide scores, spoof scores)``, the latter of one attack if it is named."""
        spoof = ~self.bonafide
        if attack is not None:
            spoof &= np.array([a == attack for a in self.attacks], dtype=bool)
        return self.values[self.bonafide], self.values[spoof]

    def attack_names(self) -> list[str]:
        """The attacks of the spoofed utterances, sorted."""
        return sorted({a for a, b in zip(self.attacks, self.bonafide, strict=True) if not b and a != "-"})


def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a text file; found bytes that are not UTF-8") from None
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if fields and not fields[0].startswith("#"):
            yield number, fields


def read_scores(path: str | Path, protocol: str | Path | None = None) -> Scores:
    """Read a score file.

    Lines are ``utterance attack label score`` (as `gradalign score` and the ASVspoof baselines write them), or
    ``utterance score`` where ``protocol`` gives the labels. With a protocol, both must name the same utterances.
    Raises DataError naming file, line, expected and found; FileNotFoundError.
    """
    path = Path(path)
    known = None
    if protocol is not None:
        known = {u.name: (u.attack, u.label == 1) for u in read_protocol(protocol)}
    utterances: list[str] = []
    attacks: list[str] = []
    bonafide: list[bool] = []
    values: list[float] = []
    seen: set[str] = set()
    for number, fields in _lines(path):
        if len(fields) == 4 and fields[2] in LABELS:
            utterance, attack, is_bonafide = fields[0], fields[1], LABELS[fields[2]] == 1
        elif len(fields) == 2 and known is not None:
            utterance = fields[0]
            attack, is_bonafide = known.get(utterance, ("-", False))
        elif len(fields) == 2:
            raise DataError(f"{path}:{number}: found no labels (`utterance score`); expected --protocol to give them")
        else:
            raise DataError(
                f"{path}:{number}: expected `utterance attack label score` with label bonafide or spoof; "
                f"found {' '.join(fields)!r}"
            )
        try:
            value = float(fields[-1])
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise DataError(f"{path}:{number}: expected a finite score; found {fields[-1]!r}")
        if utterance in seen:
            raise DataError(f"{path}:{number}: expected each utterance once; found {utterance!r} again")
        seen.add(utterance)
        if known is not None and utterance in known and known[utterance][1] != is_bonafide:
            label = "bonafide" if is_bonafide else "spoof"
            raise DataError(f"{path}:{number}: {utterance!r} is {label} here and not so in {protocol}")
        if known is not None and utterance in known:
            attack = known[utterance][0]
        utterances.append(utterance)
        attacks.append(attack)
        bonafide.append(is_bonafide)
        values.append(value)
    if not utterances:
        raise DataError(f"{path}: expected at least one score; found none")
    if known is not None:
        extra = [u for u in utterances if u not in known]
        missing = [u for u in known if u not in seen]
        if extra or missing:
            example = (extra or missing)[0]
            raise DataError(
                f"{path} and {protocol} must name the same utterances; found {len(extra)} scores without a protocol "
                f"line and {len(missing)} protocol lines without a score (for example {example!r})"
            )
    return Scores(utterances, attacks, np.array(bonafide, dtype=bool), np.array(values, dtype=np.float64))


def read_asv_rates(path: str | Path) -> AsvRates:
    """The error rates of a speaker verification system at its own equal-error threshold, from its score file.

    Lines hold one of the three words in some column and the score in the last one, as in the ASVspoof ASV score files.
    """
    path = Path(path)
    found: dict[str, list[float]] = {"target": [], "nontarget": [], "spoof": []}
    for number, fields in _lines(path):
        kinds = [f for f in fields[:-1] if f in found]
        try:
            value = float(fields[-1])
        except ValueError:
            value = float("nan")
        if len(kinds) != 1 or not np.isfinite(value):
            raise DataError(
                f"{path}:{number}: expected a line with one of target, nontarget, spoof and a score at its end; "
                f"found {' '.join(fields)!r}"
            )
        found[kinds[0]].append(value)
    empty = [kind for kind, values in found.items() if not values]
    if empty:
        raise DataError(f"{path}: expected target, nontarget and spoof scores; found none of {', '.join(empty)}")
    return AsvRates.from_scores(**{kind: np.array(values, dtype=np.float64) for kind, values in found.items()})


def evaluate(
    scores: Scores,
    *,
    by: str | None = None,
    asv: AsvRates | None = None,
    tdcf_version: str = "2021",
) -> list[dict[str, object]]:
    """One row of error measures over all scores, and with ``by="attack"`` one per attack (against all bona fide).

    Each row: ``condition, bonafide, spoof`` (counts), ``eer`` (in [0, 1]), ``min_dcf``, ``act_dcf``, ``cllr`` (bits),
    and ``min_tdcf`` if the rates of a speaker verification system are given. ``act_dcf`` and ``cllr`` read the scores
    as log-likelihood ratios. Raises ValueError when a class is missing.
    """
    if by not in (None, "attack"):
        raise ValueError(f"`by` must be None or 'attack'; found {by!r}")
    conditions: list[tuple[str, str | None]] = [("all", None)]
    if by == "attack":
        names = scores.attack_names()
        if not names:
            raise ValueError("--by attack: expected attack names in the score file or the protocol; found none")
        conditions += [(name, name) for name in names]
    rows: list[dict[str, object]] = []
    for condition, attack in conditions:
        bonafide, spoof = scores.split(attack)
        if len(bonafide) == 0 or len(spoof) == 0:
            raise ValueError(
                f"expected bona fide and spoofed scores; found {len(bonafide)} bona fide and {len(spoof)} spoofed"
            )
        row: dict[str, object] = {
            "condition": condition,
            "bonafide": len(bonafide),
            "spoof": len(spoof),
            "eer": float(metrics.eer(bonafide, spoof)),
            "min_dcf": float(metrics.min_dcf(bonafide, spoof)),
            "act_dcf": float(metrics.act_dcf(bonafide, spoof)),
            "cllr": float(metrics.cllr(bonafide, spoof)),
        }
        if asv is not None:
            row["min_tdcf"] = float(metrics.min_tdcf(bonafide, spoof, asv=asv, version=tdcf_version))
        rows.append(row)
    return rows


_HEADINGS = {
    "condition": "condition",
    "bonafide": "bona fide",
    "spoof": "spoof",
    "eer": "EER %",
    "min_dcf": "min DCF",
    "act_dcf": "act DCF",
    "cllr": "Cllr bits",
    "min_tdcf": "min t-DCF",
}


def _cell(key: str, value: object) -> str:
    if key == "eer" and isinstance(value, float):
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """The rows of `evaluate` as an aligned text table, EER in percent."""
    keys = list(rows[0])
    cells = [[_HEADINGS.get(k, k) for k in keys]] + [[_cell(k, row[k]) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def format_csv(rows: Sequence[dict[str, object]]) -> str:
    """The rows of `evaluate` as CSV with a header line, every digit kept."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def format_json(rows: Sequence[dict[str, object]]) -> str:
    """The rows of `evaluate` as a JSON list."""
    return json.dumps(list(rows), indent=2) + "\n"
