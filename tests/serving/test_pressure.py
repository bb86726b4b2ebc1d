"""Pressure on the bundled model and on a runner without one: room, floors, admission, statistics, settings."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from effective_settings import make_effective
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text

from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.episodes import QUIET_STEPS
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.scheduler import GUARANTEED_NO_EVICT, MAX_UTILIZATION

SIZE = 8
TEXTS = BoundaryTokens.from_texts(["a", "b", "\n", ". ", *(f"w{i}" for i in range(VOCAB_SIZE - 4))])
QUICK = {"need": "age", "retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500}


def make_executor(num_blocks, policy=MAX_UTILIZATION, most=8, depends_on_reads=False, **changes):
    runner = ReadingRunner(num_blocks, SIZE, depends_on_reads)
    executor = Executor(runner, make_config("pressure", **{**QUICK, **changes}), TEXTS, 320, most, 64, policy)
    runner.manager = executor.manager
    return executor


def submit(executor, count, new_tokens=200, prompt_tokens=16, **params):
    prompts = [[first, *repeating_text(first + 1000)[1:prompt_tokens]] for first in range(4, 4 + count)]
    return [executor.submit(p, SamplingParams(new_tokens, **params)) for p in prompts]


def test_with_room_tokens_are_those_of_the_full_cache():
    outputs = []
    for preset, changes in (("off", {}), ("pressure", QUICK)):
        runner = ReadingRunner(400, SIZE, depends_on_reads=True)
        executor = Executor(runner, make_config(preset, **changes), TEXTS, 320, 8, 64)
        handles = submit(executor, 6)
        executor.run_until_idle()
        outputs.append([h.result(0).token_ids for h in handles])
    assert outputs[0] == outputs[1]
    assert executor.pressure.episodes.num == 0
    assert executor.pressure.stats.retired_pages == {"repeated": 0, "needed_least": 0}


def test_nobody_is_paused_where_floors_fit(caplog):
    """Six requests of 27 blocks over 90: the full cache pauses, pressure ends with all of them at 15 or so."""
    full = Executor(ReadingRunner(110, SIZE), make_config("off"), TEXTS, 320, 8, 64)
    submit(full, 6)
    full.run_until_idle()
    assert full.stats.num_pauses > 0
    executor = make_executor(110)
    handles = submit(executor, 6)
    saved = []
    with caplog.at_level(logging.INFO, "trtllm_memshare.pressure"):
        while executor.has_work:
            executor.step()
            executor.manager.check_integrity()
            saved.append(executor.status().pressure)
    assert executor.stats.num_pauses == 0
    for handle, first in zip(handles, range(4, 10), strict=True):
        assert handle.result(0).token_ids == repeating_text(first)[16:216]
        record = handle.result(0).stats.sharing
        assert 0 < record.retired_blocks <= record.generated_blocks / 2
    assert max(s.retired_now for s in saved) > 20
    assert saved[-1].retired_now == 0
    assert saved[-1].retired_pages["needed_least"] == sum(h.result(0).stats.sharing.retired_blocks for h in handles)
    begins, ends = (json.loads(r.message) for r in caplog.records)  # several reliefs, one episode
    assert (begins["event"], begins["max_blocks"], begins["running"]) == ("pressure_begins", 110, 6)
    assert ends == {
        "event": "pressure_ends",
        "used_blocks": 0,
        "max_blocks": 110,
        "retired_pages": saved[-1].retired_pages["needed_least"],
    }
    assert saved[-1].num_episodes == 1
    assert not saved[-1].is_active


def test_pressure_ends_though_requests_wait_that_the_batch_size_keeps_out():
    executor = make_executor(40, most=2)
    submit(executor, 2)
    for _ in range(4):
        submit(executor, 50, new_tokens=4)
    was_active, active_with_room = False, 0
    while executor.has_work:
        executor.step()
        status = executor.status()
        was_active |= status.pressure.is_active
        active_with_room += status.pressure.is_active and status.num_waiting > 0 and status.used_blocks < 20
    assert was_active
    assert 0 < active_with_room <= QUIET_STEPS


@pytest.mark.parametrize("how", ["length", "cancelled", "failed"])
def test_pressure_is_over_when_the_last_request_has_ended_however_it_does(how):
    """No step follows that could see it."""
    executor = make_executor(40)
    handles = submit(executor, 3)
    while not executor.status().pressure.is_active:
        executor.step()
    if how == "cancelled":
        for handle in handles:
            handle.cancel()
    if how == "failed":
        executor._runner.step = lambda batch: 1 / 0
    executor.run_until_idle()
    status = executor.status()
    assert (status.num_active, status.used_blocks, status.pressure.is_active) == (0, 0, False)
    assert status.pressure.num_episodes == 1


def test_guaranteed_no_evict_admits_by_floors_and_pauses_nobody():
    steps = []
    for kept in (1.0, 0.5, 0.25):
        executor = make_executor(90, GUARANTEED_NO_EVICT, min_kept=kept)
        submit(executor, 8)
        while executor.has_work:
            executor.step()
            executor.manager.check_integrity()
        assert executor.stats.num_pauses == 0
        steps.append(executor.stats.num_steps)
    assert steps[0] > steps[1] > steps[2]


def test_requests_may_be_longer_than_the_pool_that_holds_them_at_their_floors():
    """216 tokens are 27 blocks; at the floor 2 of prompt, 13 of 25 generated ones and the one that is written."""
    full = Executor(ReadingRunner(16, SIZE), make_config("off"), TEXTS, 320, 8, 64)
    with pytest.raises(UserError, match="216 tokens need 27 blocks of 8, the pool has 16"):
        submit(full, 1)
    with pytest.raises(UserError, match=r"216 tokens need 16 blocks of 8 at their floor, .*has 15 .*blocks 16 or more"):
        submit(make_executor(15), 1)
    with pytest.raises(UserError, match="216 tokens need 27 blocks of 8 at their floor"):
        submit(make_executor(16), 1, memshare=False)
    executor = make_executor(16)
    handles = submit(executor, 3)
    for _ in range(2000):
        executor.step()
        executor.manager.check_integrity()
    assert not executor.has_work
    for handle, first in zip(handles, range(4, 7), strict=True):
        assert handle.result(0).token_ids == repeating_text(first)[16:216]


def test_a_waiting_request_is_admitted_on_pages_that_others_give_up():
    executor = make_executor(60, high_watermark=1.0, low_watermark=1.0, lookahead_tokens=1)
    first = submit(executor, 2, new_tokens=250)
    for _ in range(150):
        executor.step()
    assert executor.pressure.episodes.num == 0
    waiting = submit(executor, 2, new_tokens=40, prompt_tokens=96)
    while not executor.pressure.stats.num_admitted and executor.has_work:
        executor.step()
    executor.run_until_idle()
    assert executor.pressure.stats.num_admitted >= 1
    assert executor.stats.num_pauses == 0
    assert all(len(h.result(0).token_ids) for h in [*first, *waiting])


@pytest.mark.parametrize(("lookahead", "running"), [(1, 4), (128, 3), (1000, 2)])
def test_admission_looks_some_tokens_ahead(lookahead, running):
    """At their floors requests hold 11 blocks with 128 generated tokens, 16 at their ends."""
    executor = make_executor(38, min_kept=0.5, protected_tokens=16, lookahead_tokens=lookahead)
    submit(executor, 4, new_tokens=200)
    for _ in range(100):
        executor.step()
    assert len(executor._scheduler.running) == running


@pytest.mark.parametrize("own", [{"min_kept": 1.0}, {"memshare": False}])
def test_a_request_can_keep_all_of_its_pages(own):
    executor = make_executor(110)
    handles = submit(executor, 5)
    [whole] = submit(executor, 1, **own)
    executor.run_until_idle()
    assert whole.result(0).stats.sharing.retired_blocks == 0
    assert sum(h.result(0).stats.sharing.retired_blocks for h in handles) > 0


def test_a_request_may_keep_less_than_the_others():
    executor = make_executor(110, min_kept=0.9)
    [small] = submit(executor, 1, min_kept=0.2)
    handles = submit(executor, 5)
    executor.run_until_idle()
    assert small.result(0).stats.sharing.retired_blocks > max(h.result(0).stats.sharing.retired_blocks for h in handles)


def test_exact_repeats_go_first():
    executor = make_executor(110, min_run_tokens=8, shingle_tokens=4)
    watched = []
    executor.pressure.watch = watched.append
    submit(executor, 6)
    executor.run_until_idle()
    assert watched[0].repeated.all()
    stats = executor.pressure.stats.retired_pages
    assert stats["repeated"] > 0
    assert sum(int(r.repeated.sum()) for r in watched) == stats["repeated"]


def test_what_stands_again_lets_others_in():
    """Admission counts what is gone, and what may go whatever the floor."""
    in_flight = {}
    for run in (8, 500):
        executor = make_executor(60, min_run_tokens=run, shingle_tokens=4, min_kept=1.0, lookahead_tokens=16)
        submit(executor, 6)
        in_flight[run] = []
        while executor.has_work:
            executor.step()
            executor.manager.check_integrity()
            in_flight[run].append(executor.status().num_active)
        assert executor.pressure.stats.retired_pages["needed_least"] == 0
    assert np.mean(in_flight[8]) > 1.1 * np.mean(in_flight[500])


def test_a_request_that_comes_back_takes_what_it_held():
    executor = make_executor(110)
    submit(executor, 6)
    while executor.status().pressure.retired_now < 20:
        executor.step()
    scheduler, manager = executor._scheduler, executor.manager
    state = max(scheduler.running, key=lambda s: manager.page_counts(s.request_id)[1])
    held, free = manager.logical_blocks(state.request_id), manager.num_free_blocks
    retired = manager.page_counts(state.request_id)[1]
    assert retired > 0
    scheduler._pause(state)
    assert manager.num_free_blocks == free + held - retired
    assert manager.blocks_to_add(state.request_id, len(state.tokens)) <= held - retired + 1
    executor.run_until_idle()
    assert executor.status().pressure.retired_pages["resumed"] == retired


@pytest.mark.parametrize("need", ["attention-redundancy", "attention-redundancy-recency"])
def test_a_need_that_reads_attention_is_served_where_pytorch_attends(bundled_model, boundaries, prompts, need):
    runner = TorchRunner(load_model(bundled_model), 40, 16)
    config = make_config("pressure", need=need, retired_becomes="dropped", protected_tokens=64, min_run_tokens=500)
    executor = Executor(runner, config, boundaries, 2304)
    executor.submit(prompts[0], SamplingParams(500))
    executor.submit(prompts[1], SamplingParams(500))
    for _ in range(450):
        executor.step()
    assert executor.pressure.stats.retired_pages["needed_least"] > 0
    assert executor.last_batch.observe_attention


def test_the_bundled_model_answers_with_less_memory(bundled_model, boundaries, prompts):
    model, answers = load_model(bundled_model), []
    for preset, changes in (("off", {}), ("pressure", {"retired_becomes": "dropped", "protected_tokens": 64})):
        runner = TorchRunner(model, 100, 16)
        executor = Executor(runner, make_config(preset, **changes), boundaries, 2304)
        handles = [executor.submit(p, SamplingParams(800, stop_token_ids=(1,))) for p in prompts[:4]]
        executor.run_until_idle()
        answers.append([h.result(0).token_ids[-8:] for h in handles])
        pauses = executor.stats.num_pauses
        if preset == "off":
            assert pauses > 0
    assert pauses == 0
    assert sum(executor.pressure.stats.retired_pages.values()) > 20
    assert sum(a == b for a, b in zip(*answers, strict=True)) >= 3


PAPER = {"need": "nearest-earlier", "retired_becomes": "alias"}


def paper_executor(num_blocks, **changes):
    runner = ReadingRunner(num_blocks, SIZE, shows_pool=True)
    executor = Executor(runner, make_effective("pressure", **{**QUICK, **PAPER, **changes}), TEXTS, 320, 8, 64)
    runner.manager = executor.manager
    return executor


def test_the_papers_pages_become_aliases_and_nobody_is_paused():
    executor = paper_executor(110, max_aliases=4)
    handles, pauses_before_a_resume, most = submit(executor, 6), executor.stats.num_pauses, 0
    while executor.has_work:
        executor.step()
        executor.manager.check_integrity()
        most = max(most, executor.manager.stats().aliased_entries)
    assert executor.stats.num_pauses == pauses_before_a_resume == 0
    assert most > 20
    cache = executor.manager.stats()
    assert cache.shared > 5 * cache.forgotten  # those without a donor go only where somebody would be paused
    assert executor.pressure.stats.retired_pages == {"repeated": 0, "needed_least": cache.shared + cache.forgotten}
    for handle in handles:
        record = handle.result(0).stats.sharing
        assert 0 < record.retired_blocks <= record.generated_blocks / 2


def test_a_page_without_a_donor_goes_only_where_somebody_would_be_paused():
    """One block serves two entries: half of the pages stay, whatever the floor says."""
    executor = paper_executor(100, max_aliases=2, min_kept=0.0, protected_tokens=SIZE)
    submit(executor, 1)
    while not executor.manager.page_counts(0)[0] >= 12:
        executor.step()
    running = executor._scheduler.running
    assert not executor.pressure.free_for_waiting(9, running)
    assert executor.pressure.free_for_waiting(5, running)
    assert (executor.manager.stats().shared, executor.manager.stats().forgotten) == (5, 0)
    assert executor.pressure.free_for_running(4, running)
    assert executor.manager.stats().forgotten == 4
    executor.manager.check_integrity()


def test_a_request_that_comes_back_reads_the_same_pages_in_place_of_others():
    executor = paper_executor(110)
    submit(executor, 6)
    while executor.manager.stats().aliased_entries < 30:
        executor.step()
    scheduler, manager = executor._scheduler, executor.manager
    state = max(scheduler.running, key=lambda s: manager.page_counts(s.request_id)[1])
    before = manager._sequences[state.request_id].donors.copy()
    assert len(before) > 3
    scheduler._pause(state)
    while state.request_id not in manager._sequences or not manager._sequences[state.request_id].is_generating:
        executor.step()
        manager.check_integrity()
    table, after = manager.block_table(state.request_id), manager._sequences[state.request_id].donors
    assert before.keys() <= after.keys()
    assert all(table[page] == table[donor] for page, donor in before.items())
    executor.run_until_idle()


def test_what_cannot_be_served_is_refused():
    runner = ReadingRunner(60, SIZE)
    with pytest.raises(UserError, match="does not show its pool"):
        Executor(runner, make_config("pressure"), TEXTS, 320)
    with pytest.raises(UserError, match="low_watermark must not be above"):
        make_config("pressure", high_watermark=0.5)
    with pytest.raises(UserError, match="preset pressure"):
        make_config("aligned", pressure=True)
    with pytest.raises(UserError, match=r"shadow changes nothing, .*got both"):
        make_executor(60, shadow=True)
    with pytest.raises(UserError, match=r"search_interval is not read under pressure.*got 3"):
        make_executor(60, search_interval=3)
    for name, value in (("matcher", "steps"), ("max_gap_tokens", 2), ("direction", "keep-earliest")):
        with pytest.raises(UserError, match=f"word for word and later.*got {name} {value}"):
            make_config("pressure", **{name: value})
    with pytest.raises(UserError, match="retired_becomes alias with need surprisal-led-redundancy-recency"):
        make_config("pressure", retired_becomes="alias")
    paper = make_config("pressure", need="nearest-earlier", retired_becomes="alias")
    with pytest.raises(UserError, match="need nearest-earlier reads K and V of pages, got a runner that does not show"):
        Executor(runner, paper, TEXTS, 320)
    runner = ReadingRunner(60, SIZE, shows_pool=True)
    runner.skips_entries = False
    with pytest.raises(UserError, match="finds no donor is forgotten, which needs an engine with null pages"):
        Executor(runner, paper, TEXTS, 320)
    with pytest.raises(UserError, match="got several ranks that hold parts of them"):
        Executor(ReadingRunner(60, SIZE, shows_pool=True), paper, TEXTS, 320, agreement=RankAgreement(None, 2))
    reads_attention = make_config("pressure", need="attention-redundancy")
    with pytest.raises(UserError, match="need attention-redundancy reads attention, got a runner whose kernels do not"):
        Executor(ReadingRunner(60, SIZE, shows_pool=True), reads_attention, TEXTS, 320)


@pytest.mark.parametrize("find_repeats", [True, False])
def test_what_is_protected_by_steps_is_known_up_to_the_newest_token(find_repeats):
    changes = {"protected_tokens": 0, "protected_steps": 2, "max_protected_tokens": 48, "min_run_tokens": 8}
    executor, most = make_executor(200, **changes), 0
    (handle,) = submit(executor, 1, new_tokens=150)
    for _ in range(140):
        executor.step()
        found = executor.manager.givable_pages(handle.request_id, find_repeats).pages.tolist()
        executor.manager.match(handle.request_id)
        assert executor.manager.givable_pages(handle.request_id, find_repeats).pages.tolist() == found
        most = max(most, len(found))
    assert most > 8
