"""Random schedules over vLLM's own scheduler, synchronous and asynchronous, with prefix caching and without.

Needs vLLM in the environment (``make test-vllm``).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from fakes.reading_runner import patchwork_text
from fakes.schedule_record import ScheduleRecord
from fakes.wrong_repeats import whether_or_not_copies_are_kept
from nightly import at_night
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import RequestStatus
from vllm_plugin.schedulers import make_engine_args, make_scheduler
from vllm_plugin.simulation import Simulation, run_schedule

from trtllm_memshare.vllm import pages as request_pages
from trtllm_memshare.vllm import relief

MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")
NUM_BLOCKS = 30  # one request of full length, 24, two null pages, vLLM's own, and three more

NUM_SCHEDULES = int(os.environ.get("MEMSHARE_SCHEDULES", "72"))
NUM_SEEDS = -(-NUM_SCHEDULES // 12)
"""Of each of twelve settings: 72 schedules in all, MEMSHARE_SCHEDULES=1000 draws a thousand."""

RECORD = ScheduleRecord("tests/vllm_plugin/test_schedules.py", f"MEMSHARE_SCHEDULES={NUM_SCHEDULES}")


@pytest.fixture(scope="module")
def null_pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two bands; nobody reads the keys here."""
    folder = tmp_path_factory.mktemp("null_pages")
    bands = torch.tensor([0, 256, 1024], dtype=torch.int32)
    save_file({"keys": torch.zeros(2, 4, 2, 32), "bands": bands}, folder / "null_pages.safetensors")
    return str(folder)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["no-prefix-cache", "prefix-cache"])
@pytest.mark.parametrize("admission", ["vllm", "lookahead", "max-tokens"])
def test_no_block_leaks_and_every_read_is_right(null_pages, async_scheduling, prefix_caching, admission):
    retired = null_reads = shared_reads = 0
    for seed in range(NUM_SEEDS):
        need = ("age", "random", "surprisal-led-redundancy-recency")[seed % 3]
        arguments = make_engine_args(
            MODEL, null_pages, NUM_BLOCKS, prefix_caching, need=need, admission=admission, min_kept=0.25
        )
        arguments.scheduling_policy = ("fcfs", "priority")[seed % 2]
        simulation = run_schedule(make_scheduler(arguments, NUM_BLOCKS, async_scheduling), seed)
        RECORD.add(simulation.counts())
        retired += simulation.scheduler.relief.totals.retired
        null_reads += simulation.shadow.null_reads
        shared_reads += simulation.shadow.reads_of_others
    assert retired > 0, "no schedule came under pressure"
    assert null_reads > 0
    assert (shared_reads > 0) == prefix_caching


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "becomes", [{}, {"need": "nearest-earlier", "retired_becomes": "alias"}], ids=["null", "alias"]
)
def test_without_null_pages_attention_gets_what_is_kept_in_every_step(async_scheduling, becomes):
    retired_again = skipped = 0
    for seed in range(4):
        arguments = make_engine_args(
            MODEL, None, NUM_BLOCKS, seed % 2 == 1, null_entries="skip", admission="vllm", min_kept=0.25, **becomes
        )
        simulation = run_schedule(make_scheduler(arguments, NUM_BLOCKS, async_scheduling), seed)
        assert len(simulation.scheduler.blocks.null_block_ids) == 1
        assert simulation.scheduler.relief.totals.band_moves == 0
        retired_again += simulation.scheduler.relief.totals.retired_again
        skipped += simulation.attention.num_skipped
    assert skipped > 100
    assert retired_again > 0, "nobody came back from preemption"


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("admission", ["vllm", "lookahead", "max-tokens"])
def test_beside_sliding_windows_pages_of_full_attention_are_given_up(async_scheduling, admission):
    """Two groups with windows and one without share the pool; windows are read whole and never skipped."""
    counts, most = Counter(), 0
    for seed in range(6):
        becomes = {"need": "nearest-earlier", "retired_becomes": "alias"} if seed % 3 == 2 else {"need": "random"}
        arguments = make_engine_args(
            MODEL, None, 52, seed % 2 == 1, null_entries="skip", admission=admission, min_kept=0.25, **becomes
        )
        scheduler = make_scheduler(arguments, 52, async_scheduling, windows=(20, 48))
        simulation = run_schedule(scheduler, seed)
        totals, shadow = scheduler.relief.totals, simulation.shadow
        counts.update(retired=totals.retired, aliased=totals.retired_aliased, hits=shadow.reads_of_others)
        counts.update(skipped=simulation.attention.num_skipped, windows=shadow.window_reads)
        if admission == "vllm":  # the others refuse first who would not fit
            counts.update(waiting=simulation.num_waiting_counted)
        most = max(most, simulation.most_in_windows)
    assert min(counts.values()) > 10, counts
    assert most >= scheduler.blocks.others.most_held(384) - 1, "admission counts more in windows than anybody holds"


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("admission", ["vllm", "lookahead", "max-tokens"])
def test_beside_linear_attention_each_request_has_one_block_for_every_state(async_scheduling, admission):
    """Two groups of states and one of full attention share the pool; states are never given up."""
    counts = Counter()
    for seed in range(4):
        arguments = make_engine_args(
            MODEL, None, 52, False, null_entries="skip", admission=admission, min_kept=0.25, need="random"
        )
        scheduler = make_scheduler(arguments, 52, async_scheduling, num_states=2)
        simulation = run_schedule(scheduler, seed)
        assert simulation.most_in_windows == scheduler.blocks.others.most_held(384) == 2
        counts.update(retired=scheduler.relief.totals.retired, skipped=simulation.attention.num_skipped)
        if admission == "vllm":
            counts.update(waiting=simulation.num_waiting_counted)
    assert min(counts.values()) > 10, counts


