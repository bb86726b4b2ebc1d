"""What became of each block of one request: generates an answer and writes down every remap and retirement.

Settings that share are seen at work in a pool with room. Settings that give up pages under pressure are so in a pool
that is short for this one answer.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.matching import TokenHistory
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Decision
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.pressure import Pressure, Retirement
from trtllm_memshare.serving.request import RequestResult, SamplingParams
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer


class Fate(Enum):
    """What became of a block, at the end of the request."""

    PROMPT = "prompt"
    OWN = "own"
    SHARED = "shared"
    DONOR = "donor"
    RETIRED = "retired"
    PROTECTED = "protected"


@dataclass(frozen=True)
class BlockStory:
    """One logical block.

    Attributes:
      pieces: text of each of its tokens; some are empty where a character takes several tokens.
      step_starts: which of its tokens start a step.
      donor: the logical block that it reads at the end, None = its own memory.
      readers: logical blocks that read this one at the end, itself left out.
      distance: relative KV distance of the pair when the block was given up; None = not given up, or not compared.
      given_up_at: tokens written when it was given up.
      reason: why it went under pressure, ``repeated`` or ``needed least``; None = it did not.
      need: how much it was needed when it went under pressure, by the settings' ``need``.
    """

    index: int
    fate: Fate
    pieces: tuple[str, ...]
    step_starts: tuple[bool, ...]
    donor: int | None = None
    readers: tuple[int, ...] = ()
    distance: float | None = None
    given_up_at: int | None = None
    reason: str | None = None
    need: float | None = None


@dataclass(frozen=True)
class Story:
    """One request from its prompt to its end.

    Attributes:
      memory: (tokens in the cache, blocks held, blocks the full cache would hold), one per decode step.
      same_text: whether the full cache gave the same tokens, as far as a cut answer goes.
      rejected, refused: pairs that stage 2, then the cache, turned down, by reason.
      pool_blocks: blocks that requests can hold in the pool that was short; None = the pool had room.
      cut: whether the answer ended because that pool could hold no more of it.
    """

    prompt: str
    blocks: tuple[BlockStory, ...]
    tokens_per_block: int
    memory: tuple[tuple[int, int, int], ...]
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    same_text: bool
    rejected: dict[str, int]
    refused: dict[str, int]
    pool_blocks: int | None = None
    cut: bool = False

    @property
    def filled(self) -> int:
        """Blocks that generation filled or began: those without prompt tokens."""
        return sum(b.fate is not Fate.PROMPT for b in self.blocks)

    @property
    def freed(self) -> int:
        """Blocks given up."""
        return sum(b.fate in (Fate.SHARED, Fate.RETIRED) for b in self.blocks)

    @property
    def reasons(self) -> dict[str, int]:
        """Blocks given up under pressure, by reason."""
        return dict(Counter(b.reason for b in self.blocks if b.reason is not None))


@dataclass
class _Remaps:
    """Remaps and retirements of one request by logical block."""

    manager: KVCacheManager
    donors: dict[int, int] = field(default_factory=dict)
    distances: dict[int, float] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)
    retired: dict[int, tuple[str, float]] = field(default_factory=dict)
    now: int = 0

    def note(self, decision: Decision) -> None:
        block, size = decision.candidate.logical, self.manager.tokens_per_block
        donor = int(self.manager.pool.origin_position[decision.candidate.donor]) // size
        self.donors[block], self.distances[block], self.times[block] = donor, decision.distance, self.now

    def note_retirement(self, retirement: Retirement) -> None:
        columns = (column.tolist() for column in (retirement.pages, retirement.repeated, retirement.need))
        for block, repeated, need in zip(*columns, strict=True):
            self.retired[block] = "repeated" if repeated else "needed least", need
            self.times[block] = self.now

    def final_donor(self, block: int) -> int | None:
        """Where the entry of ``block`` points in the end: a donor may have been given up in its turn."""
        if block not in self.donors:
            return None
        while block in self.donors:
            block = self.donors[block]
        return block


def tell_story(
    runner: Runner,
    config: MemShareConfig,
    tokenizer: Any,
    prompt: str,
    input_ids: list[int],
    max_new_tokens: int,
    max_seq_len: int,
    stop_token_ids: tuple[int, ...] = (),
    num_blocks: int | None = None,
    max_num_tokens: int = 2048,
) -> Story:
    """Generates greedily, with the full cache and as the settings say, and tells what became of each block.

    Args:
      runner: its pool has to hold the request unshared.
      tokenizer: a transformers tokenizer, which makes text of tokens.
      prompt: as the story repeats it; ``input_ids``: its tokens.
      num_blocks: of the runner's pool, how many the request may use under pressure, null pages included; None = what
        the answer of the full cache needs at its floor. The answer ends where it would need more at its floor.
      max_num_tokens: most tokens of one step; a longer prompt takes several.

    Raises:
      UserError: an empty prompt, or one that does not fit.
    """
    ids = input_ids
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, runner.vocab_size)
    params = SamplingParams(max_new_tokens, stop_token_ids=stop_token_ids)
    limits = max_seq_len, 1, max_num_tokens
    full = _run_full(Executor(runner, make_config("off"), boundaries, *limits), ids, params)
    executor = Executor(runner, config, boundaries, *limits, make_control=make_control)
    if executor.pressure is not None:
        least = executor.pressure.blocks_at_floor(len(ids), replace(params, max_new_tokens=len(full.token_ids)))
        num_null = runner.num_blocks - executor.manager.pool.num_usable
        short = copy.copy(runner)  # the first blocks of the same pool
        short.num_blocks = least + num_null if num_blocks is None else num_blocks
        params = _cut(executor.pressure, len(ids), params, short.num_blocks - num_null)
        executor = Executor(short, config, boundaries, *limits)
    remaps = _Remaps(executor.manager, now=len(ids))
    executor.manager.watch_remaps(remaps.note)
    if executor.pressure is not None:
        executor.pressure.watch = remaps.note_retirement
    handle, memory = executor.submit(ids, params), list[tuple[int, int, int]]()
    while executor.has_work:
        executor.step()
        # None while a long prompt takes more steps, nor after the last one, when the request's blocks are gone.
        for request_id, _, num_computed in executor.manager.generating_sequences():
            memory.append((num_computed, executor.manager.pool.num_used, executor.manager.logical_blocks(request_id)))
            remaps.now = num_computed + 1  # the token sampled last is written, and in the cache after its step
    result = handle.result()
    cut = result.finish_reason == "length" and len(result.token_ids) < max_new_tokens
    # The last token is never fed back, so it has no place in the cache.
    tokens = np.array([*ids, *result.token_ids][:-1], np.int32)
    return Story(
        prompt,
        _blocks(runner.tokens_per_block, config, boundaries, tokenizer, tokens, len(ids), remaps),
        runner.tokens_per_block,
        tuple(memory),
        result.finish_reason,
        len(ids),
        len(result.token_ids),
        result.token_ids == (full.token_ids[: len(result.token_ids)] if cut else full.token_ids),
        executor.rejected,
        executor.manager.stats().refused,
        None if executor.pressure is None else executor.manager.pool.num_usable,
        cut,
    )


def _blocks(
    size: int,
    config: MemShareConfig,
    boundaries: BoundaryTokens,
    tokenizer: Any,
    tokens: np.ndarray,
    num_prompt_tokens: int,
    remaps: _Remaps,
) -> tuple[BlockStory, ...]:
    history = TokenHistory(boundaries)
    history.append(tokens)
    history.segment()
    starts = {p for p in history.step_starts if p >= num_prompt_tokens} | {num_prompt_tokens}
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([t], last=i == len(tokens) - 1) for i, t in enumerate(tokens.tolist())]
    matcher = make_matcher_factory(config, size, boundaries)(num_prompt_tokens)
    matcher.append(tokens)
    matcher.ready_blocks()
    protected = matcher.protected_from()
    donors = {index: remaps.final_donor(index) for index in remaps.donors}
    blocks = []
    for index in range(-(-len(tokens) // size)):
        span = range(index * size, min((index + 1) * size, len(tokens)))
        readers = tuple(sorted(other for other, donor in donors.items() if donor == index))
        if span.start < num_prompt_tokens:
            fate = Fate.PROMPT
        elif index in donors:
            fate = Fate.SHARED
        elif index in remaps.retired:
            fate = Fate.RETIRED
        elif readers:
            fate = Fate.DONOR
        else:
            fate = Fate.PROTECTED if span.stop > protected else Fate.OWN
        blocks.append(
            BlockStory(
                index,
                fate,
                tuple(pieces[p] for p in span),
                tuple(p in starts for p in span),
                donors.get(index),
                readers,
                None if config.accept_all else remaps.distances.get(index),
                remaps.times.get(index),
                *remaps.retired.get(index, (None, None)),
            )
        )
    return tuple(blocks)


def _cut(pressure: Pressure, num_prompt_tokens: int, params: SamplingParams, num_blocks: int) -> SamplingParams:
    """The longest answer that so many blocks hold at its floor; one token if they hold none: ``submit`` refuses it."""

    def needed(new_tokens: int) -> int:
        return pressure.blocks_at_floor(num_prompt_tokens, replace(params, max_new_tokens=new_tokens))

    longest = bisect_right(range(1, params.max_new_tokens + 1), num_blocks, key=needed)
    return replace(params, max_new_tokens=max(1, longest))


def _run_full(executor: Executor, ids: list[int], params: SamplingParams) -> RequestResult:
    """The same request with the full cache."""
    handle = executor.submit(ids, params)
    executor.run_until_idle()
    return handle.result()
