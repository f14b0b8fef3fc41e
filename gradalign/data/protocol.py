"""Protocol files: which utterances a data set has, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradalign._errors import DataError

LABELS = {"bonafide": 1, "spoof": 0}
"""The label words and their class indices."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a protocol.

    ``attack`` is ``-`` for bona fide speech; ``label`` is 1 for bona fide, 0 for spoof; ``codec`` is what the speech was
    sent or stored through, ``-`` where nothing is known; ``path`` is its audio file, None where that is to be found by
    its name (`find_audio`).
    """

    name: str
    speaker: str
    attack: str
    label: int
    codec: str = "-"
    path: Path | None = None

    @property
    def label_name(self) -> str:
        """``bonafide`` or ``spoof``."""
        return "bonafide" if self.label else "spoof"


def read_protocol(path: str | Path) -> list[Utterance]:
    """Read a protocol of ASVspoof form, in file order; empty lines and lines that begin with # are passed over.

    Lines are ``speaker utterance - attack label`` with label ``bonafide`` or ``spoof`` (the third column is not used).

    Raises:
        DataError: naming file, line, expected and found: missing file, wrong columns, an unknown label, an utterance
            named twice, no utterance at all.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: expected a protocol file; found nothing there") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a text file; found bytes that are not UTF-8") from None
    utterances: list[Utterance] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.split()
        if not columns or columns[0].startswith("#"):
            continue
        if len(columns) != 5:
            raise DataError(
                f"{path}:{number}: expected the 5 columns `speaker utterance - attack label`; found {len(columns)}: "
                f"{line.strip()[:80]!r}"
            )
        speaker, name, _, attack, label = columns
        if label not in LABELS:
            raise DataError(f"{path}:{number}: expected the label bonafide or spoof; found {label!r}")
        if name in first_seen:
            raise DataError(
                f"{path}:{number}: expected each utterance once; found {name!r} again (see line {first_seen[name]})"
            )
        first_seen[name] = number
        utterances.append(Utterance(name, speaker, attack, LABELS[label]))
    if not utterances:
        raise DataError(f"{path}: expected at least one line `speaker utterance - attack label`; found none")
    return utterances
