"""Every op in plain PyTorch: its schema, its fallback, its fake kernel and its oracle at once.

Shapes: B utterances of T samples at most, N_f filters of N_b bands each and P taps at most, K paths, N parameters, S
segments. Waveforms are float16, bfloat16, float32 or float64; the first two are computed in float32. ``lengths`` int64
[B] are the utterances' own lengths (T where it is None): means, maxima and norms run over them, and samples beyond them
are returned as 0.

Random numbers are data: Philox4x32-10 (Salmon et al., SC 2011) keyed by one int64 seed per utterance makes each draw a
pure function of (seed, stream, index). csrc/philox.h, csrc/bijection.h and csrc/notch.h state the same mathematics for
C++ and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradalign import alignment

# The fourth word of Philox's counter; the first two are the index, the third the filter.
STREAM_NOTCH = 0
STREAM_ISD_BETA = 1
STREAM_ISD_KEYS = 2
STREAM_ISD_FACTOR = 3
STREAM_SSI_NOISE = 4
STREAM_SSI_SNR = 5
# The filter number of the stationary noise; the convolutive noise's filters count from 0.
SSI_FILTER = 1 << 16
# The steps that each of RawBoost's algorithms runs, in order; 8 adds its two in parallel.
STEPS = {
    0: (),
    1: ("lnl",),
    2: ("isd",),
    3: ("ssi",),
    4: ("lnl", "isd", "ssi"),
    5: ("lnl", "isd"),
    6: ("lnl", "ssi"),
    7: ("isd", "ssi"),
    8: ("lnl", "isd"),
}

BIJECTION_ROUNDS = 8
_MASK = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------- randomness


def philox(
    seeds: Tensor, stream: int, index: Tensor, filter_id: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four uniform 32-bit words for each (seed, stream, index, filter).

    ``seeds`` int64 and ``index`` int64 (>= 0) broadcast against each other; returns four int64 tensors with values in
    [0, 2**32).
    """
    key0, key1 = seeds & _MASK, (seeds >> 32) & _MASK
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2, c3 = torch.as_tensor(filter_id, device=index.device), torch.as_tensor(stream, device=index.device)
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its bits are right all the same.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor, low: float, high: float) -> Tensor:
    """float64 in the open interval (low, high)."""
    return low + (high - low) * ((word.double() + 0.5) * 2.0**-32)


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer: every input bit flips every output bit with probability 1/2."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def bijection(keys: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """pi(index) for a keyed bijection pi of [0, size): Feistel rounds on a power of two >= size, walked until it falls
    inside.

    ``keys`` int64 [B, BIJECTION_ROUNDS] 32-bit words; ``index`` int64 [T]; ``size`` int64 [B]. Returns int64 [B, T];
    entries whose index is not below ``size`` are -1. Source: Mitchell et al., "Bandwidth-Optimal Random Shuffling for
    GPUs", 2022.
    """
    inside = index[None, :] < size[:, None]
    bits = torch.ceil(torch.log2(size.clamp_min(16).double())).long()[:, None]
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1

    def permute(value: Tensor) -> Tensor:
        low, high = value & low_mask, value >> low_bits
        for r in range(0, BIJECTION_ROUNDS, 2):
            low = low ^ (_mix(high + keys[:, r, None] & _MASK) & low_mask)
            high = high ^ (_mix(low + keys[:, r + 1, None] & _MASK) & high_mask)
        return high << low_bits | low

    value = permute(torch.where(inside, index[None, :], 0))
    # A cycle leaves the set of outsiders at the latest after all of them: 2**bits - size < max(size, 16) steps, a few
    # in practice.
    while bool((outside := inside & (value >= size[:, None])).any()):
        value = torch.where(outside, permute(value), value)
    return torch.where(inside, value, -1)


def isd_factor(seeds: Tensor, lengths: Tensor, num_samples: int, p: float) -> Tensor:
    """Factor f of impulsive noise: u1 * u2, u ~ U(-1, 1), at floor(length * beta / 100) positions, beta ~ U(0, p); 0
    elsewhere. float32 [B, T].
    """
    index = torch.arange(num_samples, device=seeds.device)
    origin = index.new_zeros(1)
    beta = _uniform(philox(seeds[:, None], STREAM_ISD_BETA, origin)[0][:, 0], 0.0, p)
    count = torch.floor(lengths.double() * (beta / 100)).long()
    blocks = [philox(seeds[:, None], STREAM_ISD_KEYS, origin + block) for block in range(BIJECTION_ROUNDS // 4)]
    keys = torch.cat([word for block in blocks for word in block], dim=1)
    rank = bijection(keys, index, lengths)
    word1, word2, _, _ = philox(seeds[:, None], STREAM_ISD_FACTOR, index[None, :])
    u1, u2 = ((word >> 8).float() * 2.0**-23 - 1 for word in (word1, word2))
    return torch.where((rank >= 0) & (rank < count[:, None]), u1 * u2, 0.0)


def ssi_noise(seeds: Tensor, num_samples: int) -> Tensor:
    """White noise ~ N(0, 1), float32 [B, T]: Box-Muller, four samples from each Philox block."""
    blocks = torch.arange((num_samples + 3) // 4, device=seeds.device)
    words = philox(seeds[:, None], STREAM_SSI_NOISE, blocks[None, :])
    # 24-bit fractions are exact in float32, so that every backend starts from the same numbers.
    (a, b, c, d) = ((word >> 8).float() for word in words)
    out = []
    for radius_word, angle_word in ((a, b), (c, d)):
        radius = torch.sqrt(-2 * torch.log((radius_word + 1) * 2.0**-24))
        angle = angle_word * (2.0**-24 * 2 * math.pi)
        out += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(out, dim=-1).flatten(1)[:, :num_samples]


def ssi_snr_db(seeds: Tensor, snr_min: float, snr_max: float) -> Tensor:
    """Signal-to-noise ratio in dB ~ U(snr_min, snr_max), float64 [B]."""
    return _uniform(philox(seeds, STREAM_SSI_SNR, torch.zeros_like(seeds))[0], snr_min, snr_max)


# ------------------------------------------------------------------------------------------------------------ RawBoost


def notch_draws(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the bands of N_f notch banks per utterance.

    ``seeds`` int64 [B]; ``filters`` their N_f numbers. Returns center_hz, width_hz float64 [B, N_f, N_b], taps int64
    [B, N_f, N_b] (odd) and gain_db float64 [B, N_f]. Source: RawBoost (arXiv 2111.04433), section 2.1.
    """
    number = torch.tensor(list(filters), dtype=torch.int64, device=seeds.device)[None, :, None]
    band = torch.arange(num_bands, device=seeds.device)[None, None, :]
    center, width, taps, gain = philox(seeds[:, None, None], STREAM_NOTCH, band, number)
    taps = torch.floor(_uniform(taps, min_taps, max_taps)).long()
    low = torch.tensor(list(min_gain_db), dtype=torch.float64, device=seeds.device)
    high = torch.tensor(list(max_gain_db), dtype=torch.float64, device=seeds.device)
    return (
        _uniform(center, min_center_hz, max_center_hz),
        _uniform(width, min_width_hz, max_width_hz),
        taps + (taps % 2 == 0),
        _uniform(gain[..., 0], 0.0, 1.0) * (high - low) + low,
    )


