"""Pairs of blocks of a written text, offered when the cache manager would offer them, and never remapped.

The manager itself decides when: once the donor is full, the block is past its protections and a search is due. What
differs between the kinds is stage 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.studies.distances.harm import Remap
from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.matching import BlockMatcher
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, Matcher

MAX_DIFFERING_TOKENS = 4
"""Of a block that still counts as a near-duplicate."""

_RANDOM_PER_SEARCH = 0.25


@dataclass(frozen=True)
class BlockPair:
    """A candidate as the manager offered it. Physical blocks are the logical ones: nothing was ever remapped.

    ``differing_tokens``: tokens of the block whose counterparts are other tokens.
    """

    candidate: Candidate
    remap: Remap
    differing_tokens: int


class NearMatcher(BlockMatcher):
    """Offers older blocks that a newer window of text repeats at any shift but for a few tokens."""

    def __init__(
        self, config: MemShareConfig, tokens_per_block: int, num_prompt_tokens: int, boundaries: BoundaryTokens
    ) -> None:
        super().__init__(config, tokens_per_block, num_prompt_tokens, boundaries)
        self._first = -(-num_prompt_tokens // tokens_per_block)
        self._seen = 0
        self._choices: dict[int, tuple[int, int]] = {}  # differing tokens, start of the window

    def counterparts(self, logical_block: int) -> list[np.ndarray]:
        """The window with the fewest differing tokens since the block was last offered."""
        start = self._choices[logical_block][1]
        return [np.arange(start, start + self._size, dtype=np.int32)]

    def _advance(self) -> None:
        self._history.segment()
        size, end = self._size, self._history.num_tokens
        tokens, seen = self._history.token_ids[:end], self._seen
        self._seen = end
        first_start = max(0, seen - size + 1)
        if end - first_start < size:
            return
        windows = np.lib.stride_tricks.sliding_window_view(tokens[first_start:], size)
        blocks = tokens[: end // size * size].reshape(-1, size)
        differing = (windows[:, None] != blocks[None]).sum(-1)
        for window, block in np.argwhere((differing >= 1) & (differing <= MAX_DIFFERING_TOKENS)).tolist():
            start, count = first_start + window, int(differing[window, block])
            if block < self._first or start < (block + 1) * size:
                continue
            if block not in self._ready or count <= self._choices[block][0]:
                self._choices[block] = (count, start)
            self._settled.discard(block)
            self._ready.setdefault(block, None)


class RandomMatcher(BlockMatcher):
    """Offers a random unprotected block now and then, with a random full block in its place."""

    def __init__(
        self, config: MemShareConfig, tokens_per_block: int, num_prompt_tokens: int, boundaries: BoundaryTokens
    ) -> None:
        super().__init__(config, tokens_per_block, num_prompt_tokens, boundaries)
        self._first = -(-num_prompt_tokens // tokens_per_block)
        self._rng = np.random.default_rng(config.control_seed)

    def counterparts(self, logical_block: int) -> list[np.ndarray]:
        """Positions of another block, drawn anew at each call."""
        others = np.arange((self._history.num_tokens - 1) // self._size)
        donor = self._rng.choice(others[others != logical_block])
        return [np.arange(self._size, dtype=np.int32) + np.int32(donor * self._size)]

    def _advance(self) -> None:
        self._history.segment()
        last = max(0, self.protected_from()) // self._size
        if last > self._first and self._rng.random() < _RANDOM_PER_SEARCH:
            block = int(self._rng.integers(self._first, last))
            self._settled.discard(block)
            self._ready.setdefault(block, None)


KINDS: dict[str, tuple[MemShareConfig, type[NearMatcher | RandomMatcher] | None]] = {
    "repeat": (make_config("aligned"), None),
    "near": (make_config("aligned"), NearMatcher),
    "similar": (make_config("aligned", matcher="steps"), None),
    "random": (make_config("aligned"), RandomMatcher),
    "repeat-earliest": (make_config("aligned", direction="keep-earliest"), None),
    "similar-earliest": (make_config("aligned", direction="keep-earliest", matcher="steps"), None),
}
"""Settings and, where it is none of the package's, the matcher of each kind of pairs.

Equal text at any shift, text that differs in a few tokens, other text in a similar step, chance; and two of them with
the older copy kept.
"""


def pairs_of_kind(
    kind: str, prompt: list[int], output: list[int], size: int, boundaries: BoundaryTokens, seed: int = 0
) -> list[BlockPair]:
    """Every pair of a kind that a text offers, each once.

    Args:
      kind: key of ``KINDS``; ``similar`` leaves out blocks of equal text, which are repeats.
      prompt, output: token ids.
      size: tokens per block.
      seed: of ``random``; to be another one for each text.
    """
    config, matcher = KINDS[kind]
    config = config.model_copy(update={"control_seed": seed})
    tokens, seen, pairs = np.array(prompt + output, np.int32), set[tuple[int, int]](), list[BlockPair]()
    for num_computed, candidate in offers(config, prompt, output, size, boundaries, matcher):
        differing = int((tokens[candidate.retired_rows] != tokens[candidate.kept_rows]).sum())
        blocks = (candidate.block, candidate.donor)
        if blocks in seen or (kind.startswith("similar") and differing == 0):
            continue
        seen.add(blocks)
        # The search at num_computed runs beside the step that computes that position; the next one reads the remap.
        pairs.append(BlockPair(candidate, Remap(*blocks, num_computed + 1), differing))
    return [pair for pair in pairs if pair.remap.reads_from < len(tokens) - 1]


def offers(
    config: MemShareConfig,
    prompt: list[int],
    output: list[int],
    size: int,
    boundaries: BoundaryTokens,
    matcher: type[NearMatcher | RandomMatcher] | None = None,
) -> Iterator[tuple[int, Candidate]]:
    """What the executor's searches find in a request that generates ``output``, if nothing is ever remapped.

    The executor searches every ``search_interval`` steps: at step s of a lone request, prompt at step 0, ``len(prompt)
    + s - 1`` tokens are computed and one more is known.

    Args:
      matcher: in place of the stage 1 that ``config`` names.

    Yields:
      tokens computed so far, and a candidate.
    """
    num_blocks = (len(prompt) + len(output)) // size + 1
    factory: Callable[[int], Matcher] = make_matcher_factory(config, size, boundaries)
    if matcher is not None:
        factory = partial(matcher, config, size, boundaries=boundaries)
    manager = KVCacheManager(num_blocks, 1, size, num_blocks, 1, config, factory)
    manager.add_sequence(0, np.array(prompt, np.int32))
    known = 0
    for step in range(config.search_interval, len(output), config.search_interval):
        manager.append_tokens(0, output[known:step])
        known, num_computed = step, len(prompt) + step - 1
        manager.mark_computed(0, num_computed)
        for candidate in manager.candidates():
            yield num_computed, candidate
