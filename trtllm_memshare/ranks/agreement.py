"""Agreement between ranks: one decides, all apply the same, and a rank that differs stops all of them.

Each rank runs the same scheduler and cache over its own layers and heads. Distances of a search are sums over heads,
so they are added over tensor-parallel ranks; layers of pipeline ranks are put one after the other. With 2 pipeline
stages of 2 tensor-parallel ranks each, 4 layers and 4 heads::

    rank 0: layers 0-1, heads 0-1    rank 1: layers 0-1, heads 2-3    ->  layers 0-1 = rank 0 + rank 1
    rank 2: layers 2-3, heads 0-1    rank 3: layers 2-3, heads 2-3    ->  layers 2-3 = rank 2 + rank 3
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trtllm_memshare.search.types import Candidate, Decision


class Communicator(Protocol):
    """Connects the processes of one engine. Each call waits for the others, and has a limit: ``RankLostError``."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """Values of all ranks in rank order, on rank 0; None elsewhere. Every rank calls it."""

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """The value of ``root`` on every rank; the others' is ignored. Every rank calls it."""


class RankLostError(RuntimeError):
    """Another rank has ended, or does not answer in time; this one cannot go on without it."""


class RankDisagreementError(RuntimeError):
    """Ranks hold different tables or candidates; nothing was applied, and every rank stops."""


