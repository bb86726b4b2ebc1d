"""Relief over a true stand-in of vLLM's block pool: what is retired, what never is, and what the workers are told."""

import json
import logging

import numpy as np
import pytest
from fakes.vllm_blocks import Host, Request

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.episodes import QUIET_STEPS
from trtllm_memshare.vllm import relief
from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.page_report import PageReport
from trtllm_memshare.vllm.request_options import RequestOptions
from trtllm_memshare.vllm.update import MemShareUpdate

EXACTLY = {"high_watermark": 1.0, "low_watermark": 1.0}  # as many pages go as blocks are missing


def retired(host: Host, name: str) -> list[int]:
    return [i for i, block in enumerate(host.table(name)) if block.is_null]


def test_below_the_high_watermark_nothing_is_retired() -> None:
    host = Host(42)
    request = host.add("a", 4, 38)
    update = MemShareUpdate()
    host.relief.begin_step([request], update)
    assert not update.null_entries
    assert retired(host, "a") == []


def test_relief_goes_down_to_the_low_watermark_and_oldest_first() -> None:
    host = Host(12, high_watermark=0.9, low_watermark=0.6, min_kept=0.25)
    request = host.add("a", 4, 39)  # 10 of 10 blocks
    update = MemShareUpdate()
    host.relief.begin_step([request], update)
    assert retired(host, "a") == [1, 2, 3, 4]
    assert host.blocks.num_free == 4
    null = host.blocks.null_block_ids[0]
    assert update.null_entries == {"a": dict.fromkeys([1, 2, 3, 4], null)}
    assert host.relief.totals.retired == host.relief.totals.null_entries == 4


def test_prompt_recent_and_unfinished_pages_stay_whatever_is_asked() -> None:
    host = Host(12, min_kept=0.0)
    request = host.add("a", 6, 39)  # prompt in blocks 0 and 1, 38 computed: full to block 8, last 4 tokens protected
    update = MemShareUpdate()
    assert host.relief.make_room([request], 100, update) == 6
    assert retired(host, "a") == [2, 3, 4, 5, 6, 7]


def test_no_request_goes_below_its_floor() -> None:
    host = Host(25, longest=40, min_kept=0.5)
    requests = [host.add("a", 4, 39), host.add("b", 4, 39, RequestOptions(True, 0.75)), host.add("c", 4, 13)]
    host.relief.make_room(requests, 100, MemShareUpdate())
    # 38 computed tokens are 8 full generated pages: ceil(4.0) and ceil(6.0) stay; of c's 2, one is protected.
    assert [len(retired(host, name)) for name in "abc"] == [4, 2, 1]


def pages_of_each(spread: str) -> list[int]:
    """What the longest request and the one whose pages are oldest give up of four pages."""
    host = Host(40, min_kept=0.0, spread=spread, **EXACTLY)
    requests = [host.add("long", 20, 76), host.add("old", 4, 39)]
    host.relief.make_room(requests, host.blocks.num_free + 4, MemShareUpdate())
    return [len(retired(host, name)) for name in ("long", "old")]


def test_spread_says_who_gives_first() -> None:
    assert pages_of_each("need") == [0, 4]  # of age 1 to 4, while those of the other begin at 5
    assert pages_of_each("longest") == [4, 0]
    assert pages_of_each("equal") == [3, 1]  # of the 13 and 7 that may go


def test_a_request_that_is_switched_off_keeps_everything() -> None:
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39, RequestOptions(False, 0.0))
    assert host.relief.make_room([request], 100, MemShareUpdate()) == 0
    assert retired(host, "a") == []


def test_a_shared_block_is_never_retired() -> None:
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    host.table("a")[2].ref_cnt += 1  # a second request has hit it in the prefix cache
    host.relief.make_room([request], 100, MemShareUpdate())
    assert 2 not in retired(host, "a")
    assert {1, 3, 4} <= set(retired(host, "a"))


def test_retired_blocks_leave_the_prefix_cache_and_nothing_new_enters_it() -> None:
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    for block in host.table("a"):
        block.block_hash = object()
    gone = host.table("a")[1]
    host.relief.make_room([request], 1, MemShareUpdate())
    assert gone.block_hash is None
    assert gone.ref_cnt == 0
    # vLLM caches blocks from this count on.
    assert host.manager.coordinator.single_type_managers[0].num_cached_block["a"] > 10**9


