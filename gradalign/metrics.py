"""Metrics of speech-deepfake detection: EER, DCF, Cllr and tandem DCF.

Scores are one-dimensional arrays, higher means more bona fide. A trial is accepted when its score is at or above the
threshold: P_miss is the share of bona fide trials rejected, P_fa the share of spoofed trials accepted. Trials with
equal scores are always accepted or rejected together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Scores = npt.ArrayLike
# Priors of the tandem DCF: 5% spoofing attacks, and one non-target among a hundred other trials.
_P_SPOOF = 0.05
_P_TARGET = (1 - _P_SPOOF) * 0.99
_P_NONTARGET = (1 - _P_SPOOF) * 0.01


def _check(name: str, scores: _Scores) -> np.ndarray:
    if isinstance(scores, np.ma.MaskedArray):
        raise TypeError(f"`{name}` must be an array without a mask; found a masked array (`compressed()` is without)")
    try:
        # NumPy has no bfloat16.
        array = np.asarray(scores.detach().cpu().double() if hasattr(scores, "detach") else scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array of numbers; found {type(scores).__name__}") from error
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{name}` must be a one-dimensional array of at least one score; found shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"`{name}` must be finite; found {array[bad]} at index {bad}")
    return array


def det_curve(bonafide: _Scores, spoof: _Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (P_miss, P_fa, thresholds) at every distinct score and at infinity, thresholds ascending.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].

    Raises:
        TypeError, ValueError: for scores that are no finite one-dimensional arrays.

    >>> p_miss, p_fa, thresholds = det_curve([1.0, 3.0], [0.0, 2.0])
    >>> p_miss.tolist(), p_fa.tolist(), thresholds.tolist()
    ([0.0, 0.0, 0.5, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, inf])
    """
    positive, negative = np.sort(_check("bonafide", bonafide)), np.sort(_check("spoof", spoof))
    thresholds = np.append(np.unique(np.concatenate([positive, negative])), np.inf)
    p_miss = np.searchsorted(positive, thresholds, side="left") / positive.size
    p_fa = (negative.size - np.searchsorted(negative, thresholds, side="left")) / negative.size
    return p_miss, p_fa, thresholds


def eer(bonafide: _Scores, spoof: _Scores) -> float:
    """Equal error rate in [0, 1]: the mean of P_miss and P_fa at the lowest threshold where they differ least.

    The definition of the ASVspoof evaluation packages (2019, 2021 and 5: ``compute_eer``), bit for bit where no score
    occurs twice. Where one does, they sort bona fide trials first and may so stop between tied trials, at a point that
    no threshold reaches (a detector without information then has an EER of 1); here ties stay together.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].

    Raises:
        TypeError, ValueError: for scores that are no finite one-dimensional arrays.

    >>> eer([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 1.5, -1.0])
    0.25
    """
    p_miss, p_fa, _ = det_curve(bonafide, spoof)
    at = _equal_error_index(p_miss, p_fa)
    return float(p_miss[at] + p_fa[at]) / 2


def _equal_error_index(p_miss: np.ndarray, p_fa: np.ndarray) -> int:
    # The float64 rates decide, unrounded: where two thresholds differ equally but for rounding, the official packages
    # take the one that this takes.
    return int(np.argmin(np.abs(p_miss - p_fa)))


