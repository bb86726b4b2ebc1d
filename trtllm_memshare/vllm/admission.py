"""Whether a waiting request may join: could everybody, brought down to the floor, go on for some tokens more?

vLLM admits what fits now and preempts when it stops fitting. The same question, and the same arithmetic, as our own
executor's admission (``search.floors``, ``serving.floor_admission``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.floors import blocks_at_floors, most_protected, peak_at_floors
from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.relief import Relief
from trtllm_memshare.vllm.settings import Admission


class RepeatCounts:
    """How many pages of each request stand again; looked for anew once it has a page more, or one less."""

    def __init__(self, relief: Relief) -> None:
        self._relief = relief
        self._found: dict[str, tuple[tuple[int, int], int]] = {}

    def of(self, request: Any) -> int:
        """Pages that may go whatever the floor of the request is; 0 for one that computes what it has anew."""
        pages = self._relief.pages(request.request_id)
        if not pages.options.memshare or request.num_computed_tokens < request.num_tokens - 1:
            return 0
        counts = pages.num_full(request.num_computed_tokens), pages.num_retired
        known = self._found.get(request.request_id)
        if known is None or known[0] != counts:
            known = counts, 0  # and no page more of one that cannot be looked at: the others are let in all the same
            with self._relief.faults.caught():
                owned, repeats = self._relief.givable(request)
                known = counts, len(repeats.intersection(owned))
            self._found[request.request_id] = known
        return known[1]

    def forget(self, request_id: str) -> None:
        self._found.pop(request_id, None)


class FloorAdmission:
    """Counts what requests hold when they have given up all that they may.

    Args:
      relief: knows what each of them has given up, and may.
      blocks: the pool, null pages taken.
      config: what is protected, and how many tokens each must be able to write under ``lookahead``.
      admission: see ``VllmOptions``.
    """

    def __init__(self, relief: Relief, blocks: VllmBlocks, config: MemShareConfig, admission: Admission) -> None:
        self._relief, self._blocks, self._config, self._admission = relief, blocks, config, admission
        self._protected = most_protected(config)
        self._repeats = RepeatCounts(relief)
        self._refused: tuple[str, int, int] | None = None  # who was refused last, beside how many, with which hits
        self._asked_again = 0  # times since

    def admits(
        self,
        request: Any,
        running: Sequence[Any],
        hits: Sequence[Sequence[Any]] = (),
        paused: Sequence[Any] = (),
    ) -> bool:
        """Whether the pool holds ``request`` beside those that hold blocks.

        Always where nobody runs: somebody must get on.

        Args:
          request, running: vLLM's requests.
          hits: blocks of every group that ``request`` finds in the prefix cache.
          paused: requests that hold blocks and do not run, as sessions between two of their chunks.
        """
        asked = request.request_id, len(running) + len(paused), sum(map(len, hits))
        refused, self._refused = self._refused, None
        if self._admission == "vllm" or not running:
            return True
        if asked == refused and self._asked_again < self._blocks.block_size:
            # Nobody came since, so the same requests run and are longer: only pages that stand again could let it in.
            self._refused, self._asked_again = refused, self._asked_again + 1
            return False
        if self._fit([request, *running, *paused], hits):
            return True
        self._refused, self._asked_again = asked, 0
        return False

    def forget(self, request_id: str) -> None:
        """A request has ended, or lost its blocks."""
        self._repeats.forget(request_id)

    def _fit(self, requests: Sequence[Any], hits: Sequence[Sequence[Any]]) -> bool:
        """Whether the pool holds what they hold together at most, at their floors, as far ahead as the rule looks."""
        lengths = np.array([r.num_tokens for r in requests])
        # Offline a request may ask for more than the model can write, and ends there.
        longest = self._blocks.longest_request_tokens
        left = np.array([min(longest, r.num_prompt_tokens + r.max_tokens) for r in requests]) - lengths
        left = np.maximum(left, 0)  # a session may have said all that it asked for
        pages = [self._relief.pages(r.request_id) for r in requests]
        floors = (
            np.array([r.num_prompt_tokens for r in requests]),
            np.array([p.options.min_kept if p.options.memshare else 1.0 for p in pages]),
            self._protected,
            self._blocks.block_size,
            np.array([p.num_retired + self._repeats.of(r) for p, r in zip(pages, requests, strict=True)]),
        )
        ahead = lengths + np.minimum(left, self._config.lookahead_tokens)
        # They do not grow for long: the other rule counts them too, although some have ended by its peak.
        in_others = sum(map(self._blocks.others.most_held, ahead.tolist()))
        # Who computes what it has starts some steps later, and ends as many later: it is never counted as gone.
        # Nor is a session, which keeps its blocks when it has answered.
        writes = np.array([r.num_computed_tokens >= r.num_tokens - 1 and not r.resumable for r in requests])
        steps = np.where(writes, left, left.max())

        def held(num_shared: np.ndarray | int) -> int:
            if self._admission == "lookahead":
                return blocks_at_floors(ahead, *floors, num_shared)
            return peak_at_floors(lengths, left, steps, *floors, num_shared)

        room = self._blocks.num_blocks - in_others
        if held(0) <= room:
            return True  # and nobody's prompt is looked at
        last_first = np.argsort(-steps, kind="stable")  # what is shared stays until the last of those who share it ends
        shared = np.zeros_like(lengths)
        prompts = [(requests[i].request_id, requests[i].num_prompt_tokens) for i in last_first]
        shared[last_first] = self._blocks.num_shared(prompts, hits)
        return bool(shared.any()) and held(shared) <= room
