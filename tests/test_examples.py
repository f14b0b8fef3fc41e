"""The examples run as they stand, each in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("lightning_module", ("lightning",)),
        ("accelerate_loop", ("accelerate",)),
        ("hf_trainer", ("transformers", "accelerate")),
    ],
)
def test_framework_example_takes_four_aligned_steps(name, needs, tmp_path):
    if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)} (pip install gradalign[test])")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Stats\(steps=4, skipped=0, ", done.stdout), done.stdout[-2000:] + done.stderr[-2000:]
