"""Packed data sets: a data set decoded once into int16 shards, which epochs then map into memory.

A packed folder holds, for each split, ``SPLIT/00000.npy`` (int16 [samples], the utterances one after the other; NumPy
reads it as it is), ``SPLIT/00000.tsv`` (one line an utterance, the columns `COLUMNS`), and so on, and ``index.json``,
which is written last and makes the folder a packed data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradalign._errors import AudioError, DataError
from gradalign._files import atomic_path, locked, read_json, remove_leftovers, write_text
from gradalign.data.audio import find_audio, fit_length, read_audio, read_header
from gradalign.data.dataset import Example, SpeechDataset, utterance_draws, window
from gradalign.data.protocol import Utterance, expect_disjoint

INDEX = "index.json"
"""The file by which a packed data set is recognised."""

COLUMNS = ("utterance", "label", "attack", "speaker", "codec", "offset", "length", "checksum", "note")
"""Columns of a shard's list, separated by tabs.

``offset`` and ``length`` in samples; ``checksum`` is BLAKE2b of 8 bytes over the little-endian samples; ``note`` is
``-`` for an utterance stored bit for bit, ``rounded``, ``clipped`` (rounded, and cut to full scale), or ``bad: ...``
with the reason for one that could not be read, whose length is 0.
"""

_FORMAT, _VERSION, _PLAN = "gradalign packed speech", 1, "plan.json"
# What the note of an utterance that could not be read begins with.
_BAD = "bad: "
# How lists are encoded: file names need not be UTF-8.
_NAMES = "surrogateescape"
# Utterances of a shard: 130 MB of speech of 4 seconds each.
_SHARD_UTTERANCES = 1000
# The header of a one-dimensional .npy file, padded as NumPy does.
_HEADER_BYTES = 128
# Settings that only let more files through: what a stricter run has finished is the same under looser ones.
_LENIENT = ("`resample` (--resample)", "`round_samples` (--round)", "`skip_bad` (--skip-bad)")

_T = TypeVar("_T")


class PackResult(NamedTuple):
    """Of a packed data set: ``utterances`` and ``samples`` in all, how many utterances are ``rounded`` (``clipped``
    ones among them), the messages of the ``bad`` ones, and how many utterances are in shards that `pack` found finished
    and ``kept`` as they were, without reading their audio.
    """

    utterances: int
    samples: int
    rounded: int
    clipped: int
    bad: list[str]
    kept: int = 0


# ---- writing -------------------------------------------------------------------------------------------------------


def pack(
    splits: Mapping[str, Sequence[Utterance]],
    out: str | Path,
    *,
    audio_dir: str | Path | Mapping[str, str | Path] | None = None,
    sample_rate: int = 16000,
    resample: bool = False,
    round_samples: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
    shard_utterances: int = _SHARD_UTTERANCES,
    progress: bool = False,
) -> PackResult:
    """Write a packed data set, or go on where a killed run stopped; a finished one is left as it is.

    Killed at any point and run again, the folder holds the same bytes in the end: shards are written whole or not at
    all, and what is in which shard follows from the arguments alone. Finished shards are kept where they are as they
    were written, and their audio is not read again: where it has changed, remove the folder. To go on after a file that
    was refused, ``resample``, ``round_samples`` and ``skip_bad`` may be added; none that a folder was begun with may be
    left out.

    Args:
        splits: utterances by split, from `read_dataset` or `read_protocol`.
        out: the folder to write; must be new, empty, or begun by the same call, or a stricter one (see above).
        audio_dir: folder of the files of utterances without a path of their own, or one for each split.
        sample_rate: of the result, Hz.
        resample: convert files of another rate, and round the result to 16 bits.
        round_samples: round samples that 16 bits do not hold exactly, to the nearest (half a step, 2^-16, off at most;
            ties to even), and cut those beyond full scale. Otherwise such a file is an error: 16-bit sources come back
            bit for bit.
        skip_bad: keep files that cannot be read as bad utterances, which fail when indexed as they do in a
            `SpeechDataset`; otherwise the first is an error.
        workers: threads that decode; None is one for each core.
        shard_utterances: utterances of a shard.
        progress: show a bar on stderr.

    Raises:
        AudioError: naming the file that cannot be read.
        DataError: for a file that 16 bits do not hold, splits that share a file, no split, a split that is empty or no
            folder name, a folder with something else in it, one begun with other data or settings, or one that another
            process is packing into.
        OSError: a file cannot be written.
    """
    if sample_rate < 1 or shard_utterances < 1 or (workers is not None and workers < 1):
        raise ValueError(
            "`sample_rate`, `shard_utterances` and `workers` must be at least 1; found "
            f"{sample_rate}, {shard_utterances} and {workers}"
        )
    out = Path(out)
    folders = {split: Path(_folder_of(audio_dir, split)) for split in splits}
    _check_splits(splits, folders)
    lines = json.dumps(
        [[split, u.name, u.label, u.attack, u.speaker, u.codec] for split in splits for u in splits[split]]
    )

    def plan_of(lenient: tuple[bool, ...]) -> str:
        settings = json.dumps([sample_rate, *lenient, shard_utterances])
        return hashlib.blake2b(f"[{settings}, {lines}]".encode(), digest_size=16).hexdigest()

    lenient = (resample, round_samples, skip_bad)
    plan = plan_of(lenient)
    kept = sum(map(len, splits.values()))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, DataError(f"{out}: another process is packing into this folder")):
        begun = _begun(out, lenient, plan_of)
        remove_leftovers(out)
        if not (out / INDEX).exists():
            if begun != plan:
                # Before the first shard that stricter settings would refuse.
                write_text(out / _PLAN, json.dumps({"plan": plan}) + "\n")
            packer = _Packer(sample_rate, *lenient)
            workers = workers or len(os.sched_getaffinity(0))
            found, kept = _pack_shards(splits, folders, out, packer, shard_utterances, workers, progress)
            index = {"format": _FORMAT, "version": _VERSION, "sample_rate": sample_rate, "plan": plan, "splits": found}
            write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
        (out / _PLAN).unlink(missing_ok=True)
    return _result([_Shards(out, split) for split in splits], kept)


def _folder_of(audio_dir: str | Path | Mapping[str, str | Path] | None, split: str) -> str | Path:
    if isinstance(audio_dir, Mapping):
        return audio_dir[split]
    return "." if audio_dir is None else audio_dir


def _check_splits(splits: Mapping[str, Sequence[Utterance]], folders: Mapping[str, Path]) -> None:
    if not splits:
        raise DataError("expected at least one split to pack; found none")
    for split, utterances in splits.items():
        if not split or split.startswith(".") or "/" in split:
            raise DataError(f"expected split names that can be folders; found {split!r}")
        if not utterances:
            raise DataError(f"{split}: expected at least one utterance; found none")
        for u in utterances:
            fields = (u.name, u.attack, u.speaker, u.codec)
            if any("\t" in text or "\n" in text or "\r" in text for text in fields):
                raise DataError(f"{split}: expected names without tabs and line ends; found {fields!r}")
    expect_disjoint({split: (folders[split], utterances) for split, utterances in splits.items()})


def _begun(out: Path, lenient: tuple[bool, ...], plan_of: Callable[[tuple[bool, ...]], str]) -> str | None:
    """The plan that the folder was begun with, by these `_LENIENT` settings or stricter ones; None for an empty folder.

    DataError where it holds anything else.
    """
    for name in (INDEX, _PLAN):
        if (out / name).exists():
            plan = read_json(out / name, DataError).get("plan")
            candidates = (lenient, *product((False, True), repeat=len(_LENIENT)))
            begun = next((settings for settings in candidates if plan_of(settings) == plan), None)
            if begun is None:
                raise DataError(
                    f"{out / name}: expected the same data and settings as now; found others (pack into another "
                    "folder, or remove this one)"
                )
            looser = [text for text, then, now in zip(_LENIENT, begun, lenient, strict=True) if then and not now]
            if looser:
                raise DataError(
                    f"{out / name}: expected settings no looser than now; found {', '.join(looser)} (give the same, "
                    "pack into another folder, or remove this one)"
                )
            return str(plan)
    others = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    if others:
        raise DataError(f"{out}: expected a new or empty folder; found {others[0]!r} in it")
    return None


def _pack_shards(
    splits: Mapping[str, Sequence[Utterance]],
    folders: Mapping[str, Path],
    out: Path,
    packer: _Packer,
    shard_utterances: int,
    workers: int,
    progress: bool,
) -> tuple[dict[str, Any], int]:
    """The index's entry for each split, and the utterances of shards that were finished before."""
    from tqdm import tqdm

    found: dict[str, Any] = {}
    kept = 0
    pool = ThreadPoolExecutor(workers)
    bar = tqdm(total=sum(map(len, splits.values())), desc="pack", unit="file", disable=not progress, mininterval=0.5)
    try:
        for split, utterances in splits.items():
            folder = out / split
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
            shards: list[dict[str, Any]] = []
            for first in range(0, len(utterances), shard_utterances):
                part = utterances[first : first + shard_utterances]
                shard = folder / f"{len(shards):05d}.npy"
                samples = _finished(shard, part)
                if samples is None:
                    decoded = pool.map(packer.decode, part, [folders[split]] * len(part))
                    samples = _write_shard(shard, part, decoded, bar)
                else:
                    bar.update(len(part))
                    kept += len(part)
                checksum = _checksum(shard.with_suffix(".tsv").read_bytes())
                shards.append({"file": shard.name, "samples": samples, "list_checksum": checksum})
            found[split] = {"utterances": len(utterances), "shards": shards}
    finally:
        # A failure or Ctrl-C waits for the files in hand only.
        pool.shutdown(cancel_futures=True)
        bar.close()
    return found, kept