def test_exact_repeats_go_before_older_pages() -> None:
    host = Host(40, longest=60, min_kept=0.0, min_run_tokens=8, shingle_tokens=4, **EXACTLY)
    request = host.add("a", 4, 20)
    phrase = list(range(60, 72))
    host.grow(request, phrase)  # positions 20 to 31, pages 5 to 7
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    host.grow(request, phrase)
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    host.relief.make_room([request], host.blocks.num_free + 3, MemShareUpdate())
    assert retired(host, "a") == [5, 6, 7]
    assert host.relief.totals.retired_repeats == 3


def test_only_pages_that_stand_again_go_below_the_floor() -> None:
    host = Host(40, longest=60, min_kept=1.0, min_run_tokens=8, shingle_tokens=4, **EXACTLY)
    request = host.add("a", 4, 20)
    phrase = list(range(60, 72))
    host.grow(request, phrase)  # pages 5 to 7
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    host.grow(request, phrase)  # pages 11 to 13
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    host.relief.make_room([request], host.blocks.num_free + 9, MemShareUpdate())
    assert retired(host, "a") == [5, 6, 7]


def test_a_page_whose_copies_are_gone_stands_nowhere_else() -> None:
    host = Host(60, longest=90, min_kept=0.0, min_run_tokens=8, shingle_tokens=4, **EXACTLY)
    request = host.add("a", 4, 20)
    phrase = list(range(60, 72))
    for _ in range(3):
        host.grow(request, phrase)  # pages 5 to 7, 11 to 13, 17 to 19
        host.grow(request, host.draw.integers(0, 50, 12).tolist())
    pages = host.relief.pages("a")
    pages.see_tokens(request.all_token_ids)
    assert pages.repeated(request.num_computed_tokens) == {5, 6, 7, 11, 12, 13}
    pages.note_retired([11, 12, 13], {})  # those of the last copy stand for both
    assert pages.repeated(request.num_computed_tokens) == {5, 6, 7}
    pages.note_retired([18], {})
    assert pages.repeated(request.num_computed_tokens) == {5, 7}


def test_null_entries_move_when_the_newest_token_crosses_a_band() -> None:
    host = Host(13, bands=(0, 40, 1000), min_kept=0.0)
    request = host.add("a", 4, 39)
    first, second = host.blocks.null_block_ids
    host.relief.make_room([request], 1, MemShareUpdate())
    pages = retired(host, "a")
    host.relief.cross_bands("a", 39, update := MemShareUpdate())
    assert not update.null_entries
    host.relief.cross_bands("a", 40, update := MemShareUpdate())
    assert update.null_entries == {"a": dict.fromkeys(pages, second)}
    assert {host.ids("a")[page] for page in pages} == {second}
    assert first != second
    host.grow(request, [1, 2])
    update = MemShareUpdate()
    host.relief.make_room([request], host.blocks.num_free + 1, update)
    assert set(update.null_entries["a"].values()) == {second}


def back_from_preemption() -> tuple[Host, Request, list[int]]:
    """A request whose blocks are all its own again, and the pages that it had given up before."""
    host = Host(12, min_kept=0.5)
    request = host.add("a", 4, 39)
    host.relief.make_room([request], 100, MemShareUpdate())
    before = retired(host, "a")
    host.free("a")
    host.relief.lose_blocks("a")
    assert host.relief.totals.null_entries == 0
    host.give_blocks(request)
    return host, request, before


def test_what_was_retired_goes_again_after_preemption() -> None:
    host, request, before = back_from_preemption()
    update = MemShareUpdate()
    host.relief.begin_step([request], update)
    assert retired(host, "a") == before == sorted(update.null_entries["a"])


def test_all_blocks_are_free_at_the_end() -> None:
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    host.relief.make_room([request], 100, MemShareUpdate())
    host.free("a")
    host.relief.remove("a")
    assert host.blocks.num_free == host.blocks.num_blocks == 10
    assert host.relief.totals.null_entries == 0


def test_unknown_surprisal_counts_as_needed_most() -> None:
    host = Host(12, min_kept=0.0, need="surprisal", **EXACTLY)
    request = host.add("a", 4, 39)
    pages = host.relief.pages("a")
    pages.take(PageReport(surprisal=np.array([np.nan] * 5 + [1.0], np.float32)))
    pages.take(PageReport(surprisal=np.array([np.nan] * 3 + [2.0], np.float32)))
    for expected in ([5], [3, 5], [1, 3, 5]):
        host.relief.make_room([request], host.blocks.num_free + 1, MemShareUpdate())
        assert retired(host, "a") == expected
        host.manager.block_pool.get_new_blocks(host.blocks.num_free)  # somebody takes what was freed


