import argparse
import io
import json
import os
import pickle
import re
import runpy
import sys
import types
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import gradalign as ga
from gradalign._errors import CheckpointError
from gradalign.detectors import _import, frontend
from gradalign.detectors.frontend import ARCHITECTURES, Frontend, create_frontend

TINY = ARCHITECTURES["tiny"]
# Post-norm, group norm, no biases, as in the base models.
TINY_BASE = replace(TINY, layer_norm_first=False, extractor_norm="group_norm", conv_bias=False)
# Few enough positions that both exact and far buckets occur within a second.
WAVLM = {"num_buckets": 16, "max_distance": 20}
VARIANTS = {
    "wav2vec2-stable": TINY,
    "wav2vec2-post-norm": TINY_BASE,
    "wav2vec2-stable-group-norm": replace(TINY, extractor_norm="group_norm", conv_bias=False),
    "wavlm-stable": replace(TINY, **WAVLM, conv_bias=False),
    "wavlm-post-norm": replace(TINY_BASE, **WAVLM),
}
DROPOUTS = {"input_dropout": 0.2, "dropout": 0.2, "attention_dropout": 0.2, "layer_drop": 0.5}

# Parameters of the encoders as counted by transformers' documentation and model cards, less the mask's embedding.
PUBLISHED_PARAMETERS = {
    "xlsr-300m": 315_438_720 - 1024,
    "xlsr-1b": 962_497_408 - 1280,
    "wav2vec2-base": 94_371_712 - 768,
    "wavlm-base": 94_381_936 - 768,
    "wavlm-large": 315_453_120 - 1024,
}


@pytest.fixture
def wave():
    return torch.randn(2, 16000, generator=torch.Generator().manual_seed(1)) * 0.1


