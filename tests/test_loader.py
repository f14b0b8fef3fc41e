import contextlib
import copy
import functools
import itertools
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

import gradalign as ga
from gradalign import ops
from gradalign.data import (
    AudioError,
    Batch,
    DeviceLoader,
    PackedDataset,
    RankSampler,
    SpeechDataset,
    Utterance,
    collate,
    epoch_plan,
    fit_length,
    load_batches,
    pack,
    utterance_draws,
)
from gradalign.data import loader as loader_module
from gradalign.data.dataset import augmented_view
from gradalign.data.loader import gather_windows, rank_share, take_windows

SIZE, SAMPLES = 12, 800
LENGTHS = [300, 1, 800, 1500, 801, 1200, 799, 650, 2000, 800, 2, 900]
NAMES = [f"u{i}" for i in range(SIZE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("audio")
    for i, length in enumerate(LENGTHS):
        wave = 0.1 * np.random.default_rng(i).standard_normal(length)
        soundfile.write(root / f"u{i}.wav", wave, 16000, subtype="PCM_16")
    names = [Utterance(name, "s", "-" if i % 2 else "A01", i % 2) for i, name in enumerate(NAMES)]
    pack({"train": names}, root / "packed", audio_dir=root, shard_utterances=5)
    return root


def files(folder, **options):
    names = [Utterance(name, "s", "-" if i % 2 else "A01", i % 2) for i, name in enumerate(NAMES)]
    return SpeechDataset(names, folder, num_samples=SAMPLES, **{"seed": 3, "random_crop": True, **options})


def packed(folder, **options):
    options = {"seed": 3, "random_crop": True, **options}
    return PackedDataset(folder / "packed", "train", num_samples=SAMPLES, **options)


@pytest.fixture(scope="module")
def boost():
    return ga.RawBoost(algo=4)


@pytest.fixture(scope="module")
def expected(folder, boost):
    """By epoch and utterance: clean, augmented, label and seed, one utterance at a time."""

    def make(epoch):
        data = files(folder)
        data.set_epoch(epoch)
        found = {}
        for i in range(SIZE):
            e = data[i]
            view = augmented_view(boost, e.wave[None], torch.tensor([e.length]), torch.tensor([e.seed]))[0]
            found[e.seed] = (e.wave, view, e.label)
        return found

    return [make(epoch) for epoch in range(3)]


def assert_expected(batches, expected, count=SIZE):
    """Every utterance of the epoch once, each as it is on its own."""
    seen = []
    for clean, augmented, label, seeds in batches:
        assert len(clean) == len(augmented) == len(label) == len(seeds)
        for c, a, y, seed in zip(clean, augmented, label.tolist(), seeds.tolist(), strict=True):
            wave, view, known = expected[seed]
            assert torch.equal(c, wave)
            assert torch.equal(a, view)
            assert y == known
            seen.append(seed)
    assert len(seen) == len(set(seen)) == count


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collate_stacks_examples(folder):
    data = files(folder)
    batch = collate([data[3], data[0]])
    assert batch.wave.shape == (2, SAMPLES)
    assert torch.equal(batch.wave[1], data[0].wave)
    assert (batch.label.tolist(), batch.row.tolist(), batch.length.tolist()) == ([1, 0], [3, 0], [SAMPLES, 300])
    assert batch.seed.tolist() == [data[3].seed, data[0].seed]
    assert all(field.is_contiguous() and field.dtype == torch.int64 for field in batch[1:5])
    assert batch.augmented is None


def test_collate_joins_raw_examples(folder):
    data, whole = packed(folder, raw=True), packed(folder)
    batch = collate([data[i] for i in (0, 1, 3)])
    assert batch.wave.dtype == torch.int16
    assert batch.length.tolist() == [300, 1, SAMPLES]
    assert torch.equal(batch.wave[301:] / 32768, whole[3].wave)
    with pytest.raises(ValueError, match="`augment` needs float32 examples"):
        collate([data[0]], augment=ga.RawBoost())


def test_collate_refuses_examples_of_data_sets_that_differ(folder):
    short = SpeechDataset(files(folder).utterances, folder, num_samples=500)
    with pytest.raises(ValueError, match=r"same `num_samples`.* torch.float32 \[800\], torch.float32 \[500\]"):
        collate([files(folder)[0], short[0]])
    with pytest.raises(ValueError, match=r"all `raw` or none; found waves torch.int16 \[length\], torch.float32"):
        collate([packed(folder, raw=True)[0], files(folder)[0]])


def test_collate_of_nothing():
    batch = collate([])
    assert [len(field) for field in batch[:5]] == [0] * 5


def test_worker_processes_that_outlive_an_epoch_see_the_next(folder):
    loader = DataLoader(
        files(folder), batch_size=5, collate_fn=collate, num_workers=2, persistent_workers=True, prefetch_factor=1
    )
    for epoch in (0, 2):
        loader.dataset.set_epoch(epoch)
        seeds = torch.cat([batch.seed for batch in loader]).tolist()
        assert seeds == [utterance_draws(3, epoch, name)[0] for name in NAMES]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("make", [files, packed])
def test_the_epoch_of_a_copied_data_set_reaches_worker_processes(folder, make, again):
    loader = DataLoader(again(make(folder)), 5, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 2):
        loader.dataset.set_epoch(epoch)
        seeds = torch.cat([batch.seed for batch in loader]).tolist()
        assert seeds == [utterance_draws(3, epoch, name)[0] for name in NAMES]


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "batch_size"), [(23, 8), (8, 8), (5, 8), (1, 3), (0, 4)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_share_each_step_evenly_and_in_order(size, batch_size, num_ranks, shuffle):
    ranks = [
        RankSampler(size, batch_size, seed=4, shuffle=shuffle, rank=r, num_ranks=num_ranks) for r in range(num_ranks)
    ]
    for sampler in ranks:
        sampler.set_epoch(2)
    parts = [list(sampler) for sampler in ranks]
    assert [len(p) for p in parts] == [len(s) for s in ranks] == [len(parts[0])] * num_ranks
    steps = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    for step in zip(*parts, strict=True):
        assert max(map(len, step)) - min(map(len, step)) <= 1
    if shuffle:
        assert steps == (epoch_plan(size, batch_size, 4, 2) if size else [])
    else:
        assert list(itertools.chain(*steps)) == list(range(size))


def test_a_resumed_epoch_goes_on_where_it_stopped():
    sampler = RankSampler(40, 8, seed=1, rank=1, num_ranks=2)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start=2)
    assert list(sampler) == whole[2:]
    assert len(sampler) == 3
    with pytest.raises(ValueError, match="`start` must be at least 0; found -1"):
        sampler.set_epoch(3, start=-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankSampler(4, 2, rank=2, num_ranks=2), r"`rank` must be in \[0, 2\); found 2"),
        (lambda: RankSampler(4, 2, rank=1), r"expected both `rank` and `num_ranks` or neither; found 1 and None"),
        (lambda: RankSampler(4, 0), r"`batch_size` at least 1; found 4 and 0"),
    ],
)
def test_wrong_ranks_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Guarded: worker processes import the script again from Python 3.14 on, where they are not forked.
TWO = """
import pickle, sys
import torch, torch.distributed as dist
from gradalign.data import DeviceLoader, PackedDataset, RankSampler, collate
import gradalign as ga

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = PackedDataset(sys.argv[1], "train", num_samples=800, seed=3, random_crop=True, raw=True)
    sampler = RankSampler(len(data), 6, seed=3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=1)
    views = DeviceLoader(loader, ga.RawBoost(algo=4), device="cpu")
    views.set_epoch(1)
    mine = [tuple(v) for v in views]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[2])
    dist.destroy_process_group()
"""


