"""RawBoost in Triton: notch_bank, notch_filters, lnl, isd, ssi and rawboost, the chain of the three.

Equivalent to these functions of gradalign/reference.py. B utterances of T samples, N_f filters of N_b bands and P taps.
What depends on a whole utterance (a mean, a peak, a norm) cuts the chain into passes over the samples: the filters
(`lnl_kernel`, `ssi_kernel`), the impulses (`isd_kernel`, which also takes LnL's mean and norm on the way), and what is
left (`rawboost_finish_kernel`). A pass stores what its tiles or blocks know about their utterance, and the next one
adds that up, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradalign import ops, reference
from gradalign.kernels import backend, launch

_STREAM_NOTCH = tl.constexpr(reference.STREAM_NOTCH)
_STREAM_ISD_BETA = tl.constexpr(reference.STREAM_ISD_BETA)
_STREAM_ISD_KEYS = tl.constexpr(reference.STREAM_ISD_KEYS)
_STREAM_ISD_FACTOR = tl.constexpr(reference.STREAM_ISD_FACTOR)
_STREAM_SSI_NOISE = tl.constexpr(reference.STREAM_SSI_NOISE)
_STREAM_SSI_SNR = tl.constexpr(reference.STREAM_SSI_SNR)
_PI = tl.constexpr(math.pi)
_TWO_PI = tl.constexpr(2 * math.pi)
# 10**(v/20) = 2**(v * _LOG2_PER_DB)
_LOG2_PER_DB = tl.constexpr(math.log2(10) / 20)
# The peak of a bank's response is taken on the frequencies k*pi/512, k = 0..511.
_RESPONSE_POINTS = tl.constexpr(512)

# Samples of one elementwise program.
BLOCK = 2048
# Tiles added at a time by the finishing kernels.
TILE_BLOCK = 64
# Integers that vary from batch to batch are not specialised (`do_not_specialize`): being 1 or a multiple of 16 would
# compile a kernel once more.


# -------------------------------------------------------------------------------------------------------------- numbers


@triton.jit
def _philox(seed, stream, index, filter_id):
    """Four uint32 words for (seed int64, stream, index < 2**32, filter). Equivalent to `reference.philox`."""
    c0 = index.to(tl.uint32)
    c1 = c0 ^ c0
    c2 = c1 + filter_id
    c3 = c1 + stream
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _uniform(word, low, high):
    """float64 in the open interval (low, high)."""
    return low + (high - low) * ((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10)


@triton.jit
def _sincos_turns(turns):
    """sin and cos of 2 pi turns, float64, to 2e-16: the Taylor series of the quarter turn nearest to it.

    The library's functions keep a slow path for huge arguments, whose table lies in local memory.
    """
    rest = turns - tl.floor(turns + 0.5)
    quarter = tl.floor(rest * 4 + 0.5)
    a = (rest - quarter * 0.25) * _TWO_PI
    q = quarter.to(tl.int32)
    a2 = a * a
    s = -7.6471637318198164759e-13 + a2 * 2.8114572543455207632e-15
    s = 1.6059043836821614599e-10 + a2 * s
    s = -2.5052108385441718775e-08 + a2 * s
    s = 2.7557319223985890653e-06 + a2 * s
    s = -1.9841269841269841270e-04 + a2 * s
    s = 8.3333333333333333333e-03 + a2 * s
    s = -1.6666666666666666667e-01 + a2 * s
    s = a + a * (a2 * s)
    c = -1.1470745597729724714e-11 + a2 * 4.7794773323873852974e-14
    c = 2.0876756987868098979e-09 + a2 * c
    c = -2.7557319223985890653e-07 + a2 * c
    c = 2.4801587301587301587e-05 + a2 * c
    c = -1.3888888888888888889e-03 + a2 * c
    c = 4.1666666666666666667e-02 + a2 * c
    c = 1.0 + a2 * (-0.5 + a2 * c)
    odd = (q & 1) != 0
    sine = tl.where((q & 2) != 0, -1.0, 1.0) * tl.where(odd, c, s)
    cosine = tl.where(((q + 1) & 2) != 0, -1.0, 1.0) * tl.where(odd, s, c)
    return sine, cosine


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two independent N(0, 1) numbers, float32, from 24-bit fractions, which float32 holds exactly."""
    square = -2.0 * tl.log(((radius_word >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08)
    # A logarithm's last bit may make the square of the smallest radius negative.
    radius = tl.sqrt(tl.maximum(square, 0.0))
    turns = (angle_word >> 8).to(tl.float32) * 5.9604644775390625e-08
    quarter = tl.floor(turns * 4.0 + 0.5)
    a = (turns - quarter * 0.25) * _TWO_PI
    q = quarter.to(tl.int32)
    a2 = a * a
    s = a * (1.0 + a2 * (-1.66666667e-1 + a2 * (8.33333333e-3 + a2 * (-1.98412698e-4 + a2 * 2.75573192e-6))))
    c = 1.0 + a2 * (-0.5 + a2 * (4.16666667e-2 + a2 * (-1.38888889e-3 + a2 * (2.48015873e-5 + a2 * -2.75573192e-7))))
    odd = (q & 1) != 0
    sine = tl.where((q & 2) != 0, -radius, radius) * tl.where(odd, c, s)
    cosine = tl.where(((q + 1) & 2) != 0, -radius, radius) * tl.where(odd, s, c)
    return cosine, sine


@triton.jit
def _mix(v):
    """MurmurHash3's 32-bit finalizer."""
    v = (v ^ (v >> 16)) * 0x85EBCA6B
    v = (v ^ (v >> 13)) * 0xC2B2AE35
    return v ^ (v >> 16)


@triton.jit
def _unpermute_once(value, keys, low_bits, low_mask, high_mask):
    """The inverse of one pass of Feistel rounds over uint32 values; ``keys`` is a tuple of 8 uint32."""
    low = value & low_mask
    high = value >> low_bits
    for r in tl.static_range(0, 8, 2):
        high ^= _mix(low + keys[7 - r]) & high_mask
        low ^= _mix(high + keys[6 - r]) & low_mask
    return (high << low_bits) | low


@triton.jit
def _positions(seed, rank, count, size):
    """The position of each rank below ``count``, uint32; further ranks get any. ``count`` and ``size`` are int32.

    The inverse of `reference.bijection`, which gives each position its rank: so only chosen positions are visited.
    """
    zero = tl.zeros([1], tl.uint32)
    k0, k1, k2, k3 = _philox(seed, _STREAM_ISD_KEYS, zero, 0)
    k4, k5, k6, k7 = _philox(seed, _STREAM_ISD_KEYS, zero + 1, 0)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7)
    bits = zero + 4
    for i in tl.static_range(4, 31):
        bits += ((zero + (1 << i)) < size).to(tl.uint32)
    low_bits = bits // 2
    low_mask = ((zero + 1) << low_bits) - 1
    high_mask = ((zero + 1) << (bits - low_bits)) - 1
    bound = zero + size.to(tl.uint32)
    inside = rank < count
    value = _unpermute_once(rank.to(tl.uint32), keys, low_bits, low_mask, high_mask)
    # A cycle leaves the outsiders at the latest after all of them, so the walk ends.
    walking = inside & (value >= bound)
    while tl.max(walking.to(tl.int32), 0) > 0:
        value = tl.where(walking, _unpermute_once(value, keys, low_bits, low_mask, high_mask), value)
        walking = inside & (value >= bound)
    return value


@triton.jit
def _length(lengths, b, num_samples):
    """The utterance's own length, int32; every sample's mask is made of it."""
    if lengths is None:
        length = tl.zeros([], tl.int32) + num_samples
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), num_samples).to(tl.int32)
    return length


