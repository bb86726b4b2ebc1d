"""Decode attention through FlashInfer, whose paged HND layout is one layer of the pool."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_memshare.runners.torch.page_lists import PageLists

_WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation for split-k partial results
_HEAD_DIMS = (64, 128, 256)


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
        return None, f"the pool is on {pool.device}"
    if dtype not in (torch.float16, torch.bfloat16) or pool.shape[-1] not in _HEAD_DIMS:
        name = str(dtype).removeprefix("torch.")
        return None, f"FlashInfer takes fp16 or bf16 and head_dim {_HEAD_DIMS}, got {name}, {pool.shape[-1]}"
    if pool.dtype not in (dtype, torch.float8_e4m3fn):
        # It checks nothing of the kind: another type of 16 bits would be read as if it were the model's.
        wanted, got = (str(d).removeprefix("torch.") for d in (dtype, pool.dtype))
        return None, f"FlashInfer takes a pool of the model's {wanted} or of float8_e4m3fn, got {got}"
    try:
        import flashinfer
    except ImportError as error:
        return None, f"FlashInfer cannot be imported: {error}"
    return flashinfer, f"FlashInfer {flashinfer.__version__}, every alias read"
