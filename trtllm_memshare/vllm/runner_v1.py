"""vLLM's model runner V1: a batch of rows that move, and a state of each request beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from trtllm_memshare.vllm.surprisal import ROWS, SampledSurprisal, missing_part
from trtllm_memshare.vllm.update import MemShareUpdate


class RunnerV1:
    """See ``ModelRunner``."""

    reuses_tables = True

    def __init__(self, runner: Any, version: str, group: int = 0) -> None:
        self._runner, self._version, self._group = runner, version, group
        # Kept from step to step: to get so much memory anew takes longer than to fill it.
        self._room = torch.empty(0, device=getattr(runner, "device", None))

    def apply(self, update: MemShareUpdate) -> None:
        """Both places are written: the request's own list, from which its row is made again whenever it comes back
        into the batch, and the row of the batch if it has one now."""
        runner = self._runner
        if getattr(runner, "prepare_inputs_event", None) is not None:
            runner.prepare_inputs_event.synchronize()  # the step before may still be copying the rows to the device
        batch = runner.input_batch
        table = batch.block_table[self._group].block_table.np
        for request_id, entries in update.null_entries.items():
            state = runner.requests.get(request_id)
            if state is None:
                continue  # it ended in the step in which its blocks were retired
            block_ids = state.block_ids[self._group]
            row = batch.req_id_to_index.get(request_id)
            for logical, block_id in entries.items():
                block_ids[logical] = block_id
                if row is not None:
                    table[row, logical] = block_id

    def tables(self, request_ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Block ids of those requests that are here."""
        requests = self._runner.requests
        return {name: np.array(requests[name].block_ids[self._group]) for name in request_ids if name in requests}

    def check_sampler(self) -> None:
        """Raises UserError: vLLM lacks a part that is read."""
        runner = self._runner
        parts = [(runner, part) for part in ("sampler", "query_start_loc", "discard_request_mask")]
        for owner, name in (*parts, (runner.input_batch.block_table[self._group], "slot_mapping")):
            if not hasattr(owner, name):
                raise missing_part(self._version, owner, name)

    def watch_sampler(self, surprisal: SampledSurprisal) -> None:
        """Wraps ``forward`` of the sampler."""
        sampler = self._runner.sampler
        sampler.forward = self._watched(sampler.forward, surprisal)

    def _watched(self, original: Any, surprisal: SampledSurprisal) -> Any:
        runner = self._runner

        @functools.wraps(original)
        def forward(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            # The sampler changes float32 logits in place, others it copies first.
            before = self._log_probs(logits) if logits.dtype == torch.float32 else None
            output = original(logits, *arguments, **keywords)
            count, starts = len(logits), runner.query_start_loc
            chosen = output.sampled_token_ids[:, :1].long()
            if before is not None:
                nats = -before.gather(1, chosen)[:, 0]
            else:
                parts = zip(logits.split(ROWS), chosen.split(ROWS), strict=True)
                nats = torch.cat([-self._log_probs(rows).gather(1, tokens)[:, 0] for rows, tokens in parts])
            # Of a text that is not read to its end vLLM discards what it sampled.
            nats = nats.masked_fill(runner.discard_request_mask.gpu[:count], torch.nan)
            slots = runner.input_batch.block_table[self._group].slot_mapping.gpu[: int(starts.np[count])]
            surprisal.note(slots, starts.gpu[1 : count + 1].long() - 1, nats)
            return output

        return forward

    def _log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, float32 in the shape of ``logits``; they stand until the next call."""
        if self._room.numel() < logits.numel():
            self._room = torch.empty(logits.numel(), device=logits.device)
        room = self._room[: logits.numel()].view(logits.shape)
        return torch.log_softmax(logits, -1, dtype=torch.float32, out=room)
