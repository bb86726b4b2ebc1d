"""A whole text through the real executor without a model: K and V are those that the full pass recorded.

Matching, comparison, policy, block tables and settings are the product's own, so that a preset's retirements can be
turned into a mask. What the executor searches is the full cache's K and V; those of a text that is read through a
shared cache differ a little in the deeper layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trtllm_memshare.evaluation.free_generation import HeldExecutor
from trtllm_memshare.evaluation.masked_replay import FullPass
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.evaluation.retirement import NEVER, NO_DONOR, Retirements
from trtllm_memshare.evaluation.stay_reasons import Inquiry
from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.search.block_search import Distances, make_block_search
from trtllm_memshare.search.config import MAX_PAIRS, MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.serving.request import SamplingParams


class RecordedSampler(ReplaySampler):
    """Writes the one text, whose tokens are as likely as they were in the full pass.

    Args:
      losses: float32 ``[tokens]``, see ``FullPass``.
      num_prompt_tokens: position of the first token that it chooses.
    """

    def __init__(self, losses: np.ndarray, num_prompt_tokens: int) -> None:
        super().__init__()
        self._losses, self._position = losses, num_prompt_tokens

    def log_probs_of(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """See ``Sampler``; asked once for each token, or never."""
        self._position += 1
        return torch.tensor([-float(self._losses[self._position - 1])])


class RecordedRunner:
    """Writes what was recorded at each position to a pool on the CPU, and compares blocks; see ``runners.protocol``.

    Args:
      full: the pass over the one text that will be replayed.
      tokens_per_block: tokens of a block.
      inv_freq: float32 ``[rotary_dim / 2]``.
      vocab_size: width of its logits, which are all zero.
    """

    skips_entries, null_pages = True, None  # it reads no entry at all

    def __init__(self, full: FullPass, tokens_per_block: int, inv_freq: torch.Tensor, vocab_size: int) -> None:
        self.tokens_per_block, self.vocab_size = tokens_per_block, vocab_size
        self.num_layers, self.num_blocks = len(full.states), len(full.ids) // tokens_per_block + 2
        # [tokens, layers, 2, kv_heads, head_dim]
        states = torch.stack([torch.stack(pair) for pair in full.states]).cpu()
        self._states = states.permute(3, 0, 1, 2, 4).contiguous()
        _, _, _, heads, head_dim = self._states.shape
        self.pool = torch.zeros(self.num_blocks, self.num_layers, 2, heads, tokens_per_block, head_dim)
        self.inv_freq = inv_freq.cpu()
        self.search = make_block_search(self.pool, self.inv_freq, MAX_PAIRS)

    def reserve_null_pages(self, are_used: bool) -> None:
        """It has none."""

    def prepare(self, batch: StepBatch) -> StepBatch:
        """Nothing to prepare."""
        return batch

    def step(self, batch: StepBatch) -> StepOutput:
        """Writes K and V of the batch's tokens, of one request."""
        page, slot = np.divmod(batch.position_ids, self.tokens_per_block)
        blocks = batch.block_offsets[0, 0, 0, page] // (2 * self.num_layers)
        for block, place, position in zip(blocks.tolist(), slot.tolist(), batch.position_ids.tolist(), strict=True):
            self.pool[block, :, :, :, place] = self._states[position]
        return StepOutput(torch.zeros(len(batch.chunk_lengths), self.vocab_size), None)

    def compare(self, pairs: PairBatch) -> Distances:
        """See ``ComparingRunner``."""
        return self.search.compare(pairs)


def retire_by_preset(
    config: MemShareConfig,
    full: FullPass,
    num_prompt_tokens: int,
    replay_model: Any,
    boundaries: BoundaryTokens,
    inquiry: Inquiry | None = None,
) -> Retirements:
    """What a preset shares while a text is written: pages that gave up their memory, and what stands in for them.

    Args:
      config: settings of the search; entries of retired pages become aliases or, if it says so, nothing. Under the
        preset ``pressure`` the request stands at its floor throughout.
      full: the pass over the text.
      replay_model: the model of ``MaskedReplay``, for its rotary frequencies and the size of its vocabulary.
      boundaries: step boundaries of its tokenizer.
      inquiry: asks along the way why pages stay.
    """
    size, ids = full.facts.tokens_per_block, full.ids.tolist()
    inv_freq = replay_model.model.rotary_emb.inv_freq.float()
    runner = RecordedRunner(full, size, inv_freq, replay_model.config.vocab_size)
    sampler = RecordedSampler(full.losses, num_prompt_tokens)
    executor = HeldExecutor(runner, config, boundaries, len(ids), 1, max_num_tokens=len(ids), sampler=sampler)
    request = executor.submit(ids[:num_prompt_tokens], SamplingParams(len(ids) - num_prompt_tokens)).request_id
    sampler.add_script(request, ids[num_prompt_tokens:])
    if inquiry is not None:
        inquiry.listen(executor)
    retired_at = np.full(len(ids) // size, NEVER, np.int64)
    donor = np.full(len(retired_at), NO_DONOR, np.int32)
    position = 0  # of the first query of the next step
    while executor.has_work:
        executor.step()
        if not executor.has_work:
            break
        # What was decided before this step is what its queries do not see.
        origins = executor.manager.origin_blocks(request)[: len(retired_at)]
        for page in np.flatnonzero((origins != np.arange(len(origins))) & (retired_at[: len(origins)] == NEVER)):
            retired_at[page], donor[page] = position, origins[page]
        if inquiry is not None and position == inquiry.position:
            inquiry.ask(executor, request)
        position = num_prompt_tokens if position == 0 else position + 1
    executor.manager.check_integrity()
    return Retirements(size, retired_at, donor)
