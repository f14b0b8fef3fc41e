"""Public data sets, read from the files and folders they are published in.

| name | what is read, below the root |
|---|---|
| ``corpus`` | ``protocols/{train,dev,test}.txt``, ``flac/``, perhaps ``metadata.csv``: see `gradalign corpus build` |
| ``asvspoof2019-la`` | ``ASVspoof2019_LA_cm_protocols/`` and ``ASVspoof2019_LA_{train,dev,eval}/flac/`` |
| ``asvspoof2021-la`` | ``keys/LA/CM/trial_metadata.txt`` (the full keys) and ``ASVspoof2021_LA_eval/flac/`` |
| ``asvspoof2021-df`` | ``keys/DF/CM/trial_metadata.txt`` and ``ASVspoof2021_DF_eval/flac/``, whole or in four parts |
| ``asvspoof5`` | ``ASVspoof5.{train,dev.track_1,eval.track_1}.tsv`` and ``flac_T/``, ``flac_D/``, ``flac_E_eval/`` |
| ``in-the-wild`` | ``meta.csv`` (file, speaker, label) and the files beside it |
| ``for`` | one version of Fake-or-Real: ``{training,validation,testing}/{fake,real}/`` |
| ``mlaad`` | ``fake/<language>/<model>/meta.csv``, separated by ``|``; bona fide speech from ``M-AILABS/`` |
| ``csv`` | a CSV file with the columns path, label and, if wanted, speaker, attack, codec, split |

The root is the folder an archive unpacks to, or the one it was unpacked in. Subsets are ``train``, ``dev`` and ``test``
(``eval`` is another name of it), and of the ASVspoof 2021 keys also ``progress`` and ``hidden``.

A folder is listed once and each line looked up in that listing: asking the file system for every single file would take
minutes where it is on the network.
"""

from __future__ import annotations

import csv
import gc
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gradalign._errors import AudioError, DataError
from gradalign.data.audio import SUFFIXES, list_audio
from gradalign.data.protocol import PROTOCOL_FORM, Utterance, gather, label_of, read_columns, read_text

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Index:
    """A subset as its files name it: ``source`` is the list (or folder) read, ``missing`` the files that are not there.

    The utterances of missing files are among ``utterances``, with the path where the file was expected. ``others``
    holds the names that the ASVspoof 2021 keys give to other subsets.
    """

    source: Path
    utterances: list[Utterance]
    missing: list[Path]
    others: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Reader:
    """``locate`` finds the list a subset is read from, and raises DataError where there is none; ``read`` reads it."""

    subsets: tuple[str, ...]
    locate: Callable[[Path, str], Path]
    read: Callable[[Path, str, Path], Index]


def names() -> list[str]:
    """The names of the data sets that can be read.

    >>> names()[:3]
    ['corpus', 'asvspoof2019-la', 'asvspoof2021-la']
    """
    return list(_READERS)


def subsets(name: str, root: str | Path | None = None) -> list[str]:
    """The subsets of a data set; with ``root``, those whose lists are there.

    Raises DataError for an unknown name.

    >>> subsets("asvspoof2021-df")
    ['test', 'progress', 'hidden']
    """
    reader = _reader(name)
    if root is None:
        return list(reader.subsets)
    there = []
    for subset in reader.subsets:
        try:
            reader.locate(Path(root), subset)
        except DataError:
            continue
        there.append(subset)
    return there


def index_dataset(name: str, root: str | Path, subset: str) -> Index:
    """Read a subset's list and see which of its audio files are there; errors as in `read_dataset`, but for those."""
    reader = _reader(name)
    subset = _subset(name, subset)
    root = Path(root)
    source = reader.locate(root, subset)
    # Nothing that is made here is garbage: the collector would only walk over it again and again, a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return reader.read(root, subset, source)
    finally:
        if collecting:
            gc.enable()


