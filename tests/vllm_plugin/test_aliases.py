"""The published method over the stand-in pool: who goes, what is read in its place, and how references move."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from fakes.vllm_blocks import Host, Request

from trtllm_memshare.vllm.page_report import PageDistances, PageReport
from trtllm_memshare.vllm.update import MemShareUpdate


def make_host(num_gpu_blocks: int = 12, **config: Any) -> Host:
    """As many pages go as blocks are missing, unless the caller says otherwise."""
    values = {"high_watermark": 1.0, "low_watermark": 1.0, "min_kept": 0.0, "retired_becomes": "alias", **config}
    return Host(num_gpu_blocks, need="nearest-earlier", **values)


def tell(host: Host, name: str, near: dict[tuple[int, int], float], pages: range = range(1, 9)) -> None:
    """The workers say how far page is from earlier page; pages that are not named are 1 apart."""
    distance = np.ones((len(pages), len(pages)), np.float32)
    for (page, other), value in near.items():
        distance[page - pages.start, other - pages.start] = value
    host.relief.pages(name).take(PageReport(distances=PageDistances(np.array(pages), np.array(pages), distance)))


def make_room(host: Host, request: Request, count: int, **how: bool) -> dict[int, int]:
    """Room for so many blocks more than are free, which somebody takes then; what the workers are told."""
    update, free = MemShareUpdate(), host.blocks.num_free
    host.relief.make_room([request], free + count, update, **how)
    host.manager.block_pool.get_new_blocks(host.blocks.num_free)
    check_references(host)
    return update.null_entries.get(request.request_id, {})


def check_references(host: Host) -> None:
    group = host.manager.coordinator.single_type_managers[0]
    entries = Counter(block.block_id for table in group.req_to_blocks.values() for block in table if not block.is_null)
    assert {block: host.manager.block_pool.blocks[block].ref_cnt for block in entries} == entries


def test_the_nearest_earlier_page_is_read_in_place_of_the_one_that_goes() -> None:
    host = make_host()
    request = host.add("a", 4, 39)  # pages 1 to 8 are full and generated, the last 4 tokens are protected
    before = host.ids("a")
    tell(host, "a", {(5, 2): 0.1, (2, 5): 0.0, (7, 7): 0.0, (3, 1): 0.2})  # later ones and itself do not count
    assert make_room(host, request, 1) == {5: before[2]}
    assert host.ids("a") == [*before[:5], before[2], *before[6:]]
    assert host.table("a")[2].ref_cnt == 2
    assert host.manager.block_pool.blocks[before[5]] not in host.table("a")
    assert host.relief.totals.aliased_entries == host.relief.totals.retired_aliased == 1
    assert host.relief.totals.null_entries == 0


def test_what_a_page_stands_for_goes_with_it() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    before = host.ids("a")
    tell(host, "a", {(5, 2): 0.1, (6, 2): 0.2, (2, 1): 0.3})
    assert make_room(host, request, 2) == {5: before[2], 6: before[2]}
    assert make_room(host, request, 1) == {2: before[1], 5: before[1], 6: before[1]}
    assert host.table("a")[1].ref_cnt == 4
    assert dict(host.relief.pages("a").aliased) == {2: 1, 5: 1, 6: 1}
    assert host.relief.pages("a").num_retired == 3


def test_a_chain_in_one_retirement() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    before = host.ids("a")
    tell(host, "a", {(5, 2): 0.1, (2, 1): 0.3})
    assert make_room(host, request, 2) == {2: before[1], 5: before[1]}
    assert host.table("a")[1].ref_cnt == 3


def test_no_page_stands_for_more_than_max_aliases() -> None:
    host = make_host(max_aliases=2)
    request = host.add("a", 4, 39)
    tell(host, "a", {(p, 1): 0.01 * p for p in range(2, 8)})
    make_room(host, request, 3)
    assert max(Counter(host.ids("a")).values()) == 2
    assert host.relief.totals.aliased_entries == 3


def test_exact_repeats_do_not_go_first() -> None:
    host = make_host(60, longest=120)
    request = host.add("a", 4, 20)
    phrase = list(range(60, 96))
    host.grow(request, phrase)  # pages 5 to 13
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    host.grow(request, phrase)
    host.grow(request, host.draw.integers(0, 50, 12).tolist())
    tell(host, "a", {(9, 3): 0.1}, range(1, 29))
    make_room(host, request, 1)
    assert dict(host.relief.pages("a").aliased) == {9: 3}
    assert host.relief.totals.retired_repeats == 0


def test_pages_without_a_donor_go_only_where_somebody_would_be_preempted() -> None:
    """Nobody has told of distances: nothing stands in for anything."""
    host = make_host()
    request = host.add("a", 4, 39)
    assert make_room(host, request, 1, urgent=False) == {}
    assert make_room(host, request, 1, force=False) == {}
    null = host.blocks.null_block_ids[0]
    assert set(make_room(host, request, 1).values()) == {null}
    assert host.relief.totals.retired_aliased == host.relief.totals.aliased_entries == 0


def test_of_pages_without_a_donor_the_one_that_stands_for_least_is_forgotten() -> None:
    """Page 1, which can have no earlier one, stands for three: to forget it frees one block and loses three pages."""
    host = make_host(protected_tokens=4)
    request = host.add("a", 4, 39)
    before, null_page = host.ids("a"), host.blocks.null_block_ids[0]
    tell(host, "a", {(5, 1): 0.1, (6, 1): 0.2, **{(page, 7): np.inf for page in range(1, 7)}})
    assert make_room(host, request, 2) == {5: before[1], 6: before[1]}
    tell(host, "a", dict.fromkeys([(page, other) for page in range(1, 9) for other in range(1, 9)], np.inf))
    assert make_room(host, request, 1) == {2: null_page}
    assert host.relief.totals.null_entries == 1
    assert host.relief.totals.aliased_entries == 2


def test_a_donor_that_is_forgotten_takes_along_what_it_stands_for() -> None:
    host = make_host()
    request = host.add("a", 4, 21)  # pages 1 to 4 are full, 4 is protected
    tell(host, "a", {(3, 2): 0.1}, range(1, 5))
    make_room(host, request, 1)
    assert dict(host.relief.pages("a").aliased) == {3: 2}
    host.relief.pages("a").take(
        PageReport(distances=PageDistances(np.arange(1, 5), np.arange(1, 5), np.full((4, 4), np.inf)))
    )
    null = host.blocks.null_block_ids[0]
    assert make_room(host, request, 2) == {1: null, 2: null, 3: null}
    assert dict(host.relief.pages("a").aliased) == {}
    assert (host.relief.totals.null_entries, host.relief.totals.aliased_entries) == (3, 0)


def test_a_band_moves_null_entries_and_no_alias() -> None:
    host = make_host(13, bands=(0, 40, 1000))
    request = host.add("a", 4, 39)
    tell(host, "a", {(5, 2): 0.1})
    make_room(host, request, 1)
    before = host.ids("a")
    host.relief.cross_bands("a", 40, update := MemShareUpdate())
    assert not update.null_entries
    assert host.ids("a") == before
    host.relief._retire(request, [3], {}, update)  # as if it had found no donor
    update = MemShareUpdate()
    host.relief.cross_bands("a", 40, update)
    second = host.blocks.null_block_ids[1]
    assert update.null_entries == {"a": {3: second}}
    assert host.ids("a") == [*before[:3], second, *before[4:]]


def test_a_donor_that_another_request_reads_stays_and_so_does_what_it_stands_for() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    tell(host, "a", {(5, 2): 0.1, (2, 1): 0.0})
    host.relief._retire(request, [5], {5: 2}, MemShareUpdate())
    host.manager.block_pool.touch([host.table("a")[2]])  # a hit in the prefix cache
    assert host.blocks.owned("a", 1, 8) == [1, 3, 4, 6, 7]
    host.relief.make_room([request], 100, MemShareUpdate())
    assert host.ids("a")[5] == host.ids("a")[2]
    assert not host.table("a")[2].is_null


def test_blocks_that_go_leave_the_prefix_cache_and_their_donors_stay() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    for block in host.table("a"):
        block.block_hash = object()
    gone, donor, written = host.table("a")[5], host.table("a")[2], host.table("a")[9]
    tell(host, "a", {(5, 2): 0.1})
    host.relief.make_room([request], host.blocks.num_free + 1, MemShareUpdate())
    assert (gone.block_hash, gone.ref_cnt) == (None, 0)
    assert donor.block_hash is not None
    assert written.block_hash is None  # it is filled with a shorter past than its hash says
    assert host.manager.coordinator.single_type_managers[0].num_cached_block["a"] > 10**9


def test_what_was_retired_goes_into_the_same_donors_after_preemption() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    tell(host, "a", {(5, 2): 0.1, (6, 5): 0.05, (2, 1): 0.3, (7, 4): 0.2})
    host.relief.make_room([request], host.blocks.num_free + 4, MemShareUpdate())
    before = dict(host.relief.pages("a").aliased)
    assert before == {2: 1, 5: 1, 6: 1, 7: 4}
    host.free("a")
    host.relief.lose_blocks("a")
    assert host.blocks.num_free == host.blocks.num_blocks
    assert host.relief.totals.aliased_entries == 0
    host.give_blocks(request)
    host.relief.begin_step([request], update := MemShareUpdate())
    assert dict(host.relief.pages("a").aliased) == before
    assert update.null_entries == {"a": {page: host.ids("a")[donor] for page, donor in before.items()}}
    host.manager.block_pool.get_new_blocks(host.blocks.num_free)
    host.relief.begin_step([request], update := MemShareUpdate())
    assert update.asked["a"] == [1, 3, 4, 8]  # aliases have nothing to say
    check_references(host)


def test_forgetting_makes_the_same_choice() -> None:
    retired = {}
    for becomes in ("alias", "null"):
        host = make_host(retired_becomes=becomes, max_aliases=2)
        request = host.add("a", 4, 39)
        tell(host, "a", {(5, 2): 0.1, (6, 2): 0.2, (7, 4): 0.3})
        for _ in range(3):
            make_room(host, request, 1)
        retired[becomes] = list(host.relief.pages("a").retired)
    assert retired["alias"] == retired["null"] == [5, 7, 3]
    assert host.relief.totals.null_entries == 3
    assert all(host.table("a")[page].is_null for page in (3, 5, 7))


def test_all_blocks_are_free_at_the_end_in_the_order_of_their_text() -> None:
    host = make_host()
    request = host.add("a", 4, 39)
    tell(host, "a", {(5, 2): 0.1, (6, 2): 0.2})
    host.relief.make_room([request], host.blocks.num_free + 2, MemShareUpdate())
    free = host.blocks.num_free
    homes = list(dict.fromkeys(host.ids("a")))
    host.free("a")
    host.relief.remove("a")
    assert host.blocks.num_free == host.blocks.num_blocks == 10
    assert host.relief.totals.aliased_entries == 0
    # Without a hash the block that was freed first, the last of the text, is reused first.
    assert [block.block_id for block in host.manager.block_pool.get_new_blocks(10 - free)] == homes[::-1]


@pytest.mark.parametrize(("page", "donor"), [(2, 5), (5, 5), (5, 3)])
def test_letting_stand_in_what_cannot_is_a_broken_invariant(page: int, donor: int) -> None:
    host = make_host()
    host.add("a", 4, 39)
    host.blocks.let_stand_in("a", {3: 2}, 38)
    with pytest.raises(RuntimeError, match=rf"at {donor} of a cannot stand in for {page}"):
        host.blocks.let_stand_in("a", {page: donor}, 38)