def test_two_processes_see_together_what_one_sees(folder, expected, tmp_path, boost):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [str(folder / "packed"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_expected(found[0] + found[1], expected[1])
    one = DeviceLoader(load_batches(packed(folder), epoch_plan(SIZE, 6, 3, 1)), boost, device="cpu")
    for left, right, both in zip(*found, one, strict=True):
        # The data set of `one` is still in epoch 0: labels tell that the same utterances make up each step.
        assert torch.equal(torch.cat([left[2], right[2]]), both.label)
        assert len(left[0]) == len(right[0]) == 3


# ---- the device loader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [None, False, True], ids=["files", "packed", "packed, raw"])
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 0), (12, 0), (5, 1), (3, 2)])
def test_views_are_the_same_for_any_source_batch_and_number_of_workers(
    folder, boost, expected, num_workers, raw, batch_size
):
    data = files(folder) if raw is None else packed(folder, raw=raw)
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=collate, num_workers=num_workers)
    views = DeviceLoader(loader, boost, device="cpu")
    assert len(views) == len(loader)
    for epoch in (0, 2):
        views.set_epoch(epoch)
        assert_expected(views, expected[epoch])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_may_augment(folder, boost, expected, num_workers):
    together = functools.partial(collate, augment=boost)
    loader = DataLoader(files(folder), 5, collate_fn=together, num_workers=num_workers)
    assert_expected(DeviceLoader(loader, device="cpu"), expected[0])
    data = packed(folder)
    data.set_epoch(1)
    plan = epoch_plan(SIZE, 4, 0, 1)
    assert_expected(DeviceLoader(load_batches(data, plan, augment=boost), device="cpu"), expected[1])


