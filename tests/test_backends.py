"""Back ends over self-supervised features: the official outputs by their numbers, key maps, the scan, gradients."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import Twice
from torch.nn import functional

from gradalign.detectors import mamba
from gradalign.detectors.aasist import AasistBackEnd
from gradalign.detectors.aasist import our_key as aasist_key
from gradalign.detectors.conformer import ConformerTCM, Convolution, sinusoids
from gradalign.detectors.conformer import our_key as conformer_key
from gradalign.detectors.mamba import DualColumnMamba, MambaMixer, selective_scan
from gradalign.detectors.pooled import PooledMLP

# Logits of the official back ends (https://github.com/TakHemlata/SSL_Anti-spoofing and
# https://github.com/ductuantruong/tcm_add) for the weights and features of the recipes below.
OFFICIAL = np.load(Path(__file__).parent / "data" / "backend_logits.npz")
FULL = {"aasist": (AasistBackEnd, aasist_key), "conformer": (ConformerTCM, conformer_key)}
SMALL = {
    "aasist": lambda: AasistBackEnd(32),
    "conformer": lambda: ConformerTCM(32, width=16, heads=2, kernel=7, layers=2),
    "mamba": lambda: DualColumnMamba(32, width=16, layers=6),
    "mlp": lambda: PooledMLP(32, hidden=16),
}


def recipe(key: str, shape) -> torch.Tensor:
    """A weight that depends on nothing but its official name and shape."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        return torch.from_numpy(0.5 + values**2).float()
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    return torch.from_numpy(np.asarray(values / np.sqrt(max(1, np.prod(shape[1:]))))).float()


def recipe_features(batch=2, frames=61, width=1024) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((batch, frames, width))).float()


@pytest.mark.parametrize("name", FULL)
def test_official_logits(name):
    """Strictly by the key map: every published weight of the back end is used, and every weight of ours is set."""
    build, our_key = FULL[name]
    shapes = json.loads(str(OFFICIAL[f"{name}_shapes"]))
    state = {our_key(key): recipe(key, shape) for key, shape in shapes.items()}
    assert None not in state
    state.pop("", None)
    model = build(1024).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(recipe_features())
    expected = torch.from_numpy(OFFICIAL[f"{name}_logits"])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


def test_unknown_conformer_keys():
    for key in ("conformer.encoder_blocks.0.attn.fn.other.weight", "conformer.fc6.weight"):
        assert conformer_key(key) is None


def test_conformer_starts_as_published():
    torch.manual_seed(0)
    model = ConformerTCM(8, width=1000)
    first, *others = (block.state_dict() for block in model.blocks)
    assert len(others) == 3
    assert all(torch.equal(value, first[name]) for other in others for name, value in other.items())
    assert len({p.data_ptr() for p in model.blocks.parameters()}) == len(list(model.blocks.parameters()))
    assert not first["attention.head_position"].any()
    # Uniform between 0 and 1.
    assert 0 <= model.class_token.min() < 0.1
    assert 0.9 < model.class_token.max() <= 1


@pytest.mark.parametrize(("kernel", "reached"), [(5, [2, 3, 4, 5, 6]), (4, [2, 3, 4, 5])])
def test_an_even_kernel_reaches_one_frame_farther_back(kernel, reached):
    x = torch.randn(1, 9, 4, requires_grad=True)
    y = Convolution(4, kernel).eval()(x)
    assert y.shape == x.shape
    y[0, 4].sum().backward()
    assert x.grad[0].abs().sum(1).nonzero().flatten().tolist() == reached


