"""Gram matrix -> weights: the published cases, the published code where its path is given, and properties."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import gradalign as ga
from gradalign import alignment

FIXTURE = Path(__file__).parent / "data" / "alignment_published.npz"
PUBLISHED = os.environ.get("GRADALIGN_PUBLISHED_DPDA")
NAMES = ["mean", "pcgrad", "gradvac", "cagrad", "mgda", "dualproj", "upgrad", "imtlg", "alignedmtl", "nashmtl"]
needs_published = pytest.mark.skipif(
    not PUBLISHED, reason="GRADALIGN_PUBLISHED_DPDA must name a checkout of ductuantruong/dpda_ga"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are small: waking a second thread costs more than it saves, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_grams(count, num_paths, rng, kinds=7):
    """Gram matrices [count, K, K] of random, low-rank, nearly parallel, badly scaled and nearly balanced gradients."""
    grams = []
    for t in range(count):
        kind = t % kinds
        columns = {1: num_paths, 2: max(1, num_paths - 2), 5: 1000, 6: max(1, num_paths - 1)}.get(kind, 30)
        rows = rng.normal(size=(num_paths, columns))
        if kind == 3:
            rows += 5 * rng.normal(size=columns)
        if kind == 4:
            rows *= 10 ** rng.uniform(-3, 3, size=(num_paths, 1))
        if kind in (5, 6):
            rows -= 0.99 * rows.mean(0)
        grams.append(rows @ rows.T)
    return torch.from_numpy(np.stack(grams))


def awkward_rows(count, num_paths, rng):
    """Gradients [count, K, 2 K]: of lengths from 1e-8 to 1e8, parallel, opposed and zero, nearly on one line, nearly in
    one plane, of integers, and nearly balanced with lengths from 1e-2 to 1e2.
    """
    rows = rng.normal(size=(6, count // 6, num_paths, 2 * num_paths))
    each = (count // 6, num_paths, 1)
    rows[0] *= 10 ** rng.uniform(-8, 8, size=each)
    chosen = np.broadcast_to(rng.integers(num_paths, size=each), rows[1].shape)
    rows[1] = np.take_along_axis(rows[1], chosen, 1) * rng.choice([-2, -1, 0, 1, 3], size=each)
    rows[2, ..., 1:] *= 10 ** rng.uniform(-10, 0, size=(count // 6, 1, 1))
    rows[3, ..., 2:] *= 10 ** rng.uniform(-10, 0, size=(count // 6, 1, 1))
    rows[4] = rng.integers(-1, 2, size=rows[4].shape) * (np.arange(2 * num_paths) <= num_paths // 2)
    rows[5] -= (1 - 10 ** rng.uniform(-10, 0, size=(count // 6, 1, 1))) * rows[5].mean(-2, keepdims=True)
    rows[5] *= 10 ** rng.uniform(-2, 2, size=each)
    return torch.from_numpy(rows.reshape(-1, num_paths, 2 * num_paths))


def many_grams(num_paths):
    """Hundreds of `random_grams`, thousands of the awkward ones, the degenerate ones, and all of them with entries that
    are rounded differently: [N, K, K].
    """
    rng = np.random.default_rng(num_paths)
    rows = awkward_rows(900, num_paths, rng)
    gram = torch.cat([random_grams(350, num_paths, rng), rows @ rows.mT, degenerate_grams(num_paths)])
    last_place = 1 + 2.0**-53 * torch.from_numpy(rng.integers(-2, 3, size=gram.shape))
    return torch.cat([gram, gram * (last_place.triu() + last_place.triu(1).mT)])


def cagrad_objective(x, gram, c=0.5):
    """The objective as published, on any leading axes; x [..., K]."""
    num_paths = gram.shape[-1]
    k = c * (gram.mean((-2, -1)) + 1e-8).sqrt() + 1e-8
    square = (x * (gram @ x[..., None])[..., 0]).sum(-1)
    return (x * gram.sum(-1)).sum(-1) / num_paths + k * (square.clamp_min(0) + 1e-8).sqrt()


def cagrad_point(gram, c=0.5):
    """The simplex point behind CAGrad's weights, w (1 + c^2) - b, scaled to sum 1."""
    x = alignment.weights(gram, "cagrad", c=c) * (1 + c * c) - 1 / gram.shape[-1]
    return x / x.sum(-1, keepdim=True)


def assert_same_merge(found, expected, gram, tolerance):
    """Weights merge alike, relative to the longest gradient; those of a low-rank Gram matrix need not be unique."""
    difference = found - expected
    error = (difference * (gram @ difference[..., None])[..., 0]).sum(-1).clamp_min(0).sqrt()
    assert (error <= tolerance * gram.diagonal(dim1=-2, dim2=-1).amax(-1).sqrt()).all()


# ---- published outputs ----


