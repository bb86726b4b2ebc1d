"""What the scheduler tells the workers about retired blocks.

It travels with the scheduler's output of a step and is applied before that step, by request id: rows of the tables move
when requests leave, their ids do not.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

ATTRIBUTE = "memshare"
"""Name under which a ``MemShareUpdate`` rides on vLLM's ``SchedulerOutput``."""
REPORTS = "memshare_reports"
"""Name under which a ``PageReport`` by request id rides back on vLLM's ``ModelRunnerOutput``."""


@dataclass
class MemShareUpdate:
    """Entries that change before the step.

    Attributes:
      null_blocks: ids of the blocks that null entries name by band, with the first step only: the workers write null
        pages there, if there are any.
      null_entries: request id -> logical block -> block id of a null page, or of the earlier block of the request that
        is read in its place; the last word on each entry only, since model runner V2 writes all entries of a step at
        once.
      asked: request id -> full generated pages of which the scheduler wants to know more, new ones only, in order.
    """

    null_blocks: list[int] | None = None
    null_entries: dict[str, dict[int, int]] = field(default_factory=dict)
    asked: dict[str, list[int]] = field(default_factory=dict)

    def set(self, request_id: str, logical_block: int, block_id: int) -> None:
        """The entry of a retired block points at this one from this step on."""
        self.null_entries.setdefault(request_id, {})[logical_block] = block_id

    def keep_only(self, request_ids: Container[str]) -> None:
        """Forgets requests that lost all their blocks later in the same step."""
        self.null_entries = {r: e for r, e in self.null_entries.items() if r in request_ids}
        self.asked = {r: pages for r, pages in self.asked.items() if r in request_ids}
