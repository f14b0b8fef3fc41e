"""What is installed and what serves each op here: ``gradalign info``, ``python -m gradalign.info``."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap

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
    """Return the report as text: versions, devices, build facts, and which backends serve the ops and why the others do
    not.

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
    lines += [
        "  cuda:{}: {}, compute capability {}.{}".format(
            i, torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
        )
        for i in range(torch.cuda.device_count())
    ] or ["  cuda: none visible"]
    extension, not_there = _extension.load()
    lines += ["", "Extension gradalign._C"]
    lines += [f"  {not_there}"] if extension is None else _table({k: str(v) for k, v in extension.build_info().items()})
    lines += ["", "Ops (backends in the order they are tried)"]
    alike: dict[tuple[str, ...], list[str]] = {}
    for op in ops().values():
        alike.setdefault(tuple(op.why_not(name) for name in BACKENDS), []).append(op.name)
    for reasons, names in alike.items():
        lines += textwrap.wrap(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")
        why_not_by = dict(zip(BACKENDS, reasons, strict=True))
        lines.append(f"    {', '.join(name for name, reason in why_not_by.items() if not reason)}")
        lines += [f"    not {name}: {reason}" for name, reason in why_not_by.items() if reason]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
