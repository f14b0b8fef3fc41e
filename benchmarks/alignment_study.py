"""Does alignment matter? Methods x seeds x RawBoost algorithms x detectors on the small corpus.

For each detector and algorithm every method is trained from the same seeds. Reported per method: the share of steps in
conflict, the epochs to the best dev loss, and the equal error rate on attacks that training did not hold, each as the
mean over seeds with its 95% interval (Student's t), and the difference to plain training of the same seeds (paired).
Runs that are finished are kept: the same command goes on where it was stopped.

    python benchmarks/alignment_study.py corpus --out runs/study --device cuda  # 4 s clips, the whole corpus
    python benchmarks/alignment_study.py corpus --out runs/study --reduced  # 0.5 s clips, a third of the corpus

It writes alignment_study.csv (a row per run), alignment_study.md and alignment_study.png into --results.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gradalign import figures, report
from gradalign._files import atomic_path, write_text
from gradalign.config import TrainConfig
from gradalign.sweep import sweep

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("none", "pcgrad", "gradvac", "cagrad")
# What a GPU trains within a night, and two CPU cores within an hour or two.
FULL = {"num_samples": 64600, "batch_size": 24, "epochs": 50, "patience": 7, "lr": 1e-4, "num_workers": 4}
REDUCED = {"num_samples": 8000, "batch_size": 12, "epochs": 5, "patience": 0, "lr": 1e-3, "amp": "bf16"}
REDUCED_SHARE = 3
# RawNet2 does not begin to learn in so few steps at the rate that suits the others.
REDUCED_LR = {"rawnet2": 3e-4}
_PRECISION = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
MEASURES = (
    ("conflict_share", "steps in conflict, %", 100.0, 1),
    ("best_epoch", "epochs to best dev loss", 1.0, 1),
    ("test_eer", "EER on unseen attacks, %", 100.0, 1),
)


def every_third(corpus: Path, folder: Path) -> Path:
    """A corpus folder with every third clip of each split, attack and speaker of ``corpus``."""
    (folder / "protocols").mkdir(parents=True, exist_ok=True)
    if not (folder / "flac").exists():
        (folder / "flac").symlink_to((corpus / "flac").resolve())
    for split in ("train", "dev", "test"):
        lines = (corpus / "protocols" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        kinds: dict[tuple[str, str], int] = {}
        kept = []
        for line in lines:
            speaker, _, _, attack, _ = line.split()
            count = kinds[speaker, attack] = kinds.get((speaker, attack), -1) + 1
            if count % REDUCED_SHARE == 0:
                kept.append(line + "\n")
        write_text(folder / "protocols" / f"{split}.txt", "".join(kept))
    return folder


def train(args: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """Train what is not trained yet; return the summary of each (detector, algorithm)."""
    data = every_third(args.corpus, args.out / "data") if args.reduced else args.corpus
    settings: dict[str, Any] = REDUCED if args.reduced else FULL
    found = {}
    for detector in args.detectors:
        for algo in args.algos:
            config = TrainConfig(
                data=str(data),
                out=str(args.out / f"{detector}-algo{algo}"),
                detector=detector,
                algo=algo,
                device=args.device,
                class_weights=(0.5, 0.5),
                **settings | ({"lr": REDUCED_LR[detector]} if args.reduced and detector in REDUCED_LR else {}),
            )
            sweep(config, METHODS, range(args.seeds), args.jobs)
            found[detector, algo] = report.summarize(config.out)
    return found


def runs_table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One row per run, every digit kept, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [*(key for key, *_ in MEASURES), "test_eer_all", "dev_eer", "test_min_dcf", "seconds"]
    writer.writerow(["detector", "algo", "method", "seed", *keys])
    for (detector, algo), summary in found.items():
        for method, measured in summary["methods"].items():
            for seed in map(str, measured["seeds"]):
                values = [(measured[key] or {"values": {}})["values"].get(seed, "") for key in keys]
                writer.writerow([detector, algo, method, seed, *values])
    return out.getvalue()


def interval(stat: dict[str, Any], factor: float, digits: int) -> str:
    """Mean over seeds and its 95% interval."""
    values = np.array(list(stat["values"].values())) * factor
    test = report.compare(dict.fromkeys(range(len(values)), 0.0), dict(enumerate(values)))
    assert test is not None
    if test["low"] is None:
        return f"{test['mean']:.{digits}f}"
    return f"{test['mean']:.{digits}f} ({test['low']:.{digits}f} to {test['high']:.{digits}f})"


def difference(summary: dict[str, Any], key: str, method: str, factor: float, digits: int) -> str:
    """The paired difference to plain training, bold where its interval does not hold 0."""
    for c in summary["comparisons"]:
        if c["measure"] == key and c["method"] == method and c["low"] is not None:
            mean, low, high = (f"{c[name] * factor:+.{digits}f}" for name in ("mean", "low", "high"))
            mark = "**" if c["verdict"] == "difference" else ""
            return f"{mark}{mean} ({low} to {high}){mark}"
    return ""


def markdown(found: dict[tuple[str, int], dict[str, Any]], command: str) -> str:
    """The tables, with what they were made of."""
    first = next(iter(found.values()))
    settings = first["settings"]
    device, torch = (str(first["environment"].get(key, "?")) for key in ("device", "torch"))
    runs = sum(measured["runs"] for summary in found.values() for measured in summary["methods"].values())
    lines = [
        "# Alignment study",
        "",
        f"{runs} trainings: {', '.join(METHODS)}; clips of {settings['num_samples'] / settings['sample_rate']:g} s, "
        f"batch {settings['batch_size']}, at most {settings['epochs']} epochs, Adam, forward pass in "
        f"{_PRECISION[settings['amp']]}; on {device}, PyTorch {torch}.",
        "",
        f"`{command}`",
        "",
        "Mean over seeds and its 95% interval; then the difference to `none` of the same seeds, bold where its 95% "
        "interval does not hold 0. With this many comparisons, one in twenty is bold by chance.",
        "",
    ]
    for (detector, algo), summary in found.items():
        commit = str(summary["environment"].get("commit", "?"))[:12]
        lines += [f"## {detector}, RawBoost algorithm {algo}", ""]
        lines += [f"Learning rate {summary['settings']['lr']:g}, commit {commit}.", ""]
        lines += ["| method | " + " | ".join(f"{title} | difference" for _, title, *_ in MEASURES) + " |"]
        lines += ["|---|" + "---:|" * (2 * len(MEASURES))]
        for method, measured in summary["methods"].items():
            cells = [method]
            for key, _, factor, digits in MEASURES:
                cells += [interval(measured[key], factor, digits), difference(summary, key, method, factor, digits)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[tuple[str, int], dict[str, Any]]) -> bytes:
    """A column per detector and algorithm, a row per measure; one dot per seed, the mean as a bar: PNG."""
    with figures.styled():
        figure = figures.new_figure(3.6 * len(found), 3.0 * len(MEASURES))
        axes = figure.subplots(len(MEASURES), len(found), squeeze=False, sharey="row")
        for column, ((detector, algo), summary) in enumerate(found.items()):
            for row, (key, title, factor, _) in enumerate(MEASURES):
                values = {
                    method: {s: factor * v for s, v in measured[key]["values"].items() if math.isfinite(v)}
                    for method, measured in summary["methods"].items()
                }
                figures.draw_seeds(axes[row, column], values)
                if row == 0:
                    axes[row, column].set_title(f"{detector}, RawBoost {algo}")
                if column == 0:
                    axes[row, column].set_ylabel(title)
        for row, (key, _, factor, _) in enumerate(MEASURES):
            tops = [m[key]["max"] * factor for summary in found.values() for m in summary["methods"].values() if m[key]]
            axes[row, 0].set_ylim(0, 1.08 * max(tops) or 1.0)
    return figures.to_bytes(figure, "png", 110)


def main(arguments: list[str] | None = None) -> int:
    """Train, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", type=Path, help="folder that `gradalign corpus build` made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables and the figure")
    parser.add_argument("--detectors", nargs="+", default=["aasist-l", "rawnet2"])
    parser.add_argument("--algos", nargs="+", type=int, default=[4, 5])
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--reduced", action="store_true", help="short clips, a third of the corpus, few epochs: for a CPU"
    )
    words = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(words)
    found = train(args)
    args.results.mkdir(parents=True, exist_ok=True)
    write_text(args.results / "alignment_study.csv", runs_table(found))
    write_text(
        args.results / "alignment_study.md", markdown(found, f"python benchmarks/alignment_study.py {' '.join(words)}")
    )
    with atomic_path(args.results / "alignment_study.png") as temporary:
        temporary.write_bytes(draw(found))
    print(args.results / "alignment_study.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
