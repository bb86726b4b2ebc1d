"""How a preempted request comes back at the size that it had: no chunk is longer than the blocks that are free.

vLLM computes all of its tokens anew. When a chunk is computed, the pages in it that had been given up go again
(``Relief.begin_step``), and what that frees carries the next chunk; as in our own executor (``cache.resume``)::

    pages      0 1 2 3 4 5 6 7 8 9        it kept 0 1 4 6 8 9 and had given up 2 3 5 7; 6 blocks are free
    step 1     0 1 2 3 4 5 . . . .        the first chunk takes them all
    step 2     0 1 - - 4 - 6 7 8 .        2, 3 and 5 go again: blocks for 6, 7 and 8
    step 3     0 1 - - 4 - 6 - 8 9        7 goes again: a block for 9

Queries of a chunk see the pages of that chunk that go after it, and none of those that went before. A chunk that reads
null pages ends with the band of positions that they are made for. Where the whole request fits at once, vLLM goes its
own way.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.host_request import HostRequest
from trtllm_memshare.vllm.relief import Relief


class ComingBack:
    """Preempted requests that had given pages up, until these have gone again.

    Args:
      relief: knows what they had given up.
      blocks: the scheduler's blocks.
      bands: int32 ``[num_bands + 1]``, first position of each band of null pages and the end of the last.
    """

    def __init__(self, relief: Relief, blocks: VllmBlocks, bands: np.ndarray) -> None:
        self._relief, self._blocks, self._bands = relief, blocks, bands
        self._requests: dict[str, HostRequest] = {}
        self._hits: dict[str, tuple[int, frozenset[int]]] = {}  # see note_hits

    def preempted(self, request: HostRequest) -> None:
        """A request has lost its blocks."""
        self.forget(request.request_id)
        if self._relief.pages(request.request_id).to_retire_again:
            self._requests[request.request_id] = request

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._requests.pop(request_id, None)
        self._hits.pop(request_id, None)

    def note_hits(self, request_id: str, num_unused: int, used: Iterable[int]) -> None:
        """What vLLM's prefix cache has of a request that waits.

        Args:
          num_unused: blocks that nobody reads: it would take them out of those that are free.
          used: its pages that somebody reads, which cost nothing and will not go.
        """
        if request_id in self._requests:
            self._hits[request_id] = num_unused, frozenset(used)

    def blocks_wanted(self, request: HostRequest) -> int | None:
        """Blocks that it takes from here on at the size that it had; None if it is not, or no more, on its way back."""
        if request.request_id not in self._requests:
            return None
        num_unused, used = self._hits.get(request.request_id, (0, frozenset()))
        held = self._blocks.num_held(request.request_id)
        again = sum(p >= held and p not in used for p in self._relief.pages(request.request_id).to_retire_again)
        return max(self._missing(request) - len(used) - again, num_unused + 1)

    def blocks_reserved(self, running: Container[str]) -> int:
        """Blocks that those of ``running`` which are on their way back have still to take."""
        return sum(self.blocks_wanted(r) or 0 for name, r in self._requests.items() if name in running)

    def longest_chunk(self, running: Container[str], num_wanted: int) -> int | None:
        """Most tokens of a chunk in the step that is about to be scheduled; None = as vLLM likes.

        Args:
          running: ids of the requests that run.
          num_wanted: blocks that requests which write will take first.
        """
        size, free, limits = self._blocks.block_size, self._blocks.num_free - num_wanted, list[int]()
        for name, request in list(self._requests.items()):
            if name in running:
                computed = request.num_computed_tokens
                if computed >= request.num_tokens - 1:
                    self.forget(name)  # it is back
                    continue
                self._hits.pop(name, None)
                if self._relief.pages(name).retired:
                    limits.append(int(self._bands[np.searchsorted(self._bands, computed, "right")]) - computed)
            elif (self.blocks_wanted(request) or 0) > free:
                continue
            num_unused, used = self._hits.get(name, (0, frozenset()))
            if self._missing(request) - len(used) > free:
                limits.append(max(1, free - num_unused) * size)
        return min(limits, default=None)

    def _missing(self, request: HostRequest) -> int:
        """Blocks that it takes from here on at its full size."""
        return -(-request.num_tokens // self._blocks.block_size) - self._blocks.num_held(request.request_id)
