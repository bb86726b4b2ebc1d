"""Decode attention through FlashInfer, whose paged HND layout is one layer of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.runners.protocol import StepBatch

_WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation for split-k partial results
_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class PageLists:
    """Pages that each generation request reads, FlashInfer's CSR form; the last page of a request may be partial.

    Attributes:
      indptr: int32 ``[batch + 1]``.
      indices: int32 ``[indptr[-1]]``, physical blocks; a block that a table names m times stands there m times.
      last_page_len: int32 ``[batch]``, valid tokens of the last page.
    """

    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray

    def padded(self, batch: int) -> PageLists:
        """The same with the first request repeated up to ``batch`` requests."""
        missing = batch - len(self.last_page_len)
        first = self.indices[: self.indptr[1]]
        return PageLists(
            np.concatenate([self.indptr, self.indptr[-1] + len(first) * np.arange(1, missing + 1, dtype=np.int32)]),
            np.concatenate([self.indices, np.tile(first, missing)]),
            np.concatenate([self.last_page_len, np.repeat(self.last_page_len[:1], missing)]),
        )


def list_pages(batch: StepBatch, num_layers: int, tokens_per_block: int) -> PageLists:
    """Page lists of the generation requests of a batch.

    Order does not matter to attention, except that the partial page comes last, as it does in the table. Without
    ``count_aliases`` a block is listed once however often a table names it.
    """
    first = batch.num_contexts
    lengths = batch.sequence_lengths[first:]
    keys = batch.block_offsets[0, first:, 0].astype(np.int64)
    last = (lengths - 1) // tokens_per_block
    present = (np.arange(keys.shape[1]) <= last[:, None]) & (keys != NULL_OFFSET)
    blocks = keys // (2 * num_layers)
    if not batch.count_aliases:
        for row, there in zip(blocks, present, strict=True):
            # The last of equal entries stays, so that the partial page keeps its place.
            _, places = np.unique(row[there][::-1], return_index=True)
            kept = np.flatnonzero(there)[::-1][places]
            there[:] = False
            there[kept] = True
    indptr = np.concatenate([[0], present.sum(1).cumsum()]).astype(np.int32)
    return PageLists(indptr, blocks[present].astype(np.int32), ((lengths - 1) % tokens_per_block + 1).astype(np.int32))


def make_workspace(device: torch.device) -> torch.Tensor:
    """Memory for partial results, uint8, zero as FlashInfer wants it at first use."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferDecode:
    """One FlashInfer wrapper over a pool.

    Args:
      flashinfer: the module, or a stand-in with its ``BatchDecodeWithPagedKVCacheWrapper``.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      num_heads: query heads.
      dtype: of queries and outputs.
      workspace: from ``make_workspace``; wrappers that run one after the other may share it.
      fixed_batch: batch size of every step, with buffers that a CUDA graph may keep; None = any, no graph.
      max_pages: with ``fixed_batch``: most entries of ``PageLists.indices``.
    """

    def __init__(
        self,
        flashinfer: Any,
        pool: torch.Tensor,
        num_heads: int,
        dtype: torch.dtype,
        workspace: torch.Tensor,
        fixed_batch: int | None = None,
        max_pages: int = 0,
    ) -> None:
        self._pool, self._num_heads, self._dtype = pool, num_heads, dtype
        device = pool.device
        buffers: dict[str, Any] = {}
        if fixed_batch is not None:
            sizes = {"indptr": fixed_batch + 1, "indices": max_pages, "last_page_len": fixed_batch}
            buffers = {
                f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=device)
                for name, size in sizes.items()
            }
        # With few query heads to a KV head, plain decode is faster; from about four on, tensor cores are.
        tensor_cores = num_heads // pool.shape[3] >= 4
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=fixed_batch is not None, use_tensor_cores=tensor_cores, **buffers
        )

    def plan(self, pages: PageLists, scaling: float) -> None:
        """Prepares one step for all layers.

        Args:
          pages: what each request reads.
          scaling: factor on the logits.
        """
        _, _, _, num_kv_heads, tokens_per_block, head_dim = self._pool.shape
        self._wrapper.plan(
            torch.from_numpy(pages.indptr),
            torch.from_numpy(pages.indices).to(self._pool.device),
            torch.from_numpy(pages.last_page_len),
            self._num_heads,
            num_kv_heads,
            head_dim,
            tokens_per_block,
            pos_encoding_mode="NONE",  # K in the pool is rotated already
            q_data_type=self._dtype,
            kv_data_type=self._pool.dtype,
            sm_scale=scaling,
        )

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of one layer: query ``[batch, num_heads, head_dim]`` -> the same shape."""
        return self._wrapper.run(query.contiguous(), (self._pool[:, layer, 0], self._pool[:, layer, 1]))


def find_flashinfer(pool: torch.Tensor, dtype: torch.dtype) -> tuple[Any, str]:
    """FlashInfer and what to say of it, or None and why it is not used.

    Args:
      pool: the KV pool.
      dtype: of the model's activations.
    """
    if not pool.is_cuda:
        return None, f"PyTorch (the pool is on {pool.device})"
    if dtype not in (torch.float16, torch.bfloat16) or pool.shape[-1] not in _HEAD_DIMS:
        name = str(dtype).removeprefix("torch.")
        return None, f"PyTorch (FlashInfer takes fp16 or bf16 and head_dim {_HEAD_DIMS}, got {name}, {pool.shape[-1]})"
    try:
        import flashinfer
    except ImportError as error:
        return None, f"PyTorch (FlashInfer cannot be imported: {error})"
    return flashinfer, f"FlashInfer {flashinfer.__version__}, every alias read"
