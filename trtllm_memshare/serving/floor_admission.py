"""Who gets in under pressure: a request for which the others could make room without anybody being paused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.floors import blocks_at_floors, most_protected, peak_at_floors
from trtllm_memshare.serving.request import Phase, RequestState, SamplingParams


def share_kept(params: SamplingParams, config: MemShareConfig) -> float:
    """Share of its generated pages below which a request gives up repeats only; 1 where it shares nothing."""
    if not params.memshare:
        return 1.0
    return config.min_kept if params.min_kept is None else params.min_kept


class FloorAdmission:
    """Counts what requests hold when they have given up all that they may.

    Args:
      manager: the cache.
      config: floor, protection, how far ahead.
      finds_repeats: whether pages that stand again may go below the floor.
    """

    def __init__(self, manager: KVCacheManager, config: MemShareConfig, finds_repeats: bool) -> None:
        self._manager, self._config, self._finds_repeats = manager, config, finds_repeats
        self._protected = most_protected(config)
        self._refused: tuple[int, int] | None = None  # who was refused last, and how many ran then
        self._asked_again = 0  # times since

    def blocks_of_one(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Blocks that one request holds at its longest end, at its floor."""
        longest = np.array([num_prompt_tokens + params.max_new_tokens])
        kept = np.array([share_kept(params, self._config)])
        size = self._manager.tokens_per_block
        return blocks_at_floors(longest, np.array([num_prompt_tokens]), kept, self._protected, size)

    def fits(self, state: RequestState, running: Sequence[RequestState], is_certain: bool) -> bool:
        """Whether a request can be admitted and everybody go on without a pause, all of them at their floors.

        Args:
          is_certain: to the last token that each asked for, however many of them are there at once; otherwise for the
            next ``lookahead_tokens``.
        """
        asked, refused, self._refused = (state.request_id, len(running)), self._refused, None
        if not running and not is_certain:
            return True
        if asked == refused and self._asked_again < self._manager.tokens_per_block:
            # Nobody came since, so the same requests run and are longer: only pages that stand again could let it in.
            self._refused, self._asked_again = refused, self._asked_again + 1
            return False
        states = (*running, state)
        held = self._peak(states) if is_certain else self._soon(states)
        if held <= self._manager.pool.num_usable:
            return True
        self._refused, self._asked_again = asked, 0
        return False

    def _free_to_go(self, state: RequestState) -> int:
        """Pages that a request has given up, and those that stand again."""
        if self._finds_repeats and state.params.memshare and state.phase is Phase.GENERATION:
            pages = self._manager.givable_pages(state.request_id)
            return pages.num_retired + pages.num_repeated
        return self._manager.num_given_up_for_good(state.request_id)

    def _soon(self, states: Sequence[RequestState]) -> int:
        """Blocks that requests hold at their floors once each has written ``lookahead_tokens`` more."""
        ahead = self._config.lookahead_tokens
        lengths = np.array([min(s.max_tokens, len(s.tokens) + ahead) for s in states])
        return blocks_at_floors(lengths, *self._floors(states))

    def _peak(self, states: Sequence[RequestState]) -> int:
        """Most blocks that requests ever hold together at their floors, if each writes all that it asked for."""
        lengths = np.array([len(s.tokens) for s in states])
        left = np.array([s.max_tokens for s in states]) - lengths
        # Who is in its context starts some steps later, and ends as many later: it is never counted as gone.
        writes = np.array([s.phase is Phase.GENERATION for s in states])
        return peak_at_floors(lengths, left, np.where(writes, left, left.max()), *self._floors(states))

    def _floors(self, states: Sequence[RequestState]) -> tuple[np.ndarray, np.ndarray, int, int, np.ndarray]:
        """Prompts, shares kept, protection, tokens of a block, pages that are free to go; see ``blocks_at_floors``."""
        prompts = np.array([len(s.prompt) for s in states])
        kept = np.array([share_kept(s.params, self._config) for s in states])
        free = np.array([self._free_to_go(s) for s in states])
        return prompts, kept, self._protected, self._manager.tokens_per_block, free
