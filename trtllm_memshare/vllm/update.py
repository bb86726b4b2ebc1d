"""What the scheduler tells the workers about retired blocks, and how a worker's block tables follow.

It travels with the scheduler's output of a step and is applied before that step, by request id: rows of the tables move
when requests leave, their ids do not.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

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


def apply_to_v1_runner(runner: Any, update: MemShareUpdate) -> None:
    """Rewrites the tables of vLLM's model runner V1.

    Both places are written: the request's own list, from which its row is made again whenever it comes back into the
    batch, and the row of the batch if it has one now.
    """
    if getattr(runner, "prepare_inputs_event", None) is not None:
        runner.prepare_inputs_event.synchronize()  # the step before may still be copying the rows to the device
    batch = runner.input_batch
    table = batch.block_table[0].block_table.np
    for request_id, entries in update.null_entries.items():
        state = runner.requests.get(request_id)
        if state is None:
            continue  # it ended in the step in which its blocks were retired
        block_ids = state.block_ids[0]
        row = batch.req_id_to_index.get(request_id)
        for logical, block_id in entries.items():
            block_ids[logical] = block_id
            if row is not None:
                table[row, logical] = block_id


def apply_to_v2_runner(runner: Any, update: MemShareUpdate) -> None:
    """Rewrites the tables of model runner V2, which keeps one row a request and stages writes to the device."""
    table = runner.block_tables.block_tables[0]
    for request_id, entries in update.null_entries.items():
        row = runner.req_states.req_id_to_index.get(request_id)
        if row is None:
            continue
        for logical, block_id in entries.items():
            table.stage_write(row, logical, [block_id])
