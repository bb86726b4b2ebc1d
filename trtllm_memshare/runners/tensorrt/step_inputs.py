"""Values of the engine's inputs for one in-flight batch, as TensorRT-LLM's C++ runtime sets them.

Per sequence, with ``begin`` tokens in the cache before the step:

=============================== ==================== =============================================
input                           context chunk        generation request
=============================== ==================== =============================================
position_ids                    begin, begin + 1 ...  tokens - 1
context_lengths                 tokens of the chunk  tokens of its prompt (after a pause: of all)
sequence_length                 begin + chunk        tokens, the new one included
host_past_key_value_lengths     begin + chunk        tokens - 1
=============================== ==================== =============================================
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.engine.spec import EngineSpec

CONTEXT, GENERATION = 0, 1
"""Values of ``host_request_types``."""

KV_LENGTH_ROUND = 256
"""Tokens to which TensorRT-LLM rounds KV lengths up, so that one CUDA graph serves many steps."""


def device_arrays(batch: StepBatch, spec: EngineSpec) -> dict[str, np.ndarray]:
    """Inputs read on the device, int32, in the order in which they are packed."""
    assert batch.context_lengths is not None
    arrays = {}
    if spec.is_first_pp_rank:
        arrays = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if spec.is_last_pp_rank:
        arrays["last_token_ids"] = np.cumsum(batch.chunk_lengths, dtype=np.int32)
    arrays["sequence_length"] = batch.sequence_lengths
    arrays["context_lengths"] = batch.context_lengths
    arrays["kv_cache_block_offsets"] = batch.block_offsets
    if spec.max_pairs:
        arrays.update(pair_arrays(batch.pairs or no_pairs(spec)))
    return arrays


def host_arrays(batch: StepBatch) -> dict[str, np.ndarray]:
    """Inputs that TensorRT-LLM's plugins read on the host, int32."""
    assert batch.context_lengths is not None
    is_generation = np.arange(len(batch.chunk_lengths)) >= batch.num_contexts
    return {
        "host_context_lengths": batch.context_lengths,
        "host_request_types": np.where(is_generation, GENERATION, CONTEXT).astype(np.int32),
        "host_past_key_value_lengths": batch.sequence_lengths - is_generation.astype(np.int32),
        "host_kv_cache_block_offsets": batch.block_offsets,
    }


def check_batch(batch: StepBatch, spec: EngineSpec, max_pairs: int) -> None:
    """Refuses what the engine, or TensorRT-LLM's attention kernels, cannot do.

    Args:
      max_pairs: most pairs that the search takes, 0 = there is none.

    Raises:
      UserError: a control that needs attention of our own, or a search that the engine was not built for.
      ValueError: a batch that breaks the protocol, or is larger than the engine's profile.
    """
    if not batch.count_aliases:
        raise UserError(
            "counting aliases once, as drop-duplicate does, needs attention of our own, got a TensorRT-LLM engine, "
            "whose kernels read every table entry (run this variant on an engine of --backend torch)"
        )
    if batch.observe_attention:
        raise UserError(
            "controls that score blocks by their attention need attention of our own, got a TensorRT-LLM engine (run "
            "this variant on an engine of --backend torch)"
        )
    if batch.context_lengths is None:
        raise ValueError("a TensorRT-LLM engine needs StepBatch.context_lengths, got None")
    sizes = (len(batch.input_ids), len(batch.chunk_lengths), batch.block_offsets.shape[3])
    limits = (spec.max_num_tokens, spec.max_batch_size, spec.max_blocks_per_seq)
    if any(s > m for s, m in zip(sizes, limits, strict=True)):
        raise ValueError(f"the engine takes at most {limits} tokens, requests and blocks of a request, got {sizes}")
    used = -(-batch.sequence_lengths // spec.tokens_per_block)
    read = np.arange(sizes[2]) < used[:, None]
    if (batch.block_offsets[0, :, 0][read] == NULL_OFFSET).any():
        raise UserError(
            "controls that evict, such as streaming, leave holes in block tables, got a TensorRT-LLM engine, whose "
            "kernels read every entry (run this variant on an engine of --backend torch)"
        )
    if batch.pairs is not None and len(batch.pairs) > max_pairs:
        what = f"up to {max_pairs} pairs" if max_pairs else "none"
        raise UserError(
            f"the engine's search compares {what}, got {len(batch.pairs)} pairs (build it with --memshare and "
            f"max_pairs of at least {len(batch.pairs)})"
        )


def pad_for_graph(batch: StepBatch, bucket: int, spec: EngineSpec) -> StepBatch:
    """A pure decode batch at the fixed sizes of a graph: repeats of its first request, table and pairs at full width.

    A repeat writes the values of the first request to the same rows once more, so no block has to be kept free for it.
    """
    pad = bucket - len(batch.chunk_lengths)
    width = graph_blocks(batch, spec) - batch.block_offsets.shape[3]
    offsets = np.pad(batch.block_offsets, ((0, 0), (0, 0), (0, 0), (0, width)), constant_values=NULL_OFFSET)
    assert batch.context_lengths is not None
    names = ("input_ids", "position_ids", "chunk_lengths", "sequence_lengths", "context_lengths")
    repeated = {n: np.concatenate([getattr(batch, n), np.repeat(getattr(batch, n)[:1], pad)]) for n in names}
    pairs = batch.pairs
    if spec.max_pairs:
        pairs = _pad_pairs(pairs or no_pairs(spec), spec.max_pairs)
    return replace(
        batch,
        **repeated,
        block_offsets=np.concatenate([offsets, np.repeat(offsets[:, :1], pad, axis=1)], axis=1),
        pairs=pairs,
    )


def graph_kv_length(batch: StepBatch, spec: EngineSpec) -> int:
    """What ``host_past_key_value_lengths`` is set to while a graph is captured: the longest, rounded up."""
    longest = int(batch.sequence_lengths.max()) - 1
    return min(spec.max_seq_len - 1, -(-longest // KV_LENGTH_ROUND) * KV_LENGTH_ROUND)


def graph_blocks(batch: StepBatch, spec: EngineSpec) -> int:
    """Width of the block table under a graph: enough for every step that the graph serves."""
    return min(spec.max_blocks_per_seq, -(-(graph_kv_length(batch, spec) + 1) // spec.tokens_per_block))


def no_pairs(spec: EngineSpec) -> PairBatch:
    """One pair without rows: TensorRT takes no empty input here, and the kernel passes it over at once."""
    none = np.full((1, spec.tokens_per_block), -1, np.int32)
    return PairBatch(none, none, np.zeros_like(none))


def _pad_pairs(pairs: PairBatch, count: int) -> PairBatch:
    rows = ((0, count - len(pairs)), (0, 0))
    return PairBatch(
        np.pad(pairs.new_rows, rows, constant_values=-1),
        np.pad(pairs.old_rows, rows, constant_values=-1),
        np.pad(pairs.position_delta, rows),
        pairs.undo_rope,
    )


def pair_arrays(pairs: PairBatch) -> dict[str, np.ndarray]:
    return {
        "memshare_new_rows": pairs.new_rows,
        "memshare_old_rows": pairs.old_rows,
        "memshare_position_delta": pairs.position_delta,
    }
