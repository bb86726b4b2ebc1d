"""What both stage-1 matchers share: the token buffer, step starts, protection, and the list of ready blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens


class TokenHistory:
    """Token ids of one request, kept once, with the starts of its steps.

    Attributes:
      token_ids: int32 ``[>= num_tokens]``, a growing buffer.
      step_starts: positions at which steps start, ascending, up to ``num_segmented``.
    """

    def __init__(self, boundaries: BoundaryTokens) -> None:
        self._boundaries = boundaries
        self.token_ids = np.zeros(1024, np.int32)
        self.num_tokens = 0
        self.step_starts: list[int] = [0]
        self.num_segmented = 0

    def append(self, token_ids: np.ndarray) -> None:
        end = self.num_tokens + len(token_ids)
        if end > len(self.token_ids):
            self.token_ids = np.resize(self.token_ids, 2 * end)
        self.token_ids[self.num_tokens : end] = token_ids
        self.num_tokens = end

    def segment(self, end: int | None = None) -> None:
        """Brings ``step_starts`` up to position ``end``; None = that of the last token."""
        end = self.num_tokens if end is None else end
        if self.num_segmented < end:
            found = self._boundaries.step_starts(self.token_ids[:end], self.num_segmented)
            self.step_starts.extend(found.tolist())
            self.num_segmented = end


class BlockMatcher(ABC):
    """Base of the stage-1 matchers of one request: the list of ready blocks and the protection of recent text.

    Subclasses fill ``_ready`` in ``_advance``, which sees new tokens once.
    """

    def __init__(
        self, config: MemShareConfig, tokens_per_block: int, num_prompt_tokens: int, boundaries: BoundaryTokens
    ) -> None:
        self._config = config
        self._size = tokens_per_block
        self._num_prompt_tokens = num_prompt_tokens
        self._history = TokenHistory(boundaries)
        self._ready: dict[int, None] = {}  # logical blocks in order of arrival
        self._settled: set[int] = set()

    @property
    def num_tokens(self) -> int:
        """How many tokens were appended."""
        return self._history.num_tokens

    def append(self, token_ids: np.ndarray) -> None:
        """Takes the request's next tokens, int32 ``[n]``, prompt included. Matching waits for ``ready_blocks``."""
        self._history.append(token_ids)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids at ``[start, stop)`` that were appended, int32; a view."""
        return self._history.token_ids[start:stop]

    def is_due(self, num_more: int = 0) -> bool:
        """False if ``ready_blocks`` would look at no token and find nothing, were so many more appended before.

        A matcher that cannot tell is asked each time.
        """
        return True

    def ready_blocks(self) -> list[int]:
        """Logical blocks with a counterpart for every token; looks at the tokens since the last call first."""
        self._advance()
        return list(self._ready)

    def protected_from(self) -> int:
        """First protected position: the start of the last whole ``protected_steps`` steps or tokens.

        Steps protect ``max_protected_tokens`` at most: text in which none ends, such as one word for ever, is where
        memory has to stay flat. They are known up to the last ``_advance``: one that started since then protects a
        little more, never less.
        """
        starts, back = self._history.step_starts, self._config.protected_steps
        by_steps = self._history.num_tokens if back == 0 else starts[-back - 1] if len(starts) > back else 0
        by_steps = max(by_steps, self._history.num_tokens - self._config.max_protected_tokens)
        return min(by_steps, self._history.num_tokens - self._config.protected_tokens)

    def settle(self, logical_block: int) -> None:
        """Takes a ready block off the list."""
        if self._ready.pop(logical_block, 0) is None:
            self._settled.add(logical_block)

    def restore(self, logical_block: int) -> None:
        """Puts a settled block back on the list."""
        if logical_block in self._settled:
            self._settled.remove(logical_block)
            self._ready[logical_block] = None

    def reopen(self) -> None:
        """Offers every settled block again, in order: after a pause all of them are new and unshared."""
        self._ready = dict.fromkeys(sorted(self._settled | set(self._ready)))
        self._settled.clear()

    @abstractmethod
    def _advance(self) -> None:
        """Looks at the tokens since the last call and fills ``_ready``."""
