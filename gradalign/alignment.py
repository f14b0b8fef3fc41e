"""From the Gram matrix of the paths' gradients to the weights with which they are merged.

With K paths and gradients g_1..g_K the Gram matrix is G[i, j] = <g_i, g_j>. Every method here is a small function of G
alone: it returns weights w, and the merged gradient is sum_k w_k g_k. Leading axes of ``gram`` are independent
problems (the segments of a model), so ``[..., K, K]`` gives ``[..., K]``. Everything is computed in float64 on the
device of ``gram``; no value is ever read on the host.

Every merge is an *average*: equal paths give their common gradient back (sum-reducing implementations differ by the
factor K), but for CAGrad, which lengthens it by (1 + c) / (1 + c^2) as published.

>>> import torch
>>> gram = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
>>> weights(gram, "pcgrad")
tensor([1.0000, 0.6250], dtype=torch.float64)
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "METHODS",
    "Method",
    "alignedmtl",
    "cagrad",
    "dualproj",
    "gradvac",
    "imtlg",
    "mean",
    "mgda",
    "nashmtl",
    "pcgrad",
    "random_order",
    "resolve",
    "solve",
    "upgrad",
    "weigh",
    "weights",
]

# Keeps 0 / 0 at 0; far below any product of two float32 gradients that matters.
_TINY = 1e-300
# CAGrad's smallest |g_x|, relative to the root mean square norm: float32 gradients that cancel leave no more.
_CANCELLED = 1e-6
# Of the largest eigenvalue or weight: what is smaller is zero to rounding.
_VANISHING = 1e-12
# Added to the cosines' diagonal by Nash-MTL: above what sums of float32 products leave below zero in a singular matrix.
_NASH_RIDGE = 1e-6
# After so many rounds, with so many steps of their line search, Nash-MTL's decrement is below 1e-7, and where gradients
# cancel below 1e-4, the rounding of their sum; after so many sweeps nothing is left beside the diagonal: on thousands
# of random and degenerate matrices, K <= 8.
NASH_ROUNDS, NASH_SEARCH = 16, 4
JACOBI_SWEEPS = 10
# The distance from 1 to the next float64. K times this is taken for the rounding of a sum over K paths, and twice that
# on the diagonal makes cosines positive definite where nothing but rounding keeps them from it.
ROUNDING = 2.0**-52
# K times as many rounds find an active set; see `_active_set` for how many were needed.
ROUNDS_PER_PATH = 3
# Of CAGrad's eps: what bounds the square of a step where its objective falls without end.
_ENDLESS = 1e-24
# GradVac's target cosine is never taken above this: at a target of 1 no finite multiple of the other gradient reaches
# it.
_MAX_TARGET = 1.0 - 1e-6
# A projected gradient shorter than this share of the lengths it was summed from is rounding noise.
_NOTHING = 1e-7
# GradVac's rate by variant.
_BETA = {"dual_path": 0.5, "paper": 0.01}


def mean(gram: Tensor) -> Tensor:
    """Weights 1/K: training on the mean of the paths' losses.

    Args:
        gram: [..., K, K], of which only the shape and the dtype matter.

    Returns:
        [..., K] of gram's dtype.

    >>> mean(torch.eye(2, dtype=torch.float64))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return torch.full_like(gram[..., 0], 1.0 / gram.shape[-1])


