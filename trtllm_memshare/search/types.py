"""Small named types that pass between the cache, the search and the runners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Candidate:
    """A block that could be retired, with the rows that would stand in for its tokens.

    A row is ``block * tokens_per_block + slot``. The epoch and the generations let the cache drop the decision if
    anything moved between the search and ``apply``.
    """

    request_id: int
    epoch: int
    logical: int  # the request's block that gives up its memory
    block: int  # its physical block
    block_generation: int
    donor: int  # physical block its table entries would point at
    retired_rows: np.ndarray  # int32 [tokens_per_block], the rows of `block`
    kept_rows: np.ndarray  # int32 [tokens_per_block], the counterpart of each, resident
    kept_generations: np.ndarray  # int32 [tokens_per_block], generation of the block of each kept row


@dataclass(frozen=True, slots=True)
class Decision:
    """A candidate that stage 2 accepted. ``distance``: relative KV distance of the two, dimensionless."""

    candidate: Candidate
    distance: float


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Inputs of stage 2 (``search.block_distance``), all int32 ``[pairs, tokens_per_block]``, -1 = no row.

    ``undo_rope``: whether K is compared after undoing the rotation between the two rows, or as stored.
    """

    new_rows: np.ndarray
    old_rows: np.ndarray
    position_delta: np.ndarray
    undo_rope: bool = True

    def __len__(self) -> int:
        return len(self.new_rows)


class Matcher(Protocol):
    """Stage 1 for one request: fed every token once, offers blocks whose tokens all have counterparts."""

    @property
    def num_tokens(self) -> int:
        """How many tokens were appended."""

    def append(self, token_ids: np.ndarray) -> None:
        """Takes the request's next tokens, int32 ``[n]``, prompt included."""

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids at ``[start, stop)`` that were appended, int32."""

    def protected_from(self) -> int:
        """Position from which on nothing may be retired: recent tokens and recent whole steps."""

    def is_due(self, num_more: int = 0) -> bool:
        """False if ``ready_blocks`` would look at no token and find nothing, were so many more appended before."""

    def ready_blocks(self) -> list[int]:
        """Logical blocks with a counterpart for every token, oldest first."""

    def counterparts(self, logical_block: int) -> list[np.ndarray]:
        """Choices of counterpart positions for a ready block, each int32 ``[tokens_per_block]``."""

    def settle(self, logical_block: int) -> None:
        """Takes a ready block off the list: shared, refused or already judged."""

    def restore(self, logical_block: int) -> None:
        """Puts a settled block back on the list."""

    def reopen(self) -> None:
        """Offers every matched block again: the request was paused and its blocks are new."""
