"""Random schedules of the whole executor under pressure: floors, null entries, watermarks and resumes hold throughout.

A page below a floor is looked up in the request's tokens, word by word, whatever the product says of it: its text comes
again whole, cut short, in pieces or nearly, and copies go before what they are copies of.

About 5,000 operations in an ordinary run; ``MEMSHARE_SCHEDULE_OPERATIONS=100000`` for a long one.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import hypothesis
import numpy as np
import pytest
from effective_settings import make_effective
from fakes.later_copies import copies, stand_again
from fakes.reading_runner import MAX_TOKENS, RARE, VOCAB_SIZE, ReadingRunner, patchwork_text
from fakes.schedule_record import ScheduleRecord, counts_of
from fakes.wrong_repeats import always, if_one_copy_is_kept, whether_or_not_copies_are_kept
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from nightly import NIGHTLY

from trtllm_memshare.cache import givable
from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving import pressure
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import Phase, SamplingParams
from trtllm_memshare.serving.scheduler import GUARANTEED_NO_EVICT, POLICIES

SIZE = 8
MAX_LEN = 40 * SIZE
BOUNDARIES = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])
OPERATIONS = int(os.environ.get("MEMSHARE_SCHEDULE_OPERATIONS", "5000"))
_READ_THE_POOL = ("surprisal-led-redundancy-recency", "redundancy", "redundancy-recency", "nearest-earlier")
_NEEDS = ("age", "random", "surprisal", *_READ_THE_POOL[:3])
MOST_REQUESTS = 6
OPERATIONS_AN_EXAMPLE = 500
"""Steps of the executor, for the most part: every request is followed to its end."""
RECORD = ScheduleRecord("tests/serving/test_pressure_schedules.py", f"MEMSHARE_SCHEDULE_OPERATIONS={OPERATIONS}")


class PressureMachine(RuleBasedStateMachine):
    """Submits, steps, cancels and pauses in any order, over pools of any tightness."""

    needs = _NEEDS
    record: ScheduleRecord | None = RECORD

    @initialize(data=st.data())
    def start(self, data):
        def draw(*choices):
            return data.draw(st.sampled_from(choices))

        need = draw(*self.needs)
        self.becomes = draw("null", "dropped") if need != "nearest-earlier" else draw("alias", "alias", "null")
        high = draw(0.7, 0.9, 1.0, 1.0)
        self.config = make_effective(
            "pressure",
            retired_becomes=self.becomes,
            need=need,
            max_aliases=draw(2, 4, 8),
            spread=draw("need", "longest", "equal"),
            min_kept=draw(0.5, 0.75, 0.25, 0.75, 0.5, 0.0, 1.0),
            high_watermark=high,
            low_watermark=min(high, draw(0.5, 0.7, 0.9)),
            protected_tokens=draw(0, 4, 16),
            protected_steps=draw(0, 2),
            max_protected_tokens=draw(16, 48),
            lookahead_tokens=draw(1, 16, 128),
            min_run_tokens=draw(4, 8),
            shingle_tokens=4,
        )
        unit, most = draw(1, 1, SIZE), data.draw(st.integers(2, 6))
        num_blocks = data.draw(st.integers(26, 60))  # a request alone may be longer than the pool
        runner = ReadingRunner(
            num_blocks, SIZE, chunk_unit_size=unit, shows_pool=need in _READ_THE_POOL, text_of=patchwork_text
        )
        if draw(self.becomes == "null", self.becomes != "dropped"):
            runner.null_pages = NullPages([0, 1], [0, MAX_LEN // 2, MAX_LEN])
        self.policy = draw(*POLICIES)
        self.executor = Executor(
            runner, self.config, BOUNDARIES, MAX_LEN, most, data.draw(st.integers(max(most, 2 * unit), 40)), self.policy
        )
        self.manager = runner.manager = self.executor.manager
        self.pressure = self.executor.pressure
        self.scheduler = self.executor._scheduler
        self.requests, self.held_at_pause, self.retired_at_pause = {}, {}, {}
        self.standing = {}  # by request: when it was looked at, and how many pages that went stand again
        self.counts = Counter(below_floor=0, asked=0, copies_went=0)
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch.object(givable, "stands_again", self.counted(givable.stands_again)))
        if need != "nearest-earlier" and draw(True, True, False):  # copies, then, before what they are copies of
            self.patches.enter_context(mock.patch.object(pressure, "page_need", lambda _, facts: -facts.position))
        self.is_forced = False
        self.pressure.watch = self.check_retirement
        self._watch_pauses()

    def _watch_pauses(self):
        pause = self.scheduler._pause

        def watched(state):
            if not self.is_forced:
                assert self.policy != GUARANTEED_NO_EVICT, "paused although its floor was reserved"
                for other in self.scheduler.running:
                    assert not self.pages_above_floor(other), "paused while a request was above its floor"
            sequence = self.manager._sequences[state.request_id]
            self.held_at_pause[state.request_id] = self.blocks_held(state.request_id)
            self.retired_at_pause[state.request_id] = set(
                np.flatnonzero(sequence.retired | sequence.to_retire).tolist()
            )
            pause(state)

        self.scheduler._pause = watched

    def counted(self, stands_again):
        """The product's own answer, and how often it is no because copies have gone."""

        def ask(matcher, page, size, num_computed, is_gone):
            answer = stands_again(matcher, page, size, num_computed, is_gone)
            went = not answer and stands_again(matcher, page, size, num_computed, lambda t: t < 0)
            self.counts.update(asked=1, copies_went=went)
            return answer

        return ask

    # What the rules of the method say, worked out anew from the tables.

    def min_kept(self, state):
        if not state.params.memshare:
            return 1.0
        return self.config.min_kept if state.params.min_kept is None else state.params.min_kept

    def blocks_held(self, request_id):
        table = self.manager.block_table(request_id)
        return len(np.unique(table[(table >= 0) & ~self.manager.pool.is_null[table]]))

    def floor(self, state, num_generated):
        return math.ceil(self.min_kept(state) * num_generated - 1e-9)

    def pages_above_floor(self, state):
        """How many pages a request could give up by the method's rules."""
        if state.phase is not Phase.GENERATION or not state.params.memshare:
            return 0
        sequence = self.manager._sequences[state.request_id]
        first, full = sequence.first_generated_block, sequence.num_computed // SIZE
        kept = [p for p in range(first, full) if not sequence.retired[p]]
        self.manager.match(state.request_id)
        end = min(sequence.matcher.protected_from(), sequence.num_computed) // SIZE
        above = min(len([p for p in kept if p < end]), len(kept) - self.floor(state, max(0, full - first)))
        if self.config.need == "nearest-earlier":  # the published choice knows no repeats
            return max(0, above)
        return max(above, int(self.manager.givable_pages(state.request_id).repeated.sum()))

    def standing_pages(self, state, sequence):
        """Pages that went and stand again, word for word and later, in what is kept: by the tokens alone."""
        if self.config.need == "nearest-earlier":  # the published choice knows no repeats
            return set()
        tokens, gone = state.tokens[: sequence.num_computed], np.flatnonzero(sequence.retired)
        is_kept = ~np.isin(np.arange(len(tokens)) // SIZE, gone)
        found = stand_again(copies(tokens, self.config.min_run_tokens), is_kept)
        return {page for page in gone.tolist() if found[page * SIZE : (page + 1) * SIZE].all()}

    def check_retirement(self, retirement):
        state = self.requests[retirement.request_id][0]
        sequence = self.manager._sequences[retirement.request_id]
        assert state.params.memshare
        assert state.phase is Phase.GENERATION
        first, full = sequence.first_generated_block, sequence.num_computed // SIZE
        assert retirement.pages.min() >= first, "a prompt page went"
        recent = sequence.num_computed + 1 - self.config.protected_tokens
        assert (retirement.pages.max() + 1) * SIZE <= max(recent, first * SIZE), "a protected page went"
        there = [p for p in range(first, full) if not sequence.retired[p]]
        if len(there) < self.floor(state, full - first):
            assert retirement.repeated.all(), "a page that was not found again went below the floor"
            lost = set(retirement.pages.tolist()) - self.standing_pages(state, sequence)
            assert not lost, f"pages {lost} went below the floor, and their text stands nowhere in what is kept"
            self.counts["below_floor"] += len(retirement.pages)
        assert self.manager.pool.num_free > 0

    # Rules.

    @precondition(lambda self: len(self.requests) < MOST_REQUESTS)
    @rule(
        data=st.data(),
        min_kept=st.sampled_from([None, None, 0.9, 0.1]),
        shares=st.sampled_from([True, True, True, False]),
    )
    def submit(self, data, min_kept, shares):
        first = data.draw(st.integers(4, 12))
        prompt = [first, *patchwork_text(first + 1000)[1 : data.draw(st.integers(1, 60))]]
        new = data.draw(st.sampled_from([1, 60, 200, MAX_LEN, MAX_LEN]))
        stop = data.draw(st.sampled_from([(), (), (RARE,)]))
        params = SamplingParams(
            min(new, MAX_LEN - len(prompt)), stop_token_ids=stop, min_kept=min_kept, memshare=shares
        )
        self.submit_request(prompt, params)

    def submit_request(self, prompt, params):
        try:
            handle = self.executor.submit(prompt, params)
        except UserError:
            assert len(prompt) + params.max_new_tokens > self.manager.pool.num_usable * SIZE - 2 * SIZE
            return
        self.requests[handle.request_id] = (self.executor._submitted[-1], prompt, handle)

    @rule(count=st.integers(1, 15))
    def step(self, count):
        for _ in range(count):
            self.executor.step()
            self.check()

    @precondition(lambda self: len(self.requests) < MOST_REQUESTS)
    @rule(count=st.integers(1, 4))
    def burst(self, count):
        for first in range(4, 4 + count):
            prompt = [first, *patchwork_text(first + 1000)[1:20]]
            self.submit_request(prompt, SamplingParams(MAX_LEN - 20))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.requests[data.draw(st.sampled_from(sorted(self.requests)))][2].cancel()

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def pause(self, data):
        state = data.draw(st.sampled_from(range(len(self.scheduler.running))))
        self.is_forced = True
        self.scheduler._pause(self.scheduler.running[state])
        self.is_forced = False
        self.check()

    def check(self):
        manager, pool = self.manager, self.manager.pool
        manager.check_integrity()
        assert {s.request_id for s in self.scheduler.running} == set(manager._sequences)
        for state in self.scheduler.running:
            sequence = manager._sequences[state.request_id]
            seen = sequence.matcher.num_tokens + len(sequence.unmatched) if sequence.matcher else None
            known = max(sequence.num_tokens, sequence.num_context_tokens)
            assert seen is None or seen == known
            if sequence.matcher:
                stage_1 = sequence.matcher.tokens(0, sequence.matcher.num_tokens).tolist() + sequence.unmatched
                assert stage_1 == state.tokens[:known]
            table = manager.block_table(state.request_id)
            gone = (table < 0) | pool.is_null[table]
            assert not gone[: sequence.first_generated_block].any(), "a prompt page is gone"
            donors = {p: d for p, d in sequence.donors.items() if sequence.retired[p]}
            assert not donors or self.becomes == "alias"
            assert all(table[p] == table[d] and not sequence.retired[d] and d < p for p, d in donors.items())
            assert all(1 + list(donors.values()).count(d) <= self.config.max_aliases for d in donors.values())
            gone[list(donors)] = True
            assert (gone == sequence.retired[: len(table)]).all()
            full = max(sequence.first_generated_block, sequence.num_computed // SIZE)
            kept = int((~sequence.retired[sequence.first_generated_block : full]).sum())
            missing = self.floor(state, full - sequence.first_generated_block) - kept
            if sequence.is_generating and missing > 0:
                # Looked for when pages go: text that comes later only adds copies.
                now = sequence.epoch, int(sequence.retired.sum())
                if self.standing.get(state.request_id, (None, 0))[0] != now:
                    self.standing[state.request_id] = now, len(self.standing_pages(state, sequence))
                assert self.standing[state.request_id][1] >= missing, "below the floor"
            if state.request_id in self.held_at_pause:
                self.check_return(state, sequence)

    def check_return(self, state, sequence):
        """A request that came back: as large as it was, and what it had given up is gone once it is computed."""
        held, retired = self.held_at_pause[state.request_id], self.retired_at_pause[state.request_id]
        if sequence.num_computed < sequence.num_context_tokens:
            # The token that had no room, and a block that was taken for it.
            assert self.blocks_held(state.request_id) <= held + 1
        elif sequence.num_context_tokens:
            assert retired <= set(np.flatnonzero(sequence.retired).tolist())
            del self.held_at_pause[state.request_id], self.retired_at_pause[state.request_id]

    def teardown(self):
        if hasattr(self, "patches"):
            with self.patches:
                self.run_to_the_end()

    def run_to_the_end(self):
        progress, idle = None, 0
        while self.executor.has_work:
            states = [*self.scheduler.running, *self.scheduler.waiting]
            now = sum(len(s.tokens) for s in states), self.executor.stats.num_finished
            idle = idle + 1 if now == progress else 0
            progress = now
            assert idle < 400, "no progress for 400 steps"
            self.executor.step()
            self.check()
        assert self.manager.pool.num_used == 0
        assert not self.manager._parked
        for state, prompt, handle in self.requests.values():
            result = handle.result(0)
            text = patchwork_text(prompt[0])
            assert result.token_ids == text[len(prompt) : len(prompt) + len(result.token_ids)]
            assert len(state.tokens) <= MAX_TOKENS
        if self.record is not None:
            self.record.add(counts_of(self.executor, len(self.requests)) | self.counts)


class PublishedChoiceMachine(PressureMachine):
    """The same with pages that go for their likeness to an earlier one, and are read there."""

    needs = ("nearest-earlier",)


def settings_for(share):
    """For this share of all operations."""
    return settings(
        max_examples=max(1, round(share * OPERATIONS / OPERATIONS_AN_EXAMPLE)),
        stateful_step_count=40,
        deadline=None,
        derandomize=not NIGHTLY,  # other schedules every night
        suppress_health_check=list(HealthCheck),
    )


PressureMachine.TestCase.settings, PublishedChoiceMachine.TestCase.settings = settings_for(0.8), settings_for(0.2)
TestPressureMachine, TestPublishedChoiceMachine = PressureMachine.TestCase, PublishedChoiceMachine.TestCase


@pytest.mark.parametrize("wrong", [always, whether_or_not_copies_are_kept, if_one_copy_is_kept])
def test_a_wrong_answer_is_seen(monkeypatch, wrong):
    """A test of the test above: pages go below a floor although their text stands nowhere in what is kept."""

    class Schedules(PressureMachine):
        record = None

    monkeypatch.setattr(givable, "stands_again", wrong)
    few = settings(Schedules.TestCase.settings, max_examples=20, phases=[hypothesis.Phase.generate], derandomize=True)
    with pytest.raises(AssertionError, match="below the floor"):
        run_state_machine_as_test(Schedules, settings=few)
