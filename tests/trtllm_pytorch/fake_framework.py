"""TensorRT-LLM's framework for KV cache compression, and the executor loop with a method of it.

Mirrors ``KVCacheCompressionManager`` of ``pyexecutor/resource_manager.py`` and the developer guide, main of September
2026: three callbacks of a resource manager become five hooks; it is called after the KV cache manager; the runtime
reads ``py_num_compressed_tokens`` when it prepares a step.
"""

from __future__ import annotations

from trtllm_pytorch.fake_executor import FakeExecutor
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2


class FakeKVCacheCompressionManager:
    """The base class: it turns a resource manager's callbacks into hooks, which do nothing."""

    uses_iteration_lifecycle = True
    provides_cold_page_codec = False

    def __init__(self, config):
        self.config = config
        self.kv_cache_manager = self.draft_kv_cache_manager = None

    def bind_kv_cache_managers(self, target, draft=None):
        for manager in (target, draft):
            if manager is not None and not isinstance(manager, FakeKVCacheManagerV2):
                raise TypeError(f"requires KVCacheManagerV2, got {type(manager).__name__}")
            if manager is not None:
                manager.kv_compression_manages_history = self.config.changes_physical_kv_length
        self.kv_cache_manager, self.draft_kv_cache_manager = target, draft

    def on_request_init(self, request, **keywords): ...

    def on_context_step_end(self, requests, **keywords): ...

    def on_generation_step_begin(self, scheduled_batch, **keywords): ...

    def on_generation_step_end(self, scheduled_batch, **keywords): ...

    def on_request_finish(self, request, **keywords): ...

    def get_max_resource_count(self):
        return 0

    def shutdown(self): ...

    def prepare_resources(self, scheduled_batch):
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                self.on_request_init(request)
        self.on_generation_step_begin(scheduled_batch)

    def update_resources(self, scheduled_batch):
        if scheduled_batch.context_requests_last_chunk:
            self.on_context_step_end(scheduled_batch.context_requests_last_chunk)
        self.on_generation_step_end(scheduled_batch)

    def free_resources(self, request):
        self.on_request_finish(request)


class Both:
    """The KV cache manager, and behind it the compression manager, as ``ResourceManager`` calls them."""

    def __init__(self, manager, compression):
        self.__dict__.update(_manager=manager, _compression=compression)

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def prepare_resources(self, batch):
        self._manager.prepare_resources(batch)
        self._compression.prepare_resources(batch)

    def update_resources(self, batch):
        self._manager.update_resources(batch)
        self._compression.update_resources(batch)

    def free_resources(self, request):
        self._compression.free_resources(request)  # in reverse order
        self._manager.free_resources(request)


class FrameworkExecutor(FakeExecutor):
    """Rows are found by the length that the runtime sees: tokens less those that compression has taken away.

    ``expected``: by request, what its rows must hold from the first to the last, kept by the test's oracle.
    """

    def __init__(self, manager, overlap, compression):
        super().__init__(Both(manager, compression), overlap)
        self.expected: dict[int, list[int]] = {}

    def _num_cached(self, request, num_seen):
        return num_seen - request.py_num_compressed_tokens

    def _write(self, request_id: int, position: int) -> None:
        if position >= len(self.scripts[request_id]):
            return
        size, request = self.manager.tokens_per_block, self.request(request_id)
        place = position - request.py_num_compressed_tokens
        page = int(self.row(request_id)[place // size])
        assert page in self._own_pages(request_id)
        self.pool[page, :, :, :, place % size] = self.content(request_id, position)
        if position == 0:  # its first life, or computed anew
            self.expected[request_id] = []
        rows = self.expected[request_id]
        assert len(rows) == place, f"request {request_id} writes row {place}, it has {len(rows)}"
        rows.append(self.prefix_id(request_id, position))

    def held(self, request_id: int) -> list[int]:
        """What the rows of a request hold now."""
        values = self.pool[self._own_pages(request_id), 0, 0, 0, :, 0].flatten().tolist()
        return [int(v) for v in values[: len(self.expected[request_id])]]

    def is_running(self, request_id: int) -> bool:
        return self.manager.is_request_active(request_id)
