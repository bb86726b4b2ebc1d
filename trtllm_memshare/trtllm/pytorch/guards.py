"""What sharing excludes. Each reason is one sentence that says what to change."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "mrope")
"""Rotations that depend on the position alone, so that one copy of a key can be turned to the place of another."""


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
    found = {
        "speculative decoding (remove speculative_config)": arguments.get("spec_config") is not None,
        f"beam search, got max_beam_width {arguments.get('max_beam_width', 1)} (set it to 1)": (
            arguments.get("max_beam_width", 1) > 1
        ),
        f"a sliding window, got max_attention_window {windows} (remove it, or serve a model without one)": windows,
        "offload to the host (set kv_cache_config.host_cache_size to 0)": kv_cache_config.host_cache_size,
        "a KV cache connector (remove kv_connector_config)": arguments.get("kv_connector_manager") is not None,
        "attention data parallelism (set enable_attention_dp to false)": mapping.enable_attention_dp,
        f"pipeline parallelism, got pp_size {mapping.pp_size} (set it to 1, use tp_size)": mapping.pp_size > 1,
        f"context parallelism, got cp_size {mapping.cp_size} (set it to 1)": mapping.cp_size > 1,
        "models that keep one latent instead of K and V (MLA)": manager.kv_factor != 2,
        f"several KV pools, got {manager.num_pools}": manager.num_pools != 1,
        f"layers with different numbers of KV heads, got {sorted(heads)}": len(heads) > 1,
        "an NVFP4 cache (set kv_cache_config.dtype to fp8 or auto)": getattr(manager.dtype, "name", "") == "NVFP4",
    }
    return [f"sharing excludes {reason}" for reason, is_on in found.items() if is_on]


def check_request(request: Any) -> None:
    """Refuses requests of disaggregated serving, which the manager's constructor cannot tell.

    Raises:
      UserError: a request that is context only or generation only.
    """
    kind = str(getattr(request, "llm_request_type", ""))
    if kind.upper().endswith("_ONLY"):
        raise UserError(
            f"sharing excludes disaggregated serving, got a request of type {kind} (serve prompt and generation in one)"
        )


def rope_type(config: Any) -> str:
    """The kind of rotation in a Hugging Face configuration, of transformers 4 or 5."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return parameters.get("rope_type", parameters.get("type", "default"))
