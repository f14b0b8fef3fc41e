"""Time what alignment itself does: the weights by the op `weigh` against the plain functions, and for scope "parameter"
one pass (`align_`) against `gram`, `weigh` and `combine_` in turn.

Nothing is timed before both sides agree. Losses are printed beside wins.

    python benchmarks/alignment_ops.py --threads 1 --name cpu-alignment-ops
    python benchmarks/alignment_ops.py --device cuda --parameters aasist xlsr-300m xlsr-1b --name h100-alignment-ops
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import measure
import shapes
import torch
from measure import Contender
from torch import Tensor

from gradalign import alignment, ops

FUNCTIONS, WEIGH = "functions", "weigh"
IN_TURN, ONE_PASS = "in turn", "align_"
METHODS = tuple(method.name for name, method in alignment.METHODS.items() if method.name == name)
# The smallest share of a merged gradient that counts as a difference.
_TOLERANCE = 1e-6


def weights(method: str, num_paths: int, num_segments: int, device: torch.device) -> tuple[list[Contender], float]:
    """Return both ways from Gram matrices to weights, and how far apart their merges are."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_segments, num_paths, 30, generator=generator, dtype=torch.float64)
    gram, chosen = (rows @ rows.mT).to(device), alignment.METHODS[method]
    difference = alignment.solve(gram, chosen)[0] - alignment.weigh(gram, chosen)[0]
    square = (difference * (gram @ difference[..., None])[..., 0]).sum(-1)
    error = float((square.clamp_min(0) / gram.diagonal(dim1=-2, dim2=-1).amax(-1)).amax().sqrt())
    return [
        Contender(FUNCTIONS, lambda i: alignment.solve(gram, chosen)),
        Contender(WEIGH, lambda i: alignment.weigh(gram, chosen)),
    ], error


def merges(parameters: str, method: str, device: torch.device) -> tuple[list[Contender], float]:
    """Return both ways to merge each parameter on its own, and how far apart they are."""
    first, second = shapes.gradients(shapes.parameter_shapes(parameters), 2, device, 0)
    segments, options = list(range(len(first))), (method, None, None, 0.5, False, 0.5)

    def in_turn(out: Sequence[Tensor]) -> None:
        gram = ops.gram([*out, *second], 2, segments, len(segments))
        ops.combine_(out, second, ops.weigh(gram, *options)[0], segments)

    copies = [[g.clone() for g in first] for _ in range(2)]
    in_turn(copies[0])
    ops.align_(copies[1], second, *options)
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*copies, strict=True) if a.numel())
    # The gradients shrink from repetition to repetition towards one that conflicts with none; the work stays the same.
    on_gpu = device.type == "cuda"
    return [
        Contender(IN_TURN, lambda i: in_turn(first), capturable=on_gpu),
        Contender(ONE_PASS, lambda i: ops.align_(first, second, *options), capturable=on_gpu),
    ], error


def device_goals(rows: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the promised figure of one pass over 300M parameters on a GPU, as far as this run measured it."""
    at = {"op": "merge", "contender": ONE_PASS, "parameters": "xlsr-300m"}
    found = next((row["wall_ms"]["median"] / 1e3 for row in rows if at.items() <= row.items()), None)
    if found is not None:
        count = sum(size.numel() for size in shapes.parameter_shapes("xlsr-300m"))
        found *= measure.ceilings(device)["copy_gb_per_s"] * 1e9 / (4 * count)
    text = "align_ of 300M parameters, time over 4 bytes per parameter at copy rate"
    return [measure.goal(text, found, 3.5, at_least=False)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", nargs="+", default=["aasist", "xlsr-300m/4"], help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--paths", nargs="+", type=int, default=[2, 4], help="of the weights (default: %(default)s)")
    parser.add_argument("--segments", nargs="+", type=int, default=[1, 200], help="default: %(default)s")
    measure.add_common_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Gate, time and report; return 1 when a result was wrong."""
    options = parse(arguments)
    measure.set_threads(options.threads)
    device, environment = options.device, measure.environment(options.device)
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    failed: list[str] = []

    def compare(op: str, workload: dict[str, Any], made: tuple[list[Contender], float]) -> None:
        contenders, error = made
        if error > _TOLERANCE:
            failed.append(f"{op} {workload}: {error:.2g} apart")
            print(f"WRONG, not timed: {failed[-1]}", flush=True)
            return
        times = measure.interleave(contenders, device, 1, options.rounds, options.seconds)
        for contender in contenders:
            found = times[contender.name]
            rows.append(
                {
                    "op": op,
                    "contender": contender.name,
                    **workload,
                    "timer": found.timer,
                    "repetitions": len(found.wall),
                    "wall_ms": measure.spread(found.wall, 1e3),
                    "cpu_ms": measure.spread(found.cpu, 1e3) if device.type == "cpu" else None,
                    "device_work": measure.device_work(lambda run=contender.run: run(0), device),
                    "relative_error": error,
                }
            )
        old, new = (contender.name for contender in contenders)
        comparison = {"op": op, **workload, "ours": new, "against": old}
        comparison["times_faster_wall"] = measure.ratio(times, old, new)
        if device.type == "cpu":
            comparison["times_faster_cpu"] = measure.ratio(times, old, new, "cpu")
        comparisons.append(comparison)
        shown = comparison.get("times_faster_cpu", comparison["times_faster_wall"])
        size = " ".join(f"{k}={v}" for k, v in workload.items())
        each = "  ".join(f"{row['contender']} {row['wall_ms']['median']:.4f} ms" for row in rows[-2:])
        print(f"{op:<9} {size:<44} {each}  {shown['median']:.2f} times faster", flush=True)

    for num_paths in options.paths:
        for num_segments in options.segments:
            for method in options.methods:
                workload = {"method": method, "paths": num_paths, "segments": num_segments}
                compare("weights", workload, weights(method, num_paths, num_segments, device))
    for parameters in options.parameters:
        compare("merge", {"parameters": parameters, "method": "pcgrad"}, merges(parameters, "pcgrad", device))
    goals = device_goals(rows, device) if device.type == "cuda" else []
    return measure.finish(
        {
            "name": options.name,
            "environment": environment,
            "goals": goals,
            "rows": rows,
            "comparisons": comparisons,
            "skipped": [],
            "failed": failed,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
