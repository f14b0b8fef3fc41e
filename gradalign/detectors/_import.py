"""Pretrained wav2vec 2.0, XLS-R and WavLM weights from the files they are published in, loaded by key maps.

Nothing in a file is executed: PyTorch's weights-only reader rebuilds tensors and plain containers, and every other
class that a file names (fairseq's files name its configuration's) becomes an inert object.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradalign._errors import CheckpointError
from gradalign._files import read_json

# Used in pretraining only: the quantizer and its projections, the loss's projections and label embeddings, and what
# masked frames are replaced with.
_PRETRAINING_KEYS = re.compile(
    r"(wav2vec2\.|wavlm\.)?"
    r"(quantizer|project_q|project_hid|final_proj|mask_emb|masked_spec_embed|label_embs_concat)(\.|$)"
)

# fairseq's names, which Microsoft's WavLM files share, and torchaudio's.
_FAIRSEQ_NAMES = [
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    # Group norm after the first convolution only, or layer norm between two transpositions after each one.
    (r"feature_extractor\.conv_layers\.(0)\.2\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"layer_norm\.(weight|bias)", r"encoder.feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"encoder.feature_projection.projection.\1"),
    (
        r"encoder\.pos_conv\.0\.(bias|weight_g|weight_v|parametrizations\.weight\.original[01])",
        r"encoder.transformer.pos_conv_embed.conv.\1",
    ),
    (r"encoder\.layer_norm\.(weight|bias)", r"encoder.transformer.layer_norm.\1"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.([kvq]|out)_proj\.(weight|bias)",
        r"encoder.transformer.layers.\1.attention.\2_proj.\3",
    ),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight",
        r"encoder.transformer.layers.\1.attention.rel_attn_embed.weight",
    ),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(weight|bias)",
        r"encoder.transformer.layers.\1.attention.gru_rel_pos_linear.\2",
    ),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", r"encoder.transformer.layers.\1.attention.gru_rel_pos_const"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", r"encoder.transformer.layers.\1.layer_norm.\2"),
    (
        r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)",
        r"encoder.transformer.layers.\1.feed_forward.intermediate_dense.\2",
    ),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", r"encoder.transformer.layers.\1.feed_forward.output_dense.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)", r"encoder.transformer.layers.\1.final_layer_norm.\2"),
]

# What transformers' models compute otherwise than torchaudio's unless its configuration says this.
_HUGGING_FACE_FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
}


def fairseq_key(key: str) -> str | None:
    """torchaudio's name of a weight of fairseq's wav2vec 2.0 or Microsoft's WavLM; "" without use here, None unknown.

    >>> fairseq_key("encoder.layers.3.fc1.weight")
    'encoder.transformer.layers.3.feed_forward.intermediate_dense.weight'
    >>> fairseq_key("quantizer.vars")
    ''
    """
    if _PRETRAINING_KEYS.match(key):
        return ""
    for theirs, ours in _FAIRSEQ_NAMES:
        match = re.fullmatch(theirs, key)
        if match:
            return match.expand(ours)
    return None


def hugging_face_key(key: str) -> str | None:
    """torchaudio's name of a weight of transformers' Wav2Vec2Model or WavLMModel; "" without use here, None unknown.

    >>> hugging_face_key("wav2vec2.encoder.layers.0.attention.q_proj.bias")
    'encoder.transformer.layers.0.attention.q_proj.bias'
    """
    if _PRETRAINING_KEYS.match(key):
        return ""
    key = re.sub(r"^(wav2vec2|wavlm)\.", "", key)
    if key.startswith("feature_extractor."):
        return key
    if key.startswith("feature_projection."):
        return f"encoder.{key}"
    if key.startswith("encoder."):
        return f"encoder.transformer.{key.removeprefix('encoder.')}"
    return None


def torchaudio_key(key: str) -> str | None:
    """A weight's name in torchaudio's own files: itself; None where it is not of the feature extractor or encoder.

    >>> torchaudio_key("aux.weight") is None
    True
    """
    return key if key.startswith(("feature_extractor.", "encoder.")) else None


def split_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """View torchaudio's weights under names that do not depend on the version or on how they are packed.

    Weight norm is ``weight_g`` and ``weight_v``, as in older PyTorch, and WavLM's query, key and value projections are
    three matrices.
    """
    parts = {}
    for name, value in state.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        name = name.replace(".attention.attention.", ".attention.")
        packed = re.fullmatch(r"(.*\.attention\.)in_proj_(weight|bias)", name)
        if packed and value.ndim > 0 and value.shape[0] % 3 == 0:
            for which, part in zip("qkv", value.chunk(3), strict=True):
                parts[f"{packed[1]}{which}_proj.{packed[2]}"] = part
        else:
            parts[name] = value
    return parts


def load_weights(model: nn.Module, path: Path, hugging_face_config: dict[str, Any]) -> None:
    """Load published weights into a torchaudio ``Wav2Vec2Model``: every key is used, every weight is set.

    Args:
        model: on the CPU; its weights are overwritten.
        path: a fairseq or WavLM ``.pt``, a state dict of torchaudio's, or a Hugging Face folder.
        hugging_face_config: what such a folder's ``config.json`` must hold for this model.

    Raises:
        CheckpointError: naming the file and what is missing, unexpected or of another shape; the model is unchanged.
    """
    our_key: Callable[[str], str | None]
    if path.is_dir():
        path, state = _read_hugging_face(path, hugging_face_config)
        our_key = hugging_face_key
    elif path.is_file():
        state = read_torch_file(path)
        if isinstance(state.get("model"), dict):
            state = state["model"]
        own = any(str(key).startswith("encoder.transformer.") for key in state)
        our_key = torchaudio_key if own else fairseq_key
    else:
        raise CheckpointError(f"{path}: expected pretrained weights; found nothing there")

    named = {}
    unexpected = []
    for key, value in state.items():
        name = our_key(str(key))
        if name is None or (name and not isinstance(value, Tensor)):
            unexpected.append(str(key))
        elif name:
            named[name] = value
    # Of the same storage as the model's weights.
    targets = split_weights(model.state_dict())
    found = split_weights(named)
    expect_weights(path, found, targets, unexpected)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])


def expect_weights(path: Path, found: dict[str, Any], expected: dict[str, Tensor], unexpected: list[str]) -> None:
    """Raise CheckpointError naming the file and what is missing, ``unexpected`` or in no place, or of another shape."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted({*unexpected, *set(found) - set(expected)})
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: expected this model's weights; missing {_listed(missing)}; unexpected {_listed(unexpected)}"
        )
    wrong = [
        f"{name} must be {list(value.shape)}, found {list(found[name].shape)}"
        for name, value in expected.items()
        if found[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(f"{path}: expected this model's weights; {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    """Join up to eight names, and say how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "none"


def _read_hugging_face(folder: Path, expected: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The weights' file in a folder that ``save_pretrained`` wrote, and what it holds."""
    config_path = folder / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{folder}: expected a folder with config.json; found none in it")
    config = read_json(config_path, CheckpointError)
    wrong = [
        f"{key} must be {value!r}, found {config[key]!r}"
        for key, value in (expected | _HUGGING_FACE_FIXED).items()
        if key in config and config[key] != value
    ]
    if wrong:
        raise CheckpointError(f"{config_path}: expected this model's configuration; {_listed(wrong)}")
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", read_torch_file)):
        if (folder / name).is_file():
            return folder / name, read(folder / name)
    raise CheckpointError(f"{folder}: expected model.safetensors or pytorch_model.bin; found neither")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{path}: reading this file needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file; {error}") from None


class _Inert:
    """Stands for an object of any class that a file names: built from anything, doing nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _inert_dict(*args: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`: the reader fills plain dictionaries only."""
    return {}


def read_torch_file(path: Path) -> dict[Any, Any]:
    """Read a file of ``torch.save``, of any age, without importing or calling anything that it names.

    Returns:
        The dictionary that it holds, tensors on the CPU. Objects other than tensors, numbers, strings and plain
        containers are replaced by inert ones.

    Raises:
        CheckpointError: the file is damaged, is not of ``torch.save``, holds no dictionary, or names what not even an
            inert object stands for (functions of the operating system).
    """
    try:
        known: list[Any] = [
            (_inert_dict if name == "collections.defaultdict" else _Inert, name) for name in _globals_of(path)
        ]
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own advice stands around the reason.
        reason = re.sub(r"\s*Check the documentation of torch\.load.*", "", str(error), flags=re.DOTALL)
        reason = re.sub(r".*(trusted source\.|WeightsUnpickler error:)\s*", "", reason, flags=re.DOTALL)
        raise CheckpointError(f"{path}: expected tensors and plain values; found pickled code: {reason}") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Damaged data raise nearly anything in the readers.
        raise CheckpointError(f"{path}: expected a PyTorch file; found a damaged or another one: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of weights; found {type(content).__name__}")
    return content


def _globals_of(path: Path) -> set[str]:
    """The full names of all classes and functions in a file of ``torch.save``, found without unpickling it."""
    names = set()

    def collect(stream: Any) -> None:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                # Protocol 2 spells Python 2's names, which the reader translates.
                if (module, name) in _compat_pickle.NAME_MAPPING:
                    module, name = _compat_pickle.NAME_MAPPING[module, name]
                else:
                    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
                names.add(f"{module}.{name}")

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # PyTorch does not compare the archive's checksums.
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    collect(archive.read(name))
    else:
        with path.open("rb") as file:
            # Before PyTorch 1.6: magic number, version, system and content, one after the other; raw data after them.
            for _ in range(4):
                collect(file)
    return names