# ---------------------------------------------------------------------------------------------------------- notch banks


@triton.jit
def _band(
    center_hz,
    width_hz,
    taps,
    seeds,
    row,
    band,
    num_bands,
    most_reach,
    FILTERS: tl.constexpr,
    RANGES: tl.constexpr,
    SAMPLE_RATE: tl.constexpr,
):
    """Edges of a band as fractions of the Nyquist frequency, float64 [1], and how far its taps reach, int32: given, or
    drawn from the utterance's seed.

    The ranges are compile-time constants, because a run-time float would be a float32.
    """
    if seeds is None:
        center = tl.zeros([1], tl.float64) + tl.load(center_hz + row * num_bands + band)
        width = tl.load(width_hz + row * num_bands + band)
        count = tl.zeros([1], tl.int64) + tl.load(taps + row * num_bands + band)
    else:
        number = _of_filter(row, FILTERS, tl.uint32)
        seed = tl.load(seeds + row // len(FILTERS))
        words = _philox(seed, _STREAM_NOTCH, (tl.zeros([1], tl.int32) + band).to(tl.uint32), number)
        center = _uniform(words[0], RANGES[0], RANGES[1])
        width = _uniform(words[1], RANGES[2], RANGES[3])
        count = tl.floor(_uniform(words[2], RANGES[4], RANGES[5])).to(tl.int64)
        count += (count % 2 == 0).to(tl.int64)
    low = center - width / 2
    high = center + width / 2
    left = tl.where(low <= 0, 0.001, low) * (2 / SAMPLE_RATE)
    right = tl.where(high >= SAMPLE_RATE / 2, SAMPLE_RATE / 2 - 0.001, high) * (2 / SAMPLE_RATE)
    # No tap beyond the row, whatever the counts say.
    reach = tl.max(tl.minimum(tl.maximum((count - 1) // 2, 0), most_reach), 0).to(tl.int32)
    return left, right, reach


@triton.jit
def _of_filter(row, VALUES: tl.constexpr, dtype: tl.constexpr):
    """The value of the row's filter, [1]."""
    value = tl.zeros([1], dtype)
    f = row % len(VALUES)
    for j in tl.static_range(len(VALUES)):
        value = tl.where(f == j, VALUES[j], value)
    return value


@triton.jit(do_not_specialize=["num_bands", "num_taps", "most_reach"])
def notch_bank_kernel(
    center_hz,
    width_hz,
    taps,
    gain_db,
    seeds,
    scratch,
    filters,
    num_bands,
    num_taps,
    most_reach,
    FILTERS: tl.constexpr,
    MIN_GAIN_DB: tl.constexpr,
    MAX_GAIN_DB: tl.constexpr,
    RANGES: tl.constexpr,
    SAMPLE_RATE: tl.constexpr,
    REACH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per bank: center_hz, width_hz, taps [B*N_f, N_b] and gain_db [B*N_f], or seeds [B] -> filters
    [B*N_f, P].

    ``scratch`` [B*N_f, N_b * REACH_BLOCK + 2 * P] float64 holds the bands' half taps, then two buffers for the
    convolution; the program alone uses its row, and a barrier stands between each write and the reads by other threads.
    """
    i = tl.program_id(0).to(tl.int64)
    half_taps = scratch + i * (num_bands * REACH_BLOCK + 2 * num_taps)
    buffers = half_taps + num_bands * REACH_BLOCK
    middle = num_taps // 2
    m = tl.arange(0, REACH_BLOCK)
    for band in range(num_bands):
        left, right, reach = _band(
            center_hz, width_hz, taps, seeds, i, band, num_bands, most_reach, FILTERS, RANGES, SAMPLE_RATE
        )
        wide_m = m.to(tl.float64)
        sin_left, _ = _sincos_turns(left * wide_m / 2)
        sin_right, _ = _sincos_turns(right * wide_m / 2)
        _, window = _sincos_turns(wide_m / (2 * tl.maximum(reach, 1)))
        ideal = tl.where(m == 0, left + 1 - right, (sin_left - sin_right) / (_PI * tl.maximum(wide_m, 1.0)))
        tap = tl.where(m <= reach, ideal * (0.54 + 0.46 * window), 0.0)
        tap /= tl.sum(tl.where(m == 0, tap, 2 * tap), 0)
        tl.store(half_taps + band * REACH_BLOCK + m, tap)
    tl.debug_barrier()

    # |H| is the product of the bands' amplitude responses, each a cosine sum by Clenshaw's recurrence. The same loop
    # convolves the bands.
    k = tl.arange(0, _RESPONSE_POINTS)
    _, cosine = _sincos_turns(k.to(tl.float64) / (2 * _RESPONSE_POINTS))
    twice = 2 * cosine
    response = tl.full([_RESPONSE_POINTS], 1.0, tl.float64)
    for band in range(num_bands):
        left, right, reach = _band(
            center_hz, width_hz, taps, seeds, i, band, num_bands, most_reach, FILTERS, RANGES, SAMPLE_RATE
        )
        band_taps = half_taps + band * REACH_BLOCK
        last = tl.zeros([_RESPONSE_POINTS], tl.float64)
        before = tl.zeros([_RESPONSE_POINTS], tl.float64)
        for step in range(reach):
            current = tl.load(band_taps + reach - step) + (twice * last - before)
            before = last
            last = current
        response *= tl.load(band_taps) + 2 * (cosine * last - before)
        source = buffers + (band % 2) * num_taps
        target = buffers + ((band + 1) % 2) * num_taps
        for first in range(0, num_taps, BLOCK):
            n = first + tl.arange(0, BLOCK)
            inside = n < num_taps
            if band == 0:
                distance = tl.abs(n - middle)
                total = tl.load(band_taps + distance, mask=distance <= reach, other=0.0)
            else:
                total = tl.load(band_taps) * tl.load(source + n, mask=inside, other=0.0)
                for d in range(1, reach + 1):
                    before_n = tl.load(source + n - d, mask=inside & (n >= d), other=0.0)
                    after_n = tl.load(source + n + d, mask=n + d < num_taps, other=0.0)
                    total += tl.load(band_taps + d) * (before_n + after_n)
            tl.store(target + n, total, mask=inside)
        tl.debug_barrier()

    if seeds is None:
        gain = tl.zeros([1], tl.float64) + tl.load(gain_db + i)
    else:
        word = _philox(
            tl.load(seeds + i // len(FILTERS)),
            _STREAM_NOTCH,
            tl.zeros([1], tl.uint32),
            _of_filter(i, FILTERS, tl.uint32),
        )[3]
        low = _of_filter(i, MIN_GAIN_DB, tl.float64)
        gain = _uniform(word, 0.0, 1.0) * (_of_filter(i, MAX_GAIN_DB, tl.float64) - low) + low
    scale = tl.exp2(gain * _LOG2_PER_DB) / tl.max(tl.abs(response), 0)
    for first in range(0, num_taps, BLOCK):
        n = first + tl.arange(0, BLOCK)
        bank = scale * tl.load(buffers + (num_bands % 2) * num_taps + n, mask=n < num_taps, other=0.0)
        tl.store(filters + i * num_taps + n, bank.to(filters.dtype.element_ty), mask=n < num_taps)


def _why_no_design(*args: Any) -> str:
    return "" if args[-1] in (torch.float32, torch.float64) else f"designs float32 and float64, found {args[-1]}"


def _design(
    filters: Tensor,
    num_bands: int,
    sample_rate: float,
    notches: tuple[Tensor | None, ...],
    seeds: Tensor | None,
    numbers: Sequence[int] = (),
    min_gain_db: Sequence[float] = (),
    max_gain_db: Sequence[float] = (),
    ranges: Sequence[float] = (),
) -> Tensor:
    """Design filters [B, N_f, P] from the notches given, or drawn from seeds."""
    num_taps = filters.shape[-1]
    num_banks = filters.shape[0] * filters.shape[1]
    most_reach = (num_taps - 1) // (2 * num_bands)
    reach_block = triton.next_power_of_2(most_reach + 1)
    scratch = filters.new_empty(num_banks, num_bands * reach_block + 2 * num_taps, dtype=torch.float64)
    launch(
        notch_bank_kernel,
        num_banks,
        filters.device,
        *notches,
        seeds,
        scratch,
        filters,
        num_bands,
        num_taps,
        most_reach,
        FILTERS=tuple(numbers),
        MIN_GAIN_DB=tuple(min_gain_db),
        MAX_GAIN_DB=tuple(max_gain_db),
        RANGES=tuple(ranges),
        SAMPLE_RATE=sample_rate,
        REACH_BLOCK=reach_block,
        BLOCK=512,
        num_warps=4,
    )
    return filters


@backend(ops.notch_bank, _why_no_design)
def notch_bank(
    center_hz: Tensor,
    width_hz: Tensor,
    taps: Tensor,
    gain_db: Tensor,
    sample_rate: float,
    num_taps: int,
    dtype: torch.dtype,
) -> Tensor:
    """center_hz, width_hz, taps [B, N_f, N_b], gain_db [B, N_f] -> [B, N_f, P]. Equivalent to
    `reference.notch_bank`.
    """
    filters = center_hz.new_empty(*center_hz.shape[:-1], num_taps, dtype=dtype)
    if center_hz.numel() == 0:
        return filters.zero_()
    notches = (center_hz.double().contiguous(), width_hz.double().contiguous(), taps.contiguous())
    return _design(filters, center_hz.shape[-1], sample_rate, (*notches, gain_db.double().contiguous()), None)


@backend(ops.notch_filters, _why_no_design)
def notch_filters(
    seeds: Tensor,
    filters: Sequence[int],
    min_gain_db: Sequence[float],
    max_gain_db: Sequence[float],
    num_bands: int,
    min_center_hz: float,
    max_center_hz: float,
    min_width_hz: float,
    max_width_hz: float,
    min_taps: float,
    max_taps: float,
    sample_rate: float,
    num_taps: int,
    dtype: torch.dtype,
) -> Tensor:
    """seeds [B] -> [B, N_f, P]. Equivalent to `reference.notch_filters`."""
    out = seeds.new_empty(seeds.shape[0], len(filters), num_taps, dtype=dtype)
    ranges = (min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps)
    drawn = (seeds.contiguous(), filters, min_gain_db, max_gain_db, ranges)
    return _design(out, num_bands, sample_rate, (None,) * 4, *drawn)


# ---------------------------------------------------------------------------------------------------------- the filters


@triton.jit
def _reach(filters, num_taps, NUM_FILTERS: tl.constexpr, TAPS_BLOCK: tl.constexpr):
    """The farthest tap of filters [N_f, P] from the middle that is not 0: zeros around short filters cost nothing."""
    k = tl.arange(0, TAPS_BLOCK)
    used = tl.zeros([TAPS_BLOCK], tl.int32)
    for i in tl.static_range(NUM_FILTERS):
        used |= (tl.load(filters + i * num_taps + k, mask=k < num_taps, other=0.0) != 0).to(tl.int32)
    return tl.max(tl.where(used != 0, tl.abs(k - num_taps // 2), 0), 0)


@triton.jit
def _fir(
    row,
    filters,
    first,
    length,
    num_taps,
    reach,
    NUM_FILTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """z[n] = sum over d = -reach..reach of p_d(x[n + 1 - d]) for the BLOCK outputs n from ``first``.

    x is zero outside [0, length). p_d(x) = sum over i of b_i[middle + d] * x**(i + 1) by Horner's rule: N_f
    multiply-adds a sample and tap for all branches, and no power is ever stored. The 1 is the published advance over
    the group delay.
    """
    WIDE: tl.constexpr = filters.dtype.element_ty
    offset = tl.arange(0, BLOCK)
    tap = filters + num_taps // 2
    z = tl.zeros([BLOCK], WIDE)
    for d in range(-reach, reach + 1):
        # A scalar start plus constant offsets: the loads then share one address register.
        start = first + 1 - d
        if MASKED:
            # Positions before the row are huge when unsigned: one comparison for both ends.
            mask = (start + offset).to(tl.uint32) < length.to(tl.uint32)
            x = tl.load(row + start + offset, mask=mask, other=0.0).to(WIDE)
        else:
            x = tl.load(row + start + offset).to(WIDE)
        p = x * tl.load(tap + (NUM_FILTERS - 1) * num_taps + d)
        for i in tl.static_range(NUM_FILTERS - 1):
            p = (p + tl.load(tap + (NUM_FILTERS - 2 - i) * num_taps + d)) * x
        z += p
    return z


@triton.jit
def _toeplitz(
    row,
    filters,
    first,
    length,
    num_taps,
    reach,
    NUM_FILTERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`_fir` on tensor cores: ROWS windows of x, each COLUMNS further, times the filters' Toeplitz matrices.

    z[r, c] = sum over i, k of x[first + 1 - reach + COLUMNS * r + k]**(i + 1) * b_i[middle + c + reach - k].
    tf32x3 splits each factor in two parts of 11 bits and leaves out the product of the small ones: about float32.
    """
    middle = num_taps // 2
    start = first + 1 - reach
    place = COLUMNS * tl.arange(0, ROWS)[:, None] + tl.arange(0, DEPTH)[None, :]
    tap = tl.arange(0, COLUMNS)[None, :] - tl.arange(0, DEPTH)[:, None]
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, 2 * reach + COLUMNS, DEPTH):
        # Positions before the row are huge when unsigned: one comparison for both ends.
        mask = (start + k + place).to(tl.uint32) < length.to(tl.uint32)
        x = tl.load(row + (start + k) + place, mask=mask, other=0.0).to(tl.float32)
        d = tap + (reach - k)
        inside = tl.abs(d) <= reach
        power = x
        # Tensor cores round their sums towards zero, so that long chains drift: each stretch gets its own.
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(NUM_FILTERS):
            b = tl.load(filters + (i * num_taps + middle + d), mask=inside, other=0.0)
            part = tl.dot(power, b, part, input_precision="tf32x3")
            power *= x
        z += part
    return z


@triton.jit
def _fir_tile(
    row,
    filters,
    first,
    length,
    num_taps,
    NUM_FILTERS: tl.constexpr,
    TAPS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The BLOCK outputs from ``first``: on tensor cores in rows of COLUMNS, where that is 0 with multiply-adds."""
    reach = _reach(filters, num_taps, NUM_FILTERS, TAPS_BLOCK)
    z = tl.zeros([BLOCK], filters.dtype.element_ty)
    # Nothing to do beyond the utterance, and no masks where the whole window lies inside it.
    if first < length:
        if COLUMNS:
            product = _toeplitz(
                row, filters, first, length, num_taps, reach, NUM_FILTERS, BLOCK // COLUMNS, COLUMNS, DEPTH
            )
            z = tl.reshape(product, [BLOCK])
        elif (first >= reach) & (first + BLOCK + reach < length):
            z = _fir(row, filters, first, length, num_taps, reach, NUM_FILTERS, BLOCK, False)
        else:
            z = _fir(row, filters, first, length, num_taps, reach, NUM_FILTERS, BLOCK, True)
    return z


@triton.jit
def _sum_of(partials, count, BLOCK: tl.constexpr):
    """Sum of float64 partials [count], always in the same order."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _max_of(partials, count, BLOCK: tl.constexpr):
    """Maximum of partials [count], -inf where there is none."""
    largest = tl.full([BLOCK], float("-inf"), partials.dtype.element_ty)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(partials + i, mask=i < count, other=float("-inf")))
    return tl.max(largest, 0)


@triton.jit
def _bits(values):
    """|values| as whole numbers in the same order, behind them NaN, which a GPU's maximum of numbers leaves out."""
    if values.dtype == tl.float64:
        bits = tl.abs(values).to(tl.int64, bitcast=True)
    else:
        bits = tl.abs(values).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _peak(values):
    """The largest magnitude, and NaN where there is one."""
    return tl.max(_bits(values), 0).to(values.dtype, bitcast=True)


@triton.jit
def _peak_of(peaks, count, BLOCK: tl.constexpr):
    """`_peak` of peaks [count], 0 where there is none."""
    largest = _bits(tl.zeros([BLOCK], peaks.dtype.element_ty))
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, _bits(tl.load(peaks + i, mask=i < count, other=0.0)))
    return tl.max(largest, 0).to(peaks.dtype.element_ty, bitcast=True)


@triton.jit
def _level(sums, largest, smallest, b, length, num_tiles, WIDE: tl.constexpr, TILE_BLOCK: tl.constexpr):
    """The mean of z and the largest magnitude of z - mean, from what `lnl_kernel` left."""
    mean = (_sum_of(sums + b * num_tiles, num_tiles, TILE_BLOCK) / tl.maximum(length, 1)).to(WIDE)
    above = _max_of(largest + b * num_tiles, num_tiles, TILE_BLOCK) - mean
    below = _max_of(smallest + b * num_tiles, num_tiles, TILE_BLOCK) + mean
    return mean, tl.maximum(above, below)


@triton.jit
def _noise_level(seeds, snr_db, b, SNR_MIN: tl.constexpr, SNR_MAX: tl.constexpr):
    """10**(-SNR/20), float64 [1], the signal-to-noise ratio given [B] or drawn from the seeds [B]."""
    if snr_db is None:
        level = _uniform(_philox(tl.load(seeds + b), _STREAM_SSI_SNR, tl.zeros([1], tl.uint32), 0)[0], SNR_MIN, SNR_MAX)
    else:
        level = tl.zeros([1], tl.float64) + tl.load(snr_db + b)
    return tl.exp2(-level * _LOG2_PER_DB)


# -------------------------------------------------------------------------------------------- what the launchers share


def _wide(x: Tensor) -> torch.dtype:
    """The dtype that x is computed in: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """x [B, T] with adjacent samples; rows may keep any distance."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def in_parts(run: Callable[..., None], x: Tensor, *args: Any) -> Tensor:
    """The result of run(out, x, *args), like x [B, T]; tensors among the arguments have a row for each utterance.

    In half precision samples and noise in the dtype of computation are four times x's memory. So there a third of the
    utterances takes its turn at a time.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch = x.shape[0]
    size = max(1, triton.cdiv(batch, 3) if x.element_size() == 2 else batch)
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        run(out[rows], x[rows], *(arg[rows] if isinstance(arg, Tensor) else arg for arg in args))
    return out


def scratch(out: Tensor) -> Tensor:
    """A place for unfinished samples [B, T] in the dtype of computation: the result's where that is its dtype."""
    return out if out.dtype == _wide(out) else torch.empty(out.shape, dtype=_wide(out), device=out.device)


def _tile(x: Tensor, num_filters: int) -> dict[str, int]:
    """How the filter kernels cut x into tiles.

    Tensor cores take 0.2 ms for each filter of 64 x 64600 samples on an H200, multiply-adds, 8 outputs per thread, 0.64
    ms for five, whose powers they share. These also serve float64, and devices whose tensor cores do not take tf32.
    """
    has_tf32 = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    if num_filters > 3 or x.dtype == torch.float64 or not has_tf32:
        return {"BLOCK": 1024, "COLUMNS": 0, "DEPTH": 0, "num_warps": 4}
    # Programs share a multiprocessor (77 registers on sm_90, 175 of the gradient's): one multiplies, another splits.
    return {"BLOCK": 2048, "COLUMNS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 2}


def why_too_long(x: Tensor, *_: Any) -> str:
    """Return why waveforms [B, T] are not taken, empty when they are: positions in a row are int32."""
    return f"takes utterances under 2**31 samples, found {x.shape[1]}" if x.shape[1] >= 2**31 - 2**16 else ""


# ------------------------------------------------------------------------------------------------------------------ lnl


@triton.jit(do_not_specialize=["num_tiles", "num_taps", "filters_stride"])
def lnl_kernel(
    x,
    filters,
    lengths,
    z,
    sums,
    largest,
    smallest,
    num_samples,
    num_tiles,
    num_taps,
    x_stride,
    filters_stride,
    NUM_FILTERS: tl.constexpr,
    TAPS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per (utterance, tile): z = sum over i of FIR_i(x**i), and the tile's sum and extrema.

    x [B, T], filters [B, N_f, P] -> z [B, T], sums, largest, smallest [B, tiles]; smallest holds max(-z).
    """
    program = tl.program_id(0)
    b = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles) * BLOCK
    length = _length(lengths, b, num_samples)
    value = _fir_tile(
        x + b * x_stride,
        filters + b * filters_stride,
        first,
        length,
        num_taps,
        NUM_FILTERS,
        TAPS_BLOCK,
        BLOCK,
        COLUMNS,
        DEPTH,
    )
    n = first + tl.arange(0, BLOCK)
    mask = n < length
    tl.store(z + b * num_samples + n, value, mask=mask)
    tl.store(sums + program, tl.sum(tl.where(mask, value, 0.0).to(tl.float64), 0))
    tl.store(largest + program, tl.max(tl.where(mask, value, float("-inf")), 0))
    tl.store(smallest + program, tl.max(tl.where(mask, -value, float("-inf")), 0))


def filter_powers(
    x: Tensor, filters: Tensor, num_filters: int, lengths: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the sum of the powers of x, filtered by the first num_filters of [B, F, P], into z [B, T]; returns its
    tiles' sums and extrema of `lnl_kernel`.
    """
    (batch, num_samples), num_taps = x.shape, filters.shape[-1]
    tile = _tile(x, num_filters)
    tiles = triton.cdiv(num_samples, tile["BLOCK"])
    sums = torch.empty(batch, tiles, dtype=torch.float64, device=x.device)
    extrema = torch.empty(2, batch, tiles, dtype=z.dtype, device=x.device)
    launch(
        lnl_kernel,
        batch * tiles,
        x.device,
        x,
        filters,
        lengths,
        z,
        sums,
        extrema[0],
        extrema[1],
        num_samples,
        tiles,
        num_taps,
        x.stride(0),
        filters.stride(0),
        NUM_FILTERS=num_filters,
        TAPS_BLOCK=triton.next_power_of_2(num_taps),
        **tile,
    )
    return sums, extrema


def _bank(filters: Tensor, x: Tensor) -> Tensor:
    """Filters [B, N_f, P] in x's dtype of computation, each utterance's N_f*P taps adjacent, P odd."""
    filters = filters.to(_wide(x))
    if filters.shape[-1] % 2 == 0:
        # The kernels count taps from the middle. With a zero before them, the same filter has one.
        filters = torch.nn.functional.pad(filters, (1, 0))
    dense = filters.stride(-1) == 1 and filters.stride(-2) == filters.shape[-1]
    return filters if dense else filters.contiguous()


# ------------------------------------------------------------------------------------------------------------------ isd


@triton.jit(do_not_specialize=["num_blocks", "words"])
def isd_mark_kernel(seeds, lengths, marks, num_samples, num_blocks, words, P: tl.constexpr, BLOCK: tl.constexpr):
    """One program per (utterance, block of ranks): a bit in marks int32 [B, words] at each chosen rank's position."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    first = (program % num_blocks) * BLOCK
    length = _length(lengths, b, num_samples)
    seed = tl.load(seeds + b)
    beta = _uniform(_philox(seed, _STREAM_ISD_BETA, tl.zeros([1], tl.uint32), 0)[0], 0.0, P)
    count = tl.max(tl.floor(length.to(tl.float64) * (beta / 100)), 0).to(tl.int32)
    if first < count:
        rank = first + tl.arange(0, BLOCK)
        n = _positions(seed, rank, count, length)
        bit = (tl.full([BLOCK], 1, tl.uint32) << (n % 32)).to(tl.int32, bitcast=True)
        tl.atomic_or(marks + b * words + (n // 32).to(tl.int32), bit, mask=rank < count)


def mark(x: Tensor, lengths: Tensor | None, seeds: Tensor | None, p: float) -> Tensor | None:
    """The positions of the impulses that are drawn from seeds: one bit per sample, int32 [B, ceil(T / 32)]."""
    if seeds is None:
        return None
    batch, num_samples = x.shape
    words = triton.cdiv(num_samples, 32)
    marks = torch.zeros(batch, words, dtype=torch.int32, device=x.device)
    blocks = triton.cdiv(int(num_samples * (p / 100)), BLOCK)
    launch(
        isd_mark_kernel,
        batch * blocks,
        x.device,
        seeds,
        lengths,
        marks,
        num_samples,
        blocks,
        words,
        P=p,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return marks


@triton.jit
def _isd_gain(
    marks,
    seeds,
    factor,
    b,
    n,
    length,
    words,
    factor_stride,
    BLOCK: tl.constexpr,
    G_SD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """1 + g_sd * f at the positions n of utterance b: f given, drawn where it is marked, or 0; 1 beyond its length."""
    mask = n < length
    if marks is not None:
        word = tl.load(marks + b * words + n // 32, mask=mask, other=0)
        word1, word2, _, _ = _philox(tl.load(seeds + b), _STREAM_ISD_FACTOR, n, 0)
        u1 = (word1 >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0
        u2 = (word2 >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0
        f = tl.where(((word >> (n % 32)) & 1) != 0, u1 * u2, 0.0)
    elif factor is not None:
        f = tl.load(factor + b * factor_stride + n, mask=mask, other=0.0)
    else:
        f = tl.zeros([BLOCK], WIDE)
    return 1 + G_SD * f.to(WIDE)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "words", "source_stride", "factor_stride"])
def isd_kernel(
    source,
    sums,
    largest,
    smallest,
    marks,
    seeds,
    factor,
    addend,
    lengths,
    y,
    peaks,
    squares,
    num_samples,
    num_tiles,
    num_blocks,
    words,
    source_stride,
    factor_stride,
    G_SD: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (utterance, block): y = v * (1 + g_sd * f) + addend, where v is the source or, where sums are
    there, cond_norm(source - mean); the block's peak and, where asked for, its sum of squares.

    source, addend [B, T], sums, largest, smallest [B, tiles], marks [B, words] or factor [B, T] -> y [B, T], peaks,
    squares [B, blocks]. Source and addend may be y.
    """
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    length = _length(lengths, b, num_samples)
    mask = n < length
    wide = peaks.dtype.element_ty
    value = tl.load(source + b * source_stride + n, mask=mask, other=0.0).to(wide)
    if sums is not None:
        mean, peak = _level(sums, largest, smallest, b, length, num_tiles, wide, TILE_BLOCK)
        value = tl.where(mask, (value - mean) / tl.where(peak > 1, peak, 1.0), 0.0)
    if (marks is not None) or (factor is not None):
        value *= _isd_gain(marks, seeds, factor, b, n, length, words, factor_stride, BLOCK, G_SD, wide)
    if addend is not None:
        value += tl.load(addend + b * num_samples + n, mask=mask, other=0.0).to(wide)
    tl.store(y + b * num_samples + n, value.to(y.dtype.element_ty), mask=mask)
    tl.store(peaks + program, _peak(value))
    if squares is not None:
        square = value.to(tl.float64)
        tl.store(squares + program, tl.sum(square * square, 0))


# ------------------------------------------------------------------------------------------------------------------ ssi


@triton.jit(do_not_specialize=["num_blocks", "noise_stride"])
def ssi_noise_kernel(seeds, noise, num_samples, num_blocks, noise_stride, BLOCK: tl.constexpr):
    """White noise, one program per (utterance, block): seeds [B] -> noise [B, T]. Equivalent to `reference.ssi_noise`.

    It is stored, because Triton cannot index what a program has made: a filter tile would have to draw each sample
    once for every tap.
    """
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    first = (program % num_blocks) * BLOCK
    word0, word1, word2, word3 = _philox(
        tl.load(seeds + b), _STREAM_SSI_NOISE, first // 4 + tl.arange(0, BLOCK // 4), 0
    )
    s0, s1 = _box_muller(word0, word1)
    s2, s3 = _box_muller(word2, word3)
    sample = tl.interleave(tl.interleave(s0, s2), tl.interleave(s1, s3))
    n = first + tl.arange(0, BLOCK)
    tl.store(noise + b * noise_stride + n, sample, mask=n < num_samples)


@triton.jit(do_not_specialize=["num_tiles", "num_taps", "filters_stride"])
def ssi_kernel(
    x,
    noise,
    filters,
    lengths,
    colored,
    signal_squares,
    noise_squares,
    num_samples,
    num_tiles,
    num_taps,
    x_stride,
    noise_stride,
    filters_stride,
    TAPS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per (utterance, tile): v = FIR(noise), and the tile's sums of squares of x and v.

    x, noise [B, T], filters [B, P] -> colored [B, T], signal_squares (where asked for), noise_squares [B, tiles]. The
    squares are float64: those of samples below 1e-23 would vanish in float32.
    """
    program = tl.program_id(0)
    b = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles) * BLOCK
    length = _length(lengths, b, num_samples)
    row = noise + b * noise_stride
    value = _fir_tile(row, filters + b * filters_stride, first, length, num_taps, 1, TAPS_BLOCK, BLOCK, COLUMNS, DEPTH)
    n = first + tl.arange(0, BLOCK)
    mask = n < length
    tl.store(colored + b * num_samples + n, value, mask=mask)
    value = tl.where(mask, value, 0.0).to(tl.float64)
    tl.store(noise_squares + program, tl.sum(value * value, 0))
    if signal_squares is not None:
        wave = tl.load(x + b * x_stride + n, mask=mask, other=0.0).to(tl.float64)
        tl.store(signal_squares + program, tl.sum(wave * wave, 0))


def color_noise(
    x: Tensor,
    filters: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    room: Tensor,
    signal: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The noise, filtered by the last of [B, F, P], [B, T]; the tiles' sums of squares of x (where ``signal`` asks for
    them) and of it, [B, tiles].

    The noise [B, T] is drawn from seeds [B] where it is not given, into ``room`` [B, T], which is free again after it.
    """
    batch, num_samples = x.shape
    last = filters[:, -1]
    if noise is None:
        noise = room.view(torch.float32)[:, :num_samples]
        blocks = triton.cdiv(num_samples, BLOCK)
        launch(
            ssi_noise_kernel,
            batch * blocks,
            x.device,
            seeds,
            noise,
            num_samples,
            blocks,
            noise.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
        )
    noise = _rows(noise)
    colored = torch.empty_like(room)
    tile = _tile(x, 1)
    tiles = triton.cdiv(num_samples, tile["BLOCK"])
    of_x, of_noise = torch.empty(2, batch, tiles, dtype=torch.float64, device=x.device)
    launch(
        ssi_kernel,
        batch * tiles,
        x.device,
        x,
        noise,
        last,
        lengths,
        colored,
        of_x if signal else None,
        of_noise,
        num_samples,
        tiles,
        last.shape[-1],
        x.stride(0),
        noise.stride(0),
        last.stride(0),
        TAPS_BLOCK=triton.next_power_of_2(last.shape[-1]),
        **tile,
    )
    return colored, of_x if signal else None, of_noise


# ------------------------------------------------------------------------------------------------------------ the chain


@triton.jit(do_not_specialize=["num_tiles", "signal_tiles", "noise_tiles", "num_blocks", "source_stride"])
def rawboost_finish_kernel(
    source,
    sums,
    largest,
    smallest,
    peaks,
    colored,
    signal_squares,
    noise_squares,
    lengths,
    seeds,
    snr_db,
    out,
    num_samples,
    num_tiles,
    signal_tiles,
    noise_tiles,
    num_blocks,
    source_stride,
    WIDE: tl.constexpr,
    SNR_MIN: tl.constexpr,
    SNR_MAX: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is left, one program per (utterance, block): of the source minus the mean and by the norm of its filters'
    tiles, by the norm of the peaks, plus the noise at its level, where each of these is there; silence stays silence.

    source, colored [B, T], sums, largest, smallest [B, tiles], peaks [B, blocks], the sums of squares [B, their own
    tiles] -> out [B, T]. Source and colored may be out.
    """
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    n = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    length = _length(lengths, b, num_samples)
    mask = n < length
    mean = tl.full([], 0.0, WIDE)
    divisor = tl.full([], 1.0, WIDE)
    if sums is not None:
        mean, peak = _level(sums, largest, smallest, b, length, num_tiles, WIDE, TILE_BLOCK)
        divisor = tl.where(peak > 1, peak, 1.0)
    if peaks is not None:
        peak = _peak_of(peaks + b * num_blocks, num_blocks, TILE_BLOCK)
        divisor = tl.where(peak > 1, peak, 1.0)
    scale = tl.full([], 0.0, WIDE)
    if colored is not None:
        signal = tl.sqrt(_sum_of(signal_squares + b * signal_tiles, signal_tiles, TILE_BLOCK)) / divisor.to(tl.float64)
        noise = tl.sqrt(_sum_of(noise_squares + b * noise_tiles, noise_tiles, TILE_BLOCK))
        level = _noise_level(seeds, snr_db, b, SNR_MIN, SNR_MAX)
        scale = tl.where(noise > 0, signal / noise * level, 0.0).to(WIDE)
    inverse = 1 / divisor
    value = (tl.load(source + b * source_stride + n, mask=mask, other=0.0).to(WIDE) - mean) * inverse
    if colored is not None:
        value += tl.load(colored + b * num_samples + n, mask=mask, other=0.0) * scale
    value = tl.where(mask, value, 0.0)
    tl.store(out + b * num_samples + n, value.to(out.dtype.element_ty), mask=n < num_samples)


# What `lnl_kernel` leaves of its tiles: sums, largest, smallest.
_Level = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_LEVEL: _Level = (None, None, None)


@backend(ops.rawboost, why_too_long)
def rawboost(
    x: Tensor,
    filters: Tensor | None,
    lengths: Tensor | None,
    seeds: Tensor | None,
    factor: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    algo: int,
    p: float,
    g_sd: float,
    snr_min: float,
    snr_max: float,
) -> Tensor:
    """x [B, T], filters [B, F, P], lengths, seeds, snr_db [B], factor, noise [B, T] -> like x. Equivalent to
    `reference.rawboost`.
    """
    return in_parts(_chain, x, filters, lengths, seeds, factor, noise, snr_db, algo, p, g_sd, snr_min, snr_max)


def _chain(
    out: Tensor,
    x: Tensor,
    filters: Tensor | None,
    lengths: Tensor | None,
    seeds: Tensor | None,
    factor: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    algo: int,
    p: float,
    g_sd: float,
    snr_min: float,
    snr_max: float,
) -> None:
    """Write what `rawboost` returns into out [B, T]. With norm(v) = v / max(1, max |v|), and the noise filtered and at
    its level, the passes are

             color_noise, filter_powers   isd_kernel                     rawboost_finish_kernel
        1           z                                                    out = norm(z - mean)
        2                                 y = x * gain                   out = norm(y)
        3    noise                                                       out = x + noise
        4    noise, z                     y = norm(z - mean) * gain      out = norm(y) + noise
        5           z                     y = norm(z - mean) * gain      out = norm(y)
        6    noise, z                     y = norm(z - mean)             out = norm(y) + noise
        7    noise                        y = x * gain                   out = norm(y) + noise
        8    what 2 does, and then
                    z                     y = norm(z - mean) + out       out = norm(y)

    z and y, in the dtype of computation, take the same place: out where that has this dtype and does not hold what 2
    left, else one beside it. White noise comes first, while it is free to draw it in; filtered, it lies beside both.
    """
    steps = reference.STEPS[algo]
    x, lengths, seeds = _rows(x), _dense(lengths), _dense(seeds)
    bank = None if filters is None else _bank(filters, x)
    batch, num_samples = x.shape
    unfinished = scratch(out)
    colored = of_x = of_noise = None
    if "ssi" in steps:
        assert bank is not None
        colored, of_x, of_noise = color_noise(x, bank, lengths, seeds, noise, unfinished, algo == 3)
    blocks = triton.cdiv(num_samples, BLOCK)
    peaks = torch.empty(batch, blocks, dtype=unfinished.dtype, device=x.device)
    squares = torch.empty(batch, blocks, dtype=torch.float64, device=x.device) if "ssi" in steps else None
    # What is given goes before the seeds, as in the reference.
    marks = mark(x, lengths, seeds, p) if "isd" in steps and factor is None else None
    factor = _rows(factor) if "isd" in steps and factor is not None else None

    # The table's columns. A pass that gets a level takes norm(source - mean) by it.
    def filter_x(z: Tensor) -> tuple[Tensor, _Level]:
        assert bank is not None
        sums, extrema = filter_powers(x, bank, bank.shape[1] - ("ssi" in steps), lengths, z)
        return z, (sums, extrema[0], extrema[1])

    def pass_over(
        source: Tensor, level: _Level, impulses: tuple[Tensor | None, ...], addend: Tensor | None = None
    ) -> Tensor:
        to = unfinished if source is x else source
        launch(
            isd_kernel,
            batch * blocks,
            x.device,
            source,
            *level,
            *impulses,
            addend,
            lengths,
            to,
            peaks,
            squares,
            num_samples,
            0 if level[0] is None else level[0].shape[1],
            blocks,
            0 if marks is None else marks.shape[1],
            source.stride(0),
            0 if factor is None else factor.stride(0),
            G_SD=g_sd,
            TILE_BLOCK=TILE_BLOCK,
            BLOCK=BLOCK,
            num_warps=16,
        )
        return to

    def finish(source: Tensor, level: _Level, norm: Tensor | None, of_signal: Tensor | None = None) -> None:
        launch(
            rawboost_finish_kernel,
            batch * blocks,
            x.device,
            source,
            *level,
            norm,
            colored,
            of_signal,
            of_noise,
            lengths,
            seeds,
            None if noise is None or snr_db is None else _dense(snr_db.double()),
            out,
            num_samples,
            0 if level[0] is None else level[0].shape[1],
            0 if of_signal is None else of_signal.shape[1],
            0 if of_noise is None else of_noise.shape[1],
            blocks,
            source.stride(0),
            WIDE=tl.float64 if unfinished.dtype == torch.float64 else tl.float32,
            SNR_MIN=snr_min,
            SNR_MAX=snr_max,
            TILE_BLOCK=TILE_BLOCK,
            BLOCK=BLOCK,
            # (With Triton 3.6 and 3.8 half precision could take 8 as well.)
            num_warps=8 if unfinished is out else 4,
        )

    impulses = (marks, seeds, factor)
    if algo == 1:
        finish(*filter_x(unfinished), None)
    elif algo == 3:
        finish(x, _NO_LEVEL, None, of_x)
    elif algo == 8:
        finish(pass_over(x, _NO_LEVEL, impulses), _NO_LEVEL, peaks)
        z, level = filter_x(torch.empty_like(out) if unfinished is out else unfinished)
        finish(pass_over(z, level, (None, None, None), out), _NO_LEVEL, peaks)
    else:
        source, level = filter_x(unfinished) if "lnl" in steps else (x, _NO_LEVEL)
        finish(pass_over(source, level, impulses), _NO_LEVEL, peaks, squares)


@backend(ops.lnl, why_too_long)
def lnl(x: Tensor, filters: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, T], filters [B, N_f, P], lengths [B] -> [B, T] like x. Equivalent to `reference.lnl`."""
    return rawboost(x, filters, lengths, None, None, None, None, 1, 0.0, 0.0, 0.0, 0.0)


@backend(ops.isd, why_too_long)
def isd(
    x: Tensor, lengths: Tensor | None, seeds: Tensor | None, factor: Tensor | None, p: float, g_sd: float
) -> Tensor:
    """x [B, T], lengths [B], seeds [B] or factor [B, T] -> [B, T] like x. Equivalent to `reference.isd`."""
    return rawboost(x, None, lengths, seeds, factor, None, None, 2, p, g_sd, 0.0, 0.0)


@backend(ops.ssi, why_too_long)
def ssi(
    x: Tensor,
    filters: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    snr_min: float,
    snr_max: float,
) -> Tensor:
    """x [B, T], filters [B, P], seeds [B] or noise [B, T] and snr_db [B] -> like x. Equivalent to `reference.ssi`."""
    return rawboost(x, filters[:, None], lengths, seeds, None, noise, snr_db, 3, 0.0, 0.0, snr_min, snr_max)
