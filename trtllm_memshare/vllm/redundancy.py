"""KV redundancy of pages, on the worker, and the reports that tell the scheduler of it and of surprisal.

Without a GPU values are projected where vLLM hands them to its cache, layer by layer: the CPU backend packs what it
keeps by instruction set. With one they are read from the cache (``cache_signatures.py``). Pages are indexed when the
scheduler asks, and the answer rides back on the step's output. With tensor parallelism a rank sees its own KV heads,
and the rank that reports speaks for all.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch

from trtllm_memshare.search.signatures import SignatureIndex, SignatureProjection, make_projection
from trtllm_memshare.vllm.page_report import PageReport
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.update import MemShareUpdate


class ValueSignatures:
    """A signature for every slot of the pool, written with the slot's V; see ``search.signatures.page_signatures``.

    Args:
      layers: vLLM's attention layers, first to last; ``do_kv_cache_update`` of three of them is wrapped.
      num_slots: of the pool, blocks times tokens.
    """

    def __init__(self, layers: list[Any], num_slots: int, block_size: int, device: torch.device) -> None:
        self._projection = make_projection(len(layers), layers[0].num_kv_heads, layers[0].head_size)
        self._matrix = self._projection.matrix.to(device)  # [layers, num_kv_heads, head_dim, width]
        self._sums = torch.zeros(num_slots + 1, self._projection.width, device=device)
        self._block_size = block_size
        for index, layer in enumerate(self._projection.layers.tolist()):
            impl = layers[layer].impl
            impl.do_kv_cache_update = self._watch(impl.do_kv_cache_update, index)

    @property
    def projection(self) -> SignatureProjection:
        """What is projected."""
        return self._projection

    def of_blocks(self, block_ids: list[int]) -> np.ndarray:
        """Signatures of full blocks, float32 ``[blocks, tokens_per_block, width]``, normalised."""
        rows = self._sums[:-1].view(-1, self._block_size, self._projection.width)[block_ids]
        return torch.nn.functional.normalize(rows, dim=-1).cpu().numpy()

    def _watch(self, original: Any, index: int) -> Any:
        @functools.wraps(original)
        def do_kv_cache_update(layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: torch.Tensor) -> Any:
            rows = value[: len(slot_mapping)]  # vLLM pads values, not slots
            unit = torch.nn.functional.normalize(rows.float(), dim=-1)
            part = torch.einsum("thd,hdw->tw", unit, self._matrix[index])
            # Padding slots are -1; they go to a row of their own behind the pool.
            slots = torch.where(slot_mapping >= 0, slot_mapping, len(self._sums) - 1).long()
            if index == 0:
                self._sums.index_copy_(0, slots, part)
            else:
                self._sums.index_add_(0, slots, part)
            return original(layer, key, value, kv_cache, slot_mapping)

        return do_kv_cache_update


class PageSignatures(Protocol):
    """Signs full pages of vLLM's pool."""

    def of_blocks(self, block_ids: list[int]) -> np.ndarray:
        """float32 ``[blocks, tokens_per_block, width]``, normalised."""


class PageReports:
    """An index of signatures for each request, fed when the scheduler asks, and surprisal as it was sampled.

    Args:
      signatures, surprisal: where the facts that the need reads come from, None = it does not read them.
    """

    def __init__(self, signatures: PageSignatures | None, surprisal: SampledSurprisal | None, block_size: int) -> None:
        self._signatures, self._surprisal, self._block_size = signatures, surprisal, block_size
        self._requests: dict[str, SignatureIndex] = {}

    def answer(self, update: MemShareUpdate, block_ids: dict[str, list[int]], ended: set[str]) -> dict[str, PageReport]:
        """Reports of the requests of which something changed, by id; surprisal of the pages that are asked about now.

        Args:
          update: names full pages to take in, and pages that are retired.
          block_ids: tables of the requests that were asked about, before the update is applied.
          ended: requests that are no more.
        """
        asked = {name: pages for name, pages in update.asked.items() if name in block_ids}
        surprisal = {name: self._sampled(block_ids[name], pages) for name, pages in asked.items()}
        redundancy = self._redundancy(asked, update.null_entries, block_ids, ended)
        return {
            name: PageReport(redundancy.get(name), surprisal.get(name))
            for name in sorted(asked.keys() | redundancy.keys())
        }

    def _sampled(self, block_ids: list[int], pages: list[int]) -> np.ndarray | None:
        if self._surprisal is None:
            return None
        known = np.full(pages[-1] + 1, np.nan, np.float32)
        known[pages] = self._surprisal.of_pages(block_ids, pages)
        return known

    def _redundancy(
        self,
        asked: dict[str, list[int]],
        null_entries: dict[str, dict[int, int]],
        block_ids: dict[str, list[int]],
        ended: set[str],
    ) -> dict[str, np.ndarray]:
        if self._signatures is None:
            return {}
        for request_id in ended:
            self._requests.pop(request_id, None)
        for request_id, pages in asked.items():
            index = self._requests.setdefault(request_id, SignatureIndex(self._block_size))
            new = [page for page in pages if page >= index.num_pages]
            signatures = self._signatures.of_blocks([block_ids[request_id][page] for page in new])
            for page, of_page in zip(new, signatures, strict=True):
                index.append(page, of_page)
        for request_id, entries in null_entries.items():
            if request_id in self._requests:
                self._requests[request_id].forget(np.fromiter(entries, np.int32))
        changed = asked.keys() | null_entries.keys()
        return {name: self._requests[name].redundancy() for name in changed & self._requests.keys()}