@pytest.mark.parametrize(("method", "tolerance"), [("pcgrad", 1e-6), ("gradvac", 1e-5), ("cagrad", 2e-4)])
def test_published_cases(method, tolerance):
    """The eight published cases in sequence; the error is relative to the largest element of the gradients merged.

    The published GradVac ran in float32: in case 6, at a cosine of -0.996, it is 3e-5 from its own formula in float64.
    """
    data, rho = np.load(FIXTURE), None
    for i in range(8):
        grads = torch.from_numpy(np.stack([data[f"{method}_{i}_clean"], data[f"{method}_{i}_augmented"]]))
        if method == "gradvac":
            weights, rho = alignment.gradvac(grads @ grads.T, rho)
        else:
            weights = alignment.weights(grads @ grads.T, method)
        error = (weights @ grads - torch.from_numpy(data[f"{method}_{i}_merged"])).abs().max()
        assert error <= tolerance * max(1.0, grads.abs().max().item()), (method, i)


def published(name):
    spec = importlib.util.spec_from_file_location(f"published_{name}", Path(PUBLISHED) / "grad_align" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_published
def test_pcgrad_of_three_paths_equals_published_code(monkeypatch):
    module = published("pcgrad")
    monkeypatch.setattr(module.random, "shuffle", lambda items: None)
    torch.manual_seed(0)
    for _ in range(50):
        grads = torch.randn(3, 40, dtype=torch.float64)
        aligner = module.PCGrad(optimizer=None)
        expected = aligner._project_conflicting([g.clone() for g in grads], [torch.ones(40)] * 3)
        torch.testing.assert_close(alignment.pcgrad(grads @ grads.T) @ grads, expected, rtol=1e-12, atol=1e-12)


@needs_published
def test_gradvac_sequence_equals_published_code(monkeypatch):
    module = published("gradvac")
    # The published class keeps its targets on "cuda" by name, in float32.
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self.double())
    aligner = module.GradVac(optimizer=None)
    monkeypatch.undo()
    torch.manual_seed(0)
    rho, moved = None, 0
    for _ in range(200):
        # Long gradients: the 1e-8 that the published code adds to their lengths is far below the tolerance.
        common = torch.randn(30, dtype=torch.float64)
        grads = [1e4 * (torch.randn(30, dtype=torch.float64) + common) for _ in range(2)]
        expected = aligner._project_gradvac([g.clone() for g in grads])
        stacked = torch.stack(grads)
        weights, rho = alignment.gradvac(stacked @ stacked.T, rho)
        torch.testing.assert_close(weights @ stacked, expected, rtol=1e-10, atol=1e-6)
        torch.testing.assert_close(rho, aligner.rho_T[:, :, 0], rtol=1e-12, atol=1e-12)
        moved += bool((weights != 0.5).any())
    assert 20 < moved < 180


@needs_published
def test_cagrad_is_never_worse_than_published_solver(monkeypatch):
    module = published("cagrad")
    found = []
    solve = module.minimize
    monkeypatch.setattr(module, "minimize", lambda *args, **kwargs: found.append(solve(*args, **kwargs)) or found[-1])
    torch.manual_seed(0)
    for i in range(60):
        grads = list(torch.randn(2, 40, dtype=torch.float64) * 10 ** torch.empty(2, 1).uniform_(-2, 2) + i % 3)
        merged = module.CAGrad(optimizer=None)._project_conflicting([g.clone() for g in grads], [torch.ones(40)] * 2)
        stacked = torch.stack(grads)
        gram = stacked @ stacked.T
        theirs = torch.from_numpy(found[-1].x).clamp(0, 1)
        ours, theirs = (cagrad_objective(x / x.sum(), gram) for x in (cagrad_point(gram), theirs))
        assert ours <= theirs + 1e-9 * theirs.abs(), i
        # Within the published solver's own accuracy, wherever that stops at a good point.
        if theirs - ours <= 1e-9 * ours.abs():
            error = (alignment.weights(gram, "cagrad") @ stacked - merged).abs().max()
            assert error <= 2e-3 * stacked.abs().max()


# ---- what each method promises ----


def test_no_conflict_is_left_after_pcgrad_of_two_paths():
    gram = random_grams(400, 2, np.random.default_rng(0), kinds=5)
    products = (gram @ alignment.pcgrad(gram)[..., None])[..., 0]
    scale = gram.diagonal(dim1=-2, dim2=-1)
    assert (products >= -1e-12 * scale).all()
    assert (gram[:, 0, 1] < 0).float().mean() > 0.2


