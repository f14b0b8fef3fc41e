"""weigh in Triton: Gram matrices to weights. Equivalent to `reference.weigh`; csrc/weigh.h is the same in C++.

gradalign/alignment.py says what each method is and where it comes from. Two paths have closed forms; more are solved by
the same iterations as there, one program and one warp for a matrix, which lies in registers as a tile [TILE, TILE],
TILE the next power of two. Beyond the K paths it holds zeros.
"""
# Triton's language has no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradalign import alignment, ops
from gradalign.kernels import backend, launch

# Segments per program where there is nothing to solve.
BLOCK = 128
# What alignment.py gives reasons for.
_TINY = tl.constexpr(alignment._TINY)
_CANCELLED = tl.constexpr(alignment._CANCELLED)
_VANISHING = tl.constexpr(alignment._VANISHING)
_NASH_RIDGE = tl.constexpr(alignment._NASH_RIDGE)
_NASH_SEARCH = tl.constexpr(alignment.NASH_SEARCH)
_ROUNDING = tl.constexpr(alignment.ROUNDING)
_ENDLESS = tl.constexpr(alignment._ENDLESS)
_MAX_TARGET = tl.constexpr(alignment._MAX_TARGET)
_NOTHING = tl.constexpr(alignment._NOTHING)


@triton.jit
def _is_finite(value):
    return tl.abs(value) <= 1.7976931348623157e308


# ---------------------------------------------------------------------------------------------------- up to two paths


@triton.jit
def _pull_up(norm_i, norm_j, inner, rho, BETA: tl.constexpr, ALWAYS: tl.constexpr):
    """GradVac: the multiple of g_j that path i gains, and the target that is left."""
    cosine = tl.minimum(tl.maximum(inner / tl.maximum(norm_i * norm_j, _TINY), -1.0), 1.0)
    cosine = tl.where(norm_i > 0, cosine, 0.0)
    # tl.minimum and a comparison would round the constant to float32; arithmetic does not.
    target = tl.where(rho - _MAX_TARGET > 0, _MAX_TARGET, rho)
    sine = tl.sqrt(tl.maximum(1 - cosine * cosine, 0.0))
    target_sine = tl.sqrt(1 - target * target)
    gain = norm_i * (target * sine - cosine * target_sine) / tl.maximum(norm_j * target_sine, _TINY)
    moved = rho + BETA * (cosine - rho)
    if not ALWAYS:
        moved = tl.where(cosine > 0, moved, rho)
    return tl.where((cosine < target) & (norm_j > 0), gain, 0.0), moved


@triton.jit
def _exact_step(slope, k, alpha, beta, gamma):
    """The t in [-1/2, 1/2] that minimises slope t + k sqrt(alpha t^2 + 2 beta t + gamma)."""
    alpha = tl.maximum(alpha, _TINY)
    curvature = k * k * alpha - slope * slope
    delta = tl.maximum(gamma - beta * beta / alpha, 0.0)
    u = tl.minimum(tl.sqrt(slope * slope * delta / tl.maximum(alpha * curvature, _TINY)), 1e300)
    u = tl.where(slope == 0, 0.0, tl.where(curvature > 0, u, 1e300))
    return tl.minimum(tl.maximum(tl.where(slope > 0, -u, u) - beta / alpha, -0.5), 0.5)


