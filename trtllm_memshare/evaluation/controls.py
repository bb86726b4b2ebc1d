"""Controls that stand beside sharing in every table. Experiments only; nobody should serve with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.evaluation.eviction import BlockEviction
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Decision
from trtllm_memshare.serving.sharing import Control


def make_control(manager: KVCacheManager, config: MemShareConfig, runner: Runner | None) -> Control | None:
    """The control that the settings name, None for ``none``.

    Raises:
      UserError: the runner does not report what the control scores by.
    """
    if config.control == "random":
        return RandomDonors(manager, config.control_seed)
    if config.control == "streaming":
        return Window(manager, config)
    return BlockEviction(manager, config, runner) if config.control in ("snapkv", "rkv") else None


class RandomDonors:
    """Control ``random``: nearly the same blocks are retired, for donors drawn from the request's own blocks.

    Distances of unrelated blocks would stop nearly all of it, so none counts: blocks go that a chain's drift keeps
    under sharing. And some stay, since a donor that was drawn may stand for too many already, or have just gone.
    """

    evicts = observes_attention = False

    def __init__(self, manager: KVCacheManager, seed: int) -> None:
        self._manager = manager
        self._rng = np.random.default_rng(seed)

    def replace(self, decisions: list[Decision]) -> list[Decision]:
        """The decisions with random donors; one without any possible donor is left out."""
        pool, replaced = self._manager.pool, []
        slots = np.arange(pool.tokens_per_block, dtype=np.int32)
        for decision in decisions:
            candidate = decision.candidate
            choices = self._manager.resident_full_blocks(candidate.request_id)
            choices = choices[choices != candidate.block]
            if not len(choices):
                continue
            donor = int(self._rng.choice(choices))
            generations = np.full(pool.tokens_per_block, pool.generation[donor], np.int32)
            changed = replace(
                candidate, donor=donor, kept_rows=donor * pool.tokens_per_block + slots, kept_generations=generations
            )
            replaced.append(Decision(changed, 0.0))
        return replaced

    def evict(self) -> None:
        """Nothing: see ``replace``."""

    def observe(self, attention: np.ndarray) -> None:
        """Nothing: donors are drawn."""


class Window:
    """Control ``streaming`` (StreamingLLM, arXiv 2309.17453): the prompt, a few first tokens and a recent window stay.

    Positions are not renumbered: a token keeps the rotation it was written with, as in every other variant.
    """

    evicts, observes_attention = True, False

    def __init__(self, manager: KVCacheManager, config: MemShareConfig) -> None:
        self._manager, self._config = manager, config

    def evict(self) -> None:
        """Drops what the window of each request has left behind."""
        manager, config, size = self._manager, self._config, self._manager.tokens_per_block
        for request_id, first, num_computed in manager.generating_sequences():
            start = first + -(-config.streaming_sink_tokens // size)
            stop = max(start, (num_computed - config.streaming_window_tokens) // size)
            manager.evict_blocks(request_id, np.arange(start, stop))

    def observe(self, attention: np.ndarray) -> None:
        """Nothing: a window looks at places alone."""

    def replace(self, decisions: list[Decision]) -> list[Decision]:
        """The decisions as they are: there are none."""
        return decisions
