"""A model that is served without its tokenizer; needs vLLM in the environment (``make test-vllm``)."""

from __future__ import annotations

from pathlib import Path

import pytest

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from vllm_plugin.schedulers import make_engine_args, make_scheduler
from vllm_plugin.simulation import run_schedule

from trtllm_memshare.errors import UserError

MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")


def scheduler_with(skip_tokenizer_init, **settings):
    arguments = make_engine_args(MODEL, None, 30, False, min_kept=0.25, **settings)
    arguments.skip_tokenizer_init = skip_tokenizer_init
    return make_scheduler(arguments, 30, False)


def test_without_protected_steps_no_tokenizer_is_needed():
    simulation = run_schedule(scheduler_with(True), 1)
    assert simulation.scheduler.relief.totals.retired > 0


def test_protected_steps_need_a_tokenizer_and_say_so():
    simulation = run_schedule(scheduler_with(False, protected_steps=2, max_protected_tokens=32), 1)
    assert simulation.scheduler.relief.totals.retired > 0
    with pytest.raises(
        UserError, match=r"protected_steps 2 needs the tokenizer.*got skip_tokenizer_init \(leave it out"
    ):
        scheduler_with(True, protected_steps=2)
