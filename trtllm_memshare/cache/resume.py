"""How a paused request comes back at the size that it had: what it gave up goes again as its chunks are computed.

The request is given as many blocks as it held, from position 0 on. When a chunk is written, the pages in it that had
been given up go again, and the blocks that this frees carry the next pages at once, so nobody else can take them::

    pages      0 1 2 3 4 5 6 7 8 9        it kept 0 1 4 6 8 9 and had given up 2 3 5 7
    room for   0 1 2 3 4 5 . . . .        6 blocks, the first chunk ends with page 5
    after it   0 1 - - 4 - 6 7 8 .        2, 3 and 5 go again: room for 6, 7 and 8
    after it   0 1 - - 4 - 6 - 8 9        7 goes again: room for the last page

Queries of a chunk see the pages of that chunk that go after it, and none of those that went before. A request that is
paused keeps its newest pages in any case, so at every point at least one page that stays is still ahead, and with it
room for a chunk of one page or more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trtllm_memshare.cache.sequence import Parked, Sequence
from trtllm_memshare.search.types import Matcher


def blocks_at_return(num_tokens: int, num_retired: int, tokens_per_block: int) -> int:
    """Blocks that a paused request of ``num_tokens`` takes: those of its pages that it had not given up."""
    return -(-num_tokens // tokens_per_block) - num_retired


def retired_pages(sequence: Sequence) -> np.ndarray:
    """Logical pages that a request has given up, or will once more in this life; int ``[n]``, ascending."""
    return np.flatnonzero(sequence.retired | sequence.to_retire)


def pages_to_retire(sequence: Sequence, tokens_per_block: int) -> np.ndarray:
    """Pages of a request that came back which are computed now and had been given up; taken off its list.

    Returns:
      int ``[n]`` logical pages, ascending.
    """
    full = sequence.num_computed // tokens_per_block
    pages = np.flatnonzero(sequence.to_retire[:full])
    sequence.to_retire[pages] = False
    return pages


def matcher_at_return(
    parked: Parked, token_ids: np.ndarray, num_prompt_tokens: int, make_matcher: Callable[[int], Matcher] | None
) -> Matcher | None:
    """Stage 1 of a request that comes, or comes back, with ``token_ids`` int32 ``[n]``: it has seen all of them.

    Args:
      make_matcher: for a request that has none yet; None = it shares nothing.
    """
    matcher = parked.matcher
    if matcher is not None:
        matcher.reopen()
        # The token sampled last had no room when the request was paused, so stage 1 has not seen it.
        matcher.append(token_ids[matcher.num_tokens :])
    elif make_matcher is not None:
        matcher = make_matcher(num_prompt_tokens)
        matcher.append(token_ids)
    return matcher
