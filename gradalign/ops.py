"""The ops, declared once each in pipeline order; `gradalign.reference` says what each computes.

>>> import torch
>>> from gradalign import ops
>>> clean, augmented = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
>>> ops.gram([clean, augmented], 2, [0], 1).tolist()
[[[25.0, 3.0], [3.0, 1.0]]]
"""

from __future__ import annotations

import torch

from gradalign import _dispatch, _extension, alignment, reference
from gradalign._dispatch import FLOATS, Op


def _like_first(x, *_):
    # Kernels write contiguous results, whatever the layout of x.
    return x.new_empty(x.shape)


def _expect(name, value, shape, *dtypes):
    """Raise ValueError where a tensor, if it is there, has not this shape (None: any size), TypeError for its dtype."""
    if value is None:
        return
    if value.dim() != len(shape) or any(n not in (None, size) for n, size in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"`{name}` must be [{wanted}]; found {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be {wanted}; found {str(value.dtype).removeprefix('torch.')}")


def _check_drawn(seeds, **drawn):
    if seeds is None and any(value is None for value in drawn.values()):
        raise ValueError(f"expected `seeds`, or {', '.join(f'`{name}`' for name in drawn)}; found None")


def _check_notch_bank(center_hz, width_hz, taps, gain_db, sample_rate, num_taps, dtype):
    _expect("center_hz", center_hz, (None, None, None), *FLOATS)
    _expect("width_hz", width_hz, center_hz.shape, *FLOATS)
    _expect("taps", taps, center_hz.shape, torch.int64)
    _expect("gain_db", gain_db, center_hz.shape[:2], *FLOATS)
    _check_size(center_hz.shape[2], num_taps)


def _check_size(num_bands, num_taps):
    if num_bands < 1:
        raise ValueError(f"a notch bank must have at least 1 band; found {num_bands}")
    if num_taps < 1 or num_taps % 2 == 0:
        raise ValueError(f"`num_taps` must be odd and at least 1; found {num_taps}")


def _check_notch_filters(seeds, filters, min_gain_db, max_gain_db, *rest):
    _expect("seeds", seeds, (None,), torch.int64)
    if not len(filters) == len(min_gain_db) == len(max_gain_db) > 0:
        raise ValueError(
            "`filters`, `min_gain_db` and `max_gain_db` must be of one length, at least 1; "
            f"found {len(filters)}, {len(min_gain_db)} and {len(max_gain_db)}"
        )
    num_bands, *_, num_taps, _ = rest
    _check_size(num_bands, num_taps)


def _check_filters(filters, *shape):
    _expect("filters", filters, shape, *FLOATS)
    if 0 in filters.shape[1:]:
        raise ValueError(f"`filters` must hold a filter of at least one tap; found {list(filters.shape)}")


def _check_lnl(x, filters, lengths):
    _expect("x", x, (None, None), *FLOATS)
    _check_filters(filters, len(x), None, None)
    _expect("lengths", lengths, (len(x),), torch.int64)


def _check_isd(x, lengths, seeds, factor, p, g_sd):
    _expect("x", x, (None, None), *FLOATS)
    _expect("lengths", lengths, (len(x),), torch.int64)
    _expect("seeds", seeds, (len(x),), torch.int64)
    _expect("factor", factor, x.shape, *FLOATS)
    _check_drawn(seeds, factor=factor)
    if not 0 <= p <= 100:
        raise ValueError(f"`p` must be a percentage in [0, 100]; found {p}")


def _check_ssi(x, filters, lengths, seeds, noise, snr_db, snr_min, snr_max):
    _expect("x", x, (None, None), *FLOATS)
    _check_filters(filters, len(x), None)
    _expect("lengths", lengths, (len(x),), torch.int64)
    _expect("seeds", seeds, (len(x),), torch.int64)
    _expect("noise", noise, x.shape, *FLOATS)
    _expect("snr_db", snr_db, (len(x),), *FLOATS)
    _check_drawn(seeds if noise is None else None, noise=noise, snr_db=snr_db)


