"""The examples run as they stand, each in a process of its own."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradalign import cli

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("lightning_module", ("lightning",)),
        ("accelerate_loop", ("accelerate",)),
        ("hf_trainer", ("transformers", "accelerate")),
        ("views", ("torchaudio", "torch_audiomentations")),
        ("torchjd_weighting", ("torchjd",)),
        ("cuda_graph", ()),
    ],
)
def test_example_takes_four_aligned_steps(name, needs, tmp_path):
    printed = run(name, needs, tmp_path)
    assert re.search(r"^Stats\(steps=4, skipped=0, .*\)$", printed, re.MULTILINE), printed[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_replayed_as_a_cuda_graph(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    stats = importlib.import_module("cuda_graph").main().stats
    assert (stats.steps, stats.skipped) == (7, 0)


def test_an_image_classifier_learns_from_two_aligned_views(tmp_path):
    printed = run("image_classifier", ("sklearn",), tmp_path)
    assert re.findall("^training with (\\w+) ", printed, re.MULTILINE) == ["mean", "pcgrad"]
    lines = re.findall(r"^(\w+) +conflicts +([\d.]+)% +error on clean +([\d.]+)%, .* ([\d.]+)%$", printed, re.MULTILINE)
    assert [line[0] for line in lines] == ["mean", "pcgrad"]
    for _, conflicts, clean, hard in lines:
        assert 0 < float(conflicts) < 50
        assert float(clean) < 12
        assert float(hard) < 50


def run(name, needs, tmp_path):
    """Run an example as a user does; returns what it printed."""
    if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)} (pip install '.[test]')")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["telephone", "room", "noise", "audiomentations"])
def test_a_view_is_another_waveform_and_follows_from_its_seed(name, monkeypatch):
    if name == "audiomentations":
        pytest.importorskip("torch_audiomentations", reason="torch-audiomentations is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    view = getattr(importlib.import_module("views"), name)
    wave, seeds = 0.1 * torch.randn(3, 12000, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 6, 2**62])
    state = torch.get_rng_state()
    seen = view(wave, seeds)
    assert seen.shape == wave.shape
    assert torch.isfinite(seen).all()
    assert ((seen - wave).norm(dim=1) > 0.02 * wave.norm(dim=1)).all()
    assert torch.equal(view(wave, seeds), seen)
    assert torch.equal(torch.get_rng_state(), state)
    if name != "audiomentations":
        torch.testing.assert_close(view(wave[1:2], seeds[1:2]), seen[1:2], rtol=1e-4, atol=1e-6)
    if name in ("room", "noise"):
        assert not torch.equal(view(wave[1:2], seeds[:1]), seen[1:2])


def test_noise_has_the_ratio_it_was_drawn_with(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    views = importlib.import_module("views")
    wave, seeds = torch.sin(torch.arange(16000) / 5.0).repeat(40, 1), torch.arange(40)
    added = views.noise(wave, seeds) - wave
    ratio = 20 * torch.log10(wave.norm(dim=1) / added.norm(dim=1))
    assert (ratio > 4.99).all()
    assert (ratio < 25.01).all()
    assert ratio.std() > 3


def test_the_trainer_takes_several_views_by_name(monkeypatch, tmp_path):
    """The command of the example's heading, on the clips of the tests."""
    monkeypatch.syspath_prepend(EXAMPLES)
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"data": str(EXAMPLES.parent / "tests" / "data" / "clips"), "out": str(tmp_path / "runs")})
    )
    small = ["detector=light", "num_samples=4000", "batch_size=4", "epochs=1", "threads=1", "device=cpu"]
    assert cli.main(["train", str(path), 'views=[clean, rawboost, "views:telephone", "views:room"]', *small]) == 0
    results = json.loads((tmp_path / "runs" / "pcgrad-seed0" / "results.json").read_text())
    assert results["steps"] > 0
    assert results["skipped_steps"] == 0
