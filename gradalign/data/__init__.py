"""Audio, protocols, public data sets, the small corpus and the loaders."""

from gradalign._errors import AudioError, DataError
from gradalign.data.audio import find_audio, fit_length, read_audio
from gradalign.data.dataset import Batch, Example, SpeechDataset, collate, epoch_plan, load_batches, utterance_draws
from gradalign.data.datasets import read_dataset
from gradalign.data.loader import DeviceLoader, RankSampler, Views
from gradalign.data.packed import PackedDataset, is_packed, pack, packed_splits
from gradalign.data.protocol import Utterance, read_protocol

__all__ = [
    "AudioError",
    "Batch",
    "DataError",
    "DeviceLoader",
    "Example",
    "PackedDataset",
    "RankSampler",
    "SpeechDataset",
    "Utterance",
    "Views",
    "collate",
    "epoch_plan",
    "find_audio",
    "fit_length",
    "is_packed",
    "load_batches",
    "pack",
    "packed_splits",
    "read_audio",
    "read_dataset",
    "read_protocol",
    "utterance_draws",
]