def notch_bank(
    center_hz: Tensor,
    width_hz: Tensor,
    taps: Tensor,
    gain_db: Tensor,
    sample_rate: float,
    num_taps: int,
    dtype: torch.dtype,
) -> Tensor:
    """Design notch banks: Hamming-windowed band-stops in series, scaled to a peak of ``gain_db`` on 512 frequencies.

    ``center_hz, width_hz, taps`` [B, N_f, N_b], ``gain_db`` [B, N_f]; returns [B, N_f, P] of ``dtype``, P =
    ``num_taps`` (odd), each filter in the middle of its row between zeros. Equivalent to a convolution of scipy's
    ``firwin(c, [f1, f2], fs=sample_rate)``, designed in float64.
    """
    if center_hz.numel() == 0:
        return center_hz.new_zeros(*center_hz.shape[:-1], num_taps, dtype=dtype)
    half = (num_taps - 1) // (2 * center_hz.shape[-1])
    m = torch.arange(-half, half + 1, dtype=torch.float64, device=center_hz.device)
    low = center_hz.double() - width_hz.double() / 2
    high = center_hz.double() + width_hz.double() / 2
    left = 2 / sample_rate * torch.where(low <= 0, 0.001, low)[..., None]
    right = 2 / sample_rate * torch.where(high >= sample_rate / 2, sample_rate / 2 - 0.001, high)[..., None]
    # A band longer than its room in the bank is designed for that room.
    reach = ((taps - 1) // 2).clamp_max(half)[..., None]
    ideal = left * torch.sinc(left * m) + torch.sinc(m) - right * torch.sinc(right * m)
    band = ideal * (0.54 + 0.46 * torch.cos(math.pi * m / reach.clamp_min(1)))
    band = torch.where(m.abs() <= reach, band, 0.0)
    band = band / band.sum(-1, keepdim=True)
    # The bands are symmetric about m = 0, so their spectra are real; 512 frequencies k*pi/512 are every `step`-th bin
    # of the transform.
    step = -(-num_taps // 1024)
    wrapped = band.new_zeros(*band.shape[:-1], 1024 * step)
    wrapped[..., : half + 1] = band[..., half:]
    wrapped[..., 1024 * step - half :] = band[..., :half]
    response = torch.fft.rfft(wrapped).real.prod(-2)
    peak = response[..., : 512 * step : step].abs().amax(-1, keepdim=True)
    bank = torch.fft.irfft(response).roll(num_taps // 2, -1)[..., :num_taps]
    return (10 ** (gain_db.double()[..., None] / 20) / peak * bank).to(dtype)


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
    """Draw notch banks (`notch_draws`) and design them (`notch_bank`): ``seeds`` int64 [B] -> [B, N_f, P] of ``dtype``,
    P = ``num_taps`` (odd).
    """
    ranges = (min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps)
    return notch_bank(
        *notch_draws(seeds, filters, min_gain_db, max_gain_db, num_bands, *ranges), sample_rate, num_taps, dtype
    )


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype it is computed in: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def mask_padding(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mask [B, T] of the samples inside the utterances and x with 0 outside them."""
    if lengths is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device), x.contiguous()
    mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return mask, torch.where(mask, x, 0.0)


def _filter(x: Tensor, filters: Tensor, advance: int) -> Tensor:
    """y[n] = sum_k b[k] x[n + advance - k]: x [..., T], filters [..., P] in x's dtype; x is zero outside [0, T)."""
    num_samples = x.shape[-1]
    size = num_samples + filters.shape[-1]
    full = torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(filters, size), size)
    return full.roll(-advance, -1)[..., :num_samples]


def cond_norm(y: Tensor) -> Tensor:
    """Divide each row by its largest magnitude where that is above 1."""
    if y.shape[-1] == 0:
        return y
    peak = y.abs().amax(-1, keepdim=True)
    return y / torch.where(peak > 1, peak, 1.0)


def _lnl_before_norm(wave: Tensor, mask: Tensor, filters: Tensor) -> Tensor:
    """z - mean(z), z = sum over i of FIR_i(x**i), 0 outside the utterances."""
    powers = torch.stack([wave**i for i in range(1, filters.shape[1] + 1)], dim=1)
    # The advance is one sample more than the filters' group delay (P-1)/2, as published.
    y = _filter(powers, filters.to(wave.dtype), (filters.shape[-1] + 1) // 2).sum(1)
    y = torch.where(mask, y, 0.0)
    return torch.where(mask, y - y.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1), 0.0)


def lnl(x: Tensor, filters: Tensor, lengths: Tensor | None) -> Tensor:
    """Linear and non-linear convolutive noise: cond_norm(z - mean(z)), z = sum over i of FIR_i(x**i).

    ``x`` [B, T]; ``filters`` [B, N_f, P]; ``lengths`` int64 [B] or None.
    Source: RawBoost (arXiv 2111.04433), section 2.1.
    """
    if x.numel() == 0:
        return x.clone()
    mask, wave = mask_padding(wide(x), lengths)
    return cond_norm(_lnl_before_norm(wave, mask, filters)).to(x.dtype)


def _isd_gain(
    wave: Tensor, lengths: Tensor | None, seeds: Tensor | None, factor: Tensor | None, p: float, g_sd: float
) -> Tensor:
    """1 + g_sd * f, [B, T]."""
    if factor is None:
        assert seeds is not None
        whole = wave.shape[1]
        own_lengths = torch.full_like(seeds, whole) if lengths is None else lengths.clamp(0, whole)
        factor = isd_factor(seeds, own_lengths, wave.shape[1], p)
    return 1 + g_sd * mask_padding(factor.to(wave.dtype), lengths)[1]


def isd(
    x: Tensor, lengths: Tensor | None, seeds: Tensor | None, factor: Tensor | None, p: float, g_sd: float
) -> Tensor:
    """Impulsive signal-dependent noise: cond_norm(x + g_sd * x * f).

    ``x`` [B, T]; f is ``factor`` [B, T], or drawn from ``seeds`` int64 [B] (see `isd_factor`).
    Source: RawBoost (arXiv 2111.04433), section 2.2.
    """
    if x.numel() == 0:
        return x.clone()
    _, wave = mask_padding(wide(x), lengths)
    return cond_norm(wave * _isd_gain(wave, lengths, seeds, factor, p, g_sd)).to(x.dtype)


def _ssi_noise(
    wave: Tensor,
    mask: Tensor,
    filters: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    snr_db: Tensor | None,
    snr_min: float,
    snr_max: float,
) -> tuple[Tensor, Tensor]:
    """v = FIR(noise) [B, T], 0 outside the utterances, and 10**(-SNR/20) / |v|, float64 [B, 1], 0 for silence."""
    if noise is None:
        assert seeds is not None
        noise, snr_db = ssi_noise(seeds, wave.shape[1]), ssi_snr_db(seeds, snr_min, snr_max)
    assert snr_db is not None
    white = torch.where(mask, noise.to(wave.dtype), 0.0)
    colored = torch.where(mask, _filter(white, filters.to(wave.dtype), (filters.shape[-1] + 1) // 2), 0.0)
    norm = _norm(colored)
    return colored, torch.where(norm > 0, 10 ** (-snr_db.double() / 20)[:, None] / norm, 0.0)


def _norm(wave: Tensor) -> Tensor:
    """Norms of the rows, float64 [B, 1]: in float32 the squares of samples below 1e-23 vanish."""
    return torch.linalg.vector_norm(wave, dim=1, keepdim=True, dtype=torch.float64)


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
    """Stationary signal-independent noise: x + v * |x| / |v| * 10**(-SNR/20), v = FIR(noise).

    ``x`` [B, T]; ``filters`` [B, P]; the noise and its level are ``noise`` [B, T] and ``snr_db`` [B], or drawn from
    ``seeds`` int64 [B] (see `ssi_noise`, `ssi_snr_db`). Silence stays silence.
    Source: RawBoost (arXiv 2111.04433), section 2.3.
    """
    if x.numel() == 0:
        return x.clone()
    mask, wave = mask_padding(wide(x), lengths)
    colored, gain = _ssi_noise(wave, mask, filters, seeds, noise, snr_db, snr_min, snr_max)
    return (wave + colored * (gain * _norm(wave)).to(wave.dtype)).to(x.dtype)


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
    """RawBoost's algorithm 1 to 8: `lnl`, `isd` and `ssi` as `STEPS` says, each on the result of the one before.

    ``x`` [B, T]; ``filters`` [B, F, P] are `lnl`'s, and `ssi`'s after them, of the steps that the algorithm has (None
    where it has neither); the rest as for `isd` and `ssi`. Source: RawBoost (arXiv 2111.04433), its published code.
    """
    lnl_filters, ssi_filters = split_filters(filters, algo)
    wave = wide(x)
    if algo == 8:
        assert lnl_filters is not None
        both = lnl(wave, lnl_filters, lengths) + isd(wave, lengths, seeds, factor, p, g_sd)
        return cond_norm(both).to(x.dtype)
    y = wave
    for step in STEPS[algo]:
        if step == "lnl":
            assert lnl_filters is not None
            y = lnl(y, lnl_filters, lengths)
        elif step == "isd":
            y = isd(y, lengths, seeds, factor, p, g_sd)
        else:
            assert ssi_filters is not None
            y = ssi(y, ssi_filters, lengths, seeds, noise, snr_db, snr_min, snr_max)
    return y.to(x.dtype)


def split_filters(filters: Tensor | None, algo: int) -> tuple[Tensor | None, Tensor | None]:
    """Split the filters [B, F, P] of `rawboost` into those of `lnl` [B, N_f, P] and that of `ssi` [B, P]."""
    if filters is None:
        return None, None
    if "ssi" in STEPS[algo]:
        return filters[:, :-1], filters[:, -1]
    return filters, None


def cond_norm_backward(grad: Tensor, v: Tensor) -> Tensor:
    """Gradient of `cond_norm` in v; of several largest magnitudes, the first one counts."""
    peak, at = v.abs().max(-1, keepdim=True)
    scaled = grad / peak
    correction = (scaled * v).sum(-1, keepdim=True) / peak * v.gather(-1, at).sign()
    return torch.where(peak > 1, scaled.scatter_add(-1, at, -correction), grad)


def lnl_backward(grad: Tensor, x: Tensor, filters: Tensor, lengths: Tensor | None) -> Tensor:
    """Gradient of `lnl` in ``x``: ``grad`` [B, T] is the loss's gradient in its result; returns [B, T]."""
    if x.numel() == 0:
        return x.clone()
    mask, wave = mask_padding(wide(x), lengths)
    centered = _lnl_before_norm(wave, mask, filters)
    grad = torch.where(mask, cond_norm_backward(mask_padding(grad.to(wave.dtype), lengths)[1], centered), 0.0)
    grad = torch.where(mask, grad - grad.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1), 0.0)
    num_taps = filters.shape[-1]
    # Correlation with a filter is filtering with its mirror image.
    per_branch = _filter(grad[:, None], filters.to(wave.dtype).flip(-1), num_taps - 1 - (num_taps + 1) // 2)
    total = sum((i + 1) * wave**i * per_branch[:, i] for i in range(filters.shape[1]))
    return torch.where(mask, total, 0.0).to(x.dtype)


def isd_backward(
    grad: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    seeds: Tensor | None,
    factor: Tensor | None,
    p: float,
    g_sd: float,
) -> Tensor:
    """Gradient of `isd` in ``x``: ``grad`` [B, T] is the loss's gradient in its result; returns [B, T]."""
    if x.numel() == 0:
        return x.clone()
    _, wave = mask_padding(wide(x), lengths)
    gain = _isd_gain(wave, lengths, seeds, factor, p, g_sd)
    grad = cond_norm_backward(mask_padding(grad.to(wave.dtype), lengths)[1], wave * gain) * gain
    return mask_padding(grad, lengths)[1].to(x.dtype)


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
    """Gradient of `ssi` in ``x``: ``grad`` [B, T] is the loss's gradient in its result; returns [B, T]."""
    if x.numel() == 0:
        return x.clone()
    mask, wave = mask_padding(wide(x), lengths)
    colored, gain = _ssi_noise(wave, mask, filters, seeds, noise, snr_db, snr_min, snr_max)
    grad = mask_padding(grad.to(wave.dtype), lengths)[1]
    norm = _norm(wave)
    dot = (grad.double() * colored).sum(1, keepdim=True)
    toward_x = torch.where(norm > 0, dot * gain / norm, 0.0).to(wave.dtype)
    return (grad + toward_x * wave).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- gradients


def gram(grads: Sequence[Tensor], num_paths: int, segments: Sequence[int], num_segments: int) -> Tensor:
    """Gram matrices of the paths' gradients, one per segment of the parameters: float64 [S, K, K].

    ``grads`` holds K*N tensors, path after path: ``grads[k*N + n]`` is path k's gradient of parameter n, which belongs
    to segment ``segments[n]``. Returns G[s, i, j] = sum over the parameters n of segment s of <g_i[n], g_j[n]>.
    """
    num_params = len(segments)
    out = grads[0].new_zeros(num_segments, num_paths, num_paths, dtype=torch.float64)
    for n, s in enumerate(segments):
        rows = torch.stack([grads[k * num_params + n].reshape(-1).double() for k in range(num_paths)])
        out[s] += rows @ rows.T
    return out


def weigh(
    gram: Tensor, method: str, rho: Tensor | None, order: Tensor | None, beta: float, always: bool, c: float
) -> tuple[Tensor, Tensor]:
    """Weights with which a method of `alignment.METHODS` merges each segment's gradients.

    ``gram`` float64 [S, K, K]. ``rho`` float64 [S, K, K] (default zeros), ``beta`` and ``always`` (the variant "paper")
    are GradVac's, ``order`` int64 [K, K] is PCGrad's and GradVac's, ``c`` is CAGrad's. Returns the weights float64
    [S, K], NaN where a segment's Gram matrix has an entry that is not finite, and GradVac's new targets float64 [S, K,
    K], which such a segment leaves as they are; another method's are empty.
    """
    options: dict = {"order": order} if method in ("pcgrad", "gradvac") else {"c": c} if method == "cagrad" else {}
    if method != "gradvac":
        return alignment.solve(gram, alignment.METHODS[method], **options)[0], gram.new_empty(0)
    old = torch.zeros_like(gram) if rho is None else rho
    options |= {"variant": "paper" if always else "dual_path", "beta": beta}
    found, new = alignment.solve(gram, alignment.METHODS[method], old, **options)
    assert new is not None
    return found, torch.where(gram.isfinite().all(-1).all(-1)[:, None, None], new, old)


def combine_(out: Sequence[Tensor], others: Sequence[Tensor], weights: Tensor, segments: Sequence[int]) -> None:
    """Merge the paths' gradients in place into the first path's: out[n] = w[s, 0] * out[n] + sum over k > 0 of w[s, k]
    * g_k[n], s = segments[n].

    ``out`` holds path 0's N tensors, ``others`` the (K-1)*N of the further paths, path after path; ``weights`` float64
    [S, K]. Computed in float32 (float64 for float64 gradients), stored in ``out``'s dtype.
    """
    num_params = len(segments)
    for n, s in enumerate(segments):
        first = wide(out[n])
        w = weights[s].to(first.dtype)
        total = w[0] * first
        for k in range(1, weights.shape[1]):
            total = total + w[k] * others[(k - 1) * num_params + n].to(first.dtype)
        out[n].copy_(total)


def align_(
    out: Sequence[Tensor],
    others: Sequence[Tensor],
    method: str,
    rho: Tensor | None,
    order: Tensor | None,
    beta: float,
    always: bool,
    c: float,
) -> tuple[Tensor, Tensor]:
    """`gram`, `weigh` and `combine_` of each parameter on its own, in place into the first path's gradients.

    ``out`` holds path 0's N tensors, ``others`` the (K-1)*N of the further paths, path after path; the rest as for
    `weigh`, with S = N. Returns the Gram matrices float64 [N, K, K] and GradVac's new targets.
    """
    segments = list(range(len(out)))
    matrices = gram([*out, *others], 1 + len(others) // len(out), segments, len(out))
    weights, targets = weigh(matrices, method, rho, order, beta, always, c)
    combine_(out, others, weights, segments)
    return matrices, targets
