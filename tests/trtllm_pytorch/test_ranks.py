"""Tensor-parallel ranks of the PyTorch backend: all share or none, the same tables, a stop where one differs."""

from __future__ import annotations

import random
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fakes.rank_threads import FakeMpi, on_ranks
from trtllm_pytorch.conftest import TextlessFacts, make_settings, make_sharing_class, sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, make_mapping, repetitive_text
from trtllm_pytorch.fake_requests import FakeLlmRequest, FinishReason
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.test_pressure import PRESSURE
from trtllm_pytorch.test_tail_swap import check_contents

from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.trtllm.pytorch.attach import make_agreement
from trtllm_memshare.trtllm.pytorch.failures import Failures
from trtllm_memshare.trtllm.pytorch.lost_requests import LostRequests
from trtllm_memshare.trtllm.pytorch.rank_meetings import RankMeetings


def test_all_ranks_share_or_none(caplog, monkeypatch):
    """One rank that cannot switch it on would leave the others waiting for it."""
    from trtllm_memshare.trtllm.pytorch import attach

    agreements = threading.local()
    monkeypatch.setattr(attach, "make_agreement", lambda mapping: agreements.mine)

    def construct_on(agreement, rank):
        agreements.mine = agreement
        facts = TextlessFacts(None)
        if rank == 1:
            facts.__dict__["boundaries"] = lambda tokenizer_dir: 1 / 0
        manager_class = sharing_class(FakeKVCacheManager, facts, make_settings())
        return make_manager(manager_class, 40, 8).memshare

    assert on_ranks(2, construct_on) == [None, None]
    assert "another rank could not switch it on" in caplog.text


def serve_two(agreement, rank, at_step, steps=400):
    """Two requests on a rank, of which the second run disturbs something."""
    manager = make_manager(make_sharing_class(), 200, 8)
    manager.memshare._meetings = RankMeetings(agreement, 2)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text)
    executor.submit(1, text[:6], text)
    for step in range(steps):
        at_step(executor, step)
        executor.step()
        if step % 3 == 0 and executor.active:
            check_contents(executor)
    return executor


def test_ranks_that_search_different_blocks_share_nothing_new(caplog):
    """One of them has let a request run on that the other has freed."""

    def serve(agreement, rank):
        def differ(executor, step):
            if step == 60 and rank == 1:
                executor.cancel(0)

        return serve_two(agreement, rank, differ)

    results = on_ranks(2, serve)
    for executor in results:
        assert isinstance(executor, FakeExecutor), executor
        assert executor.manager.memshare.failures.is_off
        assert not executor.active
    assert "block tables or candidates of ranks [1] differ from those of rank 0" in caplog.text


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("place", ["take_in", "shrink", "decide"])
def test_an_error_on_one_rank_stops_sharing_on_all_and_hangs_none(place, failing_rank):
    def serve(agreement, rank):
        def fail(executor, step):
            if step == 60 and rank == failing_rank:
                shared = executor.manager.memshare
                owner = {"take_in": shared.requests, "shrink": shared._backend, "decide": shared.policy}[place]
                setattr(owner, place, lambda *arguments: 1 / 0)

        return serve_two(agreement, rank, fail)

    first, second = on_ranks(2, serve)
    assert isinstance(first, FakeExecutor), first
    assert isinstance(second, FakeExecutor), second
    if place == "decide" and failing_rank == 1:  # the policy of the first rank decides for all
        assert not first.manager.memshare.failures.is_off
        return
    ended = [
        [r.py_request_id for r in e.requests if r.finish_reason is FinishReason.CANCELLED] for e in (first, second)
    ]
    assert ended[0] == ended[1]
    assert bool(ended[0]) == (place == "shrink")
    for executor in (first, second):
        assert executor.manager.memshare.failures.is_off
        assert not executor.active


def test_a_request_that_this_rank_does_not_know_ends_with_the_others():
    """The rank failed before it took request 7 in; another one gave pages of it up at its return."""
    requests = {3: SimpleNamespace(request=FakeLlmRequest(3, [1]))}
    seven, eight = FakeLlmRequest(7, [1]), FakeLlmRequest(8, [1])

    class Known(dict):
        def __iter__(self):
            return iter(())

    own_pages, failures = [], Failures("made up")
    lost = LostRequests(Known(requests), SimpleNamespace(set_own_page=own_pages.append), failures)
    lost.meet(SimpleNamespace(switched_off=lambda *arguments: {3, 7}), 1, False, [seven, eight])
    assert own_pages == [3]
    assert [r.finish_reason.name for r in (requests[3].request, seven, eight)] == ["CANCELLED"] * 2 + ["NOT_FINISHED"]
    assert failures.num_failed_requests == 2


@pytest.mark.parametrize("views", [[{}, {7: 5}], [{7: 5}, {}], [{7: 4, 8: 1}, {7: 5, 8: 1}]])
def test_ranks_end_the_same_requests_whatever_each_of_them_knows(views):
    def meet(agreement, rank):
        meetings = RankMeetings(agreement, 2)
        meetings._all_are_off = True
        return meetings.switched_off(1, False, [9] * rank, views[rank])

    assert on_ranks(2, meet) == [{7, 9}, {7, 9}]


