"""The CUDA kernels on the CPU: csrc/cuda/*.cu, compiled by g++ against a stand-in for the CUDA runtime, as the backend
"cuda" of every op, on CPU tensors.

`cuda_runtime.h` is what the sources see, `runtime.cpp` runs a grid's threads in an order that `schedule` chooses, and
`memory.cpp` puts every tensor between pages that nobody may touch. A second build of the same sources, slower, tells
`races.cpp` of every access to memory: functions take `races=True` for it.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from gradalign import _extension
from gradalign._dispatch import ops

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = "g++"
# What g++ does not take as it is.
REPLACED = (
    (r"STABLE_TORCH_LIBRARY_IMPL\(gradalign_native, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(GRADALIGN_NAMESPACE, CPU,"),
    (r"extern __shared__ ([\w:]+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(cuda_on_host::dynamic_memory());"),
)
# More than -O2 costs more seconds than it saves. -fno-gnu-unique keeps the library's variables its own.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fno-gnu-unique",
    "-fsanitize=bounds-strict,alignment",
    "-include",
    "cuda_runtime.h",
)
# For races.cpp: every access calls a function there. No loop becomes a memset, which would not; calls return to where
# they were, which says in which line that is.
RACES = (
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-loop-distribute-patterns",
    "-fno-optimize-sibling-calls",
    "-g1",
)
# Block after block and thread after thread, both backwards, and both mixed: a seed.
ORDERS = ("ascending", "descending", 1)

# The two builds, by whether they find races.
NAMES = {False: "gradalign_on_host", True: "gradalign_on_host_races"}
_on_host = {races: torch.library.Library(name, "DEF") for races, name in NAMES.items()}


def why_not() -> str:
    """The reason why the kernels cannot run here, empty when they can."""
    if sys.platform != "linux":
        return f"CUDA on the host needs Linux, found {sys.platform}"
    return "" if shutil.which(COMPILER) else f"CUDA on the host needs a C++ compiler; {COMPILER} is not there"


def _sources() -> dict[str, str]:
    """The sources by their place in the build, as g++ takes them."""
    texts = {}
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        text = path.read_text()
        for pattern, replacement in REPLACED:
            text = re.sub(pattern, replacement, text)
        name = str(path.relative_to(ROOT))
        assert "extern __shared__" not in text, f"{name}: a form of `extern __shared__` that REPLACED does not know"
        texts[name] = f'#line 1 "{name}"\n{text}'
    return texts


def _build(races: bool) -> Path:
    """Compile the library, unless one of the same sources is there; return where it lies."""
    sources = _sources()
    own = {path.name: path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp", ".cu")}
    abi = re.search(r'TORCH_ABI = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((sources, own, FLAGS, RACES, abi, version, torch.__version__)).encode()).hexdigest()[:16]
    library = ROOT / "build" / "cuda_on_host" / NAMES[races] / f"{key}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    lock = (library.parent / "lock").open("w")
    with lock, tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        # Other processes wait for this one's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return library
        folder = Path(name)
        for source, text in sources.items():
            path = folder / source
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        paths = [f"-I{HERE}", f"-I{folder / 'csrc'}", *(f"-isystem{path}" for path in include_paths("cpu"))]

        def compile_one(path: Path) -> Path:
            target = folder / f"{path.name}.o"
            flags = [*FLAGS, *(RACES if races and path.suffix == ".cu" else ())]
            defined = [f"-DGRADALIGN_TORCH_ABI={abi}", f"-DGRADALIGN_NAMESPACE={NAMES[races]}"]
            command = [COMPILER, *flags, *defined, *paths, "-x", "c++", "-c", path, "-o", target]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{path.name} does not compile for the CPU:\n{done.stderr}"
            return target

        kernels = [folder / source for source in sources if source.endswith(".cu")]
        # The longest first.
        kernels.sort(key=lambda path: -path.stat().st_size)
        objects = [*pool.map(compile_one, [*kernels, *(HERE / name for name in own if not name.endswith(".h"))])]
        # The runtime's first: what it shares with kernels, of the standard library, tells of no accesses then.
        objects.reverse()
        command = [COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *(f"-L{path}" for path in library_paths())]
        # Under its name once it is whole.
        whole = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-ltorch_cpu", "-lc10", "-ldl", "-o", whole], check=True)
        for old in library.parent.glob("*.so"):
            old.unlink(missing_ok=True)
        whole.replace(library)
    return library


def load(races: bool = False) -> ctypes.CDLL:
    """Build the library and load it: `torch.ops` then has every op under its name."""
    return _load(races)


@functools.cache
def _load(races: bool) -> ctypes.CDLL:
    for name, op in ops().items():
        _on_host[races].define(name + op.schema)
    path = _build(races)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.cuda_on_host_set_schedule.argtypes = [ctypes.c_int64]
    library.cuda_on_host_fence_memory.argtypes = [ctypes.c_bool]
    library.cuda_on_host_launched.restype = ctypes.c_char_p
    library.cuda_on_host_peak_bytes.restype = ctypes.c_uint64
    # A kernel of mistakes.cu: its name, whether it is right, blocks, bytes of shared memory, data, their number.
    numbers = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    library.cuda_on_host_run.argtypes = [ctypes.c_char_p, ctypes.c_bool, *numbers]
    library.cuda_on_host_run.restype = ctypes.c_char_p
    return library


@contextmanager
def as_backend(races: bool = False) -> Iterator[None]:
    """The backend "cuda" of every op runs on the host inside the block, and takes CPU tensors."""
    library, supports = load(races), _extension._supports
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "_supports", lambda device, args: supports("cpu", args))
        for name, op in ops().items():
            run = getattr(getattr(torch.ops, NAMES[races]), name).default
            patch.setitem(op.backends, "cuda", replace(op.backends["cuda"], run=run, available=lambda: ""))
        library.cuda_on_host_fence_memory(True)
        try:
            yield
        finally:
            library.cuda_on_host_fence_memory(False)


@contextmanager
def schedule(order: str | int, races: bool = False) -> Iterator[None]:
    """Run blocks and threads "ascending", "descending", or in the random order of a positive seed."""
    library = load(races)
    library.cuda_on_host_set_schedule({"ascending": 0, "descending": -1}.get(order, order))
    try:
        yield
    finally:
        library.cuda_on_host_set_schedule(0)


@contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Have so many multiprocessors inside the block."""
    library = load()
    before = library.cuda_on_host_set_multiprocessors(count)
    try:
        yield
    finally:
        library.cuda_on_host_set_multiprocessors(before)


def launched() -> list[str]:
    """The kernels that have been launched since the last call, as they are named in the sources."""
    names = load().cuda_on_host_launched().decode().split("\n")
    return [re.sub(r"<.*", "", name).rpartition("::")[2] for name in names if name]


def peak_bytes() -> int:
    """The most bytes of tensors at a time since the last call, beyond those that were there then."""
    return load().cuda_on_host_peak_bytes()
