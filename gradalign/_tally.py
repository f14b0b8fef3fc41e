"""What alignment saw, on the gradients' device: counts, cosines, and the method's state.

Nothing here waits for the device but `Tally.stats` and `Tally.dump`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """What alignment saw so far. Reading it waits for the device; the optimizer's step does not.

    Attributes:
        steps: aligned steps (two or more paths, all gradients finite).
        skipped: steps left out for a gradient, or for weights of a method, that were not finite.
        conflicts: aligned steps in which any two paths' gradients of the whole model had a negative cosine; excluded
            parameters do not count.
        cosine: float64 [K, K] on the CPU, cosines between the paths' gradients of the whole model, without excluded
            parameters, in the last step (NaN with a gradient that was not finite); None before the first, and after
            `load_state_dict`, as a state holds no cosines.
        groups: names of the groups of the scope, empty for scope "model" and "parameter".
        group_cosine, group_conflicts: float64 [S, K, K] and int64 [S], the same per group.
        parameter_cosine, parameter_conflicts: float64 [N, K, K] and int64 [N], the same per parameter in the order of
            ``param_groups``, in every scope.
    """

    steps: int
    skipped: int
    conflicts: int
    cosine: Tensor | None
    groups: tuple[str, ...]
    group_cosine: Tensor | None
    group_conflicts: Tensor | None
    parameter_cosine: Tensor | None
    parameter_conflicts: Tensor | None

    @property
    def conflict_rate(self) -> float:
        """Share of the aligned steps with a conflict; 0 before the first."""
        return self.conflicts / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        """One line: of the cosines, the mean over all pairs of paths in the last step. ``repr`` shows everything."""
        shown = f"steps={self.steps}, skipped={self.skipped}, conflict_rate={self.conflict_rate:.3g}"
        if self.cosine is not None:
            first, second = torch.triu_indices(len(self.cosine), len(self.cosine), 1)
            shown += f", last_mean_cosine={float(self.cosine[first, second].mean()):.3g}"
        return f"Stats({shown})"


@dataclass(eq=False)
class Segments:
    """The S segments of N parameters; each segment has one Gram matrix and one row of weights.

    Attributes:
        params: the parameters.
        of: each parameter's segment.
        names: the segments' names, [S]; empty where they are not groups of the user's.
        excluded: which segments' parameters are not aligned, [S].
    """

    params: list[Tensor]
    of: list[int]
    names: tuple[str, ...]
    excluded: list[bool]

    def __post_init__(self) -> None:
        self._apart = self.of == list(range(len(self)))
        self._member: Tensor | None = None
        self._mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.excluded)

    def sum(self, gram: Tensor) -> Tensor:
        """The segments' Gram matrices [S, K, K] from the parameters' [N, K, K], added up in a fixed order."""
        if self._apart:
            return gram
        if len(self) == 1:
            return gram.sum(0, keepdim=True)
        if self._member is None or self._member.device != gram.device:
            self._member = torch.nn.functional.one_hot(torch.tensor(self.of), len(self)).T.to(gram)
        return (self._member @ gram.flatten(1)).view(len(self), *gram.shape[1:])

    def whole(self, gram: Tensor) -> Tensor:
        """The Gram matrix [K, K] of all parameters that are aligned, from the parameters' [N, K, K]."""
        if not any(self.excluded):
            return gram.sum(0)
        sums = self.sum(gram)
        return torch.where(self.is_excluded(gram.device)[..., None], 0.0, sums).sum(0)

    def is_excluded(self, device: torch.device) -> Tensor:
        """``excluded`` as bool [S, 1] on a device, to which it is copied once."""
        if self._mask is None or self._mask.device != device:
            self._mask = torch.tensor(self.excluded, device=device)[:, None]
        return self._mask

    @classmethod
    def of_scope(
        cls, params: list[Tensor], scope: str, groups: dict[str, list[Tensor]], exclude: list[Tensor]
    ) -> Segments:
        """What `AlignedOptimizer`'s ``scope`` and ``exclude`` mean for these parameters.

        Raises:
            ValueError: if a group or ``exclude`` holds others.
        """
        excluded = {id(param) for param in exclude}
        index = {id(param): s for s, group in enumerate(groups.values()) for param in group}
        if unknown := len((excluded | set(index)) - {id(param) for param in params}):
            raise ValueError(
                f"`scope` must group, and `exclude` hold, parameters of the optimizer; found {unknown} of others"
            )
        if scope == "parameter":
            return cls(params, list(range(len(params))), (), [id(param) in excluded for param in params])
        rest = len(groups)
        last = rest + 1
        of = [last if id(param) in excluded else index.get(id(param), rest) for param in params]
        # An optimizer may get its first parameters later.
        num_segments = max(of, default=0) + 1
        names = (*groups, "rest", "excluded")[:num_segments] if groups else ()
        return cls(params, of, names, [s == last for s in range(num_segments)])


