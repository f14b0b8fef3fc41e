"""Compare the forms in which a GPU can compute LnL's filters, z = sum over i = 1..5 of FIR_i(x**i), all on equally many
samples: direct, overlap-save, and Toeplitz products on tensor cores in several precisions.

"lnl" is the op as a whole, with mean and norm, on the backends: "cuda" filters directly below 20480 samples and by
overlap-save from there on; "triton" filters directly, and is made to take the Toeplitz products that it has for fewer
filters as well. "lnl filters" are the filters alone, in Toeplitz forms of which the first is the Triton backend's: the
two differ by mean and norm.
Every form is timed; one outside the tolerance is marked so, since errors are compared as well. It needs a GPU:

    python benchmarks/filter_forms.py --device cuda --name h100-filter-forms
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import measure
import shapes
import torch
import triton
import triton.language as tl
from measure import Contender
from torch import Tensor

import gradalign as ga
from gradalign import ops, reference
from gradalign.kernels import launch, rawboost

# About 4.13 million samples each: just below the length of overlap-save, at it, and the field's usual length.
WORKLOADS = ((206, 20000), (201, 20480), (64, 64600))
# `filter_by_fft` in csrc/cuda/rawboost.cuh, for five filters.
_OVERLAP_SAVE_SAMPLES = 5 * 4096
DIRECT_CUDA, OVERLAP_SAVE = "direct, CUDA", "overlap-save, CUDA"
DIRECT_TRITON, TOEPLITZ_TRITON = "direct, Triton", "Toeplitz, Triton"
WHOLE, ALONE = "lnl", "lnl filters"
NUM_TAPS = ga.RawBoostConfig().num_taps
# What the Triton backend takes for one filter.
_TOEPLITZ_TILE = rawboost._tile(torch.empty(0), 1)

Filter = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A product of a [rows, depth] block of windows and a [depth, columns] block of taps per branch and step.

    ``precision`` is one of Triton's, or "split": like "tf32x3" three products of tf32, but of parts that are cut off
    instead of rounded, and without the checks for NaN and the additions between them, some 40% of the instructions.
    """

    precision: str
    rows: int
    columns: int
    depth: int
    num_warps: int

    @property
    def name(self) -> str:
        """How the form is called in results."""
        return f"Toeplitz, {self.precision}, {self.rows} x {self.columns} x {self.depth}"


# No configuration here spills; the first has the Triton backend's tile.
FORMS = (
    Form("tf32x3", 64, 32, 16, 4),
    Form("tf32x3", 64, 64, 16, 4),
    Form("bf16x3", 64, 32, 16, 4),
    Form("split", 64, 32, 16, 4),
    Form("split", 64, 64, 16, 4),
)


@triton.jit
def _upper(value):
    """The float32 value cut to the 11 bits of a tf32."""
    return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_samples", "num_tiles", "num_taps", "filters_stride"])
