"""What stage 1 must not lose: memory stays flat in loops that nobody needs, and a pause costs no sharing.

Values of the loops and of the pause are those of a review; before it the loop of one token took 22, 53 and 84 blocks,
since protection by whole steps held all of a step that never ends.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes.counting_runner import CountingRunner
from fakes.reading_runner import repeating_text
from nightly import only_nightly

from trtllm_memshare.cache.offsets import decode_block_offsets
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestHandle, SamplingParams

WORDS = BoundaryTokens.from_texts([*(f" w{i}" for i in range(79)), "."])
END = 79  # the full stop
SENTENCES = [*range(1, 12), END, *range(20, 29), END, *range(40, 48), END]
ORDINARY = np.random.default_rng(0).integers(0, 79, 200).tolist()
LENGTHS = (500, 1000, 1500)


def make(preset: str, text: list[int], **settings) -> tuple[Executor, RequestHandle]:
    """An executor with one request, which writes a text."""
    sampler = ReplaySampler()
    config = make_config(preset, **settings)
    executor = Executor(CountingRunner(), config, WORDS, 2000, sampler=sampler)  # type: ignore[arg-type]
    handle = executor.submit([5], SamplingParams(len(text)))
    sampler.add_script(handle.request_id, text)
    return executor, handle


def blocks_in_use(text: list[int], preset: str) -> list[int]:
    """Once the request has so many tokens."""
    executor, _ = make(preset, text)
    found = []
    while executor.has_work:
        executor.step()
        running = executor._scheduler.running
        if running and len(running[0].tokens) - 1 in LENGTHS:
            found.append(executor.manager.pool.num_used)
    return found


@pytest.mark.parametrize(
    ("preset", "text", "blocks"),
    [
        ("off", SENTENCES * 60, [32, 63, 94]),
        ("lexical", SENTENCES * 60, [8, 12, 16]),
        ("lexical", ORDINARY + [20] * 1400, [30, 34, 38]),  # 13 of ordinary text, 16 that are protected
    ],
    ids=["full cache", "sentences", "one token for ever"],
)
def test_memory_in_a_loop(preset, text, blocks):
    assert blocks_in_use(text[:1508], preset) == blocks


@pytest.mark.parametrize("pauses", [(), (90, 130, 250)])
def test_a_pause_costs_no_sharing(pauses):
    """Stage 1 was one token behind after every pause, and looked for repeats at the wrong places."""
    text = repeating_text(4)[:700]
    settings = {"protected_tokens": 16, "protected_steps": 0, "min_run_tokens": 16, "search_interval": 1}
    executor, handle = make("lexical", text, **settings)
    left, used = list(pauses), 0
    while executor.has_work:
        running = executor._scheduler.running
        if left and running and running[0].num_computed >= left[0]:
            executor._scheduler._pause(running[0])
            del left[0]
        executor.step()
        used = executor.manager.pool.num_used or used
    assert handle.result(0).stats.num_pauses == len(pauses)
    assert used == 19  # of 44


class RowTokens(TorchRunner):
    """Knows which token was written to each row of the pool."""

    def prepare(self, batch):
        tables = decode_block_offsets(batch.block_offsets, self.num_layers)
        first = 0
        for table, chunk, length in zip(tables, batch.chunk_lengths, batch.sequence_lengths, strict=True):
            positions = np.arange(length - chunk, length)
            rows = table[positions // self.tokens_per_block] * self.tokens_per_block + positions % self.tokens_per_block
            self.__dict__.setdefault("tokens", {}).update(zip(rows.tolist(), batch.input_ids[first:], strict=False))
            first += chunk
        return super().prepare(batch)


@only_nightly
@pytest.mark.parametrize("preset", ["lexical", "aligned"])
def test_forty_problems_in_three_hundred_blocks(bundled_model, boundaries, prompts, preset, monkeypatch):
    """The review's run: with the fault up to 19 % of the remaps named rows of other tokens."""
    runner = RowTokens(load_model(bundled_model), 300, 16)
    executor = Executor(runner, make_config(preset), boundaries, 2304)
    apply, num_remaps = executor.manager.apply, 0

    def watched(decisions):
        nonlocal num_remaps
        for decision in decisions:
            rows = zip(decision.candidate.retired_rows.tolist(), decision.candidate.kept_rows.tolist(), strict=True)
            assert all(runner.tokens[a] == runner.tokens[b] for a, b in rows)
            num_remaps += 1
        return apply(decisions)

    monkeypatch.setattr(executor.manager, "apply", watched)
    handles = [executor.submit(prompt, SamplingParams(2000, stop_token_ids=(1,))) for prompt in prompts[:40]]
    executor.run_until_idle()
    assert executor.stats.num_pauses > 0
    assert num_remaps > 300
    assert executor.manager.stats().shared_block_fraction > 0.35
    assert sum(h.result(0).finish_reason == "stop" for h in handles) >= 38