@pytest.mark.parametrize("kind", [torch.float32, torch.int16])
def test_any_loader_of_padded_waves_ids_and_lengths(folder, boost, expected, kind):
    """What a loader of one's own gives: whole utterances, padded to the longest; the rest happens here."""
    longest = max(LENGTHS)
    waves = torch.zeros(SIZE, longest, dtype=kind)
    for i, length in enumerate(LENGTHS):
        samples = torch.from_numpy(soundfile.read(folder / f"u{i}.wav", dtype="int16")[0])
        waves[i, :length] = samples if kind == torch.int16 else samples / 32768
    rows = list(zip(waves, [i % 2 for i in range(SIZE)], NAMES, LENGTHS, strict=True))
    loader = DataLoader(rows, batch_size=5)
    views = DeviceLoader(loader, boost, device="cpu", num_samples=SAMPLES, seed=3, random_crop=True)
    for epoch in (0, 1):
        views.set_epoch(epoch)
        assert_expected(views, expected[epoch])


def test_waves_without_lengths_are_whole(boost):
    wave = 0.1 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    loader = [(wave, torch.tensor([0, 1, 1]), torch.tensor([7, 8, 9]))]
    clean, augmented, label, seeds = next(iter(DeviceLoader(loader, boost, device="cpu", seed=5)))
    assert label.tolist() == [0, 1, 1]
    assert seeds.tolist() == [utterance_draws(5, 0, name)[0] for name in ("7", "8", "9")]
    assert torch.equal(clean, wave)
    assert torch.equal(augmented, boost(wave, seeds=seeds))
    for num_samples in (300, 1300):
        clean, augmented, *_ = next(iter(DeviceLoader(loader, boost, device="cpu", num_samples=num_samples)))
        assert torch.equal(clean, torch.stack([fit_length(row, num_samples) for row in wave]))
        # A repeated utterance is augmented once.
        assert torch.equal(augmented[:, 500:1000], augmented[:, :500][:, : max(0, num_samples - 500)])


def test_stored_samples_are_scaled_where_none_is_cut_or_repeated():
    loader = [(torch.tensor([[16384], [-32768]], dtype=torch.int16), [0, 1], "ab")]
    view = next(iter(DeviceLoader(loader, device="cpu", num_samples=1)))
    assert view.clean.tolist() == [[0.5], [-1.0]]


def test_without_augmentation_both_views_are_the_clean_one(folder):
    for clean, augmented, *_ in DeviceLoader(DataLoader(files(folder), 5, collate_fn=collate), device="cpu"):
        assert torch.equal(clean, augmented)


def test_any_callable_augments(folder):
    def negative(wave, lengths, seeds):
        assert seeds.shape == (len(wave),)
        return -wave

    for clean, augmented, *_ in DeviceLoader(DataLoader(files(folder), 5, collate_fn=collate), negative, device="cpu"):
        assert torch.equal(clean, -augmented)