def test_redundancy_comes_from_the_workers() -> None:
    host = Host(12, min_kept=0.0, need="redundancy", **EXACTLY)
    request = host.add("a", 4, 39)
    host.relief.pages("a").take(PageReport(redundancy=np.array([np.nan, 0.1, 0.9, 0.2], np.float32)))
    host.relief.make_room([request], host.blocks.num_free + 1, MemShareUpdate())
    assert retired(host, "a") == [2]


def test_random_pages_are_the_same_at_every_look() -> None:
    chosen = []
    for name in ("a", "a", "a-0f3c9d12", "a-b7e8451a"):  # vLLM's frontend ends ids with random digits
        host = Host(12, min_kept=0.0, need="random", control_seed=3)
        request = host.add(name, 4, 39)
        host.relief.make_room([request], 3, MemShareUpdate())
        chosen.append(retired(host, name))
    assert chosen == [chosen[0]] * 4 != [[1, 2, 3]] * 4


BEGINS = {"event": "pressure_begins", "used_blocks": 10, "max_blocks": 10, "running": 1}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """Under vLLM's own logger, whose handlers show them."""
    assert {record.name for record in caplog.records} == {"vllm.memshare"}
    return [json.loads(record.getMessage()) for record in caplog.records]


def test_lines_of_json_say_when_pressure_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.memshare")
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    host.relief.add("waits", 4, RequestOptions(True, 0.0))
    for _ in range(2):
        host.relief.begin_step([request], MemShareUpdate())
    host.free("a")
    host.relief.remove("a")
    for _ in range(QUIET_STEPS - 2):
        host.relief.begin_step([], MemShareUpdate())
    assert host.relief.episodes.is_active
    host.relief.begin_step([], MemShareUpdate())
    assert not host.relief.episodes.is_active
    ends = {"event": "pressure_ends", "used_blocks": 0, "max_blocks": 10, "retired_pages": 2}
    assert lines(caplog) == [BEGINS, ends]


def test_pressure_is_over_when_the_last_request_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM takes no step while it is idle."""
    caplog.set_level(logging.INFO, "vllm.memshare")
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    host.relief.begin_step([request], MemShareUpdate())
    host.free("a")
    host.relief.remove("a")
    assert not host.relief.episodes.is_active
    assert [line["event"] for line in lines(caplog)] == ["pressure_begins", "pressure_ends"]


PARTS = {
    "stage 1": lambda host: (host.relief.pages("a")._matcher, "ready_blocks"),
    "facts": lambda host: (host.relief.pages("a"), "facts"),
    "the choice": lambda host: (relief, "choose_pages"),
    "what is asked": lambda host: (host.relief, "_ask"),
    "blocks": lambda host: (host.blocks, "owned"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error", [MemoryError(), KeyError(3), RuntimeError("CUDA error")])
def test_an_error_leaves_relief_out_until_the_next_step(
    part: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine core would end with it, and every request."""
    host = Host(12, min_kept=0.0, need="redundancy")
    request = host.add("a", 4, 39)
    before = host.ids("a")
    holder, name = PARTS[part](host)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, lambda *_: (_ for _ in ()).throw(error))
        host.relief.begin_step([request], update := MemShareUpdate())
        patch.undo()
        assert host.relief.make_room([request], 3, update) == 0  # so vLLM preempts in this step
    assert host.ids("a") == before
    assert not update.null_entries
    assert not host.relief.episodes.is_active
    assert host.relief.faults.num == 1
    (line,) = lines(caplog)
    assert (line["event"], str(line["error"]).partition(":")[0]) == ("relief_failed", type(error).__name__)
    host.relief.begin_step([request], update)
    assert len(retired(host, "a")) == len(update.null_entries["a"]) == 2


def test_an_error_before_a_request_gives_up_again_what_it_had_given_up_is_made_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, request, before = back_from_preemption()
    with monkeypatch.context() as patch:
        patch.setattr(host.blocks, "held", lambda *_: 1 / 0)
        host.relief.begin_step([request], MemShareUpdate())
    assert retired(host, "a") == []
    host.relief.begin_step([request], MemShareUpdate())
    assert retired(host, "a") == before


