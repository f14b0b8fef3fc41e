"""Every CUDA file, compiled to machine code for sm_80 and sm_90 without a GPU, for sm_90 with the host's side: no
spills, no stack, no warnings.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

ROOT = Path(__file__).parent.parent
NVCC = Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# The kernels that each file must contain; every op has one of its name.
KERNELS = {
    "rawboost": {"notch_bank", "spectra", "lnl", "ssi", "filter_fft", "isd_mark", "isd", "rawboost_finish"},
    "rawboost_backward": {
        "lnl_backward",
        "lnl_backward_sums",
        "lnl_backward_center",
        "lnl_backward_mirror",
        "lnl_backward_fft",
        "isd_backward",
        "isd_backward_sums",
        "ssi_backward",
        "ssi_backward_sums",
    },
    "gradients": {"gram", "gram_sum", "weigh", "combine"},
    "align": {"align"},
}

pytestmark = [
    pytest.mark.skipif(not NVCC.is_file(), reason=f"needs nvcc; {NVCC} is not there"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch for its headers"),
]


def test_every_file_is_known():
    assert {source.stem for source in SOURCES} == set(KERNELS)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, arch, tmp_path, record_property):
    abi = re.search(r'TORCH_ABI = "(\w+)"', (ROOT / "setup.py").read_text())
    command = [NVCC, "-cubin" if arch == 80 else "-c", f"-arch=sm_{arch}", "-O3", "-std=c++17", "-Xptxas=-v"]
    command += COMMON_NVCC_FLAGS
    command += [f"-DGRADALIGN_TORCH_ABI={abi[1]}", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{path}" for path in include_paths("cuda")]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernels.cubin", source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # ptxas reports per kernel: its (mangled) name, stack and spills, registers.
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    names = {match[1] for name, *_ in found if (match := re.search(r"\d+([a-z_]+)_kernel", name))}
    assert names == KERNELS[source.stem]
    for name, stack, stores, loads, registers in found:
        record_property(name, registers)
        assert (stack, stores, loads) == ("0", "0", "0"), name
    assert "warning" not in done.stderr
