"""Checks a Hugging Face checkpoint before anything is built from it. Reads headers, never weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit


@dataclass(frozen=True)
class Checkpoint:
    """What an engine needs to know of a model. ``dtype``: of the weights, e.g. "float32"."""

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


def read_checkpoint(model_dir: Path) -> Checkpoint:
    """Validates a checkpoint directory.

    Raises:
      UserError: a missing or half-written file, weights that are not safetensors, or an architecture that the paged
        cache cannot serve (sliding window, no rotary embedding, encoder-decoder, rotations that change with length).
    """
    config = read_json(model_dir / "config.json", "the checkpoint", "give --model-dir a Hugging Face checkpoint")
    _check_architecture(config, model_dir)
    check_weights(model_dir)
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{model_dir} has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)} (copy the tokenizer files "
            f"of the model beside its weights)"
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or {}
        eos = config.get("eos_token_id")
        return Checkpoint(
            model_dir=model_dir,
            architecture=config["architectures"][0],
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            hidden_size=hidden,
            num_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            stop_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        )
    except KeyError as error:
        raise UserError(f"{model_dir}/config.json lacks {error.args[0]} (take the config.json of the model)") from error


def read_json(path: Path, whose: str, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; ``whose`` and ``remedy`` go into the error."""
    if not path.is_file():
        raise UserError(f"{whose} is missing {path} ({remedy})")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: not JSON ({error}) ({remedy})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(document).__name__} ({remedy})")
    return document


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError if there are none or one is missing."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = set(read_json(index, "the checkpoint", "copy the checkpoint again").get("weight_map", {}).values())
        missing = sorted(n for n in names if not (model_dir / n).is_file())
        if missing or not names:
            raise UserError(
                f"{model_dir} lacks {', '.join(missing) or 'all shards'} named in {index.name} (copy again)"
            )
        return [model_dir / n for n in sorted(names)]
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    found = f"found {', '.join(others)}, which can run code when loaded" if others else "found no weights"
    raise UserError(f"{model_dir} needs model.safetensors, {found} (save the model with safe_serialization=True)")


def check_weights(model_dir: Path) -> None:
    """Compares each safetensors file's length with what its header promises.

    The format: 8 bytes with the header's length, the header as JSON with each tensor's offsets, then the data.
    """
    for path in weight_files(model_dir):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = size >= 8 and 0 < length <= min(size - 8, _LONGEST_HEADER)
            try:
                header = json.loads(file.read(length)) if whole else {}
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                ends = []
        expected = 8 + length + max(ends) if ends else None
        if expected != size:
            detail = f"expected {expected} bytes, got {size}" if expected else "its header cannot be read"
            raise UserError(f"{path} is half-written or damaged: {detail} (copy or download the checkpoint again)")


def _check_architecture(config: dict[str, Any], model_dir: Path) -> None:
    """Refuses what paged attention with shared blocks would compute wrongly."""
    names = config.get("architectures") or ["none"]
    if config.get("is_encoder_decoder"):
        raise UserError(f"{model_dir} is an encoder-decoder ({names[0]}), expected one of {', '.join(SUPPORTED)}")
    if names[0] not in SUPPORTED:
        raise UserError(
            f"{model_dir} has architecture {names[0]}, expected one of {', '.join(SUPPORTED)}: decoders with rotary "
            f"embeddings and no sliding window"
        )
    slides = "sliding_attention" in (config.get("layer_types") or [])
    if names[0] == "MistralForCausalLM":
        slides = slides or config.get("sliding_window") is not None
    else:
        slides = slides or bool(config.get("use_sliding_window"))
    if slides:
        raise UserError(
            f"{model_dir} uses a sliding window, which rewrites cache slots that sharing relies on (take a model "
            f"without one, or set use_sliding_window to false if the model was trained for full attention)"
        )
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("dynamic", "longrope"):
        raise UserError(
            f"{model_dir} has rope_type {kind}, whose rotations change with the length of the text, expected default, "
            f"linear, llama3 or yarn (K of two positions could not be compared)"
        )