@pytest.mark.parametrize(
    ("admission", "async_scheduling"),
    [("vllm", False), ("vllm", True), ("lookahead", True), at_night("lookahead", False), at_night("max-tokens", False),
     at_night("max-tokens", True)],
)  # fmt: skip
def test_with_a_prefix_cache_states_go_on_in_new_blocks_and_whole_ones_are_hits(async_scheduling, admission):
    counts, most = Counter(), 0
    for seed in range(6):
        becomes = {"need": "nearest-earlier", "retired_becomes": "alias"} if seed % 3 == 2 else {"need": "random"}
        arguments = make_engine_args(
            MODEL, None, 52, True, null_entries="skip", admission=admission, min_kept=0.25, **becomes
        )
        scheduler = make_scheduler(arguments, 52, async_scheduling, num_states=2, has_checkpoints=seed % 2 == 1)
        simulation = run_schedule(scheduler, seed)
        totals, shadow = scheduler.relief.totals, simulation.shadow
        counts.update(retired=totals.retired, hits=shadow.reads_of_others, states=shadow.state_reads)
        counts.update(skipped=simulation.attention.num_skipped, checkpoints=shadow.checkpoints)
        if admission == "vllm":
            counts.update(waiting=simulation.num_waiting_counted)
        most = max(most, simulation.most_in_windows)
    assert min(counts.values()) > 10, counts
    assert most == 2 * 2, "no state was in two blocks"


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["no-prefix-cache", "prefix-cache"])
def test_aliases_are_earlier_blocks_that_are_there(null_pages, async_scheduling, prefix_caching):
    """The published method, one schedule in four without its aliases; references add up after every step."""
    retired, reads, most_entries = Counter(), Counter(), 0
    for seed in range(NUM_SEEDS):
        admission = ("vllm", "lookahead", "max-tokens")[seed % 3]
        becomes = "null" if seed % 4 == 2 else "alias"
        arguments = make_engine_args(
            MODEL, null_pages, NUM_BLOCKS, prefix_caching, need="nearest-earlier", retired_becomes=becomes,
            admission=admission, min_kept=0.25, max_aliases=4,
        )  # fmt: skip
        simulation = run_schedule(make_scheduler(arguments, NUM_BLOCKS, async_scheduling), seed)
        RECORD.add(simulation.counts())
        totals, shadow = simulation.scheduler.relief.totals, simulation.shadow
        retired[becomes] += totals.retired
        retired["aliased"] += totals.retired_aliased
        reads.update({f"{becomes} alias": shadow.alias_reads, f"{becomes} null": shadow.null_reads})
        reads["others"] += shadow.reads_of_others
        most_entries = max(most_entries, simulation.most_entries)
    assert retired["aliased"] > retired["alias"] / 3
    assert reads["alias alias"] > 0
    assert reads["alias null"] > 0, "no schedule was so short of memory that a page without a donor went"
    assert reads["null null"] > reads["null alias"] == 0
    assert (reads["others"] > 0) == prefix_caching
    assert most_entries == 4, "max_aliases does not hold, or is never reached"


