"""``KVCacheManager``, the Python wrapper of V1 in three states.

FakeOldKVCacheManager   ``pyexecutor/resource_manager.py``, 1.1 of autumn 2025: no ``copy_batch_block_offsets``, no
                        ``is_estimating_kv_cache``
FakeKVCacheManager      the same file, February 2026, nearest to 1.2.1: ``get_batch_cache_indices`` hands on C++ vectors
FakeMainKVCacheManager  the same file, main of August and September 2026: lists, ``max_blocks=``, sequences in batches,
                        budgets by exact type
"""

from __future__ import annotations

import torch
from trtllm_pytorch.fake_cpp import FakeCppKVCacheManager
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState


class FakeOldKVCacheManager:
    """1.0 and 1.1: the attention metadata asks the C++ object for the table."""

    def __init__(
        self, kv_cache_config, kv_cache_type, *, num_layers, num_kv_heads, head_dim, tokens_per_block, max_seq_len,
        max_batch_size, mapping, dtype=None, spec_config=None, max_beam_width=1, is_draft=False,
        kv_connector_manager=None, **kwargs,
    ):  # fmt: skip
        self.mapping, self.dtype, self.is_draft = mapping, dtype, is_draft
        self.kv_cache_type = kv_cache_type
        self.num_local_layers, self.num_kv_heads_per_layer = num_layers, [num_kv_heads] * num_layers
        self.head_dim, self.tokens_per_block = head_dim, tokens_per_block
        # As the real one, which warns: a sequence must fit the pool.
        self.max_seq_len = min(max_seq_len, kv_cache_config.max_tokens // tokens_per_block * tokens_per_block)
        self.max_batch_size = max_batch_size
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

    def add_dummy_requests(
        self, request_ids, token_nums=None, is_gen=False, prepare_resource=True, max_num_draft_tokens=0,
        use_mrope=False, max_beam_width=1, num_extra_decoding_steps=0,
    ):  # fmt: skip
        """Warm-up requests and the padding of CUDA graphs: sequences of made-up tokens."""
        requests = []
        for index, request_id in enumerate(request_ids):
            count = token_nums[index] if token_nums is not None else 1 + max_num_draft_tokens
            request = FakeLlmRequest(request_id, [1] * count, is_dummy=True)
            if prepare_resource:
                self.impl.add_sequence(request_id, count, max_beam_width, request)
            if is_gen:
                request.state = LlmRequestState.GENERATION_IN_PROGRESS
            requests.append(request)
        return requests

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
    """February 2026: ``copy_batch_block_offsets`` is a method of its own, over pinned rows that the manager owns."""

    def __init__(self, *arguments, is_estimating_kv_cache=False, execution_stream=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.is_estimating_kv_cache = is_estimating_kv_cache
        self._stream = execution_stream or object()

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


class FakeMainKVCacheManager(FakeKVCacheManager):
    """Main: block ids are lists, tables may be copied in part, sequences begin in batches, types are compared."""

    def prepare_resources(self, scheduled_batch):
        self.impl.sync_transfer_manager_with_buffer_manager()
        first = [r for r in scheduled_batch.context_requests if r.is_first_context_chunk]
        if first:
            self.impl.add_sequence_batch([(r.py_request_id, r.prompt_len, r.py_beam_width) for r in first], first)
        for req in scheduled_batch.generation_requests:
            self.impl.add_token(req.py_request_id)
        self.impl.refresh_blocks()
        scheduled_batch.reset_context_requests()

    def add_dummy_requests(self, request_ids, token_nums=None, is_gen=False, prepare_resource=True, **keywords):
        if self.get_num_free_blocks() < 1:
            return None
        return super().add_dummy_requests(request_ids, token_nums, is_gen, prepare_resource)

    def get_batch_cache_indices(self, request_ids, layer_idx=None):
        return [list(blocks) for blocks in super().get_batch_cache_indices(request_ids, layer_idx)]

    def copy_batch_block_offsets(self, dst_tensor, request_ids, beam_width, num_context, num_seqs, max_blocks=None):
        host, width = self.host_kv_cache_block_offsets, max_blocks or self.max_blocks_per_seq
        self.impl.copy_batch_block_offsets(host, request_ids[:num_context], 1, 0)
        self.impl.copy_batch_block_offsets(host, request_ids[num_context:], beam_width, num_context)
        dst_tensor[0, :num_seqs, :, :width].copy_(host[0, :num_seqs, :, :width])

    def kv_block_budget_applies(self):
        """A subclass has to say for itself that its sequences take a block for every block of tokens."""
        return type(self) is FakeMainKVCacheManager and self.kv_cache_type == "SELF"

    def get_request_kv_block_budget(self, request):
        """(blocks that the request needs in the end, blocks there are), None where the manager does not say."""
        if not self.kv_block_budget_applies():
            return None
        tokens = min(request.orig_prompt_len + request.max_new_tokens, self.max_seq_len)
        return -(-tokens // self.tokens_per_block), self.impl.max_num_blocks
