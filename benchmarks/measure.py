"""How everything here is timed: contenders side by side, repetition by repetition, so that a noisy machine hits all.

On the CPU each repetition reads the wall clock and the process's CPU clock (user plus system time of all its threads):
with one thread the second is the one that other processes disturb least. On a GPU a repetition is the replay of a
captured graph between two events, or a loop between two events for code that cannot be captured; its inputs are taken
in turn from enough sets that the second-level cache does not serve them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tolerances import DRAWN, max_norm_error
from torch import Tensor
from torch.autograd import DeviceType

from gradalign import _extension, info
from gradalign._files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = DRAWN[torch.float32]
# Peers add up millions of float32 products in float32: they may be less exact, but must compute the same thing.
PEER_TOLERANCE = 1e-2
# A repetition shorter than this is lost in the clock and the call.
_LEAST_SECONDS = 2e-3
_FEWEST_ROUNDS = 3


@dataclass
class Contender:
    """One way to do the work; ``run(i)`` does it on input set i, ``before(i)`` prepares that, untimed."""

    name: str
    run: Callable[[int], Any]
    before: Callable[[int], None] = lambda i: None
    # False for code that waits for the device or copies from the host: no CUDA graph can hold it.
    capturable: bool = False
    # Share of the workload that one call does.
    share: float = 1.0


@dataclass
class Times:
    """Seconds for the whole workload, one entry per repetition."""

    timer: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, 20th and 80th percentile, to four digits."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]

    found = {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}
    return {name: float(f"{scale * value:.4g}") for name, value in found.items()}


def num_sets(input_bytes: float, device: torch.device) -> int:
    """How many input sets keep the second-level cache from serving the next repetition."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, max(1, math.ceil(4 * cache / max(input_bytes, 1.0))))


