"""What is wrong with one request does not reach the others: they are let in, and workers are asked about them."""

from __future__ import annotations

from fakes.vllm_blocks import BLOCK_SIZE, Host

from trtllm_memshare.vllm.admission import FloorAdmission
from trtllm_memshare.vllm.request_options import RequestOptions
from trtllm_memshare.vllm.update import MemShareUpdate


def beside_one_that_is_broken(monkeypatch, **config):
    """A pool of 58 blocks with three requests of six pages, whose second has text that cannot be looked at."""
    host = Host(60, longest=232, lookahead_tokens=4, **config)
    running = [host.add(name, 4, 24) for name in ("a", "bad", "c")]

    def broken(*_):
        raise IndexError("one request's")

    monkeypatch.setattr(host.relief.pages("bad"), "see_tokens", broken)
    return host, running


def test_others_are_let_in_beside_a_request_whose_pages_cannot_be_looked_at(monkeypatch):
    host, running = beside_one_that_is_broken(monkeypatch, min_kept=1.0)
    admission = FloorAdmission(host.relief, host.blocks, host.config, "lookahead")
    num_held = 3 * 7  # and the block of the lookahead, since nothing stands again
    for index, num_blocks, joins in ((0, num_held + 3, True), (1, num_held + 2, False)):
        host.blocks.num_blocks = num_blocks
        waiting = host.add(f"w{index}", 2 * BLOCK_SIZE, 2 * BLOCK_SIZE, RequestOptions(True, 1.0))
        assert admission.admits(waiting, running) == joins
    assert host.relief.faults.num == 1, "it is looked at anew for each who asks"


def test_workers_are_asked_about_those_behind_a_request_that_is_broken(monkeypatch):
    host, running = beside_one_that_is_broken(monkeypatch, need="redundancy", high_watermark=0.1, low_watermark=0.05)
    monkeypatch.setattr(host.relief.pages("bad"), "num_full", lambda _: 1 // 0)
    update = MemShareUpdate()
    host.relief.begin_step(running, update)
    assert set(update.asked) == {"a", "c"}