def test_data_sets_and_samplers_within_are_told_the_epoch(folder):
    data = files(folder)
    subset = Subset(data, range(8))
    sampler = DistributedSampler(subset, num_replicas=2, rank=0)
    views = DeviceLoader(DataLoader(subset, 2, sampler=sampler, collate_fn=collate), device="cpu")
    views.set_epoch(6)
    assert (data.epoch, sampler.epoch, views.num_samples) == (6, 6, SAMPLES)
    batches = RankSampler(SIZE, 4)
    views = DeviceLoader(DataLoader(data, batch_sampler=batches, collate_fn=collate), device="cpu")
    views.set_epoch(7)
    assert (data.epoch, batches.epoch) == (7, 7)


@pytest.mark.parametrize("raw", [None, True], ids=["files", "packed, raw"])
def test_the_parts_of_a_joined_data_set_are_told_the_epoch(folder, boost, expected, raw):
    first, second = ((files(folder) if raw is None else packed(folder, raw=raw)) for _ in range(2))
    joined = ConcatDataset([Subset(first, range(5)), ConcatDataset([Subset(second, range(5, SIZE))])])
    views = DeviceLoader(DataLoader(joined, 5, shuffle=True, collate_fn=collate), boost, device="cpu")
    assert views.num_samples == SAMPLES
    for epoch in (0, 1, 2):
        views.set_epoch(epoch)
        assert_expected(views, expected[epoch])


class Counted(Dataset):
    """A data set of one's own, whose `num_samples` counts utterances."""

    num_samples = 8

    def __init__(self, kind=torch.float32):
        self.wave = torch.arange(16000).to(kind)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return self.wave, index % 2, str(index)


def test_only_this_projects_data_sets_say_the_length_of_the_views(folder):
    views = DeviceLoader(DataLoader(Counted(), 4), device="cpu")
    assert views.num_samples is None
    assert [view.clean.shape for view in views] == [(4, 16000)] * 2
    with pytest.raises(ValueError, match="`num_samples` must be given for int16 batches"):
        list(DeviceLoader(DataLoader(Counted(torch.int16), 4), device="cpu"))
    joined = StackDataset(Counted(), Subset(files(folder), range(8)))
    assert DeviceLoader(DataLoader(joined), device="cpu").num_samples == SAMPLES


