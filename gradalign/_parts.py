"""What a run is made of, by its configuration: data, views, detector, loss, optimizer."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradalign import detectors
from gradalign._distributed import num_ranks
from gradalign._errors import AudioError, ConfigError, DataError
from gradalign.config import TrainConfig
from gradalign.data import datasets
from gradalign.data.dataset import SpeechDataset, augmented_view, epoch_plan, load_batches
from gradalign.data.packed import PackedDataset, is_packed, packed_splits
from gradalign.data.protocol import Utterance, expect_disjoint, read_protocol
from gradalign.optim import AlignedOptimizer
from gradalign.rawboost import RawBoost
from gradalign.scoring import choose_device, without_pretrained

# ---- data ----------------------------------------------------------------------------------------------------------


def open_split(config: TrainConfig, split: str) -> SpeechDataset | None:
    """The data set of a split, or of one of ``test_sets``, as the run reads it; None for a test split it does not have.

    Raises DataError for a wrong protocol, packed folder, data set or subset, or where train or dev lack one of the
    classes, and AudioError for audio files that are not there, unless ``skip_bad``.
    """
    if test := config.test_sets.get(split):
        try:
            return _open(config, test["dataset"], test["data"], test.get("subset", "test"), split)
        except DataError as error:
            raise type(error)(f"test_sets.{split}: {error}") from None
    if config.data is not None:
        there = packed_splits(config.data) if is_packed(config.data) else datasets.subsets(config.dataset, config.data)
        if split == "test" and split not in there:
            return None
        source, data = Path(config.data), _open(config, config.dataset, config.data, split, split)
    else:
        protocol, audio = getattr(config, f"{split}_protocol"), getattr(config, f"{split}_audio")
        if protocol is None and split == "test":
            return None
        if protocol is None or audio is None:
            raise DataError(f"expected `data`, or `{split}_protocol` and `{split}_audio`; found neither")
        source, utterances = Path(protocol), read_protocol(protocol)
        if not Path(audio).is_dir():
            raise DataError(f"{audio}: expected a folder of audio files; found nothing there")
        if not config.skip_bad:
            datasets.expect_files(utterances, Path(audio))
        data = _speech(config, utterances, audio, split)
    if split != "test":
        for label, name in ((1, "bonafide"), (0, "spoof")):
            if all(u.label != label for u in data.utterances):
                raise DataError(f"{source}: expected both bonafide and spoof utterances in {split}; found no {name}")
    return data


def _open(config: TrainConfig, dataset: str, root: str, subset: str, split: str) -> SpeechDataset:
    """A data set's subset, from a packed folder or as published."""
    if is_packed(root):
        packed = PackedDataset(
            root,
            subset,
            num_samples=config.num_samples,
            seed=config.seed,
            random_crop=split == "train" and config.crop == "random",
        )
        if packed.sample_rate != config.sample_rate:
            raise DataError(f"{root}: expected a sample rate of {config.sample_rate} Hz; found {packed.sample_rate} Hz")
        return packed
    return _speech(config, datasets.read_dataset(dataset, root, subset, allow_missing=config.skip_bad), root, split)


def _speech(config: TrainConfig, utterances: list[Utterance], audio_dir: str | Path, split: str) -> SpeechDataset:
    # A test set is read once, and a worker process forgets at the end of each epoch.
    read_again = split in ("train", "dev") and config.num_workers == 0
    return SpeechDataset(
        utterances,
        audio_dir,
        sample_rate=config.sample_rate,
        num_samples=config.num_samples,
        seed=config.seed,
        random_crop=split == "train" and config.crop == "random",
        resample=config.resample,
        cache_mb=config.cache_mb if read_again else 0,
    )


def train_and_dev(config: TrainConfig) -> tuple[SpeechDataset, SpeechDataset]:
    """A run's training and dev data. Raises as `open_split`, and DataError where they share a file."""
    train_data, dev_data = open_split(config, "train"), open_split(config, "dev")
    assert train_data is not None
    assert dev_data is not None
    expect_disjoint_splits(train=train_data, dev=dev_data)
    return train_data, dev_data


