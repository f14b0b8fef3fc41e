"""``gradalign info``: versions, build facts, and which backend serves each op here and why the others do not."""

import re
import subprocess
import sys

import inputs
import pytest
import torch

from gradalign import _extension, info


def test_every_op_names_its_backends():
    text = info.report()
    for op in inputs.CASES:
        assert re.search(rf"\b{op}(,|\n)", text)
    assert "    cpp, reference\n" in text or "    cuda, " in text
    assert re.search(rf"torch +{re.escape(torch.__version__)}\n", text)


def test_build_facts_come_from_the_extension():
    extension, why_not = _extension.load()
    assert extension is not None, why_not
    facts = extension.build_info()
    assert set(facts) == {"compiler", "flags", "torch", "torch_abi", "instruction_set", "cuda", "nvcc", "cuda_archs"}
    text = info.report()
    for value in (facts["compiler"], facts["flags"], facts["instruction_set"]):
        assert value in text


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;8.6;8.9;9.0+PTX", (8, 0), True),
        ("8.0;8.6;8.9;9.0+PTX", (12, 0), True),
        ("8.0;8.6;8.9;9.0+PTX", (7, 5), False),
        ("7.5+PTX", (7, 5), False),
        ("9.0", (8, 0), False),
        ("9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("8.0 8.6", (8, 9), True),
        ("Hopper", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0a+PTX", (12, 0), False),
    ],
)
def test_devices_without_code_are_known(archs, capability, runs):
    assert _extension.runs_on(archs, capability) is runs


def test_a_missing_gpu_is_a_reason():
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in info.report()
    else:
        assert "cuda: none visible" in info.report()


def test_the_module_runs_without_a_warning():
    done = subprocess.run([sys.executable, "-m", "gradalign.info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Versions\n")
    assert "RuntimeWarning" not in done.stderr
