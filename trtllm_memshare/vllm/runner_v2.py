"""vLLM's model runner V2: one row a request for as long as it runs, and tables on the device, written in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.surprisal import ROWS, SampledSurprisal, missing_part
from trtllm_memshare.vllm.update import MemShareUpdate


class RunnerV2:
    """See ``ModelRunner``."""

    reuses_tables = False  # but of states

    def __init__(self, runner: Any, version: str, group: int = 0) -> None:
        self._runner, self._version, self._group = runner, version, group

    def apply(self, update: MemShareUpdate) -> None:
        """What is staged here is written with what the step itself changes, all at once and in any order.

        No two of these writes meet: a request of which blocks are retired keeps its row in this step.
        """
        table = self._runner.block_tables.block_tables[self._group]
        for request_id, entries in update.null_entries.items():
            row = self._runner.req_states.req_id_to_index.get(request_id)
            if row is None:
                continue
            for logical, block_id in entries.items():
                table.stage_write(row, logical, [block_id])

    def tables(self, request_ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Block ids of those requests that are here; the device is waited for, since only it has them."""
        rows = self._runner.req_states.req_id_to_index
        there = [name for name in request_ids if name in rows]
        if not there:
            return {}
        table, indices = self._runner.block_tables.block_tables[self._group].gpu, [rows[name] for name in there]
        return dict(zip(there, table[torch.tensor(indices, device=table.device)].cpu().numpy(), strict=True))

    def check_sampler(self) -> None:
        """Raises UserError: vLLM lacks a part that is read, or each rank samples for some requests only."""
        runner = self._runner
        for owner, name in ((runner, "sampler"), (getattr(runner, "block_tables", None), "slot_mappings")):
            if getattr(owner, name, None) is None:
                raise missing_part(self._version, runner, name)
        if getattr(runner, "batch_sharder", None) is not None:
            raise UserError(
                "needs that read surprisal need each worker to sample for all requests, got vLLM's "
                "--enable-batch-sharded-sampling (leave it out, or choose need redundancy)"
            )

    def watch_sampler(self, surprisal: SampledSurprisal) -> None:
        """Puts something in the sampler's place that calls it."""
        runner = self._runner
        runner.sampler = _WatchedSampler(runner.sampler, runner.block_tables, self._group, surprisal)


class _WatchedSampler:
    """The sampler, which notes what it sampled; everything but the call is the sampler's own."""

    def __init__(self, sampler: Callable[..., Any], block_tables: Any, group: int, surprisal: SampledSurprisal) -> None:
        self._sampler, self._block_tables, self._group, self._surprisal = sampler, block_tables, group, surprisal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        # Logits may change in the sampler, by top-k: not those that can be chosen, but what all sum up to.
        sums = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(ROWS)])
        output = self._sampler(logits, input_batch)
        chosen = output.sampled_token_ids[:, :1].long()
        nats = sums - logits.gather(1, chosen)[:, 0].float()
        # Of a text that is not read to its end nothing is taken.
        nats = nats.masked_fill(output.num_sampled == 0, torch.nan)
        slots = self._block_tables.slot_mappings[self._group, : input_batch.num_tokens]
        self._surprisal.note(slots, input_batch.logits_indices.long(), nats)
        return output
