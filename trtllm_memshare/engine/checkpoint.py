"""Checks a Hugging Face checkpoint before anything is built from it. Reads headers, never weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.weights import check_weights
from trtllm_memshare.errors import UserError

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # rotations that depend on the position alone


@dataclass(frozen=True)
class Checkpoint:
    """What an engine needs to know of a model.

    Attributes:
      dtype: element type the model computes in, a key of ``ELEMENT_BYTES``.
      max_position_embeddings: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
      stop_token_ids: end-of-text tokens, those transformers' ``generate`` stops at.
    """

    model_dir: Path
    architecture: str
    dtype: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    stop_token_ids: tuple[int, ...]


def read_checkpoint(model_dir: Path, with_weights: bool = True) -> Checkpoint:
    """Validates a checkpoint directory.

    Args:
      with_weights: whether there have to be any; a TensorRT engine holds its own.

    Raises:
      UserError: a missing or half-written file, weights that are not safetensors, or an architecture that the paged
        cache cannot serve (sliding window, no rotary embedding, encoder-decoder, rotations that change with length).
    """
    if not model_dir.is_dir():
        raise UserError(
            f"no checkpoint directory at {model_dir} (give --model-dir a folder with a Hugging Face checkpoint; a name "
            f"on the hub has to be downloaded first)"
        )
    config = read_json(model_dir / "config.json", "the checkpoint", "give --model-dir a Hugging Face checkpoint")
    _check_architecture(config, model_dir)
    weight_dtype = check_weights(model_dir) if with_weights else None
    _check_tokenizer(model_dir)
    generation = _optional_json(model_dir / "generation_config.json")
    path = model_dir / "config.json"
    heads, hidden = _positive(config, "num_attention_heads", path), _positive(config, "hidden_size", path)
    kv_heads = _positive(config, "num_key_value_heads", path, heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    # transformers takes the weights' own type where the config names none; 4.x wrote the key as torch_dtype.
    dtype = str(config.get("dtype") or config.get("torch_dtype") or weight_dtype).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise UserError(f"{path} has dtype {dtype}, expected one of {', '.join(ELEMENT_BYTES)} (convert the weights)")
    return Checkpoint(
        model_dir=model_dir,
        architecture=config["architectures"][0],
        dtype=dtype,
        hidden_size=hidden,
        num_layers=_positive(config, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", path, hidden // heads),
        vocab_size=_positive(config, "vocab_size", path),
        max_position_embeddings=_positive(config, "max_position_embeddings", path),
        rope_theta=_rope_theta(config, path),
        stop_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id")), path),
    )


def read_json(path: Path, whose: str, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; ``whose`` and ``remedy`` go into the error."""
    if not path.is_file():
        raise UserError(f"{whose} is missing {path} ({remedy})")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} ({remedy})") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is damaged: not JSON ({error}) ({remedy})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(document).__name__} ({remedy})")
    return document


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint's config.json that spells its rotary settings for transformers 4.x and 5.x.

    4.57 does not know ``rope_parameters``: it loads what 5.x saved with base 10000, whatever the file says.
    """
    rope = _rope_settings(config)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = (scaling.get("rope_type") or scaling.get("type") or "default") == "default"
    return {
        **config,
        "rope_theta": theta,
        "rope_scaling": None if is_plain else scaling,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta},
    }


def _check_architecture(config: dict[str, Any], model_dir: Path) -> None:
    """Refuses what paged attention with shared blocks would compute wrongly."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "none"
    if config.get("is_encoder_decoder"):
        raise UserError(f"{model_dir} is an encoder-decoder ({name}), expected one of {', '.join(SUPPORTED)}")
    if name not in SUPPORTED:
        raise UserError(
            f"{model_dir} has architecture {name}, expected one of {', '.join(SUPPORTED)}: decoders with rotary "
            f"embeddings and no sliding window"
        )
    if config.get("quantization_config"):
        raise UserError(f"{model_dir} holds quantized weights, expected plain ones (take the unquantized checkpoint)")
    slides = "sliding_attention" in (config.get("layer_types") or [])
    if name == "MistralForCausalLM":
        # A config without the key means 4096: that is transformers' default for Mistral.
        slides = slides or config.get("sliding_window", 4096) is not None
    else:
        slides = slides or bool(config.get("use_sliding_window"))
    if slides:
        raise UserError(
            f"{model_dir} uses a sliding window, which rewrites cache slots that sharing relies on (take a model "
            f"without one, or switch it off in config.json if the model was trained for full attention)"
        )
    rope = _rope_settings(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise UserError(
            f"{model_dir} has rope_type {kind}, expected one of {', '.join(_ROPE_TYPES)}: K of two positions cannot be "
            f"compared when rotations change with the length of the text (take a model without it)"
        )


def _check_tokenizer(model_dir: Path) -> None:
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{model_dir} has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)} (copy the tokenizer files "
            f"of the model beside its weights)"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _optional_json(model_dir / name)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, "the checkpoint", "copy the file again") if path.exists() else {}


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` of transformers 4.x where it is given, as in 5.x too; else ``rope_parameters`` of 5.x."""
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict) and config[key]:
            return config[key]
    return {}


def _rope_theta(config: dict[str, Any], path: Path) -> float:
    theta = _rope_settings(config).get("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{path}: rope_theta must be a positive number, got {theta!r} (take the model's own file)")
    return float(theta)


def _positive(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A positive integer of ``config``; a missing or null key means ``default``, where there is one."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path} lacks {key} (take the config.json of the model)")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a positive integer, got {value!r} (take the model's own file)")
    return value


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{path}: eos_token_id must be token ids, got {value!r} (take the model's own file)")
    return tuple(ids)
