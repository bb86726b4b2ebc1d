"""Stage 1 of ``aligned`` and ``lexical``: runs of tokens that repeat earlier ones at a constant shift.

An online match in the manner of LZ77: a table maps the hash of each shingle (the last ``shingle_tokens`` tokens) to
the latest position at which it ended. A hit is checked token by token, extended backwards, and followed forwards for
as long as tokens agree. Each token is hashed once and compared a bounded number of times, so the cost per token does
not depend on the length of the request.
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matching import BlockMatcher
from trtllm_memshare.search.steps import BoundaryTokens

_BACKWARD_WINDOW = 256  # tokens compared at once when a run is extended backwards


class RunMatcher(BlockMatcher):
    """Finds, for each token of a block, its counterpart in another run of the same text.

    With ``keep-latest`` the older tokens get counterparts among the newer ones, with ``keep-earliest`` the newer
    among the older. A block is ready when all of its tokens have one.
    """

    def __init__(
        self, config: MemShareConfig, tokens_per_block: int, num_prompt_tokens: int, boundaries: BoundaryTokens
    ) -> None:
        super().__init__(config, tokens_per_block, num_prompt_tokens, boundaries)
        self._stride = tokens_per_block
        self._keep_latest = config.direction == "keep-latest"
        self._weights = np.random.default_rng(0).integers(1, 2**63, config.shingle_tokens, dtype=np.uint64) | np.uint64(
            1
        )
        self._last_end: dict[int, int] = {}
        self._counterpart = np.full(1024, -1, np.int32)
        self._matched = np.zeros(64, np.int32)  # tokens with a counterpart, per logical block
        self._processed = 0
        self._shift = 0  # of the run being followed, 0 = none
        self._run_start = self._run_end = 0  # of the run followed, or the last one
        self._last_shift = 0

    def counterparts(self, logical_block: int) -> list[np.ndarray]:
        """The one choice of counterpart positions, int32 ``[tokens_per_block]``."""
        return [self._counterpart[logical_block * self._size : (logical_block + 1) * self._size]]

    def is_due(self, num_more: int = 0) -> bool:
        """See ``BlockMatcher.is_due``."""
        return bool(self._ready) or self._history.num_tokens + num_more - self._processed >= self._stride

    def protected_from(self) -> int:
        """See ``BlockMatcher.protected_from``; steps are looked for now, since most looks at new tokens need none."""
        if self._config.protected_steps:
            self._history.segment(self._processed)
        return super().protected_from()

    def _advance(self) -> None:
        end = self._history.num_tokens
        # Many tokens at a time: numpy's cost per call is then shared by them.
        if end - self._processed < self._stride:
            return
        self._grow(end)
        # A repeat is at least a slice away, so its older copy is in the table.
        for start in range(self._processed, end, self._stride):
            self._match(start, min(start + self._stride, end))
        self._processed = end

    def _match(self, start: int, end: int) -> None:
        """Follows or looks for runs through the tokens in ``[start, end)``, then enters their shingles in the table."""
        if self._shift > start:  # an error stopped the look before, which begins anew: no run reaches back so far
            self._last_shift, self._shift = self._shift, 0
        keys = self._shingle_hashes(start, end)
        position, tokens = start, self._history.token_ids
        while position < end:
            if self._shift == 0:
                position = self._seek(position, end, keys, start)
                continue
            equal = tokens[position:end] == tokens[position - self._shift : end - self._shift]
            length = len(equal) if equal.all() else int(equal.argmin())
            self._run_end = position + length
            self._record(position, self._run_end)
            position = self._run_end
            if length < len(equal):
                self._last_shift, self._shift = self._shift, 0
        offset = end - start - len(keys)
        self._last_end.update(zip(keys, range(start + offset, end), strict=True))

    def _shingle_hashes(self, start: int, end: int) -> list[int]:
        """Hashes of the shingles that end at positions ``start`` .. ``end - 1`` (fewer at the very beginning)."""
        width = self._config.shingle_tokens
        tokens = self._history.token_ids[max(0, start - width + 1) : end].astype(np.uint64)
        if len(tokens) < width:
            return []
        # A weighted sum over each window, modulo 2**64: one call, five times as fast as windows times weights.
        return np.correlate(tokens, self._weights, "valid").tolist()

    def _seek(self, position: int, end: int, keys: list[int], start: int) -> int:
        """Looks for the end of a known shingle from ``position`` on; returns where to go on."""
        first = end - len(keys)
        position = max(position, first)
        if self._last_end.keys().isdisjoint(keys[position - first :]):
            return end  # as in most text
        for candidate in range(position, end):
            earlier = self._last_end.get(keys[candidate - first])
            # Closer than this, both copies could sit in one block, and no run could be long enough.
            if earlier is None or candidate - earlier < self._stride:
                continue
            shift = candidate - earlier
            run_start = self._extend_back(candidate + 1, shift)
            if candidate + 1 - run_start < self._config.shingle_tokens:
                continue  # two shingles with one hash
            gap = run_start - self._run_end
            if shift == self._last_shift and 0 <= gap <= self._config.max_gap_tokens:
                run_start = self._run_end  # the same run goes on behind a few differing tokens
            else:
                self._run_start = run_start
            self._shift, self._run_end = shift, candidate + 1
            self._record(run_start, self._run_end)
            return candidate + 1
        return end

    def _extend_back(self, run_end: int, shift: int) -> int:
        """First position of the longest run that ends before ``run_end`` at this shift."""
        tokens, position = self._history.token_ids, run_end
        while position > shift:
            low = max(shift, position - _BACKWARD_WINDOW)
            differ = np.flatnonzero(tokens[low:position] != tokens[low - shift : position - shift])
            if len(differ):
                return low + int(differ[-1]) + 1
            position = low
        return position

    def _record(self, first: int, last: int) -> None:
        """Notes counterparts for the tokens of the current run in ``[first, last)``, once the run is long enough."""
        if last - self._run_start < self._config.min_run_tokens:
            return
        if first - self._run_start < self._config.min_run_tokens:
            first = self._run_start  # it has just become long enough
        if first >= last:
            return
        span = np.arange(first, last, dtype=np.int32)
        low, high = (first - self._shift, last - self._shift) if self._keep_latest else (first, last)
        target = self._counterpart[low:high]
        new = target < 0
        target[:] = span if self._keep_latest else span - self._shift
        first_block, last_block = low // self._size, (high - 1) // self._size
        blocks = np.arange(low, high)[new] // self._size - first_block
        counts = self._matched[first_block : last_block + 1]
        counts += np.bincount(blocks, minlength=len(counts)).astype(np.int32)
        for index in np.flatnonzero(counts == self._size).tolist():
            logical = first_block + index
            # A block that was judged against an older copy gets another chance with the new one.
            self._settled.discard(logical)
            self._ready.setdefault(logical, None)

    def _grow(self, num_tokens: int) -> None:
        if num_tokens > len(self._counterpart):
            grown = np.full(2 * num_tokens, -1, np.int32)
            grown[: len(self._counterpart)] = self._counterpart
            self._counterpart = grown
        if num_tokens // self._size + 1 > len(self._matched):
            grown = np.zeros(2 * (num_tokens // self._size + 1), np.int32)
            grown[: len(self._matched)] = self._matched
            self._matched = grown
