"""Build gradalign._C: the C++ kernels always, the CUDA kernels when nvcc and a CUDA build of PyTorch are there.

GRADALIGN_EXT=0   install without the extension (plain PyTorch and Triton only)
GRADALIGN_CUDA=0  leave the CUDA kernels out; GRADALIGN_CUDA=1 fails loudly when they cannot be built
TORCH_CUDA_ARCH_LIST  architectures, as for every PyTorch extension; default below
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
# PyTorch's stable ABI of 2.10: one build serves every later PyTorch.
TORCH_ABI = "0x020a000000000000"
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0+PTX"


def flag(name: str) -> bool | None:
    """Read a 0/1 environment variable; None when it is not set."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"gradalign: {name} must be 0 or 1; found {value!r}")
    return None if value in (None, "") else value == "1"


def cudart() -> Path | None:
    """Return CUDA's runtime library for the linker: the toolkit's, the distribution's, or the one PyTorch came with."""
    folders = [Path(CUDA_HOME, "lib64"), Path(CUDA_HOME, "lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    found = [path for folder in folders if (path := folder / "libcudart.so").exists()]
    return next(iter([*found, *Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcudart.so.*")]), None)


def cudart_folder() -> str:
    """Return a folder in which the linker finds libcudart.so: wheels have it under its full name only."""
    library = cudart()
    if library.name == "libcudart.so":
        return str(library.parent)
    folder = ROOT / "build" / "cudart"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libcudart.so").unlink(missing_ok=True)
    (folder / "libcudart.so").symlink_to(library)
    return str(folder)


def why_no_cuda() -> str:
    """Return the reason why the CUDA kernels cannot be built here, empty when they can."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if CUDA_HOME is None or not (nvcc := shutil.which("nvcc", path=f"{CUDA_HOME}/bin")):
        return "nvcc is not on the PATH and CUDA_HOME does not name a CUDA toolkit"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if not found or found[1] != torch.version.cuda.split(".")[0]:
        release = found[0] if found else "of an unknown version"
        return f"nvcc is {release}, PyTorch was built with CUDA {torch.version.cuda}"
    if (int(found[1]), int(found[2])) < (12, 1):
        # Kernel arguments of more than 4 KiB.
        return f"nvcc must be 12.1 or later; found {found[0]}"
    if cudart() is None:
        return f"{CUDA_HOME} holds nvcc, but no libcudart.so; CUDA_HOME must name the CUDA toolkit's folder"
    return ""


def version_of(command: list[str]) -> str:
    """Return the first line of a compiler's --version that names a version."""
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), "unknown")


def extension() -> CppExtension:
    """Describe the extension, with CUDA or without."""
    wanted, missing = flag("GRADALIGN_CUDA"), why_no_cuda()
    if wanted and missing:
        sys.exit(f"gradalign: GRADALIGN_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    cuda = not missing and wanted is not False
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    cxx = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden"]
    macros = [("GRADALIGN_TORCH_ABI", TORCH_ABI)]
    facts = {"COMPILER": version_of([os.environ.get("CXX", "g++")]), "FLAGS": " ".join(cxx), "TORCH": torch.__version__}
    nvcc = []
    if cuda:
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        facts |= {"NVCC": version_of([f"{CUDA_HOME}/bin/nvcc"]), "CUDA_ARCHS": archs}
        macros += [("GRADALIGN_WITH_CUDA", None), ("USE_CUDA", None)]
        nvcc = ["-O3", "-std=c++17", "-lineinfo", "--threads=2"]
    macros += [(f"GRADALIGN_{name}", f'"{value}"') for name, value in facts.items()]
    make = CUDAExtension if cuda else CppExtension
    return make(
        "gradalign._C",
        sources,
        # A changed header is a reason to build again, and what is here goes into a source distribution.
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=[cudart_folder()] if cuda else [],
    )


# The packages are listed by hand because kernels/ and benchmarks/ at the top level lie in gradalign once installed.
setup(
    packages=[
        "gradalign",
        "gradalign.benchmarks",
        "gradalign.data",
        "gradalign.data.corpus",
        "gradalign.detectors",
        "gradalign.kernels",
    ],
    package_dir={"gradalign.kernels": "kernels", "gradalign.benchmarks": "benchmarks"},
    package_data={"gradalign": ["py.typed"]},
    # What MANIFEST.in names is for source distributions.
    include_package_data=False,
    ext_modules=[] if flag("GRADALIGN_EXT") is False else [extension()],
    cmdclass={"build_ext": BuildExtension},
)
