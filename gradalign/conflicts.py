"""The conflict analysis of dual-path training (arXiv 2509.20682): how often, when and where the views disagree.

A step is in conflict when the gradients of the clean and of the augmented view have a negative cosine. Training records
that cosine at every step; `layer_cosines` measures it for each layer on its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from gradalign import figures, ops
from gradalign._errors import DataError
from gradalign._files import atomic_path, write_text
from gradalign._parts import make_detector, make_loss, training_views
from gradalign.config import TrainConfig
from gradalign.report import Run, draw_conflicts, group_by_method, read_run, read_runs, share_negative
from gradalign.scoring import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerCosines:
    """The cosine between the two views' gradients per layer and step.

    ``names`` [L] are the modules that hold parameters, ``sizes`` [L] their number of parameters. ``layers`` float64
    [steps, L] holds the cosines of each layer, ``whole`` float64 [steps] the whole model's; NaN where a gradient is 0.
    """

    names: list[str]
    sizes: list[int]
    layers: np.ndarray
    whole: np.ndarray

    def shares(self) -> np.ndarray:
        """The share of steps in conflict per layer, float64 [L] in [0, 1]; NaN for a layer without gradients."""
        return np.array([share_negative(column) for column in self.layers.T])


def parameter_layers(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters by the module that holds them, in the model's order.

    >>> list(parameter_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))))
    ['0', '2']
    """
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0] or "(model)", []).append(parameter)
    return layers