class _Packer(NamedTuple):
    sample_rate: int
    resample: bool
    round_samples: bool
    skip_bad: bool

    def decode(self, utterance: Utterance, folder: Path) -> tuple[np.ndarray, str]:
        """The samples int16 [T] of an utterance, and its note."""
        try:
            path = utterance.path or find_audio(folder, utterance.name)
            wave = read_audio(path, self.sample_rate, self.resample).numpy()
            converted = self.resample and read_header(path).sample_rate != self.sample_rate
        except AudioError as error:
            if not self.skip_bad:
                raise
            return np.zeros(0, np.int16), _BAD + " ".join(str(error).split())
        scaled = wave * np.float32(32768)
        whole = np.rint(scaled)
        clipped = whole.min() < -32768 or whole.max() > 32767
        if not clipped and np.array_equal(whole, scaled):
            return whole.astype(np.int16), "-"
        if not (self.round_samples or converted):
            raise DataError(
                f"{path}: expected samples that 16 bits hold exactly; found others "
                "(`round_samples`, --round, rounds them)"
            )
        return whole.clip(-32768, 32767).astype(np.int16), "clipped" if clipped else "rounded"


def _write_shard(
    path: Path, utterances: Sequence[Utterance], decoded: Iterator[tuple[np.ndarray, str]], bar: Any
) -> int:
    """Write a shard and then its list; returns its samples."""
    lines, offset = ["\t".join(COLUMNS)], 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(_HEADER_BYTES))
        for u, (samples, note) in zip(utterances, decoded, strict=True):
            content = samples.astype("<i2", copy=False).tobytes()
            file.write(content)
            row = (*_names(u), offset, len(samples), _checksum(content, 8), note)
            lines.append("\t".join(map(str, row)))
            offset += len(samples)
            bar.update()
        file.seek(0)
        file.write(_header(offset))
    write_text(path.with_suffix(".tsv"), "\n".join(lines) + "\n")
    return offset