def test_conformer_computes_in_bfloat16():
    torch.manual_seed(0)
    model, features = ConformerTCM(32, width=16, heads=2, kernel=7, layers=2).eval(), recipe_features(2, 24, 32)
    with torch.no_grad():
        expected = model(features)
        found = model.bfloat16()(features.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max().clamp_min(1)


def test_sinusoids_are_the_published_table():
    expected = torch.from_numpy(OFFICIAL["positions"])
    torch.testing.assert_close(sinusoids(len(expected), expected.shape[1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 50])
def test_selective_scan_equals_the_recurrence(length):
    torch.manual_seed(length)
    shape = {"dtype": torch.float64, "requires_grad": True}
    x, step_in = torch.randn(2, length, 5, **shape), torch.randn(2, length, 5, **shape)
    decay_in = torch.randn(5, 3, **shape)
    b, c = torch.randn(2, length, 3, **shape), torch.randn(2, length, 3, **shape)
    step, decay = torch.nn.functional.softplus(step_in), -decay_in.exp()
    state, expected = torch.zeros(2, 5, 3, dtype=torch.float64), []
    for t in range(length):
        state = (step[:, t, :, None] * decay).exp() * state + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        expected.append((state * c[:, t, None]).sum(-1))
    expected = torch.stack(expected, 1)
    found = selective_scan(x, step, decay, b, c)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs, weight = (x, step_in, decay_in, b, c), torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, weight, retain_graph=True)
    for ours, other in zip(torch.autograd.grad(found, inputs, weight), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


def test_selective_scan_forgets_without_overflow():
    # Decays so strong that a form which divides by them would give 0 / 0.
    x = torch.ones(1, 40, 1)
    y = selective_scan(x, x * 100, torch.full((1, 1), -50.0), torch.ones(1, 40, 1), torch.ones(1, 40, 1))
    torch.testing.assert_close(y, torch.full((1, 40, 1), 100.0))


def test_mixer_equals_transformers():
    configuration = pytest.importorskip("transformers", reason="transformers is not installed").MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    torch.manual_seed(0)
    ours, theirs = MambaMixer(24), Theirs(configuration(hidden_size=24, state_size=16, conv_kernel=4), 0)
    published = theirs.state_dict()
    state = {mamba._MIXER[key]: torch.randn_like(value) / 4 for key, value in published.items()}
    state["log_decay"] = published["A_log"]
    ours.load_state_dict(state)
    theirs.load_state_dict({key: state[mamba._MIXER[key]] for key in published})
    x = torch.randn(2, 19, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_mixer_hands_a_gpu_to_the_kernels_of_mamba_ssm(monkeypatch):
    """Their convention: channels first, the step without its bias and softplus."""

    def scan(x, step, decay, b, c, delta_bias, delta_softplus):
        assert delta_softplus
        step = torch.nn.functional.softplus(step.transpose(1, 2) + delta_bias)
        x, b, c = (v.transpose(1, 2) for v in (x, b, c))
        return selective_scan(x, step, decay, b, c).transpose(1, 2)

    torch.manual_seed(0)
    mixer, x = MambaMixer(16), torch.randn(2, 9, 16)
    with torch.no_grad():
        expected = mixer(x)
        monkeypatch.setattr(mamba, "selective_scan_fn", scan)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        found = mixer(x)
    torch.testing.assert_close(found, expected)


def test_mixer_needs_a_gpu_and_mamba_ssm_for_its_kernels(monkeypatch):
    torch.manual_seed(0)
    mixer, x = MambaMixer(16), torch.randn(2, 9, 16)
    with torch.no_grad():
        monkeypatch.setattr(mamba, "selective_scan_fn", None)
        expected = mixer(x)
        monkeypatch.setattr(mamba, "selective_scan_fn", lambda *_, **__: pytest.fail("called on a CPU"))
        assert torch.equal(mixer(x), expected)
        monkeypatch.setattr(mamba, "selective_scan_fn", None)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_recurrence_runs_in_float32(autocast, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        mamba, "selective_scan", lambda *args: dtypes.extend(a.dtype for a in args) or selective_scan(*args)
    )
    mixer, x = MambaMixer(16), torch.randn(2, 9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mixer(x) if autocast else mixer.bfloat16()(x.bfloat16())
    assert dtypes == [torch.float32] * 5
    assert y.dtype == torch.bfloat16


def test_mixer_starts_as_published():
    """Gu & Dao, 3.6: log-uniform steps, decays of 1 to N, D = 1."""
    torch.manual_seed(0)
    mixer = MambaMixer(2000)
    steps = functional.softplus(mixer.step.bias).log10()
    torch.testing.assert_close(
        steps.quantile(torch.tensor([0, 0.5, 1])), torch.tensor([-3, -2, -1.0]), rtol=0, atol=0.1
    )
    torch.testing.assert_close(mixer.log_decay.exp(), torch.arange(1, 17.0).expand(4000, 16))
    assert bool((mixer.skip == 1).all())
    torch.testing.assert_close(mixer.step.weight.abs().max() * 125**0.5, torch.tensor(1.0), rtol=0, atol=0.01)
    # The public code's: a linear layer's start, over the square root of the blocks in a column.
    column = DualColumnMamba(32, width=64, layers=8).backwards
    found = torch.stack([mixer.out_project.weight for mixer in column.mixers]).abs().max()
    torch.testing.assert_close(found, torch.tensor(128**-0.5 / 4**0.5), rtol=0.01, atol=0)


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def test_columns_are_the_published_ones():
    """MixerModel.forward of the public code: a block adds, normalises and mixes; the last one's result is not used."""
    torch.manual_seed(0)
    model, features = SMALL["mamba"](), recipe_features(2, 9, 32)
    assert model.dropout.p == 0.1
    model.dropout = Twice()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
        # Little enough that the norms' epsilon counts.
        for small in (model.front_norm, *(mixer.out_project for mixer in model.forwards.mixers)):
            for p in small.parameters():
                p.mul_(0.01)
        model.front_norm.eval()
        hidden = 2 * functional.selu(model.front_norm(model.project(features)[:, None])[:, 0])
        pooled = []
        for column, pool, mixed in (
            (model.forwards, model.forwards_pool, hidden),
            (model.backwards, model.backwards_pool, hidden.flip([1])),
        ):
            residual = torch.zeros_like(mixed)
            for norm, mixer in zip(column.norms, column.mixers, strict=True):
                residual = residual + mixed
                mixed = mixer(rms_norm(residual, norm.weight))
            residual = residual + mixed
            states = rms_norm(hidden + residual, model.norm.weight)
            pooled.append((pool(states).softmax(1).transpose(1, 2) @ states).squeeze(1))
        expected = model.head(2 * model.merge(torch.cat(pooled, 1)))
        torch.testing.assert_close(model(features), expected, rtol=1e-5, atol=1e-6)


def test_pooled_mlp_is_as_described():
    torch.manual_seed(0)
    model, features = PooledMLP(3), recipe_features(2, 7, 3)
    norm, hidden, _, dropout, head = model.layers
    assert dropout.p == 0.1
    model.eval()
    statistics = torch.cat([features.mean(1), features.std(1, correction=0)], 1)
    expected = head(functional.gelu(hidden(functional.layer_norm(statistics, (6,), norm.weight, norm.bias))))
    torch.testing.assert_close(model(features), expected)
    assert hidden.out_features == 256
    half = features.bfloat16()
    assert torch.equal(model(half), model(half.float()))
    constant = torch.ones(2, 7, 3, requires_grad=True)
    model(constant).sum().backward()
    assert bool(constant.grad.isfinite().all())


def test_mamba_key_map_covers_the_published_layout():
    """The names that the public code gives its weights: all of them are known, and ours are all set."""
    parts = ["mixer." + name for name in mamba._MIXER] + ["norm.weight"]
    keys = [f"conformer.{d}_layers.{i}.{part}" for d in ("forward", "backward") for i in range(6) for part in parts]
    linear = ["LL", "conformer.f_attention_pool", "conformer.b_attention_pool", "conformer.LL", "conformer.classifier"]
    keys += [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys += ["conformer.norm_f.weight", *(f"first_bn.{kind}" for kind in norm)]
    ours = [mamba.our_key(key) for key in keys]
    assert None not in ours
    assert ours.count("") == 2 * len(parts) + 2
    assert sorted(key for key in ours if key) == sorted(DualColumnMamba(1024).state_dict())
    for key in ("conformer.forward_layers.6.norm.weight", "conformer.forward_layers.0.norm.bias"):
        assert mamba.our_key(key) is None
    # Twelve layers of width 144.
    assert len(DualColumnMamba(1024).forwards.mixers) == 12 // 2 - 1
    assert DualColumnMamba(1024).merge.weight.shape == (144, 288)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_learns_and_scores_are_the_utterances_own(name):
    torch.manual_seed(0)
    model, features = SMALL[name](), recipe_features(4, 24, 32)
    model(features).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # AASIST's published blocks hold normalisations that they never use.
    assert without == {key for key, _ in model.named_parameters() if "unused_norm" in key}
    model.eval()
    with torch.no_grad():
        whole = model(features)
        assert whole.shape == (4, 2)
        torch.testing.assert_close(model(features[:1]), whole[:1], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(features), whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(features).float() - whole).abs().max() < 0.1 * whole.abs().max().clamp_min(1)
        again = SMALL[name]()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(features), whole)
        assert model(features[:, :3]).isfinite().all()


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"T' >= 3; found \[1, 2, 32\]"):
        AasistBackEnd(32)(torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="`width` must be a multiple of heads = 4; found 30"):
        ConformerTCM(32, width=30)
    for layers in (5, 2, 0):
        with pytest.raises(ValueError, match=f"`layers` must be an even number from 4 on; found {layers}"):
            DualColumnMamba(32, layers=layers)
    DualColumnMamba(32, width=16, layers=4)