def toeplitz_kernel(
    x,
    filters,
    z,
    num_samples,
    num_tiles,
    num_taps,
    filters_stride,
    NUM_FILTERS: tl.constexpr,
    TAPS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (utterance, tile of ROWS * COLUMNS samples): x [B, T], filters [B, N_f, P] -> z [B, T].

    z[first + COLUMNS*r + c] = sum over i, j of x[first + 1 - reach + COLUMNS*r + j]**i * b_i[middle + reach + c - j].
    No tap is further than reach from the middle, and x is zero outside [0, T).
    """
    program = tl.program_id(0)
    b = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles) * (ROWS * COLUMNS)
    row = x + b * num_samples
    bank = filters + b * filters_stride
    reach = rawboost._reach(bank, num_taps, NUM_FILTERS, TAPS_BLOCK)
    start = first + 1 - reach
    place = COLUMNS * tl.arange(0, ROWS)[:, None] + tl.arange(0, DEPTH)[None, :]
    tap = tl.arange(0, COLUMNS)[None, :] - tl.arange(0, DEPTH)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(0, 2 * reach + COLUMNS, DEPTH):
        position = start + j + place
        inside = (position >= 0) & (position < num_samples)
        # A scalar start plus constant offsets: the loads then share one address register.
        wave = tl.load(row + (start + j) + place, mask=inside, other=0.0)
        d = tap + (reach - j)
        used = tl.abs(d) <= reach
        power = wave
        # Tensor cores cut their sums off, so that one over all steps would drift towards zero.
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(NUM_FILTERS):
            taps = tl.load(bank + (i * num_taps + num_taps // 2 + d), mask=used, other=0.0)
            if PRECISION == "split":
                upper_power = _upper(power)
                upper_taps = _upper(taps)
                part = tl.dot(power - upper_power, upper_taps, part, input_precision="tf32")
                part = tl.dot(upper_power, taps - upper_taps, part, input_precision="tf32")
                part = tl.dot(upper_power, upper_taps, part, input_precision="tf32")
            else:
                part = tl.dot(power, taps, part, input_precision=PRECISION)
            power *= wave
        total += part
    n = first + COLUMNS * tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    tl.store(z + b * num_samples + n, total, mask=n < num_samples)


def toeplitz(x: Tensor, filters: Tensor, form: Form) -> Tensor:
    """Filter the powers of x float32 [B, T] by filters [B, N_f, P], P odd: their sum z [B, T]."""
    (batch, num_samples), (_, num_filters, num_taps) = x.shape, filters.shape
    tiles = triton.cdiv(num_samples, form.rows * form.columns)
    z = torch.empty_like(x)
    launch(
        toeplitz_kernel,
        batch * tiles,
        x.device,
        x,
        filters,
        z,
        num_samples,
        tiles,
        num_taps,
        filters.stride(0),
        NUM_FILTERS=num_filters,
        TAPS_BLOCK=triton.next_power_of_2(num_taps),
        ROWS=form.rows,
        COLUMNS=form.columns,
        DEPTH=form.depth,
        PRECISION=form.precision,
        num_warps=form.num_warps,
        num_stages=2,
    )
    return z


def exact(op: str, x: Tensor, filters: Tensor) -> Tensor:
    """The reference in float64: the op as a whole, or its filters alone."""
    x, filters = x.double(), filters.double()
    if op == WHOLE:
        return reference.lnl(x, filters, None)
    powers = torch.stack([x**i for i in range(1, filters.shape[1] + 1)], dim=1)
    return reference._filter(powers, filters, (filters.shape[-1] + 1) // 2).sum(1)


def contenders(samples: int) -> list[tuple[str, str, Filter]]:
    """Each form that there is at this length: (op, name, x and filters -> result)."""

    def by(backend: str, x: Tensor, filters: Tensor) -> Tensor:
        with ga.use_backends(backend):
            return ops.lnl(x, filters, None)

    def toeplitz_triton(x: Tensor, filters: Tensor) -> Tensor:
        with mock.patch.object(rawboost, "_tile", return_value=_TOEPLITZ_TILE):
            return by("triton", x, filters)

    return [
        (WHOLE, OVERLAP_SAVE if samples >= _OVERLAP_SAVE_SAMPLES else DIRECT_CUDA, partial(by, "cuda")),
        (WHOLE, DIRECT_TRITON, partial(by, "triton")),
        (WHOLE, TOEPLITZ_TRITON, toeplitz_triton),
        *((ALONE, form.name, partial(toeplitz, form=form)) for form in FORMS),
    ]


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time every form; return the result."""
    device = options.device
    environment, ceilings = measure.environment(device), measure.ceilings(device)
    sets = measure.num_sets(shapes.wave_work("lnl", *WORKLOADS[0]).bytes, device)
    rows: list[dict[str, Any]] = []
    timed: list[Contender] = []
    for batch, samples in WORKLOADS:
        inputs = [shapes.arguments("lnl", batch, samples, device, seed)[:2] for seed in range(sets)]
        few = tuple(shapes.rows(value, batch, [0, batch // 2, batch - 1]) for value in inputs[0])
        expected = {op: exact(op, *few) for op in (WHOLE, ALONE)}
        for op, name, run in contenders(samples):
            error = measure.worst_error(run(*few), expected[op])
            row = {"op": op, "contender": name, "batch": batch, "samples": samples}
            rows.append({**row, "relative_error": error, "within_tolerance": error <= measure.TOLERANCE})

            def on_set(i: int, run: Filter = run, inputs: list[tuple] = inputs) -> Tensor:
                return run(*inputs[i])

            timed.append(Contender(f"{op}, {batch} x {samples}, {name}", on_set, capturable=True))
    # All at once: as the workloads hold the same number of samples, each form is compared with each.
    times = measure.interleave(timed, device, sets, options.rounds, options.seconds)
    best = next(c.name for row, c in zip(rows, timed, strict=True) if row["contender"] == OVERLAP_SAVE)
    comparisons = []
    for row, contender in zip(rows, timed, strict=True):
        found = times[contender.name]
        seconds = measure.spread(found.wall)["median"]
        flop = shapes.wave_work("lnl", row["batch"], row["samples"]).flop
        row |= {
            "timer": found.timer,
            "repetitions": len(found.wall),
            "wall_ms": measure.spread(found.wall, 1e3),
            "cpu_ms": None,
            "direct_form_tflop_per_s": float(f"{flop / seconds / 1e12:.4g}"),
            "direct_form_tflop_per_s_of_whole_rows": float(
                f"{NUM_TAPS / shapes.MEAN_TAPS * flop / seconds / 1e12:.4g}"
            ),
        }
        comparison = {key: row[key] for key in ("op", "batch", "samples")} | {"ours": best, "against": contender.name}
        comparisons.append({**comparison, "times_faster_wall": measure.ratio(times, contender.name, best)})
    return {
        "name": options.name,
        "environment": environment,
        "ceilings": ceilings,
        "goals": [],
        "rows": rows,
        "comparisons": comparisons,
        "skipped": [],
        "failed": [],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, fastest first."""
    print(f"TFLOP/s of the direct form: at the mean of {shapes.MEAN_TAPS} taps, at the whole row of {NUM_TAPS}")
    for row in sorted(rows, key=lambda row: row["wall_ms"]["median"]):
        wall = row["wall_ms"]
        print(
            f"{row['op']:<11} {row['batch']:>3} x {row['samples']} {row['contender']:<32} "
            f"{wall['median']:.4f} ms [{wall['p20']:.4f}, {wall['p80']:.4f}] "
            f"{row['direct_form_tflop_per_s']:6.1f} {row['direct_form_tflop_per_s_of_whole_rows']:6.1f} TFLOP/s  "
            f"error {row['relative_error']:.1e}"
            + ("" if row["within_tolerance"] else f", OUTSIDE the tolerance of {measure.TOLERANCE:g}")
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check, time and report; return 2 without a GPU."""
    options = parse(arguments)
    if options.device.type != "cuda" or not torch.cuda.is_available():
        found = "PyTorch sees none" if options.device.type == "cuda" else f"found --device {options.device}"
        print(f"filter-forms: expected a CUDA GPU and --device cuda; {found}", file=sys.stderr)
        return 2
    measure.set_threads(options.threads)
    result = bench(options)
    show(result["rows"])
    return measure.finish(result)


if __name__ == "__main__":
    sys.exit(main())
