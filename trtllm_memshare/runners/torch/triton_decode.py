"""Decode attention in Triton over the paged pool: a page is read once however often a table names it, null pages never.

Split-k: a program attends for the query heads of one KV head over a part of a request's pages; a second kernel joins
the parts. What a launch looks like depends on the batch size alone, so that a CUDA graph can keep it. Importing this
module needs ``triton``, which is part of torch for CUDA; with TRITON_INTERPRET=1 it runs on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtllm_memshare.runners.torch.page_lists import PageLists

_MOST_A_TURN, _LEAST_A_TURN = 64, 16  # tokens; a tensor-core product takes no fewer
_SHARED_BYTES = 99 << 10
"""Of a block, at most: what sm_89 and sm_120 have. sm_80 has 163 KiB, sm_90 and sm_100 227."""
_ENOUGH_PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100
_MAX_SPLITS = 64
_MIN_ROWS = 16  # of a tensor-core product


@triton.jit
def _attend_part(
    query, pool, indptr, indices, log_counts, last_page_len, output, part_output, part_lse,
    layer_offset, value_offset, block_stride, scaling,
    SPLITS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One request, KV head and part of the request's pages. Pointers: see ``TritonDecode``."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, stop = tl.load(indptr + request), tl.load(indptr + request + 1)
    filled = tl.load(last_page_len + request)
    a_part = tl.cdiv(stop - first, SPLITS)
    start = first + split * a_part
    end = tl.minimum(start + a_part, stop)

    rows, dims, turn = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TURN)
    query_rows = (request * KV_HEADS + head) * GROUP + rows
    q = tl.load(query + query_rows[:, None] * DIM + dims[None, :], mask=(rows < GROUP)[:, None], other=0.0)
    head_of_pool = pool + layer_offset + head * (TOKENS * DIM)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, DIM], tl.float32)
    for slot in range(start * TOKENS, end * TOKENS, TURN):  # several pages in a turn, or a part of one
        page, token = (slot + turn) // TOKENS, (slot + turn) % TOKENS
        there = page < end
        block = tl.load(indices + page, mask=there, other=0).to(tl.int64)
        weight = tl.load(log_counts + page, mask=there, other=0.0)
        there = there & ((page < stop - 1) | (token < filled))
        row = head_of_pool + block * block_stride + token * DIM
        k = tl.load(row[:, None] + dims[None, :], mask=there[:, None], other=0.0).to(q.dtype)
        v = tl.load(row[:, None] + value_offset + dims[None, :], mask=there[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling + weight[None, :]
        scores = tl.where(there[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        gathered = gathered * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        largest = new_largest
    mask = (rows < GROUP)[:, None]
    if SPLITS == 1:
        tl.store(output + query_rows[:, None] * DIM + dims[None, :], gathered / total[:, None], mask=mask)
    else:  # a part without pages has the logarithm of 0, and whatever it leaves counts nothing
        part_rows = query_rows * SPLITS + split
        safe = tl.where(total == 0.0, 1.0, total)  # then the largest is still the logarithm of 0
        tl.store(part_output + part_rows[:, None] * DIM + dims[None, :], gathered / safe[:, None], mask=mask)
        tl.store(part_lse + part_rows, largest + tl.log(safe), mask=rows < GROUP)


@triton.jit
def _join_parts(part_output, part_lse, output, SPLITS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr):
    """One query head of one request."""
    row, dims, splits = tl.program_id(0), tl.arange(0, DIM), tl.arange(0, PADDED)
    lse = tl.load(part_lse + row * SPLITS + splits, mask=splits < SPLITS, other=-float("inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    places = (row * SPLITS + splits)[:, None] * DIM + dims[None, :]
    parts = tl.load(part_output + places, mask=(splits < SPLITS)[:, None], other=0.0)
    tl.store(output + row * DIM + dims, tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0))


class TritonDecode:
    """Decode attention over a pool.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, fp32, fp16, bf16 or fp8 e4m3.
      num_heads: query heads.
      dtype: of queries and outputs.
      fixed_batch: batch size of every step, with buffers that a CUDA graph may keep; None = any, no graph.
      max_pages: with ``fixed_batch``: most entries of ``PageLists.indices``.
    """

    def __init__(
        self, pool: torch.Tensor, num_heads: int, dtype: torch.dtype, fixed_batch: int | None = None, max_pages: int = 0
    ) -> None:
        self._pool, self._num_heads, self._dtype = pool, num_heads, dtype
        self._fixed_batch, self._scaling = fixed_batch, 1.0
        self._buffers = self._make_buffers(fixed_batch or 0, max_pages)

    def plan(self, pages: PageLists, scaling: float) -> None:
        """Prepares one step for all layers.

        Args:
          pages: what each request reads.
          scaling: factor on the logits.

        Raises:
          ValueError: more pages or another batch size than the fixed ones.
        """
        batch, count = len(pages.last_page_len), len(pages.indices)
        if self._fixed_batch is None:
            self._buffers = self._make_buffers(batch, count)
        elif batch != self._fixed_batch or count > len(self._buffers[1]):
            raise ValueError(
                f"a captured step has {self._fixed_batch} requests and at most {len(self._buffers[1])} pages, got "
                f"{batch} and {count}"
            )
        values = (pages.indptr, pages.indices, pages.log_counts, pages.last_page_len)
        for buffer, array in zip(self._buffers, values, strict=True):
            buffer[: len(array)].copy_(torch.from_numpy(array), non_blocking=True)
        self._scaling = scaling

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of one layer: query ``[batch, num_heads, head_dim]`` -> the same shape."""
        _, num_layers, _, num_kv_heads, tokens, dim = self._pool.shape
        batch = query.shape[0]
        query = query.contiguous()
        output = torch.empty_like(query)
        splits = num_splits(batch * num_kv_heads)
        parts = query.new_empty((batch * self._num_heads * splits if splits > 1 else 0, dim), dtype=torch.float32)
        part_lse = parts.new_empty(len(parts))
        unit = num_kv_heads * tokens * dim
        group = self._num_heads // num_kv_heads
        rows = num_rows(group)
        _attend_part[(batch, num_kv_heads, splits)](
            query, self._pool, *self._buffers, output, parts, part_lse,
            layer * 2 * unit, unit, num_layers * 2 * unit, self._scaling,
            SPLITS=splits, KV_HEADS=num_kv_heads, GROUP=group, ROWS=rows,
            TOKENS=tokens, DIM=dim, TURN=tokens_a_turn(dim, rows, query.element_size(), self._pool.element_size()),
        )  # fmt: skip
        if splits > 1:
            padded = triton.next_power_of_2(splits)
            _join_parts[(batch * self._num_heads,)](parts, part_lse, output, SPLITS=splits, PADDED=padded, DIM=dim)
        return output

    def _make_buffers(self, batch: int, max_pages: int) -> tuple[torch.Tensor, ...]:
        """indptr, indices, log_counts and last_page_len on the device."""
        sizes = ((batch + 1, torch.int32), (max_pages, torch.int32), (max_pages, torch.float32), (batch, torch.int32))
        return tuple(torch.zeros(size, dtype=dtype, device=self._pool.device) for size, dtype in sizes)