def run_repeating_texts(null_pages, monkeypatch):
    """Texts that come again in pieces and nearly; the last pages go first, so copies before what they are copies of."""
    monkeypatch.setattr(relief, "page_need", lambda _, facts: -facts.position.astype(np.float32))
    for seed in range(4):
        arguments = make_engine_args(
            MODEL, null_pages, NUM_BLOCKS, False, need="age", admission="vllm", min_run_tokens=8, shingle_tokens=4
        )
        arguments.additional_config["memshare"]["protected_tokens"] = 8
        yield run_schedule(make_scheduler(arguments, NUM_BLOCKS, seed % 2 == 1), seed, patchwork_text)


def test_pages_go_below_a_floor_only_if_they_stand_again(null_pages, monkeypatch):
    simulations = list(run_repeating_texts(null_pages, monkeypatch))
    assert sum(s.num_below_floor for s in simulations) > 50
    assert sum(s.scheduler.relief.totals.retired_repeats for s in simulations) > 10


def test_a_page_below_a_floor_that_stands_nowhere_is_seen(null_pages, monkeypatch):
    """A test of the test above: copies need not be kept."""
    monkeypatch.setattr(request_pages, "stands_again", whether_or_not_copies_are_kept)
    with pytest.raises(AssertionError, match="below its floor"):
        list(run_repeating_texts(null_pages, monkeypatch))


def test_a_request_that_was_preempted_has_the_same_aliases_again(null_pages):
    arguments = make_engine_args(
        MODEL, null_pages, 60, True, need="nearest-earlier", retired_becomes="alias", min_kept=0.25
    )
    scheduler, simulation = one_under_pressure(arguments)
    pages = scheduler.relief.pages("a")
    before = dict(pages.aliased)
    assert len(before) > 3
    assert len(before) == len(pages.retired) == scheduler.relief.totals.aliased_entries
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.relief.totals.aliased_entries == 0
    while not pages.retired:
        simulation.step()
    assert dict(pages.aliased) == before
    assert scheduler.relief.totals.retired_again == len(before)
    simulation.finish()


def test_donors_are_no_prefix_that_all_requests_share(null_pages, monkeypatch):
    """Vllm 0.32 has given up on reading a shared prefix once for all; where it has not, it would count references."""

    def by_references(manager: KVCacheManager, running_request_id: str) -> list[int]:
        blocks = manager.coordinator.single_type_managers[0].req_to_blocks[running_request_id]
        return [sum(block.ref_cnt > 1 for block in blocks)]

    monkeypatch.setattr(KVCacheManager, "get_num_common_prefix_blocks", by_references)
    for becomes in ("alias", "null"):
        arguments = make_engine_args(
            MODEL, null_pages, 60, False, need="nearest-earlier", retired_becomes=becomes, min_kept=0.25
        )
        scheduler, _ = one_under_pressure(arguments)
        assert (by_references(scheduler.kv_cache_manager, "a") > [0]) == (becomes == "alias")
        assert scheduler.kv_cache_manager.get_num_common_prefix_blocks("a") == [0]


def one_under_pressure(arguments) -> tuple:
    """A scheduler and its simulation: request a has written 200 tokens, and then given up what it may."""
    scheduler = make_scheduler(arguments, 60, False)
    simulation = Simulation(scheduler, 0)
    simulation.add("a", [7] * 20, 300, None)
    while scheduler.requests["a"].num_output_tokens < 200:
        simulation.step()
    under_pressure(simulation)
    return scheduler, simulation


def under_pressure(simulation: Simulation) -> None:
    """Steps in which all the rest of the pool is somebody's. Workers need one to answer."""
    scheduler = simulation.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(scheduler.blocks.num_free)
    with simulation.outsiders(taken):
        for _ in range(3):
            simulation.step()
    pool.free_blocks(taken)


