"""`AlignedOptimizer`: any PyTorch optimizer, fed with the aligned gradients of several paths.

The way from a step to the kernels: `AlignedOptimizer.step` -> its first pre-hook, `align` -> `_merge` -> `ops.gram` ->
`alignment.weigh` -> `ops.combine_` -> the inner optimizer's step.
"""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradalign import _distributed, alignment, ops
from gradalign._distributed import Averaged, Averager, Gradients
from gradalign._tally import Segments, Stats, Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Mapping[str, Sequence[Tensor]] | Sequence[Sequence[Tensor]]


class AlignedOptimizer(Optimizer):
    """Wrap an optimizer so that each step takes the aligned gradient of K >= 2 paths.

    The paths are usually a clean and an augmented view of a batch, but may be any K losses. Run ``with opt.path():
    loss.backward()`` once per path, which frees each graph before the next is built (half the activation memory), or
    ``opt.backward([loss_1, loss_2])`` for losses of one joint graph, as published. Then ``opt.step()``. Gradients are
    taken from ``.grad`` by reference after each path, so K paths hold K - 1 gradient sets more than plain training, and
    nothing is copied or flattened. Merging averages the paths, it does not sum them (see `alignment`).

    It is a `torch.optim.Optimizer` that shares ``param_groups``, ``state`` and ``defaults`` with the optimizer it
    wraps (``opt.optimizer``): schedulers, hooks, closures, ``add_param_group``, ``state_dict``, pickling and deepcopy
    work as usual. (The entry "alignment" of the first parameter group belongs to `state_dict`.) Step hooks see the
    aligned gradients in ``.grad``. To clip or unscale them, call ``align()`` first (until then there is nothing to
    clip); with GradScaler always do, as it looks at ``.grad`` (the loss scale does not change the weights of
    PCGrad)::

        opt.align()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)

    Parameters that no path reaches, frozen ones among them, keep ``grad is None`` and are not moved, not even by
    weight decay. A parameter that only some paths reach is merged as `alignment.Method` says. A step without paths, or
    with one where every step has one, is the plain optimizer's, bit for bit.

    On several ranks, every rank takes the same steps, with the same number of paths, and all ranks' weights and
    ``stats`` are equal:

    - DistributedDataParallel with forward and backward inside ``path()`` needs nothing: DDP averages each path's
      gradients over the ranks during its backward, before they are aligned.
    - Anything else under DDP, and a model without it, needs ``process_group=torch.distributed.group.WORLD``. DDP
      averages the first backward after a forward only: the gradients of the second loss of ``backward(losses)``, or of
      the second of two forwards, stay each rank's own. With a process group the optimizer averages every path
      itself, from the moment it is finished, while the next one runs, whatever DDP does (``with model.no_sync():``
      spares the second averaging). It sends K + 1 halves of an all-reduce in place of K whole ones, each rank keeps and
      aligns its own part of each path's gradients, and a rank that has run out of batches enters ``with opt.path():
      pass``.
    - FSDP2 (``fully_shard``), its hybrid form and tensor parallelism need nothing: gradients that are DTensors are
      aligned where they lie, and one all-reduce per mesh dimension adds up the K x K matrices. Parameters that are no
      DTensors must have the same gradients on all ranks.

    As in plain training the average is over ranks: with batches of different sizes, multiply each rank's mean loss by
    its own share of the samples times the number of ranks.

    Args:
        optimizer: the optimizer to wrap; not one that evaluates a closure several times (LBFGS). For another
            method after some epochs, say, wrap ``opt.optimizer`` anew.
        method: a name in `alignment.METHODS` or a callable that maps a Gram matrix float64 [K, K] to weights [K].
        scope: "model" (one Gram matrix), "parameter" (one per parameter tensor), or groups of parameters, as a mapping
            from name to parameters or a sequence of sequences (one Gram matrix each; parameters in none of them form
            the group "rest").
        on_nonfinite: what happens when a path's gradient holds a NaN or an infinity. "skip" leaves out the step as a
            whole: parameters, the inner optimizer's state and the method's state stay as they are, and
            ``stats.skipped`` counts it. "raise" raises `FloatingPointError` naming path and parameter; it waits for
            the device in every step.
        exclude: parameters that are not aligned (of batch-norm, of a head, say): their gradients are averaged over the
            paths, as in training on the mean loss, and count in no Gram matrix.
        process_group: the ranks over which to average the paths' gradients, which must then not be DTensors. None where
            nothing has to be averaged or others do it (DDP, FSDP2). Like a process group, such an optimizer cannot
            be pickled; its state_dict can.
        **method_options: the method's options (`alignment.gradvac`, `alignment.cagrad`); ``seed`` for the order of
            projections of pcgrad and gradvac when K > 2.

    Skipping without the host: the test is ``isfinite`` of the Gram matrix, on the device. Inner optimizers made with
    ``fused=True`` (SGD, Adam, AdamW) take that flag as ``found_inf`` and skip on the device, so that a step never
    waits for it. Other optimizers cannot skip on the device: for them the flag is read on the host, one float per step
    (free on the CPU, one wait on a GPU); for fused ones too until each parameter has taken its first step, in which
    optimizers create their state. What is tested are the paths' gradients: a merge of float16 gradients that is more
    than float16 holds is not noticed.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, already wrapped, or one of FullyShardedDataParallel's parameters
            (FSDP1; take ``fully_shard``), if ``process_group`` is no process group, or for an unknown option.
        ValueError: for an unknown method, scope or ``on_nonfinite``, or a parameter twice in one group.

    >>> import torch
    >>> from gradalign import AlignedOptimizer
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> opt = AlignedOptimizer(torch.optim.SGD([w], lr=1.0), method="pcgrad")
    >>> for target in (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])):
    ...     with opt.path():
    ...         (w * target).sum().backward()
    >>> opt.step()
    >>> w.data, opt.stats.conflicts
    (tensor([-0.2500, -0.7500]), 1)
    """

    optimizer: Optimizer
    method: str | Callable[[Tensor], Tensor]
    scope: str
    on_nonfinite: str
    _groups: dict[str, list[Tensor]]
    _exclude: list[Tensor]
    _seed: int
    _options: dict[str, Any]
    process_group: ProcessGroup | None
    # Gradients of the finished paths, path after path; one entry per parameter. With a process group, on their way.
    _paths: list[Gradients | Averaged]
    _joint: bool
    _inside: bool
    # Set by align: 1.0 where the gradients now in .grad must not be applied.
    _nonfinite: Tensor | None
    # Indices of the parameters whose state exists in the inner optimizer because it has stepped them.
    _stepped: set[int]
    _tally: Tally

    def __init__(
        self,
        optimizer: Optimizer,
        method: str | Callable[[Tensor], Tensor] = "pcgrad",
        scope: str | Groups = "model",
        on_nonfinite: str = "skip",
        exclude: Iterable[Tensor] = (),
        process_group: ProcessGroup | None = None,
        **method_options: Any,
    ) -> None:
        if isinstance(optimizer, AlignedOptimizer):
            raise TypeError(
                "`optimizer` must be a plain torch.optim.Optimizer; found one already wrapped by AlignedOptimizer"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer; found {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "`optimizer` must take one gradient per step; found LBFGS, which evaluates its closure several times"
            )
        for group in optimizer.param_groups:
            # PyTorch only warns about it; it would be merged twice.
            if len({id(param) for param in group["params"]}) != len(group["params"]):
                raise ValueError("parameters must be distinct; found one twice in a parameter group of the optimizer")
        _distributed.check(optimizer, process_group)
        if isinstance(exclude, (Tensor, torch.nn.Module)):
            raise TypeError(
                "`exclude` must hold parameters, such as [layer.weight] or layer.parameters(); found "
                f"{type(exclude).__name__}"
            )
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"`on_nonfinite` must be 'skip' or 'raise'; found {on_nonfinite!r}")
        resolved = alignment.resolve(method)
        alignment.check_options(method, method_options, resolved.options)
        seed = method_options.pop("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"`seed` must be an integer of 64 bits; found {seed!r}")
        for name, value in (("scope", scope), ("exclude", exclude)):
            if not isinstance(value, Iterable):
                raise TypeError(f"`{name}` must hold parameters; found {value!r}")
        self.__setstate__(
            {
                "optimizer": optimizer,
                "method": method,
                "scope": scope if isinstance(scope, str) else "groups",
                "on_nonfinite": on_nonfinite,
                "process_group": process_group,
                "_seed": seed,
                "_options": method_options,
                "_groups": {} if isinstance(scope, str) else _named_groups(scope),
                "_exclude": list(exclude),
                "_paths": [],
                "_joint": False,
                "_inside": False,
                "_nonfinite": None,
                "_stepped": set(),
                "_tally": Tally(not isinstance(scope, str), "rho" in resolved.parameters),
            }
        )
        if isinstance(scope, str) and scope not in ("model", "parameter"):
            raise ValueError(f"`scope` must be 'model', 'parameter' or groups of parameters; found {scope!r}")
        if bad := {type(param).__name__ for param in self._exclude if not isinstance(param, Tensor)}:
            raise TypeError(f"`exclude` must hold parameters; found {', '.join(sorted(bad))}")
        excluded = {id(param) for param in self._exclude}
        if both := [name for name, group in self._groups.items() if excluded & {id(param) for param in group}]:
            raise ValueError(f"`exclude` must hold no parameter of a group; found some of {', '.join(both)}")
        self._segments()
        # The place that `state_dict` fills in: torch.distributed.checkpoint restores the settings that groups have.
        optimizer.param_groups[0]["alignment"] = ""
        if method_options:
            # An option's value fails here, not in the first step.
            alignment.solve(torch.eye(2, dtype=torch.float64), resolved, **method_options)

    # ---- the usual optimizer ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # With paths that are not aligned, GradScaler is to get as far as `step`, whose error says what to call.
        return bool(self._paths) or getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Creates the hook tables, as for any unpickled optimizer. Hooks on the state are the wrapped optimizer's,
        # which saves and loads it.
        super().__setstate__(state)
        self.__dict__.update({name: table for name, table in vars(self.optimizer).items() if "state_dict" in name})
        self._fields = tuple(state)
        self._known_segments: Segments | None = None
        self._shards = _distributed.Shards()
        group = self.process_group
        self._averager = Averager(group) if group is not None and _distributed.num_ranks(group) > 1 else None
        self._method = alignment.resolve(self.method)
        self.register_step_pre_hook(_align_first)

    def __repr__(self) -> str:
        return f"AlignedOptimizer(method={self._label!r}, scope={self._scope_label!r}, optimizer={self.optimizer!r})"

    @property
    def _label(self) -> str:
        return alignment.label(self.method)

    @property
    def _scope_label(self) -> str:
        return f"groups {', '.join(self._groups)}" if self._groups else self.scope

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer; between two paths of one step it raises RuntimeError."""
        if self._paths or self._inside:
            raise RuntimeError(
                f"parameters can be added before the first path or after step(); found {len(self._paths)} paths"
            )
        self.optimizer.add_param_group(param_group)

    # torch.compile of a whole training step leaves out what changes the optimizer: Dynamo cannot trace that. As in
    # torch.optim; torch.compiler.disable would make `import gradalign` load Dynamo.
    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients and forget the paths of an unfinished step (with a warning, where there are any).

        Gradients become None even with ``set_to_none=False``: a path takes over what it finds in ``.grad``.
        """
        if self._paths:
            warnings.warn(
                f"zero_grad() dropped the gradients of {len(self._paths)} finished path(s) that no step has used: "
                "call it once per step, before the first path",
                # The caller's line, beyond the two frames of the decorator.
                stacklevel=4,
            )
        self._paths, self._joint, self._nonfinite = [], False, None
        self.optimizer.zero_grad(set_to_none=True)

    # ---- paths ----

    @torch._disable_dynamo
    @contextmanager
    def path(self, index: int | None = None) -> Iterator[None]:
        """Collect the gradients of one path: call ``loss.backward()`` inside, several times to accumulate.

        Each block since ``zero_grad()`` or ``step()`` is one path (the model's own ``zero_grad`` forgets none). If the
        block raises, its gradients are dropped, those of earlier paths are kept, and the path can be tried again.

        With ``index``, 0 for the first path, a block accumulates into a path that is there already. So micro-batches
        may come one after the other, each with all of its views: ``with opt.path(k)`` for view k. If such a second
        block raises, all paths of the step are dropped.

        Raises:
            RuntimeError: inside another path, after ``backward(losses)`` in the same step, if gradients were left in
                ``.grad``, or if nothing in the block called ``backward`` (with ``process_group``: on no rank, and then
                in `step`).
            ValueError: for an ``index`` that leaves out a path.
            TypeError: for an ``index`` that is no integer.
        """
        self._begin("path()")
        if index is not None and not isinstance(index, int):
            raise TypeError(f"`index` must be an integer, or None for a new path; found {index!r}")
        if self._joint:
            raise RuntimeError(
                "a step takes either backward(losses) or path() blocks; found a path() after backward(losses)"
            )
        k = len(self._paths) if index is None else index
        if not 0 <= k <= len(self._paths):
            raise ValueError(f"`index` must be in [0, {len(self._paths)}], or None for a new path; found {index}")
        before = self._paths[k] if k < len(self._paths) else None
        self._inside = True
        try:
            marks = self._restore(before)
            yield
            self._paths[k : k + 1] = [self._send(self._take(f"path {k}", marks), k, before)]
        except BaseException:
            self._drop()
            if before is not None:
                self._paths = []
            raise
        finally:
            self._inside = False

    @torch._disable_dynamo
    def backward(self, losses: Sequence[Tensor]) -> None:
        """Differentiate one scalar loss per path; the losses may share their graph.

        Called again before ``step()``, it accumulates path by path. Through a model compiled with inductor it needs
        ``torch._functorch.config.donated_buffer = False``, as any second backward through one forward does.

        Raises:
            TypeError: if ``losses`` is no sequence of tensors.
            ValueError: for an empty list, a loss that is not a scalar or needs no gradient, or a number of losses
                other than in the calls and steps before.
            RuntimeError: inside or after a ``path()``, if gradients were left in ``.grad``, or on several ranks without
                ``process_group``, unless all parameters are DTensors.
        """
        self._begin("backward(losses)")
        if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
            raise TypeError(
                f"`losses` must be a sequence of scalar tensors, one per path; found {type(losses).__name__}"
            )
        losses = list(losses)
        for k, loss in enumerate(losses):
            if not isinstance(loss, Tensor):
                raise TypeError(f"losses[{k}] must be a scalar tensor; found {type(loss).__name__}")
        if self._paths and not self._joint:
            raise RuntimeError(
                "a step takes either backward(losses) or path() blocks; found backward(losses) after a path()"
            )
        if not losses:
            raise ValueError("`losses` must hold one loss per path; found none")
        for k, loss in enumerate(losses):
            if loss.numel() != 1:
                raise ValueError(f"losses[{k}] must be a scalar; found shape {list(loss.shape)}")
            if not loss.requires_grad:
                raise ValueError(f"losses[{k}] must require a gradient; found one that does not")
        expected = len(self._paths) or self._tally.num_paths
        if expected and len(losses) != expected:
            raise ValueError(f"`losses` must hold {expected} losses, one per path as before; found {len(losses)}")
        if len(losses) > 1 and self.process_group is None and _distributed.has_replicas(self._params()):
            raise RuntimeError(
                "backward(losses) on several ranks needs `process_group` (torch.distributed.group.WORLD, say): DDP "
                "averages in the first backward through a forward only; found None (path() does not need it)"
            )
        paths, self._joint = self._paths, True
        self._paths = []
        try:
            for k, loss in enumerate(losses):
                before = paths[k] if paths else None
                marks = self._restore(before)
                loss.backward(retain_graph=k + 1 < len(losses))
                self._paths.append(self._send(self._take(f"losses[{k}]", marks), k, before))
        except BaseException:
            self._drop()
            self._paths, self._joint = [], False
            raise

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _begin(self, what: str) -> None:
        if "_fields" not in vars(self):
            # It would keep the paths where the step does not look for them.
            raise RuntimeError(
                f"{what} must be called on the AlignedOptimizer itself; found {type(self).__name__}, which wraps it "
                "(Lightning: self.optimizers().optimizer)"
            )
        if self._inside:
            raise RuntimeError(f"{what} cannot be called inside path(); found an open path {len(self._paths)}")
        params = self._params()
        self._check_count(params)
        for n, param in enumerate(params):
            if param.grad is not None:
                raise RuntimeError(
                    f"{what}: zero_grad() must first clear to None what was not accumulated in a path; "
                    f"found .grad of {self._name(n)}"
                )

    def _take(self, source: str, marks: list[Any]) -> Gradients:
        """Move all gradients out of ``.grad``, by reference; ``marks`` are those that `_restore` has left there."""
        params = self._params()
        self._check_count(params)
        grads: Gradients = [param.grad for param in params]
        places: set[int] = set()
        for n, grad in enumerate(grads):
            if grad is None:
                continue
            if grad.layout != torch.strided:
                layout = str(grad.layout).removeprefix("torch.")
                raise TypeError(
                    f"gradients must be dense; found {layout} in {self._name(n)} (nn.Embedding: use sparse=False)"
                )
            if not grad.is_floating_point():
                dtype = str(grad.dtype).removeprefix("torch.")
                raise TypeError(f"gradients must be real floating-point numbers; found {dtype} in {self._name(n)}")
            # Autograd may give two parameters views of one gradient (that of a.view(2, 2) + b.view(2, 2), say).
            place = getattr(grad, "_local_tensor", grad).data_ptr()
            if place and place in places:
                grads[n] = grad.clone()
            places.add(place)
        devices = {grad.device for grad in grads if grad is not None}
        if len(devices) > 1:
            raise ValueError(f"all gradients must be on one device; found {', '.join(sorted(map(str, devices)))}")
        # One rank of several may have run out of batches.
        if self._averager is None and all(_mark(grad) == mark for grad, mark in zip(grads, marks, strict=False)):
            raise RuntimeError(
                f"{source} must give a gradient to at least one parameter; found none (was backward() called?)"
            )
        self._drop()
        return grads

    def _restore(self, before: Gradients | Averaged | None) -> list[Any]:
        """Put back what a path has collected so far, for its next backward to accumulate into; return its marks."""
        params = self._params()
        if not isinstance(before, list):
            return [None] * len(params)
        for param, grad in zip(params, before, strict=True):
            param.grad = grad
        return [_mark(grad) for grad in before]

    def _send(self, grads: Gradients, k: int, before: Gradients | Averaged | None) -> Gradients | Averaged:
        """What is kept of path k after a backward; ``before`` is what earlier ones have left of it."""
        if self._averager is None:
            if _distributed.has_dtensors(grads):
                return _distributed.settled(grads)
            _distributed.check_apart(grads, k, self._paths, self._name)
            return grads
        sent = self._averager.start(self._params(), grads, first=not self._paths and before is None)
        if isinstance(before, Averaged):
            before.add(sent)
            return before
        return sent

    def _check_count(self, params: list[Tensor]) -> None:
        if self._paths and len(params) != len(self._paths[0]):
            raise RuntimeError(
                f"the paths of a step share their parameters, {len(self._paths[0])} so far; found {len(params)}"
            )

    def _drop(self) -> None:
        for param in self._params():
            param.grad = None

    def _name(self, index: int) -> str:
        """A parameter's name where the optimizer knows it (made from named_parameters), else its position and shape."""
        for i, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                if "param_names" in group:
                    return f"parameter {group['param_names'][index]!r}"
                return f"parameter {index} of group {i}, shape {list(group['params'][index].shape)}"
            index -= len(group["params"])
        raise IndexError(index)

    # ---- one step ----

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Align the paths' gradients and take the inner optimizer's step; without paths, just that step.

        ``closure``, if given, is called once, with gradients enabled; it hands over the paths and its value is
        returned.

        Raises:
            RuntimeError: inside a path, if gradients were accumulated outside of the paths, or for a number of paths
                other than in the steps before.
            FloatingPointError: for a gradient or weights that are not finite, with ``on_nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # The pre-hook has aligned what was there; these are the closure's paths.
        self.align()
        # GradScaler sets grad_scale and found_inf on an optimizer that can take them (a fused one).
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is not None and not isinstance(found, Tensor):
            # What it says where it has seen no gradient.
            self._refuse("call align() before scaler.unscale_(optimizer); found that it has seen no gradients")
        flags = [flag for flag in (self._nonfinite, found) if flag is not None]
        self._nonfinite = None
        if not flags:
            self.optimizer.step()
            return loss
        skip = flags[0] if len(flags) == 1 else torch.maximum(flags[0], flags[1].to(flags[0].device))
        active = {n for n, param in enumerate(self._params()) if param.grad is not None}
        if not (self._step_supports_amp_scaling and active <= self._stepped):
            if skip.item():
                return loss
            self._stepped |= active
        if not self._step_supports_amp_scaling:
            self.optimizer.step()
            return loss
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, skip  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        return loss

    @torch._disable_dynamo
    @torch.no_grad()
    def align(self) -> None:
        """Merge the finished paths' gradients into ``.grad``, in place of the first path's.

        `step` does it if it is not done yet; without paths, nothing happens. Raises as `step` does.
        """
        if self._inside:
            raise RuntimeError(f"step() and align() come after the paths; found an open path {len(self._paths)}")
        if not self._paths:
            return
        if hasattr(self, "grad_scale"):
            self._refuse("call align() before scaler.step(optimizer); found paths that are not aligned")
        self._begin("align()")
        expected = self._tally.num_paths or len(self._paths)
        if len(self._paths) != expected:
            raise RuntimeError(f"a step takes {expected} paths, as the steps before; found {len(self._paths)}")
        paths, self._paths, self._joint, self._nonfinite = self._paths, [], False, None
        params = self._params()
        # Whole gradients, or this rank's parts of their averages.
        found = [path.wait() if isinstance(path, Averaged) else path for path in paths]
        merged: Gradients = [next((g for g in grads if g is not None), None) for grads in zip(*found, strict=True)]
        if len(found) > 1:
            self._merge(found, merged)
        if isinstance(paths[0], Averaged):
            merged = paths[0].gather(merged)
        for param, grad in zip(params, merged, strict=True):
            param.grad = grad

    def _refuse(self, problem: str) -> NoReturn:
        """Raise for a wrong use of GradScaler, which leaves what it set behind when a step raises."""
        for name in ("grad_scale", "found_inf"):
            vars(self).pop(name, None)
        raise RuntimeError(f"with GradScaler, {problem}")

    def _merge(self, paths: list[Gradients], merged: Gradients) -> None:
        """Combine the paths' gradients into ``merged``, the first that each parameter has, and count. No host sync."""
        subsets, segments = _by_subset(paths), self._segments()
        if self._takes_one_pass(subsets, merged):
            gram, rho = self._merge_in_one_pass(paths, segments)
            finite = self._check_gram(gram)
        else:
            gram, rho, finite = self._merge_in_turn(paths, merged, subsets, segments)
        self._nonfinite = (~finite).float()
        self._tally.add(gram, rho, finite, segments)

    def _takes_one_pass(self, subsets: dict[tuple[int, ...], list[int]], merged: Gradients) -> bool:
        """Whether each parameter is merged on its own, by a method that has kernels, all paths reach all parameters,
        and nothing is to be added up over processes. `ops.align_` on a GPU is not known to be faster than the three ops
        in turn (benchmarks/NOTES.md).
        """
        return (
            self.scope == "parameter"
            and bool(self._method.name)
            and len(subsets) == 1
            and all(grad is not None and grad.device.type == "cpu" for grad in merged)
            and not (self._exclude or self._averager is not None or _distributed.has_dtensors(merged))
        )

    def _merge_in_one_pass(self, paths: list[Gradients], segments: Segments) -> tuple[Tensor, Tensor | None]:
        """Merge each parameter while its gradients are in the cache; return Gram matrices and GradVac's new targets."""
        first, *others = paths
        some = next(grad for grad in first if grad is not None)
        counters = self._tally.allocate(len(paths), segments, some.device)
        options = self._weigh_options(len(paths))
        gram, rho = ops.align_(
            first,
            [grad for grads in others for grad in grads],
            self._method.name,
            counters.get("rho"),
            options.get("order"),
            *alignment.kernel_options(options),
        )
        return gram, rho if "rho" in counters else None

    def _merge_in_turn(
        self,
        paths: list[Gradients],
        merged: Gradients,
        subsets: dict[tuple[int, ...], list[int]],
        segments: Segments,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gram matrices, weights, combination; return what `Tally.add` takes."""
        num_paths, complete = len(paths), tuple(range(len(paths)))
        if sharded := _distributed.has_dtensors(merged):
            paths = [_distributed.local(grads) for grads in paths]
        # One Gram matrix per parameter costs no more than one in all, and gives the map of conflicts.
        grams = {}
        for present, members in subsets.items():
            grads = [paths[k][n] for k in present for n in members]
            found = ops.gram(grads, num_paths=len(present), segments=members, num_segments=len(merged))
            grams[present] = _embed(found, present, num_paths)
        if self._averager is not None:
            grams = {present: self._averager.sum(gram) for present, gram in grams.items()}
        elif sharded:
            grams = {present: self._shards.sum(gram, merged) for present, gram in grams.items()}
        gram = reduce(torch.add, grams.values())
        finite = self._check_gram(gram)

        counters = self._tally.allocate(num_paths, segments, gram.device)
        weighed = grams.get(complete, torch.zeros_like(gram)) if self._method.partial == "apart" else gram
        options = self._weigh_options(num_paths)
        weights, rho = alignment.weigh(segments.sum(weighed), self._method, counters.get("rho"), **options)
        # A method of the user's may find no weights for finite gradients.
        healthy = weights.isfinite().all()
        if self.on_nonfinite == "raise" and not healthy.item():
            raise FloatingPointError(f"weights must be finite; found {weights.tolist()} from {self._label}")

        for present, members in subsets.items():
            chosen = weights if present == complete else self._method.partial_weights(weights, present)
            if self._exclude:
                chosen = torch.where(segments.is_excluded(chosen.device), 1.0 / num_paths, chosen)
            first, *others = ([paths[k][n] for n in members] for k in present)
            further = [grad for grads in others for grad in grads]
            ops.combine_(first, further, weights=chosen, segments=[segments.of[n] for n in members])
        return gram, rho, finite & healthy

    def _check_gram(self, gram: Tensor) -> Tensor:
        """Whether all gradients are finite, bool []; with ``on_nonfinite="raise"`` an error where they are not."""
        finite = gram.isfinite().all()
        if self.on_nonfinite == "raise" and not finite.item():
            raise FloatingPointError(self._describe_nonfinite(gram))
        return finite

    def _weigh_options(self, num_paths: int) -> dict[str, Any]:
        options = dict(self._options)
        if "order" in self._method.parameters and num_paths > 2:
            options["order"] = alignment.random_order(num_paths, self._seed, self._tally.counters["steps"])
        return options

    def _segments(self) -> Segments:
        """The scope's segments; made anew where the parameters are no longer the same."""
        params, known = self._params(), self._known_segments
        if known is None or len(known.params) != len(params) or any(map(operator.is_not, known.params, params)):
            self._known_segments = known = Segments.of_scope(params, self.scope, self._groups, self._exclude)
        return known

    def _describe_nonfinite(self, gram: Tensor) -> str:
        bad = ~gram.diagonal(dim1=1, dim2=2).isfinite()
        n, k = bad.nonzero()[0].tolist()
        more = int(bad.sum()) - 1
        return f"gradients must be finite; found NaN or infinity in path {k}, {self._name(n)}" + (
            f", and {more} more" if more else ""
        )

    # ---- what it saw, and its state ----

    @property
    def cosine(self) -> Tensor | None:
        """Cosines between the paths' gradients of the whole model in the last step; None before the first.

        Float64 [K, K] on the gradients' device, without a host sync.
        """
        return self._tally.cosine(self._segments())

    @property
    def stats(self) -> Stats:
        """A snapshot of what alignment saw; reading it waits for the device."""
        return self._tally.stats(self._segments())

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state_dict; its first parameter group holds the method's state and the counts.

        They are one JSON string under the key "alignment" (exact for float64; reading them waits for the device), so
        that `torch.distributed.checkpoint` carries them like any setting of a group, also into an optimizer that has
        not seen a path yet. `torch.load` reads it with ``weights_only=True``.
        """
        own = {"method": self._label, "scope": self._scope_label, **self._tally.dump(self._segments())}
        state = self.optimizer.state_dict()
        first, *rest = state["param_groups"]
        return {**state, "param_groups": [{**first, "alignment": json.dumps(own)}, *rest]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing is changed if it does not fit.

        Raises:
            ValueError: if it was saved by a plain optimizer, with another method or scope, for other parameters, or
                has missing or unknown entries.
            RuntimeError: inside a path.
        """
        if self._inside:
            raise RuntimeError(f"load_state_dict() comes between steps; found an open path {len(self._paths)}")
        groups = [dict(group) for group in state_dict.get("param_groups", ())]
        saved = groups[0].get("alignment") if groups else None
        if not saved or not isinstance(saved, str):
            raise ValueError(
                "the state's first parameter group must hold an 'alignment' entry; found none (plain states load into "
                "`opt.optimizer`)"
            )
        try:
            own = json.loads(saved)
        except json.JSONDecodeError:
            own = None
        if not isinstance(own, dict):
            raise ValueError(f"the state's 'alignment' must be what state_dict() wrote; found {saved[:100]!r}")
        for name, expected in (("method", self._label), ("scope", self._scope_label)):
            if name in own and own[name] != expected:
                raise ValueError(f"the state must be of {name} {expected!r}; found {own[name]!r}")
        if set(own) != (expected_names := {"method", "scope", *self._tally.names}):
            raise ValueError(
                f"the state's 'alignment' must hold {', '.join(sorted(expected_names))}; found {', '.join(sorted(own))}"
            )
        tally = self._tally.load(own, self._segments(), self._params()[0].device)
        groups[0]["alignment"] = ""
        self.optimizer.load_state_dict({**state_dict, "param_groups": groups})
        self._tally, self._stepped = tally, set()
        self._paths, self._joint, self._nonfinite = [], False, None


def _align_first(optimizer: AlignedOptimizer, args: Any, kwargs: Any) -> None:
    """Step pre-hook: the hooks after it find the aligned gradients in .grad."""
    optimizer.align()


def _named_groups(groups: Groups) -> dict[str, list[Tensor]]:
    named = groups if isinstance(groups, Mapping) else {str(i): group for i, group in enumerate(groups)}
    for name, group in named.items():
        if isinstance(group, Tensor) or not isinstance(group, Iterable):
            raise TypeError(
                f"`scope` must map names to parameters, such as layer.parameters(); group {str(name)!r} is a "
                f"{type(group).__name__}"
            )
    found = {str(name): list(group) for name, group in named.items()}
    for name, group in found.items():
        if not group or not all(isinstance(param, Tensor) for param in group):
            kinds = ", ".join({type(param).__name__ for param in group}) or "none"
            raise ValueError(f"`scope` must map names to parameters; group {name!r} holds {kinds}")
    members = [id(param) for group in found.values() for param in group]
    if not found or len(set(members)) != len(members):
        problem = "a parameter twice" if found else "no group"
        raise ValueError(f"`scope` must be 'model', 'parameter' or groups of distinct parameters; found {problem}")
    return found


def _by_subset(paths: list[Gradients]) -> dict[tuple[int, ...], list[int]]:
    """The parameters' indices by the paths that reach them; usually all by all."""
    if all(grad is not None for path in paths for grad in path):
        return {tuple(range(len(paths))): list(range(len(paths[0])))}
    subsets: dict[tuple[int, ...], list[int]] = {}
    for n, grads in enumerate(zip(*paths, strict=True)):
        if present := tuple(k for k, grad in enumerate(grads) if grad is not None):
            subsets.setdefault(present, []).append(n)
    return subsets


def _mark(grad: Tensor | None) -> Any:
    """What a backward changes: the tensor, or its version where it accumulates in place (FSDP2: that of its part)."""
    if grad is not None and grad.is_inference():
        # It has no version: nothing equals this.
        return object()
    return None if grad is None else (id(grad), grad._version, getattr(grad, "_local_tensor", grad)._version)


def _embed(gram: Tensor, present: tuple[int, ...], num_paths: int) -> Tensor:
    """Gram matrices [N, M, M] of the paths in ``present``, as [N, K, K] with zeros for the other paths."""
    if len(present) == num_paths:
        return gram
    full = gram.new_zeros(len(gram), num_paths, num_paths)
    for a, i in enumerate(present):
        for b, j in enumerate(present):
            full[:, i, j] = gram[:, a, b]
    return full
