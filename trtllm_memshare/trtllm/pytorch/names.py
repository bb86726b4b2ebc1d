"""Every name of TensorRT-LLM that this path uses, by state of its sources: data, and how it was read."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("1.1", "1.2", "main V1", "main V2")
"""1.1: autumn 2025. 1.2: February 2026, nearest to 1.2.1. Main: August and September 2026, 1.3.0rc20 to 1.4.0rc."""


@dataclass(frozen=True)
class Name:
    """One name.

    Attributes:
      owner: class it belongs to, "" for a function of a module.
      name: of the method, function or attribute.
      use: what it is for.
      states: of the sources, that have it; see ``STATES``.
      parameters: names that calls of it rely on.
      on_instance: an attribute that the constructor makes: no class has it, so only a made object can tell.
      source: file, and how it was read.
    """

    owner: str
    name: str
    use: str
    states: tuple[str, ...] = STATES
    parameters: tuple[str, ...] = ()
    on_instance: bool = False
    source: str = "pyexecutor/resource_manager.py, read"


_FACTORY = "create_kv_cache_compression_manager"
_V1, _V2 = ("1.1", "1.2", "main V1"), ("main V2",)
_COPY = ("dst_tensor", "request_ids")
_UTIL, _TRTLLM = "pyexecutor/_util.py, read", "attention_backend/trtllm.py, read"
_V2_SOURCE = "pyexecutor/kv_cache/kv_cache_manager_v2.py, read"
_FRAMEWORK = "pyexecutor/resource_manager.py and the developer guide, read"
_REQUEST = "pyexecutor/llm_request.py and calls of it, read"
_CPP = "batch_manager/kvCacheManager.cpp and its binding, read"


def _both(name: str, use: str, parameters: tuple[str, ...] = (), on_instance: bool = False) -> tuple[Name, Name]:
    return (
        Name("KVCacheManager", name, use, _V1, parameters, on_instance),
        Name("KVCacheManagerV2", name, use, _V2, parameters, on_instance, _V2_SOURCE),
    )


TABLE: tuple[Name, ...] = (
    Name(
        "",
        "get_kv_cache_manager_cls",
        "which model, which manager",
        STATES,
        ("model_config",),
        source="pyexecutor/_util.py, read",
    ),
    *_both("prepare_resources", "when to act", ("scheduled_batch",)),
    *_both("update_resources", "keeps generated tokens removable (V2)", ("scheduled_batch",)),
    *_both("free_resources", "lets go of a request", ("request", "pin_on_release")),
    *_both("shutdown", "the last report"),
    *_both("get_batch_cache_indices", "a request's pages", ("request_ids",)),
    *_both("add_dummy_requests", "takes the null pages", ("request_ids", "token_nums", "prepare_resource")),
    Name(
        "KVCacheManager",
        "copy_batch_block_offsets",
        "rows of the block table",
        ("1.2", "main V1"),
        ("dst_tensor", "request_ids"),
    ),
    Name(
        "KVCacheManagerV2",
        "copy_batch_block_offsets",
        "rows of the block table",
        ("main V2",),
        ("dst_tensor", "request_ids"),
        source=_V2_SOURCE,
    ),
    Name("KVCacheManager", "get_unique_primary_pool", "K and V", _V1),
    Name("KVCacheManager", "get_num_free_blocks", "watermarks", _V1),
    Name("KVCacheManagerV2", "get_buffers", "K and V", _V2, ("layer_idx", "kv_layout"), False, _V2_SOURCE),
    *(
        entry
        for name, use in (
            ("max_blocks_per_seq", "width of a row"),
            ("max_batch_size", "rows"),
            ("enable_block_reuse", "whose pages may go"),
            ("num_local_layers", "shape of the pool"),
            ("num_kv_heads_per_layer", "shape of the pool"),
            ("tokens_per_block", "shape of the pool"),
            ("head_dim", "shape of the pool"),
            ("mapping", "ranks"),
            ("dtype", "element type of the pool"),
            ("kv_factor", "refuses one latent instead of K and V"),
            ("num_pools", "refuses several pools"),
            ("max_attention_window_vec", "refuses windows"),
            ("max_seq_len", "refuses windows"),
        )
        for entry in _both(name, use, on_instance=True)
    ),
    Name("KVCacheManager", "impl", "the C++ manager", _V1, on_instance=True),
    Name("KVCacheManagerV2", "kv_cache_map", "a request's capacity", _V2, (), True, _V2_SOURCE),
    Name(
        "KVCacheManagerV2",
        "kv_cache_pool_mapping",
        "order of layers",
        ("main V2",),
        on_instance=True,
        source=_V2_SOURCE,
    ),
    Name("KVCacheManagerV2", "pp_layers", "the first layer", _V2, (), True, _V2_SOURCE),
    Name(
        "KVCacheManagerV2",
        "kv_compression_manages_history",
        "keeps generated tokens removable",
        ("main V2",),
        on_instance=True,
        source=_V2_SOURCE,
    ),
    Name("impl", "rewind_kv_cache", "frees the end", _V1, (), True, _CPP),
    Name("impl", "copy_batch_block_offsets", "entries of the null pages", _V1, (), True, _CPP),
    Name("impl", "remove_sequence", "frees unregistered, with block reuse", _V1, (), True, _CPP),
    Name("TrtllmAttentionMetadata", "prepare", "the block table and its lengths", source=_TRTLLM),
    Name("TrtllmAttentionMetadata", "kv_cache_block_offsets", "the block table", ("1.1",), (), True, _TRTLLM),
    *(
        Name("TrtllmAttentionMetadata", name, use, on_instance=True, source=_TRTLLM)
        for name, use in (
            ("request_ids", "rows of the block table"),
            ("kv_cache_params", "lengths without what was given up (null_entries skip)"),
            ("prompt_lens", "lengths without what was given up (null_entries skip)"),
        )
    ),
    Name(
        "TrtllmAttention",
        "__init__",
        "who rotates keys (null_entries skip, route framework)",
        STATES,
        ("pos_embd_params",),
        source=_TRTLLM,
    ),
    Name("TrtllmAttention", "support_fused_rope", "has keys rotated outside (null_entries skip)", source=_TRTLLM),
    *(
        Name("LlmRequest", name, use, on_instance=True, source=_REQUEST)
        for name, use in (
            ("get_tokens", "history"),
            ("get_token", "new tokens"),
            ("max_beam_num_tokens", "length"),
            ("orig_prompt_len", "what is protected"),
            ("prompt_len", "what is protected, on V2 and with block reuse"),
            ("py_request_id", "identity"),
            ("state", "ended or paused"),
            ("finish_by_reason", "ends a request alone"),
            ("py_decoding_iter", "ends a request alone"),
        )
    ),
    Name("FinishReason", "CANCELLED", "ends a request alone", source=_REQUEST),
    # Route framework.
    Name("", _FACTORY, "makes the method", ("main V1", "main V2"), ("config",), source=_UTIL),
    *(
        Name("KVCacheCompressionManager", name, use, _V2, parameters, source=_FRAMEWORK)
        for name, use, parameters in (
            ("bind_kv_cache_managers", "which manager, which ranks", ()),
            ("on_generation_step_end", "when to drop", ("scheduled_batch",)),
            ("on_request_finish", "lets go of a request", ("request",)),
            ("shutdown", "the last report", ()),
        )
    ),
    *(
        Name("LlmRequest", name, use, _V2, on_instance=True, source=_REQUEST)
        for name, use in (("py_num_compressed_tokens", "by how much a sequence is shorter"),)
    ),
)


def names_of(owner: str, form: str) -> list[Name]:
    """Names that a class must have in a form of the manager (``probe.py``): those of all its states."""
    needed = {"V1": {"1.2", "main V1"}, "V1 old": {"1.1"}, "V2": {"main V2"}}[form]
    return [n for n in TABLE if n.owner == owner and not n.on_instance and needed <= set(n.states)]