def read_dataset(name: str, root: str | Path, subset: str, *, allow_missing: bool = False) -> list[Utterance]:
    """The utterances of a data set in its official layout, each with the path of its audio file.

    Args:
        name: one of `names`.
        root: the folder that the data set's archive unpacks to, or the one that this lies in.
        subset: one of `subsets`; ``eval`` is ``test``.
        allow_missing: keep utterances whose audio file is not there, with the path where it was expected, unless none
            is.

    Returns:
        In the order of the list. Bona fide speech has the attack ``-``; where the attack is not published it is
        ``unknown``. No field holds whitespace (score files are separated by it): it is replaced by ``_``.

    Raises:
        DataError: naming file, line, expected and found: an unknown name or subset, a list or folder that is not there,
            wrong columns, an unknown label, an utterance named twice, an empty list.
        AudioError: a DataError too: audio files that are not there, unless they may be missing.
    """
    index = index_dataset(name, root, subset)
    if not allow_missing or len(index.missing) == len(index.utterances):
        _expect_files(index, f" (`gradalign data check {name} {root}` lists them)")
    return index.utterances


def expect_files(utterances: Sequence[Utterance], audio_dir: Path) -> None:
    """See that every utterance of no data set has its audio file in a folder, which is listed once.

    Raises AudioError as `read_dataset` does, naming the folder.
    """
    files = _Files([audio_dir], (*SUFFIXES, ""))
    for utterance in utterances:
        files.find(utterance.name)
    _expect_files(Index(audio_dir, list(utterances), files.missing))


def _expect_files(index: Index, hint: str = "") -> None:
    if index.missing:
        raise AudioError(
            f"{index.source}: expected an audio file for each of {len(index.utterances)} utterances; "
            f"found none for {len(index.missing)}, such as {index.missing[0]}{hint}"
        )


def _subset(name: str, subset: str) -> str:
    subset = "test" if subset == "eval" else subset
    known = _reader(name).subsets
    if subset not in known:
        raise DataError(f"{name}: expected a subset among {', '.join(known)}; found {subset!r}")
    return subset


def _reader(name: str) -> _Reader:
    try:
        return _READERS[name]
    except KeyError:
        raise DataError(f"expected a data set among {', '.join(_READERS)}; found {name!r}") from None


# ---- finding files -------------------------------------------------------------------------------------------------


@dataclass
class _Files:
    """The audio files of some folders that hold one set together.

    ``suffixes`` are tried in their order; the first is the official one. ``missing`` collects what was not found.
    """

    folders: Sequence[Path]
    suffixes: Sequence[str]
    missing: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Every file by its name below the folders, with the folder it lies in.
        self._folder_of: dict[str, Path] = {}
        self._listed: set[str] = set()
        self._list("")

    def find(self, name: str) -> Path:
        """The file of a name, which may hold folders; where it should be, and noted as missing, if it is not there."""
        head, slash, tail = name.rpartition("/")
        if slash and head + slash not in self._listed:
            self._list(head + slash)
        for suffix in self.suffixes:
            folder = self._folder_of.get(name + suffix)
            if folder is not None:
                return folder / (tail + suffix)
        expected = self.folders[0] / (name + self.suffixes[0])
        self.missing.append(expected)
        return expected

    def _list(self, inner: str) -> None:
        self._listed.add(inner)
        for folder in self.folders:
            # An absolute name stays as it is.
            path = folder / inner
            if path.is_dir():
                self._folder_of.update((inner + name, path) for name in os.listdir(path))


def _first(root: Path, candidates: Sequence[str], what: str) -> Path:
    """The first of some paths below the root that is there; DataError naming them all if none is."""
    for candidate in candidates:
        if (path := root / candidate).exists():
            return path
    where = " or ".join(candidates)
    raise DataError(
        f"{root}: expected {what} at {where}; found {'none of them' if root.exists() else 'no such folder'}"
    )


def _folders(root: Path, patterns: Sequence[str]) -> list[Path]:
    """All folders below the root that match one of the patterns; without any, where the first would be: a score file is
    evaluated without audio.
    """
    found = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_dir()]
    return found or [root / patterns[0]]


class _Words(dict[str, str]):
    """The single word for each text, as one object: a column of few words has them by the hundred thousand."""

    def __missing__(self, text: str) -> str:
        word = self[text] = _word(text)
        return word


def _word(text: str) -> str:
    """A text without whitespace, ``-`` for none."""
    return "_".join(text.split()) or "-"


