"""The C++ KV cache manager and its Python wrapper, V1, with the semantics on record: what frees, counts and stores."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch


class FakeCppKVCacheManager:
    """``tensorrt_llm.bindings.internal.batch_manager.KVCacheManager``, beam width 1, one pool, full attention."""

    accepts_none = False  # nanobind refuses None for an argument without annotation, pybind takes it

    def __init__(self, num_blocks, num_layers, num_kv_heads, tokens_per_block, head_dim, enable_block_reuse):
        self.tokens_per_block, self.enable_block_reuse = tokens_per_block, enable_block_reuse
        self.max_num_blocks = num_blocks
        elements = num_kv_heads * tokens_per_block * head_dim
        self.pool = torch.zeros(num_blocks, num_layers, 2, elements)
        self.free = deque(range(num_blocks))
        self.ref_count = [0] * num_blocks
        self.key_of: dict[int, tuple] = {}  # block -> tokens up to its end, while it is in the reuse tree
        self.block_of: dict[tuple, int] = {}
        self.sequences: dict[int, SimpleNamespace] = {}
        self.num_unregistered = 0

    # bound methods, with their positional arguments
    def sync_transfer_manager_with_buffer_manager(self):
        pass

    def refresh_blocks(self):
        pass

    def add_sequence(self, request_id, input_length, beam_width, request):
        assert beam_width == 1
        assert request_id not in self.sequences
        blocks = []
        if self.enable_block_reuse and request is not None:
            tokens = request.get_tokens(0)
            size = self.tokens_per_block
            # The last prompt token is always computed, so its block is never taken from the tree whole.
            for end in range(size, input_length, size):
                block = self.block_of.get(tuple(tokens[:end]))
                if block is None:
                    break
                if self.ref_count[block] == 0:
                    self.free.remove(block)
                self.ref_count[block] += 1
                blocks.append(block)
            request.context_current_position = len(blocks) * size
        self.sequences[request_id] = SimpleNamespace(num_tokens=input_length, blocks=blocks)
        while len(blocks) * self.tokens_per_block < input_length:
            self._allocate(blocks)

    def add_token(self, request_id):
        sequence = self.sequences[request_id]
        sequence.num_tokens += 1
        if (sequence.num_tokens - 1) % self.tokens_per_block == 0:
            self._allocate(sequence.blocks)

    def rewind_kv_cache(self, request_id, rewind_length):
        sequence = self.sequences[request_id]
        for _ in range(rewind_length):
            sequence.num_tokens -= 1
            if sequence.num_tokens % self.tokens_per_block == 0:
                block = sequence.blocks.pop()
                self._release(block, to_front=True)

    def remove_sequence(self, request_id, request, pin_on_release):
        if request is None and not self.accepts_none:
            raise TypeError("remove_sequence(): incompatible function arguments")
        if request_id not in self.sequences:
            return
        sequence = self.sequences.pop(request_id)
        if request is None:
            self.num_unregistered += 1
        elif self.enable_block_reuse:
            self._store(sequence.blocks, request.get_tokens(0)[: sequence.num_tokens])
        for block in reversed(sequence.blocks):
            self._release(block, to_front=False)

    def store_context_blocks(self, request):
        sequence = self.sequences.get(request.py_request_id)
        if self.enable_block_reuse and sequence is not None:
            self._store(sequence.blocks, request.get_tokens(0)[: request.prompt_len])

    def get_batch_cache_block_ids(self, request_ids, window_size):
        return [[list(self.sequences[i].blocks)] for i in request_ids]

    def copy_batch_block_offsets(self, output, request_ids, beam_width, offset):
        assert beam_width == 1
        layers = self.pool.shape[1]
        for row, request_id in enumerate(request_ids, offset):
            blocks = np.array(self.sequences[request_id].blocks, np.int32)
            for field in range(2):
                output[0, row, field, : len(blocks)] = torch.from_numpy(blocks * layers * 2 + field)

    def get_unique_primary_pool(self):
        return self.pool

    def get_kv_cache_stats(self):
        return SimpleNamespace(free_num_blocks=len(self.free), max_num_blocks=self.max_num_blocks)

    def get_needed_blocks_one_step(self, request):
        sequence = self.sequences.get(request.py_request_id)
        if sequence is None:
            return -(-request.prompt_len // self.tokens_per_block)
        return int(sequence.num_tokens % self.tokens_per_block == 0)

    def get_remaining_blocks_to_completion(self, request, max_new_tokens):
        total = -(-(request.orig_prompt_len + max_new_tokens) // self.tokens_per_block)
        sequence = self.sequences.get(request.py_request_id)
        return total - (len(sequence.blocks) if sequence else 0)

    def _allocate(self, blocks):
        if not self.free:
            raise RuntimeError("Can't allocate new blocks. No free blocks left.")
        block = self.free.popleft()
        key = self.key_of.pop(block, None)
        if key is not None:
            del self.block_of[key]
        assert self.ref_count[block] == 0
        self.ref_count[block] = 1
        blocks.append(block)

    def _release(self, block, to_front):
        self.ref_count[block] -= 1
        assert self.ref_count[block] >= 0, f"block {block} freed twice"
        if self.ref_count[block] == 0:
            (self.free.appendleft if to_front else self.free.append)(block)

    def _store(self, blocks, tokens):
        for index, block in enumerate(blocks):
            end = (index + 1) * self.tokens_per_block
            key = tuple(tokens[:end])
            if end > len(tokens) or key in self.block_of or block in self.key_of:
                continue
            self.key_of[block], self.block_of[key] = key, block


class FakeOldKVCacheManager:
    """``resource_manager.KVCacheManager`` of 1.0 and 1.1: the attention metadata asks the C++ object for the table."""

    def __init__(
        self, kv_cache_config, kv_cache_type, *, num_layers, num_kv_heads, head_dim, tokens_per_block, max_seq_len,
        max_batch_size, mapping, dtype=None, spec_config=None, max_beam_width=1, is_draft=False,
        kv_connector_manager=None, is_estimating_kv_cache=False, execution_stream=None, **kwargs,
    ):  # fmt: skip
        self.mapping, self.dtype, self.is_draft = mapping, dtype, is_draft
        self.num_local_layers, self.num_kv_heads_per_layer = num_layers, [num_kv_heads] * num_layers
        self.head_dim, self.tokens_per_block = head_dim, tokens_per_block
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.kv_factor = 1 if kv_cache_type == "SELFKONLY" else 2
        self.num_pools = 1
        self.max_attention_window_vec = kv_cache_config.max_attention_window or [max_seq_len]
        self.enable_block_reuse = kv_cache_config.enable_block_reuse
        self._stream = object()  # not the stream of the forward passes in 1.1: nothing may run on it
        blocks = kv_cache_config.max_tokens // tokens_per_block
        self.impl = FakeCppKVCacheManager(
            blocks, num_layers, num_kv_heads, tokens_per_block, head_dim, self.enable_block_reuse
        )
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.host_kv_cache_block_offsets = torch.zeros(1, max_batch_size, 2, self.max_blocks_per_seq, dtype=torch.int32)

    def prepare_resources(self, scheduled_batch):
        self.impl.sync_transfer_manager_with_buffer_manager()
        for req in scheduled_batch.context_requests:
            if req.is_first_context_chunk:
                self.impl.add_sequence(req.py_request_id, req.prompt_len, req.sampling_config.beam_width, req)
        for req in scheduled_batch.generation_requests:
            self.impl.add_token(req.py_request_id)
        self.impl.refresh_blocks()

    def update_resources(self, scheduled_batch, attn_metadata=None, kv_cache_dtype_byte_size=None):
        for request in scheduled_batch.generation_requests:
            if request.py_rewind_len > 0:
                self.rewind_kv_cache(request, request.py_rewind_len)
        for request in scheduled_batch.context_requests:
            self.impl.store_context_blocks(request)

    def free_resources(self, request, pin_on_release=False):
        return self.impl.remove_sequence(request.py_request_id, request, pin_on_release)

    def rewind_kv_cache(self, request, rewind_len):
        self.impl.rewind_kv_cache(request.py_request_id, rewind_len)

    def get_batch_cache_indices(self, request_ids, layer_idx=None):
        result = self.impl.get_batch_cache_block_ids(request_ids, self.max_attention_window_vec[0])
        return [r[0] for r in result]

    def get_unique_primary_pool(self):
        return self.impl.get_unique_primary_pool()

    def get_num_free_blocks(self):
        return self.impl.get_kv_cache_stats().free_num_blocks

    def shutdown(self):
        pass


class FakeKVCacheManager(FakeOldKVCacheManager):
    """1.2 and later: ``copy_batch_block_offsets`` is a method of its own."""

    def copy_batch_block_offsets(self, dst_tensor, request_ids, beam_width, num_context, num_seqs):
        host = self.host_kv_cache_block_offsets
        self.impl.copy_batch_block_offsets(host, request_ids[:num_context], 1, 0)
        self.impl.copy_batch_block_offsets(host, request_ids[num_context:], beam_width, num_context)
        dst_tensor[0, :num_seqs].copy_(host[0, :num_seqs])


class FakeReusingKVCacheManager(FakeKVCacheManager):
    """One that can free a sequence without registering it."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.impl.accepts_none = True


class FakeOldAttentionMetadata:
    """``TrtllmAttentionMetadata`` of 1.0 and 1.1: ``prepare`` copies the table."""

    kv_cache_block_offsets = None

    def __init__(self, manager):
        self.kv_cache_manager = manager
        self.host_kv_cache_block_offsets = torch.zeros(
            1, manager.max_batch_size + 1, 2, manager.max_blocks_per_seq, dtype=torch.int32
        )

    def prepare(self):
        host, ids = self.host_kv_cache_block_offsets, self.request_ids
        copy = self.kv_cache_manager.impl.copy_batch_block_offsets
        copy(host, ids[: self.num_contexts], 1, 0)
        copy(host, ids[self.num_contexts :], 1, self.num_contexts)
        self.kv_cache_block_offsets[:, : len(ids)].copy_(host[:, : len(ids)])