def pcgrad(gram: Tensor, *, order: Tensor | None = None) -> Tensor:
    """Projecting conflicting gradients (Yu et al., NeurIPS 2020, algorithm 1): each path loses its component against
    every path it conflicts with.

    Args:
        gram: float64 [..., K, K].
        order: int64 [K, K]; row i is a permutation of the paths, the order in which path i meets the others
            (`random_order` draws one). Default: 0, 1, ..., K-1. Irrelevant for K = 2, where w = 1/2 (1 - q/G11, 1 -
            q/G22), q = min(0, G12).

    Returns:
        float64 [..., K], the mean over the projected paths.

    >>> pcgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY)
    if gram.shape[-1] == 2:
        return 0.5 - 0.5 * gram[..., 0, 1, None].clamp_max(0.0) / squares
    rows, steps = _rows_and_steps(gram, order)
    for met, others in steps:
        # Row i holds the coefficients of path i's gradient after the projections so far: <row_i, g_j> = (rows G)_ij.
        inner = (rows @ gram * met).sum(-1).clamp_max(0.0) * others
        rows = rows - (inner / (squares[..., None, :] * met).sum(-1))[..., None] * met
    return rows.mean(-2)


def gradvac(
    gram: Tensor,
    rho: Tensor | None = None,
    *,
    variant: Literal["dual_path", "paper"] = "dual_path",
    beta: float | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient vaccine (Wang et al., ICLR 2021, equation 4): each pair of paths is pulled up to a running target
    cosine.

    Path i meets path j with cosine r and target rho[i, j]. If r < rho, path i gains the multiple of g_j that brings
    their cosine to rho; then the target moves towards r. ``variant="dual_path"`` moves it only where r > 0, with beta
    0.5 (Truong et al., arXiv 2509.20682, published code); ``variant="paper"`` always, with beta 0.01 (Wang et al.,
    algorithm 1). The published code adds 1e-8 to both denominators; here nothing is added, so that the weights are the
    same for gradients of any scale.

    Args:
        gram: float64 [..., K, K].
        rho: float64 [..., K, K], the targets left by the previous call; default zeros.
        variant: "dual_path" or "paper".
        beta: rate of the moving average in [0, 1]; default by variant.
        order: as for `pcgrad`.

    Returns:
        weights float64 [..., K] and the new targets float64 [..., K, K].

    Raises:
        ValueError: for an unknown variant, or beta outside [0, 1].

    >>> gram = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    >>> w, rho = gradvac(gram)
    >>> w, rho[0, 1].item()
    (tensor([0.5000, 0.5000], dtype=torch.float64), 0.3)
    """
    if variant not in ("dual_path", "paper"):
        raise ValueError(f"`variant` must be 'dual_path' or 'paper'; found {variant!r}")
    beta = _BETA[variant] if beta is None else beta
    _expect_number("beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must be in [0, 1]; found {beta}")
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    rho = torch.zeros_like(gram) if rho is None else rho
    rows, steps = _rows_and_steps(gram, order)
    for met, others in steps:
        products = rows @ gram
        norm_i = (products * rows).sum(-1).clamp_min(0.0).sqrt()
        # Of a path that was pulled to nothing, rounding is all that is left: it has no direction.
        norm_i = torch.where(norm_i > _NOTHING * (rows.abs() * norms[..., None, :]).sum(-1), norm_i, 0.0)
        norm_j = (norms[..., None, :] * met).sum(-1)
        cosine = ((products * met).sum(-1) / (norm_i * norm_j).clamp_min(_TINY)).clamp(-1.0, 1.0)
        cosine = torch.where(norm_i > 0, cosine, 0.0)
        old = (rho * met).sum(-1)
        target = old.clamp_max(_MAX_TARGET)
        sine, target_sine = (1 - cosine.square()).clamp_min(0.0).sqrt(), (1 - target.square()).sqrt()
        gain = norm_i * (target * sine - cosine * target_sine) / (norm_j * target_sine).clamp_min(_TINY)
        # A zero gradient has no direction to move to: 0 * gain stays 0 whatever gain is.
        pull = others & (cosine < target) & (norm_j > 0)
        rows = rows + torch.where(pull, gain, 0.0)[..., None] * met
        learn = others if variant == "paper" else others & (cosine > 0)
        rho = rho + torch.where(learn, beta * (cosine - old), 0.0)[..., None] * met
    return rows.mean(-2), rho


