"""Time gradient alignment alone, ours against the peers', on the same gradients of two conflicting paths.

Every contender starts from each path's gradients as a backward would leave them and ends with the merged gradient in
`.grad`. "foreach" is what one would write by hand with PyTorch's multi-tensor functions. Peers' code is never copied:
files are arguments, packages are imported where installed (`pip install torchjd pytorch_optimizer`).

    python benchmarks/peers.py --threads 1 --published-aligners grad_align --pytorch-pcgrad pcgrad.py
    python benchmarks/peers.py --device cuda --parameters aasist xlsr-300m xlsr-1b --published-aligners grad_align \
        --name h100-peers
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import shapes
import torch
from measure import Contender
from torch import Tensor, nn
from train_step import Wrap, load_module, pcgrad_wrappers

import gradalign as ga
from gradalign import _dispatch

OURS = "gradalign"
Run = Callable[[int], Any]


class Model:
    """A model as an aligner sees it: parameters, and per input set and path the gradients a backward would leave."""

    def __init__(self, name: str, device: torch.device, sets: int) -> None:
        sizes = shapes.parameter_shapes(name)
        self.params = [nn.Parameter(torch.empty(size, device=device)) for size in sizes]
        # What a backward wrote, and the tensors handed out, which aligners may overwrite.
        self.fresh = [shapes.gradients(sizes, 2, device, i) for i in range(sets)]
        self.given = [[[g.clone() for g in path] for path in paths] for paths in self.fresh]
        self.count = sum(size.numel() for size in sizes)

    def restore(self, i: int) -> None:
        """Undo what an aligner overwrote."""
        for fresh, given in zip(self.fresh[i], self.given[i], strict=True):
            torch._foreach_copy_(given, fresh)
        for param in self.params:
            param.grad = None

    def objectives(self, i: int) -> list[Objective]:
        """Stand in for the two losses."""
        return [Objective(self.params, path) for path in self.given[i]]

    def merged(self) -> list[Tensor]:
        """Return what an aligner left in `.grad`."""
        return [p.grad for p in self.params if p.grad is not None]


class Objective:
    """A loss whose backward is free: it hands out gradients that are there already."""

    def __init__(self, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        self.params, self.grads = params, grads

    def backward(self, retain_graph: bool = False) -> None:
        """Leave the gradients in `.grad`."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad


# ---- contenders: each a function of the model that returns what to run on input set i ----


def ours(model: Model, backend: str) -> Run:
    """Our optimizer's path() and align()."""
    optimizer = ga.AlignedOptimizer(torch.optim.SGD(model.params, lr=0.0), method="pcgrad")

    def run(i: int) -> None:
        with ga.use_backends(backend):
            optimizer.zero_grad()
            for objective in model.objectives(i):
                with optimizer.path():
                    objective.backward()
            optimizer.align()

    return run


def foreach(model: Model) -> Run:
    """PCGrad by hand: three inner products and a weighted sum, without a host sync."""

    def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]).sum()

    def run(i: int) -> None:
        one, two = model.given[i]
        g11, g12, g22 = inner(one, one), inner(one, two).clamp(max=0), inner(two, two)
        torch._foreach_mul_(one, 0.5 * (1 - g12 / g11))
        torch._foreach_mul_(two, 0.5 * (1 - g12 / g22))
        torch._foreach_add_(one, two)
        for param, grad in zip(model.params, one, strict=True):
            param.grad = grad

    return run


def published(model: Model, folder: Path, method: str) -> Run:
    """One of the published dual-path aligners."""
    module = load_module(folder / f"{method}.py", f"published_{method}")
    aligner = getattr(module, {"pcgrad": "PCGrad", "gradvac": "GradVac", "cagrad": "CAGrad"}[method])
    optimizer = aligner(torch.optim.SGD(model.params, lr=0.0))
    return lambda i: optimizer.ga_backward(model.objectives(i))


def wrapped(model: Model, wrap: Wrap) -> Run:
    """A peer that wraps an optimizer."""
    backward = wrap(torch.optim.SGD(model.params, lr=0.0))
    return lambda i: backward(model.objectives(i))


