"""Time one dual-path training step of a detector: plain, aligned, and as published, side by side.

Every step sees the same clean and augmented views of a batch. "plain split" is ordinary training on both views one
after the other; "plain joint" on both at once. "aligned split" and "aligned joint" are `AlignedOptimizer` with pcgrad.
The published step (its pcgrad.py is an argument) sends both views through the model at once and runs two backwards
through it; so do the other peers' PCGrads (a file, and packages where they are installed). All have our detector;
"published, official AASIST" is the published step on the official code's network, with the same weights. On a GPU the
split steps are also timed as replays of a CUDA graph ("captured"), in which the host launches nothing; the peers'
cannot be captured, because they wait for the device.

    python benchmarks/train_step.py --threads 2 --batch 4 --samples 16000 --published-pcgrad grad_align/pcgrad.py
    python benchmarks/train_step.py --device cuda --batch 10 --autocast bfloat16 --published-pcgrad ... --name h100-step
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import measure
import shapes
import torch
from measure import Contender
from torch import Tensor, nn

import gradalign as ga
from gradalign.detectors import frontend as frontends
from gradalign.detectors.aasist import our_key

PLAIN_SPLIT, PLAIN_JOINT = "plain split", "plain joint"
ALIGNED_SPLIT, ALIGNED_JOINT, PUBLISHED = "aligned split", "aligned joint", "published"
PYTORCH_PCGRAD, PYTORCH_OPTIMIZER, TORCHJD = "Pytorch-PCGrad", "pytorch_optimizer", "torchjd"
OURS = (PLAIN_SPLIT, ALIGNED_SPLIT, PLAIN_JOINT, ALIGNED_JOINT)
PEERS = (PUBLISHED, PYTORCH_PCGRAD, PYTORCH_OPTIMIZER, TORCHJD)
WAYS = (*OURS, *PEERS)
OFFICIAL = "published, official AASIST"
OFFICIAL_CONFIGS = {"aasist": "AASIST.conf", "aasist-l": "AASIST-L.conf"}
CAPTURED = {f"{name}, captured": name for name in (PLAIN_SPLIT, ALIGNED_SPLIT)}
PLAIN_CAPTURED, ALIGNED_CAPTURED = CAPTURED


# What a peer makes of an optimizer: a function of the losses that leaves the merged gradients in .grad.
Wrap = Callable[[torch.optim.Optimizer], Callable[[list[Tensor]], Any]]


def load_module(path: Path, name: str) -> ModuleType:
    """Import a peer's file from where it lies."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"a Python file was expected; found {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pcgrad_wrappers(pytorch_pcgrad: Path | None) -> tuple[dict[str, Wrap], dict[str, str]]:
    """The PCGrads that wrap an optimizer; and of those that are not there, what is missing."""
    found: dict[str, Wrap] = {}
    missing: dict[str, str] = {}
    if pytorch_pcgrad is None:
        missing[PYTORCH_PCGRAD] = "give its file with --pytorch-pcgrad PATH/pcgrad.py"
    else:
        other = load_module(pytorch_pcgrad, "pytorch_pcgrad")
        found[PYTORCH_PCGRAD] = lambda inner: other.PCGrad(inner).pc_backward
    if importlib.util.find_spec("pytorch_optimizer") is None:
        missing[PYTORCH_OPTIMIZER] = "pip install pytorch_optimizer"
    else:
        from pytorch_optimizer import PCGrad

        found[PYTORCH_OPTIMIZER] = lambda inner: PCGrad(inner).pc_backward
    return found, missing


class OfficialAasist(nn.Module):
    """The network of a checkout of clovaai/aasist, with the weights of ours: [B, T] -> logits [B, 2]."""

    def __init__(self, checkout: Path, ours: nn.Module, config: str) -> None:
        super().__init__()
        settings = json.loads((checkout / "config" / config).read_text())["model_config"]
        self.model = load_module(checkout / "models" / "AASIST.py", "official_aasist").Model(settings)
        weights = ours.state_dict()
        self.model.load_state_dict({key: weights[str(our_key(key))] for key in self.model.state_dict()})

    def forward(self, wave: Tensor) -> Tensor:
        """Return the logits alone."""
        logits: Tensor = self.model(wave)[1]
        return logits

    @torch.no_grad()
    def error(self, ours: nn.Module, wave: Tensor) -> float:
        """Relative error of the logits against ours; AASIST has dropout, so both are in evaluation mode for it."""
        found, expected = copy.deepcopy(self).eval()(wave), copy.deepcopy(ours).eval()(wave)
        return measure.worst_error(found, expected)


