"""The second route, for TensorRT-LLM 1.4 and later: a method of its own framework for KV cache compression.

TensorRT-LLM calls a ``KVCacheCompressionManager`` by five hooks and lets it shorten sequences: it moves what is kept to
the front of a sequence's pages, publishes by how much the sequence is shorter (``py_num_compressed_tokens``), and cuts
the capacity in ``KVCacheManagerV2``. Pages go at the watermarks and by the need of the other route, but exact repeats
do not go first, since nothing looks for them here, and each request that runs counts as one that opens a page. What the
framework cannot express is a second name for a page: no entry of a block table can be pointed at another page. So
nothing is shared here, and there are no null pages; a page that goes is dropped.

Its rules, and how they are kept: the prompt stays where it is; completion is published before a resize (moves, length
and resize are in one hook, on one stream, with an event for the manager's); nothing is calibrated while serving; there
is one method for an LLM, so the other route is off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.failures import Complaints
from trtllm_memshare.trtllm.pytorch.guards import unsupported_features
from trtllm_memshare.trtllm.pytorch.metrics import Reporter
from trtllm_memshare.trtllm.pytorch.page_dropper import PageDropper
from trtllm_memshare.trtllm.pytorch.settings import Settings


def make_compression_manager(
    base: type,
    config: Any,
    settings: Settings,
    model_reasons: Callable[[dict[str, Any]], list[str]],
    **keywords: Any,
) -> Any:
    """A manager for the framework.

    Args:
      base: TensorRT-LLM's ``KVCacheCompressionManager``.
      config: its ``KvCacheCompressionConfig`` with our algorithm.
      settings: this project's.
      model_reasons: what this route excludes of the model that a KV cache manager of these arguments serves; may raise
        UserError.
      keywords: what TensorRT-LLM's factory was given beside; handed on as far as the base class takes it. With
        ``estimating_kv_cache`` it measures memory with a manager that is thrown away: nothing is dropped there.
    """
    taken, estimates = inspect.signature(base).parameters, bool(keywords.get("estimating_kv_cache"))

    class MemShareCompressionManager(base):
        """Drops the pages that are needed least by shortening sequences.

        ``memshare``: what drops them; None where it must not, which is logged.
        """

        memshare: PageDropper | None = None
        reporter: Reporter | None = None

        def bind_kv_cache_managers(self, target: Any, draft: Any = None) -> None:
            """Raises UserError for what this route excludes, where ``on_unsupported`` is stop."""
            super().bind_kv_cache_managers(target, draft)
            reason = why_not(target, draft, model_reasons)
            if reason is not None:
                for manager in (target, draft):
                    if manager is not None:
                        manager.kv_compression_manages_history = False
                Complaints(settings.options.on_unsupported)(reason)
                return
            if estimates or target.memshare_made_with[1].get("is_estimating_kv_cache"):
                return
            self.memshare = PageDropper(target, settings)
            self.reporter = Reporter(self.memshare.totals, settings)

        def on_generation_step_end(self, scheduled_batch: Any, **keywords: Any) -> None:
            if self.memshare is not None and self.reporter is not None:
                self.memshare.end(scheduled_batch.generation_requests)
                self.reporter.count_step()

        def on_request_finish(self, request: Any, **keywords: Any) -> None:
            if self.memshare is not None:
                self.memshare.forget(request)

        def shutdown(self) -> None:
            if self.memshare is not None and self.reporter is not None:
                self.memshare.log_totals()
                self.reporter.close()
            super().shutdown()

    return MemShareCompressionManager(config, **{k: v for k, v in keywords.items() if k in taken})


def why_not(target: Any, draft: Any, model_reasons: Callable[[dict[str, Any]], list[str]]) -> str | None:
    """Why pages must not be dropped for these KV cache managers, None if they may.

    Args:
      target: TensorRT-LLM's, with ``memshare_made_with``: its ``KvCacheConfig`` and constructor's keywords.
      draft: that of a draft model, or None.
      model_reasons: see ``make_compression_manager``.
    """
    if (reason := several_ranks(target.mapping)) is not None:
        return reason
    if draft is not None:
        return "sharing excludes speculative decoding (remove speculative_config)"
    made_with = getattr(target, "memshare_made_with", None)
    if made_with is None:
        return f"sharing does not know how {type(target).__name__} was made (take route overlay)"
    try:
        reasons = unsupported_features(target, *made_with) or model_reasons(made_with[1])
    except UserError as error:
        return str(error)
    return reasons[0] if reasons else None


def several_ranks(mapping: Any) -> str | None:
    """Why this route does not serve these ranks, None for one rank: each would choose pages by its own heads."""
    sizes = {name: getattr(mapping, name) for name in ("tp_size", "pp_size", "cp_size")}
    if all(size == 1 for size in sizes.values()):
        return None
    got = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"route framework serves one rank, got {got} (take route overlay for tp_size, and set the others to 1)"


def note_arguments(manager_class: type) -> None:
    """Lets every KV cache manager carry what it was made with, which it does not say itself; modifies the class."""
    original = manager_class.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, kv_cache_config: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, kv_cache_config, *arguments, **keywords)
        self.memshare_made_with = kv_cache_config, keywords

    manager_class.__init__ = __init__  # type: ignore[misc]
