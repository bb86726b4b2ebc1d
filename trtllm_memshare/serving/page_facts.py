"""Collects what the chosen need reads of each page: surprisal, attention, redundancy, age, or a draw.

Only what the formula names is collected. What has to be read from the pool is worked out when pressure asks for it, so
that a pool with room costs nothing; surprisal and attention have to be taken while tokens are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from trtllm_memshare.cache.stand_ins import NO_DONORS
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.need import NEEDS, Need, PageFacts
from trtllm_memshare.serving.page_surprisal import PageSurprisal
from trtllm_memshare.serving.request import RequestState

_MEASURED = ("position", "draw", "surprisal", "attention", "redundancy", "distance")


class PageSource(Protocol):
    """Works out one fact of pages from the pool. ``fact``: its name in ``PageFacts``."""

    fact: str

    def catch_up(self, request_ids: list[int]) -> None:
        """Looks at the pages of requests that were filled since the last call, while all of them are resident."""

    def measure(self, request_id: int, pages: np.ndarray, limit: int) -> np.ndarray:
        """The fact of pages that were looked at, float32 ``[len(pages)]``; at most ``limit`` of them go now."""

    def donors(self, request_id: int) -> Mapping[int, int]:
        """Pages that could be read in place of those last measured, by page, in the order in which these go."""

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """Pages that were looked at have gone: nothing rests on them any more."""

    def forget(self, request_id: int) -> None:
        """Drops what is known of a request that ended."""


class PageLedger:
    """Facts about the pages of the requests in flight.

    Args:
      need: the formula that will be asked for.
      tokens_per_block: tokens of a page.
      num_blocks: of the pool.
      seed: of the draws.
      source: of what is read from the pool; None if the formula reads nothing of that.

    Raises:
      UserError: the formula reads a fact that serving does not measure.
    """

    def __init__(
        self, need: Need, tokens_per_block: int, num_blocks: int, seed: int, source: PageSource | None
    ) -> None:
        unknown = [fact for fact in need.facts if fact not in _MEASURED]
        if unknown:
            served = [name for name, other in NEEDS.items() if set(other.facts) <= set(_MEASURED)]
            raise UserError(
                f"serving does not measure {', '.join(unknown)} of a page, which this need reads (take "
                f"{', '.join(served)})"
            )
        self._facts, self._seed = need.facts, seed
        self._source = source
        self.observes_attention = "attention" in need.facts
        self.observes_tokens = "surprisal" in need.facts
        self._surprisal = PageSurprisal(tokens_per_block)
        self._attention = np.zeros(num_blocks, np.float64)
        self._queries = np.zeros(num_blocks, np.int64)
        self._generation = np.zeros(num_blocks, np.int32)

    def observe_tokens(self, states: list[RequestState], log_probs: Callable[[], torch.Tensor]) -> None:
        """Takes the tokens that were just chosen, see ``PageSurprisal.note``; an error that loses them is noted."""
        try:
            found = log_probs()
        except Exception:
            self._surprisal.lose(states)
            raise
        self._surprisal.note(states, found)

    def observe_attention(self, attention: np.ndarray | None, generations: np.ndarray, in_use: np.ndarray) -> None:
        """Takes one step's attention.

        Args:
          attention: float32 ``[num_blocks]``, see ``StepOutput``; None = nothing was observed.
          generations: int32 ``[num_blocks]``, the pool's: a block that was freed since starts anew.
          in_use: bool ``[num_blocks]``: a block that lies free is asked nothing.
        """
        if attention is None or not self.observes_attention:
            return
        anew = generations != self._generation
        self._attention[anew], self._queries[anew] = 0.0, 0
        self._generation[anew] = generations[anew]
        self._attention += np.where(in_use, attention, 0.0)  # a block that came free in this step: its last owner's
        self._queries += in_use

    def catch_up(self, request_ids: list[int]) -> None:
        """Brings what is worked out on demand up to date; all requests at once cost less than one by one."""
        self._surprisal.catch_up()
        if self._source is not None:
            self._source.catch_up(request_ids)

    def facts(self, request_id: int, pages: np.ndarray, blocks: np.ndarray, limit: int) -> PageFacts:
        """What is known of pages of one request.

        Args:
          pages: int32 ``[n]``, logical pages, as of the last ``catch_up``.
          blocks: int32 ``[n]``, their physical blocks.
          limit: most of them that go now.
        """
        read = self._facts
        surprisal = self._surprisal.of(request_id, pages) if "surprisal" in read else None
        attention = draw = None
        if "attention" in read:
            attention = (self._attention[blocks] / np.maximum(self._queries[blocks], 1)).astype(np.float32)
        if "draw" in read:
            draws = np.random.default_rng([self._seed, request_id]).random(int(pages.max(initial=0)) + 1, np.float32)
            draw = draws[pages]
        source = self._source
        measured = {} if source is None else {source.fact: source.measure(request_id, pages, limit)}
        return PageFacts(pages, attention=attention, surprisal=surprisal, draw=draw, **measured)

    def donors(self, request_id: int) -> Mapping[int, int]:
        """Pages that could be read in place of those last asked about, by page, in the order in which these go."""
        return NO_DONORS if self._source is None else self._source.donors(request_id)

    def retired(self, request_id: int, pages: np.ndarray) -> None:
        """Pages of a request have gone, int32 ``[n]``."""
        if self._source is not None:
            self._source.retired(request_id, pages)

    def forget(self, request_id: int) -> None:
        """Drops what is known of a request that ended."""
        self._surprisal.forget(request_id)
        if self._source is not None:
            self._source.forget(request_id)