def eer_interval(
    bonafide: _Scores,
    spoof: _Scores,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    clusters: tuple[Sequence[str], Sequence[str]] | None = None,
) -> tuple[float, float]:
    """Bootstrap confidence interval of the EER: percentiles of the EERs of resampled trials.

    Without ``clusters`` each class' trials are drawn with replacement. With them, whole clusters are (all trials of a
    speaker, say), since trials of one speaker are not independent (Ferrer & Riera, "Confidence intervals for evaluation
    in machine learning", 2023); with few clusters, ten or less, say, the interval is too narrow. No resampled set is
    ever made: the EER is found by bisection, and how many drawn trials lie below a threshold follows binomial
    distributions given those of the thresholds around it.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].
        confidence: in (0, 1).
        resamples: number of bootstrap samples, at least 2.
        seed: of the resampling; the same seed gives the same interval.
        clusters: the cluster of each bona fide and of each spoofed trial, N and M names.

    Raises:
        TypeError, ValueError: for bad scores or options.

    >>> low, high = eer_interval([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 1.5, -1.0])
    >>> 0 <= low <= 0.25 <= high <= 1
    True
    """
    positive, negative = _check("bonafide", bonafide), _check("spoof", spoof)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1); found {confidence}")
    if resamples < 2:
        raise ValueError(f"`resamples` must be at least 2; found {resamples}")
    rng = np.random.default_rng(seed)
    thresholds = np.append(np.unique(np.concatenate([positive, negative])), np.inf)
    classes = [np.sort(positive), np.sort(negative)]
    if clusters is None:
        draws = [_Draws(values, thresholds, resamples, rng) for values in classes]
    else:
        names = [np.asarray(names) for names in clusters]
        if [len(n) for n in names] != [positive.size, negative.size]:
            raise ValueError(
                f"`clusters` must name {positive.size} and {negative.size} trials' clusters; found "
                f"{' and '.join(str(len(n)) for n in names)}"
            )
        every = np.unique(np.concatenate(names))
        times = rng.multinomial(every.size, np.full(every.size, 1 / every.size), resamples)
        pairs = zip((positive, negative), names, strict=True)
        draws = [_ClusterDraws(values, own, every, times, thresholds) for values, own in pairs]
    rates = _bisect_eer(draws[0], draws[1], thresholds.size, resamples)
    low, high = np.nanquantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


