"""Single tokens that go in each layer and KV head on its own: the finest choice there is, as a reference.

No engine with block tables can serve it, since a page holds its tokens for all layers and heads, and one that lost
some of them frees nothing. It says how much is lost by choosing whole pages, at the same memory. The rules are those
of ``retirement.hold_at_floor``, with as many tokens as those pages would have held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.evaluation.retirement import NEVER
from trtllm_memshare.search.pressure import floor_room

_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class HeadRetirements:
    """What became of each token of one text in each layer and KV head.

    Attributes:
      tokens_per_block: tokens of the pages by which it is counted.
      retired_at: int64 ``[layers, kv_heads, tokens]``, position of the first query that does not see the token,
        ``NEVER`` = all do.
    """

    tokens_per_block: int
    retired_at: np.ndarray

    @property
    def first(self) -> int | None:
        """Position of the first query that does not see everything, None = there is none."""
        return int(self.retired_at.min()) if (self.retired_at < NEVER).any() else None

    @property
    def retired_pages(self) -> float:
        """Pages' worth of tokens that went, mean over layers and heads."""
        return float((self.retired_at < NEVER).sum(2).mean() / self.tokens_per_block)

    def memory_share(self, first_generated: int) -> float:
        """See ``Retirements.memory_share``."""
        size, num_pages = self.tokens_per_block, self.retired_at.shape[2] // self.tokens_per_block
        ends = (np.arange(first_generated, num_pages) + 1) * size
        generated = self.retired_at[:, :, first_generated * size : num_pages * size]
        gone = np.array([(generated <= end).sum(2).mean() for end in ends]) / size
        written = np.arange(1, num_pages - first_generated + 1)
        return float((written - gone).sum() / written.sum())


class HeadChoicePass:
    """The full cache's pass, in which each KV head of each layer chooses the tokens that it gives up; a ``LayerPass``.

    Those go that got least attention since they were written, mean over the head's queries of later pages.

    Args:
      num_tokens, num_prompt_tokens: of the text.
      tokens_per_block: how often tokens are given up, and how many a floor is counted in.
      min_kept: share of the generated tokens that stays.
      protected_tokens: most recent tokens that never go.
    """

    def __init__(
        self, num_tokens: int, num_prompt_tokens: int, tokens_per_block: int, min_kept: float, protected_tokens: int
    ) -> None:
        self._num_tokens, self._size = num_tokens, tokens_per_block
        self._first = -(-num_prompt_tokens // tokens_per_block)
        self._min_kept, self._protected_tokens = min_kept, protected_tokens
        self._retired_at: list[np.ndarray] = []

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``LayerPass``."""
        size, (kv_heads, num_tokens, head_dim) = self._size, key.shape
        whole = num_tokens // size * size
        received = torch.zeros(kv_heads, whole // size, whole, device=query.device)
        output = torch.empty_like(query)
        step = _CHUNK_TOKENS // size * size
        for start in range(0, num_tokens, step):
            stop = min(start + step, num_tokens)
            rows = query[:, start:stop].reshape(kv_heads, -1, head_dim)
            logits = (rows @ key[:, :stop].transpose(1, 2)).view(kv_heads, -1, stop - start, stop)
            hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
            logits[..., start:].masked_fill_(hidden, float("-inf"))
            weights = logits.softmax(-1)
            attended = weights.view(kv_heads, -1, stop) @ value[:, :stop]
            output[:, start:stop] = attended.view(-1, stop - start, head_dim)
            last = min(stop, whole)
            if last > start:
                by_query = weights[:, :, : last - start, :last].mean(1)
                received[:, start // size : last // size, :last] = by_query.unflatten(1, (-1, size)).mean(2)
        self._retired_at.append(self._choose(received.cpu().numpy()))
        return output

    def retirements(self) -> HeadRetirements:
        """What went, once every layer has attended."""
        return HeadRetirements(self._size, np.stack(self._retired_at))

    def _choose(self, received: np.ndarray) -> np.ndarray:
        """Tokens that one layer's heads give up.

        Args:
          received: float32 ``[kv_heads, pages, tokens]``, attention from a query of the page to the token, mean.

        Returns:
          int64 ``[kv_heads, num_tokens]``, see ``HeadRetirements``.
        """
        kv_heads, num_pages, _ = received.shape
        size, first = self._size, self._first
        retired_at = np.full((kv_heads, self._num_tokens), NEVER, np.int64)
        page_of = np.arange(num_pages * size) // size
        since = np.zeros((kv_heads, num_pages * size))  # attention from later pages, summed
        num_retired = 0  # pages' worth, the same for all heads
        for page in range(num_pages):
            since += received[:, page] * (page_of < page)
            computed = (page + 1) * size
            old = max(0, computed - self._protected_tokens) // size * size
            generated = page + 1 - first
            room = floor_room(generated, num_retired, self._min_kept) if generated > 0 else 0
            room = min(room, old // size - first - num_retired)
            if room <= 0:
                continue
            may_go = slice(first * size, old)
            mean = since[:, may_go] / np.maximum(1, page - page_of[may_go])
            mean[retired_at[:, may_go] < NEVER] = np.inf
            going = np.argsort(mean, axis=1, kind="stable")[:, : room * size] + first * size
            np.put_along_axis(retired_at, going, computed, 1)
            num_retired += room
        return retired_at
