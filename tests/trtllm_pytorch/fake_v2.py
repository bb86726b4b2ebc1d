"""KV cache manager V2 and its Python wrapper: capacities, history that cannot be cut, index buffers, suspension."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch

BAD_PAGE_INDEX = -1


class FakeKVCacheV2:
    """``_KVCache`` of one request."""

    def __init__(self, storage):
        self._storage = storage
        self._slots: list[int] = []
        self.capacity = self.history_length = 0
        self.num_committed_tokens = 0
        self._buffer = None
        self.is_active = False

    def set_page_index_buf(self, beam, layer_group, buffer):
        self._buffer = np.frombuffer(buffer, np.int32)
        self._buffer[:] = BAD_PAGE_INDEX

    def stop_committing(self):
        pass

    def resume(self, stream):
        if len(self._storage.free) < len(self._slots):
            return False
        self.is_active = True
        old = self._slots
        # The copy back may land in other slots.
        self._slots = [self._storage.take() for _ in old]
        for slot, saved in zip(self._slots, self._saved if old else [], strict=True):
            self._storage.pool[slot] = saved
        self._write_indices()
        return True

    def suspend(self):
        assert self.is_active
        self._saved = [self._storage.pool[s].clone() for s in self._slots]
        for slot in self._slots:
            self._storage.give(slot)
        self.is_active = False
        self._buffer[:] = BAD_PAGE_INDEX

    def resize(self, capacity, history_length=None):
        if capacity is not None:
            if capacity < max(self.history_length, self.num_committed_tokens):
                raise ValueError("cannot remove historical or committed tokens")
            assert self.is_active
            need = -(-capacity // self._storage.tokens_per_block)
            if need - len(self._slots) > len(self._storage.free):
                return False
            while len(self._slots) > need:
                self._storage.give(self._slots.pop())
            while len(self._slots) < need:
                self._slots.append(self._storage.take())
            self.capacity = capacity
            self._write_indices()
        if history_length is not None:
            if history_length < self.history_length:
                raise ValueError("History length cannot be decreased")
            if history_length > self.capacity:
                raise ValueError("History length cannot exceed the capacity")
            self.history_length = history_length
        return True

    def get_page_indices(self, layer_group):
        if not self.is_active:
            return [BAD_PAGE_INDEX] * len(self._slots)
        return [s * self._storage.scale for s in self._slots]

    def close(self):
        if self.is_active:
            for slot in self._slots:
                self._storage.give(slot)

    def _write_indices(self):
        self._buffer[:] = BAD_PAGE_INDEX
        self._buffer[: len(self._slots)] = np.array(self._slots, np.int32) * self._storage.scale


class _Storage:
    def __init__(self, num_slots, shape, tokens_per_block):
        self.pool = torch.zeros(num_slots, *shape)
        self.tokens_per_block = tokens_per_block
        self.scale = shape[0] * 2  # page indices count K and V of every layer
        self.free = deque(range(num_slots))
        self.is_free = [True] * num_slots

    def take(self):
        slot = self.free.popleft()
        assert self.is_free[slot]
        self.is_free[slot] = False
        return slot

    def give(self, slot):
        assert not self.is_free[slot], f"slot {slot} freed twice"
        self.is_free[slot] = True
        self.free.appendleft(slot)


class FakeKVCacheManagerV2:
    """The wrapper of the PyTorch backend, early form: ``update_resources`` pushes history to the logical length."""

    def __init__(
        self, kv_cache_config, kv_cache_type, *, num_layers, num_kv_heads, head_dim, tokens_per_block, max_seq_len,
        max_batch_size, mapping, dtype=None, max_beam_width=1, is_draft=False, kv_connector_manager=None, **kwargs,
    ):  # fmt: skip
        assert kv_connector_manager is None
        assert max_beam_width == 1
        self.mapping, self.dtype, self.is_draft, self.kv_factor, self.num_pools = mapping, dtype, is_draft, 2, 1
        self.num_local_layers, self.num_kv_heads_per_layer = num_layers, [num_kv_heads] * num_layers
        self.pp_layers = list(range(num_layers))
        self.head_dim, self.tokens_per_block = head_dim, tokens_per_block
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.max_attention_window_vec = kv_cache_config.max_attention_window or [None]
        self.enable_block_reuse = kv_cache_config.enable_block_reuse
        slots = kv_cache_config.max_tokens // tokens_per_block
        self.impl = _Storage(slots, (num_layers, 2, num_kv_heads, tokens_per_block, head_dim), tokens_per_block)
        self.kv_cache_pool_mapping = torch.tensor([[0, i] for i in range(num_layers)], dtype=torch.int32)
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.kv_cache_map = {}
        self._index_of = {}
        self._free_rows = list(range(max_batch_size, -1, -1))
        self.host_kv_cache_block_offsets = torch.full(
            (1, max_batch_size + 1, 2, self.max_blocks_per_seq), BAD_PAGE_INDEX, dtype=torch.int32
        )

    def get_buffers(self, layer_idx, kv_layout="NHD"):
        assert (layer_idx, kv_layout) == (0, "HND")
        return self.impl.pool.view(-1, *self.impl.pool.shape[2:])

    def prepare_resources(self, scheduled_batch):
        for req in scheduled_batch.context_requests:
            if req.is_first_context_chunk:
                cache = self.kv_cache_map[req.py_request_id] = FakeKVCacheV2(self.impl)
                row = self._index_of[req.py_request_id] = self._free_rows.pop()
                cache.set_page_index_buf(0, 0, memoryview(self.host_kv_cache_block_offsets[0, row, 0].numpy()))
                cache.stop_committing()
                assert cache.resume(None)
                cache.resize(req.prompt_len)
        for req in scheduled_batch.generation_requests:
            cache = self.kv_cache_map[req.py_request_id]
            assert cache.resize(cache.capacity + 1)

    def update_resources(self, scheduled_batch):
        for req in scheduled_batch.context_requests:
            if req.py_request_id in self.kv_cache_map:
                self.kv_cache_map[req.py_request_id].resize(None, req.context_current_position)
        for req in scheduled_batch.generation_requests:
            if req.py_request_id in self.kv_cache_map:
                self.kv_cache_map[req.py_request_id].resize(None, req.max_beam_num_tokens - 1)

    def free_resources(self, request, pin_on_release=False):
        self.kv_cache_map.pop(request.py_request_id).close()
        self._free_rows.append(self._index_of.pop(request.py_request_id))

    def get_batch_cache_indices(self, request_ids, layer_id=0):
        return [(np.asarray(self.kv_cache_map[i].get_page_indices(0)) // self.kv_factor).tolist() for i in request_ids]

    def copy_batch_block_offsets(self, dst_tensor, request_ids, beam_width, num_contexts, num_seqs):
        rows = [self._index_of[i] for i in request_ids]
        keys = self.host_kv_cache_block_offsets[:, rows, 0]
        dst_tensor[:, :num_seqs, 0] = keys
        dst_tensor[:, :num_seqs, 1] = keys + 1

    def get_num_free_blocks(self):
        return len(self.impl.free)

    def shutdown(self):
        pass


class FakeLateKVCacheManagerV2(FakeKVCacheManagerV2):
    """With the compression framework: a switch keeps history where the context left it."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.kv_compression_manages_history = False

    def update_resources(self, scheduled_batch):
        if self.kv_compression_manages_history:
            scheduled_batch = SimpleNamespace(context_requests=scheduled_batch.context_requests, generation_requests=[])
        super().update_resources(scheduled_batch)