def interleave(
    contenders: Sequence[Contender], device: torch.device, sets: int = 1, rounds: int = 20, seconds: float = 10.0
) -> dict[str, Times]:
    """Time the contenders in turn, up to ``rounds`` repetitions each or about ``seconds`` in all, three at least."""
    if device.type == "cuda":
        timers: dict[str, Callable[[], tuple[float, float]]] = {
            c.name: _DeviceTimer(c, device, sets) for c in contenders
        }
        times = {c.name: Times("graph" if c.capturable else "events") for c in contenders}
    else:
        timers = {c.name: _host_timer(c) for c in contenders}
        times = {c.name: Times("clock") for c in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and (time.perf_counter() - start) * (done + 1) / done > seconds:
            break
        # There and back: nobody always runs after the same neighbour, whose caches and freed memory it finds.
        for contender in contenders if done % 2 == 0 else reversed(contenders):
            wall, cpu = timers[contender.name]()
            times[contender.name].wall.append(wall / contender.share)
            times[contender.name].cpu.append(cpu / contender.share)
    return times


def _host_timer(contender: Contender) -> Callable[[], tuple[float, float]]:
    def once(calls: int) -> tuple[float, float]:
        wall = cpu = 0.0
        for _ in range(calls):
            contender.before(0)
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            contender.run(0)
            wall += time.perf_counter() - wall_start
            cpu += time.process_time() - cpu_start
        return wall / calls, cpu / calls

    # The first call allocates and plans.
    first, _ = once(1)
    calls = max(1, math.ceil(_LEAST_SECONDS / max(once(1)[0], 1e-7))) if first < _LEAST_SECONDS * 10 else 1
    return lambda: once(calls)


class _DeviceTimer:
    """Times one contender on a GPU: by replays of a graph that holds a call per input set, else call by call."""

    def __init__(self, contender: Contender, device: torch.device, sets: int) -> None:
        self.contender, self.sets = contender, sets
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # Module loading, compilation and handles.
            for i in range(max(2, sets) if contender.capturable else 2):
                contender.before(i % sets)
                contender.run(i % sets)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.next = 0
        self.graph = torch.cuda.CUDAGraph() if contender.capturable else None
        if self.graph is not None:
            with torch.cuda.graph(self.graph):
                # Results are kept, or the next call would write where the cache still holds the last one.
                self.results = [contender.run(i) for i in range(sets)]

    def __call__(self) -> tuple[float, float]:
        # A graph holds a call for each input set; other code takes the sets in turn, one in a repetition.
        chosen = list(range(self.sets)) if self.graph is not None else [self.next % self.sets]
        self.next += 1
        for i in chosen:
            self.contender.before(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self.graph is None:
            self.contender.run(chosen[0])
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(chosen), math.nan


def ratio(times: dict[str, Times], over: str, under: str, clock: str = "wall") -> dict[str, float]:
    """Spread of time(over) / time(under), repetition by repetition."""
    pairs = zip(getattr(times[over], clock), getattr(times[under], clock), strict=True)
    return spread([a / b for a, b in pairs])


def clocks(device: torch.device) -> tuple[str, ...]:
    """Name the clocks that goals are judged on: the wall's, and with one CPU thread the CPU's as well.

    A time slice given to another process counts on the first only. With several threads, waiting for one another counts
    on the second.
    """
    return ("wall", "cpu") if device.type == "cpu" and torch.get_num_threads() == 1 else ("wall",)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most device memory (on the CPU: PyTorch's allocator) in use during ``run`` beyond what was in use before.

    Buffers that a kernel keeps outside of PyTorch's allocator are not seen: the C++ kernels' scratch per thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.autograd import profiler

    # Without a GPU, a CUDA build of PyTorch would print an error about it here.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with profiler.profile(profile_memory=True) as profile:
        run()
    found = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def device_work(run: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Kernel launches, host waits and the kernels' own milliseconds of one call on a GPU; None on the CPU.

    Where the kernels' time is well below the call's, the host is what the device waits for.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        run()
        torch.cuda.synchronize(device)
    events = profiled.events()
    # Ranges that PyTorch marks on the device, an optimizer's step for one, hold kernels and the gaps between them.
    on_device = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return {
        "launches": sum("LaunchKernel" in event.name for event in events),
        # A copy to pageable host memory waits as well: PyTorch shows it as a stream synchronisation.
        "waits": sum(event.name == "cudaStreamSynchronize" for event in events),
        "kernels_ms": float(f"{sum(on_device) / 1e3:.4g}"),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured rates: GB/s of a large copy (read plus written), TFLOP/s of a float32 matrix product, and of tf32."""
    size = 1 << (28 if device.type == "cuda" else 25)
    source, target = (torch.empty(size, device=device).normal_() for _ in range(2))
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device) for _ in range(2))

    def best(run: Callable[[], Any]) -> float:
        times = interleave([Contender("it", lambda i: run())], device, rounds=9, seconds=3)["it"]
        return min(times.wall)

    found = {"copy_gb_per_s": 8 * size / best(lambda: target.copy_(source)) / 1e9}
    found["fp32_tflop_per_s"] = 2 * side**3 / best(lambda: a @ b) / 1e12
    if device.type == "cuda":
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32_tflop_per_s"] = 2 * side**3 / best(lambda: a @ b) / 1e12
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Say where, when, with what and how this process runs."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    extension, why_not = _extension.load()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *map(_short, sys.argv[1:])]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": sorted(
            line[3:] for line in _git("status", "--porcelain", "-uno").splitlines() if "/results/" not in line
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": info.versions(),
        "extension": why_not if extension is None else {k: str(v) for k, v in extension.build_info().items()},
        "clocks": "wall: time.perf_counter; cpu: time.process_time (all threads of this process); ratios are medians "
        "over interleaved repetitions",
    }


def _short(argument: str) -> str:
    """Cut an absolute path to its last two parts: where someone keeps a peer's files is nobody's business."""
    return "/".join(Path(argument).parts[-2:]) if os.path.isabs(argument) else argument


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def save(result: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json, whole or not at all; nothing for a result without a name."""
    if result["name"]:
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / f"{result['name']}.json", json.dumps(result, indent=1) + "\n")


def finish(result: dict[str, Any]) -> int:
    """Print the goals and `save`; return 1 when something was wrong."""
    print_goals(result["goals"])
    save(result)
    if result["name"]:
        print(f"wrote {RESULTS / result['name']}.json")
    return 1 if result["failed"] else 0


class Bench:
    """What a benchmark compares and collects."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.rows: list[dict[str, Any]] = []
        self.comparisons: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []
        self.environment, self.ceilings = environment(self.device), ceilings(self.device)

    def skip(self, what: str) -> None:
        """Leave something out, and say so once."""
        if what not in self.skipped:
            self.skipped.append(what)
            print(f"skipped: {what}", flush=True)

    def goals(self) -> list[dict[str, Any]]:
        """Return the promised figures."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """Return all that was found so far."""
        return {
            "name": self.options.name,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "goals": self.goals(),
            "rows": self.rows,
            "comparisons": self.comparisons,
            "skipped": self.skipped,
            "failed": self.failed,
        }


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark takes."""
    parser.add_argument("--device", type=_device, default=torch.device("cpu"), help="default cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 also binds the process to one core")
    parser.add_argument("--rounds", type=int, default=20, help="repetitions at most (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per comparison (default %(default)s)")
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")


def _device(name: str) -> torch.device:
    """Return the device of a name; a numbered GPU becomes the current one, whose stream is timed and captured."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None) -> None:
    """Use this many threads; a single one stays on one core, whose caches it then keeps."""
    if threads is None:
        return
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def worst_error(found: Any, expected: Any) -> float:
    """Largest relative error in the maximum norm over an op's results."""
    if isinstance(found, Tensor):
        return max_norm_error(found, expected)
    errors = [max_norm_error(a, b) for a, b in zip(found, expected, strict=True)]
    # Unlike Python's maximum, this one is NaN where an error is.
    return float(torch.tensor(errors, dtype=torch.float64).max())


def goal(text: str, found: float | None, limit: float, at_least: bool) -> dict[str, Any]:
    """State a promised figure, what was found, and whether it holds."""
    met = None if found is None else (found >= limit if at_least else found <= limit)
    return {"text": text, "limit": limit, "at_least": at_least, "found": found, "met": met}


def print_goals(goals: list[dict[str, Any]]) -> None:
    """Print the goals, missed ones in capitals."""
    for g in goals:
        if g["met"] is None:
            print(f"not measured: {g['text']}")
        else:
            sign = "at least" if g["at_least"] else "at most"
            verdict = "met" if g["met"] else "MISSED"
            print(f"{verdict}: {g['text']}: {g['found']:.4g} (wanted {sign} {g['limit']:g})")
