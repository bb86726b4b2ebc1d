"""Refuses by name what this plugin was not made for: a vLLM without what it builds on, or features it excludes."""

from __future__ import annotations

import inspect
import re
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import TESTED
from trtllm_memshare.vllm.cache_elements import SERVED_TYPES
from trtllm_memshare.vllm.groups import find_full_group, has_states

_SCHEDULER_METHODS = (
    "schedule",
    "add_request",
    "update_from_output",
    "_preempt_request",
    "_free_request",
    "make_stats",
)
_POOL_METHODS = ("get_new_blocks", "free_blocks", "touch", "evict_blocks", "get_num_free_blocks")
_WALKERS = ("CPU_ATTN", "FLASHINFER", "FLASH_ATTN", "TRITON_ATTN")
"""VLLM's attention backends that read a block wherever a table names it.

FlexAttention turns tables round: of entries that name one block, an alias and its donor, it reads the last one only.
"""
_REFUSED = "grammar_compile_error_reqs"
_GROUP_ATTRIBUTES = ("req_to_blocks", "num_cached_block", "block_size")
_OTHERS_ATTRIBUTES = (*_GROUP_ATTRIBUTES, "max_admission_blocks_per_request")
_WINDOW_ATTRIBUTES = (*_OTHERS_ATTRIBUTES, "sliding_window")
_STATE_ATTRIBUTES = (*_OTHERS_ATTRIBUTES, "mamba_cache_mode", "kv_cache_spec")


def check_release(version: str) -> bool:
    """Whether a release is one that was tested; False for a newer one and for a build that says no release.

    Args:
      version: as vLLM tells it: 0.33.0, 0.33.1+cpu, 0.1.dev1+g4ba787ec9.

    Raises:
      UserError: it is older. Up to 0.31 tables hold a kernel's own blocks where these are smaller, and 0.29's runner V2
        ends with many entries at once: both as read, on 30 November 2026.
    """
    first, last = (tuple(map(int, release.split("."))) for release in TESTED.split(" to "))
    found = re.match(r"(\d+)\.(\d+)(?!\d|\.dev)", version)
    release = tuple(map(int, found.groups())) if found else None
    if release is not None and release < first:
        raise UserError(
            f"MemShare needs vLLM {TESTED.split()[0]} or later, got {version} (update vLLM, or serve without MemShare)"
        )
    return release is not None and release <= last


def check_classes(version: str, scheduler: type, kv_cache_manager: type, block_pool: type) -> None:
    """Looks for the methods that are called or overridden.

    Raises:
      UserError: one is missing or takes other arguments.
    """
    for owner, names in (
        (scheduler, _SCHEDULER_METHODS),
        (kv_cache_manager, ("allocate_slots",)),
        (block_pool, _POOL_METHODS),
    ):
        for name in names:
            if not callable(getattr(owner, name, None)):
                raise UserError(
                    f"vLLM {version} has no {owner.__name__}.{name}, which MemShare builds on (it was tested with "
                    f"vLLM {TESTED})"
                )
    first = list(inspect.signature(kv_cache_manager.allocate_slots).parameters)[1:3]  # type: ignore[attr-defined]
    if first != ["request", "num_new_tokens"]:
        raise UserError(
            f"vLLM {version}'s allocate_slots must take request and num_new_tokens, got {', '.join(first)} (MemShare "
            f"was tested with vLLM {TESTED})"
        )


def check_scheduler(scheduler: Any, version: str) -> int:
    """Looks at a scheduler that vLLM has just made; returns the index of its group of full attention.

    Raises:
      UserError: a feature that MemShare excludes, or a part of the scheduler is missing.
    """
    full = check_served(scheduler.vllm_config, scheduler.kv_cache_config.kv_cache_groups)
    coordinator = scheduler.kv_cache_manager.coordinator
    for feature, present in {
        "KV transfer": scheduler.connector is not None,
        "an encoder": scheduler.is_encoder_decoder,
    }.items():
        if present:
            raise _excluded(feature)
    if getattr(coordinator, "enable_partial_hash_hits", False):
        raise _hits_within("blocks of states that are longer than those of attention")
    if not isinstance(getattr(scheduler, _REFUSED, None), (set, dict)):
        raise UserError(
            f"vLLM {version}'s scheduler has no {_REFUSED}, by which MemShare ends a request whose options cannot be "
            f"used (it was tested with vLLM {TESTED})"
        )
    groups = scheduler.kv_cache_config.kv_cache_groups
    for index, manager in enumerate(coordinator.single_type_managers):
        others = _STATE_ATTRIBUTES if has_states(groups[index : index + 1]) else _WINDOW_ATTRIBUTES
        for name in _GROUP_ATTRIBUTES if index == full else others:
            if not hasattr(manager, name):
                raise UserError(f"vLLM {version}'s {type(manager).__name__} has no {name}, which MemShare builds on")
    return full


