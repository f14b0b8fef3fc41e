"""Detectors: the official AASIST architecture by its numbers, key maps, shapes and misuse."""

import json
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import Twice
from torch.nn import functional

import gradalign as ga
from gradalign.detectors.aasist import GraphAttention, GraphPool, ResidualBlock, sinc_filterbank
from gradalign.detectors.aasist import our_key as aasist_key
from gradalign.detectors.conformer import ConformerTCM
from gradalign.detectors.frontend import ARCHITECTURES
from gradalign.detectors.mamba import DualColumnMamba
from gradalign.detectors.pooled import PooledMLP
from gradalign.detectors.rawnet2 import ScaledResidualBlock
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


def small(name: str) -> torch.nn.Module:
    """A detector with a small random front end where it has one, so that it is built in milliseconds."""
    options = {"frontend": {"name": "tiny"}} if name.startswith("xlsr-") else {}
    return ga.detectors.create(name, **options)


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


@pytest.mark.parametrize(("num_filters", "num_taps"), [(70, 129), (20, 1025)])
def test_filters_are_the_published_band_passes(num_filters, num_taps):
    """As in the official CONV and SincConv, but in float64."""
    hz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), num_filters + 1) / 2595) - 1)
    taps = np.arange(num_taps) - num_taps // 2
    low_pass = [2 * f / 16000 * np.sinc(2 * f * taps / 16000) for f in hz]
    expected = np.hamming(num_taps) * np.diff(low_pass, axis=0)
    found = sinc_filterbank(num_filters, num_taps, 16000)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=0, atol=1e-7)


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


