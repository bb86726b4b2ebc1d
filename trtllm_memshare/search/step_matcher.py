"""Stage 1 of ``paper``: whole steps whose bags of tokens have a high cosine, compared block by block.

Our reconstruction. The paper's step patterns, its threshold and the alignment of blocks within a step are not public;
here a block that starts inside the newer step is compared, slot by slot, with each block that starts inside one of the
most similar earlier steps. The number of earlier steps looked at is bounded by ``max_steps_compared``.
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.matching import BlockMatcher
from trtllm_memshare.search.steps import BoundaryTokens

_BAG_SIZE = 1024  # counts are kept by token id modulo this: exact for small vocabularies, a near upper bound else
_MOST_SIMILAR_STEPS = 2


class StepMatcher(BlockMatcher):
    """Offers the blocks of a finished step, with blocks of similar earlier steps as their counterparts."""

    def __init__(
        self, config: MemShareConfig, tokens_per_block: int, num_prompt_tokens: int, boundaries: BoundaryTokens
    ) -> None:
        super().__init__(config, tokens_per_block, num_prompt_tokens, boundaries)
        # Counts: products are whole numbers, exact in float64, so no threshold hangs on how a BLAS rounds.
        self._bags = np.zeros((config.max_steps_compared, _BAG_SIZE))
        self._squares = np.zeros(config.max_steps_compared)
        self._spans = np.zeros((config.max_steps_compared, 2), np.int64)
        self._num_bags = 0
        self._finished = 0  # steps looked at
        self._choices: dict[int, list[int]] = {}

    def counterparts(self, logical_block: int) -> list[np.ndarray]:
        """Positions of each candidate block, int32 ``[tokens_per_block]`` each."""
        slots = np.arange(self._size, dtype=np.int32)
        return [other * self._size + slots for other in self._choices[logical_block]]

    def is_due(self, num_more: int = 0) -> bool:
        """See ``BlockMatcher.is_due``."""
        return bool(self._ready) or self._history.num_tokens + num_more > self._history.num_segmented

    def _advance(self) -> None:
        self._history.segment()
        starts = self._history.step_starts
        for index in range(self._finished, len(starts) - 1):
            if starts[index] >= self._num_prompt_tokens:
                self._look_at(starts[index], starts[index + 1])
        self._finished = max(self._finished, len(starts) - 1)

    def _look_at(self, start: int, stop: int) -> None:
        """Compares a finished step with earlier ones, then keeps it for later ones."""
        if stop - start < self._config.min_step_tokens:
            return
        ids = self._history.token_ids[start:stop] % _BAG_SIZE
        bag = np.bincount(ids, minlength=_BAG_SIZE).astype(np.float64)
        square = bag @ bag
        known = min(self._num_bags, len(self._bags))
        if known:
            cosines = self._bags[:known] @ bag / np.sqrt(self._squares[:known] * square)
            similar = np.argsort(-cosines, kind="stable")[:_MOST_SIMILAR_STEPS]
            for step in similar[cosines[similar] >= self._config.min_step_cosine].tolist():
                self._pair(self._blocks(start, stop), self._blocks(*self._spans[step].tolist()))
        row = self._num_bags % len(self._bags)
        self._bags[row], self._squares[row], self._spans[row] = bag, square, (start, stop)
        self._num_bags += 1

    def _blocks(self, start: int, stop: int) -> range:
        """Blocks that start inside a step."""
        return range(-(-start // self._size), -(-stop // self._size))

    def _pair(self, newer: range, older: range) -> None:
        destinations, donors = (older, newer) if self._config.direction == "keep-latest" else (newer, older)
        for logical in destinations:
            choices = [b for b in donors if b != logical]
            if choices:
                self._choices.setdefault(logical, []).extend(choices)
                self._settled.discard(logical)
                self._ready.setdefault(logical, None)
