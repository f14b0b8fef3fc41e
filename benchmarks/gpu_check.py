"""Everything that only a GPU can say, within ten minutes: tests, compute-sanitizer, benchmarks.

    make gpu-check                                     # builds the CUDA kernels for this GPU first
    make gpu-check PUBLISHED_RAWBOOST=RawBoost.py PUBLISHED_ALIGNERS=dpda_ga/grad_align PYTORCH_PCGRAD=pcgrad.py
    python benchmarks/gpu_check.py --only data memcheck    # some stages, once the kernels are built

Each stage has a limit of its own; the limits add up to nine minutes, which leaves one for the build. Into
--out go gpu_check.json (each stage's result and seconds), gpu_check.log (everything the stages printed) and the
benchmarks' result files, which also stay in benchmarks/results/.

It needs `pip install .[train]`, pytest, pytest-benchmark and scipy, for the published loader librosa too. A machine
without a network takes what it lacks as wheels, numpy<2.4 among them (the published code runs with no newer one):
`pip download -d wheels --no-deps soundfile cffi pycparser pytest-benchmark librosa audioread soxr pooch platformdirs
decorator "numpy<2.4"` here, `pip install --no-index --no-deps wheels/*` there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gradalign._files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# Side by side, since most of their time is the host's: Triton compiles, processes start.
GPU_TESTS = (
    ("test_cuda.py", "-k", "not align"),
    # Its blocks wait for each other: what never ends must not take the others with it.
    ("test_cuda.py", "-k", "align"),
    ("test_ops.py",),
    ("test_rawboost.py",),
    ("test_alignment.py", "test_optim.py"),
    ("test_loader.py", "test_trainer.py", "test_examples.py", "-k", "loader or a_gpu or cuda_graph"),
    ("test_distributed.py",),
    ("test_triton.py", "-k", "not equals_float64_reference and (same or several or lopsided)"),
    ("test_triton.py", "-k", "not equals_float64_reference and not (same or several or lopsided)"),
    ("test_triton.py", "-k", "equals_float64_reference and lnl"),
    ("test_triton.py", "-k", "equals_float64_reference and (isd or notch)"),
    ("test_triton.py", "-k", "equals_float64_reference and ssi"),
    ("test_triton.py", "-k", "equals_float64_reference and rawboost"),
    ("test_triton.py", "-k", "equals_float64_reference and (gram or weigh or combine_ or align_)"),
)
# Small shapes of every kernel: the sanitizer runs them some hundred times slower.
SANITIZED = "equals_float64_reference or same_bits or nonfinite or many_chunks"
# The project's kernels by name; those of PyTorch's float64 reference would take most of the time.
KERNELS = {"test_cuda.py": "gradalign", "test_triton.py": "^(notch|lnl|isd|ssi|rawboost|gram|weigh|combine|align)_"}
# What a machine with PyTorch alone may lack.
NEEDED = ("soundfile", "tqdm", "pytest", "pytest_benchmark", "scipy")
# What a stage that is stopped may still take, to say how far it came.
GRACE_S = 5


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time, and their limit in seconds."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: int
    environment: tuple[tuple[str, str], ...] = ()


def stages(gpu: str, rawboost: Path | None, aligners: Path | None, pytorch_pcgrad: Path | None = None) -> list[Stage]:
    """The stages, most telling first."""
    numpy_code = ("--published", str(rawboost), "--published-processes", "16") if rawboost else ()
    others = ("--pytorch-pcgrad", str(pytorch_pcgrad)) if pytorch_pcgrad else ()
    published = (*(("--published-aligners", str(aligners)) if aligners else ()), *others)
    pcgrad = ("--published-pcgrad", str(aligners / "pcgrad.py")) if aligners else ()
    loader = ("--published", str(aligners.resolve().parent)) if aligners else ()
    tests = tuple((*PYTEST, "-rs", str(ROOT / "tests" / first), *_in_tests(rest)) for first, *rest in GPU_TESTS)

    def bench(script: str, name: str, *options: str) -> tuple[tuple[str, ...]]:
        path = ROOT / "benchmarks" / f"{script}.py"
        return ((sys.executable, str(path), "--device", "cuda", "--name", f"{gpu}-{name}", *options),)

    def sanitizer(tool: str, file: str, chosen: str = SANITIZED) -> tuple[str, ...]:
        options = ("--error-exitcode", "9", "--target-processes", "all", "--tool", tool)
        kernels = ("--kernel-name", f"regex={KERNELS[file]}")
        return ("compute-sanitizer", *options, *kernels, *PYTEST, "-x", str(ROOT / "tests" / file), "-k", chosen)

    goal = ("--batch", "64", "--samples", "64600", "--ops", "rawboost")
    step = ("--batch", "10", "--samples", "64000", "--seconds", "10", *pcgrad)
    # Every contender has a model and Adam's state of its own, 5 GB of XLS-R's: only the most telling.
    ways = ("plain split", "aligned split", "plain joint", "aligned joint", "published")
    xlsr = ("--detector", "xlsr-aasist", "--autocast", "bfloat16", "--ways", *ways)
    data = ("--batch", "24", "--samples", "64600", "--workers", "8", "--detector", "aasist", "--steps", "8", *loader)
    merging = ("--parameters", "aasist", "xlsr-300m", "--methods", "pcgrad", "--paths", "2", "--seconds", "3")
    # 82 comparisons, each after a float64 reference.
    each = ("--batch", "1", "64", "--samples", "16000", "64600", "400000", "--seconds", "0.15", "--rounds", "10")
    return [
        Stage("what serves what", ((sys.executable, "-m", "gradalign.info"),), 15),
        Stage("tests", tests, 95),
        Stage("RawBoost, the goal's workload", bench("run", "rawboost", *goal, "--algo", "4", *numpy_code), 45),
        Stage("alignment", bench("peers", "peers", "--parameters", "aasist", "xlsr-300m", *published), 55),
        Stage("merging parameter by parameter", bench("alignment_ops", "alignment-ops", *merging), 20),
        Stage("training step, AASIST", bench("train_step", "train-step", *step, *others), 40),
        Stage("training step, XLS-R 300M", bench("train_step", "xlsr-step", *step, *xlsr), 75),
        # Worker processes have a core each: NumPy's threads would only get in each other's way.
        Stage(
            "waiting for data", bench("loading", "loading", *data, "--seconds", "10"), 45, (("OMP_NUM_THREADS", "1"),)
        ),
        Stage(
            "memcheck",
            (
                sanitizer("memcheck", "test_cuda.py", f"({SANITIZED}) and not align"),
                # On its own: it takes all registers and all shared memory, of which the sanitizer may need some.
                sanitizer("memcheck", "test_cuda.py", f"({SANITIZED}) and align"),
                sanitizer("memcheck", "test_triton.py"),
            ),
            70,
            # Every tensor an allocation of its own: within a larger one nothing is out of bounds.
            (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        ),
        # align_ is left out: its warps tell each other with flags and fences, of which racecheck knows nothing, but
        # tests/test_cuda_races.py does.
        Stage(
            "racecheck",
            (
                sanitizer("racecheck", "test_cuda.py", f"({SANITIZED}) and not align"),
                sanitizer("racecheck", "test_triton.py"),
            ),
            45,
        ),
        Stage("every op", bench("run", "ops", *each, "--algo", "1", "2", "3", "5", "8"), 35),
    ]


def _in_tests(words: list[str]) -> list[str]:
    """Test files as paths, everything else as it is."""
    return [str(ROOT / "tests" / word) if word.startswith("test_") else word for word in words]


def run(stage: Stage, log: Path) -> dict[str, object]:
    """Run a stage, its output to the log and to the terminal; what runs out of time is stopped."""
    started = time.monotonic()
    print(f"== {stage.name}", flush=True)
    program = stage.commands[0][0]
    if shutil.which(program) is None:
        return {"stage": stage.name, "result": f"not run: {program} is not on the PATH", "seconds": 0.0}
    results = []
    # Unbuffered: what a stopped command has printed by then is kept.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(stage.environment)}
    if len(stage.commands) > 1:
        environment["OMP_NUM_THREADS"] = "2"
    with contextlib.ExitStack() as outputs:
        running = []
        for command in stage.commands:
            output = outputs.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            running.append((command, process, output))
        for command, process, output in running:
            try:
                code = process.wait(max(0.0, started + stage.limit_s - time.monotonic()))
                results.append("passed" if code == 0 else f"failed with exit code {code}")
            except subprocess.TimeoutExpired:
                results.append(f"stopped after {stage.limit_s} s")
                # pytest then tells what has failed so far.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                with contextlib.suppress(ProcessLookupError):
                    # With all that it has started.
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
            with log.open("a", encoding="utf-8") as file:
                file.write(f"\n== {stage.name}: {shlex.join(command)}\n{text}")
            print("\n".join(text.splitlines()[-25:]), flush=True)
    result = "; ".join([result for result in results if result != "passed"] or ["passed"])
    return {"stage": stage.name, "result": result, "seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run every stage; return 1 unless all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="stages whose name holds one of these words")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu-check", help="folder of the log and the results")
    parser.add_argument("--published-rawboost", type=Path, help="the published RawBoost.py")
    parser.add_argument("--published-aligners", type=Path, help="the published folder grad_align/")
    parser.add_argument("--pytorch-pcgrad", type=Path, help="the pcgrad.py of WeiChengTseng/Pytorch-PCGrad")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: expected a CUDA GPU; PyTorch sees none", file=sys.stderr)
        return 2
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        print(f"gpu-check: expected the packages {names}; pip install {names}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    found = re.search(r"\b[A-Z]{1,4}\d{2,4}\w*", name)
    gpu = (found[0] if found else name.replace(" ", "-")).lower()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu_check.log"
    log.unlink(missing_ok=True)
    done = []
    chosen = stages(gpu, options.published_rawboost, options.published_aligners, options.pytorch_pcgrad)
    if options.only:
        names = ", ".join(stage.name for stage in chosen)
        chosen = [stage for stage in chosen if any(word in stage.name for word in options.only)]
        if not chosen:
            print(f"gpu-check: expected words of {names}; found {' '.join(options.only)}", file=sys.stderr)
            return 2
    for stage in chosen:
        done.append(run(stage, log))
        # After every stage: what is there survives a machine that is taken away.
        write_text(options.out / "gpu_check.json", json.dumps({"gpu": name, "stages": done}, indent=2) + "\n")
        for path in RESULTS.glob(f"{gpu}-*.json"):
            shutil.copy2(path, options.out / path.name)
    print("\n".join(f"{row['stage']:32} {row['result']:28} {row['seconds']:>6} s" for row in done))
    return 0 if all(row["result"] == "passed" for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
