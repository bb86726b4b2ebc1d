"""A text through the real executor, one step a token, while pages are retired between steps: what masks stand for."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.evaluation.retirement import NEVER, NO_DONOR, Choice, Moment, Retirements
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.pressure import floor_room
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams


class Recorder(ReplaySampler):
    """Keeps the logits of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[torch.Tensor] = []

    def sample(self, logits, requests):
        if requests:
            self.logits.append(logits[0].float().clone())
        return super().sample(logits, requests)


def step_by_step(
    runner: TorchRunner,
    boundaries: BoundaryTokens,
    ids: list[int],
    num_prompt_tokens: int,
    choose: Choice,
    min_kept: float,
    protected_tokens: int,
    become: str = "dropped",
) -> tuple[Retirements, torch.Tensor]:
    """Decides anew from the executor's own tables after each page.

    Args:
      become: ``alias`` where the choice names donors.

    Returns:
      What was retired, and the logits from the last prompt token on, ``[len(ids) - num_prompt_tokens, vocab_size]``.
    """
    # Stage 1 looks once, at the first step, when there is nothing to find.
    config = make_config("lexical", retired_becomes=become, search_interval=10**6, max_aliases=64)
    sampler = Recorder()
    executor = Executor(runner, config, boundaries, len(ids), 1, max_num_tokens=4096, sampler=sampler)
    handle = executor.submit(ids[:num_prompt_tokens], SamplingParams(len(ids) - num_prompt_tokens))
    sampler.add_script(handle.request_id, ids[num_prompt_tokens:])
    size, manager = runner.tokens_per_block, executor.manager
    first, num_pages = -(-num_prompt_tokens // size), len(ids) // size
    retired_at, donor = np.full(num_pages, NEVER, np.int64), np.full(num_pages, NO_DONOR, np.int32)
    while executor.has_work:
        executor.step()
        computed = num_prompt_tokens + len(sampler.logits) - 1  # the last sampled token has no K and V yet
        if not executor.has_work or computed % size or computed // size <= first:
            continue
        table = manager.block_table(handle.request_id)
        generated = np.arange(first, computed // size)
        own = np.array([not manager.is_retired(handle.request_id, page) for page in generated])
        resident = generated[own]
        may_go = resident[resident < (computed - protected_tokens) // size]
        room = floor_room(len(generated), int((~own).sum()), min_kept)
        if room <= 0 or not len(may_go):
            continue
        pages, donors = choose(Moment(computed, resident, may_go), room)
        for page, other in zip(pages.tolist(), donors.tolist(), strict=True):
            if other == NO_DONOR:
                assert manager.retire(handle.request_id, np.array([page])) == 1
            else:
                assert manager.apply([_alias(manager, handle.request_id, page, table[page], table[other])]) == 1
            retired_at[page], donor[page] = computed, other
        manager.check_integrity()
        assert (manager.block_table(handle.request_id)[generated] != NO_BLOCK).sum() >= len(resident) - len(pages)
    return Retirements(size, retired_at, donor), torch.stack(sampler.logits)


def _alias(manager, request_id: int, page: int, block: int, other: int) -> Decision:
    size, pool = manager.tokens_per_block, manager.pool
    slots = np.arange(size, dtype=np.int32)
    generations = np.full(size, pool.generation[other], np.int32)
    return Decision(
        Candidate(
            request_id, 0, page, block, pool.generation[block], other, block * size + slots, other * size + slots,
            generations,
        ),
        0.0,
    )  # fmt: skip
