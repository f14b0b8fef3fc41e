"""The build's explicit choices, and the package without its extension."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import gradalign

ROOT = Path(__file__).parent.parent


def setup(**environment):
    """Run setup.py far enough to describe the extension, without building it."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_cuda_demanded_without_nvcc_fails_loudly():
    result = setup(GRADALIGN_CUDA="1", CUDA_HOME="/nonexistent")
    assert result.returncode != 0
    assert "gradalign: GRADALIGN_CUDA=1, but the CUDA kernels cannot be built:" in result.stderr


@pytest.mark.parametrize(
    "environment", [{"GRADALIGN_CUDA": "0"}, {"GRADALIGN_EXT": "0"}, {"CUDA_HOME": "/nonexistent"}]
)
def test_builds_without_cuda_when_told_or_when_nvcc_is_missing(environment):
    result = setup(**environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "gradalign"


def test_a_typo_in_a_choice_is_an_error():
    result = setup(GRADALIGN_CUDA="yes")
    assert result.returncode != 0
    assert "GRADALIGN_CUDA must be 0 or 1; found 'yes'" in result.stderr


def test_a_source_distribution_can_be_built_from(tmp_path):
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"GRADALIGN_EXT": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    assert {"Makefile", "constraints.txt"} <= found
    for folder in ("csrc", "gradalign", "kernels", "benchmarks", "configs", "docs", "examples", "tests"):
        wanted = {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.suffix not in (".pyc", ".so")
        }
        assert wanted
        assert wanted <= found, wanted - found


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_works_without_the_extension():
    out = python(
        "import sys; sys.modules['gradalign._C'] = None\n"
        "import torch, gradalign as ga, gradalign.info as info\n"
        "y = ga.RawBoost(4)(torch.ones(1, 900), seeds=torch.tensor([1]))\n"
        "print(bool(torch.isfinite(y).all())); print(info.report())"
    )
    assert out.startswith("True\n")
    assert "align_\n    reference\n" in out
    assert "not cpp: the extension gradalign._C is not built or does not load" in out


def test_import_needs_nothing_but_torch_and_numpy():
    blocked = ["triton", "scipy", "soundfile", "torchaudio", "matplotlib", "tqdm"]
    out = python(f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import gradalign; print('fine')")
    assert out == "fine\n"


def test_installed_layout():
    out = python("import gradalign.kernels, gradalign._C; print(gradalign.kernels.__file__)")
    assert Path(out.strip()).parent.name in ("kernels",)


def test_the_benchmarks_need_nothing_that_is_not_installed(tmp_path):
    # As they lie within the package; of the rest of a checkout nothing is there.
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "*.md"))
    options = ["--ops", "gram", "--batch", "1", "--samples", "900", "--rounds", "1", "--seconds", "0.1"]
    names = sorted(path.stem for path in (tmp_path / "benchmarks").glob("*.py"))
    for command in (["-c", f"import {', '.join(names)}"], ["run.py", *options]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "benchmarks", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_version():
    assert gradalign.__version__ == importlib.metadata.version("gradalign")
