"""Data sets of utterances: what a training step reads, as a pure function of (seed, epoch, utterance)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradalign._device import to_device
from gradalign._errors import AudioError
from gradalign.data.audio import find_audio, fit_length, read_audio
from gradalign.data.protocol import Utterance


class Example(NamedTuple):
    """One utterance, ready for a batch.

    ``wave`` float32 [T]; ``label`` 1 bona fide, 0 spoof; ``row`` its index in the data set; ``length`` the samples of
    ``wave`` before it repeats itself, at most T; ``seed`` of its augmentation, in [0, 2^63). Of a raw data set
    (`PackedDataset`), ``wave`` is int16 [length]: not yet scaled and repeated. ``bad`` says why an utterance could not
    be read, which leaves nothing but its ``row``; it is empty for all others.
    """

    wave: Tensor
    label: int
    row: int
    length: int
    seed: int
    bad: str = ""


class Batch(NamedTuple):
    """Several utterances: ``wave`` float32 [B, T]; ``label``, ``row``, ``length`` and ``seed`` int64 [B].

    ``bad`` holds (row, message) of the utterances that could not be read, which are in none of the other fields. A row
    counts within its own data set, in a `torch.utils.data.ConcatDataset` too.
    ``augmented`` is the second view, like ``wave``, where it was made together with the batch (`collate`). Of a raw
    data set, ``wave`` is int16 [sum of length]: the utterances one after the other, for `DeviceLoader` to scale and
    repeat.
    """

    wave: Tensor
    label: Tensor
    row: Tensor
    length: Tensor
    seed: Tensor
    bad: list[tuple[int, str]]
    augmented: Tensor | None = None


def utterance_draws(seed: int, epoch: int, name: str) -> tuple[int, int]:
    """Two random numbers in [0, 2^63) for an utterance in an epoch: its augmentation's seed and its crop.

    They depend on nothing else: not on order, batch, workers or on how often a run was killed and resumed.

    >>> utterance_draws(0, 1, "a") == utterance_draws(0, 1, "a") != utterance_draws(0, 2, "a")
    True
    """
    # A file's name need not be UTF-8.
    text = f"{seed} {epoch} {name}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") >> 1, int.from_bytes(digest[8:], "little") >> 1


def window(length: int, num_samples: int, crop: int) -> tuple[int, int]:
    """Where an utterance of ``length`` samples is cropped to ``num_samples``: (first sample, samples).

    ``crop`` is the random number of `utterance_draws`, 0 for a crop at the start. A shorter utterance is taken whole.

    >>> window(10, 4, crop=9), window(3, 4, crop=9)
    ((2, 4), (0, 3))
    """
    return (crop % (length - num_samples + 1), num_samples) if length > num_samples else (0, length)


class SpeechDataset(Dataset[Example]):
    """Utterances of a protocol with their audio files.

    Args:
        utterances: from `read_protocol` or `read_dataset`.
        audio_dir: folder of the files of utterances without a path of their own, named by utterance; see `find_audio`.
        sample_rate: Hz.
        num_samples: length of every wave: longer audio is cropped, shorter is repeated.
        seed: of crops and augmentation; `set_epoch` changes both.
        random_crop: crop longer audio at a random place, not at its start.
        resample: convert files of another sample rate.
        cache_mb: keep up to so many megabytes of decoded audio in memory.
        skip_bad: hand out an utterance that cannot be read as an `Example` that says so (``bad``), for `collate` to
            list in ``Batch.bad``.

    Indexing raises AudioError naming the file when an utterance cannot be read, unless ``skip_bad``.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        audio_dir: str | Path,
        *,
        sample_rate: int = 16000,
        num_samples: int = 64600,
        seed: int = 0,
        random_crop: bool = False,
        resample: bool = False,
        cache_mb: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.utterances = list(utterances)
        self.audio_dir = Path(audio_dir)
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.seed = seed
        self.random_crop = random_crop
        self.resample = resample
        self.skip_bad = skip_bad
        # Shared with the worker processes: those that outlive an epoch (persistent_workers) see the next one too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cache: dict[int, np.ndarray] = {}
        self._cache_bytes_left = cache_mb * 2**20

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The epoch of a copy (copy.deepcopy, pickle) has memory of its own, which its workers must share again.
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def epoch(self) -> int:
        """The epoch of `set_epoch`, at first 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops and augmentation seeds come next."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Example:
        try:
            return self._example(index)
        except AudioError as error:
            if not self.skip_bad:
                raise
            return _unread(index, error)

    def _example(self, index: int) -> Example:
        utterance = self.utterances[index]
        augmentation_seed, crop = utterance_draws(self.seed, self.epoch, utterance.name)
        wave = self._read(index)
        start, length = window(len(wave), self.num_samples, crop if self.random_crop else 0)
        return Example(fit_length(wave, self.num_samples, start), utterance.label, index, length, augmentation_seed)

    def _read(self, index: int) -> Tensor:
        kept = self._cache.get(index)
        if kept is not None:
            # A copy: an example may be changed in place.
            wave = torch.from_numpy(kept.astype(np.float32))
            return wave.mul_(1 / 32768) if kept.dtype == np.int16 else wave
        utterance = self.utterances[index]
        path = utterance.path or find_audio(self.audio_dir, utterance.name)
        wave = read_audio(path, self.sample_rate, self.resample)
        if self._cache_bytes_left > 0:
            keep = wave.numpy()
            scaled = keep * np.float32(32768)
            fits = scaled.min() >= -32768 and scaled.max() <= 32767
            # 16-bit files come back exactly from 16 bits; anything else is kept as it is: the cache changes nothing.
            if fits and np.array_equal(whole := scaled.astype(np.int16), scaled):
                keep = whole
            if keep.nbytes <= self._cache_bytes_left:
                self._cache[index] = keep.copy()
                self._cache_bytes_left -= keep.nbytes
        return wave


def _unread(row: int, error: AudioError) -> Example:
    return Example(torch.zeros(0), 0, row, 0, 0, str(error) or "cannot be read")


Augment = Callable[..., Tensor]
"""An augmentation: (wave [B, T], lengths=int64 [B] or None for T, seeds=int64 [B]) -> [B, T], such as `RawBoost`."""


def augmented_view(augment: Augment, wave: Tensor, length: Tensor, seed: Tensor) -> Tensor:
    """Augment a batch in which shorter utterances repeat themselves: each is augmented once, then repeated.

    Args:
        augment: `RawBoost`, or what is called like it.
        wave: [B, T].
        length: samples of each utterance before it repeats itself, int64 [B]; best on the host, where it tells without
            waiting that nothing is to be repeated.
        seed: int64 [B].

    Returns:
        [B, T], of wave's dtype and device.

    >>> twice = lambda wave, lengths, seeds: 2 * wave
    >>> augmented_view(twice, torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([2]), torch.tensor([0]))
    tensor([[2., 4., 2.]])
    """
    seed = to_device(seed, wave.device)
    if length.device.type == "cpu" and bool((length == wave.shape[1]).all()):
        return augment(wave, lengths=None, seeds=seed)
    length = to_device(length, wave.device)
    boosted = augment(wave, lengths=length, seeds=seed)
    return boosted.gather(1, torch.arange(wave.shape[1], device=wave.device) % length[:, None])


def collate(examples: Sequence[Example], augment: Augment | None = None) -> Batch:
    """A batch of examples, for a DataLoader over a `SpeechDataset`: ``DataLoader(data, 24, collate_fn=collate)``.

    Args:
        examples: of one data set, or of several with the same ``num_samples``; those that could not be read are listed
            in ``bad``. None at all make an empty batch.
        augment: makes the second view here: in the worker process, on the CPU
            (``collate_fn=functools.partial(collate, augment=boost)``).

    Raises:
        TypeError: for anything but `Example`.
        ValueError: for ``augment`` with the examples of a raw data set, or for waves of several lengths or kinds.

    >>> example = Example(torch.zeros(4), 1, 0, 4, 7)
    >>> collate([example, example]).wave.shape
    torch.Size([2, 4])
    """
    if others := {type(e).__name__ for e in examples if not isinstance(e, Example)}:
        raise TypeError(f"`examples` must be those of a gradalign data set (Example); found {', '.join(others)}")
    bad = [(e.row, e.bad) for e in examples if e.bad]
    examples = [e for e in examples if not e.bad]
    raw = bool(examples) and examples[0].wave.dtype == torch.int16
    kinds = {(e.wave.dtype, "length" if e.wave.dtype == torch.int16 else len(e.wave)): None for e in examples}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} [{length}]" for kind, length in kinds)
        raise ValueError(
            f"`examples` must be of data sets with the same `num_samples`, all `raw` or none; found waves {found}"
        )
    if not examples:
        wave = torch.zeros(0, 0)
    else:
        waves = [e.wave for e in examples]
        wave = torch.cat(waves) if raw else torch.stack(waves)
    numbers = torch.tensor([[e.label, e.row, e.length, e.seed] for e in examples], dtype=torch.int64)
    # Each field contiguous: strided memory cannot be copied to a device without waiting.
    label, row, length, seed = numbers.reshape(-1, 4).T.contiguous().unbind(0)
    augmented = None
    if augment is not None:
        if raw:
            raise ValueError("`augment` needs float32 examples; found those of a raw data set (leave out `raw`)")
        augmented = augmented_view(augment, wave, length, seed) if examples else wave
    return Batch(wave, label, row, length, seed, bad, augmented)


class _Batches(Dataset[Batch]):
    """A data set indexed by lists of rows.

    A file that cannot be read is data here, not an exception: a worker process would hand that over as a traceback in a
    string.
    """

    def __init__(self, dataset: SpeechDataset, augment: Augment | None) -> None:
        self.dataset = dataset
        self.augment = augment

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        examples: list[Example] = []
        for i in rows:
            try:
                examples.append(self.dataset[i])
            except AudioError as error:
                examples.append(_unread(i, error))
        batch = collate(examples, self.augment)
        if not len(batch.label):
            wave = torch.zeros(0, self.dataset.num_samples)
            batch = batch._replace(wave=wave, augmented=None if self.augment is None else wave)
        return batch


def load_batches(
    dataset: SpeechDataset,
    plan: Iterable[Sequence[int]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """The batches of a plan (lists of rows), in its order, read by ``num_workers`` processes (0: by this one).

    ``augment`` makes the second view there too. The global random state is not touched.
    """
    loader: DataLoader[Batch] = DataLoader(
        _Batches(dataset, augment),
        sampler=[list(rows) for rows in plan],
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A loader draws a base seed for its workers; from the global state it would change with every resume.
        generator=torch.Generator(),
    )
    return iter(loader)


def epoch_plan(size: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The shuffled batches of one training epoch: a pure function of its arguments.

    The last, incomplete batch is left out, since batch statistics of a few utterances are no good, unless it is the
    only one.

    >>> [len(batch) for batch in epoch_plan(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    generator = torch.Generator().manual_seed(utterance_draws(seed, epoch, "order of the epoch")[0])
    order = torch.randperm(size, generator=generator).tolist()
    return [order[i : i + batch_size] for i in range(0, max(1, size - batch_size + 1), batch_size)]
