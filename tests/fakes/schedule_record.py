"""What a run of random schedules did, as a result that pages can quote."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from trtllm_memshare.evaluation.document import make_report, write_report
from trtllm_memshare.serving.executor import Executor

FOLDER = os.environ.get("MEMSHARE_SCHEDULE_RESULTS")


class ScheduleRecord:
    """Counts of all schedules that held to their end, written to ``MEMSHARE_SCHEDULE_RESULTS`` if that names a folder.

    Args:
      test: path of the test in this repository.
      asked: the variable that says how much was asked for, and its value.

    Attributes:
      counts: so far.
    """

    def __init__(self, test: str, asked: str) -> None:
        self._test, self._asked, self.counts = test, asked, Counter[str]()

    def add(self, counts: dict[str, int]) -> None:
        """A schedule has ended and everything held."""
        self.counts.update({"schedules": 1, **counts})
        if FOLDER is not None:
            command = f"{self._asked} MEMSHARE_SCHEDULE_RESULTS=FOLDER pytest {self._test}"
            report = make_report(dict(self.counts), command)
            write_report(report, Path(FOLDER) / f"{Path(self._test).stem.removeprefix('test_')}.json")


def counts_of(executor: Executor, num_requests: int) -> dict[str, int]:
    """What a schedule of our own executor did."""
    status = executor.status()
    counts = {
        "steps": status.num_steps,
        "requests": num_requests,
        "pauses": status.num_pauses,
        "shared_blocks": status.shared_blocks,
    }
    if status.pressure is not None:
        counts |= {f"retired_{reason}": n for reason, n in status.pressure.retired_pages.items()}
    return counts
