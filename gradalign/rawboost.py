"""RawBoost for whole batches: configuration -> draws -> augmentation.

Source: Tak et al., "RawBoost: A raw data boosting and augmentation method applied to automatic speaker verification
anti-spoofing", ICASSP 2022, arXiv 2111.04433. Equal to the published NumPy code for the same draws; where that code
fails (silence, NumPy >= 2.4), silence stays silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gradalign import ops, reference
from gradalign._device import to_device
from gradalign._dispatch import FLOATS


@dataclass(frozen=True)
class NotchDraws:
    """The random numbers of a set of notch banks.

    Attributes:
        center_hz: band centres in Hz, float64 [B, N_f, N_b] (the stationary noise: [B, N_b]).
        width_hz: band widths in Hz, same shape.
        taps: taps of each band's filter, odd int64, same shape.
        gain_db: peak gain of each bank in dB, float64 [B, N_f] (the stationary noise: [B]).
    """

    center_hz: Tensor
    width_hz: Tensor
    taps: Tensor
    gain_db: Tensor


@dataclass(frozen=True)
class RawBoostDraws:
    """Everything random in one augmentation of a batch; a field is None where the algorithm has no such step.

    To change draws, make a copy: ``dataclasses.replace(draws, snr_db=torch.full_like(draws.snr_db, 20))``.

    Attributes:
        lnl: the convolutive noise's notch banks, with axes [B, N_f, N_b].
        isd_factor: factor f of the impulsive noise, [B, T], 0 at the positions not chosen.
        ssi: the stationary noise's notch bank, with axes [B, N_b].
        ssi_noise: white noise before its filter, [B, T].
        snr_db: signal-to-noise ratio in dB, [B].
    """

    lnl: NotchDraws | None = None
    isd_factor: Tensor | None = None
    ssi: NotchDraws | None = None
    ssi_noise: Tensor | None = None
    snr_db: Tensor | None = None


@dataclass(frozen=True)
class RawBoostConfig:
    """The published parameters under readable names; the defaults are the published ones.

    Attributes:
        algo: 0 none; 1 LnL convolutive, 2 ISD impulsive, 3 SSI stationary noise; 4 = 1, 2, 3 in series; 5 = 1, 2;
            6 = 1, 3; 7 = 2, 3; 8 = 1 + 2 in parallel.
        sample_rate: in Hz.
        n_f: number of branches of LnL: branch i filters x**i.
        n_bands: notch filters in each bank.
        min_f, max_f: range of their centres, Hz.
        min_bw, max_bw: range of their widths, Hz.
        min_coeff, max_coeff: range of their taps (whole part of a uniform draw, plus 1 where even).
        min_g, max_g: range of a bank's gain, dB.
        min_bias, max_bias: subtracted from that range for LnL's branches 2 and up, dB.
        p: upper bound of the share of samples with impulsive noise, percent.
        g_sd: gain of the impulsive noise.
        snr_min, snr_max: range of the stationary noise's SNR, dB.
    """

    algo: int = 4
    sample_rate: int = 16000
    n_f: int = 5
    n_bands: int = 5
    min_f: float = 20
    max_f: float = 8000
    min_bw: float = 100
    max_bw: float = 1000
    min_coeff: int = 10
    max_coeff: int = 100
    min_g: float = 0
    max_g: float = 0
    min_bias: float = 5
    max_bias: float = 20
    p: float = 10
    g_sd: float = 2
    snr_min: float = 10
    snr_max: float = 40

    def __post_init__(self) -> None:
        for name in ("algo", "sample_rate", "n_f", "n_bands", "min_coeff", "max_coeff"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an int; found {value!r} ({type(value).__name__})")
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TypeError(f"`{f.name}` must be a finite number; found {value!r}")
        if self.algo not in reference.STEPS:
            raise ValueError(f"`algo` must be one of 0..8; found {self.algo}")
        for name in ("sample_rate", "n_f", "n_bands", "min_coeff"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; found {getattr(self, name)}")
        for low, high in (
            ("min_f", "max_f"),
            ("min_bw", "max_bw"),
            ("min_coeff", "max_coeff"),
            ("min_g", "max_g"),
            ("snr_min", "snr_max"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"`{low}` must not be above `{high}`; found {getattr(self, low)} > {getattr(self, high)}"
                )
        if not 0 <= self.p <= 100:
            raise ValueError(f"`p` must be a percentage in [0, 100]; found {self.p}")
        if self.min_bw <= 0:
            raise ValueError(f"`min_bw` must be above 0 Hz; found {self.min_bw}")
        if not 0 <= self.min_f <= self.max_f <= self.sample_rate / 2:
            raise ValueError(
                f"`min_f` and `max_f` must lie in [0, sample_rate / 2] = [0, {self.sample_rate / 2:g}] Hz; "
                f"found {self.min_f} and {self.max_f}"
            )

    @property
    def num_taps(self) -> int:
        """The most taps a bank can have."""
        longest = max(self.min_coeff, self.max_coeff - 1)
        return self.n_bands * (longest + (longest % 2 == 0) - 1) + 1


class RawBoost(nn.Module):
    """RawBoost data augmentation of a batch of waveforms, each utterance from its own seed.

    ``boost(x, seeds=seeds)`` depends on nothing but each utterance's samples, length and seed: not on the batch around
    it, the padding, the device or the backend. Samples at and beyond an utterance's length are returned as 0.
    It augments in ``train()`` and in ``eval()`` mode alike: call it on the model's input, not within the model. The
    result is differentiable in ``x``, once and in reverse mode.

    Args:
        algo: algorithm 0..8, listed in `RawBoostConfig`.
        sample_rate: in Hz.
        **parameters: the other fields of `RawBoostConfig`, such as ``snr_min``; `from_args` takes the published names.

    Raises:
        ValueError, TypeError: for a parameter outside its range.

    >>> import torch, gradalign as ga
    >>> boost = ga.RawBoost(algo=4, sample_rate=16000)
    >>> x = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    >>> seeds = torch.tensor([1, 2])
    >>> y = boost(x, seeds=seeds)
    >>> y.shape, y.dtype
    (torch.Size([2, 16000]), torch.float32)
    >>> draws = boost.draw(seeds, num_samples=16000)
    >>> bool((boost.apply(x, draws) - y).abs().max() < 1e-6)
    True
    """

    def __init__(self, algo: int = 4, sample_rate: int = 16000, **parameters: Any) -> None:
        super().__init__()
        known = [f.name for f in fields(RawBoostConfig)]
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise TypeError(f"RawBoost has no parameter {', '.join(map(repr, unknown))}; expected {', '.join(known)}")
        self.config = RawBoostConfig(algo=algo, sample_rate=sample_rate, **parameters)

    @classmethod
    def from_args(cls, args: Any, algo: int | None = None, sample_rate: int = 16000) -> RawBoost:
        """Build from an object with the published names (``args.N_f, args.nBands, args.minF, ...``), such as the
        published argparse namespace.

        ``process_Rawboost_feature(x, sr, args, algo)`` becomes ``RawBoost.from_args(args, algo, sr)(x)``, x a tensor.

        Args:
            args: any object with all of the published attributes; ``args.algo`` is used unless ``algo`` is given.
            algo: algorithm 0..8.
            sample_rate: in Hz.

        Raises:
            TypeError: naming the attributes that are missing.

        >>> from argparse import Namespace
        >>> args = Namespace(algo=5, N_f=5, nBands=5, minF=20, maxF=8000, minBW=100, maxBW=1000, minCoeff=10,
        ...                  maxCoeff=100, minG=0, maxG=0, minBiasLinNonLin=5, maxBiasLinNonLin=20, P=10, g_sd=2,
        ...                  SNRmin=10, SNRmax=40)
        >>> RawBoost.from_args(args).config == RawBoost(algo=5).config
        True
        """
        names = {
            "n_f": "N_f",
            "n_bands": "nBands",
            "min_f": "minF",
            "max_f": "maxF",
            "min_bw": "minBW",
            "max_bw": "maxBW",
            "min_coeff": "minCoeff",
            "max_coeff": "maxCoeff",
            "min_g": "minG",
            "max_g": "maxG",
            "min_bias": "minBiasLinNonLin",
            "max_bias": "maxBiasLinNonLin",
            "p": "P",
            "g_sd": "g_sd",
            "snr_min": "SNRmin",
            "snr_max": "SNRmax",
        }
        if algo is None:
            names["algo"] = "algo"
        missing = [published for published in names.values() if not hasattr(args, published)]
        if missing:
            raise TypeError(f"args must have the published names; missing {', '.join(missing)}")
        parameters = {ours: getattr(args, published) for ours, published in names.items()}
        return cls(**{"algo": algo, **parameters}, sample_rate=sample_rate)

    def forward(self, x: Tensor, lengths: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """Augment a batch.

        Args:
            x: waveforms [B, T] or one waveform [T], float16, bfloat16, float32 or float64, any strides.
            lengths: the utterances' own lengths in samples, int64 [B]; None means T. Checked when on the CPU, clamped
                to [0, T] on a device.
            seeds: one int64 seed per utterance [B] (or a 0-d tensor for [T]); None draws them from PyTorch's generator
                of x's device, which on CUDA counts on the device: each replay of a CUDA graph draws others.

        Returns:
            Tensor of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: for a wrong shape, dtype, device or length, naming expected and found.
        """
        x, lengths, batched = self._check_input(x, lengths)
        if seeds is None:
            seeds = torch.randint(torch.iinfo(torch.int64).max, (x.shape[0],), dtype=torch.int64, device=x.device)
        else:
            seeds = to_device(_check_seeds(seeds if batched else _row(seeds), x.shape[0]), x.device)
        notches = self._notches()
        filters = ops.notch_filters(seeds, **notches, **self._design(x)) if notches["filters"] else None
        y = self._run(x, filters, lengths, seeds)
        return y if batched else y[0]

    def draw(self, seeds: Tensor, num_samples: int, lengths: Tensor | None = None) -> RawBoostDraws:
        """Everything random that ``forward`` with these seeds uses, as tensors.

        Args:
            seeds: int64 [B].
            num_samples: T, the batch's number of samples.
            lengths: the utterances' own lengths in samples, int64 [B]; None means T.

        Returns:
            `RawBoostDraws` on the seeds' device.

        Raises:
            ValueError, TypeError: for a wrong shape, dtype or length, naming expected and found.

        >>> draws = RawBoost(algo=4).draw(torch.tensor([3, 4, 5]), num_samples=800)
        >>> draws.lnl.center_hz.shape, draws.isd_factor.shape, draws.snr_db.shape
        (torch.Size([3, 5, 5]), torch.Size([3, 800]), torch.Size([3]))
        """
        c, steps = self.config, reference.STEPS[self.config.algo]
        seeds = _check_seeds(seeds, None)
        if not isinstance(num_samples, int):
            raise TypeError(f"`num_samples` must be an int; found {num_samples!r}")
        if num_samples < 0:
            raise ValueError(f"`num_samples` must be at least 0; found {num_samples}")
        if lengths is None:
            lengths = torch.full_like(seeds, num_samples)
        else:
            lengths = _check_lengths(lengths, seeds.shape[0], num_samples, seeds.device)
        notches = self._notches()
        drawn = reference.notch_draws(seeds, **notches) if notches["filters"] else ()
        return RawBoostDraws(
            lnl=NotchDraws(*(v[:, : c.n_f] for v in drawn)) if "lnl" in steps else None,
            isd_factor=reference.isd_factor(seeds, lengths, num_samples, c.p) if "isd" in steps else None,
            ssi=NotchDraws(*(v[:, -1] for v in drawn)) if "ssi" in steps else None,
            ssi_noise=reference.ssi_noise(seeds, num_samples) if "ssi" in steps else None,
            snr_db=reference.ssi_snr_db(seeds, c.snr_min, c.snr_max) if "ssi" in steps else None,
        )

    def apply(self, x: Any, draws: RawBoostDraws | None = None, lengths: Tensor | None = None) -> Any:
        """Augment a batch with given draws; equals ``forward(x, lengths, seeds)`` for ``draws = draw(seeds, T,
        lengths)``.

        Args:
            x: waveforms [B, T] or one waveform [T], as in ``forward``.
            draws: `RawBoostDraws` for the batch, on x's device. They carry no gradient.
            lengths: as in ``forward``.

        Returns:
            Tensor of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: for a missing draw or a wrong shape, dtype or device, naming expected and found.
        """
        if draws is None and callable(x):
            # nn.Module.apply(fn), as called by a parent that initialises its submodules.
            return super().apply(x)
        if not isinstance(draws, RawBoostDraws):
            raise TypeError(f"`draws` must be RawBoostDraws; found {type(draws).__name__}")
        x, lengths, batched = self._check_input(x, lengths)
        self._check_draws(draws, x)
        steps = reference.STEPS[self.config.algo]
        banks = [_numbers(draws.lnl)] if "lnl" in steps else []
        if "ssi" in steps:
            banks.append(tuple(value[:, None] for value in _numbers(draws.ssi)))
        filters = None
        if banks:
            joined = (torch.cat(values, dim=1).detach() for values in zip(*banks, strict=True))
            center_hz, width_hz, taps, gain_db = joined
            filters = ops.notch_bank(center_hz, width_hz, taps, gain_db, **self._design(x))
        drawn = (draws.isd_factor, draws.ssi_noise, draws.snr_db)
        y = self._run(x, filters, lengths, None, *(None if value is None else value.detach() for value in drawn))
        return y if batched else y[0]

    def _notches(self) -> dict[str, Any]:
        """What `reference.notch_draws` takes beside the seeds: LnL's filters, SSI's after them."""
        c, steps = self.config, reference.STEPS[self.config.algo]
        filters = [*(range(c.n_f) if "lnl" in steps else ()), *((reference.SSI_FILTER,) if "ssi" in steps else ())]
        bias = [i != 0 and i != reference.SSI_FILTER for i in filters]
        return {
            "filters": filters,
            "min_gain_db": [float(c.min_g - b * c.min_bias) for b in bias],
            "max_gain_db": [float(c.max_g - b * c.max_bias) for b in bias],
            "num_bands": c.n_bands,
            "min_center_hz": float(c.min_f),
            "max_center_hz": float(c.max_f),
            "min_width_hz": float(c.min_bw),
            "max_width_hz": float(c.max_bw),
            "min_taps": float(c.min_coeff),
            "max_taps": float(c.max_coeff),
        }

    def _design(self, x: Tensor) -> dict[str, Any]:
        """What `reference.notch_bank` takes beside the notches, for waveforms like x."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {"sample_rate": float(self.config.sample_rate), "num_taps": self.config.num_taps, "dtype": wide}

    def _run(
        self,
        x: Tensor,
        filters: Tensor | None,
        lengths: Tensor | None,
        seeds: Tensor | None,
        factor: Tensor | None = None,
        noise: Tensor | None = None,
        snr_db: Tensor | None = None,
    ) -> Tensor:
        c = self.config
        if c.algo == 0:
            return reference.mask_padding(x, lengths)[1].clone()
        return ops.rawboost(
            x,
            filters,
            lengths,
            seeds,
            factor=factor,
            noise=noise,
            snr_db=snr_db,
            algo=c.algo,
            p=float(c.p),
            g_sd=float(c.g_sd),
            snr_min=float(c.snr_min),
            snr_max=float(c.snr_max),
        )

    def _check_input(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"`x` must be a float16, bfloat16, float32 or float64 tensor; found {found}")
        if x.dim() not in (1, 2):
            raise ValueError(f"`x` must be [B, T] or [T]; found {list(x.shape)}")
        batched = x.dim() == 2
        x = x if batched else x[None]
        if lengths is not None:
            lengths = _check_lengths(lengths if batched else _row(lengths), x.shape[0], x.shape[1], x.device)
        return x, lengths, batched

    def _check_draws(self, draws: RawBoostDraws, x: Tensor) -> None:
        c, (b, t), steps = self.config, x.shape, reference.STEPS[self.config.algo]
        shapes: dict[str, tuple[int, ...]] = {}
        if "lnl" in steps:
            shapes |= {f"lnl.{n}": (b, c.n_f, c.n_bands) for n in ("center_hz", "width_hz", "taps")} | {
                "lnl.gain_db": (b, c.n_f)
            }
        if "isd" in steps:
            shapes["isd_factor"] = (b, t)
        if "ssi" in steps:
            shapes |= {f"ssi.{n}": (b, c.n_bands) for n in ("center_hz", "width_hz", "taps")} | {
                "ssi.gain_db": (b,),
                "ssi_noise": (b, t),
                "snr_db": (b,),
            }
        for name, shape in shapes.items():
            value: Any = draws
            for part in name.split("."):
                value = None if value is None else getattr(value, part)
            if value is None:
                raise ValueError(f"algorithm {c.algo} needs `draws.{name}`; found None")
            if not isinstance(value, Tensor):
                raise TypeError(f"`draws.{name}` must be a tensor {list(shape)}; found {type(value).__name__}")
            if tuple(value.shape) != shape:
                raise ValueError(f"`draws.{name}` must be {list(shape)}; found {list(value.shape)}")
            if value.device != x.device:
                raise ValueError(f"`draws.{name}` must be on {x.device} like `x`; found {value.device}")
            if name.endswith("taps"):
                if value.dtype != torch.int64:
                    raise TypeError(f"`draws.{name}` must be int64; found {value.dtype}")
                longest = (c.num_taps - 1) // c.n_bands + 1
                if value.device.type != "cpu" or torch.compiler.is_compiling() or not value.numel():
                    continue
                if not bool(((value % 2 == 1) & (value >= 1) & (value <= longest)).all()):
                    raise ValueError(
                        f"`draws.{name}` must be odd and in [1, {longest}]; "
                        f"found values in [{int(value.min())}, {int(value.max())}]"
                    )

    def extra_repr(self) -> str:
        """Return the algorithm and sample rate, for ``repr``."""
        return f"algo={self.config.algo}, sample_rate={self.config.sample_rate}"