def _check_rawboost(x, filters, lengths, seeds, factor, noise, snr_db, algo, p, g_sd, snr_min, snr_max):
    if algo not in range(1, 9):
        raise ValueError(f"`algo` must be one of 1..8; found {algo}")
    steps = reference.STEPS[algo]
    _expect("x", x, (None, None), *FLOATS)
    if "lnl" in steps or "ssi" in steps:
        least = ("lnl" in steps) + ("ssi" in steps)
        if filters is None or filters.dim() != 3 or filters.shape[1] < least:
            found = filters if filters is None else list(filters.shape)
            raise ValueError(f"`filters` must be [{len(x)}, {least} or more, *] for algorithm {algo}; found {found}")
        _check_filters(filters, len(x), None, None)
    if "isd" in steps:
        _check_isd(x, lengths, seeds, factor, p, g_sd)
    if "ssi" in steps:
        _check_ssi(x, filters[:, -1], lengths, seeds, noise, snr_db, snr_min, snr_max)
    _expect("lengths", lengths, (len(x),), torch.int64)


def _rawboost_backward(grad, x, filters, lengths, seeds, factor, noise, snr_db, *rest):
    """Gradient of `rawboost` in ``x``.

    A part of the utterances at a time: what is computed again, in float32 at least, takes memory.
    """
    out, parts = x.new_empty(x.shape), 3 if x.dtype in (torch.float32, torch.float64) else 8
    for i in range(parts):
        rows = slice(i * len(x) // parts, (i + 1) * len(x) // parts)
        tensors = (grad, x, filters, lengths, seeds, factor, noise, snr_db)
        out[rows] = _chain_backward(*(None if t is None else t[rows] for t in tensors), *rest)
    return out


def _chain_backward(grad, x, filters, lengths, seeds, factor, noise, snr_db, algo, p, g_sd, snr_min, snr_max):
    """The steps' gradients in reverse, on waveforms that are computed again."""
    if x.numel() == 0:
        return x
    grad, x = reference.wide(grad), reference.wide(x)
    lnl_filters, ssi_filters = reference.split_filters(filters, algo)
    of_isd, of_ssi = (lengths, seeds, factor, p, g_sd), (ssi_filters, lengths, seeds, noise, snr_db, snr_min, snr_max)
    if algo == 8:
        both = lnl(x, lnl_filters, lengths).add_(isd(x, *of_isd))
        # Without impulses `isd` is the norm alone.
        grad = isd_backward(grad, both, lengths, seeds, factor, 0.0, 0.0)
        del both
        return lnl_backward(grad, x, lnl_filters, lengths).add_(isd_backward(grad, x, *of_isd))
    run = {"lnl": (lnl, lnl_backward, (lnl_filters, lengths)), "isd": (isd, isd_backward, of_isd)}
    run["ssi"] = (ssi, ssi_backward, of_ssi)
    waves = [x]
    for step in reference.STEPS[algo][:-1]:
        forward, _, args = run[step]
        waves.append(forward(waves[-1], *args))
    for step in reversed(reference.STEPS[algo]):
        _, backward, args = run[step]
        # Each waveform goes when its step's gradient is there.
        grad = backward(grad, waves.pop(), *args)
    return grad


def _no_second_derivative(*_):
    raise RuntimeError("RawBoost has first derivatives only; found a second backward through it (create_graph=True)")


def _backward_of(check):
    def check_backward(grad, x, *rest):
        check(x, *rest)
        _expect("grad", grad, x.shape, *FLOATS)

    return check_backward


def _check_gram(grads, num_paths, segments, num_segments):
    if num_paths < 1 or not segments or len(grads) != num_paths * len(segments):
        raise ValueError(
            f"`grads` must hold num_paths * len(segments) = {num_paths} * {len(segments)} tensors, at least one; "
            f"found {len(grads)}"
        )
    _check_segments(segments, num_segments)


def _check_combine(out, others, weights, segments):
    if weights.dim() != 2 or weights.dtype != torch.float64 or weights.shape[1] < 1:
        raise ValueError(f"`weights` must be float64 [S, K]; found {weights.dtype} {list(weights.shape)}")
    if not out or len(out) != len(segments):
        raise ValueError(f"`out` must hold len(segments) = {len(segments)} tensors, at least one; found {len(out)}")
    if len(others) != (weights.shape[1] - 1) * len(out):
        raise ValueError(
            f"`others` must hold (K - 1) * len(out) = {weights.shape[1] - 1} * {len(out)} tensors; found {len(others)}"
        )
    _check_segments(segments, weights.shape[0])


def _like_weights(gram, method, *_):
    return gram.new_empty(gram.shape[:-1]), gram.new_empty(gram.shape if method == "gradvac" else 0)


def _check_weigh(gram, method, rho, order, beta, always, c):
    if gram.dim() != 3 or gram.dtype != torch.float64 or gram.shape[1] != gram.shape[2] or gram.shape[1] < 1:
        raise ValueError(f"`gram` must be float64 [S, K, K]; found {gram.dtype} {list(gram.shape)}")
    _check_method(method, rho, order, gram.shape)


def _check_method(method, rho, order, shape):
    if method not in alignment.METHODS or alignment.METHODS[method].name != method:
        raise ValueError(f"`method` must be one of alignment.METHODS, by its first name; found {method!r}")
    if rho is not None and (rho.shape != shape or rho.dtype != torch.float64):
        raise ValueError(f"`rho` must be float64 {list(shape)}; found {rho.dtype} {list(rho.shape)}")
    if order is not None and (order.shape != shape[1:] or order.dtype != torch.int64):
        raise ValueError(f"`order` must be int64 {list(shape[1:])}; found {order.dtype} {list(order.shape)}")


def _like_gram(out, others, method, *_):
    num_paths = 1 + len(others) // len(out)
    gram = out[0].new_empty(len(out), num_paths, num_paths, dtype=torch.float64)
    return gram, gram.new_empty(gram.shape if method == "gradvac" else 0)


def _check_align(out, others, method, rho, order, beta, always, c):
    if not out or len(others) % len(out):
        raise ValueError(
            f"`others` must hold (K - 1) * len(out) tensors, and `out` at least one; found {len(others)} and {len(out)}"
        )
    num_paths = 1 + len(others) // len(out)
    _check_method(method, rho, order, torch.Size((len(out), num_paths, num_paths)))


def _check_segments(segments, num_segments):
    if min(segments) < 0 or max(segments) >= num_segments:
        raise ValueError(f"`segments` must lie in [0, {num_segments}); found [{min(segments)}, {max(segments)}]")


notch_bank = Op(reference.notch_bank, check=_check_notch_bank)
notch_filters = Op(reference.notch_filters, check=_check_notch_filters)
lnl = Op(reference.lnl, fake=_like_first, check=_check_lnl)
isd = Op(reference.isd, fake=_like_first, check=_check_isd)
ssi = Op(reference.ssi, fake=_like_first, check=_check_ssi)
lnl_backward = Op(reference.lnl_backward, fake=_like_first, check=_backward_of(_check_lnl))
isd_backward = Op(reference.isd_backward, fake=_like_first, check=_backward_of(_check_isd))
ssi_backward = Op(reference.ssi_backward, fake=_like_first, check=_backward_of(_check_ssi))
lnl.differentiate(lnl_backward)
isd.differentiate(isd_backward)
ssi.differentiate(ssi_backward)
for _op in (lnl_backward, isd_backward, ssi_backward):
    # Without a formula PyTorch would take them for constants.
    _op.differentiate(_no_second_derivative)
rawboost = Op(reference.rawboost, fake=_like_first, check=_check_rawboost)
rawboost.differentiate(_rawboost_backward)
gram = Op(reference.gram, check=_check_gram, num_paths=lambda grads, num_paths, *_: num_paths)
weigh = Op(reference.weigh, fake=_like_weights, check=_check_weigh, num_paths=lambda gram, *_: gram.shape[1])
combine_ = Op(
    reference.combine_,
    mutates=("out",),
    check=_check_combine,
    num_paths=lambda out, others, weights, *_: weights.shape[1],
)
align_ = Op(
    reference.align_,
    mutates=("out",),
    fake=_like_gram,
    check=_check_align,
    num_paths=lambda out, others, *_: 1 + len(others) // len(out),
)

for _op in _dispatch.ops().values():
    _extension.register(_op)

# The Triton kernels register themselves as a backend of the ops above.
import gradalign.kernels  # noqa: E402, F401
