"""Checking a data set before hours are lost: what it holds, and which of its files cannot be used."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gradalign._errors import AudioError, DataError
from gradalign._files import write_text
from gradalign.data import datasets
from gradalign.data.audio import AudioHeader, read_audio, read_header
from gradalign.data.protocol import read_text

FILES_PER_TASK = 64


@dataclass
class SubsetReport:
    """What a subset holds, and what is wrong with it.

    ``labels``, ``attacks``, ``codecs``, ``speakers``, ``sample_rates`` (Hz) and ``channels`` count utterances;
    ``hours`` and the last two are of the files that can be read. ``wrong`` holds one line for each thing that is wrong,
    by kind: ``list`` (the subset's list cannot be read), ``missing`` files, ``unreadable`` ones (damaged, truncated,
    empty), ``sample rate`` (another than most), ``content`` (another SHA-256 than in the manifest), ``shared`` (a file
    of an earlier subset too).
    """

    subset: str
    utterances: int = 0
    hours: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)
    attacks: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    sample_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Report:
    """The subsets of a data set that were checked; ``absent`` are those whose lists are not there."""

    name: str
    root: Path
    subsets: list[SubsetReport]
    absent: list[str]

    @property
    def count_wrong(self) -> int:
        """How many things are wrong in all; 0 for a data set that can be used."""
        return sum(len(lines) for subset in self.subsets for lines in subset.wrong.values())

    def text(self, limit: int | None = 10) -> str:
        """The report as lines to read, with at most ``limit`` of each kind of what is wrong (None: all)."""
        lines = [f"{self.name} in {self.root}"]
        for subset in self.subsets:
            counts = ", ".join(f"{count} {label}" for label, count in sorted(subset.labels.items()))
            rates = ", ".join(_counts(subset.sample_rates, " Hz")) or "no sample rate"
            lines.append(
                f"{subset.subset}: {subset.utterances} utterances ({counts or 'none'}), "
                f"{len(subset.speakers)} speakers, {subset.hours:.2f} h, {rates}"
            )
            if set(subset.channels) - {1}:
                lines.append(f"  channels: {', '.join(_counts(subset.channels))}")
            attacks = Counter({attack: count for attack, count in subset.attacks.items() if attack != "-"})
            if attacks:
                lines.append(f"  attacks: {', '.join(_counts(attacks))}")
            if set(subset.codecs) - {"-"}:
                lines.append(f"  codecs: {', '.join(_counts(subset.codecs))}")
            for kind, wrong in subset.wrong.items():
                lines.append(f"  {kind}: {len(wrong)}")
                lines += [f"    {line}" for line in wrong[:limit]]
                if len(wrong) > len(wrong[:limit]):
                    lines.append(f"    ... and {len(wrong) - len(wrong[:limit])} more")
        lines += [f"{subset}: not there" for subset in self.absent]
        lines.append(f"{self.count_wrong} wrong" if self.count_wrong else "nothing is wrong")
        # File names that are not UTF-8 could not be printed.
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def check(
    name: str,
    root: str | Path,
    subsets: Sequence[str] | None = None,
    *,
    decode: bool = False,
    manifest: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Read the lists of a data set and the headers of all its files, and report what is there and what is wrong.

    Args:
        name: one of `datasets.names`.
        root: as for `read_dataset`.
        subsets: to check; by default those whose lists are there.
        decode: decode every file whole, which finds truncated and damaged ones whose headers are good.
        manifest: file of SHA-256 sums, in the form of ``sha256sum`` (with ``-b`` or without), with paths relative to
            the root. Files that it names are compared with it, others are added to it; it is written whole or not at
            all.
        workers: threads that read files; by default as many as there are CPUs and four more, since they mostly wait.
        progress: show a bar.

    Raises:
        DataError: an unknown name or subset, no list of any subset, or a manifest that is none. Everything else that is
            wrong is in the report.
    """
    root = Path(root)
    if workers is not None and workers < 1:
        raise DataError(f"`workers` must be at least 1; found {workers}")
    there = datasets.subsets(name, root) if subsets is None else subsets
    there = list(dict.fromkeys("test" if subset == "eval" else subset for subset in there))
    if unknown := set(there) - set(datasets.subsets(name)):
        raise DataError(f"{name}: expected subsets among {', '.join(datasets.subsets(name))}; found {unknown.pop()!r}")
    if not there:
        # Says what was looked for.
        datasets.index_dataset(name, root, datasets.subsets(name)[0])
    sums = None if manifest is None else _Manifest(Path(manifest), root if root.is_dir() else root.parent)
    subset_of: dict[Path, str] = {}
    report = Report(name, root, [], [s for s in datasets.subsets(name) if s not in there] if subsets is None else [])
    for subset in there:
        found = SubsetReport(subset)
        report.subsets.append(found)
        try:
            index = datasets.index_dataset(name, root, subset)
        except DataError as error:
            found.wrong["list"] = [str(error)]
            continue
        found.utterances = len(index.utterances)
        for utterance in index.utterances:
            found.labels[utterance.label_name] += 1
            found.attacks[utterance.attack] += 1
            found.codecs[utterance.codec] += 1
            found.speakers[utterance.speaker] += 1
        if index.missing:
            found.wrong["missing"] = [str(path) for path in index.missing]
        missing = set(index.missing)
        paths = [u.path for u in index.utterances if u.path is not None and u.path not in missing]
        _check_files(found, paths, decode, sums, workers or len(os.sched_getaffinity(0)) + 4, progress)
        shared = [f"{path}: in {subset_of[path]} too" for path in paths if path in subset_of]
        if shared:
            found.wrong["shared"] = shared
        subset_of.update(dict.fromkeys(paths, subset))
    if sums is not None:
        sums.write()
    return report


