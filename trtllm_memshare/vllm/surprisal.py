"""Surprisal of sampled tokens, on the worker, for every request: nobody has to ask for log-probabilities.

A value stays in the slot of the KV pool whose query chose the token, one before the token's own. Slots and tables are
what vLLM keeps through condensing, preemption and resume; rows of a batch are not.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.errors import UserError

ROWS = 64
"""Of logits that are looked at together where they can be: vLLM has planned its memory without them."""


class SampledSurprisal:
    """-log p of each sampled token by the logits that the sampler gets: the model's, less what a grammar forbids.

    Args:
      num_slots: of the pool, blocks times tokens.
      block_size: tokens of a block.
      device: where tokens are sampled.
    """

    def __init__(self, num_slots: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._nats = torch.full((num_slots + 1,), torch.nan, device=device)  # one more for padding slots

    def note(self, slots: torch.Tensor, last: torch.Tensor, nats: torch.Tensor) -> None:
        """Takes what a step sampled.

        Args:
          slots: of all tokens that the step computed, ``[tokens]``; below 0 = padding.
          last: int64 ``[requests]``, which of them chose a token.
          nats: float32 ``[requests]``, its surprisal; NaN = it is not taken.
        """
        slots = torch.where(slots >= 0, slots, len(self._nats) - 1).long()
        self._nats[slots] = torch.nan  # what another request, or a longer past, has left there
        self._nats[slots[last]] = nats

    def of_pages(self, block_ids: np.ndarray, pages: list[int]) -> np.ndarray:
        """Surprisal of full generated pages, summed over their tokens, float32 ``[pages]`` in nats.

        A token whose value is not known counts as the page's mean: the first one of a page whose neighbour is retired,
        or some that were computed again after a pause. NaN = of most tokens nothing is known.
        """
        size = self._block_size
        positions = np.array(pages)[:, None] * size + np.arange(size) - 1  # of the queries that chose the tokens
        slots = block_ids[positions // size] * size + positions % size
        values = self._nats[torch.from_numpy(slots).to(self._nats.device)]
        values[~values.isfinite()] = torch.nan
        values[values.isfinite().sum(1) * 2 < size] = torch.nan
        return (values.nanmean(1) * size).cpu().numpy()


def missing_part(version: str, owner: object, name: str) -> UserError:
    """The error for a vLLM without something that tells how likely tokens were."""
    return UserError(
        f"vLLM {version}'s {type(owner).__name__} has no {name}, from which MemShare learns how likely tokens were "
        f"(choose need redundancy)"
    )