def check_served(config: Any, groups: list[Any]) -> int:
    """Looks at what is served; workers ask too, since they try the cache out before there is a scheduler.

    Args:
      config: vLLM's ``VllmConfig``.
      groups: its KV cache groups.

    Returns:
      Index of the group that gives pages up.

    Raises:
      UserError: a model or a feature that MemShare excludes.
    """
    full = find_full_group(groups)
    if has_states(groups):
        check_states(config)
    parallel = config.parallel_config
    excluded = {
        "speculative decoding": config.speculative_config is not None,
        "a diffusion language model": getattr(config, "diffusion_config", None) is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": getattr(parallel, "use_ubatching", False),
        "elastic expert parallelism": getattr(parallel, "enable_elastic_ep", False),
        # Each of its ranks schedules by itself, and redundancy or distances are those of its own heads.
        "the executor external_launcher over several ranks": getattr(parallel, "world_size", 1) > 1
        and getattr(parallel, "distributed_executor_backend", None) == "external_launcher",
        "sleep mode": config.model_config.enable_sleep_mode,
        f"a KV cache of {config.cache_config.cache_dtype}": config.cache_config.cache_dtype not in SERVED_TYPES,
    }
    for feature, present in excluded.items():
        if present:
            raise _excluded(feature)
    return full


def check_states(config: Any) -> None:
    """Looks at how states of linear attention are kept.

    Raises:
      UserError: in a mode that vLLM 0.32 and 0.33 do not have, or hits in the prefix cache may end within a block.
    """
    cache = config.cache_config
    if cache.mamba_cache_mode not in ("none", "align"):
        raise UserError(
            f"MemShare serves a model with linear attention in mamba_cache_mode none or align, got "
            f"{cache.mamba_cache_mode} (leave --mamba-cache-mode out)"
        )
    unit = getattr(cache, "prefix_match_unit", None)
    if cache.mamba_cache_mode == "align" and unit is not None:
        raise _hits_within(f"--prefix-match-unit {unit}")


def check_model(config: Any, null_entries: str) -> None:
    """Looks at what a model's configuration says, before its weights are loaded and there are groups.

    Raises:
      UserError: a model that is not served, or see ``check_states`` and ``check_null_entries``.
    """
    model = config.model_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    is_hybrid = bool(getattr(model, "is_hybrid", False))
    never = {
        "without attention": getattr(model, "is_attention_free", False),
        "that writes by diffusion": getattr(model, "is_diffusion", False),
        "with sparse attention by an indexer": getattr(model.hf_text_config, "index_topk", None) is not None,
        "with latent attention (MLA) beside linear attention": is_hybrid and getattr(model, "use_mla", False),
    }
    for what, present in never.items():
        if present:
            raise UserError(
                f"MemShare needs a model with full attention, or latent attention alone, got one {what} (serve this "
                f"model without MemShare)"
            )
    if is_hybrid:
        check_states(config)
    check_null_entries(config, is_hybrid or ("sliding_attention" in kinds and len(kinds) > 1), null_entries)


def check_null_entries(config: Any, has_others: bool, null_entries: str) -> None:
    """Looks at whether null entries can be what the settings say, for this model.

    Args:
      has_others: whether some layers have sliding windows or linear attention.

    Raises:
      UserError: null pages are to be read, which ``calibrate`` does not make for such a model, nor for one with MLA.
    """
    is_mla = bool(getattr(config.model_config, "use_mla", False))
    if null_entries == "read" and (has_others or is_mla):
        got = "multi-head latent attention (MLA)" if is_mla else "sliding windows or linear attention in some"
        raise UserError(
            f"null_entries read needs a model whose layers all have full attention, with K and V in the cache, got one "
            f"with {got} (leave null_pages out, and set null_entries to skip, the default then)"
        )


def _excluded(feature: str) -> UserError:
    return UserError(f"MemShare excludes {feature} with vLLM (switch it off, or serve without MemShare)")


def _hits_within(got: str) -> UserError:
    return UserError(
        f"MemShare serves a model with linear attention with hits in the prefix cache that end with a block, got {got} "
        f"(leave --prefix-match-unit out, or give --no-enable-prefix-caching)"
    )


def check_aliases(runner: Any, group: int = 0) -> None:
    """Looks at what reads the tables of one group of vLLM's model runner.

    Raises:
      UserError: an attention backend that may read an alias or its donor and not both, or none that is known.
    """
    groups = getattr(runner, "attn_groups", None)
    names = {layers.backend.get_name() for layers in groups[group]} if groups else set()
    others = ", ".join(sorted(names.difference(_WALKERS)))
    if others or not names:
        raise UserError(
            f"retired_becomes alias works with vLLM's attention backends {', '.join(_WALKERS)}, got "
            f"{others or 'none'} (choose one by --attention-backend, or set retired_becomes to null)"
        )