def test_tuples_of_floating_point_keep_their_length_unless_another_is_given(folder):
    def halves(examples):
        waves = torch.stack([example.wave[: SAMPLES // 2] for example in examples])
        return waves, [example.label for example in examples], [example.row for example in examples]

    loader = DataLoader(files(folder), 4, collate_fn=halves)
    for options, expected in (({}, SAMPLES // 2), ({"num_samples": 70}, 70)):
        views = DeviceLoader(loader, device="cpu", **options)
        assert [view.clean.shape for view in views] == [(4, expected)] * 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: StackDataset(a, b),
        lambda a, b: StackDataset(left=a, right=b),
        lambda a, b: Subset(StackDataset(a, Subset(b, range(SIZE))), range(3)),
    ],
    ids=["tuple", "dict", "nested"],
)
def test_the_parts_of_a_stacked_data_set_are_told_the_epoch(folder, join):
    parts = files(folder), packed(folder)
    views = DeviceLoader(DataLoader(join(*parts), 2), device="cpu")
    views.set_epoch(4)
    assert [part.epoch for part in parts] == [4, 4]
    assert views.num_samples == SAMPLES


def test_the_parts_of_a_chained_data_set_are_told_the_epoch():
    parts = [Stream(), Stream()]
    views = DeviceLoader(DataLoader(ChainDataset(parts), 2), device="cpu")
    views.set_epoch(4)
    assert [part.epoch for part in parts] == [4, 4]


def test_parts_that_disagree_on_num_samples_are_named(folder):
    short = PackedDataset(folder / "packed", "train", num_samples=500, raw=True)
    loader = DataLoader(ConcatDataset([packed(folder, raw=True), short]), 5, collate_fn=collate)
    with pytest.raises(ValueError, match="the loader's data sets must have the same `num_samples`; found 800, 500"):
        DeviceLoader(loader, device="cpu")
    assert DeviceLoader(loader, device="cpu", num_samples=900).num_samples == 900


class Told(DataLoader):
    """A loader that tells its sampler the epoch itself, from its first batch."""

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.batch_sampler.set_epoch(epoch)


def test_a_loader_with_set_epoch_is_told_the_epoch_and_loses_no_start(folder):
    loader = Told(files(folder), batch_sampler=RankSampler(SIZE, 4), collate_fn=collate)
    DeviceLoader(loader, device="cpu").set_epoch(6, start=2)
    assert (loader.epoch, loader.dataset.epoch, loader.batch_sampler.epoch) == (6, 6, 6)
    assert loader.batch_sampler.start == 2


class ByBatch(Dataset):
    """A data set that is indexed by the rows of a batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, rows):
        return collate([self.dataset[i] for i in rows])


@pytest.mark.parametrize("batched", [True, False], ids=["batch_sampler", "sampler of batches"])
def test_a_resumed_epoch_of_views_goes_on_where_it_stopped(folder, boost, batched):
    data, sampler = packed(folder), RankSampler(SIZE, 4, seed=3)
    if batched:
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    else:
        loader = DataLoader(ByBatch(data), batch_size=None, sampler=sampler)
    views = DeviceLoader(loader, boost, device="cpu")
    views.set_epoch(2)
    whole = list(views)
    views.set_epoch(2, start=1)
    assert (data.epoch, sampler.epoch, sampler.start) == (2, 2, 1)
    rest = list(views)
    assert (len(whole), len(rest)) == (3, 2)
    assert all(torch.equal(a, b) for x, y in zip(rest, whole[1:], strict=True) for a, b in zip(x, y, strict=True))
    views.set_epoch(3)
    assert len(list(views)) == 3


def test_a_start_that_no_sampler_takes_is_refused(folder):
    data = files(folder)
    inner = DistributedSampler(data, num_replicas=1, rank=0)
    for loader, found in (
        (DataLoader(data, 2, sampler=inner, collate_fn=collate), "BatchSampler"),
        (DataLoader(data, batch_sampler=BatchSampler(RankSampler(4, 2), 2, False), collate_fn=collate), "BatchSampler"),
        ([], "no sampler"),
    ):
        views = DeviceLoader(loader, device="cpu")
        views.set_epoch(1, start=0)
        with pytest.raises(ValueError, match=rf"`start` must be 0 unless .*`RankSampler` has; found 3 with {found}"):
            views.set_epoch(2, start=3)
        assert views.epoch == 1
    assert (data.epoch, inner.epoch) == (1, 1)


def test_bad_utterances_stop_or_are_reported_and_empty_batches_come(folder, tmp_path, boost):
    data = files(folder)
    data.utterances[1] = Utterance("missing", "s", "-", 1)
    plan = [[0, 1], [1], [2, 3]]
    with pytest.raises(AudioError, match="missing: expected a file"):
        list(DeviceLoader(load_batches(data, plan), boost, device="cpu"))
    reported = []
    views = list(DeviceLoader(load_batches(data, plan), boost, device="cpu", on_bad=reported.extend))
    assert [len(v.label) for v in views] == [1, 0, 2]
    assert [tuple(v.augmented.shape) for v in views] == [(1, SAMPLES), (0, SAMPLES), (2, SAMPLES)]
    assert [row for row, _ in reported] == [1, 1]
    # A rank without utterances in an epoch's last step.
    sampler = RankSampler(1, 4, rank=0, num_ranks=2)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    assert [tuple(v.clean.shape) for v in DeviceLoader(loader, boost, device="cpu")] == [(0, SAMPLES)]


def with_bad(folder, tmp_path, raw, **options):
    """A data set whose utterance 1 cannot be read."""
    data = files(folder, **options)
    data.utterances[1] = Utterance("missing", "s", "-", 1)
    if raw is None:
        return data
    pack({"train": data.utterances}, tmp_path / "bad", audio_dir=folder, skip_bad=True)
    options = {"num_samples": SAMPLES, "seed": 3, "random_crop": True, **options}
    return PackedDataset(tmp_path / "bad", "train", raw=raw, **options)


@pytest.mark.parametrize("raw", [None, False, True], ids=["files", "packed", "packed, raw"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_ordinary_loader_reports_bad_utterances(folder, tmp_path, boost, expected, raw, num_workers, batch_size):
    data = with_bad(folder, tmp_path, raw, skip_bad=True)
    joined = ConcatDataset([Subset(data, range(SIZE))])
    loader = DataLoader(joined, batch_size, collate_fn=collate, num_workers=num_workers)
    reported = []
    views = list(DeviceLoader(loader, boost, device="cpu", on_bad=reported.append))
    assert [[row for row, _ in bad] for bad in reported] == [[1]]
    assert "missing: expected a file ending in" in reported[0][0][1]
    assert_expected(views, expected[0], SIZE - 1)
    assert [len(v.label) for v in views] == [batch_size - (i == 1 // batch_size) for i in range(SIZE // batch_size)]
    # Workers hand over the message, not a traceback.
    with pytest.raises(AudioError, match=r"^[^\n]*missing: expected a file ending in [^\n]*$"):
        list(DeviceLoader(loader, boost, device="cpu"))


def test_bad_utterances_are_listed_by_workers_that_augment(folder, tmp_path, boost, expected):
    data = with_bad(folder, tmp_path, None, skip_bad=True)
    loader = DataLoader(data, 1, collate_fn=functools.partial(collate, augment=boost))
    reported = []
    assert_expected(DeviceLoader(loader, device="cpu", on_bad=reported.extend), expected[0], SIZE - 1)
    assert [row for row, _ in reported] == [1]
    assert [batch.bad[0][0] for batch in load_batches(data, [[1, 0]])] == [1]


@pytest.mark.parametrize("raw", [None, False], ids=["files", "packed"])
def test_a_loader_that_never_reports_bad_utterances_is_refused(folder, tmp_path, raw):
    data = with_bad(folder, tmp_path, raw)
    with pytest.raises(AudioError, match="missing: expected a file"):
        data[1]
    for function in (collate, functools.partial(collate, augment=None)):
        loader = DataLoader(ConcatDataset([data]), 2, collate_fn=function)
        with pytest.raises(ValueError, match="`on_bad` needs a loader over a data set with `skip_bad=True`, or `"):
            DeviceLoader(loader, device="cpu", on_bad=print)
    # What a collate function of one's own lists is not known before.
    DeviceLoader(DataLoader(data, 2, collate_fn=lambda examples: collate(examples)), device="cpu", on_bad=print)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.bool, torch.float32, torch.float64])
def test_whole_labels_become_int64_and_soft_ones_stay(kind):
    label = torch.tensor([1, 0], dtype=kind)
    wave, numbers = torch.ones(2, 5), torch.tensor([3, 4])
    batch = Batch(wave, label, numbers, torch.full_like(numbers, 5), numbers, [])
    for item in ((wave, label, numbers), batch):
        found = next(iter(DeviceLoader([item], device="cpu"))).label
        assert found.dtype == (kind if kind.is_floating_point else torch.int64)
        assert found.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(2)), {}, r"a batch must be .* \(wave, label, ids\) .*; found 2 items"),
        (torch.zeros(2, 5), {}, "found Tensor"),
        (
            (torch.zeros(5), [0], ["a"]),
            {},
            r"wave must be \[B, S\], floating .*; found torch.float32 \[5\]",
        ),
        ((torch.zeros(2, 5, dtype=torch.int32), [0, 1], "ab"), {}, r"found torch.int32 \[2, 5\]"),
        ((torch.zeros(2, 5), [0, 1], ["a"]), {}, r"a batch of 2 must have 2 labels and ids; found \[2\], 1"),
        ((torch.zeros(2, 0), [0, 1], "ab"), {}, r"must have at least one sample; found none"),
        ((torch.zeros(2, 5), [0, 1], "ab", [0, 5]), {}, r"lengths must lie in \[1, S\] = \[1, 5\]; found \[0, 5\]"),
        ((torch.zeros(2, 5), [0, 1], "ab", [5, 6]), {}, r"found \[5, 6\]"),
        ((torch.zeros(2, 5), [0, 1], "ab", [5.0, 5.0]), {}, r"lengths must be integers \[2\]; found torch.float32"),
        ((torch.zeros(2, 5), [0, 1], "ab", None), {}, r"a batch's lengths must be 2 numbers; found None"),
        ((torch.zeros(2, 5), None, "ab"), {}, r"a batch's label must be 2 numbers; found None"),
        ((torch.zeros(2, 5), [0, 1], None), {}, r"a batch's ids must be 2 names or numbers; found None"),
        (
            (torch.zeros(2, 5), [0, 1], torch.tensor(3)),
            {},
            r"a batch's ids must be 2 names or numbers; found tensor\(3\)",
        ),
        ((torch.zeros(2, 5, dtype=torch.int16), [0, 1], "ab"), {}, r"`num_samples` must be given for int16 batches"),
        (collate([]), {"num_samples": 0}, r"`num_samples` must be at least 1; found 0"),
        (
            Batch(torch.zeros(1, 5), *[torch.zeros(1, dtype=torch.int64)] * 4, []),
            {"num_samples": 6},
            r"a batch must be \[B, 6\]; found \[1, 5\]",
        ),
    ],
)
def test_wrong_batches_are_named(item, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        list(DeviceLoader([item], device="cpu", **options))


@pytest.mark.parametrize("lengths", [(), ([],), (torch.tensor([]),), (torch.zeros(0, dtype=torch.int64),)])
@pytest.mark.parametrize("size", [0, 5])
def test_an_empty_batch_may_have_lengths_of_any_type_or_none(lengths, size):
    item = (torch.zeros(0, size), [], [], *lengths)
    view = next(iter(DeviceLoader([item], lambda wave, lengths, seeds: wave, device="cpu", num_samples=7)))
    assert (view.clean.shape, view.label.shape, view.label.dtype) == ((0, 7), (0,), torch.int64)


@pytest.mark.parametrize("kind", [torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_samples", [1, 7, 64])
def test_windows_taken_by_rows_and_by_one_gather_are_fit_length(kind, num_samples):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(-32768, 32768, (500,), generator=generator).to(kind)
    start, length = torch.tensor([0, 499, 100, 436]), torch.tensor([min(n, num_samples) for n in (64, 1, 7, 64)])
    rows = [fit_length(samples[s : s + n], num_samples) for s, n in zip(start, length, strict=True)]
    expected = torch.stack(rows)
    assert torch.equal(gather_windows(samples, start, length, num_samples), expected)
    taken = take_windows(samples, start, length, num_samples)
    assert torch.equal(taken, expected / 32768 if kind == torch.int16 else expected)
    assert taken.dtype == (torch.float32 if kind == torch.int16 else kind)
    assert take_windows(samples, start[:0], length[:0], num_samples).shape == (0, num_samples)


def test_shares_of_nothing():
    assert rank_share([], 0, 3) == []


def test_a_batch_is_prepared_one_step_early_between_the_right_waits(folder, boost, expected, monkeypatch):
    """What is put into which stream, on stand-ins for the streams: the rest of the discipline needs a GPU, below."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            log.append(f"{self.name} has prepared a batch")
            return len([line for line in log if "prepared" in line])

        def wait_event(self, event):
            log.append(f"{self.name} waits for batch {event}")

    consumer = Stream("consumer")
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(log.append(f"in {stream.name}")))
    copied = []
    monkeypatch.setattr(loader_module, "to_device", lambda tensor, device: copied.append(tensor) or tensor)
    data = packed(folder, raw=True)
    views = DeviceLoader(load_batches(data, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]), boost, device="cpu")
    views.device, views.num_samples = SimpleNamespace(type="cuda"), SAMPLES
    seen = []
    for batch in views:
        log.append("step")
        seen.append(batch)
    assert_expected(seen, expected[0])
    # Samples cross as they are stored: scaled and repeated they would be a multiple of the bytes.
    waves = [(tensor.dtype, tensor.shape) for tensor in copied if tensor.dtype != torch.int64]
    own = [min(length, SAMPLES) for length in LENGTHS]
    assert waves == [(torch.int16, (sum(own[i : i + 4]),)) for i in (0, 4, 8)]
    prepare = ["side waits for consumer", "in side", "side has prepared a batch"]
    hand_over = [[f"consumer waits for batch {i}", "step"] for i in (1, 2, 3)]
    assert log == prepare + prepare + hand_over[0] + prepare + hand_over[1] + hand_over[2]
    list(views)
    assert len(made) == 1


def test_memory_of_a_loader_on_the_device_is_kept_until_it_is_read(monkeypatch):
    """Of a data set in the GPU's memory, say; on stand-ins for streams and for tensors on a GPU."""
    side, kept = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: None), []
    consumer = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append((self, stream)))
    monkeypatch.setattr(loader_module, "to_device", lambda tensor, device: tensor)
    wave = torch.ones(2, 10, dtype=torch.int16)
    loader = [(wave, torch.tensor([0, 1]), ["a", "b"])]
    views = DeviceLoader(loader, lambda wave, lengths, seeds: 2 * wave, device="cpu", num_samples=20)
    views.device = SimpleNamespace(type="cuda")
    assert len(list(views)) == 1
    assert any(tensor is wave and stream is side for tensor, stream in kept)


