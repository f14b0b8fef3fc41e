"""Time the ops and the whole of RawBoost, backend against backend, on one device; alignment_ops.py times the others,
`weigh` and `align_`.

Nothing is timed before it agrees with the float64 reference. Beside the backends run a batched PyTorch RawBoost
(batched.py), within LnL and SSI also the convolutions of torchaudio and torch-audiomentations (where installed), and
the published NumPy code (where its file is given). Losses are printed beside wins.

    gradalign bench                                            # quick: under two minutes; the same as
    python benchmarks/run.py
    python benchmarks/run.py --threads 1 --algo 1 2 3 4 5 6 7 8 --published RawBoost.py --name cpu-one-core
    python benchmarks/run.py --device cuda --batch 1 16 64 256 --samples 16000 64600 400000 --published RawBoost.py \\
        --published-processes 16 --name h100
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import batched
import measure
import numpy as np
import shapes
import torch
from measure import Contender
from torch import Tensor

import gradalign as ga
from gradalign import _dispatch, reference
from gradalign.cli import Parser

BASELINE, PUBLISHED = "batched torch", "published"
# The published code takes one utterance at a time; more of them would only lengthen a repetition.
_PUBLISHED_UTTERANCES = 4
# Float32 values alive per sample and filter in a PyTorch version; larger workloads are left out on the CPU.
_LARGEST_CPU_SAMPLES = 64 * 64600
# What is printed: one line for each contender.
_LINE = "{:<14} {:<32} {:<21} {:>10} {:>22} {:>10} {:>10} {:>8} {:>8} {:>8}"
_HEADINGS = ("op", "workload", "backend", "median ms", "20% to 80%", "cpu ms", "x fastest", "GB/s", "TFLOP/s", "MiB")


# ---- the published code ----


def load_published(path: Path) -> ModuleType:
    """Import the published RawBoost.py from where it lies."""
    spec = importlib.util.spec_from_file_location("published_rawboost", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"--published must name the published RawBoost.py; found {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_rawboost(module: ModuleType, x: np.ndarray, config: ga.RawBoostConfig) -> np.ndarray:
    """Run the published functions on one utterance, in the published order."""
    c = config
    notches = (c.n_bands, c.min_f, c.max_f, c.min_bw, c.max_bw, c.min_coeff, c.max_coeff, c.min_g, c.max_g)

    def lnl(y: np.ndarray) -> np.ndarray:
        return module.LnL_convolutive_noise(y, c.n_f, *notches, c.min_bias, c.max_bias, c.sample_rate)

    def isd(y: np.ndarray) -> np.ndarray:
        return module.ISD_additive_noise(y, c.p, c.g_sd)

    def ssi(y: np.ndarray) -> np.ndarray:
        return module.SSI_additive_noise(y, c.snr_min, c.snr_max, *notches, c.sample_rate)

    if c.algo == 8:
        return module.normWav(lnl(x) + isd(x), 0)
    run = {"lnl": lnl, "isd": isd, "ssi": ssi}
    for step in reference.STEPS[c.algo]:
        x = run[step](x)
    return x


_worker: ModuleType


def _start_worker(path: Path) -> None:
    global _worker
    # int() of a one-element array: deprecated, and an error from NumPy 2.4 on.
    warnings.simplefilter("ignore", DeprecationWarning)
    _worker = load_published(path)


def _work(x: np.ndarray, config: ga.RawBoostConfig) -> None:
    published_rawboost(_worker, x, config)


class Published:
    """The published code as a contender, in this process or spread over several."""

    def __init__(self, path: Path, processes: int) -> None:
        warnings.simplefilter("ignore", DeprecationWarning)
        self.module, self.processes = load_published(path), processes
        self.pool = None
        if processes > 1:
            # One thread in each process, read as NumPy's BLAS starts: else they would get in each other's way.
            os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
            self.pool = concurrent.futures.ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), _start_worker, (path,)
            )

    def why_not(self) -> str:
        """Return why the published code fails here, empty when it works."""
        try:
            found = published_rawboost(self.module, np.full(2000, 0.1, np.float32), ga.RawBoostConfig(algo=4))
        except TypeError as error:
            return f"fails on NumPy {np.__version__}: {error}"
        return "" if np.isfinite(found).all() else "yields values that are not finite"

    def contender(self, config: ga.RawBoostConfig, batch: int, samples: int) -> Contender:
        """Return the contender for one workload."""
        count = min(batch, _PUBLISHED_UTTERANCES * self.processes)
        utterances = list(shapes.wave(count, samples, torch.device("cpu"), 0).numpy())

        def run(i: int) -> None:
            if self.pool is None:
                for x in utterances:
                    published_rawboost(self.module, x, config)
            else:
                list(self.pool.map(_work, utterances, [config] * count))

        return Contender(PUBLISHED, run, share=count / batch)


# ---- workloads ----


def backends_for(op: _dispatch.Op, args: tuple, wanted: list[str]) -> list[str]:
    """Name the wanted backends that take these arguments."""
    return [name for name in _dispatch.BACKENDS if name in wanted and not op.why_not(name, *args)]


def _results(op: str, args: tuple, result: Any) -> Any:
    return torch.cat([g.reshape(-1) for g in args[0]]) if op == "combine_" else result


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widen, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


def library(op: str, fir: Callable[[Tensor, Tensor], Tensor]) -> Callable[[tuple, bool], Tensor]:
    """Return LnL or SSI around a library's convolution: (the op's arguments, as the reference draws) -> result."""
    if op == "lnl":
        return lambda args, as_reference: batched.lnl(args[0], args[1], fir)

    def ssi(args: tuple, as_reference: bool) -> Tensor:
        x, filters, _, seeds, _, _, low, high = args
        if as_reference:
            noise, snr_db = reference.ssi_noise(seeds, x.shape[1]), reference.ssi_snr_db(seeds, low, high)
        else:
            noise, snr_db = torch.randn_like(x), low + (high - low) * torch.rand(len(x), device=x.device)
        return batched.ssi(x, filters, noise, snr_db, fir)

    return ssi


class Bench(measure.Bench):
    """Runs the comparisons of one session and collects their rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.firs = {}
        for label, fir in batched.FIRS.items():
            try:
                fir(torch.ones(1, 1, 8), torch.ones(1, 1, 3))
                self.firs[label] = fir
            except ImportError:
                self.skip(f"{label}: pip install {label}")
        self.published: Published | None = None
        if options.published is None:
            self.skip("the published NumPy code: give its file with --published PATH/RawBoost.py")
        else:
            published = Published(options.published, options.published_processes)
            why_not = published.why_not()
            if why_not:
                self.skip(f"the published NumPy code: {why_not}")
            else:
                self.published = published

    def passes(self, label: str, error: float) -> bool:
        """Is the error within the tolerance table? A contender that fails is not timed, and the run fails."""
        if error <= measure.TOLERANCE:
            return True
        self.failed.append(f"{label}: relative error {error:.2g}, allowed {measure.TOLERANCE:g}")
        print(f"WRONG, not timed: {self.failed[-1]}", flush=True)
        return False

    def compare(
        self,
        what: str,
        workload: dict[str, Any],
        contenders: list[Contender],
        errors: dict[str, float],
        work: shapes.Work,
        units: int,
        sets: int,
        ours: list[str],
    ) -> None:
        """Time contenders side by side; ``units`` are what the time is shown per (utterances, or 1)."""
        o = self.options
        times = measure.interleave(contenders, self.device, sets, o.rounds, o.seconds)
        floor = max(
            work.bytes / self.ceilings["copy_gb_per_s"] / 1e9, work.flop / self.ceilings["fp32_tflop_per_s"] / 1e12
        )
        for contender in contenders:
            found = times[contender.name]
            # Processes of a pool are not on this process's CPU clock.
            has_cpu = self.device.type == "cpu" and not (contender.name == PUBLISHED and o.published_processes > 1)
            wall = measure.spread(found.wall)
            row = {
                "op": what,
                "contender": contender.name,
                **workload,
                "timer": found.timer,
                "repetitions": len(found.wall),
                "wall_ms": measure.spread(found.wall, 1e3),
                "cpu_ms": measure.spread(found.cpu, 1e3) if has_cpu else None,
                "wall_ms_per_unit": float(f"{wall['median'] * 1e3 / units:.4g}"),
                "gb_per_s": float(f"{work.bytes / wall['median'] / 1e9:.4g}"),
                "direct_form_tflop_per_s": float(f"{work.flop / wall['median'] / 1e12:.4g}"),
                "floor_ms": float(f"{floor * 1e3:.4g}"),
                "floor_share": float(f"{floor / wall['median']:.4g}"),
                "peak_mib": None
                if contender.name == PUBLISHED
                else round(measure.peak_bytes(functools.partial(contender.run, 0), self.device) / 2**20, 2),
                "relative_error": errors.get(contender.name),
            }
            self.rows.append(row)
        fastest_other = [c.name for c in contenders if c.name not in ours]
        for name in ours:
            for other in fastest_other:
                comparison = {
                    "op": what,
                    **workload,
                    "ours": name,
                    "against": other,
                    "times_faster_wall": measure.ratio(times, other, name),
                }
                if self.device.type == "cpu" and not (other == PUBLISHED and o.published_processes > 1):
                    comparison["times_faster_cpu"] = measure.ratio(times, other, name, "cpu")
                self.comparisons.append(comparison)
        self.show(what, workload, len(contenders))

    def show(self, what: str, workload: dict[str, Any], count: int) -> None:
        """Print the newest rows, fastest first."""
        size = " ".join(f"{k}={v}" for k, v in workload.items())
        newest = sorted(self.rows[-count:], key=lambda row: row["wall_ms"]["median"])
        best = newest[0]["wall_ms"]["median"]
        for row in newest:
            wall = row["wall_ms"]
            middle = f"{wall['p20']:.3f} to {wall['p80']:.3f}"
            cpu = f"{row['cpu_ms']['median']:.3f}" if row["cpu_ms"] else ""
            memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
            rates = f"{row['gb_per_s']:.2f}", f"{row['direct_form_tflop_per_s']:.3f}"
            slower = f"{wall['median'] / best:.2f}"
            print(
                _LINE.format(what, size, row["contender"], f"{wall['median']:.3f}", middle, cpu, slower, *rates, memory)
            )
        sys.stdout.flush()

    # ---- the three kinds of workload ----

    def wave_op(self, name: str, batch: int, samples: int) -> None:
        """Compare an op's backends on one batch."""
        op = _dispatch.ops()[name]
        work = shapes.wave_work(name, batch, samples)
        sets = measure.num_sets(work.bytes, self.device)
        args = [shapes.arguments(name, batch, samples, self.device, i) for i in range(sets)]
        others = {label: library(name, fir) for label, fir in self.firs.items()} if name in ("lnl", "ssi") else {}
        self.op(op, args, {"batch": batch, "samples": samples}, work, batch, [0, batch - 1], others)

    def gradient_op(self, name: str, parameters: str) -> None:
        """Compare the backends of gram or combine_ on one model's gradients."""
        op, sizes = _dispatch.ops()[name], shapes.parameter_shapes(parameters)
        count = sum(size.numel() for size in sizes)
        work = shapes.gradient_work(name, count, 2)
        sets = measure.num_sets(work.bytes, self.device)
        args: list[tuple] = []
        for i in range(sets):
            first, second = shapes.gradients(sizes, 2, self.device, i)
            if name == "gram":
                args.append(([*first, *second], 2, [0] * len(sizes), 1))
            else:
                weights = torch.tensor([[0.6, 0.4]], dtype=torch.float64, device=self.device)
                args.append((first, second, weights, [0] * len(sizes)))
        self.op(op, args, {"parameters": parameters, "paths": 2}, work, 1, None)

    def op(
        self,
        op: _dispatch.Op,
        args: list[tuple],
        workload: dict[str, Any],
        work: shapes.Work,
        units: int,
        rows: list[int] | None,
        others: dict[str, Callable[[tuple, bool], Tensor]] | None = None,
    ) -> None:
        """Gate an op's backends on ``rows`` of the batch (None: on everything), then time those that pass.

        ``others`` do the same without gradalign: (arguments, whether with the reference's random numbers) -> result.
        """
        contenders, errors = [], {}
        few = args[0] if rows is None else tuple(shapes.rows(value, units, rows) for value in args[0])
        wide = _widen(few)
        with ga.use_backends("reference"):
            expected = _results(op.name, wide, op(*wide))
        for name in backends_for(op, args[0], self.options.backends):

            def run(i: int, name: str = name) -> Any:
                with ga.use_backends(name):
                    return op(*args[i])

            if op.name == "combine_":
                copies = ([g.clone() for g in args[0][0]], *args[0][1:])
                with ga.use_backends(name):
                    op(*copies)
                found = _results(op.name, copies, None)
            else:
                found = run(0)
            if rows is not None:
                found = _take(found, rows)
            errors[name] = measure.worst_error(found, expected)
            if self.passes(f"{op.name} {name} {workload}", errors[name]):
                contenders.append(Contender(name, run, capturable=name in ("triton", "cuda")))
        ours = [c.name for c in contenders if c.name != "reference"]
        for label, call in (others or {}).items():
            errors[label] = measure.worst_error(call(few, True), expected)
            if self.passes(f"{op.name} {label} {workload}", errors[label]):
                contenders.append(
                    Contender(label, lambda i, call=call: call(args[i], False), capturable=self.device.type == "cuda")
                )
        if contenders:
            sets = len(args)
            self.compare(op.name, workload, contenders, errors, work, units, sets, ours)

    def rawboost(self, algo: int, batch: int, samples: int) -> None:
        """Compare whole augmentations, from seeds to waveforms."""
        workload = {"batch": batch, "samples": samples, "algo": algo}
        boost, device = ga.RawBoost(algo=algo), self.device
        config, work = boost.config, shapes.wave_work("rawboost", batch, samples, algo)
        sets = measure.num_sets(work.bytes, device)
        waves = [shapes.wave(batch, samples, device, i) for i in range(sets)]
        seeds = [shapes.seeds(batch, device, i) for i in range(sets)]
        rows = [0, batch - 1]
        wide, few = waves[0][rows].cpu().double(), seeds[0][rows].cpu()
        with ga.use_backends("reference"):
            draws = boost.draw(few, samples)
            expected = boost.apply(wide, draws)
        contenders, errors = [], {}
        if self.published is not None:
            contenders.append(self.published.contender(config, batch, samples))

        def new_seeds(i: int) -> None:
            # The work depends on the draws: no repetition sees the last one's.
            seeds[i] += batch

        args = shapes.arguments("lnl", 1, 16, device, 0)
        for name in backends_for(_dispatch.ops()["lnl"], args, self.options.backends):

            def run(i: int, name: str = name) -> Tensor:
                with ga.use_backends(name):
                    return boost(waves[i], seeds=seeds[i])

            errors[name] = measure.worst_error(_take(run(0), rows), expected)
            if self.passes(f"rawboost {name} {workload}", errors[name]):
                contenders.append(Contender(name, run, new_seeds, capturable=name in ("triton", "cuda")))
        narrow = batched.apply(config, wide.float(), draws)
        errors[BASELINE] = measure.worst_error(narrow, expected)
        if self.passes(f"rawboost {BASELINE} {workload}", errors[BASELINE]):
            contenders.append(
                Contender(BASELINE, lambda i: batched.rawboost(config, waves[i]), capturable=device.type == "cuda")
            )
        ours = [c.name for c in contenders if c.name not in (BASELINE, PUBLISHED, "reference")]
        self.compare("rawboost", workload, contenders, errors, work, batch, sets, ours)

    def goals(self) -> list[dict[str, Any]]:
        """Return the figures the project promises, as far as this run measured them."""
        if self.device.type != "cpu":
            return self.device_goals()
        one_core = torch.get_num_threads() == 1 and self.options.published_processes == 1
        text = "cpp RawBoost algorithm 4 against the published NumPy code, one core, T = 64600, times faster, {} clock"
        goals = []
        for clock in measure.clocks(self.device):
            found = self.times_faster("cpp", PUBLISHED, clock=clock) if one_core else None
            goals.append(measure.goal(text.format(clock), found, 20, at_least=True))
        return goals

    def device_goals(self) -> list[dict[str, Any]]:
        """Return the goals for one H100 at B = 64, T = 64600, algorithm 4."""
        at = {"op": "rawboost", "algo": 4, "batch": 64, "samples": 64600}
        chosen = [row for row in self.rows if at.items() <= row.items() and row["contender"] in ("cuda", "triton")]
        name, fastest = "", None
        if chosen:
            best = min(chosen, key=lambda row: row["wall_ms"]["median"])
            name, fastest = best["contender"], best["wall_ms"]["median"]
        all_cores = self.times_faster(name, PUBLISHED, 64) if self.options.published_processes > 1 else None
        on_gpu = self.times_faster(name, BASELINE, 64)
        return [
            measure.goal("RawBoost algorithm 4, 64 x 64600, ms", fastest, 0.20, at_least=False),
            measure.goal("against batched PyTorch on the same GPU, times faster", on_gpu, 10, at_least=True),
            measure.goal("against the published code on all cores, times faster", all_cores, 500, at_least=True),
        ]

    def times_faster(self, ours: str, against: str, batch: int | None = None, clock: str = "wall") -> float | None:
        """Return the median ratio for algorithm 4 at T = 64600, at the largest batch or the given one."""
        at = {"op": "rawboost", "algo": 4, "samples": 64600, "ours": ours, "against": against}
        chosen = [c for c in self.comparisons if at.items() <= c.items() and batch in (None, c["batch"])]
        return max(chosen, key=lambda c: c["batch"])[f"times_faster_{clock}"]["median"] if chosen else None