# ---- our own layout ------------------------------------------------------------------------------------------------


def _corpus_list(root: Path, subset: str) -> Path:
    return _first(root, [f"protocols/{subset}.txt"], f"the {subset} protocol")


def _read_corpus(root: Path, subset: str, protocol: Path) -> Index:
    files = _Files(_folders(root, ["flac"]), (*SUFFIXES, ""))
    metadata = root / "metadata.csv"
    # It may be another's, with other columns.
    lines = _table(metadata, ",", (), ("utterance", "channel"), others=True) if metadata.is_file() else ()
    return _read_2019_form(protocol, files, {name: _word(channel) for _, (name, channel) in lines})


def _read_2019_form(protocol: Path, files: _Files, codecs: Mapping[str, str]) -> Index:
    def rows() -> Iterator[tuple[int, Utterance]]:
        word, find = _Words(), files.find
        for number, (speaker, name, _, attack, label) in read_columns(protocol, PROTOCOL_FORM):
            index = label_of(protocol, number, label)
            yield number, Utterance(name, word[speaker], word[attack], index, codecs.get(name, "-"), find(name))

    return Index(protocol, gather(protocol, PROTOCOL_FORM, rows()), files.missing)


# ---- ASVspoof 2019 LA ----------------------------------------------------------------------------------------------
# README.LA.txt of https://doi.org/10.7488/ds/2555: LA.zip unpacks to LA/.

_NAMES_2019 = {"train": ("train", "train.trn"), "dev": ("dev", "dev.trl"), "test": ("eval", "eval.trl")}


def _asvspoof2019_list(root: Path, subset: str) -> Path:
    inner = f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{_NAMES_2019[subset][1]}.txt"
    return _first(root, [inner, f"LA/{inner}"], f"the {subset} protocol")


def _read_asvspoof2019(root: Path, subset: str, protocol: Path) -> Index:
    inner = f"ASVspoof2019_LA_{_NAMES_2019[subset][0]}/flac"
    return _read_2019_form(protocol, _Files(_folders(root, [inner, f"LA/{inner}"]), SUFFIXES), {})


# ---- ASVspoof 2021 -------------------------------------------------------------------------------------------------
# eval-package/README.md and config.py of https://github.com/asvspoof-challenge/2021 give the columns of the full keys;
# the archives are LA-keys-full.tar.gz and DF-keys-full.tar.gz, each with keys/ at its top.

_PHASES = {"test": "eval", "progress": "progress", "hidden": "hidden"}
ASV_KINDS = ("target", "nontarget", "spoof")
"""The kinds of trials that a speaker verification system is tested with."""
_FORMS_2021 = {
    "LA": "speaker trial codec transmission attack label trim subset",
    "DF": "speaker trial codec source attack label trim subset vocoder task team gender-pair language",
}


def _asvspoof2021_list(track: str) -> Callable[[Path, str], Path]:
    inner = f"keys/{track}/CM/trial_metadata.txt"

    def locate(root: Path, subset: str) -> Path:
        # The keys are an archive of their own, which lies beside the audio's folder if that is the root.
        beside = [f"../{inner}", f"../{track}-keys-full/{inner}"] if (root / "flac").is_dir() else []
        return _first(root, [inner, f"{track}-keys-full/{inner}", *beside], f"the full {track} keys")

    return locate


def _read_asvspoof2021(track: str) -> Callable[[Path, str, Path], Index]:
    form = _FORMS_2021[track]
    top = f"ASVspoof2021_{track}_eval"
    parts = [f"{top}_part0?/{top}/flac"] if track == "DF" else []

    def read(root: Path, subset: str, keys: Path) -> Index:
        files = _Files(_folders(root, [f"{top}/flac", *parts, "flac"]), SUFFIXES)
        others: list[str] = []

        def rows() -> Iterator[tuple[int, Utterance]]:
            word, find, phase = _Words(), files.find, _PHASES[subset]
            for number, columns in read_columns(keys, form):
                speaker, name, codec, _, attack, label, _, found = columns[:8]
                if found not in _PHASES.values():
                    expected = ", ".join(_PHASES.values())
                    raise DataError(f"{keys}:{number}: expected a subset among {expected}; found {found!r}")
                index = label_of(keys, number, label)
                if found == phase:
                    attack = "-" if index else word[attack]
                    yield number, Utterance(name, word[speaker], attack, index, word[codec], find(name))
                else:
                    others.append(name)

        return Index(keys, gather(keys, form, rows()), files.missing, frozenset(others))

    return read


