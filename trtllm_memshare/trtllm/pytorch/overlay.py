"""Puts sharing around a manager of TensorRT-LLM, on the instance: its class and its type stay TensorRT-LLM's own.

TensorRT-LLM compares types exactly in places: main's admission check (``get_request_kv_block_budget``) says nothing for
a subclass, and a request that can never fit is then admitted; its fall-back from V2 to V1 names the plain class. So no
subclass is made. After TensorRT-LLM has constructed a manager, a few of its methods are shadowed by attributes of the
instance, each with something before or after the original. A manager that shares nothing has none of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trtllm_memshare.trtllm.pytorch.metrics import Reporter
from trtllm_memshare.trtllm.pytorch.sharing import Sharing

_SHADOWED = (
    "prepare_resources",
    "copy_batch_block_offsets",
    "update_resources",
    "free_resources",
    "store_blocks_for_reuse",
    "shutdown",
)


class Overlay:
    """The methods that stand in for a manager's own.

    Args:
      manager: TensorRT-LLM's; gets ``memshare``, its sharing, and the shadowed methods.
      shared: made for it.
      reporter: of rank 0, or None.
    """

    def __init__(self, manager: Any, shared: Sharing, reporter: Reporter | None) -> None:
        self._manager, self._shared, self._reporter = manager, shared, reporter
        self._is_v2 = hasattr(manager, "kv_cache_map")
        # Late V2 has a switch that keeps generated tokens from counting as history, which cannot be cut; there the
        # scheduler itself takes the pages of prompts.
        self._has_switch = hasattr(manager, "kv_compression_manages_history")
        self._original = {name: getattr(manager, name) for name in _SHADOWED if hasattr(manager, name)}
        for name in self._original:
            setattr(manager, name, getattr(self, name))
        manager.memshare = shared

    def prepare_resources(self, scheduled_batch: Any) -> None:
        """Applies and searches before the manager adds this iteration's tokens."""
        if self._has_switch and not self._manager.kv_compression_manages_history:
            self._manager.kv_compression_manages_history = True
        size = self._manager.tokens_per_block
        first = (r for r in scheduled_batch.context_requests if r.is_first_context_chunk)
        incoming = 0 if self._has_switch else sum(-(-r.prompt_len // size) for r in first)
        self._shared.begin_step(scheduled_batch.generation_requests, incoming)
        if self._reporter is not None:
            self._reporter.count_step()
        self._original["prepare_resources"](scheduled_batch)

    def copy_batch_block_offsets(self, dst_tensor: Any, request_ids: Any, *arguments: Any, **keywords: Any) -> None:
        """Rearranges the rows behind the manager's own copy."""
        self._original["copy_batch_block_offsets"](dst_tensor, request_ids, *arguments, **keywords)
        self._shared.tables.rearrange(dst_tensor, request_ids)

    def update_resources(self, scheduled_batch: Any, *arguments: Any, **keywords: Any) -> None:
        """Early V2 counts a generated token as history here, after which its page could not be cut: left out."""
        if self._is_v2 and not self._has_switch:
            scheduled_batch = SimpleNamespace(context_requests=scheduled_batch.context_requests, generation_requests=[])
        self._original["update_resources"](scheduled_batch, *arguments, **keywords)

    def free_resources(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        """A sequence with shared pages must not enter the reuse tree: its list does not hold its own text in order."""
        shares = self._shared.shares(request.py_request_id)
        self._shared.forget(request)
        if shares and not self._is_v2 and self._manager.enable_block_reuse:
            return self._manager.impl.remove_sequence(request.py_request_id, None, False)
        return self._original["free_resources"](request, *arguments, **keywords)

    def store_blocks_for_reuse(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        """Nothing to store for a request that shares, for the same reason."""
        if self._shared.shares(request.py_request_id):
            return None
        return self._original["store_blocks_for_reuse"](request, *arguments, **keywords)

    def shutdown(self) -> None:
        """Writes the last totals, gives the manager its own methods back and lets go of the pool."""
        if self._reporter is not None:
            self._reporter.close()
        original = self._original
        for name in original:
            self._manager.__dict__.pop(name, None)
        self._manager.memshare = None
        original["shutdown"]()
