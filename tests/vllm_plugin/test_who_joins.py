"""Who joins, over vLLM's own scheduler: what it would let in and what holds blocks, as admission must see it.

Needs vLLM in the environment (``make test-vllm``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

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
