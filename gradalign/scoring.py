"""Scores of a trained detector: loading one, running it over audio."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradalign import _ranks, detectors
from gradalign._checkpoint import load_checkpoint, load_weights
from gradalign._distributed import num_ranks
from gradalign._errors import AudioError, CheckpointError, ConfigError, DataError, GradalignError
from gradalign.data.dataset import SpeechDataset, load_batches
from gradalign.data.packed import PackedDataset
from gradalign.data.protocol import Utterance


@dataclass(frozen=True)
class TrainedDetector:
    """A detector in evaluation mode with the settings it was trained with (the fields of `TrainConfig`)."""

    model: nn.Module
    config: dict[str, Any]


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one. Raises ConfigError for a device that is not there."""
    # Under torchrun each process has a GPU of its own.
    if name == "auto":
        name = f"cuda:{_ranks.local_rank()}" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{_ranks.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"`device` must be one that is here; found {name!r} ({str(error).splitlines()[0]})") from None
    return device


def without_pretrained(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a detector without the file of its front end's pretrained weights: trained ones take their place.

    >>> without_pretrained({"frontend": {"name": "tiny", "weights": "tiny.pt"}, "hidden": 64})
    {'frontend': {'name': 'tiny'}, 'hidden': 64}
    """
    frontend = options.get("frontend")
    if not isinstance(frontend, dict):
        return options
    return {**options, "frontend": {name: value for name, value in frontend.items() if name != "weights"}}


def load_detector(path: str | Path, device: str = "auto") -> TrainedDetector:
    """Load a trained detector for scoring.

    Args:
        path: ``best.pt`` of a run, ``checkpoint.pt`` for the weights it goes on from, or the run's folder (its
            ``best.pt``).
        device: as PyTorch names it, or auto.

    Raises:
        CheckpointError: naming the file, when it is missing, damaged, or does not fit the detector it names.
        ConfigError: for a device that is not there.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    content = load_checkpoint(path)
    if not {"config", "model"} <= set(content):
        raise CheckpointError(f"{path}: expected the keys config and model; found {', '.join(map(str, content))[:80]}")
    config = content["config"]
    try:
        model = detectors.create(config["detector"], **without_pretrained(config["detector_options"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected the settings of a detector; found: {error}") from None
    load_weights(model, content["model"], path)
    return TrainedDetector(model.to(choose_device(device)).eval(), config)


def predict(
    model: nn.Module,
    dataset: SpeechDataset,
    *,
    batch_size: int = 24,
    num_workers: int = 0,
    amp: str = "off",
    skip_bad: bool = False,
    progress: str = "",
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Run a model over a data set, in order, in evaluation mode; under torchrun each process takes a part.

    Args:
        model: wave [B, T] -> logits [B, 2].
        dataset: N utterances.
        batch_size: at most so many at once.
        num_workers: processes that read audio ahead.
        amp: off | bf16 | fp16, the type of the forward pass.
        skip_bad: leave out files that cannot be read.
        progress: title of a progress bar on stderr; none if empty.

    Returns:
        logits float32 [N, 2] on the CPU, NaN where the file was bad, and (row, message) of the bad files.

    Raises:
        AudioError: naming the first file that cannot be read, unless ``skip_bad``.
    """
    from tqdm import tqdm

    device = next(model.parameters()).device
    logits = torch.full((len(dataset), 2), torch.nan)
    bad: list[tuple[int, str]] = []
    plan = [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]
    was_training = model.training
    model.eval()
    try:
        sharded = _ranks.is_sharded(model)
        bar = tqdm(total=len(dataset), desc=progress, disable=not progress, leave=False)
        # FSDP2 keeps what it gathers, which must not be tensors of the inference mode.
        with torch.no_grad() if sharded else torch.inference_mode(), bar:
            mine = plan[_ranks.rank() :: num_ranks()]
            for batch in load_batches(dataset, mine, num_workers=num_workers, pin_memory=device.type == "cuda"):
                if batch.bad and not skip_bad:
                    raise AudioError(batch.bad[0][1])
                bad += batch.bad
                if len(batch.row):
                    with autocast(device, amp):
                        found = model(batch.wave.to(device, non_blocking=True))
                    logits[batch.row] = found.float().cpu()
                elif sharded:
                    model(batch.wave.new_zeros(1, dataset.num_samples).to(device))
                bar.update(num_ranks() * (len(batch.row) + len(batch.bad)))
            if sharded and len(mine) < -(-len(plan) // num_ranks()):
                # Every process must run the model equally often: they gather its parameters together.
                model(torch.zeros(1, dataset.num_samples, device=device))
    finally:
        model.train(was_training)
    if num_ranks() > 1:
        rows = [row for batch in mine for row in batch]
        parts = _ranks.gather((rows, logits[rows], bad))
        for theirs, found, _ in parts:
            logits[theirs] = found
        bad = [one for _, _, found in parts for one in found]
    return logits, bad


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of a forward pass in ``amp`` = off | bf16 | fp16."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def scores_of(logits: Tensor) -> np.ndarray:
    """Scores float64 [N] of logits [N, 2]: bona fide minus spoof; higher is more bona fide."""
    wide = logits.double()
    return (wide[:, 1] - wide[:, 0]).numpy()


def expect_finite(logits: Tensor, bad: Sequence[tuple[int, str]], dataset: SpeechDataset) -> None:
    """Raise GradalignError where the model gave NaN or Inf for an utterance that could be read."""
    wrong = ~logits.isfinite().all(1)
    wrong[[row for row, _ in bad]] = False
    if wrong.any():
        name = dataset.utterances[int(wrong.nonzero()[0])].name
        raise GradalignError(
            f"{name}: expected finite scores; the detector gave NaN or Inf for it and {int(wrong.sum()) - 1} more"
        )


def score(
    checkpoint: str | Path,
    data: Sequence[Utterance] | PackedDataset,
    audio_dir: str | Path = "/",
    *,
    batch_size: int = 24,
    num_workers: int = 0,
    device: str = "auto",
    resample: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
) -> tuple[np.ndarray, list[str]]:
    """Score utterances with a trained detector.

    Args:
        checkpoint: see `load_detector`.
        data: N utterances from `read_protocol` or `read_dataset`, or packed ones.
        audio_dir: folder of the files of utterances without a path of their own.
        batch_size, num_workers, skip_bad: see `predict`.
        device: as PyTorch names it, or auto.
        resample: convert files of another sample rate than the detector's.
        progress: show a progress bar on stderr.

    Returns:
        scores float64 [N], higher is more bona fide, NaN for a bad file, and the messages of the bad files.

    Raises:
        AudioError: naming the first file that cannot be read, unless ``skip_bad``.
        GradalignError: for a wrong checkpoint, packed data of another sample rate, or NaN or Inf from the detector.
    """
    detector = load_detector(checkpoint, device)
    sample_rate, num_samples = detector.config["sample_rate"], detector.config["num_samples"]
    dataset: SpeechDataset
    if isinstance(data, PackedDataset):
        if data.sample_rate != sample_rate:
            raise DataError(f"{data.audio_dir}: expected {sample_rate} Hz, the detector's; found {data.sample_rate} Hz")
        dataset = copy.copy(data)
        dataset.num_samples = num_samples
        dataset.raw = dataset.random_crop = False
    else:
        dataset = SpeechDataset(data, audio_dir, sample_rate=sample_rate, num_samples=num_samples, resample=resample)
    logits, bad = predict(
        detector.model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        skip_bad=skip_bad,
        progress="scoring" if progress else "",
    )
    expect_finite(logits, bad, dataset)
    return scores_of(logits), [message for _, message in bad]
