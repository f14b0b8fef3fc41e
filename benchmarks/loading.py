"""Time an epoch of both views of every utterance, from packed data and from files, against the published loader.

The published loader (data_utils.py of the checkout given with --published, imported from where it lies) decodes each
file with librosa, augments it with the published RawBoost and repeats or crops both; it runs in a PyTorch DataLoader as
its main.py has it. Ours are a DeviceLoader over a packed data set and over the files. All see the same files, batch
size and number of worker processes; no view is timed before the clean ones are the same, bit for bit. (The published
loader augments an utterance before it is cropped, ours the crop: --samples as long as the longest utterance makes the
work the same.)

The second part takes training steps that get their views from the DeviceLoader. On a CPU, what a step waits for data is
the time until they are there. On a GPU, where the host runs ahead, it is the difference to steps whose views are there
already.

    python benchmarks/loading.py corpus --threads 1 --published DPDA_CHECKOUT --name cpu-loading
    python benchmarks/loading.py --device cuda --batch 24 --workers 8 --detector aasist --steps 8 --name h100-loading
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import Contender
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from train_step import Step, load_module

import gradalign as ga
from gradalign.data import DeviceLoader, PackedDataset, SpeechDataset, collate, pack, read_dataset

PUBLISHED, FILES, PACKED = "published loader", "files", "packed"
READY, LOADED = "views there already", "packed, DeviceLoader"


def published_arguments(config: ga.RawBoostConfig) -> Namespace:
    """Return the published options with the values of a configuration."""
    c = config
    return Namespace(
        N_f=c.n_f, nBands=c.n_bands, minF=c.min_f, maxF=c.max_f, minBW=c.min_bw, maxBW=c.max_bw, minCoeff=c.min_coeff,
        maxCoeff=c.max_coeff, minG=c.min_g, maxG=c.max_g, minBiasLinNonLin=c.min_bias, maxBiasLinNonLin=c.max_bias,
        P=c.p, g_sd=c.g_sd, SNRmin=c.snr_min, SNRmax=c.snr_max,
    )  # fmt: skip


def published_dataset(checkout: Path, data: SpeechDataset, algo: int) -> Any:
    """Return the published training set over the same files, as its main.py makes it."""
    # int() of a one-element array in the published RawBoost.
    warnings.simplefilter("ignore", DeprecationWarning)
    # For its own imports.
    sys.path.insert(0, str(checkout))
    try:
        module = load_module(checkout / "data_utils.py", "published_data_utils")
    finally:
        sys.path.remove(str(checkout))
    names = [u.name for u in data.utterances]
    labels = {u.name: u.label for u in data.utterances}
    # It adds flac/ itself.
    base = f"{data.audio_dir.parent}/"
    published = module.Dataset_train(published_arguments(ga.RawBoostConfig(algo=algo)), names, labels, base, algo)
    published.cut = data.num_samples
    return published


def make_noise(folder: Path, split: str, count: int) -> Path:
    """Write noise of 1 to 6 seconds in corpus layout, where there is no speech: what is timed does not hear it."""
    import soundfile

    (folder / "protocols").mkdir(parents=True)
    (folder / "flac").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        wave = 0.1 * rng.standard_normal(rng.integers(16000, 96000))
        soundfile.write(folder / "flac" / f"u{i}.flac", wave, 16000, subtype="PCM_16")
        lines.append(f"s u{i} - {'A01 spoof' if i % 2 else '- bonafide'}\n")
    (folder / "protocols" / f"{split}.txt").write_text("".join(lines))
    return folder


class Epoch:
    """One way to go through all utterances once."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def run(self) -> None:
        """Make every batch, and read one value of each, as a step would."""
        for views in self.loader:
            float(views[1][0, 0])


def our_loader(data: Dataset, options: argparse.Namespace, boost: ga.RawBoost) -> DeviceLoader:
    """Return the DeviceLoader over a data set; on a CPU its worker processes, if any, augment."""
    on_gpu = options.device.type == "cuda"
    in_workers = options.workers > 0 and not on_gpu
    loader = DataLoader(
        data,
        options.batch,
        collate_fn=functools.partial(collate, augment=boost) if in_workers else collate,
        num_workers=options.workers,
        pin_memory=on_gpu,
        persistent_workers=options.workers > 0,
    )
    return DeviceLoader(loader, boost, device=options.device)