def torchjd(model: Model, sets: int) -> Run:
    """TorchJD from the Jacobians its backward leaves in `.jac`, by way of the Gramian (its cheaper way)."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    jacobians = [[torch.stack(pair) for pair in zip(*model.fresh[i], strict=True)] for i in range(sets)]
    aggregator = PCGrad()

    def run(i: int) -> None:
        for param, jacobian in zip(model.params, jacobians[i], strict=True):
            param.jac = jacobian  # type: ignore[attr-defined]
        jac_to_grad(model.params, aggregator, optimize_gramian_computation=True)

    return run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", nargs="+", choices=shapes.PARAMETER_LISTS, default=["aasist", "xlsr-300m/4"])
    parser.add_argument("--published-aligners", type=Path, help="the published folder grad_align/")
    parser.add_argument("--pytorch-pcgrad", type=Path, help="the pcgrad.py of WeiChengTseng/Pytorch-PCGrad")
    measure.add_common_arguments(parser)
    return parser.parse_args(arguments)


class Bench(measure.Bench):
    """Compares aligners model by model and collects the rows."""

    def makers(self, sets: int) -> dict[str, Callable[[Model], Run]]:
        """Return the contenders that are there; name the others as skipped."""
        o, grads = self.options, [torch.ones(1, device=self.device)] * 2
        found: dict[str, Callable[[Model], Run]] = {}
        gram = _dispatch.ops()["gram"]
        for name in _dispatch.BACKENDS:
            if not gram.why_not(name, grads, 2, [0], 1):
                found[f"{OURS} {name}"] = functools.partial(ours, backend=name)
        found["foreach"] = foreach
        if o.published_aligners is None:
            self.skip("the published aligners: give their folder with --published-aligners PATH/grad_align")
        else:
            for method in ("pcgrad", "cagrad", *(["gradvac"] if self.device.type == "cuda" else [])):
                found[f"published {method}"] = functools.partial(published, folder=o.published_aligners, method=method)
            if self.device.type != "cuda":
                self.skip("published gradvac: it names the device 'cuda' in its code")
        wrappers, missing = pcgrad_wrappers(o.pytorch_pcgrad)
        for name, what in missing.items():
            self.skip(f"{name}: {what}")
        for name, wrap in wrappers.items():
            found[name] = functools.partial(wrapped, wrap=wrap)
        if importlib.util.find_spec("torchjd") is None:
            self.skip("torchjd: pip install torchjd")
        else:
            found["torchjd"] = functools.partial(torchjd, sets=sets)
        return found

    def compare(self, name: str) -> None:
        """Gate and time every contender on one model's gradients."""
        o, device = self.options, self.device
        count = sum(size.numel() for size in shapes.parameter_shapes(name))
        sets = measure.num_sets(8.0 * count, device)
        model, contenders, errors, memory, calls = Model(name, device, sets), [], {}, {}, {}
        for who, make in self.makers(sets).items():
            try:
                run = make(model)
                model.restore(0)
                run(0)
                error = _error(model, who)
                model.restore(0)
                memory[who] = measure.peak_bytes(functools.partial(run, 0), device)
            except torch.OutOfMemoryError:
                self.skip(f"{who} on {name}: not enough memory")
                continue
            if error is not None and error > (measure.TOLERANCE if who.startswith(OURS) else measure.PEER_TOLERANCE):
                self.failed.append(f"{who} on {name}: relative error {error:.2g}")
                print(f"WRONG, not timed: {self.failed[-1]}")
                continue
            errors[who] = error
            model.restore(0)
            calls[who] = measure.device_work(functools.partial(run, 0), device)
            ours_on_gpu = device.type == "cuda" and who in (f"{OURS} triton", f"{OURS} cuda", "foreach")
            contenders.append(Contender(who, run, model.restore, capturable=ours_on_gpu))
        times = measure.interleave(contenders, device, sets, o.rounds, o.seconds)
        floor = shapes.gradient_work("align", count, 2).bytes / self.ceilings["copy_gb_per_s"] / 1e9
        for contender in contenders:
            who = contender.name
            wall = measure.spread(times[who].wall, 1e3)
            row: dict[str, Any] = {
                "op": "align",
                "contender": who,
                "parameters": name,
                "values": count,
                "timer": times[who].timer,
                "repetitions": len(times[who].wall),
                "wall_ms": wall,
                "cpu_ms": measure.spread(times[who].cpu, 1e3) if device.type == "cpu" else None,
                "floor_ms": float(f"{floor * 1e3:.4g}"),
                "floor_share": float(f"{floor * 1e3 / wall['median']:.4g}"),
                "peak_mib": round(memory[who] / 2**20, 2),
                "peak_gradient_sets": round(memory[who] / (4 * count), 2),
                "device_work": calls[who],
                "relative_error": errors[who],
            }
            self.rows.append(row)
            cpu = f"cpu {row['cpu_ms']['median']:9.3f} ms" if row["cpu_ms"] else ""
            print(
                f"{name:<12} {who:<22} {wall['median']:10.3f} ms [{wall['p20']:.3f}, {wall['p80']:.3f}] {cpu} "
                f"{row['floor_share']:6.2f} of the floor's rate, +{row['peak_gradient_sets']:.2f} gradient sets",
                flush=True,
            )
        own = [c.name for c in contenders if c.name.startswith(OURS) and not c.name.endswith("reference")]
        for mine in own:
            for other in (c.name for c in contenders if not c.name.startswith(OURS)):
                comparison: dict[str, Any] = {
                    "op": "align",
                    "parameters": name,
                    "ours": mine,
                    "against": other,
                    "times_faster_wall": measure.ratio(times, other, mine),
                }
                if device.type == "cpu":
                    comparison["times_faster_cpu"] = measure.ratio(times, other, mine, "cpu")
                self.comparisons.append(comparison)
                faster = comparison["times_faster_wall"]["median"]
                if faster < 1:
                    print(f"loss: {mine} is slower than {other}: {faster:.2f}x at {name}")

    def goals(self) -> list[dict[str, Any]]:
        """Return the promised figures, for 300M parameters on a GPU."""
        if self.device.type != "cuda":
            return []
        kernels = (f"{OURS} cuda", f"{OURS} triton")
        rows = [r for r in self.rows if r["parameters"] == "xlsr-300m" and r["contender"] in kernels]
        over = faster = None
        if rows:
            best = max(rows, key=lambda r: r["floor_share"])
            over = 1 / best["floor_share"]
            at = {"parameters": "xlsr-300m", "ours": best["contender"], "against": "published pcgrad"}
            faster = next((c["times_faster_wall"]["median"] for c in self.comparisons if at.items() <= c.items()), None)
        return [
            measure.goal("align 300M, time over 20 bytes per parameter at copy rate", over, 1.15, at_least=False),
            measure.goal("align 300M, times faster than the published PCGrad", faster, 10, at_least=True),
        ]


