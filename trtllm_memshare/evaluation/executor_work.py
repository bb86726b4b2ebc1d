"""Our executor on the requests that vLLM gets, for a comparison of the two."""

from __future__ import annotations

import time
from typing import Any

from trtllm_memshare.evaluation.vllm_work import VllmWork
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

MAX_NUM_TOKENS = 2048
"""Of a step: the prompts of a comparison together have fewer."""


def load_runner(work: VllmWork, num_blocks: int) -> Runner:
    """The torch runner over the work's model, in float32 as vLLM gets it."""
    import torch

    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

    return TorchRunner(load_model(work.model_dir, dtype=torch.float32), num_blocks, work.block_size)


def run_executor(work: VllmWork, runner: Runner) -> dict[str, Any]:
    """Serves the work, sharing off; all requests are there at the start.

    Returns:
      ``seconds`` and ``cpu_seconds`` of it all, ``steps``, and ``answers``, token ids in the order of the requests.
    """
    boundaries = BoundaryTokens.from_texts(["\n"])  # nothing is searched
    executor = Executor(runner, make_config("off"), boundaries, work.max_model_len, work.in_flight, MAX_NUM_TOKENS)
    executor.submit([1, 2, 3], SamplingParams(2))  # warm-up
    executor.run_until_idle()
    before = executor.stats.num_steps
    handles = [executor.submit(prompt, SamplingParams(length)) for prompt, length in work.requests]
    clock, cpu = time.perf_counter(), time.process_time()
    executor.run_until_idle()
    return {
        "seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu,
        "steps": executor.stats.num_steps - before, "answers": [h.result(0).token_ids for h in handles],
    }  # fmt: skip