def num_splits(programs: int) -> int:
    """Into how many parts each request is cut, so that a GPU is busy when there are few requests and heads."""
    return max(1, min(_MAX_SPLITS, _ENOUGH_PROGRAMS // max(1, programs)))


def num_rows(group: int) -> int:
    """Rows of a product for the query heads of one KV head."""
    return max(_MIN_ROWS, int(triton.next_power_of_2(group)))


def shared_bytes(turn: int, dim: int, rows: int, query_bytes: int, pool_bytes: int) -> int:
    """Shared memory of a block, at most; from what Triton 3.7 takes for sm_80 to sm_120, which tests hold it against.

    Args:
      turn: tokens that are read at a time.
      dim: head_dim.
      rows: see ``num_rows``.
      query_bytes, pool_bytes: of an element.
    """
    staged = 2 * turn * dim * pool_bytes  # K and V
    if query_bytes == 4 and pool_bytes < 4:  # no tensor core: both factors lie there once more, converted
        staged += 2 * turn * dim * query_bytes
    if rows >= 64:  # products of a whole warp group
        staged += turn * dim * query_bytes
    return staged + rows * (dim * query_bytes + turn * 4) + 1024


def tokens_a_turn(dim: int, rows: int, query_bytes: int, pool_bytes: int) -> int:
    """Tokens that are read at a time, from several pages or a part of one, so that a block fits every card."""
    turn = _MOST_A_TURN
    while turn > _LEAST_A_TURN and shared_bytes(turn, dim, rows, query_bytes, pool_bytes) > _SHARED_BYTES:
        turn //= 2
    return turn


def why_not(pool: torch.Tensor, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot read a pool, or None.

    Args:
      pool: see ``TritonDecode``; on another device than CUDA only its shape and type count.
      num_heads: query heads.
      dtype: of queries.
    """
    tokens, dim = pool.shape[4:]
    if dim & (dim - 1) or tokens & (tokens - 1) or dim < 16 or tokens < 8:
        return f"Triton takes powers of two from 8 tokens a block and head_dim 16 on, got {tokens} and {dim}"
    if pool.dtype == torch.int8:
        return "Triton's decode takes no int8 pool"
    if not pool.is_cuda:
        return None
    capability = torch.cuda.get_device_capability(pool.device)
    if pool.dtype == torch.float8_e4m3fn and capability < (8, 9):
        return "Triton reads fp8 e4m3 from sm_89 on, got sm_{}{}".format(*capability)
    rows, sizes = num_rows(num_heads // pool.shape[3]), (dtype.itemsize, pool.element_size())
    needed = shared_bytes(tokens_a_turn(dim, rows, *sizes), dim, rows, *sizes)
    properties = torch.cuda.get_device_properties(pool.device)
    there = getattr(properties, "shared_memory_per_block_optin", _SHARED_BYTES)
    if needed > there:
        return f"Triton's decode needs {needed >> 10} KiB of shared memory at head_dim {dim}, got {there >> 10}"
    return None
