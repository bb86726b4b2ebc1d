"""What is known of TensorRT-LLM's requests; their tokens are read one by one, not as a copy of all each time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.trtllm.pytorch.agenda import Agenda
from trtllm_memshare.trtllm.pytorch.guards import disaggregated_kind
from trtllm_memshare.trtllm.pytorch.page_list import PageList
from trtllm_memshare.trtllm.pytorch.wishes import Wishes

log = logging.getLogger("trtllm_memshare")

_BEAM = 0


@dataclass
class KnownRequest:
    """One request that generates.

    Attributes:
      request: TensorRT-LLM's ``LlmRequest``.
      num_tokens: tokens taken in so far, prompt included.
      is_behind: there was no room for its newest tokens, so it is not searched until there is.
    """

    request: Any
    request_id: int
    num_tokens: int
    pages: PageList = field(default_factory=PageList)
    is_behind: bool = False


class ActiveRequests:
    """The requests of an iteration that are past their prompt: most of the time those of the one before."""

    def __init__(self) -> None:
        self._requests: list[Any] = []
        self._by_id: dict[int, Any] = {}

    def by_id(self, requests: Sequence[Any]) -> dict[int, Any]:
        """By id, in their order; the very dictionary of the last call if the requests are the same objects."""
        if requests != self._requests:
            self._requests, self._by_id = list(requests), {r.py_request_id: r for r in requests}
        return self._by_id

    def clear(self) -> None:
        """Lets go of them: one has been freed."""
        self._requests, self._by_id = [], {}


class KnownRequests:
    """The requests of one manager, kept in step with ours.

    Args:
      manager: this project's, gets the sequences.
      tokens_at_once: tokens that gather before a request is read again.
      max_parked: paused requests whose stage-1 state is kept.
      protects_prompt_only: after a pause TensorRT-LLM counts old generated tokens as prompt; True = they may be shared
        again, False = they may not (see ``CacheBackend``).
      complain: told of a request that cannot be served with sharing and runs unshared.
      wishes: what requests ask for themselves.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        tokens_at_once: int,
        max_parked: int,
        protects_prompt_only: bool,
        complain: Callable[[str], None],
        wishes: Wishes,
    ) -> None:
        self.wishes = wishes
        self._manager, self._tokens_at_once, self._max_parked = manager, tokens_at_once, max_parked
        self._protects_prompt_only, self._complain = protects_prompt_only, complain
        self._known: dict[int, KnownRequest] = {}
        self._unshared: set[int] = set()  # dummies, and requests that found no room in our tables
        self._parked: dict[int, int] = {}  # paused requests: tokens that stage 1 has seen
        self._agenda = Agenda()  # when enough tokens may have gathered: a request grows by one an iteration at most
        self._late: set[int] = set()  # requests that were due in an iteration without them
        self._active: Mapping[int, Any] = {}
        self._order: dict[int, int] = {}
        self._has_said_full = False

    def __getitem__(self, request_id: int) -> KnownRequest:
        return self._known[request_id]

    def __iter__(self) -> Iterator[KnownRequest]:
        return iter(self._known.values())

    def get(self, request_id: int) -> KnownRequest | None:
        """None for a request that is not known, or runs unshared."""
        return self._known.get(request_id)

    def take_in(self, active: Mapping[int, Any], step: int) -> None:
        """Reads a new request's whole history, once, and new tokens of the others when enough have gathered.

        Stage 1 looks at a block's worth at a time, so waiting for half a block loses little and costs less than
        reading each token as it comes. Requests began at different times, so no iteration has to look at all of them.

        Args:
          active: TensorRT-LLM's requests of this iteration that are past their prompt, by id; the same object as before
            if they are the same.
          step: number of this iteration.
        """
        looked_at = self._late.union(self._agenda.due(step))
        if active is not self._active:
            self._active, self._order = active, {request_id: place for place, request_id in enumerate(active)}
            looked_at |= active.keys() - self._known.keys() - self._unshared
        here = [request_id for request_id in looked_at if request_id in active]
        self._late = looked_at.difference(here)
        for request_id in sorted(here, key=self._order.__getitem__):
            request, known = active[request_id], self._known.get(request_id)
            if known is None:
                known = self._admit(request)
                if known is None:
                    self._unshared.add(request_id)
                    continue
                self._known[request_id] = known
            count = request.max_beam_num_tokens
            if count - known.num_tokens >= self._tokens_at_once:
                self._append(known, _tokens_from(request, known.num_tokens, count))
            self._agenda.expect(request_id, step + max(1, self._tokens_at_once - (count - known.num_tokens)))

    def forget(self, request: Any) -> None:
        """Lets go of a request whose resources are freed; if it is only paused, stage 1's state is kept."""
        request_id = request.py_request_id
        self._unshared.discard(request_id)
        self._late.discard(request_id)
        self._active = {}
        self._agenda.forget(request_id)
        known, has_ended = (
            self._known.pop(request_id, None),
            getattr(request.state, "name", "") == "GENERATION_COMPLETE",
        )
        if known is None:
            if has_ended and self._parked.pop(request_id, None) is not None:  # cancelled while it was paused
                self._manager.forget_paused(request_id)
            return
        if has_ended:
            record = self._manager.remove_sequence(request_id)
            request.py_memshare_retired_blocks = record.retired_blocks
            request.py_memshare_generated_blocks = record.generated_blocks
            return
        self._manager.pause_sequence(request_id)
        self._parked[request_id] = known.num_tokens
        while len(self._parked) > self._max_parked:
            oldest = next(iter(self._parked))
            self._manager.forget_paused(oldest)
            del self._parked[oldest]

    def _admit(self, request: Any) -> KnownRequest | None:
        """None for a dummy, and where the manager has no room: such a request stays unshared."""
        if getattr(request, "is_dummy_request", False):
            return None
        kind = disaggregated_kind(request)
        if kind is not None:
            self._complain(f"sharing excludes disaggregated serving, got a request of type {kind}")
            return None
        if getattr(request, "py_num_compressed_tokens", 0):
            self._complain("sharing excludes KV cache compression, got a request that was shortened")
            return None
        request_id = request.py_request_id
        token_ids = list(request.get_tokens(_BEAM))
        seen = self._parked.pop(request_id, None)
        if seen is not None and seen > len(token_ids):
            self._manager.forget_paused(request_id)
            seen = None
        prompt = request.orig_prompt_len if self._protects_prompt_only else request.prompt_len
        shares = not self.wishes.keeps_whole(request)
        if not self._manager.add_sequence(request_id, np.array(token_ids, np.int32), prompt, shares=shares):
            self._manager.forget_paused(request_id)
            self._say_full(request_id)
            return None
        known = KnownRequest(request, request_id, len(token_ids))
        self._manager.mark_computed(request_id, len(token_ids) - 1)
        self._manager.match(request_id)
        return known

    def _append(self, known: KnownRequest, token_ids: list[int]) -> None:
        known.is_behind = not self._manager.append_tokens(known.request_id, token_ids)
        if known.is_behind:
            self._say_full(known.request_id)
            return
        known.num_tokens += len(token_ids)
        # Without the overlap scheduler the newest token's K and V are written by the coming forward pass.
        self._manager.mark_computed(known.request_id, known.num_tokens - 1)
        self._manager.match(known.request_id)

    def _say_full(self, request_id: int) -> None:
        if not self._has_said_full:
            self._has_said_full = True
            log.warning(
                "MemShare's tables of %d blocks and %d requests have no room for request %s, so that requests like it "
                "share nothing (suspended ones may fill them: lower max_batch_size; said once)",
                self._manager.pool.num_usable,
                self._max_parked,
                request_id,
            )


def _tokens_from(request: Any, first: int, count: int) -> list[int]:
    """Tokens of a request from ``first`` on; where it has no ``get_token``, ``get_tokens`` copies its history."""
    get_token = getattr(request, "get_token", None)
    if get_token is None:
        return list(request.get_tokens(_BEAM)[first:count])
    return list(map(get_token, repeat(_BEAM), range(first, count)))
