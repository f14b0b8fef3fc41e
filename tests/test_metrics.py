"""Metrics against brute-force definitions and, where a path to them is given, against the official packages."""

import importlib.util
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gradalign import metrics
from gradalign.metrics import AsvRates

RNG = np.random.default_rng(0)
SETS = {
    "random": (RNG.normal(1, 1, 300), RNG.normal(-1, 1.3, 700)),
    "tied": (RNG.integers(0, 5, 200).astype(float), RNG.integers(-3, 3, 300).astype(float)),
    "all tied": (np.zeros(5), np.zeros(9)),
    "separable": (RNG.uniform(1, 2, 50), RNG.uniform(-1, 0, 40)),
    "inverted": (RNG.uniform(-1, 0, 50), RNG.uniform(1, 2, 40)),
    "one against one": (np.array([0.3]), np.array([0.1])),
    "tiny": (np.array([0.0, 1.0, 2.0]), np.array([0.5, 3.0])),
    "large scores": (RNG.normal(1e6, 1e6, 60), RNG.normal(-1e6, 1e6, 60)),
}
ASV = AsvRates(p_fa=0.03, p_miss=0.05, p_fa_spoof=0.4)
every_set = pytest.mark.parametrize(("bonafide", "spoof"), SETS.values(), ids=SETS.keys())


def rates(bonafide, spoof):
    """(P_miss, P_fa) at every threshold that can matter, by counting."""
    thresholds = [*sorted({*bonafide, *spoof}), math.inf]
    return [(sum(s < t for s in bonafide) / len(bonafide), sum(s >= t for s in spoof) / len(spoof)) for t in thresholds]


@every_set
def test_det_curve(bonafide, spoof):
    p_miss, p_fa, thresholds = metrics.det_curve(bonafide, spoof)
    assert np.allclose(np.stack([p_miss, p_fa], 1), rates(bonafide, spoof), atol=1e-12)
    assert (np.diff(thresholds) > 0).all()


@every_set
def test_eer(bonafide, spoof):
    best = min(rates(bonafide, spoof), key=lambda r: abs(r[0] - r[1]))
    assert metrics.eer(bonafide, spoof) == pytest.approx(sum(best) / 2, abs=1e-12)