@pytest.mark.parametrize(
    ("block", "x"),
    [
        (ResidualBlock(8, 8, first=False), torch.randn(2, 8, 12, 90)),
        (ScaledResidualBlock(8, 8), torch.randn(2, 8, 900)),
    ],
    ids=["aasist", "rawnet2"],
)
def test_a_block_keeps_no_activation_twice(block, x):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x.requires_grad_()).sum().backward()
    large = [tensor for tensor in kept.values() if tensor.numel() > x.numel() // 2]
    # The input, what the batch-norm read, what the second convolution read, and what the pooling read.
    assert len(large) == 4


# The published RawNet2 has 848 more, in normalisations that it never uses.
@pytest.mark.parametrize(("name", "count"), [("aasist", 297866), ("aasist-l", 85306), ("rawnet2", 17620562)])
def test_published_parameter_counts(name, count):
    assert sum(p.numel() for p in ga.detectors.create(name).parameters()) == count


@pytest.mark.parametrize("name", KEY_MAPS)
def test_key_map_is_one_to_one(name):
    ours = [KEY_MAPS[name](key) for key in json.loads(str(OFFICIAL[f"{name}_shapes"]))]
    assert sorted(key for key in ours if key != "") == sorted(ga.detectors.create(name).state_dict())
    assert KEY_MAPS[name]("pool_hS3.proj.weight") is None


def test_unknown_rawnet2_keys():
    for key in ("block0.0.bn1.weight", "block6.0.conv1.weight", "fc_attention6.0.bias", "block1.0.conv3.weight"):
        assert rawnet2_key(key) is None


def test_rawnet2_needs_as_many_samples_as_it_says():
    model = ga.detectors.create("rawnet2", gru_width=16, gru_layers=1, embedding=8).eval()
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.randn(1, model.min_samples))).all())
    # 1025 taps, then poolings by 3: of the filters' output and in each of six blocks.
    assert model.min_samples == 1024 + 3**7
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
    with pytest.raises(ValueError, match=r"spectral_position must be \[1, 23, 24\], found \[1, 23, 64\]"):
        ga.detectors.load_published("aasist-l", checkpoint("aasist", state))
    with pytest.raises(ValueError, match=r"unexpected x0, x1, x10, x11, x12, x13, x14, x15 and 12 more$"):
        ga.detectors.load_published("aasist", checkpoint("aasist", state | {f"x{i}": 1 for i in range(20)}))
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(checkpoint("aasist").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"truncated.pth: expected a PyTorch file; found a damaged or another one"):
        ga.detectors.load_published("aasist", truncated)
    page = tmp_path / "page.pth"
    page.write_text("<!doctype html><title>Not found</title>")
    with pytest.raises(ValueError, match=r"page.pth: expected a PyTorch file; found a damaged or another one"):
        ga.detectors.load_published("aasist", page)
    damaged = bytearray(checkpoint("aasist").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged.pth: .* differs from its checksum"):
        ga.detectors.load_published("aasist", tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"missing none; unexpected spectral_position$"):
        ga.detectors.load_published("aasist", checkpoint("aasist", state | {"pos_S": 1}))
    with pytest.raises(ValueError, match=r"expected a dictionary of weights; found list"):
        ga.detectors.load_published("aasist", checkpoint("aasist", [1]))
    with pytest.raises(ValueError, match=r"published weights load into aasist, aasist-l, rawnet2, .*; found 'light'"):
        ga.detectors.load_published("light", truncated)


def test_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"pos_S": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: expected tensors and plain values; found pickled code"):
        ga.detectors.load_published("aasist", tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_create_names_what_it_knows():
    with pytest.raises(ValueError, match=r"detector must be one of aasist, aasist-l, light.*; found 'resnet'"):
        ga.detectors.create("resnet")
    with pytest.raises(TypeError, match="detector 'light' takes width, dropout; found 'depth'"):
        ga.detectors.create("light", depth=3)
    with pytest.raises(TypeError, match="detector 'aasist' takes no options; found 'width'"):
        ga.detectors.create("aasist", width=3)


@pytest.mark.parametrize("name", ga.detectors.names())
def test_shape_and_misuse(name):
    torch.manual_seed(0)
    model, wave = small(name).eval(), recipe_wave(6000)
    with torch.no_grad():
        whole = model(wave)
        assert whole.shape == (2, 2)
        # A score is the utterance's own, and the same each time.
        torch.testing.assert_close(model(wave[:1]), whole[:1], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(wave), whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert bool(model(wave).isfinite().all())
    for bad in (torch.zeros(6000), torch.zeros(1, 2, 6000), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match=r"`wave` must (be|have at least) "):
            model(bad)
    with pytest.raises((TypeError, ValueError), match=r"`wave` must be floating.*; found (torch\.)?int16"):
        model(torch.zeros(1, 6000, dtype=torch.int16))


@pytest.mark.parametrize("name", ga.detectors.names())
def test_export_for_any_batch_size(name):
    torch.manual_seed(0)
    model, wave = small(name).eval(), recipe_wave(6000)
    exported = torch.export.export(model, (wave,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(wave[:1]), model(wave[:1]))


@pytest.mark.parametrize("name", [n for n in ga.detectors.names() if n.startswith("xlsr-")])
def test_gradients_reach_front_and_back_end(name):
    torch.manual_seed(0)
    model = small(name)
    model(torch.randn(4, 16000)).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # AASIST's published blocks hold normalisations that they never use; a key's bias moves no softmax.
    assert {key for key in without if "unused_norm" not in key and "k_proj.bias" not in key} == set()
    frozen = ga.detectors.create(name, frontend={"name": "tiny", "tune": "none"})
    frozen(torch.randn(4, 16000)).square().sum().backward()
    assert all(p.grad is None for p in frozen.frontend.parameters())


@pytest.mark.parametrize(
    ("name", "backend", "options"),
    [
        ("xlsr-conformer-tcm", ConformerTCM, {"width": 24, "heads": 3, "kernel": 7, "layers": 1}),
        ("xlsr-mamba", DualColumnMamba, {"width": 24, "layers": 6}),
        ("xlsr-mlp", PooledMLP, {"hidden": 24}),
    ],
)
def test_options_and_defaults_are_the_back_ends(name, backend, options):
    for given in ({}, options):
        found = ga.detectors.create(name, frontend={"name": "tiny"}, **given).backend.state_dict()
        expected = backend(32, **given).state_dict()
        assert {key: v.shape for key, v in found.items()} == {key: v.shape for key, v in expected.items()}


@pytest.mark.parametrize("name", [n for n in ga.detectors.names() if n.startswith("xlsr-")])
def test_the_front_end_is_xlsr_300m_unless_asked(name):
    with torch.device("meta"):
        assert ga.detectors.create(name).frontend.architecture is ARCHITECTURES["xlsr-300m"]


def published_keys(backend: str) -> list[str]:
    """The names in a published checkpoint over the small front end, as fairseq gives them."""
    keys = [f"feature_extractor.conv_layers.{i}.{part}" for i in range(7) for part in ("0", "2.1")]
    keys += ["post_extract_proj", "layer_norm", "encoder.layer_norm", "final_proj", "project_q"]
    parts = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "self_attn_layer_norm")
    keys += [f"encoder.layers.{n}.{part}" for n in range(2) for part in (*parts, "fc1", "fc2", "final_layer_norm")]
    keys = [f"{key}.{kind}" for key in keys for kind in ("weight", "bias")]
    keys += ["mask_emb", "quantizer.vars", *(f"encoder.pos_conv.0.{kind}" for kind in ("bias", "weight_g", "weight_v"))]
    shapes = json.loads(str(np.load(DATA / "backend_logits.npz")[f"{backend}_shapes"]))
    return [f"module.ssl_model.model.{key}" for key in keys] + [f"module.{key}" for key in shapes]


@pytest.mark.parametrize(("name", "backend"), [("xlsr-aasist", "aasist"), ("xlsr-conformer-tcm", "conformer")])
def test_published_detectors_over_fairseq_load_whole(name, backend, tmp_path):
    torch.manual_seed(0)
    model = small(name).eval()
    our_key = ga.detectors._PUBLISHED[name]
    state, official = model.state_dict(), {}
    for key in published_keys(backend):
        assert our_key(key) is not None, key
        official[key] = state[our_key(key)] if our_key(key) else torch.zeros(3)
    # The norm is per tap.
    assert official["module.ssl_model.model.encoder.pos_conv.0.weight_g"].shape == (1, 1, 16)
    torch.save(official, tmp_path / "best.pth")
    loaded = ga.detectors.load_published(name, tmp_path / "best.pth", frontend={"name": "tiny"})
    wave = recipe_wave(16000)
    with torch.no_grad():
        assert torch.equal(loaded(wave), model(wave))
    del official["module.ssl_model.model.encoder.layers.1.fc2.bias"]
    torch.save(official | {"module.ssl_model.model.encoder.layers.2.fc2.bias": torch.zeros(32)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"missing frontend.*layers\.1.*output_dense\.bias; unexpected frontend.*layers\.2"
    ):
        ga.detectors.load_published(name, tmp_path / "other.pth", frontend={"name": "tiny"})


def test_published_mamba_loads_by_its_own_key_map():
    assert ga.detectors._PUBLISHED["xlsr-mamba"]("module.conformer.LL.bias") == "backend.merge.bias"


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


def test_aasist_runs_channels_last_on_a_cpu():
    model, layouts = ga.detectors.create("aasist-l"), []
    for block in model.encoder:
        block.register_forward_hook(lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last)))
    model(recipe_wave(12000))
    assert layouts == [True] * 6


def test_aasist_drops_out_where_the_published_one_does(monkeypatch):
    calls = Counter()
    monkeypatch.setattr(
        functional, "dropout", lambda x, p, training: calls.update([(p, *x.shape[1:])] if training else []) or x
    )
    ga.detectors.create("aasist")(recipe_wave(9000))
    # 23 spectral and 4 temporal nodes, of which the pools keep 11 and 2; in each of two branches these, then 5 and 1.
    branch = [(0.2, 13, 64), (0.3, 11, 32), (0.3, 2, 32), (0.2, 6, 32), (0.2, 5, 32), (0.2, 1, 32), (0.2, 1, 32)]
    graphs = [(0.2, 23, 64), (0.3, 23, 64), (0.2, 4, 64), (0.3, 4, 64)]
    assert calls == Counter(graphs + 2 * branch + [(0.5, 160)])


def test_graph_pools_drop_out_of_the_scores_only(monkeypatch):
    torch.manual_seed(0)
    pool, nodes = GraphPool(1.0, 8), torch.randn(2, 5, 8)
    monkeypatch.setattr(functional, "dropout", lambda x, p, training: torch.zeros_like(x))
    expected = torch.sigmoid(pool.score.bias) * nodes
    torch.testing.assert_close(pool(nodes).sum(1), expected.sum(1))


def test_aasist_starts_as_published():
    torch.manual_seed(0)
    model = ga.detectors.create("aasist")
    assert 0.9 < model.spectral_position.std() < 1.1
    assert all(0.7 < branch.stack.std() < 1.3 for branch in model.branches)
    # Xavier's normal distribution; a uniform one ends at 1.73 standard deviations.
    score = GraphAttention(2, 10000).score / (2 / 10001) ** 0.5
    assert 0.95 < score.std() < 1.05
    assert score.max() > 2


def test_light_takes_widths_it_can_divide():
    assert ga.detectors.create("light", width=48)(recipe_wave(6000)).shape == (2, 2)
    for width in (32, 12, 0, -24):
        with pytest.raises(ValueError, match=f"`width` must be a positive multiple of 24; found {width}"):
            ga.detectors.create("light", width=width)


def described_spectra(wave: np.ndarray) -> np.ndarray:
    """Windows of 50 ms every 20 ms, power in 256 triangles up to Nyquist, logarithm, centred over time, scaled."""
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800), 112)
    padded = np.pad(wave, 512)
    frames = np.stack([padded[i : i + 1024] * window for i in range(0, len(wave) + 1, 320)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    distance = np.abs(np.arange(513)[:, None] - 512 * np.arange(1, 257) / 257) / (512 / 257)
    bands = np.log(power / power.mean() @ np.maximum(1 - distance, 0) + 1e-6)
    bands = bands - bands.mean(0)
    return bands.T / np.sqrt(np.mean(bands**2) + 1e-6)


def test_light_features_are_as_described():
    # Loud and quiet, each with digital silence at its end.
    wave = recipe_wave(4000).double() * torch.tensor([[1.0], [0.01]])
    wave[:, 2500:] = 0
    expected = np.stack([described_spectra(row) for row in wave.numpy()])
    found = ga.detectors.create("light").features(wave)
    # The triangles are float32.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-3)


def test_light_network_is_as_described():
    torch.manual_seed(0)
    model, wave = ga.detectors.create("light"), recipe_wave(6000)
    assert model.dropout.p == 0.2
    model.dropout = Twice()
    convolutions, norms = model.encoder[::3], model.encoder[1::3]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        x = model.features(wave)[:, None]
        for conv, norm, stride in zip(convolutions, norms, ((4, 2), (2, 2), (2, 2), (2, 1)), strict=True):
            padding = (4, 2) if norm is norms[0] else (1, 1)
            x = functional.conv2d(x, conv.weight, None, stride, padding)
            x = functional.silu(functional.group_norm(x, 8, norm.weight, norm.bias))
        frames = functional.silu(model.project(x.flatten(1, 2)))
        weight = model.attention(frames).softmax(2)
        mean = (weight * frames).sum(2, keepdim=True)
        deviation = (weight * (frames - mean) ** 2).sum(2).sqrt()
        expected = model.head(2 * torch.cat([mean[:, :, 0], deviation], 1))
        torch.testing.assert_close(model(wave), expected, rtol=1e-4, atol=1e-5)
    # 24 x 9 x 5 taps, three layers of 3 x 3, each with its norm; the projection, the attention and the head.
    layers = 24 * 45 + 2 * 24 + sum(9 * a * b + 2 * b for a, b in ((24, 32), (32, 48), (48, 64)))
    assert sum(p.numel() for p in model.parameters()) == layers + (512 + 1) * 64 + 64 + (128 + 1) * 2
    assert convolutions[0].kernel_size == (9, 5)


def test_light_takes_every_floating_wave():
    torch.manual_seed(0)
    model, wave = ga.detectors.create("light").eval(), recipe_wave(6000)
    with torch.no_grad():
        for half in (wave.half(), wave.bfloat16()):
            assert torch.equal(model(half), model(half.float()))
        expected = model(wave)
        found = model.double()(wave.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("shape", [(0, 16000), (2, 0), (16000,)])
def test_light_needs_utterances_with_samples(shape):
    with pytest.raises(ValueError, match=r"\[B, T\] with B and T >= 1; found " + re.escape(str(list(shape)))):
        ga.detectors.create("light")(torch.zeros(shape))
