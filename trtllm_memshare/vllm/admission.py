"""Whether a waiting request may join: would the pool hold everybody's kept pages until each of them ends?

vLLM admits what fits now and preempts when it stops fitting. With pressure most of what a request will hold can be
foretold: its prompt, and the kept share of what it generates. Running requests advance together, one token a step, so
the pool is fullest just before somebody ends::

    blocks
      |        A ends
      |    ____|   B ends
      |   /    |___|
      |  /     |  /|___ C ends
      | /          |  /
      +------------------- steps
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_memshare.vllm.relief import Relief
from trtllm_memshare.vllm.settings import VllmOptions

_STEPS_BETWEEN_TRIES = 16  # while nobody leaves, the outlook changes slowly


@dataclass(frozen=True)
class Outlook:
    """One request as admission sees it; lengths in tokens, prompt included.

    Attributes:
      num_prompt_tokens, num_tokens: its prompt, and everything so far.
      final_tokens: the length at which it is expected to end.
      num_retired: blocks that it has given up so far.
      min_kept: its floor; 1 for a request that gives nothing up.
      protected_tokens: recent tokens that are never retired.
    """

    num_prompt_tokens: int
    num_tokens: int
    final_tokens: int
    num_retired: int
    min_kept: float
    protected_tokens: int


def blocks_held(outlooks: list[Outlook], num_tokens: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks that requests cannot do without at given lengths, int64, of ``num_tokens``'s shape.

    Args:
      outlooks: ``n`` requests.
      num_tokens: int64 ``[..., n]``, a length for each.
    """
    prompt = np.array([o.num_prompt_tokens for o in outlooks])
    min_kept = np.array([o.min_kept for o in outlooks])
    protected = np.array([o.protected_tokens for o in outlooks]) + block_size  # the page in which protection begins
    first = -(-prompt // block_size)
    generated = np.maximum(0, num_tokens // block_size - first)
    room = generated - np.ceil(min_kept * generated - 1e-9).astype(np.int64)  # floor_room, over arrays
    may_go = np.minimum(room, np.maximum(0, (num_tokens - protected) // block_size - first))
    gone = np.maximum(may_go, np.array([o.num_retired for o in outlooks]))
    return -(-(num_tokens + 1) // block_size) - gone


def peak_blocks(outlooks: list[Outlook], block_size: int) -> int:
    """The most blocks that all of them hold at once, until the last one ends.

    Two requests that keep everything, blocks of 10 tokens: one of 20 tokens ends at 40, one of 50 ends at 60. The
    second ends after 10 steps; just before that they hold 4 + 7 = 11 blocks, and later never more.
    """
    if not outlooks:
        return 0
    now = np.array([o.num_tokens for o in outlooks])
    left = np.maximum(0, np.array([o.final_tokens for o in outlooks]) - now)
    steps = np.unique(left)[:, None]  # somebody ends after each of these
    held = blocks_held(outlooks, now + steps, block_size)
    return int(np.where(left >= steps, held, 0).sum(1).max())


class LengthHistory:
    """Lengths of the answers that ended lately, to foretell those of running requests."""

    def __init__(self, quantile: float, size: int = 256, enough: int = 16) -> None:
        self._quantile, self._enough = quantile, enough
        self._lengths: deque[int] = deque(maxlen=size)

    def add(self, num_generated: int) -> None:
        """An answer has ended after so many tokens."""
        self._lengths.append(num_generated)

    def expected(self, num_generated: int, max_tokens: int) -> int:
        """How long an answer that has ``num_generated`` tokens becomes, at most ``max_tokens``.

        The quantile of the recent answers that went on beyond this length; ``max_tokens`` while few have ended.
        """
        longer = [length for length in self._lengths if length > num_generated]
        if len(self._lengths) < self._enough or not longer:
            return max_tokens
        return min(max_tokens, int(np.ceil(np.quantile(longer, self._quantile))))


class Admission:
    """Decides whether vLLM may take a waiting request in.

    Args:
      options: settings.
      protected_tokens: recent tokens of a request that are never retired.
      num_blocks: the pool without null pages.
    """

    def __init__(self, options: VllmOptions, protected_tokens: int, num_blocks: int, block_size: int) -> None:
        self.lengths = LengthHistory(options.admission_quantile)
        self.deferred = 0
        self._rule = options.admission
        self._protected_tokens, self._num_blocks, self._block_size = protected_tokens, num_blocks, block_size
        self._denied: str | None = None
        self._patience = 0

    def note_change(self) -> None:
        """Somebody has left: a request that was turned down may ask again."""
        self._denied = None

    def admits(self, request: Any, running: Sequence[Any], relief: Relief) -> bool:
        """Whether the pool holds ``request`` beside those that run. Always where nobody runs: somebody must get on."""
        if self._rule == "vllm" or not running:
            return True
        if request.request_id == self._denied and self._patience > 0:
            self._patience -= 1
            return False
        outlooks = [self._outlook(r, relief) for r in (*running, request)]
        if peak_blocks(outlooks, self._block_size) <= self._num_blocks:
            self._denied = None
            return True
        self._denied, self._patience = request.request_id, _STEPS_BETWEEN_TRIES
        self.deferred += 1
        return False

    def _outlook(self, request: Any, relief: Relief) -> Outlook:
        pages = relief.pages(request.request_id)
        generated = request.num_output_tokens
        final = (
            request.max_tokens if self._rule == "max-tokens" else self.lengths.expected(generated, request.max_tokens)
        )
        return Outlook(
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=request.num_tokens,
            final_tokens=request.num_prompt_tokens + max(final, generated + 1),
            num_retired=pages.num_retired,
            min_kept=pages.options.min_kept if pages.options.memshare else 1.0,
            protected_tokens=self._protected_tokens,
        )