class _Draws:
    """Of each resample: the share of drawn trials below thresholds[index], found as the search asks for it.

    Of n trials drawn with replacement, those below a threshold are binomial; between two thresholds whose counts are
    known, those below a third one are again.
    """

    def __init__(self, values: np.ndarray, thresholds: np.ndarray, resamples: int, rng: np.random.Generator) -> None:
        self.below = np.searchsorted(values, thresholds, side="left")
        self.size, self.rng = values.size, rng
        # The counts at the ends of each resample's bracket.
        self.known = np.stack([np.zeros(resamples, np.int64), np.full(resamples, values.size)])

    def share(self, low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> np.ndarray:
        below = self.below[np.stack([low, middle, high])]
        room = below[2] - below[0]
        chance = np.where(room > 0, (below[1] - below[0]) / np.maximum(room, 1), 0.0)
        self.found = self.known[0] + self.rng.binomial(self.known[1] - self.known[0], chance)
        return self.found / self.size

    def narrow(self, upper: np.ndarray) -> None:
        """Take what was found last for the bracket's upper end where ``upper``, else for its lower one."""
        self.known = np.where(np.stack([~upper, upper]), self.found, self.known)

    def ends(self) -> np.ndarray:
        return self.known / self.size


class _ClusterDraws(_Draws):
    """The same where whole clusters are drawn, each ``times`` [resamples, clusters] times."""

    def __init__(
        self, values: np.ndarray, own: np.ndarray, every: np.ndarray, times: np.ndarray, thresholds: np.ndarray
    ) -> None:
        order = np.argsort(values, kind="stable")
        cluster = np.searchsorted(every, own[order])
        self.sorted = [values[order][cluster == c] for c in range(every.size)]
        self.times, self.thresholds = times, thresholds
        self.size = times @ np.array([part.size for part in self.sorted])
        self.known = np.stack([np.zeros(len(times), np.int64), self.size])

    def share(self, low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> np.ndarray:
        at = self.thresholds[middle]
        self.found = np.zeros(len(at), np.int64)
        for part, times in zip(self.sorted, self.times.T, strict=True):
            if part.size:
                self.found += times * np.searchsorted(part, at, side="left")
        return self.found / np.maximum(self.size, 1)

    def ends(self) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.known / self.size


def _bisect_eer(positive: _Draws, negative: _Draws, count: int, resamples: int) -> np.ndarray:
    """The EER of each resample: P_miss - P_fa never falls with the threshold, from -1 at the lowest to 1."""
    low, high = np.zeros(resamples, np.int64), np.full(resamples, count - 1)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        miss = positive.share(low, middle, high)
        accept = 1 - negative.share(low, middle, high)
        upper = miss - accept >= 0
        # A bracket that is closed stays as it is: its middle is its lower end.
        positive.narrow(upper)
        negative.narrow(upper)
        low, high = np.where(upper, low, middle), np.where(upper, middle, high)
    misses, accepts = positive.ends(), 1 - negative.ends()
    gaps = np.abs(misses - accepts)
    return np.where(gaps[0] <= gaps[1], misses[0] + accepts[0], misses[1] + accepts[1]) / 2


def _check_costs(p_spoof: float, c_miss: float, c_fa: float) -> tuple[float, float]:
    """Return the weights of P_miss and P_fa."""
    if not 0 < p_spoof < 1:
        raise ValueError(f"`p_spoof` must be in (0, 1); found {p_spoof}")
    if c_miss <= 0 or c_fa <= 0:
        raise ValueError(f"`c_miss` and `c_fa` must be above 0; found {c_miss} and {c_fa}")
    return c_miss * (1 - p_spoof), c_fa * p_spoof


def min_dcf(bonafide: _Scores, spoof: _Scores, p_spoof: float = 0.05, c_miss: float = 1, c_fa: float = 10) -> float:
    """Minimum normalised detection cost over all thresholds; the defaults are those of ASVspoof 5.

    DCF(t) = c_miss (1 - p_spoof) P_miss(t) + c_fa p_spoof P_fa(t), divided by the cost of the better of accepting or
    rejecting everything, min(c_miss (1 - p_spoof), c_fa p_spoof). Source: ASVspoof 5 (Wang et al., 2024, arXiv
    2408.08739), ``compute_mindcf`` of its evaluation package.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].
        p_spoof: prior probability of a spoofing attack.
        c_miss: cost of rejecting bona fide speech.
        c_fa: cost of accepting spoofed speech.

    Raises:
        TypeError, ValueError: for bad scores, priors or costs.

    >>> min_dcf([1.0, 2.0], [-1.0, 0.0])
    0.0
    """
    miss, fa = _check_costs(p_spoof, c_miss, c_fa)
    p_miss, p_fa, _ = det_curve(bonafide, spoof)
    return float((miss * p_miss + fa * p_fa).min() / min(miss, fa))


def act_dcf(bonafide: _Scores, spoof: _Scores, p_spoof: float = 0.05, c_miss: float = 1, c_fa: float = 10) -> float:
    """Actual normalised detection cost at the Bayes threshold, for scores that are log-likelihood ratios.

    As `min_dcf`, at the one threshold ln(c_fa p_spoof / (c_miss (1 - p_spoof))), which is right for natural-log
    likelihood ratios of bona fide to spoof. Source: ASVspoof 5, ``compute_actDCF`` of its evaluation package.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].
        p_spoof: prior probability of a spoofing attack.
        c_miss: cost of rejecting bona fide speech.
        c_fa: cost of accepting spoofed speech.

    Raises:
        TypeError, ValueError: for bad scores, priors or costs.

    >>> act_dcf([5.0, 6.0], [-5.0, -6.0]), act_dcf([-5.0], [5.0]) > 1
    (0.0, True)
    """
    miss, fa = _check_costs(p_spoof, c_miss, c_fa)
    threshold = np.log(fa / miss)
    p_miss = np.mean(_check("bonafide", bonafide) < threshold)
    p_fa = np.mean(_check("spoof", spoof) >= threshold)
    return float((miss * p_miss + fa * p_fa) / min(miss, fa))


def cllr(bonafide: _Scores, spoof: _Scores) -> float:
    """Cost of log-likelihood ratios in bits: 0 for a perfect, 1 for a useless but calibrated detector.

    Cllr = (mean log2(1 + exp(-s)) over bona fide + mean log2(1 + exp(s)) over spoof) / 2, with s natural-log
    likelihood ratios. Source: Brümmer and du Preez, "Application-independent evaluation of speaker detection", 2006;
    ``calculate_CLLR`` of the ASVspoof 5 evaluation package.

    Args:
        bonafide: scores of bona fide trials [N].
        spoof: scores of spoofed trials [M].

    Raises:
        TypeError, ValueError: for scores that are no finite one-dimensional arrays.

    >>> cllr([0.0], [0.0])
    1.0
    """
    miss = np.logaddexp(0, -_check("bonafide", bonafide)).mean()
    fa = np.logaddexp(0, _check("spoof", spoof)).mean()
    return float((miss + fa) / 2 / np.log(2))


@dataclass(frozen=True)
class AsvRates:
    """Error rates of the speaker verification system that a detector works in tandem with, each in [0, 1].

    Attributes:
        p_fa: share of non-target trials accepted.
        p_miss: share of target trials rejected.
        p_fa_spoof: share of spoofed trials accepted.

    >>> AsvRates(p_fa=0.02, p_miss=0.03, p_fa_spoof=0.5).p_miss
    0.03
    """

    p_fa: float
    p_miss: float
    p_fa_spoof: float

    def __post_init__(self) -> None:
        for name in ("p_fa", "p_miss", "p_fa_spoof"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1]; found {getattr(self, name)}")

    @classmethod
    def from_scores(cls, target: _Scores, nontarget: _Scores, spoof: _Scores) -> AsvRates:
        """Return the rates at the verification system's EER threshold, as the ASVspoof packages fix it.

        Source: ``compute_eer`` and ``obtain_asv_error_rates`` of their evaluation packages. The threshold is the
        highest score rejected at the EER, and that score is then accepted: one trial apart from the EER's own rates,
        and kept because published tandem costs depend on it. So is their order among equal scores, targets first.

        Args:
            target: verification scores of target trials [N].
            nontarget: of zero-effort impostors [M].
            spoof: of spoofed trials [L].

        Raises:
            TypeError, ValueError: for scores that are no finite one-dimensional arrays.

        >>> AsvRates.from_scores([1.0, 2.0], [-1.0, 0.0], [0.5, -1.5])
        AsvRates(p_fa=0.5, p_miss=0.0, p_fa_spoof=0.5)
        """
        tested, impostors, attacks = _check("target", target), _check("nontarget", nontarget), _check("spoof", spoof)
        # One trial after the other is rejected, of equal scores the targets first: the EER may be found amid them.
        both = np.concatenate([tested, impostors])
        order = np.argsort(both, kind="stable")
        misses = np.append(0, np.cumsum(order < tested.size))
        accepts = impostors.size - (np.arange(both.size + 1) - misses)
        at = _equal_error_index(misses / tested.size, accepts / impostors.size)
        # Where nothing is rejected at the EER, the lowest score keeps it so.
        threshold = both[order[max(at - 1, 0)]]
        return cls(
            p_fa=float(np.mean(impostors >= threshold)),
            p_miss=float(np.mean(tested < threshold)),
            p_fa_spoof=float(np.mean(attacks >= threshold)),
        )


def min_tdcf(bonafide: _Scores, spoof: _Scores, asv: AsvRates, version: str = "2021") -> float:
    """Minimum normalised tandem detection cost of a detector in front of a fixed speaker verification system.

    t-DCF(t) = C0 + C1 P_miss(t) + C2 P_fa(t), with spoofing prior 0.05, target and non-target priors 0.9405 and
    0.0095, unit cost of misses and cost 10 of false acceptances. ``"2019"``: C0 is left out, and the minimum is
    divided by min(C1, C2) (ASVspoof 2019 evaluation plan). ``"2021"``: divided by C0 + min(C1, C2) (Kinnunen et al.,
    "Tandem assessment of spoofing countermeasures and automatic speaker verification: fundamentals", 2020, as in
    ASVspoof 2021).

    Args:
        bonafide: detector's scores of bona fide trials [N].
        spoof: of spoofed trials [M].
        asv: error rates of the verification system.
        version: "2021" or "2019".

    Raises:
        TypeError, ValueError: for bad scores or version, or rates that leave the detector no weight (C1 or C2 not
            above 0).

    >>> round(min_tdcf([1.0, 2.0], [-1.0, 0.0], AsvRates(0.02, 0.03, 0.5), "2019"), 12)
    0.0
    """
    if version not in ("2019", "2021"):
        raise ValueError(f"`version` must be '2019' or '2021'; found {version!r}")
    if not isinstance(asv, AsvRates):
        raise TypeError(f"`asv` must be AsvRates; found {type(asv).__name__}")
    asv_cost = _P_TARGET * asv.p_miss + _P_NONTARGET * 10 * asv.p_fa
    c0 = asv_cost if version == "2021" else 0.0
    c1 = _P_TARGET - asv_cost
    c2 = _P_SPOOF * 10 * asv.p_fa_spoof
    if c1 <= 0 or c2 <= 0:
        raise ValueError(
            f"these ASV error rates leave the detector no weight: C1 = {c1:.6g}, C2 = {c2:.6g}; found {asv}"
        )
    p_miss, p_fa, _ = det_curve(bonafide, spoof)
    return float((c0 + c1 * p_miss + c2 * p_fa).min() / (c0 + min(c1, c2)))
