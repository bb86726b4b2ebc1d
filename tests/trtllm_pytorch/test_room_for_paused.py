"""Below the high watermark pages go only so that a request that was paused comes back."""

from __future__ import annotations

import random

from trtllm_pytorch.conftest import make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.test_pressure import PRESSURE

EVERYTHING_MAY_GO = {**PRESSURE, "min_kept": 0.0, "high_watermark": 0.95, "low_watermark": 0.9}


class Watched:
    """A schedule in 40 pages of 8 tokens beside the null pages; ``steps`` has pages free before and pages that went."""

    def __init__(self, null_pages) -> None:
        make = make_sharing_class(null_pages=null_pages, **EVERYTHING_MAY_GO)
        self.executor, self.rng = FakeExecutor(make_manager(make, 47, 8), True), random.Random(3)
        self.steps: list[tuple[int, int]] = []

    def submit(self, request_id, prompt, output, is_whole=False):
        texts = repetitive_text(self.rng, prompt), repetitive_text(self.rng, output)
        self.executor.submit(request_id, *texts).py_memshare = not is_whole

    def step_while(self, condition) -> None:
        for _ in range(300):
            if not condition():
                return
            self.step()
        raise AssertionError("the schedule came to nothing")

    def step(self) -> None:
        free, before = self.executor.manager.get_num_free_blocks(), self.num_gone()
        self.executor.step()
        assert not self.executor.manager.memshare.failures.num_errors
        self.steps.append((free, self.num_gone() - before))

    def num_gone(self) -> int:
        """Pages given up so far, not counting those that went before the pause of their request already."""
        shared = self.executor.manager.memshare
        return shared.manager.stats().forgotten - shared.giving_up.num_resumed

    def is_there(self, request_id) -> bool:
        """Whether it is served or waits."""
        return any(r.py_request_id == request_id for r in self.executor.active)

    def is_paused(self, request_id) -> bool:
        waiting = (r.py_request_id for r in self.executor.active if r.num_lives > 1)
        return request_id in waiting and request_id not in self.executor.processed


def test_others_make_room_for_who_was_paused_as_soon_as_it_fits_beside_their_floors(null_pages):
    """Request 2, paused with 30 pages, cannot come back beside 1, of which nothing may go; beside 0 alone it can."""
    watched = Watched(null_pages)
    watched.submit(0, 8, 240)
    watched.submit(1, 8, 130, is_whole=True)
    watched.submit(2, 184, 72, is_whole=True)
    watched.step_while(lambda: not watched.is_paused(2))
    begin = len(watched.steps)
    watched.step_while(lambda: watched.is_there(1))
    assert sum(went for _, went in watched.steps[begin:]) == 0
    assert watched.is_paused(2)
    watched.step_while(lambda: watched.is_paused(2))
    (free, went), (_, nothing) = watched.steps[-2:]
    assert (free, went, nothing) == (26, 5, 0)  # its 30 pages and the one that TensorRT-LLM wants beside them
    assert watched.executor.num_pauses == 1


def test_nobody_makes_room_for_who_has_come_back(null_pages):
    """Request 0 gives nothing up and ends soon, so that 2 is paused for a moment; then 1 and 2 have all the pages."""
    watched = Watched(null_pages)
    watched.submit(0, 200, 56, is_whole=True)
    watched.submit(1, 24, 220)
    watched.submit(2, 8, 240)
    watched.step_while(lambda: not watched.is_paused(2))
    watched.step_while(lambda: watched.is_paused(2))
    begin = len(watched.steps)
    watched.step_while(lambda: watched.is_there(2))
    assert max(free for free, went in watched.steps[begin:] if went) <= 2  # the high watermark
