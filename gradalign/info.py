"""What is installed and what serves each op here: ``gradalign info``, ``python -m gradalign.info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from gradalign import _extension
from gradalign._dispatch import BACKENDS, ops

_PACKAGES = ("gradalign", "torch", "triton", "numpy", "torchaudio", "soundfile")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter; "not installed" where one is not there.

    >>> sorted(versions())
    ['gradalign', 'numpy', 'python', 'soundfile', 'torch', 'torchaudio', 'triton']
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    # A CUDA build and a CPU build of PyTorch share the metadata's version, but not this one.
    found["torch"] = torch.__version__
    return found


def report() -> str:
    """Return the report as text: versions, devices, build facts and, per op, which backend serves it and why the others
    do not.

    >>> print(report().splitlines()[0])
    Versions
    """
    lines = [
        "Versions",
        *_table(versions()),
        "",
        "Devices",
        f"  cpu: {platform.machine()}, {torch.get_num_threads()} threads",
    ]
    lines += [f"  cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())] or [
        "  cuda: none visible"
    ]
    extension, why_not = _extension.load()
    lines += ["", "Extension gradalign._C"]
    lines += [f"  {why_not}"] if extension is None else _table({k: str(v) for k, v in extension.build_info().items()})
    lines += ["", "Ops (backends in the order they are tried)"]
    for op in ops().values():
        states = {name: op.why_not(name) for name in BACKENDS}
        lines.append(f"  {op.name}: {', '.join(name for name, reason in states.items() if not reason)}")
        lines += [f"    not {name}: {reason}" for name, reason in states.items() if reason]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