def cagrad(gram: Tensor, *, c: float = 0.5) -> Tensor:
    """Conflict-averse gradient descent (Liu et al., NeurIPS 2021, equation 4 and algorithm 1, in its published,
    rescaled form).

    With b = 1/K, g_0 the mean gradient and k = c |g_0|, x minimises x^T G b + k |g_x| on the simplex and w = (b + k x /
    |g_x|) / (1 + c^2), where |g_x|^2 = x^T G x + eps. The minimum among the paths with x > 0 is a closed form; active
    sets find out which these are. The published eps is 1e-8, whatever the gradients' size; here it is 1e-12 times their
    mean square norm, so that the weights are the same for gradients of any scale.

    Args:
        gram: float64 [..., K, K].
        c: radius of the search around the mean gradient, at least 0.

    Returns:
        float64 [..., K].

    Raises:
        ValueError: for a c that is negative or above 1e100.

    >>> cagrad(torch.eye(2, dtype=torch.float64))
    tensor([0.6000, 0.6000], dtype=torch.float64)
    """
    _expect_number("c", c)
    if not 0 <= c <= 1e100:
        raise ValueError(f"`c` must be in [0, 1e100]; found {c}")
    num_paths = gram.shape[-1]
    k = c * gram.mean((-2, -1)).clamp_min(0.0).sqrt()
    eps = (_CANCELLED**2 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(_TINY)
    x = _minimize_on_simplex(gram.mean(-1), k, gram, eps)
    norm = _quadratic(x, gram, eps)[1].sqrt()
    return (1.0 / num_paths + (k / norm)[..., None] * x) / (1 + c * c)


def mgda(gram: Tensor) -> Tensor:
    """Multiple-gradient descent (Désidéri, 2012; Sener & Koltun, NeurIPS 2018): the shortest convex combination.

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K], at least 0, with sum 1.

    >>> mgda(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    zero, one = torch.zeros_like(gram[..., 0]), torch.ones_like(gram[..., 0, 0])
    # sqrt(x^T G x + eps) has the same minimum for every eps; one of G's own size makes it smooth.
    return _minimize_on_simplex(zero, one, gram, gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY))


def dualproj(gram: Tensor) -> Tensor:
    """Project the mean gradient to the nearest one that conflicts with no path (Lopez-Paz & Ranzato, NeurIPS 2017).

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K].

    >>> dualproj(torch.tensor([[4.0, -2.0], [-2.0, 1.5]], dtype=torch.float64))
    tensor([0.5000, 0.6667], dtype=torch.float64)
    """
    return _project_to_dual_cone(torch.full_like(gram[..., 0], 1.0 / gram.shape[-1]), gram)


def upgrad(gram: Tensor) -> Tensor:
    """Unconflicting projection (Quinton & Rey, arXiv 2406.16232): the mean of `dualproj` of each path's own gradient.

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K]. For K = 2 these are PCGrad's weights.

    >>> upgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    rows = torch.diag_embed(torch.full_like(gram[..., 0], 1.0 / gram.shape[-1]))
    return _project_to_dual_cone(rows, gram[..., None, :, :]).sum(-2)