def _error(model: Model, who: str) -> float | None:
    """Relative error of the merged gradient against PCGrad in float64, up to the factor K of a sum; None for aligners
    of another method.
    """
    if "gradvac" in who or "cagrad" in who:
        return None
    one, two = model.fresh[0]

    def inner(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float(x.double().flatten() @ y.double().flatten()) for x, y in zip(a, b, strict=True))

    q = min(0.0, inner(one, two))
    scale = 2.0 if who == "torchjd" else 1.0
    w1, w2 = (scale * 0.5 * (1 - q / inner(g, g)) for g in (one, two))
    difference = largest = 0.0
    # Tensor by tensor: a billion parameters in float64 would not fit beside the contenders.
    for found, a, b in zip(model.merged(), one, two, strict=True):
        expected = w1 * a.double() + w2 * b.double()
        difference = max(difference, float((found.double() - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference / largest


def main(arguments: list[str] | None = None) -> int:
    """Compare on every chosen list; return 1 when a result was wrong."""
    options = parse(arguments)
    measure.set_threads(options.threads)
    bench = Bench(options)
    for name in options.parameters:
        bench.compare(name)
        # Each time: a run that is stopped keeps what it has measured.
        measure.save(bench.result())
    return measure.finish(bench.result())


if __name__ == "__main__":
    sys.exit(main())
