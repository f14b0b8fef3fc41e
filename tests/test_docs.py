"""Every example in a docstring and every Python block of the README is executed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradalign

ROOT = Path(__file__).parent.parent
# __main__ runs the command line when imported; _C is compiled.
MODULES = [
    m.name for m in pkgutil.walk_packages(gradalign.__path__, "gradalign.") if not m.name.endswith(("__main__", "_C"))
]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_examples(block):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_installs_what_the_build_needs_before_it():
    before, found, _ = README.partition("pip install --no-build-isolation")
    assert found
    for name in ("setuptools", "pybind11", "torch"):
        assert re.search(rf"pip install .*\b{name}\b", before), name


def test_readme_shows_python_and_names_files_that_exist():
    assert BLOCKS
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