def test_a_pool_too_small_for_one_request_is_refused() -> None:
    with pytest.raises(
        UserError, match="must hold one request of max_model_len 40, 10 blocks, beside 2 for null entries"
    ):
        Host(12, bands=(0, 100, 1000))


def test_retiring_what_cannot_go_is_a_broken_invariant() -> None:
    host = Host(12)
    host.add("a", 4, 39)
    blocks: VllmBlocks = host.blocks
    blocks.retire("a", [2], 0, 38)
    with pytest.raises(RuntimeError, match="at 2 of a cannot be retired: null True"):
        blocks.retire("a", [2], 0, 38)


def test_a_block_that_is_filled_in_the_step_of_a_retirement_leaves_the_prefix_cache() -> None:
    """vLLM has cached it when it planned the step; what it computes then has gaps."""
    host = Host(12, min_kept=0.0)
    request = host.add("a", 4, 39)
    for block in host.table("a"):
        block.block_hash = object()
    host.relief.make_room([request], 1, MemShareUpdate())
    cached = [block.block_hash is not None for block in host.table("a") if not block.is_null]
    assert cached == [True] * (len(cached) - 1) + [False]


def test_room_that_a_waiting_request_missed_is_made_before_the_next_step() -> None:
    host = Host(25, min_kept=0.0)
    request = host.add("a", 4, 39)
    host.relief.begin_step([request], update := MemShareUpdate(), host.blocks.num_free)
    assert not update.null_entries
    host.relief.begin_step([request], MemShareUpdate(), host.blocks.num_free + 2)
    assert len(retired(host, "a")) >= 2


def test_nothing_goes_for_a_waiting_request_that_would_not_fit_all_the_same() -> None:
    host = Host(25, min_kept=0.5, high_watermark=1.0, low_watermark=1.0)
    request = host.add("a", 4, 40)  # 39 computed: 8 full generated pages, of which 4 may go
    host.relief.begin_step([request], update := MemShareUpdate(), host.blocks.num_free + 5)
    assert not update.null_entries
    host.relief.begin_step([request], MemShareUpdate(), host.blocks.num_free + 4)
    assert len(retired(host, "a")) == 4


def test_what_running_requests_take_first_is_not_a_waiting_one_s() -> None:
    host = Host(25, min_kept=0.5, high_watermark=1.0, low_watermark=1.0)
    request = host.add("a", 4, 41)  # 40 computed: its next token opens a block
    wanted = host.blocks.num_free + 3
    host.relief.begin_step([request], MemShareUpdate(), wanted)
    assert host.blocks.num_free == wanted + 1


def test_pages_that_were_asked_about_in_the_step_of_a_preemption_are_asked_about_again() -> None:
    """vLLM preempts after we have asked, and the question goes with the blocks."""
    host = Host(42, min_kept=0.0, need="redundancy", high_watermark=0.3, low_watermark=0.3)
    request = host.add("a", 4, 39)
    update = MemShareUpdate()
    host.relief.begin_step([request], update)
    asked = update.asked["a"]
    assert asked
    update.keep_only(set())
    host.relief.lose_blocks("a")
    again = MemShareUpdate()
    host.relief.begin_step([request], again)
    assert again.asked["a"] == [page for page in asked if page in again.asked["a"]]
    assert again.asked["a"]


def test_pages_that_go_in_a_later_band_take_along_those_that_went_before() -> None:
    host = Host(13, bands=(0, 40, 1000), min_kept=0.0)
    request = host.add("a", 4, 39)
    host.relief.make_room([request], 1, MemShareUpdate())
    before = retired(host, "a")
    host.grow(request, [1, 2])  # 40 computed: the next query is in the second band
    update = MemShareUpdate()
    host.relief.make_room([request], host.blocks.num_free + 1, update)
    second, pages = host.blocks.null_block_ids[1], retired(host, "a")
    assert set(before) < set(pages)
    assert {host.ids("a")[page] for page in pages} == {second}
    assert update.null_entries["a"] == dict.fromkeys(pages, second)


def test_a_relief_that_is_forced_goes_on_to_the_low_watermark() -> None:
    host = Host(12, high_watermark=0.9, low_watermark=0.6, min_kept=0.0)
    assert host.relief.make_room([host.add("a", 4, 39)], 1, MemShareUpdate()) == 5
