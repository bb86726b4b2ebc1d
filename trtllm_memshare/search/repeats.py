"""Whether a page stands again, word for word and later, in what its request keeps: such a page may go at any floor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trtllm_memshare.search.types import Matcher


def stands_again(
    matcher: Matcher, page: int, tokens_per_block: int, num_computed: int, is_gone: Callable[[np.ndarray], np.ndarray]
) -> bool:
    """Whether each token of a page has an equal one that is kept; copies that went are followed to theirs.

    Args:
      matcher: stage 1 of the request, up to date; of runs without gaps, the latest kept: its counterparts are equal.
      page: a logical page that it says is ready.
      num_computed: tokens whose K and V are written.
      is_gone: int ``[n]`` positions below ``num_computed`` -> bool ``[n]``, whether nothing is read for them any more.
    """
    positions = np.asarray(matcher.counterparts(page)[0])
    for _ in range(num_computed // tokens_per_block + 1):  # copies are later ones, so that no chain is longer
        places = positions.tolist()  # so few that Python looks through them sooner than numpy
        if min(places) < 0 or max(places) >= num_computed:
            return False
        gone = is_gone(positions)
        if not np.count_nonzero(gone):
            return page not in {place // tokens_per_block for place in places}
        positions = positions.copy()
        for other in np.unique(positions[gone] // tokens_per_block).tolist():
            there = gone & (positions // tokens_per_block == other)
            positions[there] = np.asarray(matcher.counterparts(other)[0])[positions[there] % tokens_per_block]
    return False
