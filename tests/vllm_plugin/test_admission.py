"""Admission: what requests will hold, and who may join."""

from types import SimpleNamespace

import numpy as np
import pytest

from trtllm_memshare.search.pressure import floor_room
from trtllm_memshare.vllm.admission import Admission, LengthHistory, Outlook, blocks_held, peak_blocks
from trtllm_memshare.vllm.request_options import RequestOptions
from trtllm_memshare.vllm.settings import VllmOptions


def outlook(tokens, final, prompt=10, min_kept=1.0, retired=0, protected=0):
    return Outlook(prompt, tokens, final, retired, min_kept, protected)


def test_the_example_of_the_docstring():
    assert peak_blocks([outlook(20, 40), outlook(50, 60)], 10) == 11
    assert peak_blocks([], 10) == 0


@pytest.mark.parametrize("min_kept", [0.0, 0.25, 0.55, 1.0])
def test_kept_pages_follow_the_floor_of_the_policy(min_kept):
    lengths = np.arange(10, 400)
    held = blocks_held([outlook(10, 400, min_kept=min_kept)], lengths[:, None], 10)[:, 0]
    for tokens, blocks in zip(lengths.tolist(), held.tolist(), strict=True):
        gone = min(floor_room(tokens // 10 - 1, 0, min_kept), max(0, (tokens - 10) // 10 - 1))
        assert blocks == -(-(tokens + 1) // 10) - gone


def test_recent_tokens_count_in_full_and_what_is_gone_stays_gone():
    few = blocks_held([outlook(10, 400, min_kept=0.0, protected=50)], np.array([[50]]), 10)
    assert few.item() == 6
    assert blocks_held([outlook(10, 400, min_kept=0.0, protected=50, retired=2)], np.array([[50]]), 10).item() == 4


def test_the_peak_is_that_of_a_run_step_by_step():
    draw = np.random.default_rng(0)
    for _ in range(50):
        group = [
            outlook(int(t), int(t + draw.integers(0, 60)), min_kept=float(draw.choice([0.25, 0.5, 1.0])))
            for t in draw.integers(10, 80, 5)
        ]
        most = 0
        for step in range(80):
            alive = [o for o in group if o.final_tokens - o.num_tokens >= step]
            if alive:
                most = max(most, int(blocks_held(alive, np.array([o.num_tokens + step for o in alive]), 10).sum()))
        # Between two ends the sum may dip by a page that can just go, so the peak at the ends is one or two short.
        assert most - len(group) <= peak_blocks(group, 10) <= most


def test_lengths_are_foretold_from_those_that_went_on():
    history = LengthHistory(0.5, enough=4)
    for length in (10, 20, 30, 40):
        assert history.expected(0, 100) == 100
        history.add(length)
    assert history.expected(0, 100) == 25
    assert history.expected(25, 100) == 35
    assert history.expected(25, 33) == 33
    assert history.expected(40, 100) == 100  # nobody went on that far


def request(name, tokens, max_tokens, prompt=8):
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=prompt, num_tokens=tokens, num_output_tokens=tokens - prompt,
        max_tokens=max_tokens,
    )  # fmt: skip


def relief(min_kept):
    pages = SimpleNamespace(num_retired=0, options=RequestOptions(True, min_kept))
    return SimpleNamespace(pages=lambda name: pages)


def test_a_request_joins_when_the_pool_will_hold_everybody():
    options = VllmOptions(null_pages="", admission="max-tokens")
    running = [request("a", 8, 40)]
    full, half = (Admission(options, 0, 20, 4) for _ in range(2))
    assert not full.admits(request("b", 8, 40), running, relief(1.0))  # 13 blocks each at the end, 26 in all
    assert half.admits(request("b", 8, 40), running, relief(0.25))
    assert full.deferred == 1


def test_somebody_always_gets_on_and_a_change_is_asked_again():
    admission = Admission(VllmOptions(null_pages="", admission="max-tokens"), 0, 10, 4)
    big = request("b", 8, 400)
    assert admission.admits(big, [], relief(1.0))
    running = [request("a", 8, 4)]
    assert not admission.admits(big, running, relief(1.0))
    assert not admission.admits(big, running, relief(0.0))  # not asked again at once
    admission.note_change()
    assert admission.admits(request("b", 8, 8), running, relief(0.0))


def test_vllms_own_rule_asks_nothing():
    admission = Admission(VllmOptions(null_pages="", admission="vllm"), 0, 1, 4)
    assert admission.admits(request("b", 8, 400), [request("a", 8, 400)], relief(1.0))
