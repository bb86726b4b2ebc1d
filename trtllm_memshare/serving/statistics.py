"""What the executor counts while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

MAX_TIMELINE = 65_536


@dataclass
class ExecutorStats:
    """Totals over all steps. Times in seconds; ``block_seconds`` is blocks in use integrated over time,
    ``block_steps`` the same counted in steps, which does not depend on the speed of the machine;
    ``request_seconds`` and ``request_steps`` are requests in flight, summed in the same ways.

    Attributes:
      num_failed: requests that ended with an error; ``num_finished`` counts them too.
      timeline: (time since the first step, blocks in use, requests in flight) of every step at first, of every second,
        fourth, ... one once there are many: a server that runs for weeks holds at most ``MAX_TIMELINE`` of them.
    """

    num_steps: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_pauses: int = 0
    num_recomputed_tokens: int = 0
    busy_seconds: float = 0.0
    search_seconds: float = 0.0
    block_seconds: float = 0.0
    block_steps: int = 0
    request_seconds: float = 0.0
    request_steps: int = 0
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    _first_step_at: float | None = None
    _stride: int = 1

    def record_step(
        self, started: float, ended: float, used_blocks: int, requests_in_flight: int, search_seconds: float
    ) -> None:
        """Adds one step; ``search_seconds`` is the running total."""
        if self._first_step_at is None:
            self._first_step_at = started
        seconds = ended - started
        self.num_steps += 1
        self.busy_seconds += seconds
        self.search_seconds = search_seconds
        self.block_steps += used_blocks
        self.block_seconds += used_blocks * seconds
        self.request_seconds += requests_in_flight * seconds
        self.request_steps += requests_in_flight
        if (self.num_steps - 1) % self._stride == 0:
            self.timeline.append((ended - self._first_step_at, used_blocks, requests_in_flight))
        if len(self.timeline) >= MAX_TIMELINE:
            del self.timeline[1::2]
            self._stride *= 2

    @property
    def search_time_fraction(self) -> float:
        """Share of the step time that sharing took, in [0, 1]."""
        return self.search_seconds / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def mean_resident_blocks_per_request(self) -> float:
        """Blocks in use over requests in flight, both averaged over time."""
        return self.block_seconds / self.request_seconds if self.request_seconds else 0.0


@dataclass(frozen=True)
class ExecutorStatus:
    """A moment of a running executor. Counts of requests and blocks; totals since the start where the name says so.

    Attributes:
      num_active, num_waiting, num_context, num_generating, num_paused: requests now; a paused one waits too.
      num_context_tokens: tokens of requests still in their context phase.
      num_pauses, num_steps, num_finished, shared_blocks, num_candidates: totals.
      refused: total candidates and decisions turned down, by reason.
      num_failed, num_failed_steps: totals of requests that ended with an error, and of steps that raised.
      step_seconds: how long the present step has gone on; 0 between steps and when idle.
      pressure: what was given up and why; None where the settings ask for none.
    """

    num_active: int
    num_waiting: int
    num_context: int
    num_context_tokens: int
    num_generating: int
    num_pauses: int
    num_paused: int
    num_steps: int
    num_finished: int
    max_blocks: int
    used_blocks: int
    tokens_per_block: int
    shared_blocks: int
    search_seconds: float
    num_candidates: int
    refused: dict[str, int]
    num_failed: int = 0
    num_failed_steps: int = 0
    step_seconds: float = 0.0
    pressure: PressureStatus | None = None


@dataclass(frozen=True)
class PressureStatus:
    """Pressure at this moment, and totals since the start.

    Attributes:
      is_active: pages were given up, and it is not over, see ``Episodes``.
      retired_pages: total pages given up, by reason: ``repeated``, ``needed_least``, or ``resumed`` (once more, by a
        request that came back from a pause).
      num_episodes: times that pressure began.
      num_pauses_avoided: times that running requests got pages without a pause because others were given up.
      num_admitted: times that a waiting request was let in on pages that others gave up.
      num_at_floor: running requests that have given pages up and are at their floor: only what repeats may go still.
      retired_now: pages that the running requests do without.
      bytes_saved_now: memory of these.
      num_failed_reliefs: errors of pressure that were caught, each of which left it out until the next step.
    """

    is_active: bool
    retired_pages: dict[str, int]
    num_episodes: int
    num_pauses_avoided: int
    num_admitted: int
    num_at_floor: int
    retired_now: int
    bytes_saved_now: int
    num_failed_reliefs: int = 0


class Stopwatch:
    """Adds up the time of what runs in ``with`` it, one stretch after the other.

    Attributes:
      seconds: of all stretches that ended.
    """

    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