# ---- on a GPU ------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(bool(ops.lnl.why_not("cuda")), reason=f"needs a CUDA GPU: {ops.lnl.why_not('cuda')}")


@needs_gpu
@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("raw", [None, True], ids=["files", "packed, raw"])
def test_views_on_a_gpu_are_those_of_the_cpu(folder, boost, raw, pin_memory):
    data = files(folder) if raw is None else packed(folder, raw=raw)
    loader = DataLoader(data, 5, collate_fn=collate, num_workers=2, pin_memory=pin_memory)
    there, here = DeviceLoader(loader, boost, device="cuda"), DeviceLoader(loader, boost, device="cpu")
    for epoch in (0, 1):
        there.set_epoch(epoch)
        pairs = list(zip(there, here, strict=True))
        for a, b in pairs:
            assert all(field.device.type == "cuda" for field in a)
            assert torch.equal(a.clean.cpu(), b.clean)
            assert torch.equal(a.seeds.cpu(), b.seeds)
            assert torch.equal(a.label.cpu(), b.label)
            torch.testing.assert_close(a.augmented.cpu(), b.augmented, rtol=0, atol=1e-5)


@needs_gpu
def test_a_slow_consumer_never_sees_the_next_batch(boost):
    """Memory is used again only when the consumer's queue, here far behind the host, is done with it."""
    wave = torch.arange(1, 41).float()[:, None].expand(40, 60_000).contiguous()
    loader = [(wave[i : i + 4], torch.zeros(4), list(range(i, i + 4))) for i in range(0, 40, 4)]
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        sums = []
        for clean, augmented, *_ in DeviceLoader(loader, lambda x, lengths, seeds: 2 * x, device="cuda"):
            for _ in range(20):
                big = (big @ big).clamp_(-1, 1)
            sums.append((clean.mean(1), augmented.mean(1)))
        clean, augmented = (torch.cat(column).cpu() for column in zip(*sums, strict=True))
        assert torch.equal(clean, torch.arange(1, 41).float())
        assert torch.equal(augmented, 2 * clean)