def _take(value: Any, rows: list[int]) -> Any:
    return value[rows] if isinstance(value, Tensor) else tuple(v[rows] for v in value)


def workloads(options: argparse.Namespace) -> Iterator[tuple[str, tuple]]:
    """Yield the chosen (method of Bench, arguments)."""
    for samples in options.samples:
        for batch in options.batch:
            if "rawboost" in options.ops:
                for algo in options.algo:
                    yield "rawboost", (algo, batch, samples)
            for name in shapes.WAVE_OPS:
                if name in options.ops:
                    yield "wave_op", (name, batch, samples)
    for name in shapes.GRADIENT_OPS:
        if name in options.ops:
            for parameters in options.parameters:
                yield "gradient_op", (name, parameters)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every_op = ["rawboost", *shapes.WAVE_OPS, *shapes.GRADIENT_OPS]
    parser.add_argument("--ops", nargs="+", choices=every_op, default=every_op, help="default: all")
    parser.add_argument("--backends", nargs="+", choices=_dispatch.BACKENDS, default=list(_dispatch.BACKENDS))
    parser.add_argument("--batch", nargs="+", type=int, default=[16], help="utterances (default 16)")
    parser.add_argument("--samples", nargs="+", type=int, default=[64600], help="per utterance (default 64600)")
    parser.add_argument("--algo", nargs="+", type=int, choices=shapes.ALGORITHMS, default=[4], help="default 4")
    parser.add_argument("--parameters", nargs="+", choices=shapes.PARAMETER_LISTS, default=["aasist", "xlsr-300m/4"])
    parser.add_argument("--published", type=Path, help="the published RawBoost.py")
    parser.add_argument("--published-processes", type=int, default=1, help="spread the published code (default 1)")
    measure.add_common_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen comparisons; return 1 when a result was wrong."""
    options = parse(arguments)
    measure.set_threads(options.threads)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the published code draws from NumPy's global generator
    bench = Bench(options)
    environment = bench.environment
    copy, product = (bench.ceilings[key] for key in ("copy_gb_per_s", "fp32_tflop_per_s"))
    print(
        f"{environment['device']}, {environment['threads']} threads, load {environment['load_average'][0]}; "
        f"a copy {copy:g} GB/s, a float32 product {product:g} TFLOP/s\n\n{_LINE.format(*_HEADINGS)}"
    )

    for kind, details in workloads(options):
        if kind != "gradient_op" and options.device.type == "cpu" and details[-2] * details[-1] > _LARGEST_CPU_SAMPLES:
            bench.skip(f"{kind} {details}: PyTorch's versions need over 10 GB for it")
            continue
        run: Callable[..., None] = getattr(bench, kind)
        run(*details)
        # Each time: a run that is stopped keeps what it has measured.
        measure.save(bench.result())
    for c in bench.comparisons:
        if c["against"] != "reference" and c["times_faster_wall"]["median"] < 1:
            print(
                f"loss: {c['ours']} is slower than {c['against']}: {c['times_faster_wall']['median']:.2f}x at {c['op']}"
            )
    return measure.finish(bench.result())


if __name__ == "__main__":
    sys.exit(main())