class Step:
    """One model, one optimizer, one way to take a step."""

    def __init__(self, model: nn.Module, views: Tensor, labels: Tensor, autocast: torch.dtype | None) -> None:
        self.model, self.views, self.labels = copy.deepcopy(model), views, labels
        # The published settings: the rare class, bona fide (1), weighs nine times as much.
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 0.9], device=views.device))
        # A fused optimizer on a GPU, for everybody: ours then never waits for the device, and a graph can hold it.
        on_gpu = views.device.type == "cuda"
        self.inner = torch.optim.Adam(
            self.model.parameters(), lr=1e-6, weight_decay=1e-4, fused=on_gpu, capturable=on_gpu
        )
        self.autocast = autocast

    def loss(self, wave: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one view."""
        return self.losses(wave, labels, 1)[0]

    def losses(self, wave: Tensor, labels: Tensor, parts: int) -> list[Tensor]:
        """Return the losses of the parts of one batch."""
        context: Any = contextlib.nullcontext()
        if self.autocast is not None:
            context = torch.autocast(wave.device.type, self.autocast)
        with context:
            return [self.criterion(part.float(), labels) for part in self.model(wave).chunk(parts)]

    def plain_split(self) -> None:
        """Step on the mean of both losses, one view after the other."""
        self.inner.zero_grad()
        for view in self.views:
            (self.loss(view, self.labels) / len(self.views)).backward()
        self.inner.step()

    def plain_joint(self) -> None:
        """Step on the mean of both losses, both views at once."""
        self.inner.zero_grad()
        self.loss(self.views.flatten(0, 1), self.labels.repeat(len(self.views))).backward()
        self.inner.step()

    def aligned(self, joint: bool) -> Callable[[], None]:
        """Return the aligned step."""
        optimizer = ga.AlignedOptimizer(self.inner, method="pcgrad")

        def split_step() -> None:
            optimizer.zero_grad()
            for view in self.views:
                with optimizer.path():
                    self.loss(view, self.labels).backward()
            optimizer.step()

        def joint_step() -> None:
            optimizer.zero_grad()
            optimizer.backward(self.losses(self.views.flatten(0, 1), self.labels, len(self.views)))
            optimizer.step()

        return joint_step if joint else split_step

    def wrapped(self, wrap: Wrap) -> Callable[[], None]:
        """Return a peer's step: the caller's part is what the published training loop does."""
        backward = wrap(self.inner)

        def step() -> None:
            backward(self.losses(self.views.flatten(0, 1), self.labels, len(self.views)))
            self.inner.step()

        return step

    def torchjd(self) -> Callable[[], None]:
        """Return TorchJD's step, by way of the Gramian (its cheaper way), one backward after the other."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        aggregator, params = PCGrad(), list(self.model.parameters())

        def step() -> None:
            self.inner.zero_grad()
            losses = self.losses(self.views.flatten(0, 1), self.labels, len(self.views))
            backward(losses, inputs=params, parallel_chunk_size=1)
            reached = [param for param in params if getattr(param, "jac", None) is not None]
            jac_to_grad(reached, aggregator, optimize_gramian_computation=True)
            self.inner.step()

        return step

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the last step."""
        return [p.grad for p in self.model.parameters()]


def contenders(
    make: Callable[[], Step], peers: Mapping[str, Wrap], names: Sequence[str] = WAYS
) -> dict[str, tuple[Step, Callable[[], None]]]:
    """Return each way's step object and its step; peers that are not there are left out."""
    found: dict[str, tuple[Step, Callable[[], None]]] = {}
    for name in names:
        step, way = make(), CAPTURED.get(name, name)
        if way in peers:
            found[name] = step, step.wrapped(peers[way])
        elif way in (ALIGNED_SPLIT, ALIGNED_JOINT):
            found[name] = step, step.aligned(joint=way == ALIGNED_JOINT)
        elif way in (PLAIN_SPLIT, PLAIN_JOINT):
            found[name] = step, step.plain_split if way == PLAIN_SPLIT else step.plain_joint
        elif way == TORCHJD and importlib.util.find_spec("torchjd"):
            found[name] = step, step.torchjd()
    return found


def gate(make: Callable[[], Step], peers: Mapping[str, Wrap], chosen: Sequence[str] = WAYS) -> dict[str, float]:
    """Relative errors of one step's gradients against PCGrad in float64 on the paths' gradients."""
    ways, errors = contenders(make, peers, chosen), {}
    for joint, names in ((False, (ALIGNED_SPLIT,)), (True, (ALIGNED_JOINT, *PEERS))):
        step = make()
        torch.manual_seed(0)
        params = list(step.model.parameters())
        if joint:
            losses = iter(step.losses(step.views.flatten(0, 1), step.labels, len(step.views)))
        else:
            losses = (step.loss(view, step.labels) for view in step.views)
        paths = [torch.autograd.grad(loss, params, retain_graph=joint, allow_unused=True) for loss in losses]
        reached = [all(g is not None for g in grads) for grads in zip(*paths, strict=True)]
        one, two = (_flat(list(grads), reached) for grads in paths)
        q = min(0.0, float(one @ two))
        expected = 0.5 * (1 - q / float(one @ one)) * one + 0.5 * (1 - q / float(two @ two)) * two
        for name in names:
            if name in ways:
                torch.manual_seed(0)
                ways[name][1]()
                # TorchJD's gradient is a sum.
                scale = 2.0 if name == TORCHJD else 1.0
                errors[name] = measure.worst_error(_flat(ways[name][0].gradients(), reached), scale * expected)
    return errors


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """The same convolutions, in full float32, in every run: AASIST's max-pooling and top-k jump at a rounding."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    cudnn.allow_tf32, cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before[:2]
        torch.use_deterministic_algorithms(before[2])


def _contender(name: str, run: Callable[[], None]) -> Contender:
    return Contender(name, lambda i: run(), capturable=name in CAPTURED)


def _flat(grads: list[Tensor | None], reached: list[bool]) -> Tensor:
    return torch.cat([g.double().flatten() for g, ours in zip(grads, reached, strict=True) if ours and g is not None])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=ga.detectors.names(), default="aasist")
    parser.add_argument(
        "--frontend", choices=frontends.names(), help="of a self-supervised detector (default: its own)"
    )
    parser.add_argument("--batch", type=int, default=4, help="utterances per view (default 4)")
    parser.add_argument("--samples", type=int, default=16000, help="per utterance (default 16000)")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="run the model under torch.autocast")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--published-pcgrad", type=Path, help="the published grad_align/pcgrad.py")
    parser.add_argument("--official-aasist", type=Path, help="checkout of clovaai/aasist: the published step on it too")
    parser.add_argument("--pytorch-pcgrad", type=Path, help="the pcgrad.py of WeiChengTseng/Pytorch-PCGrad")
    measure.add_common_arguments(parser)
    parser.set_defaults(seconds=90.0)
    options = parser.parse_args(arguments)
    if options.official_aasist and (options.detector not in OFFICIAL_CONFIGS or options.published_pcgrad is None):
        parser.error("--official-aasist needs --detector aasist or aasist-l, and --published-pcgrad")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Gate, time and report; return 1 when a result was wrong."""
    options = parse(arguments)
    measure.set_threads(options.threads)
    device, autocast = options.device, getattr(torch, options.autocast) if options.autocast else None
    environment = measure.environment(device)
    torch.manual_seed(0)
    parts = {"frontend": {"name": options.frontend}} if options.frontend else {}
    model = ga.detectors.create(options.detector, **parts).to(device)
    peers, missing = pcgrad_wrappers(options.pytorch_pcgrad)
    if options.published_pcgrad is None:
        missing[PUBLISHED] = "give its file with --published-pcgrad PATH/pcgrad.py"
    else:
        module = load_module(options.published_pcgrad, "published_pcgrad")
        peers[PUBLISHED] = lambda inner: module.PCGrad(inner).ga_backward
    if importlib.util.find_spec("torchjd") is None:
        missing[TORCHJD] = "pip install torchjd"
    skipped = [f"{name}: {what}" for name, what in missing.items() if name in options.ways]
    for what in skipped:
        print(f"skipped: {what}")

    def make(
        samples: int = options.samples, precision: torch.dtype | None = autocast, network: nn.Module = model
    ) -> Step:
        clean = shapes.wave(options.batch, samples, device, 0)
        augmented = ga.RawBoost(algo=4)(clean, seeds=shapes.seeds(options.batch, device, 0))
        labels = torch.arange(options.batch, device=device) % 2
        return Step(network, torch.stack([clean, augmented]), labels, precision)

    official = None
    if options.official_aasist:
        official = OfficialAasist(options.official_aasist, model, OFFICIAL_CONFIGS[options.detector]).to(device)
    # In float32 and on short utterances: the mathematics does not depend on either.
    short = min(options.samples, 8000)
    with _exact():
        errors = gate(lambda: make(short, None), peers, options.ways)
        if official is not None:
            errors[OFFICIAL] = official.error(model, make(short).views[1])
    allowed = dict.fromkeys(PEERS, measure.PEER_TOLERANCE)
    wrong = {name: error for name, error in errors.items() if error > allowed.get(name, measure.TOLERANCE)}
    failed = [f"{name}: relative error {error:.2g}" for name, error in wrong.items()]
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str], float] = {}
    detector = f"{options.detector}, {options.frontend}" if options.frontend else options.detector
    workload = {"detector": detector, "batch": options.batch, "samples": options.samples}
    if failed:
        print("WRONG, not timed: " + "; ".join(failed))
    else:
        chosen = [*options.ways]
        if device.type == "cuda":
            chosen += [name for name, way in CAPTURED.items() if way in options.ways]
        ways = contenders(make, peers, chosen)
        if official is not None:
            step = make(network=official)
            ways[OFFICIAL] = step, step.wrapped(peers[PUBLISHED])
        takers = [_contender(name, run) for name, (_, run) in ways.items()]
        times = measure.interleave(takers, device, 1, options.rounds, options.seconds)
        for name, (_, run) in ways.items():
            # A graph's own memory and launches are not those of its step run once more.
            captured = name in CAPTURED
            work = None if captured else measure.device_work(run, device)
            row = {
                "op": "training step",
                "contender": name,
                **workload,
                "timer": times[name].timer,
                "repetitions": len(times[name].wall),
                "wall_ms": measure.spread(times[name].wall, 1e3),
                "cpu_ms": measure.spread(times[name].cpu, 1e3) if device.type == "cpu" else None,
                "peak_mib": None if captured else round(measure.peak_bytes(run, device) / 2**20, 1),
                "device_work": work,
                "relative_error": errors.get(name),
            }
            rows.append(row)
            print(
                f"{name:<26} {row['wall_ms']['median']:10.1f} ms "
                f"[{row['wall_ms']['p20']:.1f}, {row['wall_ms']['p80']:.1f}] "
                + (f"cpu {row['cpu_ms']['median']:10.1f} ms " if row["cpu_ms"] else "")
                + (f"peak {row['peak_mib']:8.1f} MiB " if row["peak_mib"] is not None else "")
                + ("{launches} launches, {waits} waits, kernels {kernels_ms} ms".format(**work) if work else "")
            )
        for slower, faster in (
            (ALIGNED_SPLIT, PLAIN_SPLIT),
            (ALIGNED_JOINT, PLAIN_JOINT),
            (PUBLISHED, PLAIN_JOINT),
            (PUBLISHED, ALIGNED_SPLIT),
            (PUBLISHED, ALIGNED_JOINT),
            (ALIGNED_CAPTURED, PLAIN_CAPTURED),
            (PUBLISHED, ALIGNED_CAPTURED),
            *((peer, ALIGNED_SPLIT) for peer in (*PEERS[1:], OFFICIAL)),
        ):
            if not {slower, faster} <= set(times):
                continue
            comparison = {
                "op": "training step",
                **workload,
                "slower": slower,
                "faster": faster,
                "wall_ratio": measure.ratio(times, slower, faster),
            }
            if device.type == "cpu":
                comparison["cpu_ratio"] = measure.ratio(times, slower, faster, "cpu")
            comparisons.append(comparison)
            for clock in measure.clocks(device):
                found[slower, faster, clock] = comparison[f"{clock}_ratio"]["median"]
            print(f"{slower} / {faster}: {comparison['wall_ratio']} cpu {comparison.get('cpu_ratio')}")
    peak = {row["contender"]: row["peak_mib"] for row in rows}
    both = {ALIGNED_SPLIT, ALIGNED_JOINT} <= set(peak)
    share = round(peak[ALIGNED_SPLIT] / peak[ALIGNED_JOINT], 3) if both else None
    least = 1.9 if device.type == "cpu" else 1.6
    captured_goals = ((ALIGNED_CAPTURED, PLAIN_CAPTURED, 1.05, False), (PUBLISHED, ALIGNED_CAPTURED, least, True))
    goals = [
        measure.goal(f"{slower} / {faster} step, {clock} clock", found.get((slower, faster, clock)), limit, at_least)
        for slower, faster, limit, at_least in (
            (ALIGNED_SPLIT, PLAIN_SPLIT, 1.05, False),
            (PUBLISHED, ALIGNED_SPLIT, least, True),
            *(((OFFICIAL, ALIGNED_SPLIT, least, True),) if official is not None else ()),
            *(captured_goals if device.type == "cuda" else ()),
        )
        for clock in measure.clocks(device)
    ]
    goals.append(measure.goal("peak memory of a step, path() / backward()", share, 0.6, at_least=False))
    return measure.finish(
        {
            "name": options.name,
            "environment": environment,
            "goals": goals,
            "rows": rows,
            "comparisons": comparisons,
            "skipped": skipped,
            "failed": failed,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