def test_two_ranks_hold_identical_tables():
    """Heads are split, so each rank alone measures something else; with the sum they decide alike."""
    text = repetitive_text(random.Random(4), 150)

    def serve(agreement, rank):
        manager = make_manager(make_sharing_class(preset="aligned", undo_rope=False, max_distance=0.8), 200, 8)
        manager.memshare._meetings = RankMeetings(agreement, 2)

        class Rank(FakeExecutor):
            def content(self, request_id, position):
                token = self.scripts[request_id][position]
                base = torch.randn(2, 2, 1, 2, generator=torch.Generator().manual_seed(2 * token + rank))
                noise = torch.Generator().manual_seed(1000 + 2 * (position % (5 + rank)) + rank)
                return base + 0.6 * torch.randn(2, 2, 1, 2, generator=noise)

        executor = Rank(manager, True)
        for request_id in range(3):
            executor.submit(request_id, text[: 5 + request_id], text)
        while executor.active:
            executor.step()
        return executor.tables, manager.memshare.manager.stats().shared, dict(manager.memshare.policy.rejected)

    (tables, shared, rejected), (other, other_shared, _) = on_ranks(2, serve)
    assert shared == other_shared > 0
    assert rejected["distance"] > 0
    assert all(torch.equal(a, b) for a, b in zip(tables, other, strict=True))


@pytest.mark.parametrize("null_entries", ["read", "skip"])
@pytest.mark.parametrize("failing_rank", [None, 0, 1])
def test_two_ranks_give_up_the_same_pages(null_pages, failing_rank, null_entries, caplog):
    """Each rank alone would rank its pages differently: the first one's choice counts."""
    text = repetitive_text(random.Random(4), 180)

    def serve(agreement, rank):
        pages = null_pages if null_entries == "read" else None
        values = {**PRESSURE, "control_seed": rank, "null_entries": null_entries}
        make = make_sharing_class(null_pages=pages, **values)
        manager = make_manager(make, 52, 8)
        manager.memshare._meetings = RankMeetings(agreement, 2)
        executor = FakeExecutor(manager, True)
        for request_id in range(3):
            executor.submit(request_id, text[: 5 + request_id], text[request_id:])
        for step in range(600):
            if step == 120 and rank == failing_rank:
                manager.memshare.pressure.choose = lambda *arguments: 1 / 0
            executor.step()
            check_contents(executor)
        return executor

    first, second = on_ranks(2, serve)
    assert isinstance(first, FakeExecutor), first
    assert isinstance(second, FakeExecutor), second
    assert not first.active
    stats = [e.manager.memshare.manager.stats().forgotten for e in (first, second)]
    assert stats[0] == stats[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(first.tables, second.tables, strict=True))
    # Only the first rank chooses; where it fails, both go on without.
    assert [e.manager.memshare.failures.is_off for e in (first, second)] == [failing_rank == 0] * 2


def serve_short(agreement, rank, switch, null_pages, touch_at, unlink_at=None):
    """Ten requests that are paused on a rank; how many pages were given up again, and in all, after each iteration."""
    rng = random.Random(3)
    make = make_sharing_class(null_pages=null_pages, off_file=switch, **{**PRESSURE, "min_kept": 0.5})
    manager = make_manager(make, 67, 8)
    manager.memshare.pressure._reserve = None  # as attach leaves it with ranks
    manager.memshare._meetings = RankMeetings(agreement, 2)
    executor = FakeExecutor(manager, True)
    for request_id in range(10):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    counts = []
    for step in range(400):
        if step == touch_at:
            switch.touch()
        if step == unlink_at:
            switch.unlink()
        executor.step()
        check_contents(executor)
        counts.append((manager.memshare.giving_up.num_resumed, manager.memshare.manager.stats().forgotten))
    assert not manager.memshare.failures.num_errors
    return counts


@pytest.mark.parametrize("switched_rank", [0, 1])
def test_the_first_ranks_file_stops_giving_up_on_both_and_another_ones_nothing(null_pages, tmp_path, switched_rank):
    """Pages given up again at a return included: ranks that differed there would hold different tables."""

    def serve(agreement, rank):
        return serve_short(agreement, rank, tmp_path / f"off{rank}", null_pages, 100 if rank == switched_rank else None)

    first, second = on_ranks(2, serve)
    assert first == second
    assert (first[120] == first[-1]) == (switched_rank == 0)
    assert (first[-1][0] > 0) == (switched_rank == 1)


def test_what_goes_when_the_file_is_gone_does_not_go_again(null_pages, tmp_path):
    """Requests come back while it is there. The meeting that ends it gives pages up before they are asked for again."""

    def serve(agreement, rank):
        first_only = (110, 200) if rank == 0 else (None, None)
        return serve_short(agreement, rank, tmp_path / f"off{rank}", null_pages, *first_only)

    first, second = on_ranks(2, serve)
    assert first == second
    assert first[130] == first[199]
    assert first[-1][0] > 0


def test_several_ranks_need_mpi(monkeypatch):
    utils = ModuleType("tensorrt_llm._utils")
    utils.mpi_comm, utils.mpi_disabled = lambda: SimpleNamespace(Dup=lambda: FakeMpi(0, [None] * 2, None)), lambda: True
    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm._utils", utils)
    with pytest.raises(UserError, match="got tp_size 2 with MPI disabled"):
        make_agreement(make_mapping(tp_size=2))
    utils.mpi_disabled = lambda: False
    assert isinstance(make_agreement(make_mapping(tp_size=2)), RankAgreement)
    assert make_agreement(make_mapping()) is None
