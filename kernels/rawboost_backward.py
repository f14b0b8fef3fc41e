"""Gradients of RawBoost's ops in the waveform: lnl_backward, isd_backward, ssi_backward of gradalign/reference.py.

The forward's kernels compute again what they did not keep. Then each op takes one pass for what a gradient depends on
in its whole utterance (inner products, where the largest magnitude lies), and one that finishes the samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradalign import ops
from gradalign.kernels import backend, launch
from gradalign.kernels.rawboost import (
    BLOCK,
    TILE_BLOCK,
    _bank,
    _dense,
    _fir_tile,
    _isd_gain,
    _length,
    _level,
    _noise_level,
    _peak,
    _peak_of,
    _rows,
    _sum_of,
    _tile,
    _wide,
    color_noise,
    filter_powers,
    in_parts,
    mark,
    scratch,
    why_too_long,
)

# No sample: behind every place.
_NOWHERE = tl.constexpr(2**62)


@triton.jit
def _first_place(value, peak, n):
    """The first position of the largest magnitude, int64: 2 n, and 1 more where the value is negative."""
    code = 2 * n.to(tl.int64) + (value < 0).to(tl.int64)
    return tl.min(tl.where(tl.abs(value) == peak, code, _NOWHERE), 0)


@triton.jit
def _min_of(places, count, BLOCK: tl.constexpr):
    """The first of places [count]."""
    first_place = tl.full([BLOCK], _NOWHERE, tl.int64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        first_place = tl.minimum(first_place, tl.load(places + i, mask=i < count, other=_NOWHERE))
    return tl.min(first_place, 0)


@triton.jit
def _norm_backward(grad, n, dot, peak, place):
    """The gradient in cond_norm's result becomes the one in its argument v; dot is float64, sum of grad * v.

    Returns it and what was taken off at the place of the peak, float64.
    """
    scales = peak > 1
    divisor = tl.where(scales, peak, 1.0)
    wide = divisor.to(tl.float64)
    correction = tl.where(scales, dot / (wide * wide), 0.0)
    correction = tl.where(place % 2 == 1, -correction, correction)
    return grad / divisor - tl.where(n == place // 2, correction, 0.0).to(grad.dtype), correction


# --------------------------------------------------------------------------------------------------------- lnl_backward


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "grad_stride"])
def lnl_backward_sums_kernel(
    z,
    grad,
    sums,
    largest,
    smallest,
    lengths,
    dots,
    grad_sums,
    places,
    num_samples,
    num_tiles,
    num_blocks,
    grad_stride,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (utterance, block), v = z - mean(z): the sums of grad * v and of grad, and the peak's place."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    length = _length(lengths, b, num_samples)
    wide = z.dtype.element_ty
    mean, peak = _level(sums, largest, smallest, b, length, num_tiles, wide, TILE_BLOCK)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < length
    value = tl.where(mask, tl.load(z + b * num_samples + n, mask=mask, other=0.0) - mean, 0.0)
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(tl.float64)
    tl.store(dots + program, tl.sum(slope * value.to(tl.float64), 0))
    tl.store(grad_sums + program, tl.sum(slope, 0))
    tl.store(places + program, _first_place(value, peak, n))


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "grad_stride"])
def lnl_backward_center_kernel(
    z,
    grad,
    sums,
    largest,
    smallest,
    lengths,
    dots,
    grad_sums,
    places,
    num_samples,
    num_tiles,
    num_blocks,
    grad_stride,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in z, in the place of z."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    length = _length(lengths, b, num_samples)
    wide = z.dtype.element_ty
    _, peak = _level(sums, largest, smallest, b, length, num_tiles, wide, TILE_BLOCK)
    dot = _sum_of(dots + b * num_blocks, num_blocks, TILE_BLOCK)
    total = _sum_of(grad_sums + b * num_blocks, num_blocks, TILE_BLOCK)
    place = _min_of(places + b * num_blocks, num_blocks, TILE_BLOCK)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < length
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(wide)
    slope, correction = _norm_backward(slope, n, dot, peak, place)
    mean = (total / tl.where(peak > 1, peak, 1.0).to(tl.float64) - correction) / tl.maximum(length, 1)
    tl.store(z + b * num_samples + n, tl.where(mask, slope - mean.to(wide), 0.0), mask=n < num_samples)


@triton.jit(do_not_specialize=["num_tiles", "num_taps", "x_stride"])
def lnl_backward_kernel(
    x,
    centered,
    mirrored,
    lengths,
    out,
    num_samples,
    num_tiles,
    num_taps,
    x_stride,
    NUM_FILTERS: tl.constexpr,
    TAPS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per (utterance, tile): sum over i of (i + 1) * x**i * adjoint FIR_i(centered).

    x, centered [B, T], mirrored [B, N_f, P] -> out [B, T]. The adjoint of a filter is its mirror image, 2 samples back:
    the forward advances by one.
    """
    program = tl.program_id(0)
    b = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles) * BLOCK
    length = _length(lengths, b, num_samples)
    n = first + tl.arange(0, BLOCK)
    wide = centered.dtype.element_ty
    power = tl.full([BLOCK], 1.0, wide)
    total = tl.zeros([BLOCK], wide)
    order = tl.full([], 1.0, wide)
    for i in range(NUM_FILTERS):
        taps = mirrored + (b * NUM_FILTERS + i) * num_taps
        row = centered + b * num_samples
        part = _fir_tile(row, taps, first - 2, length, num_taps, 1, TAPS_BLOCK, BLOCK, COLUMNS, DEPTH)
        total += order * power * part
        # Read here, and not before the loop, so that it takes no registers from the filter.
        power *= tl.load(x + b * x_stride + n, mask=n < length, other=0.0).to(wide)
        order += 1
    total = tl.where(n < length, total, 0.0)
    tl.store(out + b * num_samples + n, total.to(out.dtype.element_ty), mask=n < num_samples)


