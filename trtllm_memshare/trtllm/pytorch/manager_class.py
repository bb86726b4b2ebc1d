"""Subclasses of TensorRT-LLM's KV cache managers that share: four methods with something before or after the original.

One mixin serves both generations of managers. What an instance does not need it does not do: without sharing attached
(a dry run, a draft model, an unsupported feature) every call goes straight through.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.attach import ModelFacts, attach
from trtllm_memshare.trtllm.pytorch.metrics import Reporter
from trtllm_memshare.trtllm.pytorch.settings import Settings
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap


class SharingMixin:
    """Goes before the manager's class in the bases."""

    memshare_facts: ModelFacts
    memshare_settings: Settings
    memshare: TailSwap | None = None
    _memshare_reporter: Reporter | None = None

    def __init__(self, kv_cache_config: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(kv_cache_config, *arguments, **keywords)  # type: ignore[call-arg]
        settings = self.memshare_settings
        self.memshare = attach(self, kv_cache_config, keywords, self.memshare_facts, settings)
        if self.memshare is not None and self.mapping.rank == 0:  # type: ignore[attr-defined]
            self._memshare_reporter = Reporter(self.memshare, settings)

    @property
    def kv_compression_manages_history(self) -> bool:
        """True keeps late V2 from counting a generated token as history, which cannot be cut."""
        return self.memshare is not None or self.__dict__.get("kv_compression_manages_history", False)

    @kv_compression_manages_history.setter
    def kv_compression_manages_history(self, value: bool) -> None:
        if value and self.memshare is not None:
            raise UserError("sharing excludes KV cache compression (remove kv_cache_compression_config)")
        self.__dict__["kv_compression_manages_history"] = value

    def prepare_resources(self, scheduled_batch: Any) -> None:
        """Applies and searches before the manager adds this iteration's tokens."""
        if self.memshare is not None:
            self.memshare.begin_step(scheduled_batch.generation_requests)
            if self._memshare_reporter is not None:
                self._memshare_reporter.count_step()
        super().prepare_resources(scheduled_batch)  # type: ignore[misc]

    def copy_batch_block_offsets(self, dst_tensor: Any, request_ids: Any, *arguments: Any, **keywords: Any) -> None:
        """Rearranges the rows behind the manager's own copy."""
        super().copy_batch_block_offsets(dst_tensor, request_ids, *arguments, **keywords)  # type: ignore[misc]
        if self.memshare is not None:
            self.memshare.rearrange(dst_tensor, request_ids)

    def update_resources(self, scheduled_batch: Any, *arguments: Any, **keywords: Any) -> None:
        """Early V2 counts a generated token as history here, after which its page could not be cut: left out."""
        early_v2 = hasattr(self, "kv_cache_map") and "kv_compression_manages_history" not in self.__dict__
        if self.memshare is not None and early_v2:
            scheduled_batch = SimpleNamespace(context_requests=scheduled_batch.context_requests, generation_requests=[])
        super().update_resources(scheduled_batch, *arguments, **keywords)  # type: ignore[misc]

    def free_resources(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        """A sequence with shared pages must not enter the reuse tree: its list does not hold its own text in order."""
        shares = False
        if self.memshare is not None:
            shares = self.memshare.shares(request.py_request_id)
            self.memshare.forget(request)
        if shares and not hasattr(self, "kv_cache_map") and self.enable_block_reuse:  # type: ignore[attr-defined]
            return self.impl.remove_sequence(request.py_request_id, None, False)  # type: ignore[attr-defined]
        return super().free_resources(request, *arguments, **keywords)  # type: ignore[misc]

    def store_blocks_for_reuse(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        """Nothing to store for a request that shares, for the same reason."""
        if self.memshare is not None and self.memshare.shares(request.py_request_id):
            return None
        return super().store_blocks_for_reuse(request, *arguments, **keywords)  # type: ignore[misc]

    def shutdown(self) -> None:
        """Writes the last totals."""
        if self._memshare_reporter is not None:
            self._memshare_reporter.close()
        self.memshare = self._memshare_reporter = None  # lets go of the pool
        super().shutdown()  # type: ignore[misc]


def sharing_class(manager_class: type, facts: ModelFacts, settings: Settings) -> type:
    """A subclass of TensorRT-LLM's class that shares."""
    attributes = {"memshare_facts": facts, "memshare_settings": settings, "__module__": __name__}
    return type(f"MemShare{manager_class.__name__}", (SharingMixin, manager_class), attributes)
