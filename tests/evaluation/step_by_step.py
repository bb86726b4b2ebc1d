"""A text through the real executor, one step a token, while pages are retired between steps: what masks stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.evaluation.retirement import NEVER, NO_DONOR, Choice, Moment, Retirements
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import MemShareConfig, make_config
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
    walk = _Walk(runner, config, boundaries, ids, num_prompt_tokens)
    size, manager, handle = runner.tokens_per_block, walk.executor.manager, walk.handle
    first, retired_at, donor = walk.first, walk.retired_at, walk.donor
    for computed in walk:
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
    return Retirements(size, retired_at, donor), torch.stack(walk.sampler.logits)


def served_at_floor(
    runner: TorchRunner, boundaries: BoundaryTokens, ids: list[int], num_prompt_tokens: int, config: MemShareConfig
) -> tuple[Retirements, np.ndarray, torch.Tensor]:
    """The same with what serving itself gives up, asked after each page for all that a request may give.

    Args:
      config: of preset ``pressure`` with need ``nearest-earlier``; with room in the pool nothing else asks.

    Returns:
      What was retired, distances of pages ``[pages, pages]`` as they were compared (inf: they were not), and logits.
    """
    walk = _Walk(runner, config, boundaries, ids, num_prompt_tokens)
    executor, manager, now = walk.executor, walk.executor.manager, 0
    retire = manager.retire

    def watched(request_id: int, pages: np.ndarray, donors: Mapping[int, int]) -> int:
        walk.retired_at[pages] = now
        for page in pages.tolist():
            walk.donor[page] = donors.get(page, NO_DONOR)
        return retire(request_id, pages, donors)

    manager.retire = watched
    distance = np.full((len(walk.donor), len(walk.donor)), np.inf, np.float32)
    for now in walk:  # noqa: B007 - read by ``watched``
        executor.pressure._retire(manager.pool.num_blocks, executor._scheduler.running)
        manager.check_integrity()
        source = executor.pressure._ledger._source
        pairs, end = (known.get(walk.handle.request_id) for known in (source._requests, source._num_seen))
        if pairs is not None:
            distance[walk.first : end, walk.first : end] = pairs._distance[: end - walk.first, : end - walk.first]
    retirements = Retirements(runner.tokens_per_block, walk.retired_at, walk.donor)
    return retirements, distance, torch.stack(walk.sampler.logits)


class _Walk:
    """Feeds a text to an executor; iterating stops after each generated page and yields the tokens computed."""

    def __init__(self, runner, config, boundaries, ids, num_prompt_tokens) -> None:
        self.sampler = Recorder()
        self.executor = Executor(runner, config, boundaries, len(ids), 1, max_num_tokens=4096, sampler=self.sampler)
        self.handle = self.executor.submit(ids[:num_prompt_tokens], SamplingParams(len(ids) - num_prompt_tokens))
        self.sampler.add_script(self.handle.request_id, ids[num_prompt_tokens:])
        self._size, self._num_prompt_tokens = runner.tokens_per_block, num_prompt_tokens
        num_pages, self.first = len(ids) // self._size, -(-num_prompt_tokens // self._size)
        self.retired_at, self.donor = np.full(num_pages, NEVER, np.int64), np.full(num_pages, NO_DONOR, np.int32)

    def __iter__(self) -> Iterator[int]:
        while self.executor.has_work:
            self.executor.step()
            # The last sampled token has no K and V yet.
            computed = self._num_prompt_tokens + len(self.sampler.logits) - 1
            if self.executor.has_work and computed % self._size == 0 and computed // self._size > self.first:
                yield computed


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