def expect_disjoint_splits(**splits: SpeechDataset) -> None:
    """`expect_disjoint` for opened splits."""
    expect_disjoint({split: (data.audio_dir, data.utterances) for split, data in splits.items()})


def digest_of(*splits: SpeechDataset) -> str:
    """What tells one set of utterances and labels from another."""
    lines = "".join(f"{u.name} {u.label}\n" for data in splits for u in data.utterances)
    # A file's name need not be UTF-8.
    return hashlib.blake2b(lines.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


# ---- views ---------------------------------------------------------------------------------------------------------

View = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(wave [B, T], length int64 [B] before an utterance repeats itself, seeds int64 [B]) -> what a path sees [B, T]."""


def make_views(config: TrainConfig) -> list[View]:
    """What the paths of a run see. Raises ConfigError for a view or RawBoost parameters that are not there."""
    return [_make_view(config, name) for name in config.views]


def _make_view(config: TrainConfig, name: str) -> View:
    if name == "clean":
        return lambda wave, length, seed: wave
    kind, _, detail = name.partition(":")
    if kind == "rawboost":
        try:
            return partial(augmented_view, RawBoost(int(detail or config.algo), config.sample_rate, **config.rawboost))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"views: {name}: {error}") from None
    try:
        function = getattr(importlib.import_module(kind), detail)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`views` must name clean, rawboost, rawboost:ALGO or module:function; found {name!r} ({error})"
        ) from None

    def view(wave: Tensor, length: Tensor, seed: Tensor) -> Tensor:
        seen = function(wave, seed.to(wave.device))
        if not isinstance(seen, Tensor) or seen.shape != wave.shape:
            found = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise ConfigError(f"view {name} must return {list(wave.shape)}, as it gets; found {found}")
        return seen

    return view


def training_views(config: TrainConfig, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the steps of a run's epoch see, on its device: the first and the second view [B, T], labels int64 [B].

    Raises as `train` does where data or audio are not as expected.
    """
    data, views, device = train_and_dev(config)[0], make_views(config), choose_device(config.device)
    data.set_epoch(epoch)
    plan = epoch_plan(len(data), config.batch_size, config.seed, epoch)
    for batch in load_batches(data, plan, num_workers=config.num_workers):
        if batch.bad and not config.skip_bad:
            raise AudioError(batch.bad[0][1])
        if len(batch.row):
            wave = batch.wave.to(device)
            first, second = (view(wave, batch.length, batch.seed) for view in views[:2])
            yield first, second, batch.label.to(device)


# ---- model and optimizer -------------------------------------------------------------------------------------------


def make_detector(config: TrainConfig, pretrained: bool = True) -> nn.Module:
    """The detector of a run, on the CPU, perhaps without its pretrained weights. Raises ConfigError."""
    options = config.detector_options if pretrained else without_pretrained(config.detector_options)
    try:
        return detectors.create(config.detector, **options)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"detector: {error}") from None


def make_loss(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The class-weighted cross-entropy of a run: (logits [B, 2], labels int64 [B]) -> scalar, in float32."""
    weight = torch.tensor(config.class_weights, device=choose_device(config.device))
    return lambda logits, labels: functional.cross_entropy(logits.float(), labels, weight)


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> AlignedOptimizer:
    """The aligned optimizer of a run. Raises ConfigError."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if device.type == "cuda":
        # A fused optimizer can leave out a step without the host, which then never waits.
        settings["fused"] = True
    base: torch.optim.Optimizer
    if config.optimizer == "sgd":
        base = torch.optim.SGD(parameters, momentum=0.9, **settings)
    elif config.optimizer == "adamw":
        base = torch.optim.AdamW(parameters, **settings)
    else:
        base = torch.optim.Adam(parameters, **settings)
    try:
        group = torch.distributed.group.WORLD if num_ranks() > 1 and not config.shard else None
        return AlignedOptimizer(
            base, method=config.align, scope=config.scope, process_group=group, **config.align_options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"align_options: {error}") from None
