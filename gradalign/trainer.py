"""Dual-path training: clean and RawBoost-augmented views, each with its own gradient, merged by an aligned optimizer.

Source of the scheme: Truong et al., arXiv 2509.20682. A run is reproducible bit for bit on the CPU and survives being
killed at any point: everything random is a pure function of (seed, epoch, utterance) or kept in the checkpoint, and
every file is replaced whole.
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradalign import _ranks, metrics
from gradalign._checkpoint import WEIGHTS, load_checkpoint, load_weights, save_checkpoint
from gradalign._device import to_device
from gradalign._distributed import num_ranks
from gradalign._errors import AudioError, CheckpointError, ConfigError, GradalignError
from gradalign._files import locked, remove_leftovers, write_text
from gradalign._parts import (
    digest_of,
    expect_disjoint_splits,
    make_detector,
    make_loss,
    make_optimizer,
    make_views,
    open_split,
    train_and_dev,
)
from gradalign.config import TrainConfig
from gradalign.data.dataset import Batch, SpeechDataset, epoch_plan, load_batches, utterance_draws
from gradalign.data.protocol import Utterance
from gradalign.detectors.ssl import SSLDetector
from gradalign.evaluation import Scores, write_scores
from gradalign.info import versions
from gradalign.scoring import autocast, choose_device, expect_finite, predict, scores_of, without_pretrained

# A killed process' readers share its lock, and notice its end within 5 seconds.
_LOCK_WAIT_S = 10.0


def train(config: TrainConfig, progress: bool = True, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train one detector, or go on where a killed run stopped; returns the run's folder ``config.run_dir``.

    A finished run is left as it is, unless ``epochs`` or ``patience`` allow more than it had; where ``test_sets`` have
    been added since, only the scoring is done again.

    Under torchrun every process calls it. Each takes its part of every step's batch, so that the run is the same on any
    number of processes, up to rounding, and can go on on another number; but for the random numbers of dropout, and for
    statistics over the batch, which are each process' own on a CPU and synchronised on GPUs. The first process writes.

    Args:
        config: the run.
        progress: show a progress bar and messages on stderr.
        on_epoch: called with each new row of the metrics.

    Raises:
        GradalignError: data, audio, configuration or checkpoint are not as expected; the message names file or field.
        OSError: a file cannot be written (a full disk); the last checkpoint stays whole.
    """
    run = config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    _ranks.join(choose_device(config.device))
    first = _ranks.rank() == 0
    busy = GradalignError(f"{run}: another process is training this run")
    with locked(run, busy, _LOCK_WAIT_S) if first else nullcontext(), _torch_settings(config):
        _ranks.wait()
        if first:
            remove_leftovers(run)
        if not finished(config):
            training = _Training(config, progress and first, on_epoch if first else None)
            training.fit()
            training.finish()
        _ranks.wait()
    return run


