"""``KVCacheManagerV2``, the Python wrapper of V2 in two states.

FakeKVCacheManagerV2      ``pyexecutor/resource_manager.py``, February 2026: ``prepare_resources`` allocates, history
                          follows the length
FakeMainKVCacheManagerV2  ``pyexecutor/kv_cache/kv_cache_manager_v2.py``, main of September 2026: the scheduler
                          allocates, ``prepare_resources`` does nothing; ``kv_compression_manages_history``

Both provision a host tier as large as the GPU's unless ``host_cache_size`` says otherwise, and answer
``get_num_free_blocks`` only while they are empty.
"""

from __future__ import annotations

import torch
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState
from trtllm_pytorch.fake_v2_storage import BAD_PAGE_INDEX, FakeKVCacheV2, Storage


class FakeKVCacheManagerV2:
    """The wrapper of the PyTorch backend, early form: ``update_resources`` pushes history to the logical length."""

    def __init__(
        self, kv_cache_config, kv_cache_type, *, num_layers, num_kv_heads, head_dim, tokens_per_block, max_seq_len,
        max_batch_size, mapping, dtype=None, max_beam_width=1, is_draft=False, kv_connector_manager=None,
        vocab_size=None, **kwargs,
    ):  # fmt: skip
        assert kv_connector_manager is None
        assert max_beam_width == 1
        self.mapping, self.dtype, self.is_draft, self.kv_factor, self.num_pools = mapping, dtype, is_draft, 2, 1
        self.kv_cache_type = kv_cache_type
        self.num_local_layers, self.num_kv_heads_per_layer = num_layers, [num_kv_heads] * num_layers
        self.pp_layers = list(range(num_layers))
        self.head_dim, self.tokens_per_block = head_dim, tokens_per_block
        # As the real one, which warns: a sequence must fit the pool.
        self.max_seq_len = min(max_seq_len, kv_cache_config.max_tokens // tokens_per_block * tokens_per_block)
        self.max_batch_size = max_batch_size
        self.max_attention_window_vec = kv_cache_config.max_attention_window or [None]
        self.enable_block_reuse = kv_cache_config.enable_block_reuse
        slots = kv_cache_config.max_tokens // tokens_per_block
        host = kv_cache_config.host_cache_size
        page_bytes = num_layers * 2 * num_kv_heads * tokens_per_block * head_dim * 4
        shape = (num_layers, 2, num_kv_heads, tokens_per_block, head_dim)
        self.impl = Storage(slots, shape, tokens_per_block, slots if host is None else host // page_bytes)
        self.index_scale = num_layers * 2  # page indices count K and V of every layer
        self.kv_cache_pool_mapping = torch.tensor([[0, i] for i in range(num_layers)], dtype=torch.int32)
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.kv_cache_map = {}
        self._index_of = {}
        num_rows = max_batch_size + kwargs.get("num_reserved_index_slots", 1)  # for the padding of CUDA graphs
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self.host_kv_cache_block_offsets = torch.full(
            (1, num_rows, 2, self.max_blocks_per_seq), BAD_PAGE_INDEX, dtype=torch.int32
        )

    def get_buffers(self, layer_idx, kv_layout="NHD"):
        assert (layer_idx, kv_layout) == (0, "HND")
        return self.impl.pool.view(-1, *self.impl.pool.shape[2:])

    def prepare_resources(self, scheduled_batch):
        for req in scheduled_batch.context_requests:
            if req.is_first_context_chunk:
                cache = self._create_kv_cache(req.py_request_id)
                assert cache is not None
                assert cache.resume(None)
                assert cache.resize(req.prompt_len)
        for req in scheduled_batch.generation_requests:
            cache = self.kv_cache_map[req.py_request_id]
            assert cache.resize(cache.capacity + 1)

    def update_resources(self, scheduled_batch, attn_metadata=None, kv_cache_dtype_byte_size=None):
        for req in scheduled_batch.context_requests:
            if req.py_request_id in self.kv_cache_map:
                self.kv_cache_map[req.py_request_id].resize(None, req.context_current_position)
        for req in scheduled_batch.generation_requests:
            if req.py_request_id in self.kv_cache_map:
                self.kv_cache_map[req.py_request_id].resize(None, req.max_beam_num_tokens - 1)

    def free_resources(self, request, pin_on_release=False):
        cache = self.kv_cache_map.pop(request.py_request_id, None)
        if cache is not None:
            cache.close()
            self._free_rows.append(self._index_of.pop(request.py_request_id))

    def add_dummy_requests(self, request_ids, token_nums=None, is_gen=False, prepare_resource=True, **keywords):
        """Warm-up requests and padding; None if a row or pages are missing, with nothing taken."""
        requests = []
        for index, request_id in enumerate(request_ids):
            count = token_nums[index] if token_nums is not None else 1
            request = FakeLlmRequest(request_id, [1] * count, is_dummy=True)
            requests.append(request)
            if not prepare_resource:
                continue
            cache = self._create_kv_cache(request_id)
            if cache is None or not cache.resume(None) or not cache.resize(count):
                for taken in requests:
                    self.free_resources(taken)
                return None
            if is_gen:
                request.state = LlmRequestState.GENERATION_IN_PROGRESS
        return requests

    def suspend_request(self, request):
        cache = self.kv_cache_map.get(request.py_request_id)
        if cache is not None and cache.is_active:
            cache.suspend()

    def resume_request(self, request):
        cache = self.kv_cache_map.get(request.py_request_id)
        return cache is not None and self._resume_and_restore(request.py_request_id, cache)

    def get_batch_cache_indices(self, request_ids, layer_idx=None):
        lists = []
        for request_id in request_ids:
            cache = self.kv_cache_map[request_id]
            base = cache.get_base_page_indices(0)[: cache.num_blocks]
            lists.append([b if b == BAD_PAGE_INDEX else b * self.index_scale // self.kv_factor for b in base])
        return lists

    def copy_batch_block_offsets(self, dst_tensor, request_ids, beam_width, num_contexts, num_seqs):
        rows = [self._index_of[i] for i in request_ids]  # an id that nobody has is an error
        base = self.host_kv_cache_block_offsets[:, rows, 0]
        keys = torch.where(base == BAD_PAGE_INDEX, BAD_PAGE_INDEX, base * self.index_scale)
        dst_tensor[:, :num_seqs, 0] = keys
        dst_tensor[:, :num_seqs, 1] = torch.where(base == BAD_PAGE_INDEX, BAD_PAGE_INDEX, keys + 1)

    def get_num_free_blocks(self):
        assert len(self.kv_cache_map) == 0, "get_num_free_blocks is only used when the kv cache manager is empty"
        return len(self.impl.free)

    def shutdown(self):
        for cache in self.kv_cache_map.values():
            cache.close()
        self.kv_cache_map.clear()

    def _create_kv_cache(self, request_id):
        assert request_id not in self.kv_cache_map
        if not self._free_rows:
            return None
        cache = self.kv_cache_map[request_id] = FakeKVCacheV2(self.impl)
        self._index_of[request_id] = self._free_rows.pop()
        self._restore_page_index_bufs(request_id, cache)
        cache.stop_committing()
        return cache

    def _restore_page_index_bufs(self, request_id, cache):
        row = self.host_kv_cache_block_offsets[0, self._index_of[request_id], 0]
        cache.set_base_page_index_buf(0, 0, memoryview(row.numpy()))

    def _resume_and_restore(self, request_id, cache):
        if cache.is_active:
            return True
        if not cache.resume(None):
            return False
        self._restore_page_index_bufs(request_id, cache)
        return True


class FakeMainKVCacheManagerV2(FakeKVCacheManagerV2):
    """Main: the scheduler allocates before ``prepare_resources``; a switch keeps history where the context left it."""

    def __init__(self, *arguments, num_reserved_index_slots=1, **keywords):
        super().__init__(*arguments, num_reserved_index_slots=num_reserved_index_slots, **keywords)
        self.kv_compression_manages_history = False

    def prepare_resources(self, scheduled_batch):
        pass

    def prepare_context(self, req):
        """A cache for the request, resumed; False if there is no row or no room to resume."""
        cache = self.kv_cache_map.get(req.py_request_id) or self._create_kv_cache(req.py_request_id)
        return cache is not None and self._resume_and_restore(req.py_request_id, cache)

    def resize_context(self, req, num_tokens):
        cache = self.kv_cache_map[req.py_request_id]
        if cache.resize(max(cache.capacity, req.context_current_position + num_tokens)):
            return True
        cache.suspend()
        return False

    def try_allocate_generation(self, req):
        cache = self.kv_cache_map.get(req.py_request_id)
        if cache is None or not self._resume_and_restore(req.py_request_id, cache):
            return False
        return cache.resize(cache.capacity + 1)

    def is_request_active(self, request_id):
        cache = self.kv_cache_map.get(request_id)
        return cache is not None and cache.is_active

    def update_context_resources(self, scheduled_batch):
        for req in scheduled_batch.context_requests:
            cache = self.kv_cache_map.get(req.py_request_id)
            if cache is not None and cache.is_active:
                cache.resize(None, req.context_current_position)

    def update_resources(self, scheduled_batch, attn_metadata=None, kv_cache_dtype_byte_size=None):
        for req in scheduled_batch.generation_requests:
            cache = self.kv_cache_map.get(req.py_request_id)
            if cache is None or not cache.is_active:
                continue
            ends = req.state in (LlmRequestState.GENERATION_COMPLETE, LlmRequestState.CONTEXT_INIT)
            history = None if self.kv_compression_manages_history else req.max_beam_num_tokens - 1
            assert cache.resize(None if ends else cache.capacity, history)

    def copy_batch_block_offsets(self, dst_tensor, request_ids, beam_width, num_contexts, num_seqs, max_blocks=None):
        """Columns from ``max_blocks`` on hold what they held, which may be anything."""
        behind = dst_tensor[:, :num_seqs, :, max_blocks or dst_tensor.shape[-1] :].clone()
        super().copy_batch_block_offsets(dst_tensor, request_ids, beam_width, num_contexts, num_seqs)
        dst_tensor[:, :num_seqs, :, dst_tensor.shape[-1] - behind.shape[-1] :] = behind


class FakeKVCacheV2Scheduler:
    """Main's ``scheduler/scheduler_v2.py``, MAX_UTILIZATION, September 2026: allocates, suspends and resumes itself.

    Requests that generate come first; one that gets no page suspends the youngest of the others. Where that is not
    enough, it frees the youngest of the others, to be computed anew, those too that it has suspended
    (``_try_recompute_pause_for_gen``, 29 November 2026; on unless prompts are served apart). Then it suspends itself.
    One whose last token is on its way is suspended like the others, and never freed (``_is_evictable``,
    ``_is_recompute_pause_candidate``, the same day).
    Prompts get what is left. A thousand passes in which nothing could be done are a deadlock, as there.
    """

    def __init__(self, manager, max_requests, enable_recompute_pause=True):
        self.manager, self.max_requests, self.enable_recompute_pause = manager, max_requests, enable_recompute_pause
        self.num_suspended = self.num_recomputed = self._stalled = 0

    def schedule_request(self, active):
        """(prompts, requests that generate) of this iteration, and who has been freed to be computed anew."""
        started = [r for r in active if r.is_generation_in_progress_state]
        ending = [r for r in started if r.state is LlmRequestState.GENERATION_TO_COMPLETE]
        scheduled, freed, end, index = [], [], len(started), 0
        while index < end and len(scheduled) < self.max_requests:
            request = started[index]
            if request in ending:
                index += 1
                continue
            ok = self.manager.try_allocate_generation(request)
            while not ok and end > index + 1:
                end -= 1
                if self.manager.is_request_active(started[end].py_request_id):
                    self._suspend(started[end])
                    ok = self.manager.try_allocate_generation(request)
            others = [r for r in started[index + 1 :] if r not in ending]
            candidates = others if self.enable_recompute_pause else []
            while not ok and candidates:
                freed.append(candidates.pop())
                self.manager.free_resources(freed[-1])
                self.num_recomputed += 1
                ok = self.manager.try_allocate_generation(request)
            if not ok:
                if self.manager.is_request_active(request.py_request_id):
                    self._suspend(request)
                break
            scheduled.append(request)
            index += 1
        context = []
        for request in active:
            if request.state is not LlmRequestState.CONTEXT_INIT or end < len(started):
                continue
            taken = len(scheduled) + len(ending) + len(context)
            if taken >= self.max_requests or not self.manager.prepare_context(request):
                break
            if not self.manager.resize_context(request, request.prompt_len - request.context_current_position):
                self.manager.free_resources(request)  # a first chunk that did not fit keeps nothing
                break
            context.append(request)
        self._stalled = 0 if scheduled or context or len(ending) == len(active) else self._stalled + 1
        if self._stalled >= 1000:
            raise RuntimeError("V2 scheduler deadlock")
        return (context, scheduled), freed

    def _suspend(self, request):
        self.manager.suspend_request(request)
        self.num_suspended += 1
