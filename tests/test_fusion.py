from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from gradalign import metrics
from gradalign._errors import DataError
from gradalign.evaluation import Scores
from gradalign.fusion import Fusion


def scores_of(values, labels, names=None):
    labels = np.asarray(labels, bool)
    names = names or [f"u{i}" for i in range(len(labels))]
    return Scores(names, ["-"] * len(labels), labels, np.asarray(values, float))


def two_detectors(count, seed):
    """Two detectors of uncalibrated scores whose errors are independent."""
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.3
    signs = np.where(labels, 1.0, -1.0)
    return [
        scores_of(3 * (signs + rng.normal(0, 1.2, count)) + 7, labels),
        scores_of(0.1 * (signs + rng.normal(0, 1.5, count)), labels),
    ]


@pytest.mark.parametrize("prior", [0.5, 0.05, 0.99])
def test_logistic_weights_minimise_the_weighted_cross_entropy(prior):
    systems = two_detectors(2000, 0)
    fusion = Fusion.fit(systems, prior)
    labels, values = systems[0].bonafide, np.stack([s.values for s in systems])
    shift = np.log(prior / (1 - prior))

    def cost(w):
        llr = w[:2] @ values + w[2] + shift
        return prior * np.logaddexp(0, -llr[labels]).mean() + (1 - prior) * np.logaddexp(0, llr[~labels]).mean()

    best = optimize.minimize(cost, np.zeros(3), method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-15})
    ours = cost(np.array([*fusion.weights, fusion.offset]))
    assert ours <= best.fun * (1 + 1e-6)
    np.testing.assert_allclose([*fusion.weights, fusion.offset], best.x, rtol=5e-3, atol=1e-3)


def test_a_fusion_of_independent_detectors_is_better_than_each():
    fusion = Fusion.fit(two_detectors(3000, 1))
    systems = two_detectors(3000, 2)
    fused = fusion(systems)
    assert metrics.eer(*fused.split()) < 0.85 * min(metrics.eer(*s.split()) for s in systems)
    assert metrics.cllr(*fused.split()) < 0.85 * min(metrics.cllr(*s.split()) for s in systems)


def test_one_detector_alone_is_calibrated():
    """Normal scores of equal variance: the log-likelihood ratio is known, and the scale of the scores is not."""
    rng = np.random.default_rng(3)
    labels = rng.random(40_000) < 0.5
    llr = np.where(labels, 1, -1) * 2 + rng.normal(0, 2, labels.size)
    found = Fusion.fit([scores_of(llr * 0.3 - 5, labels)])
    np.testing.assert_allclose([found.weights[0] * 0.3, found.offset - 5 * found.weights[0]], [1, 0], atol=0.05)


def test_the_mean_is_the_mean_whatever_the_order_of_lines():
    first = scores_of([1, 2, 3], [1, 0, 0], ["a", "b", "c"])
    second = scores_of([30, 10, 20], [0, 1, 0], ["c", "a", "b"])
    first = replace(first, codecs=["opus", "-", "g722"], speakers=["p1", "p2", "p2"])
    fused = Fusion.mean(2)([first, second])
    assert fused.utterances == ["a", "b", "c"]
    assert (fused.codecs, fused.speakers) == (first.codecs, first.speakers)
    assert fused.values.tolist() == [5.5, 11, 16.5]


def test_separable_scores_have_finite_weights():
    fusion = Fusion.fit([scores_of([1, 2, -1, -2], [1, 1, 0, 0]), scores_of([0, 0, 0, 0], [1, 1, 0, 0])])
    assert np.isfinite([*fusion.weights, fusion.offset]).all()
    assert fusion.weights[0] > 0
    assert fusion.weights[1] == 0


@pytest.mark.parametrize("value", [0.1, -1e9 / 3, 0.0])
def test_a_constant_detector_has_no_weight(value):
    """The standard deviation of equal numbers may be what rounding left."""
    labels = [1, 1, 1, 0, 0, 0, 0]
    rest = Fusion.fit([scores_of([1, 2, -1, -2, -1, 1, 0], labels)])
    both = Fusion.fit([scores_of([1, 2, -1, -2, -1, 1, 0], labels), scores_of([value] * 7, labels)])
    assert both.weights[0] == pytest.approx(rest.weights[0], rel=1e-6)
    assert abs(both.weights[1] * value) < 1e-6
    assert both.offset == pytest.approx(rest.offset, abs=1e-6)


def test_what_does_not_fit_is_named():
    a, b = scores_of([1, 2], [1, 0]), scores_of([1, 2], [1, 0], ["u0", "x"])
    with pytest.raises(DataError, match=r"2 of the first and 2 of number 2 \(for example 'u1'"):
        Fusion.mean(2)([a, b])
    with pytest.raises(DataError, match=r"2 of the first and 3 of number 2 \(for example 'u2'"):
        Fusion.mean(2)([a, scores_of([1, 2, 3], [1, 0, 0])])
    with pytest.raises(DataError, match="found 'u0' as both in number 1 and 2"):
        Fusion.mean(2)([a, scores_of([1, 2], [0, 1])])
    with pytest.raises(ValueError, match="expected the scores of 2 detectors; found 1"):
        Fusion.mean(2)([a])
    with pytest.raises(ValueError, match="at least one detector; found none"):
        Fusion.fit([])
    with pytest.raises(DataError, match="found 2 bona fide of 2"):
        Fusion.fit([scores_of([1, 2], [1, 1])])
    with pytest.raises(DataError, match="found 0 bona fide of 2"):
        Fusion.fit([scores_of([1, 2], [0, 0])])
    with pytest.raises(ValueError, match=r"`prior` must be in \(0, 1\); found 1"):
        Fusion.fit([a], prior=1)