def finished(config: TrainConfig) -> bool:
    """Whether ``config.run_dir`` holds the results of this very run, with all its epochs and test sets.

    Raises:
        CheckpointError: it holds a run with other settings or other data; the message names what differs.
        DataError: the data are not as expected.
    """
    path = config.run_dir / "results.json"
    if not path.exists():
        return False
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        epochs, best, digest = int(results["epochs"]), int(results["epochs_to_best"]), results["data_digest"]
        scored = set(results.get("test_sets", ()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the results of a run; found: {error!r}") from None
    _expect_same_run(
        config.run_dir / "config.json", asdict(TrainConfig.from_json(config.run_dir / "config.json")), config
    )
    if digest != digest_of(*train_and_dev(config)):
        raise CheckpointError(f"{path}: {_OTHER_DATA}")
    return _over(config, epochs, best) and scored.issuperset(config.test_sets)


def _over(config: TrainConfig, epoch: int, best_epoch: int) -> bool:
    """Whether a run with so many epochs, the best of which is ``best_epoch``, takes no more."""
    return epoch >= config.epochs or (0 < config.patience <= epoch - best_epoch)


_OTHER_DATA = "the train or dev protocol is not the one this run was started with"


def _expect_same_run(path: Path, found: dict[str, Any], config: TrainConfig) -> None:
    default = _plain(TrainConfig())
    for name, mine in _plain(config).items():
        # A file of an older version lacks the settings that were added since.
        theirs = found.get(name, default[name])
        if name == "detector_options":
            # The checkpoint holds all weights: where the pretrained ones are now does not matter.
            theirs, mine = without_pretrained(theirs), without_pretrained(mine)
        if name not in _FREE_TO_CHANGE and json.dumps(theirs) != json.dumps(mine):
            raise CheckpointError(
                f"{path}: this run was started with `{name}` {theirs!r}; found {mine!r} now. Go on with the same "
                f"settings, or train into another folder"
            )


# ---- one run -------------------------------------------------------------------------------------------------------

# What may differ when a run goes on: where things are, how fast they are read, how long it lasts, and what becomes of
# files that cannot be read (at which a run that does not skip them has stopped).
_FREE_TO_CHANGE = {
    "data", "train_protocol", "dev_protocol", "test_protocol", "train_audio", "dev_audio", "test_audio", "test_sets",
    "out", "epochs", "patience", "shard", "threads", "num_workers", "cache_mb", "checkpoint_steps", "tensorboard",
    "skip_bad",
}  # fmt: skip


@dataclass
class _Progress:
    """How far a run is: all of it goes into the checkpoint.

    ``epoch`` counts whole epochs, ``position`` the batches done in the one after them; ``sums`` hold that epoch's
    clean and augmented loss, its steps and its skipped steps. ``cosines`` has one entry a step, NaN where undefined.
    """

    epoch: int = 0
    position: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    bad: dict[str, str] = field(default_factory=dict)


class _Training:
    def __init__(self, config: TrainConfig, progress: bool, on_epoch: Callable[[dict[str, Any]], None] | None) -> None:
        self.config, self.run, self.show, self.on_epoch = config, config.run_dir, progress, on_epoch
        self.first = _ranks.rank() == 0
        if config.batch_size < num_ranks():
            raise ConfigError(
                f"`batch_size` must be at least the number of processes, {num_ranks()}; found {config.batch_size}"
            )
        self.device = choose_device(config.device)
        self.train_data, self.dev_data = train_and_dev(config)
        self.test_data = open_split(config, "test")
        if self.test_data is not None:
            expect_disjoint_splits(train=self.train_data, dev=self.dev_data, test=self.test_data)
        for name in config.test_sets:
            # They are read at the end: what is wrong with one is found before the first step.
            open_split(config, name)
        self.views = make_views(config)
        torch.manual_seed(config.seed)
        # A run that goes on has all weights from its checkpoint.
        goes_on = (self.run / "checkpoint.pt").exists()
        model = make_detector(config, pretrained=not goes_on)
        frontend = config.detector_options.get("frontend") or {}
        if isinstance(model, SSLDetector) and not frontend.get("weights"):
            self._say(
                "warning: the front end starts from random weights, not pretrained ones; the paper's systems need "
                "detector_options.frontend.weights=PATH/xlsr2_300m.pt"
            )
        if num_ranks() > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: nn.Module = model.to(self.device)
        if config.shard:
            _ranks.shard(self.model, self.device)
        # Within the detector the processes wait for each other, to gather its parameters or a batch's statistics.
        self.together = num_ranks() > 1 and (config.shard or self.device.type == "cuda")
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(config, self.model, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.criterion = make_loss(config)
        self.class_weights = torch.tensor(config.class_weights, device=self.device)
        self.at = _Progress()
        self._seed_own_dropout()
        self.data_digest = digest_of(self.train_data, self.dev_data)
        if goes_on:
            self._restore(self.run / "checkpoint.pt")
            if self.at.position == 0:
                # A stop may have come after the checkpoint of an epoch's end and before its best weights.
                self._keep_weights()
        self._write("config.json", config.to_json())
        self._write("environment.json", json.dumps(_environment(self.device), indent=2) + "\n")
        if self.at.history:
            self._write_metrics()

    def _write(self, name: str, text: str) -> None:
        """Write a file of the run; every process calls it, the first one writes."""
        if self.first:
            write_text(self.run / name, text)

    def _seed_own_dropout(self) -> None:
        """Give each further process random numbers of its own, from the run's seed and progress."""
        if not self.first:
            torch.manual_seed(utterance_draws(self.config.seed, self.at.epoch, f"rank {_ranks.rank()}")[0])

    def fit(self) -> None:
        from tqdm import tqdm

        if self.first and not _over(self.config, self.at.epoch, self.at.best_epoch):
            (self.run / "results.json").unlink(missing_ok=True)
        steps = len(self._plan())
        with tqdm(
            total=steps * self.config.epochs,
            initial=steps * self.at.epoch + self.at.position,
            desc=self.run.name,
            unit="step",
            disable=not self.show,
            dynamic_ncols=True,
        ) as bar:
            while not _over(self.config, self.at.epoch, self.at.best_epoch):
                self._train_epoch(bar)
                self._close_epoch()

    def _say(self, text: str) -> None:
        from tqdm import tqdm

        if self.show:
            tqdm.write(f"{self.run.name}: {text}", file=sys.stderr)

    def _plan(self) -> list[list[int]]:
        return epoch_plan(len(self.train_data), self.config.batch_size, self.config.seed, self.at.epoch)

    def _train_epoch(self, bar: Any) -> None:
        config, at = self.config, self.at
        self.model.train()
        self.train_data.set_epoch(at.epoch)
        plan = self._plan()
        started, before = time.monotonic(), at.seconds
        steps: list[Tensor] = []
        for batch in load_batches(
            self.train_data,
            [_ranks.share(rows) for rows in plan[at.position :]],
            num_workers=config.num_workers,
            pin_memory=self.device.type == "cuda",
        ):
            self._note_bad(self.train_data, batch.bad)
            # What the loss is divided by: the class weights of the step's labels, over all processes.
            total = _ranks.add_up(self.class_weights[to_device(batch.label, self.device)].sum())
            # A process without utterances takes part unless nobody has any.
            if len(batch.row) or float(total) > 0:
                steps.append(self._step(batch, total))
            at.position += 1
            save = config.checkpoint_steps > 0 and at.position % config.checkpoint_steps == 0
            # A GPU works ahead of the host, which asks for results only now and then.
            if self.device.type == "cpu" or save or len(steps) == 16 or at.position == len(plan):
                self._book(steps)
                steps = []
                if at.sums[2]:
                    bar.set_postfix(epoch=at.epoch + 1, loss=f"{sum(at.sums[:2]) / at.sums[2] / 2:.4f}", refresh=False)
            at.seconds = before + time.monotonic() - started
            bar.update()
            if save and at.position < len(plan):
                self._save()

    def _step(self, batch: Batch, total: Tensor) -> Tensor:
        """One step, without waiting for the device; ``total`` is the class weights' sum over all processes' labels.

        Returns float64 [4]: this process' part of the first view's loss and of the others' mean loss, the smallest
        cosine between any two views' gradients, and 1 for a step that was taken, 0 for one that was skipped.
        """
        optimizer, scaler = self.optimizer, self.scaler
        labels, wave = to_device(batch.label, self.device), to_device(batch.wave, self.device)
        seen = [view(wave, batch.length, batch.seed) for view in self.views]
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        optimizer.zero_grad()
        losses = [wave.new_zeros(()) for _ in seen]
        views = [self._parts(view) for view in seen]
        parts = self._parts(labels)
        if self.config.path == "split":
            for k, view in enumerate(views):
                with optimizer.path():
                    for own, part in zip(view, parts, strict=True):
                        loss = self._step_loss(self._logits(own), part, total)
                        scaler.scale(loss).backward()
                        losses[k] += loss.detach()
        else:
            for part, *waves in zip(parts, *views, strict=True):
                logits = self._logits(torch.cat(waves)).chunk(len(waves))
                found = [self._step_loss(one, part, total) for one in logits]
                optimizer.backward([scaler.scale(loss) for loss in found])
                losses = [total_loss + loss.detach() for total_loss, loss in zip(losses, found, strict=True)]
        optimizer.align()
        cosine = optimizer.cosine
        assert cosine is not None
        # The optimizer leaves out a step with a gradient that is not finite; its cosine with itself is then NaN.
        taken = cosine.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
            # The forward passes have moved running statistics, perhaps to NaN: a skipped step leaves no trace at all.
            buffer.copy_(torch.where(taken, buffer, kept))
        reference, *others = (loss.double() / num_ranks() for loss in losses)
        pairs = torch.ones_like(cosine).triu(1) > 0
        least = torch.where(pairs, cosine, torch.inf).min()
        return torch.stack([reference, torch.stack(others).mean(), least, taken.double()])

    def _parts(self, rows: Tensor) -> list[Tensor]:
        """This process' part of a batch, in the parts that go through the detector one after the other.

        Where the processes work together within the detector, all have the same number of parts, and some may be empty:
        more parts than utterances, or files that could not be read.
        """
        parts = list(rows.tensor_split(self.config.accumulate))
        return parts if self.together else [part for part in parts if len(part)]

    def _step_loss(self, logits: Tensor, labels: Tensor, total: Tensor) -> Tensor:
        """The loss whose mean over the processes is that of the whole step."""
        if len(labels) == 0:
            return 0 * logits.float().sum()
        loss = self.criterion(logits, labels)
        if num_ranks() == 1 and self.config.accumulate == 1:
            return loss
        return loss * (num_ranks() * self.class_weights[labels].sum() / total)

    def _book(self, steps: list[Tensor]) -> None:
        at = self.at
        if not steps:
            return
        found = torch.stack(steps)
        found[:, :2] = _ranks.add_up(found[:, :2].contiguous())
        for clean, augmented, cosine, taken in found.tolist():
            at.cosines.append(cosine if taken else math.nan)
            new = (clean, augmented, 1.0, 0.0) if taken else (0.0, 0.0, 0.0, 1.0)
            at.sums = [a + b for a, b in zip(at.sums, new, strict=True)]

    def _logits(self, wave: Tensor) -> Tensor:
        if len(wave) == 0:
            # Noise, for whose loss nobody asks.
            wave = torch.rand(2 * len(self.views), wave.shape[1], device=wave.device, dtype=wave.dtype)
        with autocast(self.device, self.config.amp):
            return self.forward(wave)

    def _close_epoch(self) -> None:
        config, at = self.config, self.at
        clean, augmented, steps, skipped = at.sums
        if not steps:
            raise GradalignError(
                f"{self.run}: epoch {at.epoch + 1} had no step: {int(skipped)} had losses or gradients that are not "
                f"finite, {len(at.bad)} audio files are bad; a lower `lr` or `amp` off may help"
            )
        started = time.monotonic()
        _ranks.copy_first(list(self.model.buffers()))
        at.bad = {name: message for bad in _ranks.gather(at.bad) for name, message in bad.items()}
        logits, bad = self._predict(self.dev_data, "")
        loss = self._loss(logits, bad)
        done = int(steps + skipped)
        conflicts = _conflicts(at.cosines[len(at.cosines) - done :])
        at.epoch, at.position, at.sums = at.epoch + 1, 0, [0.0, 0.0, 0.0, 0.0]
        at.seconds += time.monotonic() - started
        row = {
            "epoch": at.epoch,
            "steps": len(at.cosines),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "train_loss": (clean + augmented) / steps / 2,
            "train_loss_clean": clean / steps,
            "train_loss_augmented": augmented / steps,
            "dev_loss": loss,
            "dev_eer": None if loss is None else _errors(self.dev_data.utterances, scores_of(logits)).get("eer"),
            **conflicts,
            "skipped_steps": int(skipped),
            "seconds": round(at.seconds, 3),
        }
        at.seconds = 0.0
        at.history.append(row)
        if loss is not None and loss < at.best_loss:
            at.best_epoch, at.best_loss = at.epoch, loss
        self._save()
        self._keep_weights()
        self._write_metrics()
        if config.tensorboard and self.first:
            self._write_tensorboard(row)
        if skipped:
            self._say(f"epoch {at.epoch}: {int(skipped)} steps skipped: losses or gradients that are not finite")
        if self.on_epoch is not None:
            self.on_epoch(row)

    def _best_epochs(self) -> list[int]:
        """The epochs with the lowest dev losses, as many as are averaged, best first."""
        rows = [row for row in self.at.history if row["dev_loss"] is not None]
        rows.sort(key=lambda row: (row["dev_loss"], row["epoch"]))
        return [row["epoch"] for row in rows[: self.config.average_best]]

    def _keep_weights(self) -> None:
        """Keep the weights of the epoch that has ended while it is among the best.

        Its checkpoint, which holds them too, is written before: no best weights are replaced that may be needed again.
        """
        best = self._best_epochs()
        if self.at.epoch in best:
            weights = {
                "model": _ranks.whole(self.model.state_dict()),
                "epoch": self.at.epoch,
                "dev_loss": self.at.history[-1]["dev_loss"],
            }
            if self.first:
                save_checkpoint(self._weights_of(self.at.epoch), {"config": _plain(self.config), **weights})
        if not self.first:
            return
        kept = {self._weights_of(epoch) for epoch in best}
        for path in self.run.glob("best-*.pt"):
            if path not in kept:
                path.unlink()

    def _weights_of(self, epoch: int) -> Path:
        return self.run / ("best.pt" if self.config.average_best == 1 else f"best-{epoch:03d}.pt")

    def _average_weights(self) -> None:
        """Write best.pt, the mean of the best epochs' weights (of whole numbers, the best epoch's)."""
        epochs = self._best_epochs()
        found = [load_checkpoint(self._weights_of(epoch), **WEIGHTS) for epoch in epochs]
        mean = dict(found[0]["model"])
        for name, value in mean.items():
            if value.is_floating_point():
                total = sum(one["model"][name].double() for one in found)
                mean[name] = (total / len(found)).to(value.dtype)
        save_checkpoint(self.run / "best.pt", {**found[0], "model": mean, "averaged_epochs": epochs})

    def finish(self) -> None:
        """Score dev, test and further test sets with the best weights and write the results."""
        at = self.at
        if not at.best_epoch:
            raise GradalignError(f"{self.run}: the dev loss was never finite; a lower `lr` or `amp` off may help")
        if self.config.average_best > 1 and self.first:
            self._average_weights()
        _ranks.wait()
        best = load_checkpoint(self.run / "best.pt", **WEIGHTS)
        if best["epoch"] != at.best_epoch:
            raise CheckpointError(f"{self.run / 'best.pt'}: expected epoch {at.best_epoch}; found {best['epoch']}")
        load_weights(self.model, best["model"], self.run / "best.pt")
        results: dict[str, Any] = {
            "align": self.config.align,
            "seed": self.config.seed,
            "epochs": at.epoch,
            "epochs_to_best": at.best_epoch,
            "best_dev_loss": at.best_loss,
            "steps": len(at.cosines),
            **_conflicts(at.cosines),
            "skipped_steps": sum(row["skipped_steps"] for row in at.history),
            "seconds": round(sum(row["seconds"] for row in at.history), 3),
            "data_digest": self.data_digest,
            "train_attacks": sorted({u.attack for u in self.train_data.utterances if not u.label}),
        }
        seen = set(results["train_attacks"])
        for split, data in (("dev", self.dev_data), ("test", self.test_data)):
            if data is not None:
                results |= {f"{split}_{k}": v for k, v in self._score(split, data, seen).items()}
        for name in self.config.test_sets:
            data = open_split(self.config, name)
            assert data is not None
            results.setdefault("test_sets", {})[name] = self._score(name, data, set())
        self._write_conflict_map()
        results["bad_files"] = len(at.bad)
        if at.bad:
            self._write("skipped.txt", "".join(f"{message}\n" for message in at.bad.values()))
        self._write("results.json", json.dumps(results, indent=2) + "\n")

    def _score(self, name: str, data: SpeechDataset, seen: set[str]) -> dict[str, Any]:
        """Write a data set's scores; returns its errors, with the attacks ``seen`` in training."""
        logits, bad = self._predict(data, f"{self.run.name} {name}")
        expect_finite(logits, bad, data)
        scores = scores_of(logits)
        if self.first:
            write_scores(self.run / f"scores_{name}.txt", Scores.of(data.utterances, scores))
        return _errors(data.utterances, scores, seen)

    def _write_conflict_map(self) -> None:
        stats = self.optimizer.stats
        names = [(name, p.numel()) for name, p in self.model.named_parameters() if p.requires_grad]
        assert stats.parameter_conflicts is not None
        rows = [
            f"{name},{size},{count},{count / stats.steps:.9g}\n"
            for (name, size), count in zip(names, stats.parameter_conflicts.tolist(), strict=True)
        ]
        self._write("parameters.csv", "parameter,size,conflicts,conflict_rate\n" + "".join(rows))

    def _predict(self, data: SpeechDataset, title: str) -> tuple[Tensor, list[tuple[int, str]]]:
        logits, bad = predict(
            self.model,
            data,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            amp=self.config.amp,
            skip_bad=self.config.skip_bad,
            progress=title if self.show else "",
        )
        self._note_bad(data, bad)
        return logits, bad

    def _note_bad(self, data: SpeechDataset, bad: list[tuple[int, str]]) -> None:
        for row, message in bad:
            if not self.config.skip_bad:
                raise AudioError(message)
            name = data.utterances[row].name
            if name not in self.at.bad:
                self.at.bad[name] = message
                self._say(f"left out: {message}")

    def _loss(self, logits: Tensor, bad: list[tuple[int, str]]) -> float | None:
        """The dev loss in float64, over the utterances that could be read; None where it is not finite."""
        labels = torch.tensor([u.label for u in self.dev_data.utterances])
        there = torch.ones(len(labels), dtype=torch.bool)
        there[[row for row, _ in bad]] = False
        weight = torch.tensor(self.config.class_weights, dtype=torch.float64)
        loss = float(functional.cross_entropy(logits[there].double(), labels[there], weight))
        return loss if math.isfinite(loss) else None

    # ---- checkpoint ----

    def _save(self) -> None:
        at = self.at
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        states = _ranks.gather((torch.get_rng_state(), cuda))
        model, optimizer = _ranks.whole(self.model.state_dict()), _ranks.whole(self.optimizer.state_dict())
        if not self.first:
            return
        save_checkpoint(
            self.run / "checkpoint.pt",
            {
                "config": _plain(self.config),
                "model": model,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
                # One entry for each process.
                "rng_cpu": [cpu for cpu, _ in states],
                "rng_cuda": [cuda for _, cuda in states],
                "data_digest": self.data_digest,
                "progress": {**vars(at), "cosines": torch.tensor(at.cosines, dtype=torch.float64)},
            },
        )

    def _restore(self, path: Path) -> None:
        keys = ("config", "model", "optimizer", "scaler", "rng_cpu", "rng_cuda", "data_digest", "progress")
        content = load_checkpoint(path, keys)
        _expect_same_run(path, content["config"], self.config)
        if content["data_digest"] != self.data_digest:
            raise CheckpointError(f"{path}: {_OTHER_DATA}")
        load_weights(self.model, content["model"], path)
        try:
            self._restore_optimizer(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.at = _Progress(**{**content["progress"], "cosines": content["progress"]["cosines"].tolist()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: expected the state of this run; found: {error}") from None
        if _ranks.rank() >= len(content["rng_cpu"]):
            self._seed_own_dropout()
            return
        torch.set_rng_state(content["rng_cpu"][_ranks.rank()])
        state = content["rng_cuda"][_ranks.rank()]
        if self.device.type == "cuda" and state is not None:
            torch.cuda.set_rng_state(state, self.device)

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: {key: _ranks.like(value, params[index]) for key, value in own.items()}
            for index, own in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": state})

    def _write_metrics(self) -> None:
        # Whole files from the checkpointed history: a kill can neither lose nor repeat a row.
        at = self.at
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in at.history))
        table = io.StringIO()
        writer = csv.DictWriter(table, list(at.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(at.history)
        self._write("metrics.csv", table.getvalue())
        steps = [f"{i},{'' if math.isnan(c) else format(c, '.9g')}\n" for i, c in enumerate(at.cosines, start=1)]
        self._write("steps.csv", "step,cosine\n" + "".join(steps))

    def _write_tensorboard(self, row: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"`tensorboard` needs `pip install tensorboard` ({error})") from None
        with SummaryWriter(str(self.run / "tensorboard")) as writer:
            for name, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, row["steps"])


# ---- parts ---------------------------------------------------------------------------------------------------------


def _conflicts(cosines: list[float]) -> dict[str, float | None]:
    """The share of steps whose views disagree, and their mean cosine; None without a finite one."""
    finite = np.array(cosines)[np.isfinite(cosines)]
    if not len(finite):
        return {"conflict_rate": None, "cosine_mean": None}
    return {"conflict_rate": float((finite < 0).mean()), "cosine_mean": float(finite.mean())}


def _errors(utterances: list[Utterance], scores: np.ndarray, seen: set[str] | None = None) -> dict[str, Any]:
    """Error measures of scores (NaN: left out); with the attacks ``seen`` in training also per attack and unseen."""
    there = np.isfinite(scores)
    labels = np.array([u.label for u in utterances], dtype=bool)
    attacks = np.array([u.attack for u in utterances])
    bonafide, spoof = scores[there & labels], scores[there & ~labels]
    if not len(bonafide) or not len(spoof):
        return {}
    found: dict[str, Any] = {"eer": float(metrics.eer(bonafide, spoof))}
    if seen is not None:
        found["min_dcf"] = float(metrics.min_dcf(bonafide, spoof))
        groups = {str(a): attacks == a for a in sorted(set(attacks[there & ~labels]))}
        found["eer_by_attack"] = {
            name: float(metrics.eer(bonafide, scores[there & ~labels & chosen])) for name, chosen in groups.items()
        }
        unseen = there & ~labels & ~np.isin(attacks, list(seen))
        if unseen.any():
            found["eer_unseen"] = float(metrics.eer(bonafide, scores[unseen]))
    return found


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON would give it back."""
    values: dict[str, Any] = json.loads(config.to_json())
    return values


def _environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        **versions(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    root = Path(__file__).resolve().parents[1]
    # Only a checkout of ours: an installed copy may lie below somebody else's repository.
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.CalledProcessError):
            found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def _keep_freed_memory() -> None:
    """Ask glibc to use freed memory again and not to hand it back to the system.

    Otherwise every step of a large detector maps its activations anew, page by page: a third of AASIST-L's time.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
        for option in (-3, -1):
            set_option(option, 2**31 - 1)


def _reusable_buffers() -> AbstractContextManager:
    """Let several losses go back through one forward of a compiled model; the first would use up what it has saved."""
    # PyTorch loads it with its compiler only.
    from torch._functorch import config

    return config.patch(donated_buffer=False)


@contextmanager
def _torch_settings(config: TrainConfig) -> Iterator[None]:
    """The run's threads, and deterministic algorithms on the CPU; both as before afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        if choose_device(config.device).type == "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)
            # It would write NaN into every new tensor, which costs time and is of use for finding defects only.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            _keep_freed_memory()
        with _reusable_buffers() if config.compile and config.path == "joint" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