def small_sets(count=300):
    """Untied sets so small that two thresholds often differ equally but for rounding."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        sizes = rng.integers(1, 60, 2)
        yield rng.normal(0.5, 1, sizes[0]), rng.normal(-0.5, 1, sizes[1])


def test_eer_of_small_sets():
    for bonafide, spoof in small_sets():
        best = min(rates(bonafide, spoof), key=lambda r: abs(r[0] - r[1]))
        assert metrics.eer(bonafide, spoof) == sum(best) / 2


def test_eer_of_known_sets():
    assert metrics.eer(*SETS["separable"]) == 0
    assert metrics.eer(*SETS["inverted"]) == 1
    assert metrics.eer(*SETS["all tied"]) == 0.5


@every_set
@pytest.mark.parametrize(("p_spoof", "c_miss", "c_fa"), [(0.05, 1, 10), (0.5, 1, 1), (0.9, 2, 0.5)])
def test_dcf(bonafide, spoof, p_spoof, c_miss, c_fa):
    def cost(p_miss, p_fa):
        return c_miss * (1 - p_spoof) * p_miss + c_fa * p_spoof * p_fa

    default = min(cost(1, 0), cost(0, 1))
    least = min(cost(*r) for r in rates(bonafide, spoof)) / default
    assert metrics.min_dcf(bonafide, spoof, p_spoof, c_miss, c_fa) == pytest.approx(least, abs=1e-12)
    bayes = math.log(c_fa * p_spoof / (c_miss * (1 - p_spoof)))
    p_miss, p_fa = sum(s < bayes for s in bonafide) / len(bonafide), sum(s >= bayes for s in spoof) / len(spoof)
    found = metrics.act_dcf(bonafide, spoof, p_spoof, c_miss, c_fa)
    assert found == pytest.approx(cost(p_miss, p_fa) / default, abs=1e-12)
    assert found >= metrics.min_dcf(bonafide, spoof, p_spoof, c_miss, c_fa) - 1e-12
    assert least <= 1 + 1e-12


def test_dcf_defaults_are_those_of_asvspoof_5():
    bonafide, spoof = SETS["random"]
    assert metrics.min_dcf(bonafide, spoof) == metrics.min_dcf(bonafide, spoof, p_spoof=0.05, c_miss=1, c_fa=10)
    # All spoof accepted, no bona fide rejected: cost 0.5 of a default of min(0.95, 0.5).
    assert metrics.act_dcf([9.0], [9.0]) == pytest.approx(1.0)
    assert metrics.act_dcf([-9.0], [-9.0]) == pytest.approx(0.95 / 0.5)


@every_set
def test_cllr(bonafide, spoof):
    if max(np.abs(bonafide).max(), np.abs(spoof).max()) > 500:
        # The definition overflows where the logarithm is the score itself.
        expected = (np.mean(np.maximum(-bonafide, 0)) + np.mean(np.maximum(spoof, 0))) / 2 / math.log(2)
        assert metrics.cllr(bonafide, spoof) == pytest.approx(expected, rel=1e-4)
    else:
        bits = [math.log2(1 + math.exp(-s)) for s in bonafide], [math.log2(1 + math.exp(s)) for s in spoof]
        assert metrics.cllr(bonafide, spoof) == pytest.approx((np.mean(bits[0]) + np.mean(bits[1])) / 2, abs=1e-12)


@every_set
def test_tandem_dcf(bonafide, spoof):
    p_target, p_nontarget, p_spoof = 0.95 * 0.99, 0.95 * 0.01, 0.05
    # 2019: C1 = P_tar (Cmiss_cm - Cmiss_asv Pmiss_asv) - P_non Cfa_asv Pfa_asv; C2 = Cfa_cm P_spoof Pfa_spoof_asv.
    c1, c2 = p_target * (1 - ASV.p_miss) - p_nontarget * 10 * ASV.p_fa, 10 * p_spoof * ASV.p_fa_spoof
    found = metrics.min_tdcf(bonafide, spoof, asv=ASV, version="2019")
    assert found == pytest.approx(min(c1 * m + c2 * f for m, f in rates(bonafide, spoof)) / min(c1, c2), abs=1e-12)
    c0 = p_target * ASV.p_miss + p_nontarget * 10 * ASV.p_fa
    found = metrics.min_tdcf(bonafide, spoof, asv=ASV)
    least = min(c0 + c1 * m + c2 * f for m, f in rates(bonafide, spoof))
    assert found == pytest.approx(least / (c0 + min(c1, c2)), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_asv_rates_from_tied_scores(seed):
    """Of equal scores, targets are rejected first; the threshold is the score rejected last at the EER."""
    rng = np.random.default_rng(seed)
    target, nontarget, spoof = (rng.normal(mean, 1, count).round(1) for mean, count in ((2, 40), (-1, 50), (1, 30)))
    trials = sorted([(s, 0) for s in target] + [(s, 1) for s in nontarget])
    gaps = [1.0]
    for i in range(len(trials)):
        kinds = [kind for _, kind in trials[: i + 1]]
        gaps.append(abs(kinds.count(0) / 40 - (50 - kinds.count(1)) / 50))
    threshold = trials[gaps.index(min(gaps)) - 1][0]
    found = AsvRates.from_scores(target, nontarget, spoof)
    assert found.p_fa == np.mean(nontarget >= threshold)
    assert found.p_miss == np.mean(target < threshold)
    assert found.p_fa_spoof == np.mean(spoof >= threshold)


def test_asv_rates_from_scores():
    target, nontarget, spoof = RNG.normal(2, 1, 400), RNG.normal(-1, 1, 500), RNG.normal(1, 1, 300)
    found = AsvRates.from_scores(target, nontarget, spoof)
    # A trial is rejected up to and including the threshold where the error rates are equal, accepted from it on after.
    thresholds = sorted({*target, *nontarget})
    best = min(thresholds, key=lambda t: abs(np.mean(target <= t) - np.mean(nontarget > t)))
    expected = (np.mean(nontarget >= best), np.mean(target < best), np.mean(spoof >= best))
    assert (found.p_fa, found.p_miss, found.p_fa_spoof) == pytest.approx(expected)
    # With one trial each, and where nothing is rejected at the equal error rate: the lowest score is accepted.
    for tested in (1.0, 0.0):
        assert AsvRates.from_scores([tested], [0.0], [0.0]) == AsvRates(p_fa=1, p_miss=0, p_fa_spoof=1)
    with pytest.raises(ValueError, match=r"`nontarget` must be finite; found nan at index 0"):
        AsvRates.from_scores([1.0], [math.nan], [0.0])


def test_eer_interval_covers_and_is_reproducible():
    bonafide, spoof = SETS["random"]
    low, high = metrics.eer_interval(bonafide, spoof, resamples=200)
    assert low < metrics.eer(bonafide, spoof) < high
    assert high - low < 0.1
    assert metrics.eer_interval(bonafide, spoof, resamples=200) == (low, high)
    assert metrics.eer_interval(*SETS["separable"], resamples=10) == (0, 0)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("count", "tied"), [(60, False), (250, True), (4, True)])
def test_interval_is_that_of_resampled_trials(clustered, count, tied):
    """The same distribution as resampling for real: quantiles agree within what 4,000 resamples leave open."""
    rng = np.random.default_rng(count)
    bonafide, spoof = rng.normal(1, 1, count), rng.normal(-0.3, 1, count + 5)
    if tied:
        bonafide, spoof = bonafide.round(1), spoof.round(1)
    names = [np.array([f"s{i % k}" for i in range(n)]) for n, k in ((bonafide.size, 7), (spoof.size, 9))]
    every, brute = np.unique(np.concatenate(names)), []
    for _ in range(4000):
        if clustered:
            times = rng.multinomial(every.size, np.full(every.size, 1 / every.size))
            own, other = (times[np.searchsorted(every, n)] for n in names)
            drawn = np.repeat(bonafide, own), np.repeat(spoof, other)
        else:
            drawn = rng.choice(bonafide, bonafide.size), rng.choice(spoof, spoof.size)
        if drawn[0].size and drawn[1].size:
            brute.append(metrics.eer(*drawn))
    found = metrics.eer_interval(bonafide, spoof, 0.9, 4000, clusters=tuple(names) if clustered else None)
    for quantile, bound in zip((0.05, 0.95), found, strict=True):
        below, above = np.quantile(brute, [max(0, quantile - 0.02), min(1, quantile + 0.02)])
        assert below - 1e-9 <= bound <= above + 1e-9


def test_interval_covers_the_true_rate():
    """Normal scores whose EER is known: 95% intervals of 200 draws hold it 190 times, give or take."""
    rng = np.random.default_rng(5)
    true = 0.5 * math.erfc(1 / math.sqrt(2))
    covered = 0
    for i in range(200):
        low, high = metrics.eer_interval(rng.normal(1, 1, 400), rng.normal(-1, 1, 400), resamples=300, seed=i)
        covered += low <= true <= high
    assert 178 <= covered <= 199


def test_interval_of_half_a_million_scores_is_quick():
    rng = np.random.default_rng(6)
    bonafide, spoof = rng.normal(2, 1, 50_000), rng.normal(0, 1, 500_000)
    started = time.process_time()
    low, high = metrics.eer_interval(bonafide, spoof)
    assert low < metrics.eer(bonafide, spoof) < high
    assert time.process_time() - started < 5


def test_clusters_of_another_number_are_named():
    with pytest.raises(ValueError, match="`clusters` must name 2 and 1 trials' clusters; found 1 and 1"):
        metrics.eer_interval([1.0, 2.0], [0.0], clusters=(["a"], ["a"]))


def test_scores_are_invariant_to_monotone_maps_and_order():
    bonafide, spoof = SETS["random"]
    assert metrics.eer(np.tanh(bonafide / 4)[::-1], np.tanh(spoof / 4)) == metrics.eer(bonafide, spoof)
    assert metrics.min_dcf(list(bonafide), tuple(spoof)) == metrics.min_dcf(bonafide, spoof)
    assert metrics.eer(bonafide.astype(np.float32), spoof.astype(np.float32)) == pytest.approx(
        metrics.eer(bonafide, spoof), abs=0.005
    )


@pytest.mark.parametrize(
    ("bonafide", "spoof", "error", "message"),
    [
        (
            [],
            [1.0],
            ValueError,
            r"`bonafide` must be a one-dimensional array of at least one score; found shape \(0,\)",
        ),
        ([1.0], [[1.0]], ValueError, r"`spoof` must be .* found shape \(1, 1\)"),
        ([1.0, math.nan], [1.0], ValueError, r"`bonafide` must be finite; found nan at index 1"),
        ([1.0], [math.inf], ValueError, r"`spoof` must be finite; found inf at index 0"),
        (["a"], [1.0], TypeError, r"`bonafide` must be an array of numbers; found list"),
        (np.ma.array([1.0, 9.0], mask=[0, 1]), [1.0], TypeError, r"`bonafide` must be .*; found a masked array"),
    ],
)
@pytest.mark.parametrize("metric", [metrics.eer, metrics.min_dcf, metrics.act_dcf, metrics.cllr, metrics.det_curve])
def test_bad_scores(metric, bonafide, spoof, error, message):
    with pytest.raises(error, match=message):
        metric(bonafide, spoof)


def test_bad_options():
    good = ([1.0], [0.0])
    with pytest.raises(ValueError, match=r"`p_spoof` must be in \(0, 1\); found 1"):
        metrics.min_dcf(*good, p_spoof=1)
    with pytest.raises(ValueError, match=r"`c_miss` and `c_fa` must be above 0; found 0 and 10"):
        metrics.act_dcf(*good, c_miss=0)
    with pytest.raises(ValueError, match=r"`c_miss` and `c_fa` must be above 0; found 1 and 0"):
        metrics.act_dcf(*good, c_fa=0)
    with pytest.raises(ValueError, match=r"`version` must be '2019' or '2021'; found '2020'"):
        metrics.min_tdcf(*good, asv=ASV, version="2020")
    with pytest.raises(TypeError, match=r"`asv` must be AsvRates; found tuple"):
        metrics.min_tdcf(*good, asv=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"`p_fa` must be in \[0, 1\]; found 1.5"):
        AsvRates(1.5, 0, 0)
    with pytest.raises(ValueError, match=r"leave the detector no weight: C1 = .*, C2 = 0"):
        metrics.min_tdcf(*good, asv=AsvRates(0.1, 0.1, 0))
    with pytest.raises(ValueError, match=r"leave the detector no weight: C1 = -"):
        metrics.min_tdcf(*good, asv=AsvRates(0.9, 1, 0.5))
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\); found 95"):
        metrics.eer_interval(*good, confidence=95)
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\); found 1"):
        metrics.eer_interval(*good, confidence=1)
    with pytest.raises(ValueError, match=r"`resamples` must be at least 2; found 1"):
        metrics.eer_interval(*good, resamples=1)
    assert metrics.eer_interval(*good, resamples=2) == (0, 0)


def official(variable, file):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs {variable}, the folder of the official {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, Path(path) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COSTS = {"Ptar": 0.95 * 0.99, "Pnon": 0.95 * 0.01, "Pspoof": 0.05}
UNTIED = ["random", "separable", "inverted", "one against one", "tiny", "large scores"]


def assert_equal_eer(compute_eer):
    for bonafide, spoof in [*(SETS[name] for name in UNTIED), *small_sets()]:
        assert metrics.eer(bonafide, spoof) == pytest.approx(compute_eer(bonafide, spoof)[0], abs=1e-9)


@pytest.mark.parametrize("name", ["random", "tied", "large scores"])
def test_equals_official_2019_package(name):
    package = official("GRADALIGN_OFFICIAL_AASIST", "evaluation.py")
    assert_equal_eer(package.compute_eer)
    bonafide, spoof = SETS[name]
    costs = COSTS | {"Cmiss_asv": 1, "Cfa_asv": 10, "Cmiss_cm": 1, "Cfa_cm": 10}
    curve, _ = package.compute_tDCF(bonafide, spoof, ASV.p_fa, ASV.p_miss, 1 - ASV.p_fa_spoof, costs, print_cost=False)
    assert metrics.min_tdcf(bonafide, spoof, asv=ASV, version="2019") == pytest.approx(curve.min(), abs=1e-9)


@pytest.mark.parametrize("name", ["random", "tied", "large scores"])
def test_equals_official_2021_package(name):
    package = official("GRADALIGN_PUBLISHED_DPDA", "eval_metrics.py")
    assert_equal_eer(package.compute_eer)
    bonafide, spoof = SETS[name]
    costs = COSTS | {"Cmiss": 1, "Cfa": 10, "Cfa_spoof": 10}
    curve, _ = package.compute_tDCF(bonafide, spoof, ASV.p_fa, ASV.p_miss, ASV.p_fa_spoof, costs, print_cost=False)
    assert metrics.min_tdcf(bonafide, spoof, asv=ASV) == pytest.approx(curve.min(), abs=1e-9)


@pytest.mark.parametrize("decimals", [1, 15])
def test_asv_rates_equal_the_official_packages(decimals):
    package = official("GRADALIGN_PUBLISHED_DPDA", "eval_metrics.py")
    kinds = RNG.normal(2, 1, 400), RNG.normal(-1, 1, 500), RNG.normal(1, 1, 300)
    target, nontarget, spoof = (scores.round(decimals) for scores in kinds)
    _, threshold = package.compute_eer(target, nontarget)
    p_fa, p_miss, _, p_fa_spoof = package.obtain_asv_error_rates(target, nontarget, spoof, threshold)
    found = AsvRates.from_scores(target, nontarget, spoof)
    assert (found.p_fa, found.p_miss, found.p_fa_spoof) == pytest.approx((p_fa, p_miss, p_fa_spoof), abs=1e-9)


@pytest.mark.parametrize("name", ["random", "tied", "separable", "inverted", "one against one", "tiny"])
def test_equals_official_asvspoof_5_package(name):
    package = official("GRADALIGN_OFFICIAL_ASVSPOOF5", "calculate_modules.py")
    assert_equal_eer(package.compute_eer)
    bonafide, spoof = SETS[name]
    p_miss, p_fa, thresholds = package.compute_det_curve(bonafide, spoof)
    expected = package.compute_mindcf(p_miss, p_fa, thresholds, 0.05, 1, 10)[0]
    assert metrics.min_dcf(bonafide, spoof) == pytest.approx(expected, abs=1e-9)
    assert metrics.act_dcf(bonafide, spoof) == pytest.approx(
        package.compute_actDCF(bonafide, spoof, 0.05, 1, 10)[0], abs=1e-9
    )
    assert metrics.cllr(bonafide, spoof) == pytest.approx(package.calculate_CLLR(bonafide, spoof), abs=1e-9)


def test_scores_may_be_tensors_of_a_model():
    bonafide, spoof = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([1.0, 2.5])
    assert metrics.eer(bonafide, spoof) == metrics.eer([2.0, 3.0], [1.0, 2.5])
    assert metrics.eer(bonafide.bfloat16(), spoof.half()) == metrics.eer(bonafide, spoof)
