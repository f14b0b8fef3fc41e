"""RawBoost: the published outputs, independence of everything but the seed, the sampled distributions, misuse."""

import ast
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import DRAWN, RELATIVE, max_norm_error

import gradalign as ga
from gradalign import reference
from gradalign.rawboost import RawBoostConfig

PUBLISHED = np.load(Path(__file__).parent / "data" / "rawboost_published.npz")
CASES = sorted({key.split("_")[0] for key in PUBLISHED if key.startswith("case")}, key=lambda case: int(case[4:]))
PUBLISHED_NAMES = {
    "N_f": 5, "nBands": 5, "minF": 20, "maxF": 8000, "minBW": 100, "maxBW": 1000, "minCoeff": 10, "maxCoeff": 100,
    "minG": 0, "maxG": 0, "minBiasLinNonLin": 5, "maxBiasLinNonLin": 20, "P": 10, "g_sd": 2, "SNRmin": 10, "SNRmax": 40,
}  # fmt: skip
BACKENDS = ["reference", "cpp"]
T = 2000


def wave(batch=3, num_samples=T, scale=0.3, dtype=torch.float32):
    return (
        scale * torch.randn(batch, num_samples, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).to(dtype)


def published_case(case):
    """(RawBoost, x [1, T], draws, published y [T]) of one case."""

    def get(name):
        key = f"{case}_{name}"
        return torch.from_numpy(np.asarray(PUBLISHED[key]))[None] if key in PUBLISHED else None

    def notches(step):
        parts = [get(f"{step}_{name}") for name in ("center", "width", "taps", "gain")]
        return None if parts[0] is None else ga.NotchDraws(*parts)

    args = Namespace(
        algo=int(PUBLISHED[f"{case}_algo"]), **(PUBLISHED_NAMES | ast.literal_eval(str(PUBLISHED[f"{case}_over"])))
    )
    draws = ga.RawBoostDraws(notches("lnl"), get("isd_factor"), notches("ssi"), get("ssi_noise"), get("ssi_snr"))
    return ga.RawBoost.from_args(args), get("x"), draws, get("y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_published_output(case, backend, dtype):
    boost, x, draws, expected = published_case(case)
    with ga.use_backends(backend):
        assert max_norm_error(boost.apply(x.to(dtype), draws), expected) <= RELATIVE[dtype]


def test_published_cases_cover_every_algorithm():
    assert {int(PUBLISHED[f"{case}_algo"]) for case in CASES} == set(range(1, 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algo", range(9))
def test_forward_equals_apply_of_draw(algo, backend):
    boost, x, seeds = ga.RawBoost(algo), wave(), torch.tensor([5, 6, 7])
    lengths = torch.tensor([T, 777, 1])
    with ga.use_backends(backend):
        for own in (None, lengths):
            drawn = boost.apply(x, boost.draw(seeds, T, own), own)
            assert max_norm_error(boost(x, own, seeds), drawn) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algo", range(9))
def test_depends_on_nothing_but_samples_and_seed(algo, backend):
    boost, x, seeds = ga.RawBoost(algo), wave(5), torch.arange(5) * 1000003
    with ga.use_backends(backend):
        whole = boost(x, seeds=seeds)
        for i in range(5):
            assert max_norm_error(boost(x[i], seeds=seeds[i]), whole[i]) <= 1e-6, "batch composition"
        order = torch.tensor([3, 0, 4, 1, 2])
        assert max_norm_error(boost(x[order], seeds=seeds[order]), whole[order]) <= 1e-6, "batch order"
        padded = torch.nn.functional.pad(x, (0, 901), value=7.0)
        y = boost(padded, lengths=torch.full((5,), T), seeds=seeds)
        assert max_norm_error(y[:, :T], whole) <= 1e-6, "padding"
        assert not y[:, T:].any()


@pytest.mark.parametrize("algo", range(9))
def test_same_seeds_same_augmentation_on_every_cpu_backend(algo):
    boost, x, seeds = ga.RawBoost(algo), wave(num_samples=64600), torch.tensor([1, -2, 1 << 50])
    results = []
    for backend in BACKENDS:
        with ga.use_backends(backend):
            results.append(boost(x, torch.tensor([64600, 30000, 7]), seeds))
    assert max_norm_error(results[1], results[0]) <= DRAWN[torch.float32]


@pytest.mark.parametrize("algo", range(1, 9))
def test_other_seed_other_augmentation(algo):
    boost, x = ga.RawBoost(algo), wave(1)
    a, b = (boost(x, seeds=torch.tensor([seed])) for seed in (1, 1 + (1 << 32)))
    assert (a - b).abs().max() > 1e-3
    assert torch.equal(a, boost(x, seeds=torch.tensor([1])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_dtype_and_strides(dtype):
    boost, seeds = ga.RawBoost(4), torch.tensor([1, 2, 3])
    x = wave(dtype=dtype)
    y = boost(x, seeds=seeds)
    assert y.shape == x.shape
    assert y.dtype == dtype
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(boost(strided, seeds=seeds), y)
    assert torch.equal(boost(x.t().contiguous().t(), seeds=seeds), y)
    assert boost(x[0], seeds=seeds[:1]).shape == (T,)
    assert boost(x[:0], seeds=seeds[:0]).shape == (0, T)
    assert boost(x[:, :0], seeds=seeds).shape == (3, 0)


def test_input_is_not_written():
    for algo in range(9):
        x = wave()
        before = x.clone()
        y = ga.RawBoost(algo)(x, seeds=torch.tensor([1, 2, 3]))
        y.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", [1, 2, 100, 490])
@pytest.mark.parametrize("algo", range(9))
def test_short_utterances_and_silence(algo, num_samples, backend):
    boost, seeds = ga.RawBoost(algo), torch.tensor([1, 2, 3])
    with ga.use_backends(backend):
        y = boost(wave(num_samples=num_samples), seeds=seeds)
        assert bool(torch.isfinite(y).all())
        assert not boost(torch.zeros(3, num_samples), seeds=seeds).any()
        assert not boost(wave(num_samples=num_samples), torch.zeros(3, dtype=torch.int64), seeds).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_noise_adds_nothing(backend):
    boost, x = ga.RawBoost(3), wave()
    draws = boost.draw(torch.tensor([1, 2, 3]), T)
    with ga.use_backends(backend):
        assert torch.equal(boost.apply(x, replace(draws, ssi_noise=torch.zeros(3, T))), x)


def test_algorithm_0_returns_the_waveform():
    x = wave()
    assert torch.equal(ga.RawBoost(0)(x), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("peak", "expected"), [(1.0, [1.0, 2.0, 3.0]), (2.0, [0.625, 1.0, 1.5])])
def test_a_peak_above_1_is_divided_by_and_the_first_one_has_its_gradient(peak, expected, backend):
    x = torch.tensor([[peak, -peak, 0.5]], requires_grad=True)
    with ga.use_backends(backend):
        y = ga.RawBoost(2, p=0)(x)
        y.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert torch.equal(y, x / peak)
    assert x.grad.tolist() == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algo", range(9))
def test_differentiable_in_the_waveform(algo, backend):
    boost, lengths = ga.RawBoost(algo), torch.tensor([60, 35])
    x = (0.5 * wave(2, 60, scale=1.0, dtype=torch.float64)).requires_grad_()
    draws = boost.draw(torch.tensor([1, 2]), 60, lengths)
    with ga.use_backends(backend, "reference"):
        assert torch.autograd.gradcheck(lambda v: boost.apply(v, draws, lengths), (x,))
        y = boost(x, lengths, torch.tensor([1, 2]))
        (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad[0].abs().min() > 0
    assert not grad[1, 35:].any()


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 100, 700])], ids=["whole", "lengths"])
@pytest.mark.parametrize("algo", [0, 4, 8])
def test_compiles_without_graph_breaks(algo, lengths):
    boost, x, seeds = ga.RawBoost(algo), wave(), torch.tensor([1, 2, 3])
    compiled = torch.compile(boost, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    (compiled(x, lengths, seeds).square().sum()).backward()
    found, x.grad = x.grad, None
    (boost(x, lengths, seeds).square().sum()).backward()
    assert torch.equal(found, x.grad)
    draws = boost.draw(seeds, x.shape[1], lengths)
    compiled = torch.compile(boost.apply, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, draws, lengths), boost.apply(x, draws, lengths))


def test_compiles_with_inductor(monkeypatch, tmp_path):
    # Without lengths the graph is the ops alone, for which no C++ has to be compiled.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    boost, x, seeds = ga.RawBoost(4), wave(), torch.tensor([1, 2, 3])
    with ga.use_backends("cpp"):
        compiled = torch.compile(boost, fullgraph=True, backend="inductor", options={"compile_threads": 1})
        assert torch.equal(compiled(x, None, seeds), boost(x, None, seeds))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algo", [4, 8])
def test_draws_carry_no_gradient(algo, backend):
    boost, towards = ga.RawBoost(algo), wave().flip(1)
    draws = boost.draw(torch.tensor([1, 2, 3]), T)
    parts = [*vars(draws).values(), *(vars(draws.lnl).values()), *(vars(draws.ssi).values() if draws.ssi else ())]
    leaves = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    with ga.use_backends(backend), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = wave().requires_grad_()
        (expected,) = torch.autograd.grad(boost.apply(x, draws), x, towards)
        for leaf in leaves:
            leaf.requires_grad_()
        boost.apply(x, draws).backward(towards)
        assert torch.equal(x.grad, expected)
        assert all(leaf.grad is None for leaf in leaves)
        # Nor is anything kept for a gradient that nobody can ask for.
        assert not boost.apply(x.detach(), draws).requires_grad


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_second_derivatives_are_refused(backend):
    x = wave().requires_grad_()
    with ga.use_backends(backend):
        (grad,) = torch.autograd.grad(ga.RawBoost(4)(x, seeds=torch.arange(3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only; found a second backward"):
        grad.square().sum().backward()


def test_forward_mode_is_refused():
    x, seeds = wave(), torch.arange(3)
    for function in (
        lambda x: ga.RawBoost(4)(x, seeds=seeds),
        lambda x: ga.ops.isd(x=x, lengths=None, seeds=seeds, factor=None, p=10.0, g_sd=2.0),
    ):
        with pytest.raises(NotImplementedError, match=r"gradalign\.(rawboost|isd) has no derivative in forward mode"):
            torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("level", [1e-30, 1e-25, 1e20])
def test_noise_follows_very_quiet_and_very_loud_waves(level, backend):
    x, seeds = level * wave(), torch.tensor([1, 2, 3])
    boost = ga.RawBoost(3)
    with ga.use_backends(backend):
        found = boost(x, seeds=seeds)
    with ga.use_backends("reference"):
        expected = boost(x.double(), seeds=seeds)
    assert max_norm_error(found, expected) <= RELATIVE[torch.float32]


def test_seeds_from_the_global_generator():
    boost, x = ga.RawBoost(5), wave()
    torch.manual_seed(0)
    a, b = boost(x), boost(x)
    torch.manual_seed(0)
    assert torch.equal(a, boost(x))
    assert not torch.equal(a, b)


def test_from_args_reads_the_published_names():
    args = Namespace(algo=3, **(PUBLISHED_NAMES | {"P": 30, "SNRmin": 0, "nBands": 4}))
    assert ga.RawBoost.from_args(args).config == RawBoostConfig(algo=3, p=30, snr_min=0, n_bands=4)
    assert ga.RawBoost.from_args(args, algo=5).config.algo == 5
    with pytest.raises(TypeError, match=r"missing nBands"):
        ga.RawBoost.from_args(Namespace(**{k: v for k, v in vars(args).items() if k != "nBands"}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"algo": 9}, ValueError, r"`algo` must be one of 0\.\.8; found 9"),
        ({"algo": "4"}, TypeError, r"`algo` must be an int; found '4'"),
        ({"p": 101}, ValueError, r"`p` must be a percentage in \[0, 100\]; found 101"),
        ({"min_f": 100, "max_f": 50}, ValueError, r"`min_f` must not be above `max_f`; found 100 > 50"),
        ({"max_f": 9000}, ValueError, r"\[0, 8000\] Hz; found 20 and 9000"),
        ({"min_coeff": 0}, ValueError, r"`min_coeff` must be at least 1; found 0"),
        ({"n_bands": 0}, ValueError, r"`n_bands` must be at least 1; found 0"),
        ({"min_bw": 0}, ValueError, r"`min_bw` must be above 0 Hz; found 0"),
        ({"g_sd": float("nan")}, TypeError, r"`g_sd` must be a finite number; found nan"),
        ({"snr": 3}, TypeError, r"no parameter 'snr'; expected algo, .*snr_min"),
    ],
)
def test_bad_parameters(arguments, error, message):
    with pytest.raises(error, match=message):
        ga.RawBoost(**arguments)


@pytest.mark.parametrize("p", [0, 100])
def test_parameters_at_their_bounds(p):
    boost = ga.RawBoost(n_f=1, n_bands=1, min_f=0, max_f=0, min_coeff=1, max_coeff=1, p=p)
    assert boost.config.algo == 4
    assert boost(wave()).isfinite().all()


@pytest.mark.parametrize(
    ("x", "lengths", "seeds", "error", "message"),
    [
        (np.zeros(3), None, None, TypeError, r"`x` must be a .* tensor; found ndarray"),
        (torch.zeros(3, dtype=torch.int16), None, None, TypeError, r"`x` must be a .* tensor; found torch.int16"),
        (torch.zeros(1, 2, 3), None, None, ValueError, r"`x` must be \[B, T\] or \[T\]; found \[1, 2, 3\]"),
        (
            torch.zeros(8, 9),
            None,
            torch.zeros(8),
            TypeError,
            r"`seeds` must be an int64 tensor \[8\]; found float32 \[8\]",
        ),
        (
            torch.zeros(8, 9),
            None,
            torch.zeros(8, dtype=torch.int32),
            TypeError,
            r"`seeds` must be an int64 tensor \[8\]; found int32 \[8\]",
        ),
        (
            torch.zeros(8, 9),
            None,
            torch.zeros(7, dtype=torch.int64),
            ValueError,
            r"`seeds` must be an int64 tensor \[8\]; found int64 \[7\]",
        ),
        (torch.zeros(2, 9), None, [1, 2], TypeError, r"`seeds` must be an int64 tensor \[2\]; found list"),
        (
            torch.zeros(2, 9),
            torch.tensor([9, 10]),
            None,
            ValueError,
            r"`lengths` must lie in \[0, T\] = \[0, 9\]; found \[9, 10\]",
        ),
        (
            torch.zeros(2, 9),
            torch.tensor([-1, 3]),
            None,
            ValueError,
            r"`lengths` must lie in \[0, T\] = \[0, 9\]; found \[-1, 3\]",
        ),
        (torch.zeros(2, 9), torch.tensor([9]), None, ValueError, r"`lengths` must be \[2\]; found \[1\]"),
        (
            torch.zeros(2, 9),
            torch.tensor([9.0, 9.0]),
            None,
            TypeError,
            r"`lengths` must be an integer tensor \[2\]; found torch.float32",
        ),
    ],
)
def test_bad_input(x, lengths, seeds, error, message):
    with pytest.raises(error, match=message):
        ga.RawBoost(4)(x, lengths, seeds)


def test_apply_of_a_parent_module_still_reaches_its_submodules():
    seen = []
    torch.nn.Sequential(ga.RawBoost(4)).apply(seen.append)
    assert [type(module).__name__ for module in seen] == ["RawBoost", "Sequential"]
    with pytest.raises(TypeError, match="`draws` must be RawBoostDraws; found NoneType"):
        ga.RawBoost(4).apply(wave())


def test_bad_draws():
    boost, x = ga.RawBoost(4), wave()
    draws = boost.draw(torch.tensor([1, 2, 3]), T)
    with pytest.raises(ValueError, match=r"algorithm 4 needs `draws.lnl.center_hz`; found None"):
        boost.apply(x, ga.RawBoostDraws())
    with pytest.raises(ValueError, match=rf"`draws.isd_factor` must be \[2, {T}\]; found \[3, {T}\]"):
        boost.apply(
            x[:2],
            ga.RawBoostDraws(
                *(
                    ga.NotchDraws(*(v[:2] for v in vars(draws.lnl).values())),
                    draws.isd_factor,
                    draws.ssi,
                    draws.ssi_noise,
                    draws.snr_db,
                )
            ),
        )
    even = ga.NotchDraws(draws.lnl.center_hz, draws.lnl.width_hz, draws.lnl.taps * 2, draws.lnl.gain_db)
    with pytest.raises(ValueError, match=r"`draws.lnl.taps` must be odd and in \[1, 99\]"):
        boost.apply(x, ga.RawBoostDraws(even, draws.isd_factor, draws.ssi, draws.ssi_noise, draws.snr_db))
    with pytest.raises(TypeError, match=rf"`draws.snr_db` must be a tensor \[{len(x)}\]; found float"):
        boost.apply(x, replace(draws, snr_db=20.0))
    with pytest.raises(ValueError, match="`num_samples` must be at least 0; found -1"):
        boost.draw(torch.tensor([1]), -1)
    with pytest.raises(TypeError, match=r"`seeds` must be an int64 tensor \[B\]; found float32 \[1\]"):
        boost.draw(torch.tensor([1.0]), 10)
    with pytest.raises(ValueError, match=r"`lengths` must be \[1\]; found \[2\]"):
        boost.draw(torch.tensor([1]), 10, torch.tensor([9, 10]))


# ------------------------------------------------------------------------------------------ the sampled distributions
# Fixed seeds, so that each test gives the same verdict on every run; a wrong law gives p-values near 0 at this size.

SEEDS = torch.arange(4000)
SIGNIFICANCE = 1e-3


@pytest.fixture(scope="module")
def many_draws():
    boost = ga.RawBoost(4, min_g=-3, max_g=2)
    return boost, boost.draw(SEEDS, 64)


@pytest.mark.parametrize("step", ["lnl", "ssi"])
def test_notch_distributions(many_draws, step):
    boost, draws = many_draws
    c, notches = boost.config, getattr(draws, step)
    for values, low, high in ((notches.center_hz, c.min_f, c.max_f), (notches.width_hz, c.min_bw, c.max_bw)):
        assert stats.kstest(values.flatten().numpy(), "uniform", (low, high - low)).pvalue > SIGNIFICANCE
    # floor of U(10, 100), plus 1 where even: 11, 13, ..., 99 are equally likely.
    counts = torch.bincount(notches.taps.flatten())
    assert set(counts.nonzero().flatten().tolist()) == set(range(11, 100, 2))
    assert stats.chisquare(counts[11:100:2].numpy()).pvalue > SIGNIFICANCE


def test_gain_distributions(many_draws):
    boost, draws = many_draws
    c = boost.config
    for i in range(c.n_f):
        low, high = (c.min_g, c.max_g) if i == 0 else (c.min_g - c.min_bias, c.max_g - c.max_bias)
        sample = draws.lnl.gain_db[:, i].numpy()
        assert stats.kstest(sample, "uniform", (min(low, high), abs(high - low))).pvalue > SIGNIFICANCE
    assert stats.kstest(draws.ssi.gain_db.numpy(), "uniform", (c.min_g, c.max_g - c.min_g)).pvalue > SIGNIFICANCE


def test_snr_distribution(many_draws):
    assert stats.kstest(many_draws[1].snr_db.numpy(), "uniform", (10, 30)).pvalue > SIGNIFICANCE


def test_draws_are_independent_of_each_other(many_draws):
    _, draws = many_draws
    columns = [v.flatten(1) for v in vars(draws.lnl).values()]
    columns += [v.reshape(len(SEEDS), -1) for v in vars(draws.ssi).values()] + [draws.snr_db[:, None]]
    correlation = np.corrcoef(torch.cat([c.double() for c in columns], dim=1).numpy(), rowvar=False)
    off = np.abs(correlation[np.triu_indices_from(correlation, 1)])
    # Bonferroni over all pairs of a normal with standard deviation 1 / sqrt(n).
    assert off.max() < stats.norm.isf(SIGNIFICANCE / 2 / off.size) / np.sqrt(len(SEEDS))


def test_isd_chooses_exactly_the_published_number_of_positions():
    lengths = 1 + SEEDS % 700
    factor = reference.isd_factor(SEEDS, lengths, 700, 100.0)
    beta = reference._uniform(
        reference.philox(SEEDS, reference.STREAM_ISD_BETA, torch.zeros_like(SEEDS))[0], 0.0, 100.0
    )
    assert stats.kstest(beta.numpy(), "uniform", (0, 100)).pvalue > SIGNIFICANCE
    expected = torch.floor(lengths * (beta / 100)).long()
    # A chosen position's factor is 0 only where a 24-bit uniform is exactly 0: never among these seeds.
    assert torch.equal((factor != 0).sum(1), expected)
    assert not factor[torch.arange(700)[None] >= lengths[:, None]].any()


@pytest.mark.parametrize("size", [7, 16, 23])
def test_isd_positions_are_uniform_singly_and_in_pairs(size):
    seeds = torch.arange(60000)
    chosen = size // 3
    factor = reference.isd_factor(seeds, torch.full_like(seeds, size), size, 100.0)
    rows = (factor != 0)[(factor != 0).sum(1) == chosen].double()
    assert len(rows) > 1000
    single = rows.sum(0).numpy()
    # Sampling without replacement shrinks the counts' variance, so that the chi-square statistic is scaled by (size -
    # 1) / (size - chosen).
    statistic = stats.chisquare(single).statistic * (size - 1) / (size - chosen)
    assert stats.chi2.sf(statistic, size - 1) > SIGNIFICANCE
    pairs = (rows.T @ rows).numpy()[np.triu_indices(size, 1)]
    probability = chosen * (chosen - 1) / (size * (size - 1))
    z = (pairs - len(rows) * probability) / np.sqrt(len(rows) * probability * (1 - probability))
    assert np.abs(z).max() < stats.norm.isf(SIGNIFICANCE / 2 / z.size)


def test_isd_factor_is_a_product_of_two_uniforms():
    factor = reference.isd_factor(SEEDS[:50], torch.full((50,), 5000), 5000, 100.0)
    sample = factor[factor != 0].numpy()
    # The law of u1 * u2 with u ~ U(-1, 1): P(f <= v) = 1/2 + v (1 - ln|v|) / 2.
    assert stats.kstest(sample, lambda v: 0.5 + v * (1 - np.log(np.abs(v))) / 2).pvalue > SIGNIFICANCE


def test_noise_is_standard_normal_white_and_uncorrelated_between_utterances():
    noise = reference.ssi_noise(SEEDS[:16], 20000).double().numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > SIGNIFICANCE
    n = noise.shape[1]
    spectrum = np.abs(np.fft.rfft(noise, axis=1)[:, 1:-1]) ** 2 / n
    assert stats.kstest(spectrum.ravel(), "expon").pvalue > SIGNIFICANCE
    lags = np.array([(noise[:, :-lag] * noise[:, lag:]).mean() * np.sqrt(noise[:, lag:].size) for lag in range(1, 40)])
    assert np.abs(lags).max() < stats.norm.isf(SIGNIFICANCE / 2 / lags.size)
    between = np.corrcoef(noise)[np.triu_indices(16, 1)] * np.sqrt(n)
    assert np.abs(between).max() < stats.norm.isf(SIGNIFICANCE / 2 / between.size)


def test_ssi_has_the_drawn_signal_to_noise_ratio():
    boost, x, seeds = ga.RawBoost(3), wave(8, 16000, dtype=torch.float64), torch.arange(8)
    added = boost(x, seeds=seeds) - x
    snr_db = 20 * torch.log10(x.norm(dim=1) / added.norm(dim=1))
    assert torch.allclose(snr_db, boost.draw(seeds, 16000).snr_db, atol=1e-9)


def test_a_bank_is_scipys_convolved_and_scaled():
    from scipy import signal

    draws = reference.notch_draws(torch.tensor([11]), [0], [-4.0], [-4.0], 5, 20.0, 8000.0, 100.0, 1000.0, 10.0, 100.0)
    center, width, taps, _ = (v[0, 0] for v in (*draws[:3], draws[3][..., None]))
    expected = np.ones(1)
    for c, w, n in zip(center.tolist(), width.tolist(), taps.tolist(), strict=True):
        edges = [max(c - w / 2, 0.001) if c - w / 2 > 0 else 0.001, c + w / 2 if c + w / 2 < 8000 else 8000 - 0.001]
        expected = np.convolve(signal.firwin(n, edges, fs=16000), expected)
    expected *= 10 ** (-4 / 20) / np.abs(signal.freqz(expected, 1, worN=512)[1]).max()
    for backend in BACKENDS:
        with ga.use_backends(backend):
            bank = ga.ops.notch_bank(*draws, 16000.0, 491, torch.float64)[0, 0].numpy()
        margin = (491 - len(expected)) // 2
        assert np.abs(bank[margin : 491 - margin] - expected).max() < 1e-12
        assert not bank[:margin].any() or np.abs(bank[:margin]).max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_algorithm_0_keeps_every_sample(dtype):
    # float16 has no number above 65504, bfloat16 none between 64512 and 65024.
    for num_samples in (1, 16000, 64600, 66800):
        x = torch.rand(2, num_samples, generator=torch.Generator().manual_seed(0)).to(dtype)
        y = ga.RawBoost(0)(x)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
        inside = ga.RawBoost(0)(x, lengths=torch.tensor([num_samples, 1]))
        assert torch.equal(inside[0], x[0])
        assert torch.equal(inside[1, :1], x[1, :1])
        assert not inside[1, 1:].any()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("algo", range(9))
def test_waveforms_without_samples_and_batches_without_waveforms(algo, backend):
    boost = ga.RawBoost(algo)
    with ga.use_backends(backend):
        for shape in ((5, 0), (0, 100), (0, 0), (0,)):
            x = torch.zeros(shape, requires_grad=True)
            y = boost(x)
            assert y.shape == x.shape
            y.sum().backward()
            assert x.grad.shape == x.shape
