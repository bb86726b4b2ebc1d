"""Keeps TensorRT-LLM's scheduler from letting in more requests than floors can carry.

Under MAX_UTILIZATION V1's scheduler admits a request as soon as its prompt fits, and pauses the youngest when memory is
gone, which computes it anew later. With floors under every request that goes on and on: what was paused is let in again
by the pages that others have just given up. The scheduler looks at the number of free pages. So pages that no running
request will need next are held by made-up requests, as many as keep it from admitting what could not stay, and are let
go as running requests need them.

::

    pool   | floors of running requests | what they may give up | free                      |
                                                                | next step | allowed | held |

``allowed``: what is left of the pool, up to the high watermark, if all running requests were at their floors.
"""

from __future__ import annotations

from typing import Any

from trtllm_memshare.trtllm.pytorch.backends import CacheBackend

_FIRST_ID = 2**60
_FEWEST = 4  # pages that are worth holding


class AdmissionReserve:
    """Pages that are held for one V1 manager.

    Args:
      manager: TensorRT-LLM's.
      backend: of the manager.

    Attributes:
      num_held: pages.
    """

    def __init__(self, manager: Any, backend: CacheBackend) -> None:
        self._manager, self._backend = manager, backend
        self._size, self._longest = backend.pool.shape[4], backend.max_blocks_per_seq - 1
        self._held: list[tuple[Any, int]] = []  # (made-up request, its pages)
        self._next_id = _FIRST_ID

    @property
    def num_held(self) -> int:
        return sum(pages for _, pages in self._held)

    def hold(self, num_pages: int) -> None:
        """Holds that many pages, fewer if the manager has no more; a few more or less are left as they are."""
        num_pages = num_pages if num_pages >= _FEWEST else 0
        while self.num_held > num_pages:
            request, pages = self._held[-1]
            excess = min(pages, self.num_held - num_pages)
            if excess < pages:
                self._backend.shrink(request.py_request_id, excess)
                self._held[-1] = request, pages - excess
                continue
            del self._held[-1]  # before it is freed: an error of ours in that call releases all that is held
            try:
                self._manager.free_resources(request)
            except Exception:
                self._held.append((request, pages))  # what is not noted would be held for ever
                raise
        while num_pages - self.num_held >= _FEWEST:
            pages = min(self._longest, num_pages - self.num_held)
            made = self._manager.add_dummy_requests(
                [self._next_id], token_nums=[pages * self._size], prepare_resource=True
            )
            if not made:
                return
            self._next_id += 1
            self._held.append((made[0], pages))
