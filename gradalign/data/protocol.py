"""Protocol files: which utterances a data set has, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradalign._errors import DataError

LABELS = {"bonafide": 1, "spoof": 0}
"""The label words and their class indices."""

PROTOCOL_FORM = "speaker utterance - attack label"
"""The columns of a protocol of ASVspoof form."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a protocol.

    ``attack`` is ``-`` for bona fide speech; ``label`` is 1 for bona fide, 0 for spoof; ``codec`` is what the speech
    was sent or stored through, ``-`` where nothing is known; ``path`` is its audio file, None where that is to be found
    by its name (`find_audio`).
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


def read_text(path: Path, kind: str = "protocol file", errors: str = "strict") -> str:
    """The text of a UTF-8 file, a ``kind``; DataError naming it where there is none, or none that is text.

    ``errors`` is that of `open`: ``surrogateescape`` for a file of file names, which need not be UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors=errors)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a {kind}; found nothing there") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a {kind}; found a folder") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a text file; found bytes that are not UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path}: expected a text file; found binary data")
    return text


def read_columns(path: Path, form: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of a file of whitespace-separated columns, as (number, columns).

    ``form`` names the columns. Empty lines and lines that begin with # are passed over; DataError names a line with
    another number of columns.
    """
    count = len(form.split())
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        columns = line.split()
        if not columns or columns[0][0] == "#":
            continue
        if len(columns) != count:
            raise DataError(
                f"{path}:{number}: expected the {count} columns `{form}`; found {len(columns)}: {line.strip()[:80]!r}"
            )
        yield number, columns


def label_of(path: Path, number: int, word: str, labels: Mapping[str, int] = LABELS) -> int:
    """The class index of a label word; DataError naming file and line for an unknown one."""
    try:
        return labels[word]
    except KeyError:
        raise DataError(f"{path}:{number}: expected the label {' or '.join(labels)}; found {word!r}") from None


def gather(path: Path, form: str, rows: Iterable[tuple[int, Utterance]]) -> list[Utterance]:
    """The utterances of (line number, utterance) pairs; DataError for one named twice, or where there is none."""
    utterances: list[Utterance] = []
    first_seen: dict[str, int] = {}
    for number, utterance in rows:
        first = first_seen.setdefault(utterance.name, number)
        if first != number:
            raise DataError(
                f"{path}:{number}: expected each utterance once; found {utterance.name!r} again (see line {first})"
            )
        utterances.append(utterance)
    if not utterances:
        raise DataError(f"{path}: expected at least one line `{form}`; found none")
    return utterances


def read_protocol(path: str | Path) -> list[Utterance]:
    """Read a protocol of ASVspoof form, in file order; empty lines and lines that begin with # are passed over.

    Lines are ``speaker utterance - attack label`` with label ``bonafide`` or ``spoof`` (the third column is not used).

    Raises:
        DataError: naming file, line, expected and found: missing file, wrong columns, an unknown label, an utterance
            named twice, no utterance at all.
    """
    path = Path(path)
    rows = (
        (number, Utterance(name, speaker, attack, label_of(path, number, label)))
        for number, (speaker, name, _, attack, label) in read_columns(path, PROTOCOL_FORM)
    )
    return gather(path, PROTOCOL_FORM, rows)


def expect_disjoint(splits: Mapping[str, tuple[Path, Sequence[Utterance]]]) -> None:
    """Raise DataError where a split names a file of an earlier one: its errors would be those of training.

    ``splits`` holds the audio folder and the utterances of each.
    """
    split_of: dict[Path | tuple[Path, str], str] = {}
    for split, (folder, utterances) in splits.items():
        folder = folder.resolve()
        here = {u.path or (folder, u.name): u.name for u in utterances}
        shared = [file for file in here if file in split_of]
        if shared:
            raise DataError(
                f"{folder}: expected other files in {split} than in {split_of[shared[0]]}; found {len(shared)} in "
                f"both, such as {here[shared[0]]!r}"
            )
        split_of |= dict.fromkeys(here, split)
