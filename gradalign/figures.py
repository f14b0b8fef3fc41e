"""The pictures of a report: each function draws one panel on given axes; a method has one colour in all of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under every common colour blindness, and in grey.
_COLORS = {"none": "#404040", "pcgrad": "#0072B2", "gradvac": "#D55E00", "cagrad": "#009E73", "mean": "#CC79A7"}
_SPARE_COLORS = ("#E69F00", "#56B4E9", "#8a6d3b", "#7b5ea7")
CATEGORY_COLORS = (*_COLORS.values(), *_SPARE_COLORS)
"""For things that are not methods, in the order they come."""
_STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.hashsalt": "gradalign",
}
_DET_TICKS = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
_probit = np.vectorize(NormalDist().inv_cdf, otypes=[float])

Curves = Mapping[str, Sequence[np.ndarray]]
"""One entry per method; one float array per seed."""


def color(method: str) -> str:
    """The colour of a method, the same in every picture.

    >>> color("pcgrad")
    '#0072B2'
    """
    if method in _COLORS:
        return _COLORS[method]
    return _SPARE_COLORS[sum(method.encode()) % len(_SPARE_COLORS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches that needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    return Figure(figsize=(width, height), facecolor="white", layout=engine)


def to_bytes(figure: Figure, kind: str, dpi: int = 100) -> bytes:
    """The figure as a ``png`` or ``svg`` file; the same figure gives the same bytes."""
    out = io.BytesIO()
    with styled():
        figure.savefig(out, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def styled():
    """The style of every picture, as a context manager around making its axes."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def mean_and_range(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(mean, lowest, highest)`` over seeds, for as many epochs as every seed has: past the first stop, a mean would
    be over the survivors alone.

    >>> [a.tolist() for a in mean_and_range([np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0])])]
    [[2.0, 3.0], [1.0, 2.0], [3.0, 4.0]]
    """
    length = min(len(c) for c in curves)
    stacked = np.stack([np.asarray(c, dtype=float)[:length] for c in curves])
    return stacked.mean(axis=0), stacked.min(axis=0), stacked.max(axis=0)


def percent_from_zero(axes: Axes) -> None:
    """Let a vertical axis in percent run from 0 to at least 1: with nothing but zeros it would end at 0.055."""
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))


def _list_beside(axes: Axes, texts: Sequence[str], colors: Sequence[str]) -> None:
    """Texts one below the other, each in its colour, right of the axes, where nothing is drawn."""
    for i, (text, text_color) in enumerate(zip(texts, colors, strict=True)):
        axes.annotate(
            text,
            (1.0, 1.0),
            xycoords="axes fraction",
            xytext=(5, -15 * i),
            textcoords="offset points",
            va="top",
            color=text_color,
            fontweight="bold",
            annotation_clip=False,
        )


def label(axes: Axes, ends: Mapping[str, float]) -> None:
    """Write each method's name at the right edge beside its line's end, moved apart where they collide.

    ``ends`` are those of `draw_epochs`; the limits of the axes must be final.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[0]
    places = sorted(((float(to_axes.transform((x, y))[1]), name) for name, y in ends.items() if np.isfinite(y)))
    gap = 0.075
    heights = [min(max(h, 0.02), 0.98) for h, _ in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    if heights and heights[-1] > 1.0:
        heights[-1] = 1.0
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, name) in zip(heights, places, strict=True):
        axes.annotate(
            name,
            xy=(1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color(name),
            fontweight="bold",
            annotation_clip=False,
        )


def draw_epochs(
    axes: Axes, curves: Curves, *, best: Mapping[str, Sequence[int]] | None = None, dashed: bool = False
) -> dict[str, float]:
    """Curves against epochs: a thin line per seed, mean and lowest-to-highest band per method, labels at the right.

    ``best`` marks the best epoch (from 1) of each seed by a ring. ``dashed`` draws the means alone, dashed. Returns
    the height of each mean's end, for `label`.
    """
    ends = {}
    for method, seeds in curves.items():
        seeds = [np.asarray(c, dtype=float) for c in seeds if len(c)]
        if not seeds:
            continue
        mean, low, high = mean_and_range(seeds)
        epochs = np.arange(1, len(mean) + 1)
        if dashed:
            axes.plot(epochs, mean, color=color(method), linewidth=1.2, linestyle=(0, (3, 2)))
            continue
        if len(seeds) > 1:
            axes.fill_between(epochs, low, high, color=color(method), alpha=0.11, linewidth=0)
            for curve in seeds:
                axes.plot(np.arange(1, len(curve) + 1), curve, color=color(method), linewidth=0.7, alpha=0.45)
        axes.plot(epochs, mean, color=color(method), linewidth=2.2, marker="o" if len(mean) == 1 else None)
        for curve, epoch in zip(seeds, (best or {}).get(method, ()), strict=False):
            if epoch < 1:
                continue
            axes.plot([epoch], [curve[epoch - 1]], "o", color="white", markeredgecolor=color(method), markersize=5.5)
        ends[method] = float(mean[-1])
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.margins(x=0.02)
    return ends


def draw_det(
    axes: Axes,
    scores: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    texts: Mapping[str, str] | None = None,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Detection error trade-off on probit axes: a thin line per seed, bold the mean over seeds at each acceptance rate.

    ``scores`` holds per method one (false acceptance rates, miss rates) pair per seed, by ascending threshold;
    ``colors`` are those of `color` if not given.
    """
    colors = colors or {method: color(method) for method in scores}
    grid = np.linspace(_probit(0.0005), _probit(0.95), 400)
    lowest = 0.4
    for method, curves in scores.items():
        misses = []
        for accept, miss in curves:
            # A rate of 0 or 1 has no probit: the end of a curve is drawn where its neighbours are still visible.
            x, y = _probit(np.clip(accept, 1e-5, 1 - 1e-5)), _probit(np.clip(miss, 1e-5, 1 - 1e-5))
            axes.plot(x, y, color=colors[method], linewidth=0.7, alpha=0.45, drawstyle="steps-post")
            misses.append(np.interp(grid, x[::-1], y[::-1]))
            crossing = int(np.argmin(np.abs(accept - miss)))
            lowest = min(lowest, (accept[crossing] + miss[crossing]) / 2)
        if misses:
            axes.plot(grid, np.mean(misses, axis=0), color=colors[method], linewidth=2.2, solid_joinstyle="round")
    low = _DET_TICKS[max(0, int(np.searchsorted(_DET_TICKS, max(lowest, 1e-9) / 6)) - 1)]
    low, high = max(low, 0.001), 0.6 if lowest < 0.3 else 0.8
    ticks = _DET_TICKS[(low <= _DET_TICKS) & (high >= _DET_TICKS)]
    names = [f"{100 * t:g}" for t in ticks]
    axes.set_xticks(_probit(ticks), names)
    axes.set_yticks(_probit(ticks), names)
    axes.set_xlim(_probit(low), _probit(high))
    axes.set_ylim(_probit(low), _probit(high))
    axes.plot(axes.get_xlim(), axes.get_xlim(), color="#bbbbbb", linewidth=0.9, linestyle=":", zorder=0)
    axes.set_xlabel("spoofed speech accepted [%]")
    axes.set_ylabel("bona fide speech rejected [%]")
    axes.set_box_aspect(1)
    _list_beside(axes, [(texts or {}).get(m, m) for m in scores], [colors[m] for m in scores])


def draw_seeds(axes: Axes, values: Mapping[str, Mapping[str, float]]) -> None:
    """One column per method with a dot per seed, its mean as a bar; the same seed's dots are joined across methods.

    The mean in figures stands below the method's name, and the axis is as long as it takes to tell the seeds apart.
    """
    methods, means = list(values), {}
    for seed in dict.fromkeys(seed for by_seed in values.values() for seed in by_seed):
        points = [(i, values[m][seed]) for i, m in enumerate(methods) if seed in values[m]]
        axes.plot(*zip(*points, strict=True), color="#cccccc", linewidth=1.0, zorder=1)
    for i, method in enumerate(methods):
        heights = list(values[method].values())
        dots = axes.plot([i] * len(heights), heights, "o", color=color(method), markersize=6.5, alpha=0.85, zorder=3)
        dots[0].set_clip_on(False)
        means[method] = float(np.mean(heights)) if heights else np.nan
        axes.plot([i - 0.2, i + 0.2], [means[method]] * 2, color=color(method), linewidth=2.6, zorder=2)
    axes.set_xticks(range(len(methods)), [f"{m}\n{means[m]:.1f}" for m in methods])
    for text, method in zip(axes.get_xticklabels(), methods, strict=True):
        text.set_color(color(method))
        text.set_fontweight("bold")
    axes.set_xlim(-0.5, len(methods) - 0.5)
    every = [v for by_seed in values.values() for v in by_seed.values()] or [0.0]
    margin = max(0.5, 0.2 * (max(every) - min(every)))
    axes.set_ylim(max(0.0, min(every) - margin), max(every) + margin)
    axes.grid(axis="x", visible=False)


def draw_attacks(axes: Axes, values: Mapping[str, Mapping[str, Mapping[str, float]]], seen: set[str]) -> None:
    """EER in percent by attack (rows): per method its mean as a dot, lowest to highest seed as a line.

    ``values`` is method -> attack -> seed -> EER in percent. Attacks of training come last and are marked "seen".
    """
    methods = list(values)
    attacks = list(dict.fromkeys(a for by_attack in values.values() for a in by_attack))
    average = {a: np.mean([v for m in methods for v in values[m].get(a, {}).values()] or [0]) for a in attacks}
    attacks.sort(key=lambda a: (a in seen, -average[a]))
    for i, method in enumerate(methods):
        offset = (i - (len(methods) - 1) / 2) * min(0.22, 0.7 / max(len(methods), 1))
        for row, attack in enumerate(attacks):
            points = list(values[method].get(attack, {}).values())
            if points:
                axes.plot([min(points), max(points)], [row + offset] * 2, color=color(method), linewidth=1.6, alpha=0.5)
                mean = float(np.mean(points))
                axes.plot([mean], [row + offset], "o", color=color(method), markersize=5.5, clip_on=False)
    axes.set_yticks(range(len(attacks)), [f"{a} (seen)" if a in seen else a for a in attacks])
    for text, attack in zip(axes.get_yticklabels(), attacks, strict=True):
        text.set_color("#999999" if attack in seen else "#222222")
    axes.set_ylim(len(attacks) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    axes.set_xlabel("EER [%]")
    _list_beside(axes, methods, [color(m) for m in methods])


def draw_cosines(axes: Axes, cosines: Sequence[np.ndarray], method: str, bins: int = 40) -> None:
    """The cosine between the two views' gradients against steps, over all seeds: median and the middle 80% per bin.

    Few steps are drawn as dots too, those in conflict in orange.
    """
    length = max((len(c) for c in cosines), default=0)
    edges = np.unique(np.linspace(0, length, min(bins, max(length, 1)) + 1).astype(int))
    bands, centers = [], []
    for start, stop in pairwise(edges):
        values = np.concatenate([c[start:stop] for c in cosines])
        values = values[np.isfinite(values)]
        if len(values):
            bands.append(np.quantile(values, [0.1, 0.5, 0.9]))
            centers.append((start + stop) / 2)
    axes.axhspan(-1, 0, color="#D55E00", alpha=0.06, linewidth=0)
    axes.axhline(0, color="#D55E00", linewidth=1.0)
    low, middle, high = np.array(bands).reshape(-1, 3).T
    axes.fill_between(centers, low, high, color=color(method), alpha=0.2, linewidth=0)
    axes.plot(centers, middle, color=color(method), linewidth=2)
    if sum(len(c) for c in cosines) <= 600:
        for curve in cosines:
            steps = np.arange(len(curve)) + 0.5
            below = curve < 0
            axes.plot(steps[~below], curve[~below], ".", color=color(method), markersize=3, alpha=0.5)
            axes.plot(steps[below], curve[below], ".", color="#D55E00", markersize=5)
    axes.set_xlabel("step")
    axes.locator_params("x", integer=True)
    axes.set_xlim(0, max(length, 1))
    axes.set_ylim(-1, 1)


def draw_layers(axes: Axes, names: Sequence[str], cosines: np.ndarray) -> None:
    """The cosine of every layer (rows, the model's input on top) against steps: red is conflict, blue agreement.

    ``cosines`` is float64 [steps, layers]; NaN (no gradient in one view) is left grey.
    """
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        cosines.T,
        aspect="auto",
        cmap="RdBu",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        extent=(0, len(cosines), len(names), 0),
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7 if len(names) > 30 else 9)
    axes.set_xlabel("step")
    axes.locator_params("x", integer=True)
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("cosine, clean against augmented")


def draw_parameters(axes: Axes, names: Sequence[str], shares: Curves) -> None:
    """The share of steps in conflict [%] per parameter tensor, from the model's input (left) to its output.

    ``shares`` holds per method one array [parameters] in [0, 1] per seed: mean as dots, lowest to highest as lines.
    """
    for method, seeds in shares.items():
        values = 100 * np.stack([np.asarray(s, dtype=float) for s in seeds])
        x = np.arange(len(names)) + 0.12 * (list(shares).index(method) - (len(shares) - 1) / 2)
        axes.vlines(x, values.min(axis=0), values.max(axis=0), color=color(method), linewidth=1.2, alpha=0.45)
        axes.plot(x, values.mean(axis=0), "o", color=color(method), markersize=3.5)
    modules = [name.split(".")[:-1] or [name] for name in names]
    blocks: dict[str, int] = {}
    # As fine as there is room for.
    for depth in (4, 3, 2, 1):
        blocks = {}
        for i, module in enumerate(modules):
            blocks.setdefault(".".join(module[:depth]), i)
        if len(blocks) <= 24:
            break
    axes.set_xticks(list(blocks.values()), list(blocks), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlim(-1, len(names))
    percent_from_zero(axes)
    axes.set_ylabel("steps in conflict [%]")
    axes.set_xlabel("parameter tensors from input to output, named where a block begins")
    _list_beside(axes, list(shares), [color(m) for m in shares])
