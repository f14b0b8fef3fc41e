"""One op, several backends: how an op is declared and how the backend that serves a call is chosen.

Three questions stay apart. *Is the platform there?* (`Backend.available`: a built extension, an importable Triton.)
*Does it take these inputs?* (`Backend.supports`: device and dtypes.) *Which comes first?* (The order of `BACKENDS`;
`use_backends` restricts it.)
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# Public ops; their implementation below chooses a backend.
_public = torch.library.Library("gradalign", "DEF")
# Empty slots with the same schemas, filled by csrc for CPU and CUDA.
_native = torch.library.Library("gradalign_native", "DEF")

# First come, first asked.
BACKENDS = ("cuda", "triton", "cpp", "reference")
# Of waveforms and gradients.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The most paths that kernels take (kMaxPaths in csrc/weigh.h): the sums of K*(K+1)/2 pairs stay in registers.
MAX_PATHS = 8
_allowed: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("gradalign_backends", default=BACKENDS)
_ops: dict[str, Op] = {}


@contextmanager
def use_backends(*names: str) -> Iterator[None]:
    """Restrict every op inside the block to the named backends; a call that none of them can serve raises RuntimeError.

    A gradient is computed by those that its forward call was restricted to, wherever ``backward`` is called; code that
    torch.compile has made keeps the backends of its compilation.

    Args:
        names: one or more of "cuda", "triton", "cpp" and "reference".

    Raises:
        ValueError: for an unknown name, or none.

    >>> import torch, gradalign as ga
    >>> boost = ga.RawBoost(algo=5)
    >>> with ga.use_backends("reference"):
    ...     y = boost(torch.ones(2, 800), seeds=torch.tensor([1, 2]))
    >>> y.shape
    torch.Size([2, 800])
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(
            f"backends must be among {', '.join(BACKENDS)}; found {', '.join(map(repr, unknown)) or 'none'}"
        )
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    name: str
    run: Callable[..., Any]
    # Empty when the platform is there, else the reason why not.
    available: Callable[[], str]
    # Empty when these inputs are taken, else the reason why not; called with the op's own arguments.
    supports: Callable[..., str]


