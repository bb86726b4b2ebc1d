"""TensorRT-LLM's attention backend TRTLLM, as far as block tables, lengths and the rotation of keys go.

Mirrors ``attention_backend/trtllm.py`` (1.1 of autumn 2025, February 2026) and ``attention/backends/trtllm.py`` (main),
``modules/attention.py`` and ``modules/qk_norm_attention.py`` of NVIDIA/TensorRT-LLM, read on 29 November 2026; names
are theirs, bodies are not. RocketKV, a method of TensorRT-LLM's own that cuts sequences, does what is relied on here:
it lowers ``num_cached_tokens_per_seq`` of requests that generate before ``prepare``, bounds their ``prompt_lens``, and
has keys rotated outside of the kernel (``sparse/rocket.py``, the same day).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from trtllm_memshare.trtllm.pytorch.lengths import fit_lengths
from trtllm_memshare.trtllm.pytorch.probe import wrap_prepare


@dataclass
class KVCacheParams:
    """``_torch/metadata.py``."""

    use_cache: bool
    num_cached_tokens_per_seq: list[int] | None = None
    num_extra_kv_tokens: int | None = 0


class _Lengths:
    """What both forms of the metadata do with lengths.

    A dataclass whose ``__post_init__`` makes the tensors: the class has no attribute of their names. The model engine
    sets ``request_ids``, ``prompt_lens``, ``seq_lens``, ``num_contexts`` and ``kv_cache_params`` before ``prepare``.
    """

    def __init__(self, manager):
        self.kv_cache_manager = manager
        self.beam_width = 1
        self.__post_init__()

    def __post_init__(self):
        manager = self.kv_cache_manager
        count = manager.max_batch_size + 1
        shape = (1, count, 2, manager.max_blocks_per_seq)
        self.kv_cache_block_offsets = torch.full(shape, -7, dtype=torch.int32)
        self.host_kv_cache_block_offsets = torch.zeros(shape, dtype=torch.int32)
        self.kv_lens, self.kv_lens_cuda, self.prompt_lens_cpu, self.prompt_lens_cuda = torch.zeros(
            (4, count), dtype=torch.int32
        ).unbind()
        self.host_total_kv_lens = torch.zeros(2, dtype=torch.int32)

    @property
    def num_seqs(self):
        return len(self.seq_lens)

    def _prepare_lengths(self):
        count = self.num_seqs
        self.prompt_lens_cpu[:count].copy_(torch.tensor(self.prompt_lens, dtype=torch.int32))
        self.prompt_lens_cuda[:count].copy_(self.prompt_lens_cpu[:count])
        cached = torch.tensor(self.kv_cache_params.num_cached_tokens_per_seq, dtype=torch.int32)
        lengths = cached + self.seq_lens
        self.kv_lens[:count].copy_(lengths + self.kv_cache_params.num_extra_kv_tokens)
        self.kv_lens_cuda[:count].copy_(lengths)
        self.host_total_kv_lens[0] = lengths[: self.num_contexts].sum()
        self.host_total_kv_lens[1] = lengths[self.num_contexts :].sum()
        return lengths


class FakeAttentionMetadata(_Lengths):
    """``TrtllmAttentionMetadata`` of February 2026 and of main: the manager fills the table.

    Main caps the columns that are written at what the longest sequence of the batch needs; the others hold what they
    held. The lengths that kernels read on the host are a tensor of this call, not ``kv_lens``.
    """

    def prepare(self):
        lengths = self._prepare_lengths()
        longest, manager = int(lengths.max()), self.kv_cache_manager
        assert longest <= manager.max_seq_len
        copy, keywords, own = manager.copy_batch_block_offsets, {}, getattr(manager, "_manager", manager)
        if "max_blocks" in inspect.signature(type(own).copy_batch_block_offsets).parameters:
            keywords["max_blocks"] = -(-longest // manager.tokens_per_block)
        ids = self.request_ids
        copy(self.kv_cache_block_offsets, ids, self.beam_width, self.num_contexts, self.num_seqs, **keywords)
        self.kv_lens_runtime = lengths


class FakeOldAttentionMetadata(_Lengths):
    """``TrtllmAttentionMetadata`` of 1.0 and 1.1: ``prepare`` copies the table itself."""

    def prepare(self):
        self._prepare_lengths()
        host, ids = self.host_kv_cache_block_offsets, self.request_ids
        copy = self.kv_cache_manager.impl.copy_batch_block_offsets
        copy(host, ids[: self.num_contexts], 1, 0)
        copy(host, ids[self.num_contexts :], self.beam_width, self.num_contexts)
        self.kv_cache_block_offsets[:, : len(ids)].copy_(host[:, : len(ids)])
        self.kv_lens_runtime = self.kv_lens[: self.num_seqs]


def make_metadata(manager):
    """Of the manager's release, changed as the installation changes it for the manager's settings."""
    is_old = not hasattr(manager, "copy_batch_block_offsets")
    cls = type("Metadata", (FakeOldAttentionMetadata if is_old else FakeAttentionMetadata,), {})
    if is_old:
        wrap_prepare(cls)
    shared = getattr(manager, "memshare", None)
    if shared is not None and shared._rows.skips:
        fit_lengths(cls)
    return cls(manager)


class FakeTrtllmAttention:
    """The attention of one layer; ``pos_embd_params``: the rotation that its kernel applies, None = none."""

    def __init__(
        self, layer_idx, num_heads, head_dim, num_kv_heads=None, quant_config=None, q_scaling=None,
        pos_embd_params=None, mla_params=None, **kwargs,
    ):  # fmt: skip
        self.layer_idx, self.pos_embd_params = layer_idx, pos_embd_params

    @classmethod
    def support_fused_rope(cls):
        return True


class FakeAttentionModule:
    """``modules/attention.py``: the layer of a model, which asks its backend whether the kernel rotates keys.

    ``rope_fusion``: None leaves it to the backend. Qwen3's says False where a kernel of its own normalises and rotates.
    """

    def __init__(self, attention_class, layer_idx, pos_embd_params="RoPE", rope_fusion=None):
        if rope_fusion and not attention_class.support_fused_rope():
            rope_fusion = False
        if rope_fusion is None:
            rope_fusion = attention_class.support_fused_rope()
        self.rope_fusion = rope_fusion
        self.rotary_emb = None if rope_fusion else pos_embd_params
        self.attn = attention_class(layer_idx, 1, 2, pos_embd_params=pos_embd_params if rope_fusion else None)


def make_attention_module(is_old=False):
    """The module of these classes, which one test may change. ``is_old``: that of 1.1."""
    metadata = FakeOldAttentionMetadata if is_old else FakeAttentionMetadata
    return SimpleNamespace(
        __name__="tensorrt_llm._torch.attention_backend.trtllm",
        TrtllmAttentionMetadata=type("Metadata", (metadata,), {}),
        TrtllmAttention=type("Attention", (FakeTrtllmAttention,), {}),
    )
