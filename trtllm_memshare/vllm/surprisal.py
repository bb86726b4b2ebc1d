"""Surprisal of sampled tokens, on the worker, for every request: nobody has to ask for log-probabilities.

A value stays in the slot of the KV pool whose query chose the token, one before the token's own. Slots and tables are
what vLLM keeps through condensing, preemption and resume; rows of a batch are not.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from trtllm_memshare.errors import UserError

_ROWS = 64  # of logits that are looked at together where they can be: vLLM has planned its memory without them


class SampledSurprisal:
    """-log p of each sampled token by the logits that the sampler gets: the model's, less what a grammar forbids.

    Args:
      runner: vLLM's model runner V1; its sampler is wrapped.
      num_slots: of the pool, blocks times tokens.
      version: of vLLM, for errors.

    Raises:
      UserError: the runner lacks a part that is read.
    """

    def __init__(self, runner: Any, num_slots: int, block_size: int, version: str) -> None:
        table = runner.input_batch.block_table[0]
        parts = ("sampler", "query_start_loc", "discard_request_mask")
        for owner, name in (*((runner, part) for part in parts), (table, "slot_mapping")):
            if not hasattr(owner, name):
                raise UserError(
                    f"vLLM {version}'s {type(owner).__name__} has no {name}, from which MemShare learns how likely "
                    f"tokens were (choose need redundancy)"
                )
        self._runner, self._block_size = runner, block_size
        self._nats = torch.full((num_slots + 1,), torch.nan, device=runner.device)  # one more for padding slots
        # Kept from step to step: to get so much memory anew takes longer than to fill it.
        self._room = torch.empty(0, device=runner.device)
        runner.sampler.forward = self._watch(runner.sampler.forward)

    def of_pages(self, block_ids: list[int], pages: list[int]) -> np.ndarray:
        """Surprisal of full generated pages, summed over their tokens, float32 ``[pages]`` in nats.

        A token whose value is not known counts as the page's mean: the first one of a page whose neighbour is retired,
        or some that were computed again after a pause. NaN = of most tokens nothing is known.
        """
        size = self._block_size
        positions = np.array(pages)[:, None] * size + np.arange(size) - 1  # of the queries that chose the tokens
        slots = np.array(block_ids)[positions // size] * size + positions % size
        values = self._nats[torch.from_numpy(slots).to(self._nats.device)]
        values[~values.isfinite()] = torch.nan
        values[values.isfinite().sum(1) * 2 < size] = torch.nan
        return (values.nanmean(1) * size).cpu().numpy()

    def _watch(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            # The sampler changes float32 logits in place, others it copies first.
            before = self._log_probs(logits) if logits.dtype == torch.float32 else None
            output = original(logits, *arguments, **keywords)
            count, starts = len(logits), self._runner.query_start_loc
            chosen = output.sampled_token_ids[:, :1].long()
            if before is not None:
                nats = -before.gather(1, chosen)[:, 0]
            else:
                parts = zip(logits.split(_ROWS), chosen.split(_ROWS), strict=True)
                nats = torch.cat([-self._log_probs(rows).gather(1, tokens)[:, 0] for rows, tokens in parts])
            # Of a text that is not read to its end vLLM discards what it sampled.
            nats = nats.masked_fill(self._runner.discard_request_mask.gpu[:count], torch.nan)
            slots = self._runner.input_batch.block_table[0].slot_mapping.gpu[: int(starts.np[count])]
            slots = torch.where(slots >= 0, slots, len(self._nats) - 1).long()
            self._nats[slots] = torch.nan  # what another request, or a longer past, has left there
            self._nats[slots[starts.gpu[1 : count + 1].long() - 1]] = nats
            return output

        return forward

    def _log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, float32 in the shape of ``logits``; they stand until the next call."""
        if self._room.numel() < logits.numel():
            self._room = torch.empty(logits.numel(), device=logits.device)
        room = self._room[: logits.numel()].view(logits.shape)
        return torch.log_softmax(logits, -1, dtype=torch.float32, out=room)