@triton.jit
def _weigh_two(
    aa, ab, bb, rho_ab, rho_ba, METHOD: tl.constexpr, BETA: tl.constexpr, ALWAYS: tl.constexpr, C: tl.constexpr
):
    """Weights of two paths, G = [aa, ab; ab, bb], and GradVac's targets; csrc/weigh.h has the same closed forms."""
    one = aa * 0.0 + 0.5
    two = one
    if METHOD == "pcgrad" or METHOD == "upgrad":
        q = 0.5 * tl.minimum(ab, 0.0)
        one = 0.5 - q / tl.maximum(aa, _TINY)
        two = 0.5 - q / tl.maximum(bb, _TINY)
    elif METHOD == "gradvac":
        gain_a, rho_ab = _pull_up(tl.sqrt(aa), tl.sqrt(bb), ab, rho_ab, BETA, ALWAYS)
        gain_b, rho_ba = _pull_up(tl.sqrt(bb), tl.sqrt(aa), ab, rho_ba, BETA, ALWAYS)
        one = 0.5 + 0.5 * gain_b
        two = 0.5 + 0.5 * gain_a
    elif METHOD == "cagrad" or METHOD == "mgda":
        product_a = 0.5 * (aa + ab)
        product_b = 0.5 * (ab + bb)
        gamma = tl.maximum(0.5 * (product_a + product_b), 0.0)
        if METHOD == "cagrad":
            slope = product_a - product_b
            k = C * tl.sqrt(tl.maximum(0.25 * (aa + 2 * ab + bb), 0.0))
            eps = tl.maximum(_CANCELLED * _CANCELLED * 0.5 * (aa + bb), _TINY)
        else:
            slope = aa * 0.0
            k = slope + 1.0
            eps = tl.maximum(0.5 * (aa + bb), _TINY)
        t = _exact_step(slope, k, aa + bb - 2 * ab, product_a - product_b, gamma + eps)
        one = 0.5 + t
        two = 0.5 - t
        if METHOD == "cagrad":
            square = tl.maximum(one * (aa * one + ab * two) + two * (ab * one + bb * two), 0.0)
            ratio = k / tl.sqrt(square + eps)
            one = (0.5 + ratio * one) / (1 + C * C)
            two = (0.5 + ratio * two) / (1 + C * C)
    elif METHOD == "dualproj":
        # At most one path conflicts with the mean.
        a = 0.5 * (aa + ab)
        b = 0.5 * (ab + bb)
        one = 0.5 - tl.where(a < b, tl.minimum(a, 0.0) / tl.maximum(aa, _TINY), 0.0)
        two = 0.5 - tl.where(a < b, 0.0, tl.minimum(b, 0.0) / tl.maximum(bb, _TINY))
    elif METHOD == "imtlg" or METHOD == "nashmtl":
        a = tl.sqrt(tl.maximum(aa, 0.0))
        b = tl.sqrt(tl.maximum(bb, 0.0))
        # A zero gradient is left out; of two, both are kept.
        both = (a > 0) == (b > 0)
        one = tl.where(both, tl.where(a > 0, b, 1.0), tl.where(a > 0, 1.0, 0.0))
        two = tl.where(both, tl.where(a > 0, a, 1.0), tl.where(a > 0, 0.0, 1.0))
        one, two = one / (one + two), two / (one + two)
    elif METHOD == "alignedmtl":
        # One rotation diagonalises G.
        tau = (bb - aa) / tl.where(ab == 0, 1.0, 2 * ab)
        tangent = tl.where(tau < 0, -1.0, 1.0) / (tl.abs(tau) + tl.sqrt(1 + tau * tau))
        tangent = tl.where(ab == 0, 0.0, tangent)
        c = 1 / tl.sqrt(1 + tangent * tangent)
        s = tangent * c
        first = aa - tangent * ab
        second = bb + tangent * ab
        cut = _VANISHING * tl.maximum(tl.maximum(first, second), 0.0)
        both = (first > cut) & (second > cut)
        least = tl.where(both, tl.minimum(first, second), tl.maximum(first, second))
        u = tl.where(first > cut, tl.sqrt(least / tl.where(first > cut, first, 1.0)) * 0.5 * (c - s), 0.0)
        v = tl.where(second > cut, tl.sqrt(least / tl.where(second > cut, second, 1.0)) * 0.5 * (c + s), 0.0)
        none = (first <= cut) & (second <= cut)
        one = tl.where(none, 0.5, u * c + v * s)
        two = tl.where(none, 0.5, v * c - u * s)
    return one, two, rho_ab, rho_ba


