"""Detectors: the official AASIST architecture by its numbers, key maps, shapes and misuse."""

import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import gradalign as ga
from gradalign.detectors.aasist import our_key as aasist_key
from gradalign.detectors.rawnet2 import our_key as rawnet2_key

DATA = Path(__file__).parent / "data"
# Outputs of the official modules (https://github.com/clovaai/aasist; RawNet2 of https://github.com/asvspoof-challenge/2021,
# which returns the logits' log-softmax) for the weights and waveforms of the recipes below.
OFFICIAL = {**np.load(DATA / "aasist_logits.npz"), **np.load(DATA / "rawnet2_logits.npz")}
NAMES = ["aasist", "aasist-l"]
KEY_MAPS = {"aasist": aasist_key, "aasist-l": aasist_key, "rawnet2": rawnet2_key}


def recipe_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight that depends on nothing but its official name and shape."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        values = 0.5 + values**2
    elif key.endswith("num_batches_tracked"):
        values = np.zeros(shape)
    else:
        values = values / np.sqrt(max(1, np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(values)).float()


def recipe_wave(num_samples: int) -> torch.Tensor:
    return torch.from_numpy(0.1 * np.random.default_rng(7).standard_normal((2, num_samples))).float()


def official_state(name: str) -> dict[str, torch.Tensor]:
    """The official state dict of the recipe: names and shapes as published."""
    shapes = json.loads(str(OFFICIAL[f"{name}_shapes"]))
    state = {key: recipe_weight(key, tuple(shape)) for key, shape in shapes.items()}
    return {key: v.long() if key.endswith("num_batches_tracked") else v for key, v in state.items()}


@pytest.fixture
def checkpoint(tmp_path):
    def write(name, state=None):
        path = tmp_path / f"{name}.pth"
        torch.save(official_state(name) if state is None else state, path)
        return path

    return write


@pytest.mark.parametrize("name", KEY_MAPS)
def test_official_outputs_on_recipe_weights(name, checkpoint):
    model = ga.detectors.load_published(name, checkpoint(name))
    for num_samples in (64600, 20000):
        expected = torch.from_numpy(OFFICIAL[f"{name}_logits_{num_samples}"])
        with torch.no_grad():
            found = model(recipe_wave(num_samples))
        if name == "rawnet2":
            found = found.log_softmax(1)
        # float32 rounding in another order of summation; the logits' size sets the scale.
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", NAMES)
def test_official_weights(name):
    folder, source = os.environ.get("GRADALIGN_AASIST_WEIGHTS"), os.environ.get("GRADALIGN_OFFICIAL_AASIST")
    if not folder or not source:
        pytest.skip("needs GRADALIGN_AASIST_WEIGHTS (official weights) and GRADALIGN_OFFICIAL_AASIST (clovaai/aasist)")
    sys.path.insert(0, source)
    try:
        from models.AASIST import Model
    finally:
        sys.path.remove(source)
    base = Path(folder) / {"aasist": "AASIST", "aasist-l": "AASIST-L"}[name]
    official = Model(json.loads(Path(f"{base}.conf.json").read_text())["model_config"]).eval()
    official.load_state_dict(torch.load(f"{base}.pth", map_location="cpu", weights_only=True))
    model = ga.detectors.load_published(name, f"{base}.pth")
    with torch.no_grad():
        assert (model(recipe_wave(64600)) - official(recipe_wave(64600))[1]).abs().max() <= 1e-4
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in official.parameters())


# The published RawNet2 has 848 more, in normalisations that it never uses.
@pytest.mark.parametrize(("name", "count"), [("aasist", 297866), ("aasist-l", 85306), ("rawnet2", 17620562)])
def test_published_parameter_counts(name, count):
    assert sum(p.numel() for p in ga.detectors.create(name).parameters()) == count


@pytest.mark.parametrize("name", KEY_MAPS)
def test_key_map_is_one_to_one(name):
    ours = [KEY_MAPS[name](key) for key in json.loads(str(OFFICIAL[f"{name}_shapes"]))]
    assert sorted(key for key in ours if key != "") == sorted(ga.detectors.create(name).state_dict())
    assert KEY_MAPS[name]("pool_hS3.proj.weight") is None


