"""An oracle of what stands again: all tokens are compared with all, and nothing of the product is asked."""

from __future__ import annotations

import numpy as np


def copies(tokens: list[int], min_run: int) -> np.ndarray:
    """Who is a later copy of whom, bool ``[n, n]``.

    Entry ``[t, s]``: s is after t, and both lie in stretches of at least ``min_run`` equal tokens, in the same place.
    """
    ids = np.array(tokens)
    equal = np.triu(ids[:, None] == ids, 1)
    n = len(ids)
    ends, starts = np.zeros((2, n + 1, n + 1), np.int32)  # length of the equal stretch that begins, ends at [t, s]
    for t in range(n - 1, -1, -1):
        starts[t, :n] = (starts[t + 1, 1:] + 1) * equal[t]
    for t in range(n):
        ends[t + 1, 1:] = (ends[t, :n] + 1) * equal[t]
    return equal & (starts[:n, :n] + ends[1:, 1:] - 1 >= min_run)


def stand_again(copies: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Whether each token has a later copy that is kept, or one that went and stands again itself, bool ``[n]``."""
    found = np.zeros(len(is_kept), bool)
    for t in range(len(found) - 1, -1, -1):  # copies are later ones, so that theirs are known
        found[t] = (copies[t] & (is_kept | found)).any()
    return found
