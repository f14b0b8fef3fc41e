"""What decides a training run: `TrainConfig`, and how it is read from a file and the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from gradalign import alignment
from gradalign._errors import ConfigError
from gradalign._files import read_json
from gradalign.data import datasets
from gradalign.data.protocol import read_text

METHODS = tuple(alignment.METHODS)
"""What ``align`` can be; ``none`` and ``mean`` are plain training on the mean of both views' losses."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Data are either a data set (``dataset`` and the folder ``data``) or one protocol and one audio folder per split.
    A file for `gradalign train` may also give lists of ``align`` and ``seed`` (a run for each), ``jobs``, and the data
    set as ``data: {name: ..., root: ...}``: see `read_sweep`.

    Attributes:
        dataset: name of a data set in `gradalign.data.datasets`. "corpus" is the layout that `gradalign corpus build`
            writes, ``protocols/{train,dev,test}.txt`` and ``flac/<utterance>.flac``.
        data: folder of the data set, the file of "csv", or a folder that `gradalign pack` wrote, of any data set; None:
            the six paths below.
        test_sets: further data sets to score at the end: from a name for it, other than train, dev and test, to
            ``dataset``, ``data`` and, where it is not "test", ``subset``.
        train_protocol, dev_protocol, test_protocol: lines `speaker utterance - attack label`; the test split may be
            missing.
        train_audio, dev_audio, test_audio: folder of each split's audio files, named by utterance.
        out: folder of the runs; the run's own folder is ``out/<align>-seed<seed>``.
        align: none | pcgrad | gradvac | cagrad | another of `METHODS`.
        align_options: keywords of the method (``beta`` of GradVac, ``c`` of CAGrad, ...).
        path: split (one view after the other: less work and half the memory) | joint (both in one batch, as published).
        scope: model (one Gram matrix, as published) | parameter (one for each parameter tensor).
        seed: decides initial weights, order, crops and augmentation.
        detector: name in `gradalign.detectors`.
        detector_options: keywords of the detector.
        algo: RawBoost algorithm 0..8 of the augmented view.
        views: what the paths see, two or more: "clean", "rawboost" (by ``algo``), "rawboost:5" (by another), or
            "module:function" for a callable (wave [B, T], seeds int64 [B]) -> wave, its folder in ``PYTHONPATH``.
        rawboost: further `RawBoostConfig` parameters by name.
        sample_rate: of the detector's input, Hz.
        resample: convert audio of another sample rate; otherwise such a file is an error.
        num_samples: length of the detector's input; longer audio is cropped, shorter repeated.
        crop: random | start: where longer training audio is cropped (dev and test: always at its start).
        batch_size: utterances in a step, over all processes; each is seen in every view.
        shard: under torchrun, share weights, gradients and the optimizer's state out over the processes too (FSDP2),
            not the batch alone.
        accumulate: parts in which a step's batch goes through the detector, one after the other, to save memory.
        epochs: at most this many.
        patience: stop after this many epochs without a lower dev loss; 0: never.
        average_best: score with the mean weights of so many epochs with the lowest dev losses.
        optimizer: adam | adamw | sgd (momentum 0.9).
        lr, weight_decay: of the optimizer.
        class_weights: of the cross-entropy, [spoof, bona fide]; the default is for nine spoofed to one bona fide.
        amp: off | bf16 | fp16 (with loss scaling): the type of the forward pass under autocast.
        compile: compile the detector with torch.compile.
        device: as PyTorch names it, or auto (a GPU where there is one).
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        num_workers: processes that read audio ahead; 0 reads in the training process.
        cache_mb: memory for decoded training audio, and as much again for dev audio, so that files are decoded once;
            without effect where num_workers > 0.
        checkpoint_steps: write a checkpoint every so many steps too, not only at the end of an epoch; 0: only there.
        tensorboard: write the metrics for TensorBoard too, into the run's folder.
        skip_bad: leave out and list audio files that cannot be read, instead of stopping.
    """

    data: str | None = None
    dataset: str = "corpus"
    test_sets: dict[str, Any] = field(default_factory=dict)
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
    views: list[str] = field(default_factory=lambda: ["clean", "rawboost"])
    rawboost: dict[str, Any] = field(default_factory=dict)
    sample_rate: int = 16000
    resample: bool = False
    num_samples: int = 64600
    crop: str = "random"
    batch_size: int = 24
    shard: bool = False
    accumulate: int = 1
    epochs: int = 50
    patience: int = 7
    average_best: int = 1
    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    class_weights: tuple[float, float] = (0.1, 0.9)
    amp: str = "off"
    compile: bool = False
    device: str = "auto"
    threads: int = 0
    num_workers: int = 0
    cache_mb: int = 1024
    checkpoint_steps: int = 0
    tensorboard: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        choices = {
            "align": METHODS,
            "dataset": datasets.names(),
            "path": ("split", "joint"),
            "scope": ("model", "parameter"),
            "crop": ("random", "start"),
            "optimizer": ("adam", "adamw", "sgd"),
            "amp": ("off", "bf16", "fp16"),
        }
        for f in fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if value is None and kind.endswith("None"):
                continue
            is_right, expected = _KINDS[kind.removesuffix(" | None")]
            _expect(is_right(value), f.name, expected, value)
            if kind == "float":
                object.__setattr__(self, f.name, float(value))
            elif kind == "tuple[float, float]":
                object.__setattr__(self, f.name, tuple(map(float, value)))
            if f.name in choices:
                _expect(value in choices[f.name], f.name, "one of " + ", ".join(choices[f.name]), value)
        for name in ("sample_rate", "num_samples", "batch_size", "epochs", "accumulate", "average_best"):
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("seed", "patience", "threads", "num_workers", "cache_mb", "checkpoint_steps"):
            _expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _expect(0 <= self.algo <= 8, "algo", "one of 0..8", self.algo)
        _expect(len(self.views) >= 2, "views", "at least two", self.views)
        _expect(
            self.batch_size % self.accumulate == 0, "accumulate", f"a divisor of {self.batch_size}", self.accumulate
        )
        _expect(not self.shard or self.amp != "fp16", "amp", "off or bf16 with `shard`", self.amp)
        for name, test in self.test_sets.items():
            ok = isinstance(test, dict) and {"dataset", "data"} <= set(test) <= {"dataset", "data", "subset"}
            ok = ok and all(isinstance(value, str) for value in test.values())
            _expect(ok, f"test_sets.{name}", "a section with dataset, data and perhaps subset", test)
            # Each has a score file of its name beside the run's own.
            ok = "/" not in name and name not in ("train", "dev", "test")
            _expect(ok, "test_sets", "names without a slash, other than train, dev and test", name)

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
        return cls.from_dict(read_json(path, ConfigError), str(path))

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.out) / f"{self.align}-seed{self.seed}"


# ---- files and overrides -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One configuration, and the methods and seeds with which it is trained.

    Attributes:
        config: all settings; its ``align`` and ``seed`` are the first of the lists.
        methods, seeds: one run for each combination.
        jobs: runs at the same time.
    """

    config: TrainConfig
    methods: list[str]
    seeds: list[int]
    jobs: int = 1


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a YAML (or JSON) file of settings by the names of `TrainConfig`.

    ``align`` and ``seed`` may be lists, ``jobs`` says how many runs go on at the same time, and the section ``data``
    may hold the data set's ``name`` and ``root``.

    Args:
        path: the file.
        overrides: ``key=value`` each, the value in YAML; a dotted key reaches into a section (``data.root=/data``).

    Raises:
        ConfigError: naming the file and the setting, with what was expected and found.
        DataError: when the file is not there, or no text.
        ImportError: without PyYAML.
    """
    values = _parse_yaml(read_text(Path(path), "configuration file"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings by name; found {type(values).__name__}")
    if isinstance(values.get("data"), str):
        values["data"] = {"root": values["data"]}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value; found {override!r}")
        *sections, name = {"data": "data.root", "dataset": "data.name"}.get(key, key).split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{override}: expected `{section}` to be a section; found {target!r}")
        target[name] = _parse_yaml(text, override)
    if values.get("amp") is False:
        # YAML 1.1 takes `off` for false.
        values["amp"] = "off"
    source = values.pop("data", {})
    if not isinstance(source, dict):
        raise ConfigError(f"{path}: `data` must be a folder, or a section with name and root; found {source!r}")
    if set(source) - {"name", "root"}:
        raise ConfigError(f"{path}: `data` must hold name and root; found {', '.join(map(str, source))}")
    values |= {ours: source[name] for name, ours in (("name", "dataset"), ("root", "data")) if name in source}
    methods, seeds, jobs = values.pop("align", "pcgrad"), values.pop("seed", 0), values.pop("jobs", 1)
    methods, seeds = ([v] if not isinstance(v, list) else v for v in (methods, seeds))
    if not methods or not seeds or not isinstance(jobs, int):
        raise ConfigError(
            f"{path}: `align` and `seed` must name at least one each, `jobs` a number; found {methods}, {seeds}, {jobs}"
        )
    # Each of them: what is wrong with the last is said with the file's name too.
    configs = [TrainConfig.from_dict({**values, "align": m, "seed": s}, str(path)) for m, s in product(methods, seeds)]
    return Sweep(configs[0], methods, seeds, jobs)


def _parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds; ConfigError, naming its ``source``, where it is none or names a key twice."""
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{source}: reading it needs `pip install '.[train]'` in a checkout of gradalign") from None

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            # PyYAML would take the last of several. Here, a section that is merged does not hold what it merges yet.
            node = super().compose_mapping_node(anchor)
            seen: dict[str, yaml.Node] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (first := seen.setdefault(key.value, key)) is not key:
                    line, before = key.start_mark.line + 1, first.start_mark.line + 1
                    raise ConfigError(
                        f"{source}:{line}: expected each key once; found {key.value!r} again (see line {before})"
                    )
            return node

    # YAML 1.1 takes 1e-6 for a string; nobody who writes a learning rate does.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: expected YAML; found: {' '.join(str(error).split())}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# By the type of a setting: whether a value is of it, and what it is called.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (lambda value: _is_number(value) and value >= 0, "a finite number, 0 or above"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "tuple[float, float]": (
        lambda value: (
            isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(v) and v > 0 for v in value)
        ),
        "two numbers above 0",
    ),
    "list[str]": (lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of names"),
    "dict[str, Any]": (
        lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
        "a dict with names as keys",
    ),
}


def _expect(ok: bool, name: str, expected: str, found: Any) -> None:
    if not ok:
        raise ConfigError(f"`{name}` must be {expected}; found {found!r}")