def imtlg(gram: Tensor) -> Tensor:
    """Impartial multi-task learning, IMTL-G (Liu et al., ICLR 2021, section 3.1): the merged gradient has the same
    projection on every path's direction, and the weights, which may be negative, have sum 1.

    With C the cosines and n the norms, w = y / n scaled to sum 1, C y = 1: for K = 2 w = (n_2, n_1) / (n_1 + n_2).
    Where the directions are linearly dependent, y is the least-squares solution of least norm. A path whose gradient
    is zero is left out (weight 0); where the sum vanishes, nothing is defined and the weights are 1/K.

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K] with sum 1.

    >>> imtlg(torch.tensor([[1.0, 0.3], [0.3, 9.0]], dtype=torch.float64))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    norms, cosines = _norms_and_cosines(gram)
    present = norms > 0
    if gram.shape[-1] == 2:
        # The limit for opposed directions too, where C is singular.
        y = present.to(gram.dtype)
    else:
        values, vectors = _eigh(cosines)
        inverse = torch.where(_nonzero(values), 1 / values, 0.0)
        # Where the directions cancel, their sum has none of what is left.
        sums = vectors.sum(-2)
        sums = torch.where(sums.abs() > _VANISHING, sums, 0.0)
        y = (vectors * (inverse * sums)[..., None, :]).sum(-1)
    return _scale_to_sum_one(torch.where(present, y / norms, 0.0))


def alignedmtl(gram: Tensor) -> Tensor:
    """Aligned-MTL (Senushkin et al., CVPR 2023, algorithm 1): the paths' gradients are replaced by the nearest ones
    that are orthogonal and of equal length, and averaged.

    With G = V diag(s) V^T, w = sqrt(s_min) V diag(s)^(-1/2) V^T (1/K, ..., 1/K), over the eigenvalues that are not
    zero. The length is the published one, that of the smallest principal component: the weights have sum 1 for equal
    paths, not in general. Nearly parallel gradients make it short, and as inexact as the Gram matrix is: on a GPU that
    is a sum of float32 products.

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K].

    >>> alignedmtl(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    values, vectors = _eigh(gram)
    kept = _nonzero(values)
    least = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
    # A zero matrix keeps the mean.
    kept, values = kept | ~kept.any(-1, keepdim=True), torch.where(kept, values, 1.0)
    ratio = torch.where(kept, (torch.where(least.isfinite(), least, 1.0) / values).sqrt(), 0.0)
    return (vectors * (ratio * vectors.mean(-2))[..., None, :]).sum(-1)


def nashmtl(gram: Tensor) -> Tensor:
    """Nash-MTL (Navon et al., ICML 2022, claim 3.1): the Nash bargaining solution, the a > 0 with (G a)_i = 1 / a_i.

    It is the minimum of the convex a^T G a / 2 - sum(log a), found by Newton's method on the cosines, to which 1e-6 is
    added on the diagonal (where opposed gradients cancel, nothing else bounds a). G fixes the length of sum_k a_k
    g_k to sqrt(K) whatever the gradients' size, and the published code clips it to 1; here a is scaled to sum 1, so
    that the merge is an average. A path whose gradient is zero is left out (weight 0).

    Args:
        gram: float64 [..., K, K].

    Returns:
        float64 [..., K], at least 0, with sum 1.

    >>> nashmtl(torch.tensor([[1.0, -0.3], [-0.3, 9.0]], dtype=torch.float64))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    norms, cosines = _norms_and_cosines(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    matrix = cosines + _NASH_RIDGE * eye + torch.diag_embed((norms == 0).to(gram.dtype))
    y = torch.ones_like(norms)
    # For two paths the cosines are symmetric in them, and so is the solution.
    for _ in range(0 if gram.shape[-1] == 2 else NASH_ROUNDS):
        product = (matrix @ y[..., None])[..., 0]
        # The best length first, then Newton's step y <- y (1 + t z), which is the same for gradients of any scale.
        square = (y * product).sum(-1, keepdim=True)
        length = (gram.shape[-1] / torch.maximum(square, _NASH_RIDGE * y.square().sum(-1, keepdim=True))).sqrt()
        y, product = y * length, product * length
        inner = matrix * y[..., :, None] * y[..., None, :]
        residual = 1 - y * product
        z = torch.linalg.solve_ex(inner + eye, residual[..., None])[0][..., 0]
        square = (z * (inner @ z[..., None])[..., 0]).sum(-1).clamp_min(0.0)
        # z . residual, but of terms that do not cancel: at the end z is all rounding.
        fall = square + z.square().sum(-1)
        decrement = fall.sqrt()
        room = torch.where(z < 0, -1 / z, torch.inf).amin(-1)
        t = torch.where(decrement < 0.25, 1.0, 1 / (1 + decrement))
        for _ in range(NASH_SEARCH):
            quotient = z / (1 + t[..., None] * z)
            slope = t * (square + (z * quotient).sum(-1)) - fall
            step = slope / (square + quotient.square().sum(-1)).clamp_min(_TINY)
            t = torch.minimum(torch.maximum(t - step, 0.1 * t), 0.5 * (t + room))
        y = y * (1 + t[..., None] * z)
    return _scale_to_sum_one(torch.where(norms > 0, y / norms, 0.0))


def _norms_and_cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [..., K] and cosines [..., K, K], 0 where a gradient is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    return norms, gram / (norms[..., :, None] * norms[..., None, :]).clamp_min(_TINY)


def _scale_to_sum_one(weights: Tensor) -> Tensor:
    """Divide by the sum; 1/K where it vanishes."""
    # Lengths first, so that the sum neither overflows nor underflows.
    weights = weights / weights.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    total = weights.sum(-1, keepdim=True)
    vanishes = total.abs() <= _VANISHING * weights.abs().sum(-1, keepdim=True)
    return torch.where(vanishes, 1.0 / weights.shape[-1], weights / torch.where(vanishes, 1.0, total))


def _nonzero(values: Tensor) -> Tensor:
    """Which eigenvalues [..., K] are not zero to rounding."""
    return values > _VANISHING * values.amax(-1, keepdim=True).clamp_min(0.0)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., K] and eigenvectors [..., K, K] (columns) of symmetric matrices, in no order, by Jacobi's
    rotations of disjoint pairs; `torch.linalg.eigh` would read an error code on the host.
    """
    num_paths = matrix.shape[-1]
    index = torch.arange(num_paths, device=matrix.device)
    vectors = torch.eye(num_paths, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    rounds = num_paths - 1 + num_paths % 2
    for i in range(rounds * (1 if num_paths == 2 else JACOBI_SWEEPS)):
        # A round-robin tournament: i meets (round - i) modulo an odd number; who would meet itself meets the last.
        partner = (i % rounds - index) % rounds
        if num_paths % 2 == 0:
            idle = partner == index
            partner = torch.where(idle, num_paths - 1, partner)
            partner = torch.where(index == num_paths - 1, (idle * index).sum(), partner)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        off = matrix.gather(-1, partner[:, None].expand_as(matrix))[..., 0]
        # Both of a pair turn by exactly the same angle.
        off = torch.where(partner == index, 0.0, 0.5 * (off + off.index_select(-1, partner)))
        tau = (diagonal.index_select(-1, partner) - diagonal) / (2 * off)
        side = torch.where(tau == 0, torch.where(index < partner, 1.0, -1.0).to(tau), tau.sign())
        tangent = torch.where(off == 0, 0.0, side / (tau.abs() + (1 + tau.square()).sqrt()))
        cosine = 1 / (1 + tangent.square()).sqrt()
        sine = tangent * cosine

        def rotate(columns: Tensor, cosine: Tensor = cosine, sine: Tensor = sine, partner: Tensor = partner) -> Tensor:
            return columns * cosine[..., None, :] - columns.index_select(-1, partner) * sine[..., None, :]

        vectors, matrix = rotate(vectors), rotate(rotate(matrix).mT).mT
    return matrix.diagonal(dim1=-2, dim2=-1), vectors


def _project_to_dual_cone(start: Tensor, gram: Tensor) -> Tensor:
    """Minimise v^T G v over v >= start, [..., K]: the nearest combination to start's that conflicts with no path.

    Non-negative least squares: of y = n (v - start), n the norms, with the cosines as its matrix, so that gradients of
    any lengths are solved alike.
    """
    norms, cosines = _norms_and_cosines(gram)
    rounding = ROUNDING * gram.shape[-1]
    lengths = start * norms
    linear, system = cosines @ lengths[..., None], _positive(cosines)

    def minimum(free: Tensor) -> tuple[Tensor, Tensor]:
        z = _solve_among(free, system, -linear)[..., 0]
        total = lengths + z
        return z, (cosines @ total[..., None])[..., 0] + rounding * total.sum(-1, keepdim=True)

    added = _active_set(torch.zeros_like(lengths), minimum)
    return start + torch.where(norms > 0, added / norms, 0.0)


def _minimize_on_simplex(linear: Tensor, k: Tensor, gram: Tensor, eps: Tensor) -> Tensor:
    """Minimise the convex f(x) = linear.x + k sqrt(x^T G x + eps) over the simplex, [..., K]; linear in the range of G.

    With x > 0 for some paths only, H = G + a 1 1^T of these, u = H^-1 1 and v = H^-1 linear, the gradient of f is a
    multiple of 1 where x = x0 + t d, x0 = u / (1^T u), d = (1^T v) x0 - v, t = sqrt(x^T G x + eps) / k. Since x0^T G d
    = 0, t^2 = (x0^T G x0 + eps) / (k^2 - d^T G d); where the divisor is not above 0, f falls along d for ever.

    On the simplex x^T H x = x^T G x + a, so that a changes nothing but keeps gradients that cancel from making H
    singular. For linear = 0 the minimum is that of x^T G x + a (1 - 1^T x)^2 over x >= 0, scaled to sum 1: along x = s
    y with 1^T y = 1 the least value is a q / (a + q), which grows with q = y^T G y.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    if gram.shape[-1] == 2:
        product, gamma = _quadratic(torch.full_like(linear, 0.5), gram, eps)
        alpha = squares.sum(-1) - 2 * gram[..., 0, 1]
        t = _exact_step(linear[..., 0] - linear[..., 1], k, alpha, product[..., 0] - product[..., 1], gamma)
        return torch.stack([0.5 + t, 0.5 - t], -1)
    rounding = ROUNDING * gram.shape[-1]
    # The shortest combination is no longer than the shortest gradient.
    shortest = squares.amin(-1, keepdim=True).clamp_min(_TINY)
    norms = (squares + shortest).sqrt()
    matrix = gram + shortest[..., None]
    system = _positive(matrix / (norms[..., :, None] * norms[..., None, :]))
    right = torch.stack([1 / norms, linear / norms], -1)

    def minimum(free: Tensor) -> tuple[Tensor, Tensor]:
        u, v = (_solve_among(free, system, right) / norms[..., None]).unbind(-1)
        one, total = u.sum(-1, keepdim=True), v.sum(-1, keepdim=True)
        x0 = u / one
        d = total * x0 - v
        square, falls = _quadratic(x0, gram, eps)[1], _quadratic(d, gram, 0.0)[1]
        # Where f falls for ever, far beyond the simplex, but finite.
        t = (square / (k.square() - falls).clamp_min(_ENDLESS * eps).clamp_min(_TINY)).sqrt()[..., None]
        z, level = x0 + t * d, (1 + t * total) / one
        slope = ((matrix @ z[..., None])[..., 0] + t * linear - level) / norms
        size = (z * norms).sum(-1, keepdim=True) + (t * linear.abs() + level.abs()) / norms
        return z, slope + rounding * size

    values = linear + k[..., None] * (squares + eps[..., None]).sqrt()
    best = torch.arange(values.shape[-1], device=values.device) == values.argmin(-1, keepdim=True)
    x = _active_set(best.to(values.dtype), minimum)
    return x / x.sum(-1, keepdim=True)


def _active_set(y: Tensor, minimum: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Minimise a convex function over y >= 0, [..., K], by active sets (Lawson & Hanson, Solving Least Squares
    Problems, 1974, chapter 23), from a y that is the minimum among its coordinates above 0.

    ``minimum(free)`` returns the minimum z with the coordinates that are not ``free`` held at 0, and the slopes there,
    to which their rounding is added. A round goes towards z until a coordinate falls to 0, which is held from then on;
    where z is reached, the coordinate of the most negative slope is freed. Each z that is reached lies lower than the
    last, so that no set of free coordinates comes back. Of 500,000 random and degenerate matrices for each K = 3..8
    none took more than 2 K + 5 rounds with any method, of 100,000 for K = 12, 16 and 20 none more than 2 K + 3. Only
    CAGrad with c = 1 may go on for longer: where its objective is flat to rounding, among sets that are alike.

    A Gram matrix that rounding has made indefinite may send a coordinate that was just freed below 0: y stays where it
    is then, and the coordinate is freed and held in turn until the rounds are over.
    """
    index = torch.arange(y.shape[-1], device=y.device)
    free = y > 0
    for _ in range(ROUNDS_PER_PATH * y.shape[-1]):
        z, slope = minimum(free)
        # Where the matrix is singular, too: the coordinate freed last is at 0, so that the step has length 0.
        z = torch.where(z.isfinite().all(-1, keepdim=True), z, -1.0)
        ratio = torch.where(free & (z < 0), y / (y - z), torch.inf)
        step = ratio.amin(-1, keepdim=True)
        part = torch.where(ratio <= step, 0.0, (y + step * (z - y)).clamp_min(0.0))
        y = torch.where(free, torch.where(step < 1, part, z), 0.0)
        least, best = torch.where(y > 0, torch.inf, slope).min(-1, keepdim=True)
        free = (y > 0) | ((step >= 1) & (least < 0) & (index == best))
    return y


def _solve_among(free: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Solve matrix x = right, [..., K, R], for the rows and columns that are ``free``; x is 0 elsewhere."""
    # The identity in place of what is held at 0.
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inner = torch.where(free[..., :, None] & free[..., None, :], matrix, eye)
    # The _ex form leaves the error code on the device; a singular system shows as non-finite values.
    return torch.linalg.solve_ex(inner, torch.where(free[..., None], right, 0.0))[0]


def _positive(cosines: Tensor) -> Tensor:
    """Cosines [..., K, K] with what rounding asks for on their diagonal."""
    num_paths = cosines.shape[-1]
    return cosines + 2 * num_paths * ROUNDING * torch.eye(num_paths, dtype=cosines.dtype, device=cosines.device)


def _quadratic(x: Tensor, gram: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """G x and x^T G x + eps."""
    product = (gram @ x[..., None])[..., 0]
    return product, (x * product).sum(-1).clamp_min(0.0) + eps


def _exact_step(slope: Tensor, k: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """The t in [-1/2, 1/2] that minimises slope t + k sqrt(alpha t^2 + 2 beta t + gamma), elementwise."""
    alpha = alpha.clamp_min(_TINY)
    # With u = t + beta/alpha the root is of alpha u^2 + delta; the derivative vanishes where u^2 = slope^2 delta /
    # (alpha (k^2 alpha - slope^2)), or nowhere.
    curvature = k.square() * alpha - slope.square()
    delta = (gamma - beta.square() / alpha).clamp_min(0.0)
    square = torch.where(curvature > 0, slope.square() * delta / (alpha * curvature).clamp_min(_TINY), torch.inf)
    # Finite, so that a slope of 0 stays where it is.
    u = -slope.sign() * square.sqrt().clamp_max(1 / _TINY)
    return (u - beta / alpha).clamp(-0.5, 0.5)


def _expect_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number; found {value!r}")


def random_order(num_paths: int, seed: int, step: int | Tensor, device: torch.device | None = None) -> Tensor:
    """Draw the order in which each path meets the others, a pure function of (seed, step): int64 [K, K], each row a
    permutation of the paths.

    ``step`` may be a tensor on the device (a running count), so that drawing needs neither the host nor a generator's
    state.

    >>> random_order(3, seed=0, step=7).sort(-1).values.tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    device = step.device if isinstance(step, Tensor) else device
    bits = torch.arange(num_paths * num_paths, device=device) + (step * num_paths * num_paths)
    # A seed's product may be more than int64 holds: wrapped around, as tensors do.
    offset = (seed * 0x632BE59B + 2**63) % 2**64 - 2**63
    # The finalizer of splitmix64 (Steele et al., OOPSLA 2014); int64 wraps around, and the masks make the shifts
    # logical.
    bits = (bits + offset) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits.view(num_paths, num_paths).argsort(-1)


def _rows_and_steps(gram: Tensor, order: Tensor | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Coefficient rows that start at the identity, and per step a one-hot [K, K] of whom each row meets and a bool
    [K], false where a row meets itself.
    """
    num_paths = gram.shape[-1]
    eye = torch.eye(num_paths, dtype=gram.dtype, device=gram.device)
    index = torch.arange(num_paths, device=gram.device)
    order = index.expand(num_paths, num_paths) if order is None else order
    return eye.expand_as(gram), [(eye.index_select(0, met), met != index) for met in order.unbind(-1)]


@dataclass(frozen=True)
class Method:
    """A way to weigh paths, and what it does with a parameter that only some of the paths reach.

    ``weights`` maps a Gram matrix [..., K, K] and keyword options to weights [..., K], or, where it has a parameter
    ``rho``, to (weights, new rho). ``partial`` says how a parameter n that is missing from some paths is merged, as
    the published code of each method does it; missing gradients are zero in the inner products:

    - "average": sum over the paths that reach it of w_k g_k[n] (mean: training on the mean loss, so g/K where one path
      reaches it; GradVac; any callable);
    - "sum": K times that, so that a single path's gradient is kept whole where it was not projected (PCGrad);
    - "apart": left out of the Gram matrix, and the plain sum of g_k[n] is kept (CAGrad; the published code keeps path
      0's only and loses the others').
    """

    weights: Callable[..., Any]
    partial: Literal["average", "sum", "apart"] = "average"
    # What the op `weigh` calls it; empty where it has no kernel.
    name: str = ""

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names that ``weights`` takes beside the Gram matrix."""
        return tuple(inspect.signature(self.weights).parameters)[1:]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options a user may set; a drawn order is set by its seed."""
        names = [name for name in self.parameters if name not in ("rho", "order")]
        return (*names, "seed") if "order" in self.parameters else tuple(names)

    def partial_weights(self, weights: Tensor, present: tuple[int, ...]) -> Tensor:
        """Weights [..., M] for the parameters that only the M paths in ``present`` reach, from the weights [..., K] of
        all.
        """
        chosen = torch.stack([weights[..., k] for k in present], -1)
        return {"average": chosen, "sum": chosen * weights.shape[-1], "apart": torch.ones_like(chosen)}[self.partial]


METHODS: dict[str, Method] = {
    "mean": Method(mean, name="mean"),
    "none": Method(mean, name="mean"),
    "pcgrad": Method(pcgrad, partial="sum", name="pcgrad"),
    "gradvac": Method(gradvac, name="gradvac"),
    "cagrad": Method(cagrad, partial="apart", name="cagrad"),
    "mgda": Method(mgda, name="mgda"),
    "dualproj": Method(dualproj, name="dualproj"),
    "upgrad": Method(upgrad, name="upgrad"),
    "imtlg": Method(imtlg, name="imtlg"),
    "alignedmtl": Method(alignedmtl, name="alignedmtl"),
    "nashmtl": Method(nashmtl, name="nashmtl"),
}


def resolve(method: str | Callable[[Tensor], Tensor]) -> Method:
    """Return the `Method` of a name in `METHODS`, or one around any callable that maps a Gram matrix float64 [K, K] to
    weights [K].

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)} or a callable; found {method!r}")
        return METHODS[method]
    if not callable(method):
        raise TypeError(f"`method` must be a name or a callable gram -> weights; found {type(method).__name__}")

    def each(gram: Tensor) -> Tensor:
        found = [method(matrix) for matrix in gram.reshape(-1, *gram.shape[-2:])]
        if any(not isinstance(w, Tensor) or w.shape != gram.shape[-1:] for w in found):
            shapes = [list(w.shape) if isinstance(w, Tensor) else type(w).__name__ for w in found]
            raise ValueError(f"a weighting must return one weight per path, [{gram.shape[-1]}]; found {shapes[0]}")
        return torch.stack(found).to(gram).view(gram.shape[:-1])

    return Method(each)


def solve(gram: Tensor, method: Method, rho: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weights float64 [..., K] of a Gram matrix [..., K, K], and the new ``rho`` where the method has one.

    One path alone has weight exactly 1, and a Gram matrix with a non-finite entry gives NaN weights, with every method.
    """
    gram = gram.double()
    if gram.shape[-1] == 1:
        found = torch.ones_like(gram[..., 0])
    elif "rho" in method.parameters:
        found, rho = method.weights(gram, rho, **options)
    else:
        found = method.weights(gram, **options)
    return found + 0.0 * gram.sum((-2, -1))[..., None], rho


def kernel_options(options: dict[str, Any]) -> tuple[float, bool, float]:
    """Return (beta, always, c) of the ops `weigh` and `align_` from a method's keyword options."""
    variant = options.get("variant", "dual_path")
    beta = options.get("beta")
    return _BETA[variant] if beta is None else float(beta), variant == "paper", float(options.get("c", 0.5))


def weigh(gram: Tensor, method: Method, rho: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`solve` for float64 [S, K, K], in one launch where the method is one of `METHODS`: the op `weigh`.

    The options are not checked again; `solve` has raised for wrong ones.

    >>> weigh(torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]], dtype=torch.float64), METHODS["pcgrad"])[0]
    tensor([[0.7500, 0.7500]], dtype=torch.float64)
    """
    # The ops' reference is this module.
    from gradalign import ops

    if not method.name:
        # A function of the user's may change what it gets.
        return solve(gram.clone(), method, rho, **options)
    found, new_rho = ops.weigh(gram, method.name, rho, options.get("order"), *kernel_options(options))
    return found, new_rho if "rho" in method.parameters else rho


def weights(gram: Tensor, method: str | Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """Return the weights with which ``method`` merges K gradients whose inner products are ``gram``.

    Args:
        gram: [..., K, K], floating point, symmetric; any leading axes. Computed in float64.
        method: a name in `METHODS`, or a callable that maps one Gram matrix float64 [K, K] to weights [K].
        **options: the method's own keywords (see `pcgrad`, `gradvac`, `cagrad`).

    Returns:
        float64 [..., K] on the same device; NaN where ``gram`` holds a NaN or an infinity. GradVac's new targets are
        left out: `gradvac` returns them, too.

    Raises:
        TypeError: if ``gram`` is no floating-point tensor, ``method`` neither a name nor callable, or an option
            unknown.
        ValueError: for a shape other than [..., K, K], or an unknown method.

    >>> weights(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), "mean")
    tensor([0.5000, 0.5000], dtype=torch.float64)
    >>> weights(torch.eye(3), lambda gram: 1 / gram.diagonal())
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        found = str(gram.dtype).removeprefix("torch.") if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"`gram` must be a floating-point tensor [..., K, K]; found {found}")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"`gram` must be [..., K, K] with K >= 1; found {list(gram.shape)}")
    resolved = resolve(method)
    check_options(method, options, resolved.parameters)
    return solve(gram, resolved, **options)[0]


def check_options(method: str | Callable, options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise TypeError if ``options`` has a name that is not among ``known``."""
    if unknown := [name for name in options if name not in known]:
        takes = f"takes the options {', '.join(known) or '(none)'}"
        if not isinstance(method, str):
            takes = "is a callable, which takes no options here (functools.partial sets them)"
        raise TypeError(f"method {label(method)!r} {takes}; found {', '.join(unknown)}")


def label(method: str | Callable) -> str:
    """Return a method's name, a callable's own."""
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
