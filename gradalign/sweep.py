"""Many runs at once: methods x seeds, each in its own process, with one readable display over all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gradalign._errors import ConfigError, GradalignError
from gradalign._parts import open_split
from gradalign.config import TrainConfig
from gradalign.trainer import finished, train


def sweep(
    config: TrainConfig, methods: Sequence[str], seeds: Sequence[int], jobs: int = 1, progress: bool = True
) -> list[Path]:
    """Train every method from every seed; finished runs are left as they are, unfinished ones go on.

    Seeds come first, so that a sweep that is stopped early holds every method for the seeds it has.

    Args:
        config: all other settings; ``align`` and ``seed`` are replaced. With ``threads`` 0 each run gets an equal share
            of the cores.
        methods: of `gradalign.config.METHODS`.
        seeds: at least one.
        jobs: runs at the same time.
        progress: show progress on stderr.

    Returns:
        The run folders, in the order of methods x seeds.

    Raises:
        ConfigError: for an unknown method, or options of one method given to several.
        AudioError: for audio files that are not there, unless ``skip_bad``; those of ``test_sets`` too.
        GradalignError: naming the runs that failed and why; the others are finished first. With one job, the run's own
            error.
    """
    given: dict[str, Sequence[Any]] = {"methods": methods, "seeds": seeds}
    for name, values in given.items():
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"`{name}` must name at least one, each once; found {list(values)!r}")
    if jobs < 1:
        raise ConfigError(f"`jobs` must be at least 1; found {jobs}")
    if jobs > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(f"`jobs` must be 1 under torchrun, whose processes train one run together; found {jobs}")
    if config.align_options and len(methods) > 1:
        raise ConfigError(f"`align_options` belong to one method; found {len(methods)} methods")
    runs = [replace(config, align=method, seed=seed) for seed in seeds for method in methods]
    jobs = min(jobs, len(runs))
    if any(not (run.run_dir / "results.json").exists() for run in runs):
        # Errors that every run would meet are found once, here.
        for split in ("train", "dev", "test", *config.test_sets):
            open_split(config, split)
    if jobs == 1:
        for run in runs:
            train(run, progress)
    else:
        threads = config.threads or max(1, len(os.sched_getaffinity(0)) // jobs)
        _Sweep([replace(run, threads=threads) for run in runs if not finished(run)], jobs, progress).finish()
    return [replace(config, align=method, seed=seed).run_dir for method in methods for seed in seeds]


class _Sweep:
    def __init__(self, runs: list[TrainConfig], jobs: int, progress: bool) -> None:
        self.runs, self.jobs, self.show = runs, jobs, progress
        self.failed: dict[str, str] = {}
        self.processes: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def finish(self) -> None:
        from tqdm import tqdm

        if not self.runs:
            return
        width = max(len(run.run_dir.name) for run in self.runs)
        with (
            tqdm(
                total=sum(run.epochs for run in self.runs),
                desc=f"{len(self.runs)} runs, {self.jobs} at a time",
                unit="epoch",
                disable=not self.show,
                dynamic_ncols=True,
            ) as self.bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            try:
                for _ in pool.map(lambda run: self._one(run, width), self.runs):
                    pass
            except BaseException:
                # Ctrl-C, most of all: no run may outlive the command that shows it.
                with self.lock:
                    self.stopped = True
                    for process in self.processes:
                        process.terminate()
                raise
        if self.failed:
            reasons = "; ".join(dict.fromkeys(self.failed.values()))
            names = ", ".join(self.failed)
            raise GradalignError(f"{len(self.failed)} of {len(self.runs)} runs failed ({names}): {reasons}")

    def _one(self, run: TrainConfig, width: int) -> None:
        name, done = run.run_dir.name, 0
        with self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "gradalign.sweep"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # Idle OpenMP threads of one run must not spin on the cores of another.
                env={**os.environ, "OMP_NUM_THREADS": str(run.threads), "OMP_WAIT_POLICY": "PASSIVE"},
            )
            self.processes.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # It stays open: its end tells the run that this process is no more.
            process.stdin.write(json.dumps(asdict(run)) + "\n")
            process.stdin.flush()
            problem = ""
            for line in process.stdout:
                event: dict[str, Any] = json.loads(line)
                if "row" in event:
                    row = event["row"]
                    # A resumed run reports its next epoch first.
                    self._advance(row["epoch"] - done)
                    done = row["epoch"]
                    self._say(f"{name:<{width}}  {_sentence(row, run.epochs)}")
                elif "bad" in event:
                    self._say(
                        f"{name:<{width}}  {event['bad']} bad audio files left out, see {run.run_dir / 'skipped.txt'}"
                    )
                else:
                    problem = event["error"]
            code = process.wait()
        finally:
            process.stdin.close()
            with self.lock:
                self.processes.discard(process)
        # An early stop, or a run that was finished before.
        if not self.stopped:
            self._advance(run.epochs - done)
        if code != 0 and not self.stopped:
            if not problem and code < 0:
                problem = f"ended by {signal.Signals(-code).name}; the same command goes on from its last checkpoint"
            self.failed[name] = problem or f"ended with exit code {code}"
            self._say(f"{name:<{width}}  failed: {self.failed[name]}")

    def _advance(self, epochs: int) -> None:
        with self.lock:
            self.bar.update(epochs)

    def _say(self, text: str) -> None:
        if self.show:
            with self.lock:
                self.bar.write(text, file=sys.stderr)


def _sentence(row: dict[str, Any], epochs: int) -> str:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  train loss {number('train_loss', '.4f')}  "
        f"dev loss {number('dev_loss', '.4f')}  dev EER {number('dev_eer', '6.2%')}  "
        f"in conflict {number('conflict_rate', '4.0%')}  {row['seconds']:.0f} s"
    )


def _child() -> int:
    """One run of a sweep: its configuration comes on stdin, events leave as JSON lines on stdout."""
    # Ctrl-C is the parent's: it ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = TrainConfig.from_dict(json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever a library prints must not mix with the events.
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    try:
        run = train(config, progress=False, on_epoch=lambda row: tell(row=row))
    except Exception as error:
        if os.environ.get("GRADALIGN_DEBUG") == "1":
            raise
        told = isinstance(error, (ValueError, OSError, ImportError))
        tell(error=" ".join((str(error) if told else f"{type(error).__name__}: {error}").split()))
        return 1
    bad = json.loads((run / "results.json").read_text(encoding="utf-8"))["bad_files"]
    if bad:
        tell(bad=bad)
    return 0


def _die_with_parent() -> None:
    # Not sys.stdin.read(), which holds its buffer's lock: a worker process forked meanwhile closes sys.stdin, and would
    # wait for the lock for ever.
    while os.read(0, 4096):
        pass
    # Nothing to tidy up: a run may be killed at any point.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_child())
