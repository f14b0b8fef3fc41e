"""From any PyTorch DataLoader of waveforms to both views of a step, on the device, while the last one computes."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gradalign import _distributed
from gradalign._device import to_device
from gradalign._errors import AudioError
from gradalign.data.audio import fit_length
from gradalign.data.dataset import (
    Augment,
    Batch,
    SpeechDataset,
    augmented_view,
    collate,
    epoch_plan,
    utterance_draws,
    window,
)


class Views(NamedTuple):
    """What a step sees, on its device: ``clean`` and ``augmented`` [B, T]; ``label`` and ``seeds`` int64 [B].

    The views are float32, or of the loader's own floating type; ``seeds`` are those of the augmentation. Labels of any
    integer type, and bool, become int64; floating ones (soft labels) stay as they are.
    """

    clean: Tensor
    augmented: Tensor
    label: Tensor
    seeds: Tensor


def rank_share(rows: Sequence[int], rank: int, num_ranks: int) -> list[int]:
    """The part of a step's utterances that one of several ranks takes: all of them once, parts differ by 1 at most.

    A rank's part is empty where there are fewer utterances than ranks.

    >>> [rank_share([7, 8, 9], rank, 2) for rank in (0, 1)]
    [[7], [8, 9]]
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"`rank` must be in [0, {num_ranks}); found {rank}")
    return list(rows[rank * len(rows) // num_ranks : (rank + 1) * len(rows) // num_ranks])


class RankSampler(Sampler[list[int]]):
    """The batches of one rank, as the ``batch_sampler`` of a DataLoader.

    What a step sees in all depends on (seed, epoch) alone: neither on the number of ranks nor on how often a run was
    resumed. Every rank has the same number of batches.

    Args:
        size: utterances of the data set.
        batch_size: utterances of a step, over all ranks together.
        seed: of the order.
        shuffle: a new order each epoch, without the last, incomplete batch (`epoch_plan`); otherwise the data set's
            order, with it. An incomplete batch is shared out evenly too (`rank_share`): with fewer utterances than
            ranks, some ranks get an empty batch.
        rank, num_ranks: this process among all; None asks torch.distributed, which means 0 of 1 where it is not set up.

    >>> sampler = RankSampler(10, 4, rank=1, num_ranks=2, shuffle=False)
    >>> list(sampler)
    [[2, 3], [6, 7], [9]]
    >>> sampler.set_epoch(0, start=2)
    >>> list(sampler)
    [[9]]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        if size < 0 or batch_size < 1:
            raise ValueError(f"`size` must be at least 0, `batch_size` at least 1; found {size} and {batch_size}")
        if (rank is None) != (num_ranks is None):
            raise ValueError(f"expected both `rank` and `num_ranks` or neither; found {rank} and {num_ranks}")
        if rank is None or num_ranks is None:
            num_ranks = _distributed.num_ranks()
            rank = torch.distributed.get_rank() if num_ranks > 1 else 0
        rank_share([], rank, num_ranks)
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that comes next, and the first of its batches (where a killed run stopped).

        Under a `DeviceLoader`, its ``set_epoch`` does this too. Raises ValueError for a ``start`` below 0.
        """
        if start < 0:
            raise ValueError(f"`start` must be at least 0; found {start}")
        self.epoch, self.start = epoch, start

    def _plan(self) -> list[list[int]]:
        if self.size == 0:
            return []
        if self.shuffle:
            return epoch_plan(self.size, self.batch_size, self.seed, self.epoch)
        steps = range(0, self.size, self.batch_size)
        return [list(range(i, min(i + self.batch_size, self.size))) for i in steps]

    def __iter__(self) -> Iterator[list[int]]:
        yield from (rank_share(rows, self.rank, self.num_ranks) for rows in self._plan()[self.start :])

    def __len__(self) -> int:
        return max(0, len(self._plan()) - self.start)


class DeviceLoader:
    """Both views of every batch of a loader, on a device.

    On a CUDA device the copy and the augmentation of the next batch run on a stream of their own while the consumer
    computes on this one; the host waits for neither. On other devices they run when a batch is asked for; there the
    augmentation may be made by the loader's worker processes instead (`collate` with ``augment``).

    Each utterance's augmentation follows from (seed, epoch, utterance) alone: a resumed run, another number of workers
    or of ranks augments alike. Call ``set_epoch`` before each epoch, or all epochs augment alike; it reaches every data
    set within the loader's (Subset, ConcatDataset and the like).

    Args:
        loader: a DataLoader, or anything iterable, of `Batch` (a `SpeechDataset` with `collate`), or of tuples (wave,
            label, ids) or (wave, label, ids, lengths): ``wave`` [B, S] floating point or int16 (full scale 32768),
            ``label`` [B], ``ids`` one name or number per utterance, the same in every epoch, ``lengths`` int64 [B] the
            samples of each before its padding.
        augment: called as ``augment(wave, lengths=..., seeds=...)``, such as `RawBoost` (a function of wave and seeds
            alone: ``lambda wave, lengths, seeds: room(wave, seeds)``); shorter utterances are augmented once and then
            repeated. None: the augmented view is the batch's own, or the clean one.
        device: of the views; None is a GPU where there is one.
        num_samples: T of the views: longer utterances are cropped, shorter repeated, on the device. None: S, for tuples
            of floating point without lengths; for all else that of the `SpeechDataset` or `PackedDataset` within the
            loader (several must agree). The attribute of any other data set may mean something else: it is not read.
        seed: of crops and augmentation, for tuples (a `Batch` brings its own).
        random_crop: crop tuples' longer utterances at a random place, not at their start.
        on_bad: called with the ``bad`` of each `Batch` that has any: (row, message) of utterances that could not be
            read. Such are the batches of `load_batches`, and those of `collate` over data sets with ``skip_bad``; other
            data sets raise AudioError themselves. None: the first is an AudioError.

    Raises:
        ValueError: ``num_samples`` below 1, or of data sets that disagree; ``on_bad`` where it could never be called.

    The views of a batch may be used on the stream that is current when it is asked for; whoever uses them on another
    has to call their ``record_stream``. A batch without any readable utterance comes as B = 0.

    >>> import gradalign as ga
    >>> loader = [(torch.ones(2, 400), torch.tensor([0, 1]), ["a", "b"])]
    >>> views = DeviceLoader(loader, augment=ga.RawBoost(algo=4), device="cpu", num_samples=1000)
    >>> for clean, augmented, label, seeds in views:
    ...     print(clean.shape, augmented.shape, label.tolist(), seeds.dtype)
    torch.Size([2, 1000]) torch.Size([2, 1000]) [0, 1] torch.int64
    """

    def __init__(
        self,
        loader: Iterable[Any],
        augment: Augment | None = None,
        *,
        device: str | torch.device | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        random_crop: bool = False,
        on_bad: Callable[[list[tuple[int, str]]], None] | None = None,
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1; found {num_samples}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loader, self.augment, self.device = loader, augment, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if on_bad is not None:
            _expect_bad(loader)
        self._given = num_samples
        self.num_samples = _num_samples(loader) if num_samples is None else num_samples
        self.seed, self.random_crop, self.on_bad = seed, random_crop, on_bad
        self.epoch = 0
        self._side: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that comes next, here and in the loader, its data sets and samplers, and its first batch.

        ``start`` (where a killed run stopped) is handed to the sampler of the loader's batches, in place of any that it
        was given before.

        Raises:
            ValueError: a ``start`` that the sampler cannot take; it must have ``set_epoch(epoch, start)``, as
                `RankSampler` has.
        """
        rows: Any = getattr(self.loader, "sampler", None)
        batches: Any = getattr(self.loader, "batch_sampler", None)
        # A loader that does not batch by itself draws whole batches from its sampler.
        batches = rows if batches is None else batches
        takes_start = hasattr(batches, "set_epoch") and "start" in inspect.signature(batches.set_epoch).parameters
        if start and not takes_start:
            found = "no sampler" if batches is None else type(batches).__name__
            raise ValueError(
                "`start` must be 0 unless the sampler of the loader's batches has `set_epoch(epoch, start)`, as "
                f"`RankSampler` has; found {start} with {found}"
            )
        if hasattr(self.loader, "set_epoch"):
            # It may tell the sampler too, and would undo the start after that.
            self.loader.set_epoch(epoch)
        if takes_start:
            batches.set_epoch(epoch, start=start)
        parts = [*_datasets(self.loader), batches, rows, getattr(batches, "sampler", None)]
        for part in {id(part): part for part in parts}.values():
            if hasattr(part, "set_epoch") and not (takes_start and part is batches):
                part.set_epoch(epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Views]:
        if self.device.type == "cuda":
            yield from self._ahead()
            return
        for item in self.loader:
            batch, start = self._batch(item)
            self._report(batch.bad)
            yield self._views(batch, start)

    def _ahead(self) -> Iterator[Views]:
        """Batches whose copy and augmentation were put into the side stream one step before they are asked for.

        The allocator gives memory of the side stream out again on that stream without regard to the consumer's, so the
        side stream waits, before each batch, for all that the consumer has queued: whatever it has let go of by then is
        done with. That costs no overlap, since the batch is prepared a whole step early, and unlike record_stream it
        keeps three batches in memory (the consumer's last, its next, this one) however far the host runs ahead.
        """
        if self._side is None:
            # One for all epochs: the allocator keeps a pool for each stream.
            self._side = torch.cuda.Stream(self.device)
        side = self._side
        ready: tuple[Views, torch.cuda.Event, list[tuple[int, str]]] | None = None
        for item in self.loader:
            batch, start = self._batch(item)
            for field in batch:
                if isinstance(field, Tensor) and field.is_cuda:
                    # The loader's own memory: it may be given out again only when this stream has read it, too.
                    field.record_stream(side)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                views = self._views(batch, start)
                done = side.record_event()
            if ready is not None:
                yield self._hand_over(*ready)
            ready = views, done, batch.bad
            # Otherwise these names would hold a batch while its memory could serve the next one.
            del views, batch, start, item
        if ready is not None:
            yield self._hand_over(*ready)

    def _hand_over(self, views: Views, done: torch.cuda.Event, bad: list[tuple[int, str]]) -> Views:
        self._report(bad)
        torch.cuda.current_stream(self.device).wait_event(done)
        return views

    def _report(self, bad: list[tuple[int, str]]) -> None:
        if not bad:
            return
        if self.on_bad is None:
            raise AudioError(bad[0][1])
        self.on_bad(bad)

    # ---- one batch ----

    def _batch(self, item: Any) -> tuple[Batch, Tensor | None]:
        """An item of the loader as a batch, and where in ``wave.flatten()`` each utterance starts; None: it is ready.

        ``length`` of the batch is then that of each utterance's window.
        """
        if isinstance(item, Batch):
            if item.wave.dtype == torch.int16:
                self._expect_num_samples()
                return item, item.length.cumsum(0) - item.length
            if self.num_samples is None or item.wave.shape[1] == self.num_samples:
                return item, None
            if len(item.label):
                raise ValueError(f"a batch must be [B, {self.num_samples}]; found {list(item.wave.shape)}")
            nothing = item.wave.new_zeros(0, self.num_samples)
            return item._replace(wave=nothing, augmented=None), None
        wave, label, ids, lengths = _checked(item)
        drawn = [utterance_draws(self.seed, self.epoch, str(i)) for i in ids]
        seeds = torch.tensor([seed for seed, _ in drawn], dtype=torch.int64)
        if wave.dtype == torch.int16 or lengths is not None:
            num_samples = self._expect_num_samples()
        else:
            num_samples = wave.shape[1] if self._given is None else self._given
        whole = torch.full_like(seeds, wave.shape[1]) if lengths is None else lengths
        windows = [
            window(n, num_samples, crop if self.random_crop else 0)
            for n, (_, crop) in zip(whole.tolist(), drawn, strict=True)
        ]
        begin, length = torch.tensor(windows, dtype=torch.int64).reshape(-1, 2).T.contiguous().unbind(0)
        batch = Batch(wave, label, torch.arange(len(ids)), length, seeds, [])
        if wave.dtype != torch.int16 and wave.shape[1] == num_samples and bool((length == num_samples).all()):
            return batch, None
        return batch, torch.arange(len(ids)) * wave.shape[1] + begin

    def _expect_num_samples(self) -> int:
        if self.num_samples is None:
            raise ValueError("`num_samples` must be given for int16 batches and for batches with lengths; found None")
        return self.num_samples

    def _views(self, batch: Batch, start: Tensor | None) -> Views:
        label, seeds, clean = (to_device(field, self.device) for field in (batch.label, batch.seed, batch.wave))
        label = label if label.is_floating_point() else label.to(torch.int64)
        if start is not None:
            assert self.num_samples is not None
            start, length = to_device(start, self.device), to_device(batch.length, self.device)
            clean = take_windows(clean.flatten(), start, length, self.num_samples)
        if batch.augmented is not None:
            augmented = to_device(batch.augmented, self.device)
        elif self.augment is None or not len(label):
            augmented = clean
        else:
            augmented = augmented_view(self.augment, clean, batch.length, seeds)
        return Views(clean, augmented, label, seeds)


def take_windows(samples: Tensor, start: Tensor, length: Tensor, num_samples: int) -> Tensor:
    """Cut utterances out of a row of samples, and repeat each to a fixed length, where the samples are.

    Args:
        samples: [N], floating point, or int16 with full scale 32768.
        start, length: of each utterance in ``samples``, int64 [B]; length at least 1.
        num_samples: T of the result; each length at most this.

    Returns:
        [B, T]; float32 of int16 samples, otherwise of their dtype. Equal to `fit_length` of each.

    >>> take_windows(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0]), torch.tensor([2, 1]), 3)
    tensor([[2., 3., 2.],
            [1., 1., 1.]])
    """
    if samples.device.type == "cpu":
        places = zip(start.tolist(), length.tolist(), strict=True)
        rows = [fit_length(samples[s : s + n], num_samples) for s, n in places]
        taken = torch.stack(rows) if rows else samples.new_zeros(0, num_samples)
    else:
        taken = gather_windows(samples, start, length, num_samples)
    return taken.to(torch.float32).mul_(1 / 32768) if samples.dtype == torch.int16 else taken


def gather_windows(samples: Tensor, start: Tensor, length: Tensor, num_samples: int) -> Tensor:
    """`take_windows` without its scaling, by one gather, without waiting for the device.

    >>> gather_windows(torch.tensor([1, 2, 3]), torch.tensor([1, 0]), torch.tensor([2, 1]), 3)
    tensor([[2, 3, 2],
            [1, 1, 1]])
    """
    # Half the memory of int64 indices, where they do.
    kind = torch.int32 if samples.numel() < 2**31 else torch.int64
    index = torch.arange(num_samples, device=samples.device, dtype=kind) % length.to(kind)[:, None]
    index += start.to(kind)[:, None]
    return samples.index_select(0, index.flatten()).view(len(length), num_samples)


def _checked(item: Any) -> tuple[Tensor, Tensor, list[Any], Tensor | None]:
    """Wave, label, ids and lengths of a loader's tuple; TypeError or ValueError naming expected and found."""
    if not isinstance(item, (tuple, list)) or len(item) not in (3, 4):
        found = f"{len(item)} items" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(
            "a batch must be a gradalign.data.Batch (made by collate_fn=gradalign.data.collate), (wave, label, ids) or "
            f"(wave, label, ids, lengths), the ids so that each utterance has its own augmentation; found {found}"
        )
    wave, label, ids = item[:3]
    if not isinstance(wave, Tensor) or wave.dim() != 2 or not (wave.is_floating_point() or wave.dtype == torch.int16):
        found = f"{wave.dtype} {list(wave.shape)}" if isinstance(wave, Tensor) else type(wave).__name__
        raise TypeError(f"a batch's wave must be [B, S], floating point or int16; found {found}")
    size = len(wave)
    try:
        names = list(ids.tolist() if isinstance(ids, Tensor) else ids)
    except TypeError:
        raise TypeError(f"a batch's ids must be {size} names or numbers; found {ids!r}") from None
    label = _numbers("label", label, size)
    if tuple(label.shape) != (size,) or len(names) != size:
        raise ValueError(f"a batch of {size} must have {size} labels and ids; found {list(label.shape)}, {len(names)}")
    if len(item) == 3:
        if size and not wave.shape[1]:
            raise ValueError("a batch's utterances must have at least one sample; found none")
        return wave, label, names, None
    lengths = _numbers("lengths", item[3], size)
    # PyTorch makes an empty list floating point, in a collate function too.
    if tuple(lengths.shape) != (size,) or (size and lengths.is_floating_point()):
        raise ValueError(f"lengths must be integers [{size}]; found {lengths.dtype} {list(lengths.shape)}")
    if size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= wave.shape[1]:
        found = f"[{int(lengths.min())}, {int(lengths.max())}]"
        raise ValueError(f"lengths must lie in [1, S] = [1, {wave.shape[1]}]; found {found}")
    return wave, label, names, lengths.to("cpu", torch.int64)


def _numbers(name: str, values: Any, size: int) -> Tensor:
    """A batch's label or lengths as a tensor, of integers where they are an empty list; TypeError for no numbers."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a batch's {name} must be {size} numbers; found {values!r}") from None
    return numbers if isinstance(values, Tensor) or numbers.numel() else numbers.to(torch.int64)


def _datasets(loader: Any) -> list[Any]:
    """A loader's data sets and those they wrap, outermost first."""
    found: dict[int, Any] = {}
    waiting = deque(_wrapped(loader))
    while waiting:
        part = waiting.popleft()
        if id(part) not in found:
            found[id(part)] = part
            waiting.extend(_wrapped(part))
    return list(found.values())


def _wrapped(part: Any) -> list[Any]:
    """What a loader or data set wraps: one ``dataset`` (Subset), or ``datasets`` (ConcatDataset, StackDataset)."""
    several = getattr(part, "datasets", ())
    several = tuple(several.values()) if isinstance(several, Mapping) else several
    # Anything but a list or a tuple might be a generator, which can be gone through once.
    inner = [getattr(part, "dataset", None), *(several if isinstance(several, (list, tuple)) else ())]
    return [one for one in inner if one is not None]


def _num_samples(loader: Any) -> int | None:
    found = list(dict.fromkeys(d.num_samples for d in _datasets(loader) if isinstance(d, SpeechDataset)))
    if len(found) > 1:
        raise ValueError(f"the loader's data sets must have the same `num_samples`; found {', '.join(map(str, found))}")
    return found[0] if found else None


def _expect_bad(loader: Any) -> None:
    """ValueError for a loader whose batches never have ``bad``: of `collate`, over data sets that raise instead."""
    collate_fn = getattr(loader, "collate_fn", None)
    function = collate_fn.func if isinstance(collate_fn, functools.partial) else collate_fn
    if function is collate and not any(getattr(d, "skip_bad", False) for d in _datasets(loader)):
        raise ValueError(
            "`on_bad` needs a loader over a data set with `skip_bad=True`, or `load_batches`, to be ever called; found "
            "`collate` over data sets that raise AudioError themselves"
        )