def _names(u: Utterance) -> tuple[str, ...]:
    """What an utterance's line in a list begins with."""
    return u.name, u.label_name, u.attack, u.speaker, u.codec


def _finished(shard: Path, utterances: Sequence[Utterance]) -> int | None:
    """The samples of a shard that an earlier run finished with its list, which is written last.

    None for any other, and for one that has changed since.
    """
    offset = 0
    try:
        columns, *lines, end = shard.with_suffix(".tsv").read_text("utf-8", _NAMES).split("\n")
        with shard.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            for u, line in zip(utterances, lines, strict=True):
                *names, start, length, checksum, _ = line.split("\t")
                content = file.read(2 * int(length))
                if (*names, start, checksum) != (*_names(u), str(offset), _checksum(content, 8)):
                    return None
                offset += int(length)
            if (columns, end, header, file.read(1)) == ("\t".join(COLUMNS), "", _header(offset), b""):
                return offset
    except (FileNotFoundError, ValueError):
        pass
    return None


def _header(samples: int) -> bytes:
    """The header of a .npy file, version 1.0, of int16 [samples]; the same bytes for every version of NumPy."""
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': ({samples},), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _checksum(content: bytes, size: int = 16) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


# ---- reading -------------------------------------------------------------------------------------------------------


def is_packed(folder: str | Path) -> bool:
    """Whether a folder is a packed data set, or a packing that was begun and not finished."""
    return (Path(folder) / INDEX).is_file() or (Path(folder) / _PLAN).is_file()


