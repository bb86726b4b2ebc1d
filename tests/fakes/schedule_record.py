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
      operations: how many were asked for.

    Attributes:
      counts: so far.
    """

    def __init__(self, test: str, operations: int) -> None:
        self._test, self._operations, self.counts = test, operations, Counter[str]()

    def add(self, executor: Executor, num_requests: int) -> None:
        """A schedule has ended and everything held."""
        status = executor.status()
        counts = {
            "schedules": 1,
            "steps": status.num_steps,
            "requests": num_requests,
            "pauses": status.num_pauses,
            "shared_blocks": status.shared_blocks,
        }
        if status.pressure is not None:
            counts |= {f"retired_{reason}": n for reason, n in status.pressure.retired_pages.items()}
        self.counts.update(counts)
        if FOLDER is not None:
            variables = f"MEMSHARE_SCHEDULE_OPERATIONS={self._operations} MEMSHARE_SCHEDULE_RESULTS=FOLDER"
            report = make_report(dict(self.counts), f"{variables} pytest {self._test}")
            write_report(report, Path(FOLDER) / f"{Path(self._test).stem.removeprefix('test_')}.json")