@needs_gpu
def test_copy_and_augmentation_run_beside_the_consumer(folder, boost):
    loader = DataLoader(packed(folder, raw=True), 4, collate_fn=collate)
    consumer = torch.cuda.current_stream()
    streams = []

    def note(wave, lengths, seeds):
        streams.append(torch.cuda.current_stream())
        return boost(wave, lengths=lengths, seeds=seeds)

    views = DeviceLoader(loader, note, device="cuda")
    for _ in range(2):
        assert len(list(views)) == 3
    assert len(set(streams)) == 1
    assert streams[0] != consumer


@needs_gpu
def test_the_host_does_not_wait_for_the_device(folder, boost):
    batches = list(DataLoader(packed(folder, raw=True), 4, collate_fn=collate, pin_memory=True))
    views = DeviceLoader(batches, boost, device="cuda", num_samples=SAMPLES)
    list(views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(views)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_memory_stays_bounded_however_far_the_host_runs_ahead():
    wave = torch.zeros(8, 64_600)
    size = wave.nbytes
    loader = [(wave, torch.zeros(8), list(range(8)))] * 40
    big = torch.randn(4096, 4096, device="cuda")
    # The first product allocates a workspace.
    big = (big @ big).clamp_(-1, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in DeviceLoader(loader, lambda x, lengths, seeds: 2 * x, device="cuda"):
        big = (big @ big).clamp_(-1, 1)
    # Three batches of two views each, and the matrices.
    assert torch.cuda.max_memory_allocated() - before <= 7 * size + 3 * big.nbytes