def build(architecture, seed=0, **options):
    torch.manual_seed(seed)
    return Frontend(architecture, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_the_torchaudio_models(variant, wave):
    model = build(VARIANTS[variant]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(wave), model.model(wave)[0], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropouts_are_the_torchaudio_models(variant, wave):
    model = build(replace(VARIANTS[variant], **DROPOUTS | {"layer_drop": 0.0})).train()
    # In training, torchaudio's encoder draws a number for each layer's drop.
    model.model.encoder.transformer.training = False
    torch.manual_seed(5)
    features = model(wave)
    torch.manual_seed(5)
    torch.testing.assert_close(features, model.model(wave)[0], rtol=0, atol=0)


def test_shape_of_published_input_length():
    model = create_frontend("tiny", tune="none")
    assert model.width == 32
    features = model(torch.zeros(3, 64600))
    assert features.shape == (3, 201, 32)
    assert features.dtype == torch.float32


def test_shortest_wave_gives_one_frame():
    model = create_frontend("tiny")
    assert model(torch.ones(1, 400)).shape == (1, 1, 32)
    with pytest.raises(ValueError, match="at least 400 samples; found 399"):
        model(torch.ones(1, 399))


@pytest.mark.parametrize(
    "wave",
    [torch.zeros(16000), torch.zeros(1, 1, 16000), torch.zeros(0, 16000), torch.zeros(1, 16000, dtype=torch.int16)],
)
def test_other_waves_are_named(wave):
    with pytest.raises(ValueError, match=r"floating \[B, T\] with B >= 1; found " + str(wave.dtype)[6:]):
        create_frontend("tiny")(wave)


def test_wave_is_not_normalised(wave):
    # Layer norm after the first convolution hides a gain but for its epsilon, not an offset within it.
    model = create_frontend("tiny").eval()
    normalised = functional.layer_norm(wave + 0.1, wave.shape[1:])
    assert not torch.allclose(model(wave + 0.1), model(normalised), atol=1e-3)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_number_of_parameters_is_the_published_one(name):
    with torch.device("meta"):
        model = Frontend(ARCHITECTURES[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[name]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("name", "heads", "millions"), [("xlsr-300m", 768, 317), ("xlsr-1b", 1024, 965)])
def test_xlsr_with_its_quantizer_has_the_papers_size(name, heads, millions):
    # arXiv 2111.09296, Table 2, in whole millions; it counts what pretraining adds: 2 codebooks of 320 entries, their
    # logits from the convolutions' output, two projections, and the mask's embedding.
    width = ARCHITECTURES[name].width
    quantizer = 640 * heads // 2 + 512 * 640 + 640
    projections = heads * heads + heads + width * heads + heads
    assert (PUBLISHED_PARAMETERS[name] + quantizer + projections + width) // 10**6 == millions


@pytest.mark.parametrize(
    ("name", "bundle"),
    [
        ("xlsr-300m", "WAV2VEC2_XLSR_300M"),
        ("xlsr-1b", "WAV2VEC2_XLSR_1B"),
        ("wav2vec2-base", "WAV2VEC2_BASE"),
        ("wavlm-base", "WAVLM_BASE"),
        ("wavlm-large", "WAVLM_LARGE"),
    ],
)
def test_architecture_is_that_of_torchaudios_bundle(name, bundle, monkeypatch):
    import torchaudio

    built = {}
    for factory in ("wav2vec2_model", "wavlm_model"):
        monkeypatch.setattr(torchaudio.models, factory, lambda factory=factory, **sizes: built.update({factory: sizes}))
    ARCHITECTURES[name].build()
    (sizes,) = built.values()
    assert sizes == getattr(torchaudio.pipelines, bundle)._params


def test_unknown_names_and_tunes():
    with pytest.raises(ValueError, match=r"one of tiny, .*; found 'hubert'"):
        create_frontend("hubert")
    for tune in (0, 3, True, "last", 1.0):
        with pytest.raises(ValueError, match=f"from 1 to 2; found {tune!r}"):
            create_frontend("tiny", tune=tune)
    assert trained(create_frontend("tiny", tune=2)) == trained(build(TINY, tune=2))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_tuned(variant, wave):
    architecture = replace(VARIANTS[variant], num_layers=3)
    model = build(architecture, tune="all")
    assert trained(model) == set(dict(model.named_parameters()))
    model = build(architecture, tune="none")
    assert trained(model) == set()
    assert not any(module.training for module in model.model.modules())
    # Nothing is kept for the wave's gradient either.
    assert not model(wave.clone().requires_grad_()).requires_grad
    model = build(architecture, tune=2)
    last_norm = "model.encoder.transformer.layer_norm."
    expected = {
        name
        for name, _ in model.named_parameters()
        if ".layers.1." in name
        or ".layers.2." in name
        or (architecture.layer_norm_first and name.startswith(last_norm))
    }
    assert trained(model) == expected
    model(wave).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected


@pytest.mark.parametrize("tune", ["none", 1])
def test_what_is_frozen_stays_in_evaluation_mode(tune, wave):
    model = build(replace(TINY, **DROPOUTS | {"layer_drop": 0.0}), tune=tune).train()
    layers = model.model.encoder.transformer.layers
    assert not layers[0].training
    assert layers[1].training is (tune == 1)
    assert not model.model.encoder.transformer.dropout.training
    features = model(wave)
    assert torch.equal(features, model(wave)) is (tune == "none")
    torch.testing.assert_close(model.eval()(wave), build(TINY).eval()(wave))


def gradients(model, wave):
    model.zero_grad()
    torch.manual_seed(5)
    features = model(wave)
    features.square().sum().backward()
    return features.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tune", ["all", 1])
@pytest.mark.parametrize("variant", ["wav2vec2-stable", "wavlm-post-norm"])
def test_checkpointing_changes_nothing(variant, tune, wave):
    architecture = replace(VARIANTS[variant], **DROPOUTS)
    features, expected = gradients(build(architecture, tune=tune), wave)
    again, found = gradients(build(architecture, tune=tune, checkpointing=True), wave)
    torch.testing.assert_close(again, features, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_checkpointing_is_as_asked(load, tmp_path):
    torch.save(build(TINY).model.state_dict(), tmp_path / "model.pt")
    for weights in (None, tmp_path / "model.pt"):
        assert not create_frontend("tiny", weights).checkpointing
        assert create_frontend("tiny", weights, checkpointing=True).checkpointing


def test_checkpointing_keeps_fewer_activations(wave):
    def kept(checkpointing):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        model = build(replace(TINY, num_layers=8), checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.model.feature_extractor.requires_grad_(False)
            model(wave)
        return total

    assert kept(True) < kept(False) / 2


def test_dropped_layers_pass_their_input_on(wave):
    model = build(replace(TINY, layer_drop=1.0)).train()
    features, grads = gradients(model, wave)
    transformer = model.model.encoder.transformer
    with torch.no_grad():
        x = model.model.encoder.feature_projection(model.model.feature_extractor(wave, None)[0])
        expected = transformer.layer_norm(x + transformer.pos_conv_embed(x))
    torch.testing.assert_close(features, expected)
    for name, grad in grads.items():
        assert bool(grad.any()) is (".layers." not in name), name
    torch.testing.assert_close(model.eval()(wave), build(TINY).eval()(wave))


def test_layers_are_dropped_at_their_rate():
    model = build(replace(TINY, layer_drop=0.25)).train()
    wave = torch.ones(1, 400)
    kept = dict.fromkeys(("none", "one", "both"), 0)
    torch.manual_seed(0)
    for _ in range(200):
        model.zero_grad()
        model(wave).square().sum().backward()
        grads = [layer.feed_forward.output_dense.weight.grad for layer in model.model.encoder.transformer.layers]
        kept[("none", "one", "both")[sum(bool(grad.any()) for grad in grads)]] += 1
    # Binomial: 6.25 %, 37.5 % and 56.25 % of 200, four standard deviations.
    assert 0 < kept["none"] <= 26
    assert 48 <= kept["one"] <= 102
    assert 85 <= kept["both"] <= 140


def test_wavlm_keeps_its_position_bias_when_its_first_layer_is_dropped(wave):
    # The bias is computed by the first layer for all of them.
    model = build(replace(VARIANTS["wavlm-stable"], layer_drop=0.5)).train()
    first, second = model.model.encoder.transformer.layers
    torch.nn.init.normal_(first.attention.rel_attn_embed.weight)
    for seed in range(50):
        torch.manual_seed(seed)
        if torch.rand(()) < 0.5 and torch.rand(()) >= 0.5:
            break
    biases = []
    second.register_forward_pre_hook(lambda _, inputs: biases.append(inputs[2]))
    torch.manual_seed(seed)
    model(wave).square().sum().backward()
    assert biases[0] is not None
    assert biases[0].any()
    assert not first.feed_forward.output_dense.weight.grad.any()
    assert first.attention.rel_attn_embed.weight.grad.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alignment_of_two_paths_through_layer_drop(checkpointing, wave):
    model = build(replace(TINY, **DROPOUTS), checkpointing=checkpointing).train()
    optimizer = ga.AlignedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), method="pcgrad")
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        losses = [model(wave).square().mean(), model(wave.flip(1)).abs().mean()]
        optimizer.backward(losses)
        optimizer.step()
    after = list(model.parameters())
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(after) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["wav2vec2-stable", "wavlm-stable"])
def test_bfloat16_autocast(variant, checkpointing, wave):
    model = build(VARIANTS[variant], checkpointing=checkpointing)
    exact = model(wave).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(wave)
    assert features.dtype == torch.float32
    features.square().sum().backward()
    # Features are layer-normed: of size one.
    assert (features - exact).abs().max() < 0.1
    assert (features - exact).abs().max() > 0
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiles_to_one_graph_with_layer_drop(wave):
    # A layer that is not computed when it is dropped would need a decision on the host, and break the graph.
    torch._dynamo.reset()
    model = build(replace(TINY, layer_drop=0.5)).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model(wave)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(wave), expected)


def test_float64_model(wave):
    model = build(TINY).double().eval()
    features = model(wave)
    assert features.dtype == torch.float64
    single = build(TINY).eval()
    torch.testing.assert_close(features.float(), single(wave), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single(wave.double()), single(wave), rtol=0, atol=0)


def test_torchaudio_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ImportError, match="pip install torchaudio"):
        create_frontend("tiny")


