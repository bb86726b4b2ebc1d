"""The C++ KV cache manager of V1 behind its binding, with the semantics on record: what frees, counts and stores.

Mirrors ``cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp`` and its nanobind layer (about 1.2, February 2026).
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch


class BoundVector:
    """``std::vector<int>`` behind a binding: it has a length, items and slices of its own kind, and equals no list."""

    def __init__(self, values):
        self._values = tuple(values)

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return iter(self._values)

    def __getitem__(self, index):
        return BoundVector(self._values[index]) if isinstance(index, slice) else self._values[index]

    def __eq__(self, other):
        return self._values == other._values if isinstance(other, BoundVector) else NotImplemented

    __hash__ = None


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

    def add_sequence_batch(self, request_infos, requests):
        """Main's form: all first chunks of an iteration at once."""
        for (request_id, input_length, beam_width), request in zip(request_infos, requests, strict=True):
            self.add_sequence(request_id, input_length, beam_width, request)

    def add_token(self, request_id):
        sequence = self.sequences[request_id]
        sequence.num_tokens += 1
        if (sequence.num_tokens - 1) % self.tokens_per_block == 0:
            self._allocate(sequence.blocks)

    def rewind_kv_cache(self, request_id, rewind_length):
        """Token by token there; a block goes when its first token does."""
        sequence, size = self.sequences[request_id], self.tokens_per_block
        before = sequence.num_tokens
        sequence.num_tokens -= rewind_length
        for _ in range((before - 1) // size - (sequence.num_tokens - 1) // size):
            self._release(sequence.blocks.pop(), to_front=True)

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
        if sequence is not None and self.enable_block_reuse:
            self._store(sequence.blocks, request.get_tokens(0)[: request.prompt_len])

    def get_batch_cache_block_ids(self, request_ids, window_size):
        """One list for each beam of each request; the lists are vectors of C++."""
        return [[BoundVector(self.sequences[i].blocks)] for i in request_ids]

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