@dataclass(repr=False)
class Op:
    """An op: the reference function gives its schema, and is one of its backends."""

    reference: Callable[..., Any]
    mutates: tuple[str, ...] = ()
    fake: Callable[..., Any] | None = None
    # Raises for arguments that no backend may see: kernels do not check what the Python edge can.
    check: Callable[..., None] | None = None
    # How many paths the arguments have, of ops on gradients.
    num_paths: Callable[..., int] | None = None
    backends: dict[str, Backend] = field(default_factory=dict)
    differentiable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        functools.update_wrapper(self, self.reference)
        self.schema = torch.library.infer_schema(self.reference, mutates_args=self.mutates)
        _public.define(self.name + self.schema)
        _native.define(self.name + self.schema)
        _public.impl(self.name, self.dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gradalign::{self.name}", self.fake or self.reference, lib=_public)
        self.public = getattr(torch.ops.gradalign, self.name).default
        self.native = getattr(torch.ops.gradalign_native, self.name).default
        self.backend("reference", available=lambda: "", supports=lambda *_: "")(self.reference)
        _ops[self.name] = self

    def __repr__(self) -> str:
        return f"<op gradalign::{self.name}{self.schema}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.public(*args, **kwargs)
        if self.differentiable and has_tangent((*args, *kwargs.values())):
            # PyTorch would take the result for a constant.
            raise NotImplementedError(f"gradalign.{self.name} has no derivative in forward mode; use backward()")
        try:
            return self.public(*args, **kwargs)
        except RuntimeError as error:
            what = str(error).partition("\nPosition: ")[0]
            if what.startswith(f"gradalign::{self.name}() Expected a value of type"):
                # PyTorch goes on with the value itself, every element of every tensor.
                raise TypeError(f"{what} Arguments: {self.schema}") from None
            raise

    def differentiate(self, backward: Callable[..., Tensor]) -> None:
        """Make the first argument differentiable: ``backward(grad, *arguments)`` returns its gradient.

        The other arguments have none.
        """

        def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
            # The gradients of CUDA tensors are computed in another thread, where `use_backends` is not seen.
            ctx.allowed = _allowed.get()
            ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
            ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

        def run(ctx: Any, grad: Tensor) -> tuple:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if t else value for t, value in zip(ctx.is_tensor, ctx.plain, strict=True)]
            with use_backends(*ctx.allowed):
                return backward(grad, *args), *(None,) * (len(args) - 1)

        self.differentiable = True
        torch.library.register_autograd(f"gradalign::{self.name}", run, setup_context=save, lib=_public)

    def backend(
        self, name: str, available: Callable[[], str], supports: Callable[..., str]
    ) -> Callable[[Callable], Callable]:
        """Register a function of the reference's very signature as the backend ``name``; another signature raises
        TypeError.
        """

        def register(run: Callable) -> Callable:
            expected, found = (list(inspect.signature(f).parameters) for f in (self.reference, run))
            if expected != found:
                raise TypeError(f"backend {name!r} of op {self.name!r} must take {expected}; found {found}")
            self.backends[name] = Backend(name, run, available, supports)
            return run

        return register

    def native_backend(self, name: str, available: Callable[[], str], supports: Callable[..., str]) -> None:
        """Register the csrc kernel of this op as the backend ``name``."""
        self.backends[name] = Backend(name, self.native, available, supports)

    def why_not(self, name: str, *args: Any) -> str:
        """Return the reason why backend ``name`` does not serve these arguments, empty when it does; with no arguments,
        why it is not there at all.
        """
        backend = self.backends[name]
        return backend.available() or (backend.supports(*args) if args else "")

    def why_too_many(self, *args: Any) -> str:
        """Return why kernels do not take these arguments' number of paths, empty where they do."""
        found = 1 if self.num_paths is None else self.num_paths(*args)
        return f"takes up to {MAX_PATHS} paths, found {found}" if found > MAX_PATHS else ""

    def dispatch(self, *args: Any) -> Any:
        """Run the first allowed backend that takes these arguments."""
        if self.check is not None:
            self.check(*args)
        allowed = _allowed.get()
        for name in BACKENDS:
            if name in allowed and not self.why_not(name, *args):
                if name == "reference" and len(allowed) > 1 and first_tensor(args).is_cuda:
                    self._announce_fallback(args)
                return self.backends[name].run(*args)
        reasons = "; ".join(f"{name}: {self.why_not(name, *args)}" for name in allowed)
        raise RuntimeError(f"gradalign.{self.name}: none of the allowed backends can serve this call ({reasons})")

    def _announce_fallback(self, args: Sequence[Any]) -> None:
        reasons = "; ".join(f"{n}: {self.why_not(n, *args)}" for n in ("cuda", "triton") if self.why_not(n, *args))
        # One fixed place of origin: Python's default filter then shows each op's warning once.
        warnings.warn_explicit(
            f"gradalign.{self.name} runs its plain PyTorch reference on cuda ({reasons})",
            RuntimeWarning,
            __file__,
            1,
            registry=_announced,
        )


_announced: dict = {}


def tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among an op's arguments, which are tensors, lists of tensors and plain values."""
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            found.extend(arg)
    return found


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether one of an op's tensors carries a tangent of forward-mode differentiation."""
    return any(unpack_dual(value).tangent is not None for value in tensors(args))


def first_tensor(args: Sequence[Any]) -> Tensor:
    """Return the first of an op's tensors."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, Tensor):
            return first
    raise TypeError("an op needs at least one tensor")


def ops() -> dict[str, Op]:
    """Return the declared ops by name, in pipeline order."""
    return dict(_ops)
