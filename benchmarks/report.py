"""Turn results into Markdown tables: python benchmarks/report.py [benchmarks/results/NAME.json ...]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_WORKLOAD = (
    *("detector", "parameters", "method", "paths", "segments"),
    *("utterances", "batch", "samples", "algo", "workers"),
)


def describe(entry: dict[str, Any]) -> str:
    """Say which op and workload an entry is about: "rawboost, batch 16, samples 64600, algo 4"."""
    return ", ".join([entry["op"], *(f"{key} {entry[key]}" for key in _WORKLOAD if key in entry)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(values: dict[str, float]) -> str:
    return f"{_number(values['median'])} ({_number(values['p20'])} to {_number(values['p80'])})"


def _device_work(work: dict[str, float] | None) -> str:
    return f"{work['launches']}, {work['waits']}, {_number(work['kernels_ms'])}" if work else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(result: dict[str, Any]) -> str:
    """Return a result's section: where it was measured, the goals, all times (losses too), what was left out."""
    e = result["environment"]
    versions = ", ".join(
        f"{name} {e['versions'][name]}" for name in ("torch", "triton", "numpy") if name in e["versions"]
    )
    state = f"commit {e['commit'][:12]}" + (", with uncommitted changes" if e["uncommitted"] else "")
    lines = [
        f"### {result['name']}",
        "",
        f"{e['device']}, {e['threads']} thread{'s' if e['threads'] != 1 else ''} of {e['cores']} cores, "
        f"load {e['load_average'][0]} before the start; {versions}; {state}; {e['date'][:10]}. "
        f"Medians (20th to 80th percentile) of interleaved repetitions.",
        "",
        f"`{e['command']}`",
        "",
    ]
    measured = [g for g in result["goals"] if g["met"] is not None]
    if measured:
        goals = [
            [
                g["text"],
                f"{'at least' if g['at_least'] else 'at most'} {g['limit']:g}",
                _number(g["found"]),
                "yes" if g["met"] else "**no**",
            ]
            for g in measured
        ]
        lines += [*_table(["goal", "wanted", "found", "met"], goals), ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(describe(row), []).append(row)
    on_gpu = any(row.get("device_work") for row in result["rows"])
    times = []
    for what, rows in groups.items():
        best = min(row["wall_ms"]["median"] for row in rows)
        for row in sorted(rows, key=lambda row: row["wall_ms"]["median"]):
            memory = row.get("peak_mib")
            times.append(
                [
                    what,
                    row["contender"],
                    _spread(row["wall_ms"]),
                    _spread(row["cpu_ms"]) if row.get("cpu_ms") else "",
                    f"{row['wall_ms']['median'] / best:.2f}",
                    "" if memory is None else _number(memory),
                    *([_device_work(row.get("device_work"))] if on_gpu else []),
                ]
            )
            what = ""
    head = ["workload", "who", "wall ms", "CPU ms", "times the fastest", "peak MiB"]
    lines += _table([*head, "launches, waits, kernels' ms"] if on_gpu else head, times)
    left_out = [*(f"Not timed, wrong: {text}" for text in result["failed"]), *result["skipped"]]
    if left_out:
        lines += ["", "Left out: " + "; ".join(left_out) + "."]
    inexact = [
        f"{row['contender']} ({describe(row)}): relative error {row['relative_error']:.2g}"
        for row in result["rows"]
        if not row.get("within_tolerance", True)
    ]
    if inexact:
        lines += ["", "Timed, though outside the tolerance: " + "; ".join(inexact) + "."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the sections of the given files, or of all results."""
    paths = [Path(a) for a in (sys.argv[1:] if arguments is None else arguments)] or sorted(RESULTS.glob("*.json"))
    print("\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
