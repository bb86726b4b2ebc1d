"""KV redundancy of pages, on the worker: what the need ``redundancy`` ranks pages by.

Values are projected where vLLM hands them to its cache, layer by layer, so no backend's memory layout has to be known.
Pages are indexed when the scheduler asks, and the answer rides back on the step's output. With tensor parallelism a
rank sees its own KV heads, and the rank that reports speaks for all.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from trtllm_memshare.search.signatures import SignatureIndex, SignatureProjection, make_projection
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


class RedundancyReports:
    """An index for each request, fed when the scheduler asks."""

    def __init__(self, signatures: ValueSignatures, block_size: int) -> None:
        self._signatures, self._block_size = signatures, block_size
        self._requests: dict[str, SignatureIndex] = {}

    def answer(self, update: MemShareUpdate, block_ids: dict[str, list[int]], ended: set[str]) -> dict[str, np.ndarray]:
        """Redundancy of the requests of which something changed, by id: float32 ``[pages]``, NaN for pages without one.

        Args:
          update: names full pages to take in, and pages that are retired.
          block_ids: tables of the requests that were asked about, before the update is applied.
          ended: requests that are no more.
        """
        for request_id in ended:
            self._requests.pop(request_id, None)
        for request_id, pages in update.asked.items():
            if request_id not in block_ids:
                continue
            index = self._requests.setdefault(request_id, SignatureIndex(self._block_size))
            new = [page for page in pages if page >= index.num_pages]
            signatures = self._signatures.of_blocks([block_ids[request_id][page] for page in new])
            for page, of_page in zip(new, signatures, strict=True):
                index.append(page, of_page)
        for request_id, entries in update.null_entries.items():
            if request_id in self._requests:
                self._requests[request_id].forget(np.fromiter(entries, np.int32))
        changed = update.asked.keys() | update.null_entries.keys()
        return {name: self._requests[name].redundancy() for name in sorted(changed & self._requests.keys())}