@backend(ops.lnl_backward, why_too_long)
def lnl_backward(grad: Tensor, x: Tensor, filters: Tensor, lengths: Tensor | None) -> Tensor:
    """grad, x [B, T], filters [B, N_f, P], lengths [B] -> like x. Equivalent to `reference.lnl_backward`."""
    return in_parts(_lnl_backward, x, grad, filters, lengths)


def _lnl_backward(out: Tensor, x: Tensor, grad: Tensor, filters: Tensor, lengths: Tensor | None) -> None:
    """Write what `lnl_backward` returns into out [B, T]."""
    grad, x, filters, lengths = _rows(grad), _rows(x), _bank(filters, x), _dense(lengths)
    (batch, num_samples), (_, num_filters, num_taps) = x.shape, filters.shape
    z = torch.empty(x.shape, dtype=_wide(x), device=x.device)
    sums, extrema = filter_powers(x, filters, num_filters, lengths, z)
    tiles, blocks = sums.shape[1], triton.cdiv(num_samples, BLOCK)
    totals = torch.empty(2, batch, blocks, dtype=torch.float64, device=x.device)
    places = torch.empty(batch, blocks, dtype=torch.int64, device=x.device)
    for kernel in (lnl_backward_sums_kernel, lnl_backward_center_kernel):
        launch(
            kernel,
            batch * blocks,
            x.device,
            z,
            grad,
            sums,
            extrema[0],
            extrema[1],
            lengths,
            totals[0],
            totals[1],
            places,
            num_samples,
            tiles,
            blocks,
            grad.stride(0),
            TILE_BLOCK=TILE_BLOCK,
            BLOCK=BLOCK,
            num_warps=4,
        )
    tile = _tile(x, 1)
    if x.dtype == torch.float64:
        # The sum over the branches takes the registers of half the outputs.
        tile["BLOCK"] //= 2
    tiles = triton.cdiv(num_samples, tile["BLOCK"])
    launch(
        lnl_backward_kernel,
        batch * tiles,
        x.device,
        x,
        z,
        filters.flip(-1),
        lengths,
        out,
        num_samples,
        tiles,
        num_taps,
        x.stride(0),
        NUM_FILTERS=num_filters,
        TAPS_BLOCK=triton.next_power_of_2(num_taps),
        **tile,
    )


# --------------------------------------------------------------------------------------------------------- isd_backward


