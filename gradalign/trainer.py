"""Dual-path training: clean and RawBoost-augmented views, each with its own gradient, merged by an aligned optimizer.

Source of the scheme: Truong et al., arXiv 2509.20682. A run is reproducible bit for bit on the CPU and survives being
killed at any point: everything random is a pure function of (seed, epoch, utterance) or kept in the checkpoint, and
every file is replaced whole.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gradalign._errors import ConfigError

METHODS = ("none", "mean", "pcgrad", "gradvac", "cagrad")
"""What ``align`` can be; ``none`` is plain training on the mean of both views' losses."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Data are either a folder in corpus layout (``data``) or one protocol and one audio folder per split.

    Attributes:
        data: folder with ``protocols/{train,dev,test}.txt`` and ``flac/<utterance>.flac``, as `gradalign corpus build`
            writes it; None: the six paths below.
        train_protocol, dev_protocol, test_protocol: lines `speaker utterance - attack label`; the test split may be
            missing.
        train_audio, dev_audio, test_audio: folder of each split's audio files, named by utterance.
        out: folder of the runs; the run's own folder is ``out/<align>-seed<seed>``.
        align: none | mean | pcgrad | gradvac | cagrad.
        align_options: keywords of the method (``beta`` of GradVac, ``c`` of CAGrad, ...).
        path: split (one view after the other: less work and half the memory) | joint (both in one batch, as published).
        scope: model (one Gram matrix, as published) | parameter (one for each parameter tensor).
        seed: decides initial weights, order, crops and augmentation.
        detector: name in `gradalign.detectors`.
        detector_options: keywords of the detector.
        algo: RawBoost algorithm 0..8 of the augmented view.
        rawboost: further `RawBoostConfig` parameters by name.
        sample_rate: of the detector's input, Hz.
        resample: convert audio of another sample rate; otherwise such a file is an error.
        num_samples: length of the detector's input; longer audio is cropped, shorter repeated.
        crop: random | start: where longer training audio is cropped (dev and test: always at its start).
        batch_size: utterances in a step; each is seen in both views.
        epochs: at most this many.
        patience: stop after this many epochs without a lower dev loss; 0: never.
        optimizer: adam | adamw | sgd (momentum 0.9).
        lr, weight_decay: of the optimizer.
        class_weights: of the cross-entropy, [spoof, bona fide].
        amp: off | bf16 | fp16 (with loss scaling): the type of the forward pass under autocast.
        device: as PyTorch names it, or auto (a GPU where there is one).
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        num_workers: processes that read audio ahead; 0 reads in the training process.
        cache_mb: memory for decoded audio, so that files are decoded once; without effect where num_workers > 0.
        checkpoint_steps: write a checkpoint every so many steps too, not only at the end of an epoch; 0: only there.
        skip_bad: leave out and list audio files that cannot be read, instead of stopping.
    """

    data: str | None = None
    train_protocol: str | None = None
    dev_protocol: str | None = None
    test_protocol: str | None = None
    train_audio: str | None = None
    dev_audio: str | None = None
    test_audio: str | None = None
    out: str = "runs"
    align: str = "pcgrad"
    align_options: dict[str, Any] = field(default_factory=dict)
    path: str = "split"
    scope: str = "model"
    seed: int = 0
    detector: str = "aasist"
    detector_options: dict[str, Any] = field(default_factory=dict)
    algo: int = 4
    rawboost: dict[str, Any] = field(default_factory=dict)
    sample_rate: int = 16000
    resample: bool = False
    num_samples: int = 64600
    crop: str = "random"
    batch_size: int = 24
    epochs: int = 50
    patience: int = 7
    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    class_weights: tuple[float, float] = (0.1, 0.9)
    amp: str = "off"
    device: str = "auto"
    threads: int = 0
    num_workers: int = 0
    cache_mb: int = 1024
    checkpoint_steps: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        choices = {
            "align": METHODS,
            "path": ("split", "joint"),
            "scope": ("model", "parameter"),
            "crop": ("random", "start"),
            "optimizer": ("adam", "adamw", "sgd"),
            "amp": ("off", "bf16", "fp16"),
        }
        for f in fields(self):
            value = getattr(self, f.name)
            kind = str(f.type).removesuffix(" | None")
            if value is None and "None" in str(f.type):
                continue
            if kind.startswith("tuple"):
                ok = (
                    isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(v) and v > 0 for v in value)
                )
                _expect(ok, f.name, "two numbers above 0", value)
                object.__setattr__(self, f.name, (float(value[0]), float(value[1])))
            elif kind.startswith("dict"):
                _expect(
                    isinstance(value, dict) and all(isinstance(k, str) for k in value),
                    f.name,
                    "a dict with names as keys",
                    value,
                )
            elif kind == "bool":
                _expect(isinstance(value, bool), f.name, "true or false", value)
            elif kind == "int":
                _expect(isinstance(value, int) and not isinstance(value, bool), f.name, "a whole number", value)
            elif kind == "float":
                _expect(_is_number(value) and value >= 0, f.name, "a finite number, 0 or above", value)
                object.__setattr__(self, f.name, float(value))
            else:
                _expect(isinstance(value, str), f.name, "a string", value)
            if f.name in choices:
                _expect(value in choices[f.name], f.name, "one of " + ", ".join(choices[f.name]), value)
        for name in ("sample_rate", "num_samples", "batch_size", "epochs"):
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("seed", "patience", "threads", "num_workers", "cache_mb", "checkpoint_steps"):
            _expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _expect(0 <= self.algo <= 8, "algo", "one of 0..8", self.algo)

    def to_json(self) -> str:
        """The configuration as a JSON object, one field a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "configuration") -> TrainConfig:
        """Build from a dict; ``source`` is named in errors.

        Raises:
            ConfigError: for an unknown name, a wrong type or a value out of range.

        >>> TrainConfig.from_dict({"data": "corpus", "algo": 5}).algo
        5
        """
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(f"{source}: unknown setting {', '.join(map(repr, unknown))}; expected {', '.join(names)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """Read a file that `to_json` wrote; settings it lacks are defaults. Raises ConfigError naming the file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: expected JSON; found: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object; found {type(values).__name__}")
        return cls.from_dict(values, str(path))

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.out) / f"{self.align}-seed{self.seed}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _expect(ok: bool, name: str, expected: str, found: Any) -> None:
    if not ok:
        raise ConfigError(f"`{name}` must be {expected}; found {found!r}")


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Train one detector, or go on where a killed run stopped; returns the run's folder ``config.run_dir``.

    Args:
        config: the run.
        progress: show a progress bar and messages on stderr.

    Raises:
        GradalignError: data, audio, configuration or checkpoint are not as expected; the message names file or field.
        OSError: a file cannot be written (a full disk); the last checkpoint stays whole.
    """
    raise NotImplementedError
