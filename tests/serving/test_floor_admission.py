"""Who gets in under GUARANTEED_NO_EVICT while pages may be given up: as many as can all go on to their ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.floor_admission import FloorAdmission
from trtllm_memshare.serving.request import Phase, SamplingParams
from trtllm_memshare.serving.scheduler import GUARANTEED_NO_EVICT

SIZE = 8
TEXTS = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])


def make_executor(num_blocks: int, max_num_tokens: int = 64, most: int = 8, **changes) -> Executor:
    settings = {"need": "age", "retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500, **changes}
    runner = ReadingRunner(num_blocks, SIZE)
    executor = Executor(
        runner, make_config("pressure", **settings), TEXTS, 400, most, max_num_tokens, GUARANTEED_NO_EVICT
    )
    runner.manager = executor.manager
    return executor


def submit(executor: Executor, first: int, prompt_tokens: int, new_tokens: int, **params) -> None:
    prompt = [first, *repeating_text(first + 1000)[1:prompt_tokens]]
    executor.submit(prompt, SamplingParams(new_tokens, **params))


def test_guaranteed_no_evict_counts_what_is_held_at_each_moment():
    """Three of 27 blocks at their longest are 81. The third one gets in while the first two, which end before it has
    grown, are still there, and not before that is sure."""
    executor = make_executor(60)
    for first in range(4, 7):
        submit(executor, first, 16, 200, memshare=False)
    in_flight, used = [], []
    while executor.has_work:
        executor.step()
        executor.manager.check_integrity()
        in_flight.append(executor.status().num_active)
        used.append(executor.manager.pool.num_used)
    assert executor.stats.num_pauses == 0
    assert in_flight[:100] == [2] * 100
    assert 3 in in_flight
    assert 54 < max(used) <= 60


@pytest.mark.parametrize("seed", range(8))
def test_nobody_is_paused_however_long_contexts_take(seed):
    """A step has room for a few tokens of context, so requests begin to write long after they were let in."""
    rng = np.random.default_rng(seed)
    executor = make_executor(70, max_num_tokens=10, min_kept=float(rng.choice([0.25, 0.5, 1.0])))
    most = 0
    for _ in range(900):
        if rng.random() < 0.08 and executor.status().num_waiting < 4:
            kept = rng.choice([None, 0.5, 1.0])
            prompt, written = int(rng.integers(4, 200)), int(rng.integers(1, 190))
            submit(
                executor, int(rng.integers(4, 60)), prompt, written, min_kept=kept, memshare=bool(rng.random() < 0.7)
            )
        executor.step()
        executor.manager.check_integrity()
        most = max(most, executor.status().num_active)
    executor.run_until_idle()
    assert executor.stats.num_pauses == 0
    assert executor.stats.num_failed == 0
    assert most > 3


def make_admission(num_usable: int, given_up: dict[int, int]) -> FloorAdmission:
    """Over a cache of which nothing is known but what requests that do not generate will be without."""
    manager = SimpleNamespace(
        tokens_per_block=SIZE,
        pool=SimpleNamespace(num_usable=num_usable),
        num_given_up_for_good=lambda request_id: given_up.get(request_id, 0),
    )
    config = make_config("pressure", retired_becomes="dropped", protected_tokens=16, lookahead_tokens=8, min_kept=1.0)
    return FloorAdmission(manager, config, True)  # type: ignore[arg-type]  # that is all it reads


def in_context(request_id: int, num_tokens: int) -> SimpleNamespace:
    """A request whose prompt is two pages, before its next step."""
    return SimpleNamespace(
        request_id=request_id, tokens=[0] * num_tokens, prompt=[0] * 16, max_tokens=400, params=SamplingParams(384),
        phase=Phase.CONTEXT,
    )  # fmt: skip


def test_a_paused_request_needs_no_room_for_what_it_gave_up_below_its_floor():
    """20 pages of text and one to come, of which 5 went as repeats; beside a prompt of 2 and one to come."""
    needed = 20 + 1 - 5 + 2 + 1
    paused, other = in_context(1, 160), in_context(2, 16)
    assert make_admission(needed, {1: 5}).fits(paused, [other], False)
    assert not make_admission(needed - 1, {1: 5}).fits(paused, [other], False)
    assert not make_admission(needed, {}).fits(paused, [other], False)


def test_who_was_refused_gets_in_as_soon_as_another_one_has_ended():
    admission = make_admission(40, {})
    waiting, running = in_context(1, 96), [in_context(2, 96), in_context(3, 160)]
    assert not admission.fits(waiting, running, False)
    assert not admission.fits(waiting, running, False)
    assert admission.fits(waiting, running[:1], False)