def packed_splits(folder: str | Path) -> list[str]:
    """The splits of a packed data set. Raises DataError naming the file where it is none."""
    return list(_read_index(Path(folder))["splits"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        if (folder / _PLAN).exists():
            raise DataError(
                f"{folder}: expected a finished packed data set; found one begun: run `gradalign pack` again"
            )
        raise DataError(f"{path}: expected the index of a packed data set; found nothing there")
    index = read_json(path, DataError)
    if index.get("format") != _FORMAT or index.get("version") != _VERSION:
        raise DataError(
            f"{path}: expected {_FORMAT!r} of version {_VERSION}; found {index.get('format')!r} of version "
            f"{index.get('version')!r}"
        )
    _field(path, index, "sample_rate", int)
    _field(path, index, "splits", dict)
    return index


def _field(path: Path, table: Any, name: str, kind: type[_T]) -> _T:
    """A field of a table in an index; DataError where there is none, or one of another type."""
    value = table.get(name) if isinstance(table, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{path}: expected `{name}`, {kind.__name__}; found {value!r}")
    return value


class _Shards:
    """The lists of a split's shards, read and checked; the samples are mapped when they are first asked for."""

    def __init__(self, folder: Path, split: str) -> None:
        index = _read_index(folder)
        if split not in index["splits"]:
            raise DataError(f"{folder / INDEX}: expected a split {split!r}; found {', '.join(index['splits'])}")
        self.sample_rate: int = index["sample_rate"]
        self.utterances: list[Utterance] = []
        self.checksums: list[str] = []
        self.notes: list[str] = []
        self.paths: list[Path] = []
        self.sizes: list[int] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(_field(folder / INDEX, index["splits"][split], "shards", list)):
            path = folder / split / _field(folder / INDEX, shard, "file", str)
            samples = _field(folder / INDEX, shard, "samples", int)
            self.paths.append(path)
            self.sizes.append(samples)
            self._check_size(path, samples)
            list_checksum = _field(folder / INDEX, shard, "list_checksum", str)
            for columns in self._rows(path.with_suffix(".tsv"), list_checksum):
                name, label, attack, speaker, codec, offset, length, checksum, note = columns
                # One string for all utterances that share it: there are as many copies as processes.
                attack, speaker, codec, note = map(sys.intern, (attack, speaker, codec, note))
                self.utterances.append(Utterance(name, speaker, attack, int(label == "bonafide"), codec))
                self.checksums.append(checksum)
                self.notes.append(note)
                places.append((number, int(offset), int(length)))
        # [N, 3]: shard, offset and length in samples.
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self._mapped: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A process that is sent this maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    @staticmethod
    def _check_size(path: Path, samples: int) -> None:
        expected = _HEADER_BYTES + 2 * samples
        if not path.is_file():
            raise DataError(f"{path}: expected a shard of {samples} samples; found nothing there")
        found = path.stat().st_size
        if found != expected:
            raise DataError(f"{path}: expected {expected} bytes; found {found} (a truncated or damaged shard)")

    @staticmethod
    def _rows(path: Path, checksum: str) -> Iterator[list[str]]:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: expected the list of a shard; found nothing there") from None
        if _checksum(content) != checksum:
            raise DataError(f"{path}: expected the list of a shard as it was written; found another checksum")
        yield from (line.split("\t") for line in content.decode("utf-8", _NAMES).split("\n")[1:-1])

    def samples(self, row: int, start: int = 0, length: int | None = None) -> Tensor:
        """Samples int16 of an utterance, from ``start``, all or ``length``: a view of the mapped file."""
        number, offset, whole = self.places[row].tolist()
        begin = offset + start
        return self._map(number)[begin : begin + (whole - start if length is None else length)]

    def _map(self, number: int) -> Tensor:
        mapped = self._mapped.get(number)
        if mapped is None:
            path, size, header = self.paths[number], self.sizes[number], _HEADER_BYTES // 2
            # Touching a page beyond the end of a file would end the process.
            self._check_size(path, size)
            # Unlike Python's own map it keeps no file open: a large data set has more shards than a process has files.
            mapped = torch.from_file(str(path), shared=False, size=header + size, dtype=torch.int16)[header:]
            self._mapped[number] = mapped
        return mapped


class PackedDataset(SpeechDataset):
    """A split of a packed data set: a drop-in for the `SpeechDataset` it was packed from, with the same examples.

    Args:
        folder: written by `pack`.
        split: one of `packed_splits`.
        num_samples: length of every wave: longer audio is cropped, shorter is repeated.
        seed: of crops and augmentation; `set_epoch` changes both.
        random_crop: crop longer audio at a random place, not at its start.
        raw: examples hold the cropped samples as they are stored, int16 [length], for `DeviceLoader` to scale and
            repeat on its device: a quarter to a half of the bytes.
        skip_bad: as of a `SpeechDataset`, for utterances that could not be read when they were packed.

    Raises:
        DataError: naming the file: no packed data set, no such split, a shard or list that is missing, truncated or
            changed. (Damage within a shard is found by `verify`.)

    Indexing raises AudioError for an utterance that could not be read when it was packed, unless ``skip_bad``.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        num_samples: int = 64600,
        seed: int = 0,
        random_crop: bool = False,
        raw: bool = False,
        skip_bad: bool = False,
    ) -> None:
        folder = Path(folder)
        self._shards = _Shards(folder, split)
        super().__init__(
            self._shards.utterances,
            folder / split,
            sample_rate=self._shards.sample_rate,
            num_samples=num_samples,
            seed=seed,
            random_crop=random_crop,
            skip_bad=skip_bad,
        )
        self.raw = raw

    def _example(self, index: int) -> Example:
        note = self._shards.notes[index]
        if note.startswith(_BAD):
            raise AudioError(note.removeprefix(_BAD))
        utterance = self.utterances[index]
        augmentation_seed, crop = utterance_draws(self.seed, self.epoch, utterance.name)
        whole = int(self._shards.places[index, 2])
        start, length = window(whole, self.num_samples, crop if self.random_crop else 0)
        samples = self._shards.samples(index, start, length)
        if self.raw:
            # A view would send the whole shard along to another process.
            wave = samples.clone()
        else:
            wave = fit_length(samples.to(torch.float32).mul_(1 / 32768), self.num_samples)
        return Example(wave, utterance.label, index, length, augmentation_seed)


def verify(folder: str | Path, progress: bool = False) -> PackResult:
    """Check every sample of a packed data set against its checksum.

    Raises:
        DataError: naming the first file, and utterance, that is not as it was written.
    """
    from tqdm import tqdm

    folder = Path(folder)
    splits = [_Shards(folder, split) for split in packed_splits(folder)]
    total = sum(len(shards.utterances) for shards in splits)
    with tqdm(total=total, desc="verify", unit="file", disable=not progress, mininterval=0.5) as bar:
        for shards in splits:
            for path, size in zip(shards.paths, shards.sizes, strict=True):
                with path.open("rb") as file:
                    if file.read(_HEADER_BYTES) != _header(size):
                        raise DataError(f"{path}: expected the header of {size} samples; found another")
            for row, utterance in enumerate(shards.utterances):
                content = shards.samples(row).numpy()
                if _checksum(content.tobytes(), 8) != shards.checksums[row]:
                    raise DataError(
                        f"{shards.paths[shards.places[row, 0]]}: expected the samples of {utterance.name!r} as they "
                        "were written; found another checksum"
                    )
                bar.update()
    return _result(splits)


def _result(shards: Sequence[_Shards], kept: int = 0) -> PackResult:
    notes = [note for one in shards for note in one.notes]
    clipped = notes.count("clipped")
    bad = [note.removeprefix(_BAD) for note in notes if note.startswith(_BAD)]
    samples = sum(sum(one.sizes) for one in shards)
    return PackResult(len(notes), samples, notes.count("rounded") + clipped, clipped, bad, kept)
