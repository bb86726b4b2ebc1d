"""What is known of one of TensorRT-LLM's requests; its tokens are read one by one, not as a copy of all each time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.trtllm.pytorch.page_list import PageList

_BEAM = 0


@dataclass
class KnownRequest:
    """One request that generates.

    ``num_tokens``: tokens taken in so far, prompt included; ``is_frozen``: no more are, since there is no room.
    """

    request_id: int
    num_tokens: int
    pages: PageList = field(default_factory=PageList)
    is_frozen: bool = False

    def read_new_tokens(self, request: Any, manager: KVCacheManager) -> None:
        """Hands tokens sampled since the last call to the manager.

        ``get_token`` reads one without a copy of all; where a request has none, ``get_tokens`` copies its history.
        """
        count = request.max_beam_num_tokens
        if count > self.num_tokens and not self.is_frozen:
            self._append(_tokens_from(request, self.num_tokens, count), manager)

    def append_history(self, token_ids: list[int], manager: KVCacheManager) -> None:
        """The same for tokens at hand."""
        if token_ids and not self.is_frozen:
            self._append(token_ids, manager)

    def _append(self, token_ids: list[int], manager: KVCacheManager) -> None:
        if not manager.append_tokens(self.request_id, token_ids):
            self.is_frozen = True
            return
        self.num_tokens += len(token_ids)
        # Without the overlap scheduler the newest token's K and V are written by the coming forward pass.
        manager.mark_computed(self.request_id, self.num_tokens - 1)


def _tokens_from(request: Any, first: int, count: int) -> list[int]:
    get_token = getattr(request, "get_token", None)
    if get_token is None:
        return list(request.get_tokens(_BEAM)[first:count])
    return [get_token(_BEAM, position) for position in range(first, count)]


def admit(
    request: Any, manager: KVCacheManager, parked: dict[int, int], protects_prompt_only: bool
) -> KnownRequest | None:
    """Takes in a request at its first search after its prompt was computed.

    Args:
      request: TensorRT-LLM's ``LlmRequest``.
      manager: gets the sequence.
      parked: tokens seen of requests that were paused; the request's entry is removed.
      protects_prompt_only: after a pause TensorRT-LLM counts old generated tokens as prompt; True = they may be shared
        again, False = their pages may belong to the reuse tree, so they may not.

    Returns:
      None for a dummy, and where the manager has no room: such a request stays unshared.
    """
    if getattr(request, "is_dummy_request", False):
        return None
    request_id = request.py_request_id
    token_ids = list(request.get_tokens(_BEAM))
    seen = parked.pop(request_id, None)
    if seen is not None and seen > len(token_ids):
        manager.forget_paused(request_id)
        seen = None
    first = len(token_ids) if seen is None else seen
    num_prompt_tokens = request.orig_prompt_len if protects_prompt_only else request.prompt_len
    head = np.array(token_ids[:first], np.int32)
    if not manager.add_sequence(request_id, head, num_prompt_tokens):
        manager.forget_paused(request_id)
        return None
    known = KnownRequest(request_id, first)
    manager.mark_computed(request_id, first - 1)
    known.append_history(token_ids[first:], manager)
    return known
