import csv
import json
from pathlib import Path

import numpy as np
import pytest


def _write_scores(path, rng, attacks, difficulty, count=120):
    lines = [f"h{i:04d} - bonafide {rng.normal(2.0, 1.5):.6f}" for i in range(count)]
    for attack in attacks:
        shift = difficulty[attack]
        lines += [f"{attack}{i:04d} {attack} spoof {rng.normal(shift, 1.5):.6f}" for i in range(count // 3)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def write_run():
    """A function that writes a plausible finished (or unfinished) training run folder without training."""

    def write(runs: Path, method: str, seed: int, epochs: int = 8, steps: int = 20, gain: float = 0.0, finished=True):
        rng = np.random.default_rng([seed, *method.encode()])
        folder = runs / f"{method}-seed{seed}"
        folder.mkdir(parents=True)
        config = {"align": method, "seed": seed, "detector": "light", "algo": 4, "lr": 1e-3, "data": "corpus"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "environment.json").write_text(json.dumps({"torch": "2.11.0", "threads": 2}))
        cosines = np.clip(rng.normal(0.15 - 0.2 * np.linspace(0, 1, epochs * steps), 0.25), -1, 1)
        rows = []
        for epoch in range(epochs):
            part = cosines[epoch * steps : (epoch + 1) * steps]
            decay = np.exp(-epoch / (3 - gain))
            rows.append(
                {
                    "epoch": epoch + 1,
                    "steps": (epoch + 1) * steps,
                    "lr": 1e-3,
                    "train_loss": 0.1 + 0.5 * decay + rng.normal(0, 0.01),
                    "train_loss_clean": 0.08 + 0.5 * decay,
                    "train_loss_augmented": 0.12 + 0.5 * decay,
                    "dev_loss": 0.25 + 0.4 * decay + 0.01 * max(0, epoch - 5) + rng.normal(0, 0.015),
                    "dev_eer": float(np.clip(0.06 + 0.3 * decay + rng.normal(0, 0.01), 0, 1)),
                    "conflict_rate": float(np.mean(part < 0)),
                    "cosine_mean": float(part.mean()),
                    "skipped_steps": 0,
                    "seconds": 12.5,
                }
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (folder / "steps.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "cosine"])
            writer.writerows((i + 1, f"{c:.9g}") for i, c in enumerate(cosines))
        if finished:
            shift = gain + rng.normal(0, 0.2)
            difficulty = {"espeak": -3.0, "world": -2.0, "hifigan": 0.5 - shift, "vits": -0.6 - shift, "kokoro": -shift}
            _write_scores(folder / "scores_dev.txt", rng, ["espeak", "world"], difficulty)
            _write_scores(folder / "scores_test.txt", rng, list(difficulty)[1:], difficulty)
            (folder / "results.json").write_text(json.dumps({"seconds": 12.5 * epochs}))
        return folder

    return write
