"""How much of each generated page stands again later in its request, from V as it lies in TensorRT-LLM's pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trtllm_memshare.search.page_signer import ReferencePageSigner
from trtllm_memshare.search.signature_index import SignatureIndex, Span
from trtllm_memshare.search.signatures import fields_of_pool, make_projection

_PAGES_AT_ONCE = 64  # that PyTorch reads from the pool, each several times in float32


class Redundancy:
    """Of the generated pages of every request. V carries no position, so nothing has to be turned.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, live, read only.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        projection = make_projection(pool.shape[1], pool.shape[3], pool.shape[5])
        fields, no_rotation = fields_of_pool(pool, projection), torch.empty(0)
        # PyTorch on the pool's device: no GPU has run the kernel over the strides of these pools yet.
        self._signer = ReferencePageSigner(fields, no_rotation, projection, "the pool is TensorRT-LLM's")
        self._index = SignatureIndex(pool.shape[4], device=pool.device)
        self._first: dict[int, int] = {}

    def catch_up(self, requests: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Looks at pages that were filled or given up since, of all these requests together.

        Args:
          requests: id, logical page at which generated tokens begin, and int ``[n]``, the pool page of each full
            logical page from there on; -1 where it was given up.
        """
        spans = list[Span]()
        for request_id, first, blocks in requests:
            pages, is_there = np.arange(first, first + len(blocks), dtype=np.int32), blocks >= 0
            if self._first.get(request_id) != first or self._index.num_pages(request_id) > first + len(blocks):
                self.forget(request_id)  # it began anew
                self._first[request_id] = first
            self._index.forget(request_id, pages[~is_there])
            spans.append((request_id, pages[is_there], blocks[is_there]))
        self._index.catch_up(spans, self._sign, _PAGES_AT_ONCE)

    def measure(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """Redundancy in [-1, 1] of pages that are there, float32 ``[len(pages)]``; the newest gets -1.

        The mean over a page's tokens of the largest cosine with a token of a later page.

        Args:
          pages: int ``[m]``, logical pages that ``catch_up`` was told of.
        """
        return self._index.redundancy(request_id)[pages]

    def forget(self, request_id: int) -> None:
        """A request ended, was paused, or has its pages under other numbers."""
        self._index.drop(request_id)
        self._first.pop(request_id, None)

    def _sign(self, blocks: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(blocks)
        return self._signer.page_signatures(index, index)
