"""Checks a Hugging Face checkpoint before anything is built from it. Reads headers, never weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.rope import check_rope, longest_sequence, rope_settings, rope_theta
from trtllm_memshare.engine.skeleton import read_skeleton
from trtllm_memshare.engine.tensors import check_plain, check_tensors
from trtllm_memshare.engine.weights import main_dtype, stored_tensors, which_files
from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.json_input import read_json

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FULL = {"full_attention", "attention"}
_MAX_LAYERS = 1000  # the largest model served anywhere has 126
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Checkpoint:
    """What an engine needs to know of a model.

    Attributes:
      dtype: element type the model computes in, a key of ``ELEMENT_BYTES``.
      max_position_embeddings: as config.json has it, in tokens.
      longest_sequence: tokens that the rotations reach; more than the former under some scalings.
      rope_theta: base of the rotary frequencies.
      stop_token_ids: end-of-text tokens, those transformers' ``generate`` stops at.
      renamed_prefix: what the stored names carry before those of the model, "" = nothing.
      notes: what a user should know of it, in sentences.
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
    longest_sequence: int
    renamed_prefix: str = ""
    notes: tuple[str, ...] = ()


def read_checkpoint(model_dir: Path, with_weights: bool = True) -> Checkpoint:
    """Validates a checkpoint directory.

    Args:
      with_weights: whether there have to be any; a TensorRT engine holds its own.

    Raises:
      UserError: a missing or half-written file, weights that are not safetensors, not plain or not those of the
        model, or an architecture that the paged cache cannot serve (sliding window, no rotary embedding,
        encoder-decoder, rotations that change with length).
    """
    try:
        is_there = model_dir.is_dir()
        if is_there:
            next(model_dir.iterdir(), None)  # may we read it?
    except OSError as error:
        raise UserError(
            f"cannot read the checkpoint directory {shorten(str(model_dir))}: {error.strerror} (give yourself the "
            f"right to, or another --model-dir)"
        ) from error
    if not is_there:
        raise UserError(
            f"no checkpoint directory at {shorten(str(model_dir))} (give --model-dir a folder with a Hugging Face "
            f"checkpoint; a name on the hub has to be downloaded first)"
        )
    config = read_json(model_dir / "config.json", "the checkpoint", "give --model-dir a Hugging Face checkpoint")
    refuse_adapter(model_dir)
    path = model_dir / "config.json"
    num_layers = _positive(config, "num_hidden_layers", path, most=_MAX_LAYERS)
    architecture = _check_architecture(config, model_dir)
    _check_attention(config, model_dir)
    theta = rope_theta(config, path)
    tensors = stored_tensors(model_dir) if with_weights else None
    if tensors is not None:
        check_plain(tensors, model_dir)
    _check_tokenizer(model_dir)
    generation = _optional_json(model_dir / "generation_config.json")
    heads, hidden = _positive(config, "num_attention_heads", path), _positive(config, "hidden_size", path)
    kv_heads = _positive(config, "num_key_value_heads", path, heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    positions = _positive(config, "max_position_embeddings", path)
    # transformers takes the weights' own type where the config names none; 4.x wrote the key as torch_dtype.
    named = config.get("dtype") or config.get("torch_dtype") or (main_dtype(tensors) if tensors else None)
    dtype = str(named).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise UserError(
            f"{path} has dtype {shorten(dtype)}, expected one of {', '.join(ELEMENT_BYTES)} (convert the weights)"
        )
    _positive(config, "vocab_size", path)
    stop_token_ids = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")), path)
    skeleton = read_skeleton(model_dir, architecture)
    prefix = check_tensors(tensors, skeleton, num_layers, model_dir) if tensors else None
    notes = [which_files(model_dir)] if tensors else []
    outside = [i for i in stop_token_ids if i >= skeleton.vocab_size]
    if outside:  # no such token can be generated, and a request with it would be refused
        notes.append(f"stop tokens: {quote(outside)} lie outside the vocabulary and are left out")
    if prefix is not None:
        notes.append(f'weights: stored names start with "{prefix.stored}", read as "{prefix.model}"')
    return Checkpoint(
        model_dir=model_dir,
        architecture=architecture,
        dtype=dtype,
        hidden_size=hidden,
        num_layers=num_layers,
        num_attention_heads=heads,
        num_kv_heads=skeleton.num_kv_heads,
        head_dim=skeleton.head_dim,
        vocab_size=skeleton.vocab_size,
        max_position_embeddings=positions,
        rope_theta=theta,
        stop_token_ids=tuple(i for i in stop_token_ids if i < skeleton.vocab_size),
        longest_sequence=longest_sequence(config, positions),
        renamed_prefix=prefix.stored if prefix else "",
        notes=tuple(note for note in notes if note),
    )


def refuse_adapter(model_dir: Path) -> None:
    """Raises UserError if transformers would load something else than the weights of a checkpoint."""
    if (model_dir / ADAPTER).exists():
        raise UserError(
            f"{model_dir} has an {ADAPTER} beside its weights, which transformers loads as an adapter wherever peft is "
            f"installed (remove it if the weights are merged, else merge the adapter into them and save that)"
        )


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint's config.json that spells its rotary settings for transformers 4.x and 5.x.

    4.57 does not know ``rope_parameters``: it loads what 5.x saved with base 10000, whatever the file says.
    """
    rope = rope_settings(config)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = (scaling.get("rope_type") or scaling.get("type") or "default") == "default"
    return {
        **config,
        "rope_theta": theta,
        "rope_scaling": None if is_plain else scaling,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta},
    }


def excluded_attention(config: dict[str, Any], model_dir: Path) -> str | None:
    """What neither sharing nor null pages can work with in a decoder of any architecture, as a sentence; None: nothing.

    Args:
      config: the decoder's.
    """
    path = model_dir / "config.json"
    if _slides(config, _architecture(config), _positive(config, "num_hidden_layers", path, most=_MAX_LAYERS), path):
        return f"{model_dir} uses a sliding window, which rewrites cache slots that sharing relies on"
    if config.get("kv_lora_rank") is not None:
        return f"{model_dir} has multi-head latent attention (MLA), whose cache holds no K and V of heads"
    kinds = config.get("layer_types")  # a list, or missing: looked at above
    others = {str(kind) for kind in kinds} - _FULL if kinds else {key for key in config if key.startswith("mamba_")}
    if others:
        return f"{model_dir} has other layers than those of full attention ({shorten(', '.join(sorted(others)))})"
    return None


def _check_attention(config: dict[str, Any], model_dir: Path) -> None:
    """Raises UserError for windows, latents and rotations that sharing cannot work with."""
    excluded = excluded_attention(config, model_dir)
    if excluded is not None:
        # Some checkpoints name a window that they do not use.
        raise UserError(f"{excluded} (take a model without, or switch it off in config.json if it was trained so)")
    check_rope(config, model_dir / "config.json")


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return shorten(str(names[0])) if isinstance(names, list) and names else "none"


def _check_architecture(config: dict[str, Any], model_dir: Path) -> str:
    """Refuses what paged attention with shared blocks would compute wrongly; returns the architecture's name."""
    name = _architecture(config)
    if config.get("is_encoder_decoder"):
        raise UserError(f"{model_dir} is an encoder-decoder ({name}), expected one of {', '.join(SUPPORTED)}")
    if name not in SUPPORTED:
        raise UserError(
            f"{model_dir} has architecture {name}, expected one of {', '.join(SUPPORTED)}: decoders with rotary "
            f"embeddings and no sliding window"
        )
    if config.get("quantization_config"):
        raise UserError(f"{model_dir} holds quantized weights, expected plain ones (take the unquantized checkpoint)")
    return name


def _slides(config: dict[str, Any], architecture: str, num_layers: int, path: Path) -> bool:
    """Whether any layer attends to a window only, by transformers' rules."""
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise UserError(f"{path}: layer_types must be a list, got {quote(layer_types)} (take the model's own file)")
        if "sliding_attention" in layer_types:
            return True
    if architecture == "MistralForCausalLM":
        # A config without the key means 4096: that is transformers' default for Mistral.
        return config.get("sliding_window", 4096) is not None
    if architecture == "Phi3ForCausalLM":
        return config.get("sliding_window") is not None
    if not config.get("use_sliding_window") or layer_types is not None:
        return False
    # The first max_window_layers layers attend to everything, by default 28 of them.
    full = _positive(config, "max_window_layers", path, 28) if config.get("max_window_layers") != 0 else 0
    return config.get("sliding_window", 4096) is not None and full < num_layers


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


def _positive(config: dict[str, Any], key: str, path: Path, default: int | None = None, most: int = _MAX_SIZE) -> int:
    """A positive integer of ``config``; a missing or null key means ``default``, where there is one."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path} lacks {key} (take the config.json of the model)")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a positive integer, got {quote(value)} (take the model's own file)")
    if value > most:
        raise UserError(f"{path}: {key} must be at most {most}, got {quote(value)} (take the model's own file)")
    return value


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _MAX_SIZE for i in ids):
        raise UserError(f"{path}: eos_token_id must be token ids, got {quote(value)} (take the model's own file)")
    return tuple(ids)