def _numbers(draws: Any) -> tuple[Tensor, ...]:
    return draws.center_hz, draws.width_hz, draws.taps, draws.gain_db


def _row(value: Any) -> Any:
    """Give a 0-d tensor, which belongs to one waveform [T], its batch axis."""
    return value.reshape(-1) if isinstance(value, Tensor) else value


def _check_seeds(seeds: Tensor, batch: int | None) -> Tensor:
    is_int64 = isinstance(seeds, Tensor) and seeds.dtype == torch.int64
    if is_int64 and seeds.dim() == 1 and (batch is None or seeds.shape[0] == batch):
        return seeds
    found = type(seeds).__name__
    if isinstance(seeds, Tensor):
        found = f"{str(seeds.dtype).removeprefix('torch.')} {list(seeds.shape)}"
    error = ValueError if is_int64 else TypeError
    raise error(f"`seeds` must be an int64 tensor [{'B' if batch is None else batch}]; found {found}")


def _check_lengths(lengths: Tensor, batch: int, num_samples: int, device: torch.device) -> Tensor:
    if (
        not isinstance(lengths, Tensor)
        or lengths.is_floating_point()
        or lengths.is_complex()
        or lengths.dtype == torch.bool
    ):
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"`lengths` must be an integer tensor [{batch}]; found {found}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"`lengths` must be [{batch}]; found {list(lengths.shape)}")
    # A graph of torch.compile reads no values.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > num_samples):
            raise ValueError(
                f"`lengths` must lie in [0, T] = [0, {num_samples}]; found [{int(lengths.min())}, {int(lengths.max())}]"
            )
        return to_device(lengths.to(torch.int64), device)
    # Nor would it do to read a device's: that would stall it.
    return lengths.to(device, torch.int64).clamp(0, num_samples)