@dataclass(frozen=True)
class AsvTrials:
    """The speaker verification trials of the ASVspoof 2021 LA keys, of all subsets, in the order of ``source``.

    ``chosen`` says which belong to the subset asked for, ``kinds`` holds `ASV_KINDS`.
    """

    source: Path
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    codecs: list[str] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)


def read_asv_trials(root: str | Path, subset: str = "test") -> AsvTrials:
    """Read ``keys/LA/ASV/trial_metadata.txt`` of ASVspoof 2021; root, subset and errors as in `read_dataset`."""
    phase = _PHASES[_subset("asvspoof2021-la", subset)]
    keys = _asvspoof2021_list("LA")(Path(root), subset).parents[1] / "ASV" / "trial_metadata.txt"
    trials = AsvTrials(keys)
    for number, (_, name, codec, _, attack, kind, _, found) in read_columns(keys, _FORMS_2021["LA"]):
        for what, word, known in (("kind", kind, ASV_KINDS), ("subset", found, _PHASES.values())):
            if word not in known:
                raise DataError(f"{keys}:{number}: expected a {what} among {', '.join(known)}; found {word!r}")
        trials.names.append(name)
        trials.kinds.append(kind)
        trials.attacks.append(attack)
        trials.codecs.append(codec)
        trials.chosen.append(found == phase)
    return trials


# ---- ASVspoof 5 ----------------------------------------------------------------------------------------------------
# README.txt of https://zenodo.org/records/14498691: separated by spaces in spite of their suffix; the ten flac_E_*.tar
# unpack to flac_E_eval.

_FORM_5 = "speaker flac gender codec codec-quality codec-seed attack-tag attack label reserved"
_NAMES_5 = {
    "train": ("train", "flac_T", "flac_T", "ASVspoof5_train"),
    "dev": ("dev.track_1", "flac_D", "flac_D", "ASVspoof5_dev"),
    "test": ("eval.track_1", "flac_E", "flac_E_eval", "ASVspoof5_eval"),
}


def _asvspoof5_list(root: Path, subset: str) -> Path:
    file = f"ASVspoof5.{_NAMES_5[subset][0]}.tsv"
    return _first(root, [file, f"ASVspoof5_protocols/{file}"], f"the {subset} protocol")


def _read_asvspoof5(root: Path, subset: str, protocol: Path) -> Index:
    _, archive, folder, group = _NAMES_5[subset]
    # Unpacked in one place, each archive in a folder of its own, or grouped as in the README's table of checksums.
    patterns = [folder, f"{archive}_??/{folder}", f"{group}/{folder}"]
    files = _Files(_folders(root, patterns), SUFFIXES)

    def rows() -> Iterator[tuple[int, Utterance]]:
        word, find = _Words(), files.find
        for number, columns in read_columns(protocol, _FORM_5):
            speaker, name, _, codec, _, _, _, attack, label, _ = columns
            index = label_of(protocol, number, label)
            attack = "-" if index else word[attack]
            # A condition of its own, which `-` would leave out.
            codec = "none" if codec == "-" else codec
            yield number, Utterance(name, word[speaker], attack, index, word[codec], find(name))

    return Index(protocol, gather(protocol, _FORM_5, rows()), files.missing)


# ---- tables with a header ------------------------------------------------------------------------------------------