@dataclass(eq=False)
class Tally:
    """The running counts, the last step's Gram matrices and the method's state.

    Attributes:
        has_groups: whether conflicts are counted per segment too.
        has_targets: whether the method keeps targets (GradVac's rho).
        num_paths: K of the steps so far; None before the first.
        counters: int64 "steps", "skipped", "conflicts" [], "parameter_conflicts" [N] and "group_conflicts" [S];
            float64 "rho" [S, K, K].
        gram: float64 [N, K, K] of the last step.
    """

    has_groups: bool
    has_targets: bool
    num_paths: int | None = None
    counters: dict[str, Tensor] = field(default_factory=dict)
    gram: Tensor | None = None

    @property
    def names(self) -> set[str]:
        """The entries of `dump`."""
        return {"num_paths", *self._shapes(0, 0, 0)}

    def _shapes(self, num_paths: int, num_params: int, num_segments: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "steps": (),
            "skipped": (),
            "conflicts": (),
            "parameter_conflicts": (num_params,),
        }
        if self.has_groups:
            shapes["group_conflicts"] = (num_segments,)
        if self.has_targets:
            shapes["rho"] = (num_segments, num_paths, num_paths)
        return shapes

    def allocate(self, num_paths: int, segments: Segments, device: torch.device) -> dict[str, Tensor]:
        """The counters on a device: made on first use, made longer when parameters were added, otherwise the same
        tensors in every step.
        """
        for name, shape in self._shapes(num_paths, len(segments.params), len(segments)).items():
            old = self.counters.get(name)
            if old is None or old.shape != shape or old.device != device:
                new = torch.zeros(shape, dtype=_dtype(name), device=device)
                if old is not None:
                    new[: len(old)].copy_(old) if shape else new.copy_(old)
                self.counters[name] = new
        return self.counters

    def add(self, gram: Tensor, rho: Tensor | None, finite: Tensor, segments: Segments) -> None:
        """Keep a step's Gram matrices [N, K, K] and count it; where it is not ``finite``, a bool [], only count that it
        was skipped, and keep the old targets.
        """
        self.gram, self.num_paths = gram, gram.shape[-1]
        counters = self.allocate(self.num_paths, segments, gram.device)
        if rho is not None:
            counters["rho"].copy_(torch.where(finite, rho, counters["rho"]))
        counters["steps"] += finite
        counters["skipped"] += ~finite
        counters["conflicts"] += _conflicts(segments.whole(gram)) & finite
        counters["parameter_conflicts"] += _conflicts(gram) & finite
        if self.has_groups:
            counters["group_conflicts"] += _conflicts(segments.sum(gram)) & finite

    def cosine(self, segments: Segments) -> Tensor | None:
        """Cosines [K, K] of the whole model in the last step, on the device; None before the first."""
        self._grow(segments)
        return None if self.gram is None else _cosine(segments.whole(self.gram))

    def stats(self, segments: Segments) -> Stats:
        """A snapshot on the CPU."""
        cosine = self.cosine(segments)
        counters = {name: tensor.to("cpu", copy=True) for name, tensor in self.counters.items()}
        steps, skipped, conflicts = (
            int(counters[name]) if name in counters else 0 for name in ("steps", "skipped", "conflicts")
        )
        return Stats(
            steps=steps,
            skipped=skipped,
            conflicts=conflicts,
            cosine=None if cosine is None else cosine.cpu(),
            groups=segments.names,
            group_cosine=_cosine(segments.sum(self.gram)).cpu() if self.has_groups and self.gram is not None else None,
            group_conflicts=counters.get("group_conflicts"),
            parameter_cosine=None if self.gram is None else _cosine(self.gram).cpu(),
            parameter_conflicts=counters.get("parameter_conflicts"),
        )

    def dump(self, segments: Segments) -> dict[str, Any]:
        """What JSON can hold of it, exactly: all but the Gram matrices."""
        self._grow(segments)
        counters = {
            name: self.counters[name].tolist() if name in self.counters else [] for name in self._shapes(0, 0, 0)
        }
        return {"num_paths": self.num_paths, **counters}

    def load(self, dumped: dict[str, Any], segments: Segments, device: torch.device) -> Tally:
        """A tally like this one that holds what `dump` returned.

        Raises:
            ValueError: if that was for other parameters or segments.
        """
        num_paths = dumped["num_paths"]
        shapes = self._shapes(num_paths, len(segments.params), len(segments)) if num_paths else {}
        counters = {name: torch.tensor(dumped[name], dtype=_dtype(name), device=device) for name in shapes}
        found = {name: tuple(counter.shape) for name, counter in counters.items()}
        if found != shapes:
            raise ValueError(f"the state's 'alignment' must have the shapes {shapes}; found {found}")
        return Tally(self.has_groups, self.has_targets, num_paths, counters)

    def _grow(self, segments: Segments) -> None:
        """Make everything longer, where parameters were added since the last step."""
        if self.num_paths is None:
            return
        num_params = len(segments.params)
        if len(self.counters["parameter_conflicts"]) < num_params:
            self.allocate(self.num_paths, segments, self.counters["steps"].device)
        if self.gram is not None and len(self.gram) < num_params:
            added = self.gram.new_zeros(num_params - len(self.gram), self.num_paths, self.num_paths)
            self.gram = torch.cat([self.gram, added])


def _dtype(name: str) -> torch.dtype:
    return torch.float64 if name == "rho" else torch.int64


def _conflicts(gram: Tensor) -> Tensor:
    """Whether any two paths have a negative cosine: [..., K, K] to bool [...]."""
    return (gram < 0).flatten(-2).any(-1)


def _cosine(gram: Tensor) -> Tensor:
    """Cosines from inner products, 0 where a gradient is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return (gram / (norms[..., :, None] * norms[..., None, :]).clamp_min(1e-300)).clamp(-1.0, 1.0)