@pytest.mark.parametrize("becomes", [{"need": "age"}, {"need": "nearest-earlier", "retired_becomes": "alias"}])
@pytest.mark.parametrize("others", [{}, {"windows": (24,)}, {"num_states": 1}], ids=["alone", "window", "states"])
def test_nobody_hits_blocks_that_were_computed_with_gaps(null_pages, becomes, others):
    """A and B have one prompt and say the same. A gives pages up and writes on; B's copies fill the gaps of A's chain.

    Whoever then asks for all of that text must not read what A wrote after it had forgotten.
    """
    arguments = make_engine_args(MODEL, null_pages, 60, True, admission="vllm", min_kept=0.0, **becomes)
    scheduler = make_scheduler(arguments, 60, False, **others)
    simulation = Simulation(scheduler, 0)
    prompt = [7] * 20
    simulation.add("a", prompt, 300, {"min_kept": 0.0})
    while scheduler.requests["a"].num_output_tokens < 150:
        simulation.step()
    under_pressure(simulation)
    assert scheduler.relief.pages("a").retired
    assert bool(scheduler.relief.pages("a").aliased) == ("retired_becomes" in becomes)
    while scheduler.requests["a"].num_output_tokens < 250:
        simulation.step()
    text = list(scheduler.requests["a"].all_token_ids)
    # With others B goes on, so that a hit would be found where A wrote into those what B has of full attention.
    simulation.add("b", prompt, 230 if others else 150, {"memshare": False})
    while "b" in scheduler.requests:
        simulation.step()
    simulation.add("c", text[:240], 5, {"memshare": False})
    simulation.finish()  # the shadow raises if c reads what a computed with gaps
    assert simulation.shadow.reads_of_others > 0


@pytest.mark.parametrize("others", [{"windows": (24,)}, {"num_states": 1}], ids=["window", "states"])
def test_a_block_that_is_filled_in_the_step_in_which_pages_go_is_nobodys_hit(null_pages, others):
    """VLLM caches a block when it plans the step that fills it; then somebody else needs room."""
    arguments = make_engine_args(MODEL, null_pages, 60, True, need="age", min_kept=0.0)
    scheduler = make_scheduler(arguments, 60, False, **others)
    simulation = Simulation(scheduler, 0)
    simulation.add("a", [7] * 20, 300, None)
    request = scheduler.requests["a"]
    while request.num_computed_tokens < 160 + 15:
        simulation.step()
    allocate = scheduler._allocate

    def and_make_room(*arguments, **keywords):
        blocks = allocate(*arguments, **keywords)
        assert [group.req_to_blocks["a"][10].block_hash is None for group in groups] == [False, False]
        scheduler.relief.make_room([request], scheduler.blocks.num_free + 3, scheduler._update)
        return blocks

    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    scheduler._allocate = and_make_room
    simulation.step()
    scheduler._allocate = allocate
    assert scheduler.relief.pages("a").retired
    assert [group.req_to_blocks["a"][10].block_hash for group in groups] == [None, None]
    simulation.finish()


@pytest.mark.parametrize("kind", [None, dict])
def test_a_request_whose_options_cannot_be_used_ends_with_an_error(null_pages, monkeypatch, kind):
    """VLLM 0.33 keeps what clients are told (read on 30 November 2026), 0.32 names only; None = what is installed."""
    monkeypatch.setattr("vllm.outputs.RequestError", SimpleNamespace, raising=False)
    arguments = make_engine_args(MODEL, null_pages, NUM_BLOCKS, False, need="age")
    scheduler = make_scheduler(arguments, NUM_BLOCKS, False)
    if kind is not None:
        scheduler.grammar_compile_error_reqs = kind()
    simulation = Simulation(scheduler, 0)
    simulation.add("bad", [7] * 20, 1, {"min_kept": 7})  # its first token would be its last
    simulation.add("good", [7] * 20, 50, {"min_kept": 0.7})
    bad = scheduler.requests["bad"]
    assert list(scheduler.grammar_compile_error_reqs) == ["bad"]
    if kind is dict:
        told = scheduler.grammar_compile_error_reqs["bad"]
        assert told.code == "validation_error"
        assert "min_kept" in told.message
    simulation.step()
    assert (bad.status, bad.num_output_tokens) == (RequestStatus.FINISHED_ERROR, 0)
    assert "good" in scheduler.requests
    simulation.finish()


def test_with_room_the_plugin_changes_no_step(null_pages):
    arguments = make_engine_args(MODEL, null_pages, 400, True, need="age")
    steps = []
    for kind in (None, "memshare"):
        scheduler = make_scheduler(arguments, 400, False, kind)
        steps.append(Simulation(scheduler, 5).plain_steps(40))
    assert steps[0] == steps[1]
