"""How much memory the requests in flight will need at most, when each gives up all that it may.

MAX_UTILIZATION admits what fits now, and pauses when requests have grown: the worst moment of serving under pressure.
With floors there is something to look ahead with. A request takes a token a step, so when it will end and what it will
hold until then is known up to its length, and the peaks lie just before somebody ends::

    blocks   |          __ A ends            A and B together peak where A ends; C fits if the peaks of all
             |   ______|  |____ B ends       three stay within the pool
             |__|_________|____|______ steps

Nothing rests on it but admission: where a length was wrong, somebody is paused in the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

_LEARNED_FROM = 8
_REMEMBERED = 256
_LENGTH_QUANTILE = 0.9


@dataclass(frozen=True)
class Prospect:
    """One request.

    Attributes:
      num_tokens: that it has now.
      num_prompt_tokens: how many of them are prompt.
      end: tokens that it will have when it ends.
      min_kept: share of its generated pages that it keeps.
      num_protected: recent tokens that are not given up.
    """

    num_tokens: int
    num_prompt_tokens: int
    end: int
    min_kept: float
    num_protected: int


def least_blocks(prospects: list[Prospect], num_tokens: np.ndarray, tokens_per_block: int) -> np.ndarray:
    """Blocks that requests hold at given lengths when they have given up all that they may.

    Args:
      num_tokens: int ``[..., len(prospects)]``, tokens of each.

    Returns:
      int64, the same shape.
    """
    size = tokens_per_block
    prompt = np.array([-(-p.num_prompt_tokens // size) for p in prospects])
    kept = np.array([p.min_kept for p in prospects])
    # A block more than the protected tokens fill, since the protection need not begin with a block.
    protected = np.array([-(-p.num_protected // size) + 1 for p in prospects])
    generated = np.maximum(0, num_tokens // size - prompt)
    stays = np.maximum(np.ceil(kept * generated - 1e-9).astype(np.int64), np.minimum(generated, protected))
    # And the block that is being written.
    return np.minimum(-(-num_tokens // size), prompt + stays + 1)


def peak_blocks(prospects: list[Prospect], tokens_per_block: int) -> int:
    """The most blocks that the requests will hold together, if none comes and each takes a token a step."""
    tokens = np.array([p.num_tokens for p in prospects])
    ends = np.array([p.end for p in prospects])
    steps = np.unique(np.maximum(0, ends - tokens))
    then = tokens + steps[:, None]  # [moments, requests]
    held = np.where(then <= np.maximum(ends, tokens), least_blocks(prospects, then, tokens_per_block), 0)
    return int(held.sum(1).max(initial=0))


class Lengths:
    """Learns how long outputs get: users ask for more tokens than answers take."""

    def __init__(self) -> None:
        self._ended: deque[int] = deque(maxlen=_REMEMBERED)
        self._usual: int | None = None

    def learn(self, num_generated: int) -> None:
        """Takes the length of a request that ended by itself."""
        self._ended.append(num_generated)
        if len(self._ended) >= _LEARNED_FROM:
            self._usual = int(np.quantile(np.array(self._ended), _LENGTH_QUANTILE))

    def expect(self, num_generated: int, max_new_tokens: int, tokens_per_block: int) -> int:
        """Tokens that a request will have generated in the end: all that it asked for until others have ended.

        One that is longer than most will go on for a few blocks.
        """
        if self._usual is None:
            return max_new_tokens
        return min(max_new_tokens, max(self._usual, num_generated + 4 * tokens_per_block))
