"""The harm of one remap alone: what a single retired block does to the next-token distributions that follow.

An accuracy curve lets hundreds of remaps act together and cannot tell which of them did damage. Here one forward pass
gives K and V of a whole text; for one pair of blocks the rows of the retired block are overwritten by its donor's, and
the tokens that follow are run over that cache, teacher-forced::

    positions   0 ............... t | t .............. t + n
    read as     the remapped table  | computed anew, over it: their K and V feel the remap too

In float64: the harm of an equal pair lies far below what float32 can tell from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Remap:
    """One table entry pointed at another block.

    Attributes:
      retired, donor: logical blocks, both full.
      reads_from: first position whose token reads the changed table.
      values_from: positions whose V alone stands in, slot by slot, while K stays and with it attention's weights: as if
        the two blocks were in phase. None = the donor's K and V.
    """

    retired: int
    donor: int
    reads_from: int
    values_from: tuple[int, ...] | None = None


class ReadText:
    """A text that a model has read once, with every position's K, V and next-token distribution.

    Args:
      model: a transformers decoder with its own attention, in float64 for harms below 1e-7 nats.
      token_ids: the text, prompt included.
      tokens_per_block: of the table that is remapped.

    Attributes:
      keys, values: ``[num_layers, num_kv_heads, num_tokens, head_dim]``, the model's dtype; K after its rotation.
      log_probs: float64 ``[num_tokens, vocab_size]``, of the token after each position.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, token_ids: list[int], tokens_per_block: int) -> None:
        self._model, self._size = model, tokens_per_block
        self._ids = torch.tensor([token_ids], device=model.device)
        cache = DynamicCache()
        logits = self._forward(self._ids, cache)
        self.keys = torch.stack([layer.keys[0] for layer in cache.layers])
        self.values = torch.stack([layer.values[0] for layer in cache.layers])
        self.log_probs = logits.double().log_softmax(-1)

    @property
    def num_tokens(self) -> int:
        return self._ids.shape[1]

    def pool(self) -> torch.Tensor:
        """K and V as stage 2 reads them; physical block i is logical block i, a partial last one is left out.

        Returns:
          ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, the model's dtype.
        """
        num_blocks = self.num_tokens // self._size
        stacked = torch.stack([self.keys, self.values])[:, :, :, : num_blocks * self._size]
        return stacked.unflatten(3, (num_blocks, self._size)).permute(3, 1, 0, 2, 4, 5).contiguous()

    @torch.inference_mode()
    def divergences(self, remap: Remap | None, reads_from: int, num_following: int) -> torch.Tensor:
        """KL(full || remapped) of the distributions at positions ``reads_from`` and after, in nats.

        Args:
          remap: what is changed before ``reads_from`` is computed, None = nothing.
          num_following: most positions; the last token of the text is not among them, since nothing follows it.

        Returns:
          float64 ``[n]``.

        Raises:
          ValueError: blocks that are not full, or the same, when the table is changed.
        """
        keys, values = self.keys[:, :, :reads_from], self.values[:, :, :reads_from]
        if remap is not None:
            full = reads_from // self._size
            if not (0 <= remap.retired < full and 0 <= remap.donor < full):
                raise ValueError(
                    f"blocks {remap.retired} and {remap.donor} must both be among the {full} that are full before "
                    f"position {reads_from}"
                )
            if remap.values_from is None:
                keys, values = self._copied(keys, remap), self._copied(values, remap)
            else:
                values = values.clone()
                start = remap.retired * self._size
                values[:, :, start : start + self._size] = self.values[:, :, list(remap.values_from)]
        cache = DynamicCache()
        for layer in range(len(keys)):
            cache.update(keys[layer][None], values[layer][None], layer)
        stop = min(reads_from + num_following, self.num_tokens - 1)
        logits = self._forward(self._ids[:, reads_from:stop], cache)
        full_log_probs = self.log_probs[reads_from:stop]
        return (full_log_probs.exp() * (full_log_probs - logits.double().log_softmax(-1))).sum(-1)

    def harm(self, remap: Remap, num_following: int) -> float:
        """Mean of the divergences that a remap causes, in nats per token; ``num_following`` as above.

        Raises:
          ValueError: blocks that are not full, or no token that follows.
        """
        if remap.reads_from >= self.num_tokens - 1:
            raise ValueError(f"no token reads the remap: {remap.reads_from} of {self.num_tokens} tokens")
        return float(self.divergences(remap, remap.reads_from, num_following).mean())

    def _forward(self, ids: torch.Tensor, cache: DynamicCache) -> Any:
        """Logits ``[tokens, vocab_size]``. The cache goes by position: its keyword changed within transformers 5."""
        return self._model(ids, None, None, cache, use_cache=True).logits[0]

    def _copied(self, states: torch.Tensor, remap: Remap) -> torch.Tensor:
        """The states as the remapped table reads them. A donor named twice weighs twice by standing there twice."""
        changed, size = states.clone(), self._size
        retired, donor = remap.retired * size, remap.donor * size
        changed[:, :, retired : retired + size] = states[:, :, donor : donor + size]
        return changed