class _Manifest:
    """Known SHA-256 sums of the files below a folder, and those that come to be known."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path, self.base = path, base
        self.known: dict[str, str] = {}
        self.changed = False
        content = read_text(path, "list of SHA-256 sums", "surrogateescape") if path.exists() else ""
        # Not splitlines: names may hold what it takes for the end of a line.
        for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if match is None:
                raise DataError(f"{path}:{number}: expected `<SHA-256>  <path>`; found {line[:80]!r}")
            name = posixpath.normpath(match[2])
            if self.known.setdefault(name, match[1]) != match[1]:
                raise DataError(f"{path}:{number}: expected one SHA-256 for {name!r}; found a second")

    def compare(self, path: Path, digest: str) -> str:
        """What is wrong with a file's sum: nothing where it is the known one, or was not known."""
        name = path.relative_to(self.base).as_posix() if path.is_relative_to(self.base) else str(path.absolute())
        name = posixpath.normpath(name)
        if name not in self.known:
            self.known[name] = digest
            self.changed = True
        expected = self.known[name]
        return "" if expected == digest else f"{path}: expected SHA-256 {expected}; found {digest}"

    def write(self) -> None:
        if self.changed:
            content = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.known.items()))
            write_text(self.path, content)


class _Found(NamedTuple):
    path: Path
    header: AudioHeader | None
    error: str
    digest: str


def _check_files(
    report: SubsetReport, paths: list[Path], decode: bool, sums: _Manifest | None, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    unreadable, content = [], []
    rate_of: list[tuple[Path, int]] = []
    seconds = 0.0
    with tqdm(total=len(paths), unit="file", desc=report.subset, disable=None if progress else True) as bar:
        for path, header, error, digest in _inspect_all(paths, decode, sums is not None, workers):
            bar.update()
            if header is None:
                unreadable.append(error)
            else:
                seconds += header.frames / header.sample_rate
                report.channels[header.channels] += 1
                rate_of.append((path, header.sample_rate))
            if sums is not None and digest and (problem := sums.compare(path, digest)):
                content.append(problem)
    report.hours = seconds / 3600
    report.sample_rates = Counter(rate for _, rate in rate_of)
    usual = report.sample_rates.most_common(1)[0][0] if rate_of else 0
    mixed = [f"{path}: expected {usual} Hz, as most have; found {rate} Hz" for path, rate in rate_of if rate != usual]
    for kind, lines in (("unreadable", unreadable), ("sample rate", mixed), ("content", content)):
        if lines:
            report.wrong[kind] = lines


def _inspect_all(paths: Sequence[Path], decode: bool, hashed: bool, workers: int) -> Iterator[_Found]:
    """The files' findings, in order, from several threads: libsndfile and hashlib release the interpreter's lock."""
    rest = iter(paths)

    def inspect(some: list[Path]) -> list[_Found]:
        return [_inspect(path, decode, hashed) for path in some]

    with ThreadPoolExecutor(workers) as pool:
        # Bounded: a task per file of a large set would be gigabytes of waiting futures.
        waiting: deque[Future[list[_Found]]] = deque()
        while True:
            while len(waiting) < 2 * workers and (some := list(islice(rest, FILES_PER_TASK))):
                waiting.append(pool.submit(inspect, some))
            if not waiting:
                return
            yield from waiting.popleft().result()


def _inspect(path: Path, decode: bool, hashed: bool) -> _Found:
    header, error, digest = None, "", ""
    try:
        header = read_header(path)
        if decode:
            read_audio(path, header.sample_rate)
    except AudioError as problem:
        header, error = None, str(problem)
    if hashed:
        try:
            digest = sha256_of(path)
        except OSError as problem:
            header, error = None, f"{path}: expected a readable file; found: {problem.strerror}"
    return _Found(path, header, error, digest)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _counts(counter: Counter[str] | Counter[int], unit: str = "") -> list[str]:
    items = sorted(counter.items(), key=lambda item: item[0])
    return [f"{key}{unit}" for key, _ in items] if len(items) == 1 else [f"{key}{unit} {count}" for key, count in items]
