"""The published method's choice in TensorRT-LLM's pool: the nearest earlier page is read in place of one that goes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, make_mapping, repetitive_text, submit_texts
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_tail_swap import MANAGERS, NUM_SCHEDULES, check_contents, check_pages, check_tree, run

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.nearest_page import page_distances
from trtllm_memshare.trtllm.pytorch import attach as attach_module

PAPER = {
    "preset": "pressure", "need": "nearest-earlier", "retired_becomes": "alias", "min_kept": 0.5,
    "high_watermark": 0.85, "low_watermark": 0.75,
}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in MANAGERS if k != "V1 reuse"])
@settings(max_examples=-(-NUM_SCHEDULES // (len(MANAGERS) - 1)), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    overlap=st.booleans(),
    becomes=st.sampled_from(["alias", "null"]),
    entries=st.sampled_from(["read", "skip"]),
)
def test_any_schedule_reads_the_pages_that_stand_in(null_pages, kind, seed, overlap, becomes, entries):
    executor = run(
        kind, seed, overlap, null_pages=null_pages if entries == "read" else None, null_entries=entries,
        **{**PAPER, "retired_becomes": becomes, "min_kept": 0.25},
    )  # fmt: skip
    shared = executor.manager.memshare
    assert not shared.failures.num_errors
    assert not shared.pressure._earlier._requests


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=max(1, NUM_SCHEDULES // 12), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_block_reuse_no_page_of_the_tree_stands_in_or_goes(overlap, seed):
    executor = run("V1 reuse", seed, overlap, reuse=True, null_entries="skip", **PAPER)
    check_tree(executor)
    assert sum(executor.manager.impl.ref_count) == 0
    assert not executor.manager.memshare.failures.num_errors


def serve(num_blocks=60, num_requests=4, watch=None, make_class=FakeKVCacheManager, config=None, **arguments):
    make = make_sharing_class(make_class, null_entries="skip", **{**PAPER, **arguments})
    executor = FakeExecutor(make_manager(make, num_blocks, 8, config=config), True)
    if watch is not None:
        watch(executor)
    submit_texts(executor, num_requests)
    for step in range(3000):
        executor.step()
        if step % 5 == 0:
            check_contents(executor)
            check_pages(executor)
        if not executor.active:
            assert not executor.manager.memshare.failures.num_errors
            return executor
    raise AssertionError("the schedule did not end")


def test_a_page_goes_into_the_nearest_earlier_one_that_is_there():
    """Each pair against distances taken anew from what the text wrote, with counts of what each page stands for."""
    seen, stand_for = [], {}

    def watch(executor):
        shared = executor.manager.memshare

        def retire(choice, step, retire=shared.giving_up.retire):
            for request_id, pages, donors in choice:
                assert set(donors) == set(pages)
                counts = stand_for.setdefault(request_id, {})
                first, full, _ = shared.manager.generated_pages(request_id)
                there = [p for p in range(first, full) if not shared.manager.is_retired(request_id, p)]
                numbers = [[executor.content(request_id, p * 8 + slot) for slot in range(8)] for p in there]
                pool = torch.tensor(numbers)[:, None, None, None, :, None].expand(-1, 2, 2, 1, 8, 2)
                index = torch.arange(len(there))
                distance = np.tril(page_distances(pool, index, index).numpy(), -1)
                givable = set(shared.manager.givable_pages(request_id, False).pages.tolist())
                for page, donor in donors.items():
                    open_pairs = {
                        (p, d): distance[i, j]
                        for i, p in enumerate(there)
                        for j, d in enumerate(there[:i])
                        if {p, d} <= givable and counts.get(p, 1) + counts.get(d, 1) <= 4
                    }
                    assert open_pairs[page, donor] == pytest.approx(min(open_pairs.values()), abs=1e-3)
                    counts[donor] = counts.get(donor, 1) + counts.get(page, 1)
                    givable.discard(page)
                    seen.append((page, donor))
            return retire(choice, step)

        shared.giving_up.retire = retire

    executor = serve(watch=watch, max_aliases=4)
    stats = executor.manager.memshare.manager.stats()
    assert executor.num_pauses == 0
    assert stats.shared == len(seen) > 20
    assert stats.forgotten == 0


@pytest.mark.parametrize(
    ("manager_class", "config"), [(FakeKVCacheManager, None), (FakeMainKVCacheManagerV2, {"host_cache_size": 1 << 12})]
)
def test_a_paused_request_comes_back_to_the_same_donors(manager_class, config):
    before, after = {}, []

    def watch(executor):
        shared = executor.manager.memshare

        def remember(request, remember=shared.giving_up.remember):
            if shared.requests.get(request.py_request_id) is not None:
                before[request.py_request_id] = shared.manager.donors(request.py_request_id)
            remember(request)

        def again(step, again=shared.giving_up.retire_again):
            for known in shared.requests:
                donors = list(shared.manager.donors(known.request_id).values())
                assert all(donors.count(donor) < 3 for donor in donors)  # itself makes three
            back = [i for i in shared.giving_up._again if shared.requests.get(i) is not None]
            again(step)
            after.extend((before[i], shared.manager.donors(i)) for i in back)

        shared.giving_up.remember, shared.giving_up.retire_again = remember, again

    executor = serve(48, 8, watch, manager_class, config, min_kept=0.75, max_aliases=3)
    assert executor.num_pauses > 3
    assert sum(len(donors) for donors, _ in after) > 5
    for donors, found in after:
        assert found.items() <= donors.items()
        if manager_class is FakeKVCacheManager:  # V2 counts what was generated before as prompt
            assert found == donors


def test_a_page_without_a_donor_goes_only_before_somebody_is_paused():
    """Each page stands for two at most, so that half of them find no donor."""
    looks = []  # somebody would be paused, pages with a donor, pages without

    def watch(executor):
        pressure = executor.manager.memshare.pressure

        def choose(horizon, choose=pressure.choose):
            missing = pressure._num_wanted(horizon + 1) - pressure._backend.num_free_pages()
            missing -= pressure._reserve.num_held
            choice = choose(horizon)
            looks.extend((missing > 0, len(donors), len(pages) - len(donors)) for _, pages, donors in choice)
            return choice

        pressure.choose = choose

    executor = serve(45, watch=watch, max_aliases=2, min_kept=0.0)
    assert sum(with_donor for is_short, with_donor, _ in looks if not is_short) > 5
    assert not any(without for is_short, _, without in looks if not is_short)
    assert executor.manager.memshare.manager.stats().forgotten == sum(without for *_, without in looks) > 5


def test_a_later_wave_gives_up_as_early_as_the_first():
    """What an earlier one did not find says nothing once there was room again."""

    def first_use(executor, request_ids):
        for request_id in request_ids:
            rng = random.Random(request_id % 10)
            executor.submit(request_id, repetitive_text(rng, 5), repetitive_text(rng, 180))
        given_up, free = executor.manager.memshare.manager.stats, []
        before = given_up().shared
        while executor.active:
            if given_up().shared == before:
                free.append(executor.manager.memshare.pressure._backend.num_free_pages())
            executor.step()
        assert given_up().shared > before
        return free

    make = make_sharing_class(null_entries="skip", **PAPER, max_aliases=2, protected_tokens=64)
    executor = FakeExecutor(make_manager(make, 45, 8), True)
    first = first_use(executor, range(3))
    assert first_use(executor, range(10, 13)) == first


def test_several_ranks_that_hold_parts_of_pages_are_refused(monkeypatch):
    agreement = SimpleNamespace(all_hold=lambda here: here)
    monkeypatch.setattr(attach_module, "make_agreement", lambda mapping: agreement)
    make = make_sharing_class(null_entries="skip", **PAPER)
    with pytest.raises(UserError, match="compares whole pages, got 2 ranks"):
        make_manager(make, 40, 8, mapping=make_mapping(tp_size=2))
