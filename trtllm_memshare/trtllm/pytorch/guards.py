"""What sharing excludes. Each reason is one sentence that says what to change."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

DISAGGREGATED = "disaggregated serving (serve prompt and generation in one)"
_NO_SEQUENCE = 2**62
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone, so that one copy of a key can be turned to the place of another."""
_INTERLEAVED = (
    *("chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium"),
    "llama4_text",
)
"""Model types that turn neighbouring elements of a key together; stage 2 turns element i with i + head_dim / 2."""


def unsupported_features(manager: Any, kv_cache_config: Any, arguments: dict[str, Any]) -> list[str]:
    """Reasons why a manager cannot share, empty if it can.

    Args:
      manager: TensorRT-LLM's, constructed.
      kv_cache_config: its ``KvCacheConfig``.
      arguments: keyword arguments of its constructor.
    """
    mapping = manager.mapping
    windows = [w for w in manager.max_attention_window_vec if w is not None and w < manager.max_seq_len]
    heads = set(manager.num_kv_heads_per_layer)
    host_tier = host_tier_reason(hasattr(manager, "kv_cache_map"), kv_cache_config.host_cache_size)
    found = {
        "speculative decoding (remove speculative_config)": arguments.get("spec_config") is not None,
        f"beam search, got max_beam_width {arguments.get('max_beam_width', 1)} (set it to 1)": (
            arguments.get("max_beam_width", 1) > 1
        ),
        f"a sliding window, got max_attention_window {windows} (remove it, or serve a model without one)": windows,
        f"{host_tier}": host_tier,
        "KV cache compression (remove kv_cache_compression_config)": arguments.get("is_compressed"),
        DISAGGREGATED: arguments.get("is_disaggregated"),
        "a KV cache connector (remove kv_connector_config)": arguments.get("kv_connector_manager") is not None,
        "attention data parallelism (set enable_attention_dp to false)": mapping.enable_attention_dp,
        f"pipeline parallelism, got pp_size {mapping.pp_size} (set it to 1, use tp_size)": mapping.pp_size > 1,
        f"context parallelism, got cp_size {mapping.cp_size} (set it to 1)": mapping.cp_size > 1,
        "block reuse with this TensorRT-LLM (set kv_cache_config.enable_block_reuse to false)": (
            manager.enable_block_reuse and not can_free_unregistered(manager)
        ),
        "models that keep one latent instead of K and V (MLA)": manager.kv_factor != 2,
        "models with an encoder, whose tokens a cache of its own holds": (
            str(getattr(manager, "kv_cache_type", "")).endswith("CROSS")
        ),
        f"several KV pools, got {manager.num_pools}": manager.num_pools != 1,
        f"layers with different numbers of KV heads, got {sorted(heads)}": len(heads) > 1,
        "an NVFP4 cache (set kv_cache_config.dtype to fp8 or auto)": getattr(manager.dtype, "name", "") == "NVFP4",
    }
    return [f"sharing excludes {reason}" for reason, is_on in found.items() if is_on]


def rotation_reasons(rotated_inside: Collection[int], what: str = "null_entries skip") -> list[str]:
    """Why sequences cannot be shorter than their text: a kernel that rotates keys takes the length for the place.

    Args:
      rotated_inside: layers whose attention kernel rotates keys.
      what: the setting that makes them shorter.
    """
    if not rotated_inside:
        return []
    return [
        f"{what} excludes models whose attention kernels rotate keys, got {len(rotated_inside)} such layers (take "
        f"route overlay with null_entries read, and set null_pages)"
    ]


def host_tier_reason(is_v2: bool | None, host_cache_size: int | None) -> str | None:
    """What is wrong with the host tier for sharing, None if nothing.

    V1 moves blocks to another pool, where a block's number is no longer its place. V2 suspends requests into its host
    tier, provisions one by itself, and can do nothing at all once the GPU is full where it has none.

    Args:
      is_v2: None where it is not known yet which manager TensorRT-LLM will make.
      host_cache_size: ``kv_cache_config.host_cache_size``, bytes; None = TensorRT-LLM's default.
    """
    if host_cache_size is None or is_v2 is None:
        return None
    if is_v2 and host_cache_size == 0:
        return "KVCacheManagerV2 without a host tier: it hangs when memory is full (remove host_cache_size: 0)"
    if not is_v2 and host_cache_size > 0:
        return "offload to the host with KVCacheManager (remove kv_cache_config.host_cache_size)"
    return None


def can_free_unregistered(manager: Any) -> bool:
    """Whether a sequence can be freed without registering its blocks for reuse.

    V1 takes None in place of the request, which bindings through nanobind may refuse: it is tried with an id that no
    sequence has. V2 registers prompts only.
    """
    if hasattr(manager, "kv_cache_map"):
        return True
    try:
        manager.impl.remove_sequence(_NO_SEQUENCE, None, False)
    except TypeError:
        return False
    except (RuntimeError, KeyError):
        return True  # the arguments were taken, the sequence was not there
    return True


def disaggregated_kind(request: Any) -> str | None:
    """The type of a request that is context only or generation only, which the manager's constructor cannot tell."""
    kind = str(getattr(request, "llm_request_type", ""))
    return kind if kind.upper().endswith("_ONLY") else None


def model_reasons(config: Any) -> list[str]:
    """Reasons in the model's own configuration, of transformers 4 or 5."""
    found = window_reasons(config)
    if rope_type(config) not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        found.append(f"sharing excludes rotary embeddings of type {rope_type(config)} (known: {known})")
    return found


def window_reasons(config: Any) -> list[str]:
    """Those of attention that does not look at everything."""
    found = []
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found.append(f"models with a sliding window, got one of {config.sliding_window} tokens")
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        found.append("models with a sliding window in some layers")
    if getattr(config, "attention_chunk_size", None):
        found.append(f"models with chunked attention, got chunks of {config.attention_chunk_size} tokens")
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        found.append("models with chunked attention in some layers")
    return [f"sharing excludes {reason}" for reason in found]


def comparison_reasons(config: Any) -> list[str]:
    """Those that hold where keys of two positions are compared: turned the wrong way, their distance means nothing."""
    found, kind = [], getattr(config, "model_type", None)
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        found.append("comparing keys of models whose layers are not all rotated")
    if kind in _INTERLEAVED:
        found.append(f"comparing keys that are rotated in neighbouring pairs, got a model of type {kind}")
    return [f"sharing excludes {reason} (take preset lexical, which compares none)" for reason in found]


def rope_type(config: Any) -> str:
    """The kind of rotation in a Hugging Face configuration, of transformers 4 or 5."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return parameters.get("rope_type", parameters.get("type", "default"))
