"""Fusion of the scores of several detectors, as their mean or by logistic regression: `gradalign fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradalign._errors import DataError
from gradalign.evaluation import Scores

_RIDGE = 1e-6
"""Weight decay of the standardised scores' weights: separable scores have finite weights too."""


@dataclass(frozen=True)
class Fusion:
    """``sum of weights[i] * scores of detector i + offset``.

    >>> Fusion.mean(2)
    Fusion(weights=(0.5, 0.5), offset=0.0)
    """

    weights: tuple[float, ...]
    offset: float = 0.0

    @classmethod
    def mean(cls, count: int) -> Fusion:
        """The mean score of ``count`` detectors."""
        return cls((1 / count,) * count)

    @classmethod
    def fit(cls, systems: Sequence[Scores], prior: float = 0.5) -> Fusion:
        """Logistic regression, trained on scores of utterances that are not those to be fused (a dev set).

        The fused score is a log-likelihood ratio, as ``act DCF`` and ``Cllr`` expect. One detector alone is calibrated.
        The weights minimise the cross-entropy weighted by ``prior``, which at 0.5 is Cllr (Brümmer & du Preez,
        "Application-independent evaluation of speaker detection", 2006), by Newton's method.

        Args:
            systems: the scores of each detector for the same utterances, in any order.
            prior: probability of bona fide speech, in (0, 1), at which the ratios must be best.

        Raises:
            DataError: when the detectors scored different utterances, or one class is missing.
            ValueError: for no detector, or a prior outside (0, 1).
        """
        if not 0 < prior < 1:
            raise ValueError(f"`prior` must be in (0, 1); found {prior}")
        values, labels = _aligned(systems), systems[0].bonafide
        if labels.all() or not labels.any():
            raise DataError(
                f"expected bona fide and spoofed scores to train on; found {labels.sum()} bona fide of {len(labels)}"
            )
        mean, sd = values.mean(1, keepdims=True), values.std(1, keepdims=True)
        # Equal scores may differ from their rounded mean.
        sd[sd <= 1e-12 * np.abs(mean)] = 1
        inputs = np.vstack([(values - mean) / sd, np.ones(values.shape[1])])
        share = np.where(labels, prior / labels.sum(), (1 - prior) / (~labels).sum())
        found = _newton(inputs, np.where(labels, 1.0, -1.0), share, np.log(prior / (1 - prior)))
        weights = found[:-1] / sd[:, 0]
        return cls(tuple(weights.tolist()), float(found[-1] - weights @ mean[:, 0]))

    def __call__(self, systems: Sequence[Scores]) -> Scores:
        """The fused scores, in the order of the first detector's.

        Raises:
            ValueError: for another number of detectors than weights.
            DataError: when the detectors scored different utterances, or disagree about a label.
        """
        if len(systems) != len(self.weights):
            raise ValueError(f"expected the scores of {len(self.weights)} detectors; found {len(systems)}")
        first = systems[0]
        fused = np.array(self.weights) @ _aligned(systems) + self.offset
        return Scores(first.utterances, first.attacks, first.bonafide, fused, first.codecs, first.speakers)


def _aligned(systems: Sequence[Scores]) -> np.ndarray:
    """Scores float64 [systems, N], in the order of the first one's utterances."""
    if not systems:
        raise ValueError("expected the scores of at least one detector; found none")
    first, rows = systems[0], []
    for number, system in enumerate(systems, start=1):
        at = {name: i for i, name in enumerate(system.utterances)}
        missing = [name for name in first.utterances if name not in at]
        if missing or len(system) != len(first):
            example = missing[0] if missing else next(n for n in system.utterances if n not in set(first.utterances))
            raise DataError(
                f"all detectors must have scored the same utterances; found {len(first)} of the first and "
                f"{len(system)} of number {number} (for example {example!r} of one alone)"
            )
        order = [at[name] for name in first.utterances]
        if not np.array_equal(system.bonafide[order], first.bonafide):
            wrong = first.utterances[int(np.nonzero(system.bonafide[order] != first.bonafide)[0][0])]
            raise DataError(
                f"all detectors must have the same labels; found {wrong!r} as both in number 1 and {number}"
            )
        rows.append(system.values[order])
    return np.stack(rows)


def _newton(inputs: np.ndarray, signs: np.ndarray, share: np.ndarray, prior_log_odds: float) -> np.ndarray:
    """Minimise sum of share * log(1 + exp(-sign * (w @ inputs + prior_log_odds))), with a little weight decay."""
    decay = np.append(np.full(len(inputs) - 1, _RIDGE), 0.0)

    def cost(w: np.ndarray) -> float:
        margins = signs * (w @ inputs + prior_log_odds)
        return float(share @ np.logaddexp(0, -margins) + decay @ w**2 / 2)

    weights = np.zeros(len(inputs))
    now = cost(weights)
    for _ in range(100):
        miss = 1 / (1 + np.exp(np.clip(signs * (weights @ inputs + prior_log_odds), -500, 500)))
        gradient = inputs @ (-signs * share * miss) + decay * weights
        curvature = (inputs * (share * miss * (1 - miss))) @ inputs.T + np.diag(decay + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        scale = 1.0
        # Far from the minimum a whole step may overshoot.
        while (next_cost := cost(weights - scale * step)) > now and scale > 1e-6:
            scale /= 2
        if now - next_cost <= 1e-14 * now:
            break
        weights, now = weights - scale * step, next_cost
    return weights
