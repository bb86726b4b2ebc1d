"""Finds out what this TensorRT-LLM offers, and puts sharing where it fits; by what is there, not by version.

Three forms of the block table's copy, two of the manager::

    V1      KVCacheManager.copy_batch_block_offsets exists: the subclass rearranges behind it
    V1 old  it does not (1.1): TrtllmAttentionMetadata.prepare copies, and is wrapped
    V2      KVCacheManagerV2, where the configuration or the model selects it

Newer releases have a framework for KV cache compression. Its managers are told when a step begins, after the KV cache
manager has added tokens, and TensorRT-LLM shortens sequences by what they report. Sharing keeps a sequence's length and
wants to free pages before tokens are added, so there too the KV cache manager's subclass is used; of the framework it
takes the one switch that keeps V2 from declaring generated tokens unremovable (``kv_compression_manages_history``).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.attach import ModelFacts
from trtllm_memshare.trtllm.pytorch.manager_class import SharingMixin, sharing_class
from trtllm_memshare.trtllm.pytorch.settings import Settings

log = logging.getLogger("trtllm_memshare")

_V1_METHODS = ("prepare_resources", "free_resources", "update_resources", "get_batch_cache_indices", "shutdown")
_V2_METHODS = (*_V1_METHODS, "copy_batch_block_offsets", "get_buffers")


class ProbeError(RuntimeError):
    """TensorRT-LLM lacks something sharing builds on."""


def install(util_module: Any, settings: Settings, attention_metadata: Callable[[], type] | None = None) -> bool:
    """Makes TensorRT-LLM construct managers that share; leaves it exactly as it was if anything is missing.

    Args:
      util_module: ``tensorrt_llm._torch.pyexecutor._util``, just imported.
      settings: what the user set.
      attention_metadata: returns ``TrtllmAttentionMetadata``; called for V1 in the old form only.

    Returns:
      Whether sharing is in place. If not, one line in the log says why.
    """
    try:
        form = _probe(util_module)
        metadata = (attention_metadata or _trtllm_attention_metadata)() if form == "V1 old" else None
    except ProbeError as error:
        log.warning("MemShare is off, TensorRT-LLM runs as it is: %s", error)
        return False
    if metadata is not None:
        wrap_prepare(metadata)
    original = util_module.get_kv_cache_manager_cls

    def get_kv_cache_manager_cls(model_config: Any, *arguments: Any, **keywords: Any) -> type:
        chosen = original(model_config, *arguments, **keywords)
        known = [util_module.KVCacheManager, getattr(util_module, "KVCacheManagerV2", None)]
        try:
            _check_route(chosen, known, arguments, keywords)
        except UserError as error:
            if settings.options.on_unsupported == "stop":
                raise
            log.warning("MemShare is off, requests run unshared: %s", error)
            return chosen
        return sharing_class(chosen, ModelFacts.of(model_config), settings)

    util_module.get_kv_cache_manager_cls = get_kv_cache_manager_cls
    log.info("MemShare found the KV cache manager in its form %s", form)
    return True


def _probe(util_module: Any) -> str:
    """The form of the first manager. Raises ProbeError naming the first thing that is missing."""
    for name in ("get_kv_cache_manager_cls", "KVCacheManager"):
        if not hasattr(util_module, name):
            raise ProbeError(f"{util_module.__name__} has no {name}")
    first = next(iter(inspect.signature(util_module.get_kv_cache_manager_cls).parameters), None)
    if first != "model_config":
        raise ProbeError(f"get_kv_cache_manager_cls must take model_config first, got {first}")
    v1, v2 = util_module.KVCacheManager, getattr(util_module, "KVCacheManagerV2", None)
    needed = [(v1, (*_V1_METHODS, "get_unique_primary_pool"))] + ([(v2, _V2_METHODS)] if v2 is not None else [])
    for manager, methods in needed:
        for method in methods:
            if not hasattr(manager, method):
                raise ProbeError(f"{manager.__name__} has no {method}")
    return "V1" if hasattr(v1, "copy_batch_block_offsets") else "V1 old"


def _check_route(chosen: type, known: list[Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if chosen not in known:
        raise UserError(
            f"sharing excludes the KV cache manager {chosen.__name__} (serve a model with plain attention, without "
            f"sparse_attention_config)"
        )
    transceiver = keywords.get("cache_transceiver_config")
    if keywords.get("is_disagg") or transceiver is not None or (len(arguments) > 1 and arguments[1]):
        raise UserError("sharing excludes disaggregated serving (serve prompt and generation in one)")


def _trtllm_attention_metadata() -> type:
    try:
        from tensorrt_llm._torch.attention_backend.trtllm import TrtllmAttentionMetadata
    except ImportError as error:
        raise ProbeError(f"no TrtllmAttentionMetadata: {error}") from error
    for name in ("prepare", "kv_cache_block_offsets"):
        if not hasattr(TrtllmAttentionMetadata, name) and name not in TrtllmAttentionMetadata.__annotations__:
            raise ProbeError(f"TrtllmAttentionMetadata has no {name}")
    return TrtllmAttentionMetadata


def wrap_prepare(metadata: type) -> None:
    """Rearranges rows behind ``prepare``, in which the old form copies the table; modifies the class."""
    original = metadata.prepare  # type: ignore[attr-defined]

    def prepare(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        manager = self.kv_cache_manager
        if isinstance(manager, SharingMixin) and manager.memshare is not None:
            manager.memshare.rearrange(self.kv_cache_block_offsets, self.request_ids)
        return result

    metadata.prepare = prepare  # type: ignore[attr-defined]
