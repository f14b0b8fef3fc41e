"""Does anything but the speech tell the classes apart? A linear classifier on trivial cues must stay near chance."""

from __future__ import annotations

import numpy as np

from gradalign import metrics
from gradalign.data.corpus.signal import FRAME, RATE, active_rms, frame_energy

CUES = (
    "level_db",
    "duration_s",
    "rolloff_85_hz",
    "rolloff_95_hz",
    "noise_floor_db",
    "silent_share",
    "lead_s",
    "tail_s",
)
# Below this the cues give the classes away.
MIN_EER = 0.40


def cues(wave: np.ndarray) -> np.ndarray:
    """Level, duration, spectral roll-off, noise floor and silence statistics of a clip [T] at 16 kHz: float64 [8]."""
    energy_db = 10 * np.log10(frame_energy(wave) + 1e-12)
    level_db = 20 * np.log10(active_rms(wave) + 1e-9)
    spectrum = np.cumsum(np.abs(np.fft.rfft(wave)) ** 2)
    rolloff = [np.searchsorted(spectrum, share * spectrum[-1]) / len(spectrum) * RATE / 2 for share in (0.85, 0.95)]
    floor_db = np.percentile(energy_db, 5)
    silent = energy_db < level_db - 15
    loud = np.flatnonzero(~silent)
    lead, tail = loud[0], len(silent) - 1 - loud[-1]
    return np.array(
        [
            level_db,
            len(wave) / RATE,
            *rolloff,
            floor_db - level_db,
            np.mean(silent),
            lead * FRAME / RATE,
            tail * FRAME / RATE,
        ]
    )


def cue_eer(features: np.ndarray, labels: np.ndarray, folds: int = 5, seed: int = 0) -> float:
    """EER of a cross-validated linear classifier: ``features`` [N, F], ``labels`` bool [N], True for bona fide.

    Logistic regression with an L2 penalty, by Newton's method; each clip is scored by the model that did not see it.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    scores = np.zeros(len(labels))
    for fold in range(folds):
        held_out = np.zeros(len(labels), dtype=bool)
        held_out[order[fold::folds]] = True
        mean, deviation = features[~held_out].mean(0), features[~held_out].std(0) + 1e-9
        design = np.column_stack([(features - mean) / deviation, np.ones(len(labels))])
        seen, target = design[~held_out], labels[~held_out].astype(float)
        # Both classes weigh the same, however many clips they have.
        balance = np.where(labels[~held_out], 0.5 / target.mean(), 0.5 / (1 - target.mean()))
        weights = np.zeros(design.shape[1])
        for _ in range(25):
            probability = 1 / (1 + np.exp(-seen @ weights))
            gradient = seen.T @ (balance * (probability - target)) + weights
            curvature = (seen * (balance * probability * (1 - probability))[:, None]).T @ seen + np.eye(len(weights))
            weights -= np.linalg.solve(curvature, gradient)
        scores[held_out] = design[held_out] @ weights
    return metrics.eer(scores[labels], scores[~labels])