def layer_cosines(
    model: nn.Module,
    views: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> LayerCosines:
    """Measure the cosines over steps of ``(clean [B, T], augmented [B, T], labels [B])``.

    Each view gets its own forward and backward pass. With an ``optimizer`` the model takes a plain step on the mean of
    both gradients after each measurement (conflicts while training), otherwise its weights stay as they are. Raises
    ValueError without a step.
    """
    layers = parameter_layers(model)
    parameters = [p for group in layers.values() for p in group]
    segments = [i for i, group in enumerate(layers.values()) for _ in group]
    grams = []
    for clean, augmented, labels in views:
        grads: list[Tensor] = []
        for view in (clean, augmented):
            found = torch.autograd.grad(loss(model(view), labels), parameters, allow_unused=True)
            grads += [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        grams.append(ops.gram(grads, 2, segments, len(layers)))
        if optimizer is not None:
            for i, parameter in enumerate(parameters):
                parameter.grad = (grads[i] + grads[len(parameters) + i]) / 2
            optimizer.step()
    if not grams:
        raise ValueError("expected at least one step to measure; found none")
    gram = torch.stack(grams).cpu().numpy()
    return LayerCosines(
        list(layers), [sum(p.numel() for p in group) for group in layers.values()], _cosine(gram), _cosine(gram.sum(1))
    )


def _cosine(gram: np.ndarray) -> np.ndarray:
    """Cosine of the first two paths of Gram matrices [..., 2, 2]: float64 [...]."""
    norms = np.sqrt(gram[..., 0, 0] * gram[..., 1, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norms > 0, gram[..., 0, 1] / norms, np.nan)


def measure(config: TrainConfig, steps: int, progress: bool = True) -> LayerCosines:
    """The cosines of the first ``steps`` steps of a plain training run (Adam on the mean of both gradients).

    Stops earlier where the configuration's epochs are over. Raises as `gradalign.trainer.train` does where data,
    audio or settings are not as expected.
    """
    from tqdm import tqdm

    torch.manual_seed(config.seed)
    model = make_detector(config).to(choose_device(config.device)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    views = (view for epoch in range(config.epochs) for view in training_views(config, epoch))
    bar = tqdm(islice(views, steps), total=steps, unit="step", desc="conflicts", disable=None if progress else True)
    return layer_cosines(model, bar, make_loss(config), optimizer=optimizer)


@dataclass(frozen=True)
class Analysis:
    """What is analysed: the recorded ``runs``, and per measured data folder its cosines."""

    runs: list[Run]
    measured: dict[str, LayerCosines] = field(default_factory=dict)


def find_runs(path: str | Path) -> list[Run]:
    """The runs of a run folder, or of a folder of them; none for a folder in corpus layout.

    Raises DataError for a folder that is none of these.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return [read_run(path)]
    if (path / "protocols").is_dir():
        return []
    try:
        return read_runs(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: expected a training run, a folder of runs, or a data folder with protocols/; found none of these"
        ) from None


def parameter_shares(run: Run) -> dict[str, float]:
    """The share of steps in conflict per parameter tensor, as the run recorded it; empty before it is finished."""
    path = run.folder / "parameters.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return {row["parameter"]: float(row["conflict_rate"]) for row in csv.DictReader(file)}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: expected the columns parameter, conflict_rate; found: {error!r}") from None


def summary(analysis: Analysis, top: int = 5) -> str:
    """The analysis as text: how many steps were in conflict, early and late, and where most."""
    lines = []
    for run in analysis.runs:
        if not len(run.cosines):
            lines.append(f"{run.name}: no steps recorded ({run.status}{f', {run.reason}' if run.reason else ''})")
            continue
        lines += _describe(run.name, run.cosines, parameter_shares(run), top)
    for name, found in analysis.measured.items():
        lines += _describe(name, found.whole, dict(zip(found.names, found.shares().tolist(), strict=True)), top)
    return "\n".join(lines)


def _describe(name: str, cosines: np.ndarray, layers: dict[str, float], top: int) -> list[str]:
    quarter = max(1, len(cosines) // 4)
    lines = [
        f"{name}: {share_negative(cosines):.1%} of {len(cosines)} steps in conflict "
        f"(first quarter {share_negative(cosines[:quarter]):.1%}, last {share_negative(cosines[-quarter:]):.1%}); "
        f"mean cosine {np.nanmean(cosines) if np.isfinite(cosines).any() else np.nan:+.3f}"
    ]
    ranked = sorted(((share, layer) for layer, share in layers.items() if share == share), reverse=True)
    if ranked and not ranked[0][0]:
        lines.append("  no step in conflict in any of its layers")
    elif ranked:
        lines.append("  most in conflict:  " + ", ".join(f"{layer} {share:.1%}" for share, layer in ranked[:top]))
        lines.append("  least in conflict: " + ", ".join(f"{layer} {share:.1%}" for share, layer in ranked[-top:]))
    return lines


def draw(analysis: Analysis) -> Figure:
    """One picture: cosines over time on top, below them the conflicts per parameter or layer."""
    groups = {m: [r for r in g if len(r.cosines)] for m, g in group_by_method(analysis.runs).items()}
    groups = {m: g for m, g in groups.items() if g}
    maps = _parameter_maps(groups)
    heights = ([3.4] if groups else []) + [4.6] * len(maps)
    for found in analysis.measured.values():
        heights += [3.0, 1.2 + 0.16 * len(found.names)]
    if not heights:
        raise DataError("expected at least one recorded or measured step; found none")
    with figures.styled():
        figure = figures.new_figure(max(11.0, 3.6 * len(groups)), sum(heights))
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0].tolist()
        if groups:
            draw_conflicts(groups, parts.pop(0))
        for names, shares in maps:
            axes = parts.pop(0).subplots()
            figures.draw_parameters(axes, names, shares)
            axes.set_title("Where the views disagree: mean over seeds, lowest to highest seed")
        for name, found in analysis.measured.items():
            axes = parts.pop(0).subplots()
            figures.draw_cosines(axes, [found.whole], "none")
            axes.set_title(f"{name}: {share_negative(found.whole):.1%} of {len(found.whole)} steps in conflict")
            axes.set_ylabel("cosine, whole model")
            axes = parts.pop(0).subplots()
            figures.draw_layers(axes, found.names, found.layers)
            axes.set_title("By layer, the model's input on top; red is conflict")
    return figure


def _parameter_maps(groups: dict[str, list[Run]]) -> list[tuple[list[str], dict[str, list[np.ndarray]]]]:
    """The runs' shares per parameter, (names, method -> one array per seed), one entry for each detector among them."""
    maps: dict[tuple[str, ...], dict[str, list[np.ndarray]]] = {}
    for method, group in groups.items():
        for run in group:
            if shares := parameter_shares(run):
                maps.setdefault(tuple(shares), {}).setdefault(method, []).append(np.array(list(shares.values())))
    return [(list(names), shares) for names, shares in maps.items()]


def write_analysis(analysis: Analysis, out: str | Path) -> list[Path]:
    """Write ``conflicts.png``, ``conflicts_steps.csv`` and ``conflicts_layers.csv``; returns their paths."""
    out = Path(out)
    picture = figures.to_bytes(draw(analysis), "png", dpi=110)
    steps: list[Sequence[object]] = [("run", "step", "cosine")]
    layers: list[Sequence[object]] = [("run", "layer", "conflict_share")]
    for run in analysis.runs:
        steps += [(run.name, i, _number(c)) for i, c in enumerate(run.cosines.tolist(), start=1)]
        layers += [(run.name, name, _number(share)) for name, share in parameter_shares(run).items()]
    for name, found in analysis.measured.items():
        steps += [(name, i, _number(c)) for i, c in enumerate(found.whole.tolist(), start=1)]
        layers += [(name, layer, _number(s)) for layer, s in zip(found.names, found.shares().tolist(), strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "conflicts.png", out / "conflicts_steps.csv", out / "conflicts_layers.csv"]
    with atomic_path(paths[0]) as temporary:
        temporary.write_bytes(picture)
    for path, rows in zip(paths[1:], (steps, layers), strict=True):
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(rows)
        write_text(path, table.getvalue())
    return paths


def _number(value: float) -> str:
    """A number for CSV; NaN is an empty entry."""
    return "" if value != value else f"{value:.9g}"