@dataclass(frozen=True)
class _Report:
    """What a rank knows before a decision. ``state``: digest of its block tables and of what it wants to compare."""

    sequence: int
    state: bytes
    sums: np.ndarray | None


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 says. ``chosen``: (index of a candidate, distance); ``error``: why nothing was decided."""

    sequence: int
    digest: bytes
    chosen: list[tuple[int, float]]
    error: str | None = None


class RankAgreement:
    """One gather and one broadcast for each search, with a sequence number and digests that every rank checks.

    Args:
      communicator: of all ranks.
      tp_size: tensor-parallel ranks; rank = pp_rank * tp_size + tp_rank.
    """

    def __init__(self, communicator: Communicator, tp_size: int) -> None:
        self._communicator, self._tp_size = communicator, tp_size
        self._sequence = 0

    @property
    def rank(self) -> int:
        return self._communicator.rank

    def exchange(self, value: Any) -> list[Any]:
        """Values of all ranks in rank order, on every rank; each rank calls it."""
        return list(self._communicator.broadcast(self._communicator.gather(value)))

    def all_hold(self, holds: bool) -> bool:
        """True if it holds on every rank; each rank asks."""
        answers = self._communicator.gather(holds)
        return bool(self._communicator.broadcast(answers is not None and all(answers)))

    def same_choice(self, choice: list[tuple[int, np.ndarray]], state: bytes) -> list[tuple[int, np.ndarray]]:
        """Rank 0's choice of pages to give up, on every rank; each rank asks at the same points of its schedule.

        Each rank ranks pages by its own layers and heads; the rooms that bound the choice are the same everywhere.

        Args:
          choice: this rank's.
          state: digest of this rank's block tables.

        Raises:
          RankDisagreementError: on every rank, naming the ranks that differ from rank 0.
        """
        self._sequence += 1
        reports = self._communicator.gather(_Report(self._sequence, state, None))
        answer = None if reports is None else (_difference(reports), choice)
        error, chosen = self._communicator.broadcast(answer)
        if error is not None:
            raise RankDisagreementError(error)
        return list(chosen)

    def decide(
        self,
        candidates: Sequence[Candidate],
        sums: np.ndarray | None,
        state: bytes,
        decide: Callable[[list[Candidate], np.ndarray | None], list[Decision]],
    ) -> list[Decision]:
        """The same decisions on every rank, over this rank's own candidates.

        Args:
          candidates: this rank's; all ranks must have found the same ones, in the same order.
          sums: this rank's distances, float32 ``[len(candidates), its layers, 4]``, or None if nothing was compared.
          state: digest of this rank's block tables.
          decide: the policy, called on rank 0 with the sums over all ranks.

        Raises:
          RankDisagreementError: on every rank, naming the ranks that differ from rank 0.
        """
        self._sequence += 1
        mine = _digest(state, *(_candidate_bytes(c) for c in candidates))
        reports = self._communicator.gather(_Report(self._sequence, mine, sums))
        verdict = None
        if reports is not None:
            verdict = self._judge(list(candidates), reports, decide)
        verdict = self._communicator.broadcast(verdict)
        if verdict.error is not None:
            raise RankDisagreementError(verdict.error)
        if (verdict.sequence, verdict.digest) != (self._sequence, _sign(self._sequence, mine, verdict.chosen)):
            raise RankDisagreementError(
                f"rank {self._communicator.rank} got decision {verdict.sequence} with another digest than that of its "
                f"own decision {self._sequence} (restart all ranks)"
            )
        return [Decision(candidates[index], distance) for index, distance in verdict.chosen]

    def _judge(
        self,
        candidates: list[Candidate],
        reports: list[_Report],
        decide: Callable[[list[Candidate], np.ndarray | None], list[Decision]],
    ) -> _Verdict:
        first = reports[0]
        if (difference := _difference(reports)) is not None:
            return _Verdict(first.sequence, b"", [], difference)
        places = {id(c): index for index, c in enumerate(candidates)}
        try:
            sums = None if first.sums is None else combine_distances([r.sums for r in reports], self._tp_size)
            decisions = decide(candidates, sums) if candidates else []
            chosen = [(places[id(d.candidate)], float(d.distance)) for d in decisions]
        except Exception as error:  # the others wait for an answer, whatever happened here
            return _Verdict(first.sequence, b"", [], f"rank 0 could not decide: {type(error).__name__}: {error}")
        return _Verdict(first.sequence, _sign(first.sequence, first.state, chosen), chosen)


def _difference(reports: Sequence[_Report]) -> str | None:
    """What ranks differ in from rank 0, in one sentence, or None."""
    for what, values in (
        ("decision numbers", [r.sequence for r in reports]),
        ("block tables or candidates", [r.state.hex()[:12] for r in reports]),
    ):
        differing = [rank for rank, value in enumerate(values) if value != values[0]]
        if differing:
            return (
                f"the {what} of ranks {differing} differ from those of rank 0 at decision {reports[0].sequence}: got "
                f"{values} (restart all ranks; requests must reach each of them in the same order)"
            )
    return None


def combine_distances(parts: Sequence[np.ndarray | None], tp_size: int) -> np.ndarray:
    """Distances over all heads and layers, added in rank order so that the same parts give the same bits.

    Args:
      parts: float32 ``[pairs, layers of the rank, 4]`` in rank order.
      tp_size: tensor-parallel ranks.

    Raises:
      ValueError: ranks that are no whole number of stages, or a rank without distances.
    """
    present = [part for part in parts if part is not None]
    if len(parts) % tp_size or len(present) < len(parts):
        missing = [rank for rank, part in enumerate(parts) if part is None]
        raise ValueError(f"{len(parts)} ranks in stages of {tp_size}, without distances: {missing}")
    stages = []
    for start in range(0, len(present), tp_size):
        total = present[start].astype(np.float32, copy=True)
        for part in present[start + 1 : start + tp_size]:
            total += part
        stages.append(total)
    return np.concatenate(stages, axis=1)


def _candidate_bytes(candidate: Candidate) -> bytes:
    c = candidate
    numbers = (c.request_id, c.epoch, c.logical, c.block, c.block_generation, c.donor)
    arrays = (candidate.retired_rows, candidate.kept_rows, candidate.kept_generations)
    return np.array(numbers, np.int64).tobytes() + b"".join(a.astype(np.int32).tobytes() for a in arrays)


def _sign(sequence: int, state: bytes, chosen: list[tuple[int, float]]) -> bytes:
    return _digest(state, repr((sequence, chosen)).encode())


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()