def gate(data: SpeechDataset, others: dict[str, Callable[[int], Tensor]]) -> list[str]:
    """Name the contenders whose clean waves are not those of the files."""
    return [
        f"{who}: utterance {i} is not that of the file"
        for who, clean in others.items()
        for i in range(0, len(data), max(1, len(data) // 16))
        if not torch.equal(clean(i), data[i].wave)
    ]


class Steps:
    """Plain dual-path training steps whose views come from an iterator, or are there already."""

    def __init__(self, options: argparse.Namespace, loader: DeviceLoader) -> None:
        torch.manual_seed(0)
        self.options, self.loader = options, loader
        model = ga.detectors.create(options.detector).to(options.device)
        clean, augmented, label, _ = next(iter(loader))
        self.ready = (clean, augmented), label
        self.step = Step(model, clean, label, torch.bfloat16 if options.autocast else None)
        self.views = self._forever()
        # Of each repetition with loaded views, the share of its time until they were there.
        self.waits: list[float] = []

    def _forever(self) -> Iterator[Any]:
        for epoch in itertools.count():
            self.loader.set_epoch(epoch)
            for clean, augmented, label, _ in self.loader:
                if len(label) == self.options.batch:
                    yield (clean, augmented), label

    def run(self, who: str) -> None:
        """Take the steps of one repetition."""
        start, waited = time.perf_counter(), 0.0
        for _ in range(self.options.steps):
            asked = time.perf_counter()
            self.step.views, self.step.labels = next(self.views) if who == LOADED else self.ready
            waited += time.perf_counter() - asked
            self.step.plain_split()
        if who == LOADED:
            self.waits.append(waited / (time.perf_counter() - start))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=Path, nargs="?", help="a folder in the layout of `gradalign corpus build` (default: noise is made)"
    )
    parser.add_argument("--published", type=Path, help="checkout of ductuantruong/dpda_ga (needs librosa)")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--utterances", type=int, default=192, help="of the epoch, at most (default %(default)s)")
    parser.add_argument(
        "--published-utterances",
        type=int,
        default=24,
        help="timed and scaled up, a batch for each worker at least (default %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=12, help="default %(default)s")
    parser.add_argument("--samples", type=int, default=66800, help="of a view (default: the published 66800)")
    parser.add_argument("--algo", type=int, default=4, help="RawBoost algorithm (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of every loader (default 0)")
    parser.add_argument("--detector", choices=ga.detectors.names(), help="time training steps with this detector")
    parser.add_argument("--autocast", action="store_true", help="run the detector in bfloat16")
    parser.add_argument("--steps", type=int, default=1, help="training steps in a repetition (default 1)")
    measure.add_common_arguments(parser)
    parser.set_defaults(seconds=60.0)
    return parser.parse_args(arguments)


class Bench:
    """Runs both parts and collects their rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.boost = options, ga.RawBoost(options.algo)
        self.rows: list[dict[str, Any]] = []
        self.comparisons: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        root = options.data or make_noise(folder / "noise", options.split, options.utterances)
        utterances = read_dataset("corpus", root, options.split)
        step = max(1, len(utterances) // options.utterances)
        utterances = utterances[::step][: options.utterances]
        # As published: crops at the start.
        self.files = SpeechDataset(utterances, root / "flac", num_samples=options.samples)
        start = time.perf_counter()
        result = pack({options.split: utterances}, folder / "packed")
        seconds = time.perf_counter() - start
        self.pack = {"utterances": result.utterances, "samples": result.samples, "seconds": round(seconds, 3)}
        print(f"packed {result.utterances} utterances, {result.samples / 16000:.0f} s of audio, in {seconds:.2f} s")
        raw = options.device.type == "cuda"
        self.packed = PackedDataset(folder / "packed", options.split, num_samples=options.samples, raw=raw)
        self.published = None
        if options.published is None:
            self.skip("the published loader: give its checkout with --published DPDA_CHECKOUT")
        else:
            try:
                self.published = published_dataset(options.published.resolve(), self.files, options.algo)
            except (ImportError, FileNotFoundError) as error:
                self.skip(f"the published loader: {error}")

    def skip(self, what: str) -> None:
        """Leave something out, and say so."""
        self.skipped.append(what)
        print(f"skipped: {what}")

    def wrong(self) -> list[str]:
        """Name what does not give the same clean views."""
        others: dict[str, Callable[[int], Tensor]] = {}
        if self.published is not None:
            published = self.published
            others[PUBLISHED] = lambda i: published[i][0]
        packed = self.packed
        if packed.raw:
            others[PACKED] = lambda i: ga.data.fit_length(packed[i].wave / 32768, self.options.samples)
        else:
            others[PACKED] = lambda i: packed[i].wave
        return gate(self.files, others)

    def epochs(self) -> float | None:
        """Time an epoch; return how many times faster packed data are than the published loader."""
        o = self.options
        contenders = []
        if self.published is not None:
            # A batch for each worker at least: else some would have nothing to do.
            count = min(max(o.published_utterances, o.batch * o.workers), len(self.files))
            loader = DataLoader(
                Subset(self.published, range(0, len(self.files), max(1, len(self.files) // count))),
                o.batch,
                num_workers=o.workers,
                persistent_workers=o.workers > 0,
            )
            share = len(loader.dataset) / len(self.files)  # type: ignore[arg-type]
            contenders.append(_contender(PUBLISHED, Epoch(loader).run, share))
        for who, data in ((FILES, self.files), (PACKED, self.packed)):
            contenders.append(_contender(who, Epoch(our_loader(data, o, self.boost)).run))
        times = measure.interleave(contenders, o.device, 1, o.rounds, o.seconds)
        workload = {"utterances": len(self.files), "batch": o.batch, "samples": o.samples, "algo": o.algo}
        self._book("loading epoch", workload, contenders, times)
        if self.published is None:
            return None
        for mine in (FILES, PACKED):
            self._compare("loading epoch", workload, times, PUBLISHED, mine)
        return float(self.comparisons[-1]["wall_ratio"]["median"])

    def steps(self) -> float | None:
        """Time training steps; return the share of their time in which they wait for data."""
        o = self.options
        if o.detector is None:
            self.skip("training steps: name a detector with --detector")
            return None
        steps = Steps(o, our_loader(self.packed, o, self.boost))
        ways = (READY, LOADED) if o.device.type == "cuda" else (LOADED,)
        contenders = [_contender(who, functools.partial(steps.run, who)) for who in ways]
        times = measure.interleave(contenders, o.device, 1, o.rounds, o.seconds)
        workload = {"detector": o.detector, "batch": o.batch, "samples": o.samples, "algo": o.algo}
        op = "training step" if o.steps == 1 else f"{o.steps} training steps"
        self._book(op, workload, contenders, times)
        if READY not in times:
            # The first repetition is not among the times either.
            wait = measure.spread(steps.waits[1:])
            self.rows[-1]["wait_share"] = wait
            print(f"share of a step until its views are there: {wait}")
            return wait["median"]
        self._compare(op, workload, times, LOADED, READY)
        return 1 - 1 / float(self.comparisons[-1]["wall_ratio"]["median"])

    def _book(
        self, op: str, workload: dict[str, Any], contenders: list[Contender], times: dict[str, measure.Times]
    ) -> None:
        o = self.options
        for contender in contenders:
            found = times[contender.name]
            # The process's own clock does not see its workers'.
            own = o.device.type == "cpu" and not o.workers
            row = {
                "op": op,
                "contender": contender.name,
                **workload,
                "workers": o.workers,
                "timer": found.timer,
                "repetitions": len(found.wall),
                "wall_ms": measure.spread(found.wall, 1e3),
                "cpu_ms": measure.spread(found.cpu, 1e3) if own else None,
            }
            self.rows.append(row)
            wall = row["wall_ms"]
            print(f"{op}: {contender.name:<22} {wall['median']:10.1f} ms [{wall['p20']:.1f}, {wall['p80']:.1f}]")

    def _compare(
        self, op: str, workload: dict[str, Any], times: dict[str, measure.Times], slower: str, faster: str
    ) -> None:
        comparison = {"op": op, **workload, "slower": slower, "faster": faster}
        comparison["wall_ratio"] = measure.ratio(times, slower, faster)
        if self.options.device.type == "cpu" and not self.options.workers:
            comparison["cpu_ratio"] = measure.ratio(times, slower, faster, "cpu")
        self.comparisons.append(comparison)
        print(f"{slower} / {faster}: {comparison['wall_ratio']} cpu {comparison.get('cpu_ratio')}")


def _contender(name: str, run: Callable[[], None], share: float = 1.0) -> Contender:
    return Contender(name, lambda i: run(), share=share)


def main(arguments: list[str] | None = None) -> int:
    """Gate, time and report; return 1 when a result was wrong."""
    options = parse(arguments)
    measure.set_threads(options.threads)
    environment = measure.environment(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        failed = bench.wrong()
        if failed:
            print("WRONG, not timed: " + "; ".join(failed))
            faster = share = None
        else:
            faster, share = bench.epochs(), bench.steps()
    goals = [
        measure.goal("epoch over packed data, times faster than the published loader", faster, 5, at_least=True),
        measure.goal("share of a training step that waits for data", share, 0.02, at_least=False),
    ]
    return measure.finish(
        {
            "name": options.name,
            "environment": environment,
            "goals": goals,
            "rows": bench.rows,
            "comparisons": bench.comparisons,
            "pack": bench.pack,
            "skipped": bench.skipped,
            "failed": failed,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