def test_pcgrad_keeps_the_mean_without_conflict():
    gram = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(alignment.weights(gram, "pcgrad"), torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("num_paths", [2, 3, 5])
def test_pcgrad_equals_projections_of_the_gradients(num_paths):
    torch.manual_seed(num_paths)
    for trial in range(30):
        grads = torch.randn(num_paths, 12, dtype=torch.float64)
        order = alignment.random_order(num_paths, seed=3, step=trial)
        projected = grads.clone()
        for i in range(num_paths):
            for j in order[i].tolist():
                if j != i and (inner := projected[i] @ grads[j]) < 0:
                    projected[i] -= inner / (grads[j] @ grads[j]) * grads[j]
        found = alignment.pcgrad(grads @ grads.T, order=order) @ grads
        torch.testing.assert_close(found, projected.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("variant", "beta", "always"), [("dual_path", 0.5, False), ("paper", 0.01, True)])
def test_gradvac_equals_its_definition_for_three_paths(variant, beta, always):
    torch.manual_seed(1)
    rho, state = None, torch.zeros(3, 3, dtype=torch.float64)
    for step in range(40):
        grads = torch.randn(3, 12, dtype=torch.float64) + 0.6 * torch.randn(12, dtype=torch.float64)
        order = alignment.random_order(3, seed=0, step=step)
        moved = grads.clone()
        for i in range(3):
            for j in order[i].tolist():
                if i == j:
                    continue
                ni, nj, target = moved[i].norm(), grads[j].norm(), state[i, j].clone()
                r = moved[i] @ grads[j] / (ni * nj)
                if r < target:
                    up = target * (1 - r**2).sqrt() - r * (1 - target**2).sqrt()
                    moved[i] += ni * up / (nj * (1 - target**2).sqrt()) * grads[j]
                if always or r > 0:
                    state[i, j] = (1 - beta) * target + beta * r
        weights, rho = alignment.gradvac(grads @ grads.T, rho, variant=variant, order=order)
        torch.testing.assert_close(weights @ grads, moved.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rho, state, rtol=1e-9, atol=1e-9)


def test_gradvac_reaches_its_target_cosine():
    grads = torch.tensor([[1.0, 0.0, 0.0], [-0.3, 2.0, 0.1]], dtype=torch.float64)
    gram = grads @ grads.T
    rho = torch.full((2, 2), 0.4, dtype=torch.float64)
    # Of path 0 alone: w = (row_0 + row_1) / 2, and row_1 is [x, 1].
    weights, _ = alignment.gradvac(gram, rho)
    rows = 2 * weights - 1
    moved = grads[0] + rows[1] * grads[1]
    cosine = torch.nn.functional.cosine_similarity(moved, grads[1], dim=0)
    torch.testing.assert_close(cosine, torch.tensor(0.4, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["dual_path", "paper"])
def test_gradvac_of_a_path_that_was_pulled_to_nothing(variant):
    """Three parallel gradients, of which the first is cancelled by the second: no direction is left to pull."""
    norms = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    gram = norms[:, None] * norms[None, :] * (1 + 1e-16 * torch.randn(3, 3, dtype=torch.float64))
    rho = torch.full((3, 3), 0.9, dtype=torch.float64)
    for scale in (1.0, 1e-6, 3e7):
        weights, moved = alignment.gradvac(gram * scale, rho, variant=variant, beta=0.5)
        assert weights.abs().max() < 3
        # Path 0 met path 1 at -1 and path 2 at 0.
        expected = [-0.05, 0.45] if variant == "paper" else [0.9, 0.9]
        assert moved[0, 1:].tolist() == pytest.approx(expected)


def test_gradvac_survives_equal_paths_forever():
    """Targets that have grown to 1 must not turn a rounding error in the cosine into a large step."""
    gram, rho = torch.full((2, 2), 123.456, dtype=torch.float64), None
    for _ in range(100):
        weights, rho = alignment.gradvac(gram, rho)
    torch.testing.assert_close(weights, torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-9, atol=0)
    gram[0, 1] = gram[1, 0] = 123.456 * (1 - 1e-7)
    assert (alignment.gradvac(gram, rho)[0] < 0.6).all()


@pytest.mark.parametrize("num_paths", range(2, 9))
def test_cagrad_objective_is_never_above_slsqp(num_paths):
    minimize = pytest.importorskip("scipy.optimize").minimize
    gram = random_grams(28, num_paths, np.random.default_rng(num_paths))
    ours = cagrad_objective(cagrad_point(gram), gram)
    start = np.full(num_paths, 1 / num_paths)
    for one, value in zip(gram, ours, strict=True):
        found = minimize(
            lambda x, one=one: cagrad_objective(torch.from_numpy(x), one).item(),
            start,
            bounds=[(0, 1)] * num_paths,
            constraints={"type": "eq", "fun": lambda x: 1 - x.sum()},
        ).x
        found = torch.from_numpy(found).clamp_min(0)
        theirs = cagrad_objective(found / found.sum(), one)
        assert value <= theirs + 1e-9 * theirs.abs()


@pytest.mark.parametrize("num_paths", [2, 3, 5, 8])
def test_cagrad_point_is_a_minimum(num_paths):
    """No feasible direction descends, to first order: the gradient is smallest, and equal, where x > 0."""
    gram = random_grams(60, num_paths, np.random.default_rng(1), kinds=4) + 0.1 * torch.eye(num_paths)
    x = cagrad_point(gram)
    k = 0.5 * (gram.mean((-2, -1)) + 1e-8).sqrt() + 1e-8
    product = (gram @ x[..., None])[..., 0]
    root = ((x * product).sum(-1) + 1e-8).sqrt()
    slope = gram.mean(-1) + (k / root)[..., None] * product
    gap = (x * (slope - slope.amin(-1, keepdim=True))).sum(-1)
    assert (gap <= 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).all()


@pytest.mark.parametrize("num_paths", [3, 4, 5])
@pytest.mark.parametrize("c", [0.5, 2.0])
def test_cagrad_objective_is_never_above_that_of_any_set_of_paths(c, num_paths):
    """Of all sets of paths, the minimum with x = 0 elsewhere where x > 0 there; none found by the method lies above."""
    gram = many_grams(num_paths)
    square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram = gram[square > 0] / square[square > 0, None, None]
    linear, k = gram.mean(-1), c * gram.mean((-2, -1)).clamp_min(0).sqrt()
    # Where the mean gradient vanishes, every point is a minimum.
    gram, linear, k = gram[k > 1e-6], linear[k > 1e-6], k[k > 1e-6]

    def values(x):
        return (x * linear).sum(-1) + k * ((x * (gram @ x[..., None])[..., 0]).sum(-1).clamp_min(0) + 1e-12).sqrt()

    best = torch.full_like(k, torch.inf)
    for chosen in range(1, 2**num_paths):
        own = [i for i in range(num_paths) if chosen >> i & 1]
        inner, part = gram[:, own][:, :, own], linear[:, own]
        right = torch.stack([torch.ones_like(part), part], -1)
        u, v = (torch.linalg.pinv(inner + 1, hermitian=True) @ right).unbind(-1)
        x0 = u / u.sum(-1, keepdim=True)
        d = v.sum(-1, keepdim=True) * x0 - v
        squares = [(y * (inner @ y[..., None])[..., 0]).sum(-1).clamp_min(0) for y in (x0, d)]
        t = ((squares[0] + 1e-12) / (k.square() - squares[1])).sqrt().nan_to_num(0)
        x = torch.zeros_like(linear)
        x[:, own] = (x0 + t[:, None] * d).nan_to_num(0).clamp(0, 1)
        x = torch.where(x.sum(-1, keepdim=True) > 0, x, 1.0)
        best = torch.minimum(best, values(x / x.sum(-1, keepdim=True)))
    found = values(cagrad_point(gram, c))
    assert (found <= best + 1e-9).all()


def test_cagrad_of_radius_zero_is_the_mean():
    gram = random_grams(20, 3, np.random.default_rng(2))
    expected = torch.full((20, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(alignment.weights(gram, "cagrad", c=0.0), expected)


def weigh_with(backend, method, gram):
    """Weights by a backend, on the CPU again."""
    from gradalign import ops

    if reason := ops.weigh.why_not(backend):
        pytest.skip(reason)
    device = "cuda" if backend == "cuda" else "cpu"
    with ga.use_backends(backend):
        return alignment.weigh(gram.to(device), alignment.METHODS[method])[0].cpu()


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda"])
@pytest.mark.parametrize("num_paths", range(2, 9))
def test_mgda_is_the_shortest_convex_combination(num_paths, backend):
    """Optimal if and only if no path's gradient has a smaller product with it than itself."""
    gram = many_grams(num_paths)
    x = weigh_with(backend, "mgda", gram)
    products = (gram @ x[..., None])[..., 0]
    assert (x >= 0).all()
    torch.testing.assert_close(x.sum(-1), torch.ones_like(x[:, 0]))
    gap = (x * products).sum(-1) - products.amin(-1)
    assert (gap <= 1e-13 * gram.diagonal(dim1=-2, dim2=-1).amax(-1)).all()


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda"])
@pytest.mark.parametrize("num_paths", range(2, 9))
@pytest.mark.parametrize("method", ["dualproj", "upgrad"])
def test_no_conflict_is_left_after_projection_to_the_dual_cone(method, num_paths, backend):
    """However short a path's gradient is."""
    gram = many_grams(num_paths)
    products = (gram @ weigh_with(backend, method, gram)[..., None])[..., 0]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (products >= -1e-10 * norms * norms.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda"])
@pytest.mark.parametrize("num_paths", range(2, 9))
def test_dualproj_is_the_nearest_unconflicting_gradient(num_paths, backend):
    """The conditions of Karush, Kuhn and Tucker: only paths that touch the cone are added to the mean."""
    gram = many_grams(num_paths)
    weights = weigh_with(backend, "dualproj", gram)
    added = weights - 1 / num_paths
    slack = added * (gram @ weights[..., None])[..., 0]
    assert (added >= 0).all()
    assert (slack.abs().sum(-1) <= 1e-8 * gram.diagonal(dim1=-2, dim2=-1).amax(-1)).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("method", ["mgda", "dualproj", "upgrad"])
@pytest.mark.parametrize("num_paths", [3, 5])
def test_merges_survive_a_gram_matrix_of_float32_sums(num_paths, method, backend):
    """Rounding makes the Gram matrices of dependent gradients indefinite: their merge is still nearly the same."""
    rng = np.random.default_rng(num_paths)
    rows = awkward_rows(3000, num_paths, rng)
    norms = rows.norm(dim=-1)
    noise = 1e-9 * torch.from_numpy(rng.normal(size=(len(rows), num_paths, num_paths)))
    gram = rows @ rows.mT + (noise + noise.mT) * norms[:, :, None] * norms[:, None, :]
    found, exact = ((weigh_with(backend, method, g)[:, None] @ rows)[:, 0] for g in (gram, rows @ rows.mT))
    assert ((found - exact).norm(dim=-1) <= 0.1 * norms.amax(-1)).all()


def test_upgrad_of_two_paths_is_pcgrad():
    gram = random_grams(100, 2, np.random.default_rng(8), kinds=1)
    torch.testing.assert_close(alignment.upgrad(gram), alignment.pcgrad(gram), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_paths", range(2, 9))
def test_imtlg_projects_equally_on_every_direction(num_paths):
    gram = random_grams(140, num_paths, np.random.default_rng(num_paths))
    gram = gram[[t for t in range(140) if t % 7 not in (2, 6)]]
    weights = alignment.imtlg(gram)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    projections = (gram @ weights[..., None])[..., 0] / norms
    gap = projections.amax(-1) - projections.amin(-1)
    assert (gap <= 1e-10 * (weights.abs() * norms).sum(-1)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(gram), dtype=torch.float64))


def test_imtlg_of_opposed_paths_is_the_limit():
    gram = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(alignment.imtlg(gram), expected)
    gram[0, 1] = gram[1, 0] = -2 + 1e-9
    torch.testing.assert_close(alignment.imtlg(gram), expected)


@pytest.mark.parametrize("num_paths", range(2, 9))
def test_alignedmtl_merges_orthogonal_gradients_of_equal_length(num_paths):
    """In the span of the gradients the singular values are all the smallest one; so the merge is sqrt(s_min / K)."""
    rng = np.random.default_rng(num_paths)
    rows = torch.from_numpy(rng.normal(size=(40, num_paths, 20)))
    gram = rows @ rows.mT
    u, s, vt = torch.linalg.svd(rows, full_matrices=False)
    expected = (s[:, -1, None, None] * (u @ vt)).mean(1)
    found = (alignment.alignedmtl(gram)[:, None] @ rows)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_paths", range(2, 9))
def test_nashmtl_is_the_bargaining_solution(num_paths):
    """(G a)_i a_i is the same for all paths, with 1e-6 of each square added: each gains the same relative utility."""
    gram = random_grams(140, num_paths, np.random.default_rng(num_paths))
    gram = gram[[t for t in range(140) if t % 7 not in (2, 6)]]
    weights = alignment.nashmtl(gram)
    gram = gram + 1e-6 * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    gains = weights * (gram @ weights[..., None])[..., 0]
    assert (weights > 0).all()
    torch.testing.assert_close(gains / gains.mean(-1, keepdim=True), torch.ones_like(gains), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("num_paths", range(3, 9))
def test_nashmtl_of_a_gram_matrix_that_rounding_made_indefinite(num_paths, backend):
    # Gradients of two numbers, whose products are rounded to float32: the smallest eigenvalue is below zero.
    rows = torch.randn(500, num_paths, 2, generator=torch.Generator().manual_seed(num_paths))
    gram = (rows @ rows.mT).double()
    gram = (gram + gram.mT) / 2
    assert (torch.linalg.eigvalsh(gram)[:, 0] < -1e-10).any()
    with ga.use_backends(backend):
        weights = alignment.weigh(gram, alignment.METHODS["nashmtl"])[0]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(500, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("num_paths", range(3, 9))
def test_imtlg_of_directions_that_cancel_is_the_mean(num_paths, backend):
    generator = torch.Generator().manual_seed(num_paths)
    lengths = torch.rand(200, num_paths, generator=generator, dtype=torch.float64) + 0.1
    signs = torch.tensor([1.0, -1.0] * (num_paths // 2) + [0.0] * (num_paths % 2), dtype=torch.float64)
    rows = (lengths * signs)[..., None] * torch.randn(200, 1, 3, generator=generator, dtype=torch.float64)
    with ga.use_backends(backend):
        weights = alignment.weigh(rows @ rows.mT, alignment.METHODS["imtlg"])[0]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_paths))


@pytest.mark.parametrize("method", ["imtlg", "nashmtl"])
def test_a_zero_gradient_is_left_out(method):
    gram = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = alignment.weights(gram[::2, ::2], method)
    torch.testing.assert_close(alignment.weights(gram, method)[::2], expected)
    assert alignment.weights(gram, method)[1] == 0


def torchjd_weighting(name, num_paths):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for package in {"NashMTL": ("cvxpy", "ecos"), "UPGrad": ("quadprog",), "DualProj": ("quadprog",)}.get(name, ()):
        pytest.importorskip(package, reason=f"torchjd's {name} needs {package}, which is not installed")
    if name == "NashMTL":

        def nash(gram):
            # It takes the gradients, of which any with these inner products will do, and clips to a length of 1.
            weighting = aggregation.NashMTL(num_paths, max_norm=0, optim_niter=100).weighting
            found = weighting(torch.linalg.cholesky(gram))
            return found / found.sum()

        return nash
    options = {"MGDA": {"epsilon": 1e-9, "max_iters": 3000}}.get(name, {})
    return getattr(aggregation, f"{name}Weighting")(**options)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        # Their projections regularise G by 1e-4 of its trace.
        ("UPGrad", 5e-3),
        ("DualProj", 5e-3),
        # Their Frank-Wolfe and their convex-concave iterations stop early.
        ("MGDA", 5e-3),
        ("NashMTL", 5e-3),
        ("IMTLG", 1e-9),
        ("AlignedMTL", 1e-9),
    ],
)
@pytest.mark.parametrize("num_paths", [2, 3, 5, 8])
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
def test_torchjd_agrees(name, tolerance, num_paths):
    if name == "MGDA" and num_paths == 8:
        pytest.skip("their Frank-Wolfe iterations are still 7e-3 away after the 3000 that there is time for")
    weighting = torchjd_weighting(name, num_paths)
    gram = random_grams(20, num_paths, np.random.default_rng(9), kinds=1)
    theirs = alignment.weights(gram, weighting)
    torch.testing.assert_close(alignment.weights(gram, name.lower()), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL", "CAGrad", "Krum", "Mean"])
def test_any_torchjd_weighting_is_a_method(name):
    """The example: a Gramian weighting of TorchJD instead of a name."""
    from gradalign import AlignedOptimizer

    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    options = {"CAGrad": {"c": 0.5}, "Krum": {"n_byzantine": 0, "n_selected": 2}}.get(name, {})
    try:
        weighting = getattr(aggregation, f"{name}Weighting")(**options)
    except ImportError as missing:
        pytest.skip(str(missing))
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AlignedOptimizer(torch.optim.SGD([param], lr=1.0), method=weighting)
    gradients = torch.tensor([[1.0, 0.5, 0.0], [-0.4, 1.0, 0.2], [0.3, -0.2, 2.0]], dtype=torch.float64)
    for gradient in gradients:
        with optimizer.path():
            (param * gradient).sum().backward()
    optimizer.step()
    torch.testing.assert_close(-param.detach(), weighting(gradients @ gradients.T) @ gradients)


# ---- the op `weigh` ----


def degenerate_grams(num_paths):
    """Zero, equal, orthogonal and tiny gradients, one zero among others, and gradients that cancel."""
    eye, ones = torch.eye(num_paths, dtype=torch.float64), torch.ones(num_paths, num_paths, dtype=torch.float64)
    ramp = torch.diag(torch.arange(num_paths, dtype=torch.float64))
    return torch.stack([0 * eye, ones, eye, 1e-30 * eye, ramp, eye - ones / num_paths])


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("num_paths", range(1, 9))
def test_weigh_of_the_extension_equals_the_functions(method, num_paths, backend):
    """Hundreds of random and degenerate matrices per method and number of paths, thousands in all."""
    from gradalign import ops

    if reason := ops.weigh.why_not(backend):
        pytest.skip(reason)
    device = "cuda" if backend == "cuda" else "cpu"
    gram = torch.cat([random_grams(210, num_paths, np.random.default_rng(num_paths)), degenerate_grams(num_paths)])
    options = {}
    if method in ("pcgrad", "gradvac"):
        options["order"] = alignment.random_order(num_paths, 3, 5)
    for variant in ("dual_path", "paper") if method == "gradvac" else ("",):
        if method == "gradvac":
            options |= {"variant": variant, "beta": 0.3}
        if method == "cagrad":
            options["c"] = 0.4
        generator = torch.Generator().manual_seed(num_paths)
        rho = torch.rand(gram.shape, generator=generator, dtype=torch.float64) if method == "gradvac" else None
        expected, expected_rho = alignment.solve(gram, alignment.METHODS[method], rho, **options)
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with ga.use_backends(backend):
            found, found_rho = alignment.weigh(
                gram.to(device), alignment.METHODS[method], None if rho is None else rho.to(device), **there
            )
        found = found.cpu()
        assert found.isfinite().all()
        # Flat minima and rank-deficient systems leave the square root of the rounding.
        assert_same_merge(found, expected, gram, 1e-7)
        if method == "gradvac":
            torch.testing.assert_close(found_rho.cpu(), expected_rho, rtol=1e-9, atol=1e-9)


def test_weigh_leaves_the_targets_of_a_nonfinite_segment():
    gram = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1) + 0.5
    gram[1, 0, 1] = float("nan")
    rho = torch.full_like(gram, 0.2)
    for backend in ("reference", "cpp"):
        with ga.use_backends(backend):
            found, moved = alignment.weigh(gram, alignment.METHODS["gradvac"], rho)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()
        assert torch.equal(moved[1], rho[1])
        assert (moved[0, 0, 1] > 0.2).all()


def test_weigh_takes_callables_and_more_than_eight_paths():
    gram = random_grams(3, 9, np.random.default_rng(0), kinds=1)
    for method in (alignment.METHODS["upgrad"], alignment.resolve(lambda g: g.diagonal() / g.diagonal().sum())):
        torch.testing.assert_close(alignment.weigh(gram, method)[0], alignment.solve(gram, method)[0])


# ---- what all methods promise ----


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("num_paths", [2, 4])
def test_permutation_equivariance(method, num_paths):
    rng = np.random.default_rng(3)
    gram = random_grams(40, num_paths, rng, kinds=5)
    perm = torch.from_numpy(rng.permutation(num_paths))
    options = {}
    if num_paths > 2 and method in ("pcgrad", "gradvac"):
        options["order"] = order = alignment.random_order(num_paths, 0, 0)
        permuted = {"order": perm.argsort()[order[perm]]}
    else:
        permuted = options
    found = alignment.weights(gram[:, perm][:, :, perm], method, **permuted)
    expected = alignment.weights(gram, method, **options)[:, perm]
    assert_same_merge(found, expected, gram[:, perm][:, :, perm], 1e-6)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("num_paths", [2, 4])
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e10])
def test_scale_equivariance(method, num_paths, scale):
    """w is the same for gradients of any scale."""
    gram = random_grams(40, num_paths, np.random.default_rng(4), kinds=5)
    options = {"rho": torch.full_like(gram, 0.3)} if method == "gradvac" else {}
    found = alignment.weights(gram * scale * scale, method, **options)
    # These divide by small differences (nearly parallel gradients) or solve linear systems, which round with the scale.
    tolerance = 1e-8 if method in ("gradvac", "cagrad", "upgrad", "dualproj") else 1e-10
    assert_same_merge(found, alignment.weights(gram, method, **options), gram, tolerance)


@pytest.mark.parametrize("method", NAMES)
def test_one_path_has_weight_exactly_one(method):
    for value in (0.0, 1e-20, 3.7, 1e20):
        assert alignment.weights(torch.tensor([[value]]), method).tolist() == [1.0]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("num_paths", [2, 3])
def test_equal_paths_are_averaged(method, num_paths):
    gram = torch.full((num_paths, num_paths), 7.0, dtype=torch.float64)
    expected = 1.2 if method == "cagrad" else 1.0  # CAGrad lengthens by (1 + c) / (1 + c^2)
    assert alignment.weights(gram, method).sum().item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("method", NAMES)
def test_zero_gradients_give_finite_weights(method):
    for gram in (
        torch.zeros(2, 2),
        torch.diag(torch.tensor([4.0, 0.0])),
        torch.zeros(3, 3),
        torch.diag(torch.tensor([0.0, 2.0, 0.0])),
    ):
        assert alignment.weights(gram, method).isfinite().all()
    if method == "gradvac":
        rho = torch.full((2, 2), 0.9, dtype=torch.float64)
        assert alignment.weights(torch.diag(torch.tensor([4.0, 0.0])), method, rho=rho).isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("num_paths", [2, 3])
def test_gradvac_does_not_pull_towards_a_zero_gradient(num_paths, backend):
    gram = torch.eye(num_paths, dtype=torch.float64)[None].clone()
    gram[:, 0, 0] = 0
    rho = torch.full_like(gram, 0.9)
    with ga.use_backends(backend):
        assert alignment.weigh(gram, alignment.METHODS["gradvac"], rho)[0][0, 0].item() == pytest.approx(1 / num_paths)


@pytest.mark.parametrize("method", [*NAMES, "callable"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_paths", [1, 2, 3])
def test_a_nonfinite_gram_gives_nan_in_its_segment_only(method, bad, num_paths):
    gram = torch.eye(num_paths, dtype=torch.float64).repeat(3, 1, 1)
    gram[1, 0, 0] = bad
    found = alignment.weights(gram, (lambda g: torch.ones(len(g))) if method == "callable" else method)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("method", NAMES)
def test_leading_axes_are_independent_problems(method):
    gram = random_grams(12, 3, np.random.default_rng(6), kinds=5)
    found = alignment.weights(gram.view(2, 6, 3, 3), method)
    assert found.shape == (2, 6, 3)
    assert found.dtype == torch.float64
    single = torch.stack([alignment.weights(one, method) for one in gram])
    assert_same_merge(found.view(12, 3), single, gram, 1e-7)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("num_paths", [1, 2, 4])
def test_no_value_is_read_on_the_host(method, num_paths):
    """Fake tensors hold no data: whatever reads a value on the host raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert alignment.weights(torch.eye(num_paths).repeat(2, 1, 1), method).shape == (2, num_paths)


def test_callables_get_one_matrix_at_a_time():
    gram = random_grams(4, 3, np.random.default_rng(7))
    found = alignment.weights(gram, lambda g: g.diagonal() / g.diagonal().sum())
    expected = gram.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match=r"one weight per path, \[3\]; found \[2\]"):
        alignment.weights(gram, lambda g: g[0, :2])


def test_random_order_is_a_uniform_pure_function():
    assert torch.equal(alignment.random_order(5, 1, 9), alignment.random_order(5, 1, torch.tensor(9)))
    orders = torch.stack([alignment.random_order(3, 11, step) for step in range(3000)])
    assert torch.equal(orders.sort(-1).values, torch.arange(3).expand(3000, 3, 3))
    codes = orders @ torch.tensor([9, 3, 1])
    for row in range(3):
        counts = codes[:, row].unique(return_counts=True)[1]
        # Six orders, 3,000 draws: chi-square with 5 degrees of freedom, 99.9% point 20.5.
        assert len(counts) == 6
        assert ((counts - 500.0) ** 2 / 500).sum() < 20.5
    # Rows are independent of each other, and seeds differ.
    assert (codes[:, 0] == codes[:, 1]).float().mean() == pytest.approx(1 / 6, abs=0.03)
    assert not torch.equal(alignment.random_order(8, 0, 0), alignment.random_order(8, 1, 0))
    for seed in (-(2**63), 2**63 - 1):
        assert torch.equal(alignment.random_order(4, seed, 5).sort(-1).values, torch.arange(4).expand(4, 4))
    # A seed means the same in every version.
    assert alignment.random_order(4, 11, 5).tolist() == [[3, 1, 0, 2], [3, 1, 0, 2], [3, 0, 1, 2], [2, 1, 0, 3]]


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([[1.0]], "mean"), {}, TypeError, "floating-point tensor .* found list"),
        ((torch.ones(2, 2, dtype=torch.int64), "mean"), {}, TypeError, "found int64"),
        ((torch.ones(2, 3), "mean"), {}, ValueError, r"K, K\].*found \[2, 3\]"),
        ((torch.ones(2), "mean"), {}, ValueError, r"found \[2\]"),
        ((torch.ones(0, 0), "mean"), {}, ValueError, r"found \[0, 0\]"),
        ((torch.eye(2), "pc-grad"), {}, ValueError, "one of mean, none, pcgrad, .*found 'pc-grad'"),
        ((torch.eye(2), 3), {}, TypeError, "found int"),
        ((torch.eye(2), "cagrad"), {"beta": 1}, TypeError, "'cagrad' takes the options c; found beta"),
        ((torch.eye(2), "cagrad"), {"c": "x"}, TypeError, "`c` must be a number; found 'x'"),
        ((torch.eye(2), "gradvac"), {"beta": "x"}, TypeError, "`beta` must be a number; found 'x'"),
        ((torch.eye(2), "mean"), {"c": 1}, TypeError, r"\(none\); found c"),
        ((torch.eye(2), alignment.cagrad), {"c": 1}, TypeError, r"'cagrad' is a callable, .*partial.*; found c"),
        ((torch.eye(2), "gradvac"), {"variant": "x"}, ValueError, "'dual_path' or 'paper'; found 'x'"),
        ((torch.eye(2), "gradvac"), {"beta": 1.5}, ValueError, r"in \[0, 1\]; found 1.5"),
        ((torch.eye(2), "cagrad"), {"c": -1.0}, ValueError, r"in \[0, 1e100\]; found -1.0"),
    ],
)
def test_misuse_names_expected_and_found(args, options, error, message):
    with pytest.raises(error, match=message):
        alignment.weights(*args, **options)