def _table(
    path: Path, separator: str, columns: Sequence[str], optional: Sequence[str] = (), others: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table with a header, as (number, values of ``columns`` and ``optional``, empty where not given).

    DataError names file and line where columns are lacking, unknown (unless there may be ``others``) or named twice.
    """
    lines = csv.reader(io.StringIO(read_text(path, "table")), delimiter=separator, strict=True)
    header: list[str] = []
    places: list[int | None] = []
    try:
        for values in lines:
            if not values:
                continue
            if not header:
                header = [value.strip() for value in values]
                unknown = set(header) - {*columns, *optional}
                if not set(columns) <= set(header) or (unknown and not others) or len(set(header)) < len(header):
                    more = f" and perhaps {separator.join(optional)}" if optional else ""
                    raise DataError(
                        f"{path}:{lines.line_num}: expected the columns {separator.join(columns)}{more}; "
                        f"found {separator.join(header)}"
                    )
                places = [header.index(column) if column in header else None for column in (*columns, *optional)]
            elif len(values) != len(header):
                raise DataError(
                    f"{path}:{lines.line_num}: expected the {len(header)} columns {separator.join(header)}; found "
                    f"{len(values)}: {separator.join(values)[:80]!r}"
                )
            else:
                yield lines.line_num, ["" if place is None else values[place] for place in places]
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: expected a line of a table; found: {error}") from None
    if not header:
        raise DataError(f"{path}: expected a line with the columns {separator.join(columns)}; found an empty file")


# In-the-Wild: release_in_the_wild.zip of https://huggingface.co/datasets/mueller91/In-The-Wild unpacks to the folder
# of the same name.

_COLUMNS_WILD = ("file", "speaker", "label")
_LABELS_WILD = {"bona-fide": 1, "spoof": 0}


def _wild_list(root: Path, subset: str) -> Path:
    return _first(root, ["meta.csv", "release_in_the_wild/meta.csv"], "the list")


def _read_wild(root: Path, subset: str, table: Path) -> Index:
    files = _Files([table.parent], ("",))

    def rows() -> Iterator[tuple[int, Utterance]]:
        word, find = _Words(), files.find
        for number, (file, speaker, label) in _table(table, ",", _COLUMNS_WILD):
            index = label_of(table, number, label, _LABELS_WILD)
            yield number, Utterance(_word(file), word[speaker], "-" if index else "unknown", index, "-", find(file))

    return Index(table, gather(table, ",".join(_COLUMNS_WILD), rows()), files.missing)


# MLAAD: https://huggingface.co/datasets/mueller91/MLAAD. It holds synthetic speech only; the human originals are named
# by `original_file`, below the folder of the M-AILABS corpus. Later versions add columns.

_COLUMNS_MLAAD = ("path", "original_file", "language", "model_name")


def _mlaad_list(root: Path, subset: str) -> Path:
    return _first(root, ["fake"], "the folders of the languages")


def _read_mlaad(root: Path, subset: str, fake: Path) -> Index:
    tables = sorted(fake.glob("*/*/meta.csv"))
    if not tables:
        raise DataError(f"{fake}: expected <language>/<model>/meta.csv; found none")
    for folder in sorted(path for path in fake.glob("*/*") if path.is_dir()):
        if not (folder / "meta.csv").is_file():
            raise DataError(f"{folder / 'meta.csv'}: expected the list of a model's files; found nothing there")
    files = _Files([root], ("",))
    human = _Files([root / "M-AILABS"], ("",)) if (root / "M-AILABS").is_dir() else None
    word = _Words()
    originals: dict[str, Utterance] = {}
    table_of: dict[str, Path] = {}
    utterances: list[Utterance] = []

    def rows(table: Path) -> Iterator[tuple[int, Utterance]]:
        for number, (file, original, _, model) in _table(table, "|", _COLUMNS_MLAAD, others=True):
            file, original = file.removeprefix("./"), original.removeprefix("./")
            yield number, Utterance(_word(file), "-", word[model], 0, "-", files.find(file))
            if human is not None and original not in originals:
                # <locale>/by_book/<female or male>/<speaker>/<book>/wavs/<file>, or by_book/mix/<book>/...
                parts = original.split("/")
                speaker = word[parts[3]] if len(parts) > 4 and parts[2] in ("female", "male") else "-"
                name = _word(f"M-AILABS/{original}")
                originals[original] = Utterance(name, speaker, "-", 1, "-", human.find(original))

    for table in tables:
        for utterance in gather(table, "|".join(_COLUMNS_MLAAD), rows(table)):
            other = table_of.setdefault(utterance.name, table)
            if other != table:
                raise DataError(f"{table}: expected each file in one list; found {utterance.name!r} in {other} too")
            utterances.append(utterance)
    utterances += originals.values()
    return Index(fake, utterances, files.missing + (human.missing if human else []))


_COLUMNS_CSV = ("path", "label")
_OPTIONAL_CSV = ("speaker", "attack", "codec", "split")


def _csv_list(root: Path, subset: str) -> Path:
    if root.is_dir():
        return _first(root, [f"{subset}.csv"], "a table")
    splits = {values[-1] for _, values in _table(root, ",", _COLUMNS_CSV, _OPTIONAL_CSV)}
    if subset not in splits and not (splits == {""} and subset == "test"):
        raise DataError(
            f"{root}: expected lines whose column split is {subset}; found {', '.join(sorted(splits - {''})) or 'none'}"
        )
    return root


def _read_csv(root: Path, subset: str, table: Path) -> Index:
    files = _Files([table.parent], ("",))

    def rows() -> Iterator[tuple[int, Utterance]]:
        word, find = _Words(), files.find
        for number, values in _table(table, ",", _COLUMNS_CSV, _OPTIONAL_CSV):
            file, label, speaker, attack, codec, split = values
            if split not in ("", *SPLITS):
                raise DataError(f"{table}:{number}: expected the split {', '.join(SPLITS)}; found {split!r}")
            index = label_of(table, number, label)
            if split in ("", subset):
                attack = "-" if index else word[attack or "unknown"]
                yield number, Utterance(_word(file), word[speaker], attack, index, word[codec], find(file))

    return Index(table, gather(table, ",".join(_COLUMNS_CSV), rows()), files.missing)


# ---- Fake-or-Real --------------------------------------------------------------------------------------------------
# https://bil.eecs.yorku.ca/datasets: for-original, for-norm, for-2sec and for-rerec.tar.gz unpack to these folders.

_VERSIONS_FOR = ("for-original", "for-norm", "for-2seconds", "for-rerecorded")
_NAMES_FOR = {"train": "training", "dev": "validation", "test": "testing"}


def _for_folder(root: Path, subset: str) -> Path:
    inner = _NAMES_FOR[subset]
    versions = [version for version in _VERSIONS_FOR if (root / version / inner).is_dir()]
    if len(versions) > 1:
        raise DataError(
            f"{root}: expected one version of Fake-or-Real; found {', '.join(versions)} (one of them can be the root)"
        )
    return _first(root, [inner, *(f"{version}/{inner}" for version in _VERSIONS_FOR)], f"the {subset} files")


def _read_for(root: Path, subset: str, folder: Path) -> Index:
    def rows() -> Iterator[Utterance]:
        for label, name in ((0, "fake"), (1, "real")):
            inside = _first(folder, [name], "audio files")
            for file in list_audio(inside):
                inner = _word(file.relative_to(inside).as_posix())
                yield Utterance(f"{name}/{inner}", "-", "-" if label else "unknown", label, "-", file)

    return Index(folder, gather(folder, "{fake,real}/<audio file>", enumerate(rows(), start=1)), [])


# ---- all of them ---------------------------------------------------------------------------------------------------

_READERS = {
    "corpus": _Reader(SPLITS, _corpus_list, _read_corpus),
    "asvspoof2019-la": _Reader(SPLITS, _asvspoof2019_list, _read_asvspoof2019),
    "asvspoof2021-la": _Reader(tuple(_PHASES), _asvspoof2021_list("LA"), _read_asvspoof2021("LA")),
    "asvspoof2021-df": _Reader(tuple(_PHASES), _asvspoof2021_list("DF"), _read_asvspoof2021("DF")),
    "asvspoof5": _Reader(SPLITS, _asvspoof5_list, _read_asvspoof5),
    "in-the-wild": _Reader(("test",), _wild_list, _read_wild),
    "for": _Reader(SPLITS, _for_folder, _read_for),
    "mlaad": _Reader(("test",), _mlaad_list, _read_mlaad),
    "csv": _Reader(SPLITS, _csv_list, _read_csv),
}