@triton.jit(do_not_specialize=["num_blocks", "words", "x_stride", "factor_stride", "grad_stride"])
def isd_backward_sums_kernel(
    grad,
    x,
    lengths,
    marks,
    seeds,
    factor,
    gains,
    dots,
    peaks,
    places,
    num_samples,
    num_blocks,
    words,
    grad_stride,
    x_stride,
    factor_stride,
    G_SD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (utterance, block): the gain 1 + g_sd * f; of v = x * gain, sum of grad * v, peak and place."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    length = _length(lengths, b, num_samples)
    mask = n < length
    wide = gains.dtype.element_ty
    gain = _isd_gain(marks, seeds, factor, b, n, length, words, factor_stride, BLOCK, G_SD, wide)
    value = tl.load(x + b * x_stride + n, mask=mask, other=0.0).to(wide) * gain
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(tl.float64)
    peak = _peak(value)
    tl.store(gains + b * num_samples + n, gain, mask=n < num_samples)
    tl.store(dots + program, tl.sum(slope * value.to(tl.float64), 0))
    tl.store(peaks + program, peak)
    tl.store(places + program, _first_place(value, peak, n))


@triton.jit(do_not_specialize=["num_blocks", "grad_stride"])
def isd_backward_kernel(
    grad,
    lengths,
    gains,
    dots,
    peaks,
    places,
    out,
    num_samples,
    num_blocks,
    grad_stride,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Through cond_norm and the gain; out may be gains."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    wide = gains.dtype.element_ty
    peak = _peak_of(peaks + b * num_blocks, num_blocks, TILE_BLOCK)
    dot = _sum_of(dots + b * num_blocks, num_blocks, TILE_BLOCK)
    place = tl.full([TILE_BLOCK], _NOWHERE, tl.int64)
    for first in range(0, num_blocks, TILE_BLOCK):
        i = first + tl.arange(0, TILE_BLOCK)
        there = i < num_blocks
        highest = tl.load(peaks + b * num_blocks + i, mask=there, other=0.0) == peak
        place = tl.minimum(place, tl.load(places + b * num_blocks + i, mask=there & highest, other=_NOWHERE))
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < _length(lengths, b, num_samples)
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(wide)
    slope, _ = _norm_backward(slope, n, dot, peak, tl.min(place, 0))
    gain = tl.load(gains + b * num_samples + n, mask=mask, other=0.0)
    tl.store(out + b * num_samples + n, (slope * gain).to(out.dtype.element_ty), mask=n < num_samples)


@backend(ops.isd_backward, why_too_long)
def isd_backward(
    grad: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    factor: Tensor | None,
    p: float,
    g_sd: float,
) -> Tensor:
    """grad, x [B, T], seeds [B] or factor [B, T] -> like x. Equivalent to `reference.isd_backward`."""
    return in_parts(_isd_backward, x, grad, lengths, seeds, factor, p, g_sd)


def _isd_backward(
    out: Tensor,
    x: Tensor,
    grad: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    factor: Tensor | None,
    p: float,
    g_sd: float,
) -> None:
    """Write what `isd_backward` returns into out [B, T]."""
    grad, x, lengths = _rows(grad), _rows(x), _dense(lengths)
    batch, num_samples = x.shape
    seeds, factor = (_dense(seeds), None) if factor is None else (None, _rows(factor))
    marks = mark(x, lengths, seeds, p)
    gains = scratch(out)
    blocks = triton.cdiv(num_samples, BLOCK)
    dots = torch.empty(batch, blocks, dtype=torch.float64, device=x.device)
    peaks = torch.empty(batch, blocks, dtype=gains.dtype, device=x.device)
    places = torch.empty(batch, blocks, dtype=torch.int64, device=x.device)
    launch(
        isd_backward_sums_kernel,
        batch * blocks,
        x.device,
        grad,
        x,
        lengths,
        marks,
        seeds,
        factor,
        gains,
        dots,
        peaks,
        places,
        num_samples,
        blocks,
        0 if marks is None else marks.shape[1],
        grad.stride(0),
        x.stride(0),
        0 if factor is None else factor.stride(0),
        G_SD=g_sd,
        BLOCK=BLOCK,
        num_warps=16,
    )
    launch(
        isd_backward_kernel,
        batch * blocks,
        x.device,
        grad,
        lengths,
        gains,
        dots,
        peaks,
        places,
        out,
        num_samples,
        blocks,
        grad.stride(0),
        TILE_BLOCK=TILE_BLOCK,
        BLOCK=BLOCK,
        num_warps=4,
    )


# --------------------------------------------------------------------------------------------------------- ssi_backward


@triton.jit(do_not_specialize=["num_blocks", "grad_stride"])
def ssi_backward_sums_kernel(grad, colored, lengths, dots, num_samples, num_blocks, grad_stride, BLOCK: tl.constexpr):
    """One program per (utterance, block): the sum of grad * v."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < _length(lengths, b, num_samples)
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(tl.float64)
    noise = tl.load(colored + b * num_samples + n, mask=mask, other=0.0).to(tl.float64)
    tl.store(dots + program, tl.sum(slope * noise, 0))


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "x_stride", "grad_stride"])
def ssi_backward_kernel(
    grad,
    x,
    dots,
    signal_squares,
    noise_squares,
    lengths,
    seeds,
    snr_db,
    out,
    num_samples,
    num_tiles,
    num_blocks,
    grad_stride,
    x_stride,
    SNR_MIN: tl.constexpr,
    SNR_MAX: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad + x * (grad . v) / (|x| |v|) * 10**(-SNR/20)."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    signal = _sum_of(signal_squares + b * num_tiles, num_tiles, TILE_BLOCK)
    noise = _sum_of(noise_squares + b * num_tiles, num_tiles, TILE_BLOCK)
    dot = _sum_of(dots + b * num_blocks, num_blocks, TILE_BLOCK)
    level = _noise_level(seeds, snr_db, b, SNR_MIN, SNR_MAX)
    sounds = (signal > 0) & (noise > 0)
    # Two roots, because the product of two small squares may vanish.
    norms = tl.where(sounds, tl.sqrt(signal) * tl.sqrt(noise), 1.0)
    toward_x = tl.where(sounds, dot / norms * level, 0.0)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < _length(lengths, b, num_samples)
    wide = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    slope = tl.load(grad + b * grad_stride + n, mask=mask, other=0.0).to(wide)
    wave = tl.load(x + b * x_stride + n, mask=mask, other=0.0).to(wide)
    value = slope + wave * toward_x.to(wide)
    tl.store(out + b * num_samples + n, value.to(out.dtype.element_ty), mask=n < num_samples)


@backend(ops.ssi_backward, why_too_long)
def ssi_backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    snr_min: float,
    snr_max: float,
) -> Tensor:
    """grad, x [B, T], filters [B, P], seeds [B] or noise [B, T] and snr_db [B] -> like x. Equivalent to
    `reference.ssi_backward`.
    """
    return in_parts(_ssi_backward, x, grad, filters, lengths, seeds, noise, snr_db, snr_min, snr_max)


def _ssi_backward(
    out: Tensor,
    x: Tensor,
    grad: Tensor,
    filters: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    snr_min: float,
    snr_max: float,
) -> None:
    """Write what `ssi_backward` returns into out [B, T]."""
    grad, x, filters, lengths = _rows(grad), _rows(x), _bank(filters[:, None], x), _dense(lengths)
    seeds = _dense(seeds) if noise is None else None
    snr_db = None if noise is None or snr_db is None else _dense(snr_db.double())
    batch, num_samples = x.shape
    colored, of_x, of_noise = color_noise(x, filters, lengths, seeds, noise, scratch(out), True)
    blocks = triton.cdiv(num_samples, BLOCK)
    dots = torch.empty(batch, blocks, dtype=torch.float64, device=x.device)
    launch(
        ssi_backward_sums_kernel,
        batch * blocks,
        x.device,
        grad,
        colored,
        lengths,
        dots,
        num_samples,
        blocks,
        grad.stride(0),
        BLOCK=BLOCK,
        num_warps=4,
    )
    launch(
        ssi_backward_kernel,
        batch * blocks,
        x.device,
        grad,
        x,
        dots,
        of_x,
        of_noise,
        lengths,
        seeds,
        snr_db,
        out,
        num_samples,
        of_noise.shape[1],
        blocks,
        grad.stride(0),
        x.stride(0),
        SNR_MIN=snr_min,
        SNR_MAX=snr_max,
        TILE_BLOCK=TILE_BLOCK,
        BLOCK=BLOCK,
        num_warps=4,
    )