def test_rawnet2_needs_as_many_samples_as_it_says():
    model = ga.detectors.create("rawnet2", gru_width=16, gru_layers=1, embedding=8).eval()
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.randn(1, model.min_samples))).all())
    with pytest.raises(ValueError, match=f"T >= {model.min_samples}; found"):
        model(torch.randn(1, model.min_samples - 1))
    model.train()(torch.randn(4, 6000)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_every_weight_of_the_light_detector_learns():
    torch.manual_seed(0)
    model = ga.detectors.create("light")
    model(recipe_wave(9000)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_used_parameter(name):
    torch.manual_seed(0)
    model = ga.detectors.create(name)
    model(recipe_wave(9000)).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    assert without == {key for key, _ in model.named_parameters() if "unused_norm" in key}


def test_loading_errors_name_the_file_and_the_keys(checkpoint, tmp_path):
    state = official_state("aasist")
    with pytest.raises(FileNotFoundError):
        ga.detectors.load_published("aasist", tmp_path / "absent.pth")
    short = dict(state)
    del short["pos_S"]
    with pytest.raises(
        ValueError, match=r"aasist.pth: expected this model's weights; missing spectral_position; unexpected none"
    ):
        ga.detectors.load_published("aasist", checkpoint("aasist", short))
    with pytest.raises(ValueError, match=r"unexpected extra.weight"):
        ga.detectors.load_published("aasist", checkpoint("aasist", state | {"extra.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"spectral_position must be \[1, 23, 24\]; found \[1, 23, 64\]"):
        ga.detectors.load_published("aasist-l", checkpoint("aasist", state))
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(checkpoint("aasist").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"truncated.pth: not a readable PyTorch checkpoint"):
        ga.detectors.load_published("aasist", truncated)
    with pytest.raises(ValueError, match=r"expected a state dict; found list"):
        ga.detectors.load_published("aasist", checkpoint("aasist", [1]))
    with pytest.raises(ValueError, match=r"published weights load into aasist, aasist-l, rawnet2; found 'light'"):
        ga.detectors.load_published("light", truncated)


def test_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"pos_S": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: not a readable PyTorch checkpoint of plain tensors"):
        ga.detectors.load_published("aasist", tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_create_names_what_it_knows():
    with pytest.raises(ValueError, match=r"detector must be one of aasist, aasist-l, light.*; found 'resnet'"):
        ga.detectors.create("resnet")
    with pytest.raises(TypeError, match="detector 'light' takes width, dropout; found 'depth'"):
        ga.detectors.create("light", depth=3)


@pytest.mark.parametrize("name", ga.detectors.names())
def test_shape_and_misuse(name):
    model = ga.detectors.create(name).eval()
    with torch.no_grad():
        assert model(recipe_wave(6000)).shape == (2, 2)
    for bad in (torch.zeros(6000), torch.zeros(1, 2, 6000), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match=r"`wave` must be \[B, T\] with T >= \d+; found \["):
            model(bad)
    with pytest.raises(TypeError, match=r"`wave` must be floating; found torch.int16"):
        model(torch.zeros(1, 6000, dtype=torch.int16))


def test_aasist_needs_as_many_samples_as_it_says():
    model = ga.detectors.create("aasist-l").eval()
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.randn(1, model.min_samples))).all())
    with pytest.raises(ValueError, match=f"T >= {model.min_samples}; found"):
        model(torch.randn(1, model.min_samples - 1))


def test_aasist_keeps_the_layout_of_its_gradients():
    # The gradient kernels read contiguous tensors fastest, whatever the layout of the activations.
    torch.manual_seed(0)
    model = ga.detectors.create("aasist-l")
    model(recipe_wave(3000)).square().sum().backward()
    assert all(p.grad.is_contiguous() for p in model.parameters() if p.grad is not None)


def test_light_takes_widths_it_can_divide():
    assert ga.detectors.create("light", width=48)(recipe_wave(6000)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"`width` must be a positive multiple of 24; found 32"):
        ga.detectors.create("light", width=32)


def test_light_is_independent_of_level_batch_and_silence():
    torch.manual_seed(0)
    model, wave = ga.detectors.create("light").eval(), recipe_wave(8000)
    with torch.no_grad():
        whole = model(wave)
        assert torch.allclose(model(wave * 100), whole, atol=1e-4)
        assert torch.allclose(model(wave[:1]), whole[:1], atol=1e-5)
        assert bool(torch.isfinite(model(torch.zeros(1, 8000))).all())
    model.train()
    model(torch.zeros(1, 8000)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
