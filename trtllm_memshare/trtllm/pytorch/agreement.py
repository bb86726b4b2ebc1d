"""Tensor-parallel ranks hold different heads of the same blocks: they add their distances and decide alike.

Each rank schedules on its own count of free blocks, so a decision that one rank lacks would break all of them. Ranks
gather what each one measured and add it in rank order: the same bits everywhere, hence the same decisions.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Agreement(Protocol):
    """Makes one of what the ranks have."""

    def all_hold(self, holds: bool) -> bool:
        """True if it holds on every rank; each rank asks."""

    def combine(self, digest: str, sums: np.ndarray | None) -> np.ndarray | None:
        """Sums over all heads, float32 ``[pairs, num_layers, 4]``; None if nothing was compared.

        Raises:
          RuntimeError: ranks have different digests, i.e. look at different candidates.
        """


class OneRank:
    """Nobody to agree with."""

    def all_hold(self, holds: bool) -> bool:
        """See ``Agreement.all_hold``."""
        return holds

    def combine(self, digest: str, sums: np.ndarray | None) -> np.ndarray | None:
        """See ``Agreement.combine``."""
        return sums


class TensorParallelRanks:
    """All ranks of a tensor-parallel group, called in the same iteration by each.

    Args:
      communicator: has ``allgather(object) -> list`` in rank order, such as mpi4py's; used by nobody else.
    """

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    def all_hold(self, holds: bool) -> bool:
        """See ``Agreement.all_hold``."""
        return all(self._communicator.allgather(holds))

    def combine(self, digest: str, sums: np.ndarray | None) -> np.ndarray | None:
        """See ``Agreement.combine``."""
        gathered = self._communicator.allgather((digest, sums))
        digests = [d for d, _ in gathered]
        if len(set(digests)) != 1:
            short = [d[:12] for d in digests]
            raise RuntimeError(f"tensor-parallel ranks must search the same blocks, their digests are {short}")
        if sums is None:
            return None
        total = gathered[0][1].copy()
        for _, other in gathered[1:]:
            total += other
        return total
