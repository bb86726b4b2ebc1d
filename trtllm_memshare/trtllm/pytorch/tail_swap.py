"""Gives pages in the middle of a sequence back to a manager that can free its end only.

A page that is given up is overwritten by the last page of the request's list, the list is cut by one, and the row of
the block table is rearranged to match (page_list.py, row_map.py). Copies run on the stream of the forward passes: the
last write of a step that still runs is on that stream before them, and whoever takes a freed page writes after them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trtllm_memshare.trtllm.pytorch.backends import CacheBackend
from trtllm_memshare.trtllm.pytorch.requests import KnownRequest
from trtllm_memshare.trtllm.pytorch.row_map import on_device

_AT_ONCE = 8  # pages that are copied together: they need room for as many beside the pool, and two kernels
_MAX_AHEAD = 2  # tokens that may have a slot before the host knows them: the one in flight, and the next


class TailSwap:
    """Carries out what was decided for one manager.

    Args:
      backend: of the manager.
      tokens_at_once: tokens that may gather before a request is read again.
      wait_for_table: returns when the device has read the manager's pinned rows for the last table.
      lose: told of a request whose list is not what its tokens imply.

    Attributes:
      num_copies: pages moved into the place of one that was given up.
    """

    def __init__(
        self,
        backend: CacheBackend,
        tokens_at_once: int,
        wait_for_table: Callable[[], None],
        lose: Callable[[int], None],
    ) -> None:
        self._backend, self._wait_for_table, self._lose = backend, wait_for_table, lose
        self._size = backend.pool.shape[4]
        # Eight bytes at a time, whatever the elements are; a view, or an error.
        self._pages = backend.pool.view(backend.pool.shape[0], -1).view(torch.int64)
        self._slack = tokens_at_once + _MAX_AHEAD
        self.num_copies = 0

    def synchronise(self, known: KnownRequest) -> list[int]:
        """The manager's list of a request, after pages that it appended since were taken over.

        Raises:
          RuntimeError: it has not the length that the request's tokens imply; the request is lost, whoever asked:
            a row that was rearranged before names places of a list that is no more.
        """
        pages, page_list = self._backend.pages(known.request_id), known.pages
        logical = len(pages) + page_list.num_given_up
        fewest = -(-(known.num_tokens - 1) // self._size)
        most = -(-(known.num_tokens + self._slack) // self._size)
        if not max(fewest, page_list.num_blocks) <= logical <= most:
            self._lose(known.request_id)
            raise RuntimeError(
                f"request {known.request_id} of {known.num_tokens} tokens must have {fewest} to {most} blocks, got "
                f"{len(pages)} pages and {page_list.num_given_up} given up, {page_list.num_blocks} known before"
            )
        page_list.extend(logical)
        return pages

    def give_up(self, known: KnownRequest, blocks: list[int]) -> None:
        """Frees the pages of logical blocks; ``known.pages`` follows.

        The next table is written into pinned rows from which the last one may still be on its way to the device (V1
        before June 2026, and V2's ``resize`` at once), so that copy is waited for.

        Raises:
          RuntimeError: the manager's list is not what its calls imply; the request's row cannot be vouched for.
        """
        pages = self.synchronise(known)
        moves = [(pages[source], pages[target]) for source, target in known.pages.give_up(blocks)]
        self._copy(moves)
        self.num_copies += len(moves)
        self._wait_for_table()
        self._backend.shrink(known.request_id, len(blocks))
        left = self._backend.pages(known.request_id)
        if left != pages[: known.pages.num_pages]:
            raise RuntimeError(
                f"request {known.request_id} had pages {pages}, {len(blocks)} were dropped from the end, but the KV "
                f"cache manager now lists {left}"
            )

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        """Copies pages of the pool, (from, to); none is both."""
        if not moves:
            return
        sources, targets = on_device(torch.tensor(moves).T.contiguous(), self._pages.device)
        for start in range(0, len(moves), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            self._pages.index_copy_(0, targets[some], self._pages.index_select(0, sources[some]))
