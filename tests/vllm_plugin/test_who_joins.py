"""Who joins, over vLLM's own scheduler: what it would let in and what holds blocks, as admission must see it.

Needs vLLM in the environment (``make test-vllm``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm_plugin.schedulers import make_engine_args, make_scheduler
from vllm_plugin.simulation import Simulation

MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")


@pytest.mark.parametrize("admission", ["lookahead", "max-tokens"])
def test_many_with_one_prompt_join_as_soon_as_with_vllm_alone(admission):
    """Twelve with one prompt of 20 blocks hold 20 and four each: they fit into 80."""
    steps = []
    for kind in (None, "memshare"):
        arguments = make_engine_args(MODEL, None, 80, True, admission=admission)
        scheduler = make_scheduler(arguments, 80, False, kind)
        simulation = Simulation(scheduler, 0)
        for index in range(12):
            simulation.add(f"r{index}", [7 + i % 40 for i in range(320)], 48, None)
        steps.append(0)
        while scheduler.requests:
            simulation.plain_step()
            steps[-1] += 1
    assert steps[0] == steps[1]


def add(scheduler, name, prompt, max_tokens, resumable=False):
    """Submits a request, or a session's next chunk."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    sampling.update_from_generation_config({}, 1)
    scheduler.add_request(
        Request(request_id=name, prompt_token_ids=prompt, sampling_params=sampling, pooling_params=None,
                resumable=resumable)
    )  # fmt: skip


def steps(scheduler, count):
    """Who is scheduled in each step."""
    scheduled = []
    for _ in range(count):
        output = scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        requests = [scheduler.requests[name] for name in names]
        sampled = [[] if r.is_prefill_chunk else [3 + len(r.all_token_ids) % 40] for r in requests]
        ids = {name: index for index, name in enumerate(names)}
        scheduler.update_from_output(output, ModelRunnerOutput(names, ids, sampled))
        scheduled.append(names)
    return scheduled


@pytest.mark.parametrize("admission", ["lookahead", "max-tokens"])
def test_a_session_keeps_its_place_and_goes_on_at_once(admission):
    """Of 58 blocks its 165 tokens take 11. Each of the others will hold 13 at its floor: three join beside it."""
    num_tokens = {"lookahead": 200, "max-tokens": 128}[admission]
    scheduler = make_scheduler(make_engine_args(MODEL, None, 60, False, admission=admission), 60, False)
    add(scheduler, "session", [*range(2, 50)] * 3 + [5] * 21, 1, resumable=True)
    steps(scheduler, 6)
    session = scheduler.requests["session"]
    assert (session.status, session.num_computed_tokens) == (RequestStatus.WAITING_FOR_STREAMING_REQ, 165)
    for index in range(4):
        add(scheduler, f"r{index}", [7 + index] * 112 + [9], num_tokens)
    steps(scheduler, 14)
    assert [r.request_id for r in scheduler.running] == ["r0", "r1", "r2"]
    add(scheduler, "session", [11, 12, 13], 1, resumable=True)
    add(scheduler, "late", [4] * 5, 5)
    assert "session" in steps(scheduler, 1)[0]
    scheduler.finish_requests("session", RequestStatus.FINISHED_ABORTED)
    steps(scheduler, 1)
    assert "r3" in {r.request_id for r in scheduler.running}, "a session that has ended counts on"
