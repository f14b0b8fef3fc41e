"""The conflict analysis of dual-path training (arXiv 2509.20682): how often, when and where the views disagree.

A step is in conflict when the gradients of the clean and of the augmented view have a negative cosine. Training records
that cosine at every step; `layer_cosines` measures it for each layer on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradalign import ops
from gradalign.report import share_negative


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