def test_a_torchaudio_for_another_cuda_is_named(monkeypatch, tmp_path):
    # As torchaudio 2.11 fails beside PyTorch 2.15, which PyPI has for CUDA 13.2.
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('compiled with different CUDA versions')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"not load with PyTorch .* compiled with .*pip install '\.\[train\]'"):
        create_frontend("tiny")


# ---- weights from files ----


@pytest.fixture(params=VARIANTS)
def architecture(request):
    return VARIANTS[request.param]


@pytest.fixture
def load(monkeypatch):
    """A function that builds a front end of an architecture from a file, as a user does by name."""

    def load(architecture, path, **options):
        monkeypatch.setitem(ARCHITECTURES, "test", architecture)
        return create_frontend("test", weights=path, **options).eval()

    return load


def transformers_model(architecture, model_class="Model", seed=0):
    """A random transformers model of our architecture, no two of its weights equal."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    pytest.importorskip("safetensors", reason="needs safetensors, of the test extra")
    family = "WavLM" if architecture.num_buckets else "Wav2Vec2"
    sizes = {key: value for key, value in architecture.hugging_face_config().items() if key != "model_type"}
    config = getattr(transformers, f"{family}Config")(**sizes, codevector_dim=16, proj_codevector_dim=16)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{model_class}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture
def original(architecture):
    return transformers_model(architecture)


def older_weight_norm(state):
    """The names of weight norm before PyTorch 2.1, as in nearly all published files."""
    return {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in state.items()
    }


# Written down from fairseq's wav2vec2.py and Microsoft's WavLM.py, independent of the key map under test.
TO_FAIRSEQ = [
    ("feature_projection.projection.", "post_extract_proj."),
    ("feature_projection.layer_norm.", "layer_norm."),
    ("encoder.pos_conv_embed.conv.", "encoder.pos_conv.0."),
    (".attention.rel_attn_embed.", ".self_attn.relative_attention_bias."),
    (".attention.gru_rel_pos_linear.", ".self_attn.grep_linear."),
    (".attention.gru_rel_pos_const", ".self_attn.grep_a"),
    (".attention.", ".self_attn."),
    (".feed_forward.intermediate_dense.", ".fc1."),
    (".feed_forward.output_dense.", ".fc2."),
    ("masked_spec_embed", "mask_emb"),
]


def fairseq_state(model, architecture):
    state = {}
    for key, value in older_weight_norm(model.state_dict()).items():
        for theirs, fairseq in TO_FAIRSEQ:
            key = key.replace(theirs, fairseq)
        key = re.sub(r"(encoder\.layers\.\d+\.)layer_norm", r"\1self_attn_layer_norm", key)
        norm = "2.1" if architecture.extractor_norm == "layer_norm" else "2"
        key = re.sub(r"(conv_layers\.\d+\.)conv\.", r"\g<1>0.", key)
        key = re.sub(r"(conv_layers\.\d+\.)layer_norm\.", rf"\g<1>{norm}.", key)
        state[key] = value.clone()
    return state | {
        "quantizer.vars": torch.ones(1, 4, 2),
        "quantizer.temperature": 2.0,
        "project_q.weight": torch.ones(2, 2),
        "final_proj.bias": torch.ones(2),
    }


class Settings:
    """Stands for a class of fairseq's or omegaconf's in a checkpoint."""

    def __init__(self, **values):
        self.values = values


@pytest.fixture
def foreign_module(monkeypatch):
    """A package that is there when a file is written and gone when it is read."""
    module = types.ModuleType("omegaconf_like")
    Settings.__module__, Settings.__qualname__ = "omegaconf_like", "Settings"
    module.Settings = Settings
    monkeypatch.setitem(sys.modules, "omegaconf_like", module)
    yield lambda: monkeypatch.setitem(sys.modules, "omegaconf_like", None)
    Settings.__module__, Settings.__qualname__ = __name__, "Settings"


def assert_same_features(model, original, wave):
    with torch.no_grad():
        expected = original(wave).last_hidden_state
        found = model(wave)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_hugging_face_folder(architecture, original, load, tmp_path, wave):
    original.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    # Read first, as transformers does.
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_same_features(load(architecture, tmp_path), original, wave)


@pytest.mark.parametrize("variant", ["wav2vec2-stable", "wavlm-post-norm"])
def test_hugging_face_folder_with_a_pickled_file_and_older_names(variant, load, tmp_path, wave):
    original = transformers_model(VARIANTS[variant])
    original.config.save_pretrained(tmp_path)
    torch.save(older_weight_norm(original.state_dict()), tmp_path / "pytorch_model.bin")
    assert_same_features(load(VARIANTS[variant], tmp_path), original, wave)


def test_hugging_face_pretraining_model(load, tmp_path, wave):
    # As the published XLS-R folders are: all keys under wav2vec2., and the quantizer beside it.
    original = transformers_model(TINY, "ForPreTraining")
    original.save_pretrained(tmp_path)
    assert_same_features(load(TINY, tmp_path), original.wav2vec2, wave)


def test_hugging_face_half_precision(load, tmp_path, wave):
    original = transformers_model(TINY).half()
    original.save_pretrained(tmp_path)
    assert_same_features(load(TINY, tmp_path), original.float(), wave)


@pytest.mark.parametrize("legacy", [False, True])
def test_fairseq_file(architecture, original, legacy, load, tmp_path, wave, foreign_module):
    content = {
        "args": argparse.Namespace(arch="wav2vec2", encoder_layers=2),
        "cfg": {
            "model": Settings(_content={"dropout": 0.0}),
            "seen": defaultdict(list, {"a": [1]}),
            "n": np.float64(1),
            # Named as in Python 2.
            "range": range(3),
        },
        "model": fairseq_state(original, architecture),
        "optimizer_history": [{"num_updates": 3, "criterion_name": "Wav2vecCriterion"}],
        "extra_state": {"val_loss": torch.tensor(2.0)},
    }
    path = tmp_path / "xlsr2_300m.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    foreign_module()
    assert_same_features(load(architecture, path), original, wave)


def test_fairseq_keys_are_torchaudios(architecture, original):
    torchaudio_map = pytest.importorskip("torchaudio.models.wav2vec2.utils.import_fairseq")._map_key
    keys = fairseq_state(original, architecture)
    assert len(keys) > 50
    for key in keys:
        wavlm_only = re.search(r"\.(relative_attention_bias|grep_)", key)
        if not wavlm_only:
            assert (_import.fairseq_key(key) or None) == torchaudio_map(key)


def test_unknown_fairseq_keys():
    for key in (
        "w2v_encoder.proj.weight",
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.x.fc1.weight",
        "quantizers.x",
        "encoder.layers.0.fc1.weight.x",
        "feature_extractor.conv_layers.1.2.weight",
    ):
        assert _import.fairseq_key(key) is None


def test_keys_of_rarer_files():
    # Weight norm since PyTorch 2.1, a fine-tuned WavLM, and what pretraining of HuBERT's kind adds.
    norm = "conv.parametrizations.weight.original1"
    assert _import.fairseq_key(f"encoder.pos_conv.0.{norm[5:]}") == f"encoder.transformer.pos_conv_embed.{norm}"
    assert _import.hugging_face_key("wavlm.encoder.layer_norm.bias") == "encoder.transformer.layer_norm.bias"
    assert _import.hugging_face_key("lm_head.weight") is None
    assert _import.fairseq_key("label_embs_concat") == ""


@pytest.mark.parametrize("older", [False, True])
def test_torchaudio_state_dict(architecture, older, load, tmp_path, wave):
    original = build(architecture, seed=3).eval()
    state = original.model.state_dict()
    torch.save(older_weight_norm(state) if older else state, tmp_path / "model.pt")
    model = load(architecture, tmp_path / "model.pt")
    torch.testing.assert_close(model.state_dict(), original.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model(wave), original(wave), rtol=0, atol=0)


def test_loaded_weights_are_trained_as_asked(load, tmp_path, wave):
    torch.save(build(TINY).model.state_dict(), tmp_path / "model.pt")
    model = load(TINY, str(tmp_path / "model.pt"), tune=1)
    assert trained(model) == trained(build(TINY, tune=1))
    model.train()(wave).sum().backward()


def test_loading_does_not_draw_random_numbers(load, tmp_path):
    torch.save(build(TINY).model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(TINY, tmp_path / "model.pt")
    assert torch.equal(torch.rand(3), expected)


# ---- files that do not fit ----


@pytest.fixture
def state():
    return dict(build(TINY).model.state_dict())


def test_missing_and_unexpected_keys_are_named(state, load, tmp_path):
    path = tmp_path / "model.pt"
    del state["encoder.transformer.layers.1.attention.q_proj.bias"]
    state["aux.weight"] = torch.ones(2)
    torch.save(state, path)
    with pytest.raises(CheckpointError) as error:
        load(TINY, path)
    assert str(path) in str(error.value)
    assert "missing encoder.transformer.layers.1.attention.q_proj.bias;" in str(error.value)
    assert "unexpected aux.weight" in str(error.value)


def test_many_keys_are_counted(state, load, tmp_path):
    torch.save(
        {"model": {key: value for key, value in state.items() if ".layers.1." not in key}}, tmp_path / "model.pt"
    )
    with pytest.raises(CheckpointError, match=r"missing (encoder\.\S+, ){7}encoder\.\S+ and 8 more; unexpected none"):
        load(TINY, tmp_path / "model.pt")


def test_unexpected_wavlm_keys_of_fairseqs_layout(load, tmp_path):
    state = fairseq_state(transformers_model(VARIANTS["wavlm-stable"]), VARIANTS["wavlm-stable"])
    torch.save({"model": state}, tmp_path / "WavLM.pt")
    with pytest.raises(CheckpointError, match=r"unexpected .*rel_attn_embed"):
        load(replace(VARIANTS["wavlm-stable"], num_buckets=0), tmp_path / "WavLM.pt")


def test_other_shapes_are_named(state, load, tmp_path):
    state["encoder.feature_projection.projection.bias"] = torch.ones(31)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt: .*projection.bias must be \[32\], found \[31\]"):
        load(TINY, tmp_path / "model.pt")


@pytest.mark.parametrize("value", [torch.ones(95), torch.tensor(1.0)])
def test_packed_projections_of_other_shapes_are_named(value, load, tmp_path):
    state = build(VARIANTS["wavlm-stable"]).model.state_dict()
    state["encoder.transformer.layers.1.attention.attention.in_proj_bias"] = value
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unexpected encoder.transformer.layers.1.attention.in_proj_bias$"):
        load(VARIANTS["wavlm-stable"], tmp_path / "model.pt")


def test_a_model_that_is_no_dictionary_is_unexpected(load, tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unexpected model$"):
        load(TINY, tmp_path / "model.pt")


def test_up_to_eight_names_are_listed():
    assert _import._listed(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert _import._listed(list("abcdefghi")) == "a, b, c, d, e, f, g, h and 1 more"


def test_other_configurations_are_named(load, tmp_path):
    transformers_model(TINY).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json: .*num_attention_heads must be 8, found 4"):
        load(replace(TINY, num_heads=8), tmp_path)
    with pytest.raises(CheckpointError, match="model_type must be 'wavlm', found 'wav2vec2'"):
        load(VARIANTS["wavlm-stable"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    fixed = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5}
    fixed |= {"conv_pos_batch_norm": False, "add_adapter": False}
    fixed |= {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
    for key, value in (TINY.hugging_face_config() | fixed).items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: "x"}))
        with pytest.raises(CheckpointError, match=re.escape(f"{key} must be {value!r}, found 'x'")):
            load(TINY, tmp_path)


def test_incomplete_folders(load, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json; found none"):
        load(TINY, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON"):
        load(TINY, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object; found list"):
        load(TINY, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.safetensors or pytorch_model.bin; found neither"):
        load(TINY, tmp_path)


def test_damaged_safetensors(load, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors, of the test extra")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a safetensors file"):
        load(TINY, tmp_path)


def test_safetensors_missing(load, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(TINY, tmp_path)


def test_missing_file(load, tmp_path):
    with pytest.raises(CheckpointError, match=r"no.pt: expected pretrained weights; found nothing there"):
        load(TINY, tmp_path / "no.pt")


@pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04", bytes(100), pickle.dumps(3)])
def test_other_files(content, load, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.pt: expected a PyTorch file"):
        load(TINY, tmp_path / "x.pt")


def test_no_dictionary(load, tmp_path):
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary of weights; found list"):
        load(TINY, tmp_path / "x.pt")


def test_truncated_and_changed_files(state, load, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.pt: expected a PyTorch file"):
        load(TINY, path)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"differs from its checksum|Bad CRC"):
        load(TINY, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_to_an_older_file_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model.pt: expected"):
            _import.read_torch_file(path)
    for bit in (1, 2):
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            # No checksum: what can be read is read.
            with suppress(CheckpointError):
                _import.read_torch_file(path)


# ---- nothing in a file is executed ----


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "exec": Call(exec, code),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "touch": Call(type(marker).touch, marker),
        "system": Call(os.system, f"touch {marker}"),
        "runpy": Call(runpy.run_path, str(marker.with_suffix(".py"))),
        "nested": {"cfg": [argparse.Namespace(a=Call(exec, code))]},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("attack", ["exec", "eval", "open", "touch", "system", "runpy", "nested"])
def test_nothing_in_a_file_is_executed(attack, legacy, state, load, tmp_path):
    marker = tmp_path / "executed"
    marker.with_suffix(".py").write_text(f"open({str(marker)!r}, 'w').close()")
    path = tmp_path / "model.pt"
    content = {"model": state, "cfg": attacks(marker)[attack]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    # The attack works where a file is unpickled.
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.unlink()
    # What no inert object stands for is refused: the operating system's functions, and a function of a function.
    reason = {"system": "posix.system", "touch": "reduce for unrecognized function"}.get(attack)
    if reason:
        with pytest.raises(CheckpointError, match=rf"model.pt: .*found pickled code: .*{reason}") as error:
            load(TINY, path)
        assert "documentation of torch.load" not in str(error.value)
    else:
        load(TINY, path)
    assert not marker.exists()


def test_a_call_in_place_of_a_weight_is_refused(state, load, tmp_path):
    marker = tmp_path / "executed"
    state["encoder.transformer.layer_norm.bias"] = Call(exec, f"open({str(marker)!r}, 'w')")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unexpected encoder.transformer.layer_norm.bias"):
        load(TINY, tmp_path / "model.pt")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_newer_pickle_protocols_are_refused(state, load, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"model": state}, tmp_path / "model.pt")
    replaced = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "model.pt") as archive, zipfile.ZipFile(replaced, "w") as other:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = pickle.dumps(Call(exec, f"open({str(marker)!r}, 'w')"), protocol=4)
            other.writestr(name, content)
    (tmp_path / "model.pt").write_bytes(replaced.getvalue())
    with pytest.raises(CheckpointError, match=r"model.pt: expected"):
        load(TINY, tmp_path / "model.pt")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*(is deprecated|looks like a TorchScript archive)")
def test_torchscript_is_refused(load, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(TINY, tmp_path / "model.pt")


def test_names():
    assert set(frontend.names()) >= {"tiny", "xlsr-300m", "xlsr-1b", "wav2vec2-base", "wavlm-base", "wavlm-large"}
