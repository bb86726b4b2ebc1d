"""Index arithmetic of one step: where rows are written, which blocks each query reads. Host side, once per step.

Names of an address, from coarse to fine, for a pool ``[num_blocks, num_layers, 2, heads, tokens_per_block, head_dim]``:

- unit: one layer's K or V block, ``offset + 2 * layer`` where offset is the table entry;
- head unit: ``unit * heads + head``, a contiguous ``[tokens_per_block, head_dim]``;
- row: ``head_unit * tokens_per_block + slot``, a contiguous ``[head_dim]``.

One layer further is ``2 * heads`` head units further, whatever the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.runners.protocol import StepBatch

_SPLIT_RATIO = 0.6  # a decode group is cut where the next sequence reads less than this share of its longest


@dataclass(frozen=True)
class DecodeGroup:
    """Generation requests attended to together.

    Attributes:
      tokens: int64 ``[n]``, their places among the packed tokens.
      head_units: int64 ``[2, n, heads, max_read_blocks]``, layer 0, K then V; padding repeats one of its own.
      bias: float32 ``[n, 1, 1, max_read_blocks * tokens_per_block]``: -inf where there is no token, ln m where a
        block is named m times.
    """

    tokens: np.ndarray
    head_units: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class ContextChunk:
    """A chunk of one context request: ``[start, stop)`` of the packed tokens, ``past`` tokens before it.

    Attributes:
      head_units: int64 ``[2, heads, blocks]`` as in ``DecodeGroup``, or None where the chunk is the whole context.
      key_positions: int64 ``[keys]``, position of each token read; some of the past may have been forgotten.
    """

    start: int
    stop: int
    past: int
    head_units: np.ndarray | None
    key_positions: np.ndarray | None


@dataclass(frozen=True)
class StepPlan:
    """Addresses of one step.

    Attributes:
      write_rows: int64 ``[2, num_tokens, heads]``, layer 0, K then V.
      begun_units: int64 ``[n]``, K of layer 0 of blocks whose first token is written: what else they hold is stale.
      last_tokens: int64 ``[batch]``.
      contexts, decode_groups: who attends to what.
    """

    write_rows: np.ndarray
    begun_units: np.ndarray
    last_tokens: np.ndarray
    contexts: list[ContextChunk]
    decode_groups: list[DecodeGroup]


def plan_step(
    batch: StepBatch,
    num_kv_heads: int,
    tokens_per_block: int,
    fold_aliases: bool = True,
    group_decode: bool = True,
    pages_per_call: int | None = None,
) -> StepPlan:
    """Works out a step's addresses.

    Args:
      fold_aliases: read a block that a table names m times once, with ln m added to its logits: the same softmax for
        less memory traffic. False reads it m times, as TensorRT-LLM's attention kernels do.
      group_decode: False leaves ``decode_groups`` empty, for a decode attention with page lists of its own.
      pages_per_call: pages that a group reads at most, where it has more than one request; None = any number.
    """
    lengths, chunks = batch.sequence_lengths, batch.chunk_lengths
    sequence_of = np.repeat(np.arange(len(chunks)), chunks)
    positions, slots = np.divmod(batch.position_ids.astype(np.int64), tokens_per_block)
    offsets = batch.block_offsets[0].astype(np.int64)  # [batch, 2, max_blocks]
    units = np.ascontiguousarray(offsets[sequence_of, :, positions].T)  # [2, num_tokens]
    heads = np.arange(num_kv_heads)
    write_rows = (units[:, :, None] * num_kv_heads + heads) * tokens_per_block + slots[None, :, None]
    last_tokens = np.cumsum(chunks, dtype=np.int64) - 1
    contexts = []
    for index in range(batch.num_contexts):
        stop, length = int(last_tokens[index]) + 1, int(lengths[index])
        start, past = stop - int(chunks[index]), int(length - chunks[index])
        if not past:
            contexts.append(ContextChunk(start, stop, past, None, None))
            continue
        blocks = np.flatnonzero(offsets[index, 0, : -(-length // tokens_per_block)] != NULL_OFFSET)
        read = offsets[index, :, None, blocks].transpose(1, 2, 0) * num_kv_heads + heads[:, None]
        there = (blocks[:, None] * tokens_per_block + np.arange(tokens_per_block)).ravel()
        contexts.append(ContextChunk(start, stop, past, read, there[there < length]))
    first = batch.num_contexts
    groups = []
    if group_decode and first < len(chunks):
        groups = _decode_groups(
            offsets[first:],
            lengths[first:],
            last_tokens[first:],
            num_kv_heads,
            tokens_per_block,
            batch,
            fold_aliases,
            pages_per_call,
        )
    return StepPlan(write_rows, units[0, slots == 0], last_tokens, contexts, groups)


def _decode_groups(
    offsets: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
    num_kv_heads: int,
    tokens_per_block: int,
    batch: StepBatch,
    fold_aliases: bool,
    pages_per_call: int | None,
) -> list[DecodeGroup]:
    """Sequences sorted by what they read and cut into groups of like size, so that little padding is read."""
    keys, values, counts, valid = _read_lists(offsets, lengths, tokens_per_block, fold_aliases)
    sizes = (counts > 0).sum(1)
    weight = np.log(np.maximum(counts, 1)) if batch.count_aliases else np.zeros(counts.shape)
    order, groups, start = np.argsort(-sizes, kind="stable"), [], 0
    slots = np.arange(tokens_per_block)
    while start < len(order):
        longest = sizes[order[start]]
        rest = sizes[order[start:]]
        stop = start + int((rest >= _SPLIT_RATIO * longest).sum())
        if (longest * len(rest) - rest.sum()) < 64:
            stop = len(order)  # too little padding to pay for another call
        if pages_per_call is not None:
            stop = min(stop, start + max(1, pages_per_call // longest))
        members = order[start:stop]
        read = np.stack([keys[members, :longest], values[members, :longest]])
        head_units = read[:, :, None, :] * num_kv_heads + np.arange(num_kv_heads)[:, None]
        bias = np.where(slots < valid[members, :longest, None], weight[members, :longest, None], -np.inf)
        groups.append(DecodeGroup(tokens[members], head_units, bias.reshape(len(members), 1, 1, -1).astype(np.float32)))
        start = stop
    return groups


def _read_lists(
    offsets: np.ndarray, lengths: np.ndarray, tokens_per_block: int, fold_aliases: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What each sequence reads, front-packed: K units, V units, how often each counts (0 = padding), valid tokens.

    The order of keys does not matter to attention: positions are in the rotation, not in the order.
    """
    num, width = offsets.shape[0], offsets.shape[2]
    last = (lengths - 1) // tokens_per_block
    keys, values = offsets[:, 0], offsets[:, 1]
    index = np.arange(width)
    present = (index <= last[:, None]) & (keys != NULL_OFFSET)
    filled = np.where(index == last[:, None], (lengths - 1)[:, None] % tokens_per_block + 1, tokens_per_block)
    if fold_aliases:
        # Sorted by unit, equal entries stand together; absent ones sort last. A partial block is never shared.
        order = np.argsort(np.where(present, keys, NULL_OFFSET), axis=1, kind="stable")
        rows = np.arange(num)[:, None]
        keys, values, present, filled = (
            keys[rows, order],
            values[rows, order],
            present[rows, order],
            filled[rows, order],
        )
        is_first = present.copy()
        is_first[:, 1:] &= keys[:, 1:] != keys[:, :-1]
        group = np.cumsum(is_first, axis=1) - 1 + rows * width
        counts = np.bincount(group[present], minlength=num * width).reshape(num, width)
    else:
        is_first, counts = present, None
    pack = np.argsort(~is_first, axis=1, kind="stable")
    rows = np.arange(num)[:, None]
    packed = is_first[rows, pack]
    if counts is None:
        counts = packed.astype(np.int64)
    pack = np.where(packed, pack, pack[:, :1])  # padding repeats a block of the sequence: others' may not be finite
    keys, values = keys[rows, pack], values[rows, pack]
    return keys, values, counts, np.where(packed, filled[rows, pack], 0)
