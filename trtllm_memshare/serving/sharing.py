"""Sharing's turn in the executor loop: search every few steps, apply what was decided before the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.policy import SharingPolicy, make_pairs
from trtllm_memshare.search.types import Candidate, Decision, PairBatch


class Control(Protocol):
    """What an experiment puts in the place of sharing; those that there are stand in ``evaluation.controls``.

    Attributes:
      evicts: ``evict`` changes block tables in place of a search, so it must come before the step's batch is made.
      observes_attention: whether steps are to report the attention that blocks receive.
    """

    evicts: bool
    observes_attention: bool

    def evict(self) -> None:
        """Takes blocks from requests, with nothing in their place."""

    def observe(self, attention: np.ndarray) -> None:
        """Takes one step's attention per block, float32 ``[num_blocks]``."""

    def replace(self, decisions: list[Decision]) -> list[Decision]:
        """The decisions that are applied in place of stage 2's."""


MakeControl = Callable[[KVCacheManager, MemShareConfig, Runner], Control | None]
"""Makes the control that the settings name, None for ``none``."""


class Sharing:
    """Carries candidates to the runner and decisions to the manager, one step later.

    Args:
      manager: the cache.
      config: MemShare's settings.
      agreement: of several ranks, each of which runs its own copy of this; None = there is one rank.
      control: of an experiment, None when serving.

    Attributes:
      seconds: host and device time spent on all of it so far.
      observes_attention: whether steps are to report the attention that blocks receive.
      evicts: whether ``search`` changes block tables, so that it must come before the step's batch is made.

    Raises:
      UserError: the settings name a control and there is none.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        config: MemShareConfig,
        agreement: RankAgreement | None = None,
        control: Control | None = None,
    ) -> None:
        if config.control != "none" and control is None:
            raise UserError(
                f"control {config.control} is an experiment's, got it in settings to serve with (set control to none)"
            )
        self._agreement = agreement
        self._undecided = False
        self._manager = manager
        self._config = config
        self.policy = SharingPolicy(config)
        self._control = control
        self.observes_attention = control is not None and control.observes_attention
        self.evicts = control is not None and control.evicts
        self._candidates: list[Candidate] = []
        self._decisions: list[Decision] = []
        self.seconds = 0.0

    def search(self, step: int) -> PairBatch | None:
        """Pairs to compare in this step, or None. Candidates that need no comparison are decided at once."""
        if step % self._config.search_interval or not self._config.searches:
            return None
        pool = self._manager.pool
        if pool.num_used < self._config.min_pool_use * pool.num_blocks:
            return None  # stage 1 catches up with the tokens when it is asked again
        started = time.perf_counter()
        pairs = None
        if self._control is not None and self._control.evicts:
            self._control.evict()
        else:
            self._candidates = self._manager.candidates()
            # Ranks meet at every search, so that one that found nothing where others did is noticed.
            self._undecided = bool(self._candidates) or self._agreement is not None
            if self._config.accept_all:
                self._decide(None)
            elif self._candidates:
                pairs = make_pairs(
                    self._candidates, pool.origin_position, pool.tokens_per_block, self._config.undo_rope
                )
        self.seconds += time.perf_counter() - started
        return pairs

    def take_attention(self, attention: np.ndarray | None) -> None:
        """Hands a step's attention per block to the control that scores by it."""
        if self._control is not None and attention is not None:
            self._control.observe(attention)

    def take_distances(self, distances: Distances | None) -> None:
        """Decides on the pairs of this step."""
        if not self._undecided:
            return
        sums, seconds = (None, 0.0) if distances is None else distances.read()
        started = time.perf_counter()
        self._decide(sums)
        self.seconds += seconds + time.perf_counter() - started

    def _decide(self, sums: np.ndarray | None) -> None:
        candidates, self._candidates, self._undecided = self._candidates, [], False
        if self._agreement is not None:
            state = self._manager.state_digest()
            self._decisions = self._agreement.decide(candidates, sums, state, self.policy.decide)
        elif candidates:
            self._decisions = self.policy.decide(candidates, sums)

    def apply(self) -> None:
        """Applies the decisions of the last search; in shadow mode they are only counted."""
        if not self._decisions:
            return
        started = time.perf_counter()
        decisions, self._decisions = self._decisions, []
        if self._control is not None:
            decisions = self._control.replace(decisions)
        if self._config.shares:
            self._manager.apply(decisions)
        else:
            self._manager.count_shadow(decisions)
        self.seconds += time.perf_counter() - started