@triton.jit(do_not_specialize=["num_segments"])
def weigh_kernel(
    gram,
    rho,
    weights,
    targets,
    num_segments,
    NUM_PATHS: tl.constexpr,
    METHOD: tl.constexpr,
    BETA: tl.constexpr,
    ALWAYS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK segments per program, of one or two paths, or of any number for the mean: gram [S, K, K] -> weights [S, K];
    for GradVac also rho -> targets [S, K, K].
    """
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = segment < num_segments
    matrix = gram + segment * (NUM_PATHS * NUM_PATHS)
    good = mask
    for i in range(NUM_PATHS * NUM_PATHS):
        good = good & _is_finite(tl.load(matrix + i, mask=mask, other=0.0))
    found = ()
    if NUM_PATHS == 2:
        aa = tl.load(matrix, mask=good, other=1.0)
        ab = tl.load(matrix + 1, mask=good, other=0.0)
        bb = tl.load(matrix + 3, mask=good, other=1.0)
        rho_ab = aa * 0.0
        rho_ba = aa * 0.0
        if METHOD == "gradvac" and rho is not None:
            rho_ab = tl.load(rho + segment * 4 + 1, mask=mask, other=0.0)
            rho_ba = tl.load(rho + segment * 4 + 2, mask=mask, other=0.0)
        one, two, new_ab, new_ba = _weigh_two(aa, ab, bb, rho_ab, rho_ba, METHOD, BETA, ALWAYS, C)
        found = (one, two)
        if METHOD == "gradvac":
            tl.store(targets + segment * 4 + 1, tl.where(good, new_ab, rho_ab), mask=mask)
            tl.store(targets + segment * 4 + 2, tl.where(good, new_ba, rho_ba), mask=mask)
    else:
        for _ in tl.static_range(NUM_PATHS):
            found = found + (tl.full([BLOCK], 1.0 / NUM_PATHS, tl.float64),)
    if METHOD == "gradvac":
        # A path has no target with itself; what is there stays.
        for i in tl.static_range(NUM_PATHS):
            old = tl.zeros([BLOCK], tl.float64)
            if rho is not None:
                old = tl.load(rho + segment * (NUM_PATHS * NUM_PATHS) + i * (NUM_PATHS + 1), mask=mask, other=0.0)
            tl.store(targets + segment * (NUM_PATHS * NUM_PATHS) + i * (NUM_PATHS + 1), old, mask=mask)
    for k in tl.static_range(NUM_PATHS):
        tl.store(weights + segment * NUM_PATHS + k, tl.where(good, found[k], float("nan")), mask=mask)


# ------------------------------------------------------------------------------------------------- more than two paths


@triton.jit
def _times(matrix, vector):
    """matrix [TILE, TILE] times vector [TILE]."""
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def _diagonal(matrix, TILE: tl.constexpr):
    index = tl.arange(0, TILE)
    return tl.sum(tl.where(index[:, None] == index[None, :], matrix, 0.0), 0)


@triton.jit
def _entry(vector, index, TILE: tl.constexpr):
    """vector[index]."""
    return tl.sum(tl.where(tl.arange(0, TILE) == index, vector, 0.0), 0)


@triton.jit
def _column(matrix, index, TILE: tl.constexpr):
    """matrix[:, index]."""
    return tl.sum(tl.where(tl.arange(0, TILE)[None, :] == index, matrix, 0.0), 1)


@triton.jit
def _factor(matrix, COUNT: tl.constexpr, TILE: tl.constexpr):
    """L D of a positive definite matrix L D L^T, in and below its diagonal, of the first COUNT rows and columns."""
    index = tl.arange(0, TILE)
    for column in range(COUNT):
        below = tl.where(index > column, _column(matrix, column, TILE), 0.0)
        pivot = _entry(_column(matrix, column, TILE), column, TILE)
        matrix = matrix - below[:, None] / pivot * below[None, :]
    return matrix


@triton.jit
def _substitute(factors, right, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The x [TILE] with matrix x = right, of the first COUNT rows and columns, from the matrix's `_factor`. A singular
    matrix gives values that are not finite.
    """
    index = tl.arange(0, TILE)
    for column in range(COUNT):
        entries = _column(factors, column, TILE)
        value = _entry(right, column, TILE) / _entry(entries, column, TILE)
        right = tl.where(index == column, value, right - tl.where(index > column, entries * value, 0.0))
    for turn in range(COUNT):
        column = COUNT - 1 - turn
        entries = _column(factors, column, TILE)
        rest = tl.sum(tl.where(index > column, entries * right, 0.0), 0) / _entry(entries, column, TILE)
        right = tl.where(index == column, right - rest, right)
    return right


@triton.jit
def _quadratic(x, gram, eps):
    """G x and x^T G x + eps."""
    product = _times(gram, x)
    return product, tl.maximum(tl.sum(x * product, 0), 0.0) + eps


@triton.jit
def _factor_cosines(free, cosines, NUM_PATHS: tl.constexpr, TILE: tl.constexpr):
    """The cosines' factors among the ``free`` paths, with what rounding asks for on the diagonal; the identity in place
    of the others.
    """
    index = tl.arange(0, TILE)
    diagonal = (index[:, None] == index[None, :]).to(tl.float64)
    system = tl.where(free[:, None] & free[None, :], cosines + 2 * NUM_PATHS * _ROUNDING * diagonal, diagonal)
    return _factor(system, NUM_PATHS, TILE)


@triton.jit
def _advance(y, z, free):
    """From y towards z, the minimum among the ``free`` paths, until the first falls to 0: y there and the step, at
    least 1 where z is reached, 0 where the Gram matrix tells no more because rounding has made it indefinite.
    """
    wrong = tl.sum(tl.where(_is_finite(z), 0, 1), 0)
    # Where the matrix is singular, too: the coordinate freed last is at 0, so that the step has length 0.
    z = tl.where(wrong == 0, z, -1.0)
    falls = free & (z < 0)
    ratio = tl.where(falls, y / tl.where(falls, y - z, 1.0), float("inf"))
    step = tl.min(ratio, 0)
    part = tl.where(ratio <= step, 0.0, tl.maximum(y + tl.minimum(step, 1.0) * (z - y), 0.0))
    return tl.where(free, tl.where(step < 1, part, z), 0.0), step


@triton.jit
def _free_steepest(y, slope, step, NUM_PATHS: tl.constexpr, TILE: tl.constexpr):
    """The paths with y > 0 and, where z was reached, that of the most negative slope; whether there is more to do."""
    index = tl.arange(0, TILE)
    free = y > 0
    held = tl.where(free | (index >= NUM_PATHS), float("inf"), slope)
    # Where z was not reached, no slope is below the least number.
    least = tl.where(step < 1, float("-inf"), 0.0)
    steepest = (index == tl.argmin(held, 0)) & (held < least)
    more = (tl.sum(steepest.to(tl.int32), 0) > 0) | ((step > 0) & (step < 1))
    return free | steepest, more


@triton.jit
def _minimize_on_simplex(linear, k, gram, eps, NUM_PATHS: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    """Minimise linear.x + k sqrt(x^T G x + eps) over the simplex; ``linear`` is in the range of G."""
    index = tl.arange(0, TILE)
    valid = index < NUM_PATHS
    squares = tl.maximum(_diagonal(gram, TILE), 0.0)
    shortest = tl.maximum(tl.min(tl.where(valid, squares, float("inf")), 0), _TINY)
    norms = tl.sqrt(squares + shortest)
    matrix = tl.where(valid[:, None] & valid[None, :], gram + shortest, 0.0)
    cosines = matrix / (norms[:, None] * norms[None, :])
    values = tl.where(valid, linear + k * tl.sqrt(squares + eps), float("inf"))
    free = index == tl.argmin(values, 0)
    x = tl.where(free, linear * 0.0 + 1.0, 0.0)
    left = ROUNDS
    while left > 0:
        factors = _factor_cosines(free, cosines, NUM_PATHS, TILE)
        u = _substitute(factors, tl.where(free, 1 / norms, 0.0), NUM_PATHS, TILE) / norms
        v = _substitute(factors, tl.where(free, linear / norms, 0.0), NUM_PATHS, TILE) / norms
        one = tl.sum(u, 0)
        total = tl.sum(v, 0)
        x0 = u / one
        d = total * x0 - v
        _, square = _quadratic(x0, gram, eps)
        _, falls = _quadratic(d, gram, 0.0)
        # Where the function falls for ever, far beyond the simplex, but finite.
        t = tl.sqrt(square / tl.maximum(tl.maximum(k * k - falls, _ENDLESS * eps), _TINY))
        z = x0 + t * d
        level = (1 + t * total) / one
        size = tl.sum(z * norms, 0) + (t * tl.abs(linear) + tl.abs(level)) / norms
        slope = (_times(matrix, z) + t * linear - level) / norms + NUM_PATHS * _ROUNDING * size
        x, step = _advance(x, z, free)
        free, more = _free_steepest(x, slope, step, NUM_PATHS, TILE)
        left = tl.where(more, left - 1, 0)
    return x / tl.sum(x, 0)


@triton.jit
def _project_to_dual_cone(start, norms, cosines, NUM_PATHS: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    """Minimise v^T G v over v >= start."""
    lengths = start * norms
    linear = _times(cosines, lengths)
    y = lengths * 0.0
    free = y > 0
    left = ROUNDS
    while left > 0:
        factors = _factor_cosines(free, cosines, NUM_PATHS, TILE)
        z = _substitute(factors, tl.where(free, -linear, 0.0), NUM_PATHS, TILE)
        total = lengths + z
        slope = _times(cosines, total) + NUM_PATHS * _ROUNDING * tl.sum(total, 0)
        y, step = _advance(y, z, free)
        free, more = _free_steepest(y, slope, step, NUM_PATHS, TILE)
        left = tl.where(more, left - 1, 0)
    return start + tl.where(norms > 0, y / tl.where(norms > 0, norms, 1.0), 0.0)


@triton.jit
def _partner(index, turn, NUM_PATHS: tl.constexpr):
    """Whom each path meets in a round of a round-robin tournament; itself where it is idle."""
    ROUNDS: tl.constexpr = NUM_PATHS - 1 + NUM_PATHS % 2
    partner = (turn - index + 2 * ROUNDS) % ROUNDS
    if NUM_PATHS % 2 == 0:
        # Who would meet itself meets the last.
        idle = tl.sum(tl.where((partner == index) & (index < ROUNDS), index, 0), 0)
        partner = tl.where(partner == index, ROUNDS, partner)
        partner = tl.where(index == ROUNDS, idle, partner)
    return tl.where(index < NUM_PATHS, partner, index)


@triton.jit
def _eigen(matrix, NUM_PATHS: tl.constexpr, SWEEPS: tl.constexpr, TILE: tl.constexpr):
    """Eigenvalues [TILE], in no order, and eigenvectors, in columns, by Jacobi's rotations of disjoint pairs."""
    index = tl.arange(0, TILE)
    row = index[:, None]
    column = index[None, :]
    ROUNDS: tl.constexpr = NUM_PATHS - 1 + NUM_PATHS % 2
    vectors = tl.where(row == column, matrix * 0.0 + 1.0, 0.0)
    for turn in range(ROUNDS * SWEEPS):
        partner = _partner(index, turn % ROUNDS, NUM_PATHS)
        across = tl.broadcast_to(partner[None, :], [TILE, TILE])
        down = tl.broadcast_to(partner[:, None], [TILE, TILE])
        diagonal = tl.sum(tl.where(row == column, matrix, 0.0), 0)
        other = tl.sum(tl.where(row == partner[None, :], diagonal[:, None], 0.0), 0)
        # Both of a pair turn by exactly the same angle.
        above = tl.sum(tl.where(row == partner[None, :], matrix, 0.0), 0)
        below = tl.sum(tl.where(column == partner[:, None], matrix, 0.0), 1)
        off = tl.where(partner == index, 0.0, 0.5 * (above + below))
        tau = (other - diagonal) / tl.where(off == 0, 1.0, 2 * off)
        side = tl.where((tau < 0) | ((tau == 0) & (index > partner)), -1.0, 1.0)
        tangent = tl.where(off == 0, 0.0, side / (tl.abs(tau) + tl.sqrt(1 + tau * tau)))
        cosine = 1 / tl.sqrt(1 + tangent * tangent)
        sine = tangent * cosine
        vectors = vectors * cosine[None, :] - tl.gather(vectors, across, 1) * sine[None, :]
        matrix = matrix * cosine[None, :] - tl.gather(matrix, across, 1) * sine[None, :]
        matrix = matrix * cosine[:, None] - tl.gather(matrix, down, 0) * sine[:, None]
    return _diagonal(matrix, TILE), vectors


@triton.jit
def _scale_to_sum_one(weights, NUM_PATHS: tl.constexpr):
    """Divide by the sum; 1/K where it vanishes."""
    weights = weights / tl.maximum(tl.max(tl.abs(weights), 0), _TINY)
    total = tl.sum(weights, 0)
    vanishes = tl.abs(total) <= _VANISHING * tl.sum(tl.abs(weights), 0)
    return tl.where(vanishes, 1.0 / NUM_PATHS, weights / tl.where(vanishes, 1.0, total))


@triton.jit
def _norms_and_cosines(gram, TILE: tl.constexpr):
    norms = tl.sqrt(tl.maximum(_diagonal(gram, TILE), 0.0))
    return norms, gram / tl.maximum(norms[:, None] * norms[None, :], _TINY)


@triton.jit
def _bargain(cosines, norms, NUM_PATHS: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    """Nash-MTL: the y > 0 with C y = 1 / y, by Newton's method."""
    index = tl.arange(0, TILE)
    valid = index < NUM_PATHS
    diagonal = (index[:, None] == index[None, :]).to(tl.float64)
    # A choice of two constants would be float32.
    ridge = tl.where(valid, (norms == 0).to(tl.float64) + _NASH_RIDGE, 0.0)
    matrix = cosines + diagonal * ridge[:, None]
    y = tl.where(valid, norms * 0.0 + 1.0, 0.0)
    for _ in range(ROUNDS):
        product = _times(matrix, y)
        # The best length first, then Newton's step y <- y (1 + t z), which is the same for gradients of any scale.
        length = tl.sqrt(NUM_PATHS / tl.maximum(tl.sum(y * product, 0), _NASH_RIDGE * tl.sum(y * y, 0)))
        y = y * length
        inner = matrix * y[:, None] * y[None, :]
        residual = tl.where(valid, 1 - y * product * length, 0.0)
        z = _substitute(_factor(inner + diagonal, NUM_PATHS, TILE), residual, NUM_PATHS, TILE)
        square = tl.maximum(tl.sum(z * _times(inner, z), 0), 0.0)
        # z . residual, but of terms that do not cancel: at the end z is all rounding.
        fall = square + tl.sum(z * z, 0)
        decrement = tl.sqrt(fall)
        room = tl.min(tl.where(z < 0, -1 / tl.where(z < 0, z, 1.0), float("inf")), 0)
        t = tl.where(decrement < 0.25, 1.0, 1 / (1 + decrement))
        for _ in range(_NASH_SEARCH):
            quotient = z / (1 + t * z)
            slope = t * (square + tl.sum(z * quotient, 0)) - fall
            step = slope / tl.maximum(square + tl.sum(quotient * quotient, 0), _TINY)
            t = tl.minimum(tl.maximum(t - step, 0.1 * t), 0.5 * (t + room))
        y = y * (1 + t * z)
    return y


@triton.jit
def _meet(gram, gram_at, rho, order, METHOD: tl.constexpr, BETA: tl.constexpr, ALWAYS: tl.constexpr,
          NUM_PATHS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """PCGrad and GradVac: all paths at once, each meeting the others in its order -> weights [TILE], new targets
    [TILE, TILE].

    ``gram_at`` points to the matrix in memory, where rows can be chosen.
    """
    index = tl.arange(0, TILE)
    row = index[:, None]
    column = index[None, :]
    valid = index < NUM_PATHS
    inside = valid[:, None] & valid[None, :]
    lengths = tl.sqrt(tl.maximum(_diagonal(gram, TILE), 0.0))
    rows = tl.where(row == column, gram * 0.0 + 1.0, 0.0)
    for m in range(NUM_PATHS):
        met = index * 0 + m
        if order is not None:
            met = tl.load(order + index * NUM_PATHS + m, mask=valid, other=0).to(tl.int32)
        meets = valid & (met != index) & (met >= 0) & (met < NUM_PATHS)
        met = tl.where(meets, met, 0)
        chosen = (column == met[:, None]) & meets[:, None]
        # Row i: G's row of the path that i meets.
        theirs = tl.load(gram_at + met[:, None] * NUM_PATHS + column, mask=inside, other=0.0)
        inner = tl.sum(rows * theirs, 1)
        square = tl.sum(tl.where(chosen, theirs, 0.0), 1)
        if METHOD == "gradvac":
            norm = inner * 0.0
            for j in range(NUM_PATHS):
                line = tl.sum(tl.where(row == j, gram, 0.0), 0)
                norm += tl.sum(tl.where(column == j, rows, 0.0), 1) * tl.sum(rows * line[None, :], 1)
            norm = tl.sqrt(tl.maximum(norm, 0.0))
            # Of a path that was pulled to nothing, rounding is all that is left: it has no direction.
            norm = tl.where(norm > _NOTHING * tl.sum(tl.abs(rows) * lengths[None, :], 1), norm, 0.0)
            old = tl.sum(tl.where(chosen, rho, 0.0), 1)
            gain, moved = _pull_up(norm, tl.sqrt(square), inner, old, BETA, ALWAYS)
            rho = tl.where(chosen, moved[:, None], rho)
        else:
            gain = -tl.minimum(inner, 0.0) / tl.maximum(square, _TINY)
        rows += tl.where(chosen, gain[:, None], 0.0)
    return tl.sum(tl.where(inside, rows, 0.0), 0) / NUM_PATHS, rho


@triton.jit
def weigh_many_kernel(
    gram,
    rho,
    order,
    weights,
    targets,
    NUM_PATHS: tl.constexpr,
    METHOD: tl.constexpr,
    BETA: tl.constexpr,
    ALWAYS: tl.constexpr,
    C: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One segment per program, of more than two paths: gram [S, K, K] -> weights [S, K]; for GradVac also rho ->
    targets [S, K, K].
    """
    segment = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILE)
    valid = index < NUM_PATHS
    row = index[:, None]
    column = index[None, :]
    at = segment * (NUM_PATHS * NUM_PATHS)
    place = at + row * NUM_PATHS + column
    inside = valid[:, None] & valid[None, :]
    matrix = tl.load(gram + place, mask=inside, other=0.0)
    good = tl.sum(tl.sum(tl.where(_is_finite(matrix), 0, 1), 1), 0) == 0
    matrix = tl.where(good, matrix, 0.0)
    zero = tl.sum(matrix * 0.0, 1)
    if METHOD == "pcgrad" or METHOD == "gradvac":
        old = matrix * 0.0
        if METHOD == "gradvac" and rho is not None:
            old = tl.load(rho + place, mask=inside, other=0.0)
        # A matrix that is not finite is read as it is; its results are dropped.
        found, moved = _meet(matrix, gram + at, old, order, METHOD, BETA, ALWAYS, NUM_PATHS, TILE)
        if METHOD == "gradvac":
            tl.store(targets + place, tl.where(good, moved, old), mask=inside)
    elif METHOD == "cagrad":
        total = tl.sum(matrix, 1)
        k = C * tl.sqrt(tl.maximum(tl.sum(total, 0) / (NUM_PATHS * NUM_PATHS), 0.0))
        eps = tl.maximum(_CANCELLED * _CANCELLED * tl.sum(_diagonal(matrix, TILE), 0) / NUM_PATHS, _TINY)
        x = _minimize_on_simplex(total / NUM_PATHS, k, matrix, eps, NUM_PATHS, ROUNDS, TILE)
        _, square = _quadratic(x, matrix, eps)
        found = (1.0 / NUM_PATHS + k / tl.sqrt(square) * x) / (1 + C * C)
    elif METHOD == "mgda":
        eps = tl.maximum(tl.sum(_diagonal(matrix, TILE), 0) / NUM_PATHS, _TINY)
        found = _minimize_on_simplex(zero, eps * 0.0 + 1.0, matrix, eps, NUM_PATHS, ROUNDS, TILE)
    elif METHOD == "dualproj":
        norms, cosines = _norms_and_cosines(matrix, TILE)
        start = tl.where(valid, zero + 1.0 / NUM_PATHS, 0.0)
        found = _project_to_dual_cone(start, norms, cosines, NUM_PATHS, ROUNDS, TILE)
    elif METHOD == "upgrad":
        norms, cosines = _norms_and_cosines(matrix, TILE)
        found = zero
        for i in range(NUM_PATHS):
            start = tl.where(index == i, zero + 1.0 / NUM_PATHS, 0.0)
            found += _project_to_dual_cone(start, norms, cosines, NUM_PATHS, ROUNDS, TILE)
    elif METHOD == "imtlg":
        norms, cosines = _norms_and_cosines(matrix, TILE)
        values, vectors = _eigen(cosines, NUM_PATHS, ROUNDS, TILE)
        kept = values > _VANISHING * tl.maximum(tl.max(values, 0), 0.0)
        inverse = tl.where(kept, 1 / tl.where(kept, values, 1.0), 0.0)
        # Where the directions cancel, their sum has none of what is left.
        # A constant that is compared would be float32.
        sums = tl.sum(vectors, 0)
        y = _times(vectors, inverse * tl.where(tl.abs(sums) > _VANISHING * tl.sum(vectors * vectors, 0), sums, 0.0))
        found = _scale_to_sum_one(tl.where(norms > 0, y / tl.where(norms > 0, norms, 1.0), 0.0), NUM_PATHS)
    elif METHOD == "alignedmtl":
        values, vectors = _eigen(matrix, NUM_PATHS, ROUNDS, TILE)
        kept = values > _VANISHING * tl.maximum(tl.max(values, 0), 0.0)
        least = tl.min(tl.where(kept, values, float("inf")), 0)
        ratio = tl.where(kept, tl.sqrt(tl.where(kept, least / tl.where(kept, values, 1.0), 1.0)), 0.0)
        found = _times(vectors, ratio * tl.sum(vectors, 0) / NUM_PATHS)
        # A zero matrix keeps the mean.
        found = tl.where(_is_finite(least), found, 1.0 / NUM_PATHS)
    elif METHOD == "nashmtl":
        norms, cosines = _norms_and_cosines(matrix, TILE)
        y = _bargain(cosines, norms, NUM_PATHS, ROUNDS, TILE)
        found = _scale_to_sum_one(tl.where(norms > 0, y / tl.where(norms > 0, norms, 1.0), 0.0), NUM_PATHS)
    tl.store(weights + segment * NUM_PATHS + index, tl.where(good, found, float("nan")), mask=valid)


# ------------------------------------------------------------------------------------------------------------ launcher


@backend(ops.weigh)
def weigh(
    gram: Tensor, method: str, rho: Tensor | None, order: Tensor | None, beta: float, always: bool, c: float
) -> tuple[Tensor, Tensor]:
    """Gram matrices [S, K, K] -> weights [S, K] and GradVac's targets. Equivalent to `reference.weigh`."""
    gram, moves, (num_segments, num_paths, _) = gram.contiguous(), method == "gradvac", gram.shape
    weights = torch.empty(num_segments, num_paths, dtype=gram.dtype, device=gram.device)
    targets = torch.empty(gram.shape if moves else (0,), dtype=gram.dtype, device=gram.device)
    rho = rho.contiguous() if moves and rho is not None else None
    # What a method does not read must not compile it anew.
    options = {
        "NUM_PATHS": num_paths,
        "METHOD": method,
        "BETA": beta if moves else 0.0,
        "ALWAYS": always if moves else False,
        "C": c if method == "cagrad" else 0.0,
    }
    if num_paths <= 2 or method == "mean":
        programs = triton.cdiv(num_segments, BLOCK)
        launch(
            weigh_kernel, programs, gram.device, gram, rho, weights, targets, num_segments, **options, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
    else:
        order = order.contiguous() if method in ("pcgrad", "gradvac") and order is not None else None
        launch(
            weigh_many_kernel,
            num_segments,
            gram.device,
            gram,
            rho,
            order,
            weights,
            targets,
            **options,
            ROUNDS=_rounds(method, num_paths),
            TILE=triton.next_power_of_2(num_paths),
            num_warps=1,
            # Several lanes hold the same number. Of a fused a b + c d one lane rounds a b, another c d: they would go
            # on with different numbers, and might leave a loop apart.
            enable_fp_fusion=False,
        )
    return weights, targets


def _rounds(method: str, num_paths: int) -> int:
    """How often a method iterates, as in alignment.py."""
    if method in ("imtlg", "alignedmtl"):
        return alignment.JACOBI_SWEEPS
    return alignment.NASH_ROUNDS if method == "nashmtl" else alignment.ROUNDS_PER_PATH * num_paths
