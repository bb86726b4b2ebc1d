"""A preset over recorded K and V decides as it does over the model, and its mask gives the executor's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from effective_settings import make_effective
from evaluation.step_by_step import Recorder

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.recorded_runner import retire_by_preset
from trtllm_memshare.evaluation.retirement import NEVER
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

SIZE, PROMPT = 8, 7
IDS = [5, 6, 7, 8, 9, 10, 11, *((np.arange(40) * 7 % 53 + 4).tolist() * 4)]
SETTINGS = {"protected_tokens": 8, "protected_steps": 0, "search_interval": 1, "min_run_tokens": 16}


@pytest.mark.parametrize("preset", ["lexical", "aligned"])
def test_decisions_and_logits_are_those_of_the_executor(tiny_checkpoint, preset):
    config = make_effective(preset, **SETTINGS, max_distance=5.0)
    replay = MaskedReplay(tiny_checkpoint)
    plain = BoundaryTokens.from_texts([f"t{i}" for i in range(replay.model.config.vocab_size)])
    masked = retire_by_preset(config, replay.read(IDS, SIZE), PROMPT, replay.model, plain)

    runner, sampler = TorchRunner(load_model(tiny_checkpoint), 40, SIZE), Recorder()
    executor = Executor(runner, config, plain, len(IDS), 1, max_num_tokens=len(IDS), sampler=sampler)
    sampler.add_script(executor.submit(IDS[:PROMPT], SamplingParams(len(IDS) - PROMPT)).request_id, IDS[PROMPT:])
    gone = 0
    while executor.has_work:
        executor.step()
        if executor.has_work:
            gone = int((executor.manager.origin_blocks(0) != np.arange(executor.manager.logical_blocks(0))).sum())
    assert gone == (masked.retired_at < NEVER).sum() >= 5
    logits = replay.logits(IDS, masked)[PROMPT - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(sampler.logits), rtol=1e-3, atol=1e-3)


def test_a_full_cache_retires_nothing(tiny_checkpoint):
    replay = MaskedReplay(tiny_checkpoint)
    plain = BoundaryTokens.from_texts([f"t{i}" for i in range(replay.model.config.vocab_size)])
    masked = retire_by_preset(make_config("off"), replay.read(IDS, SIZE), PROMPT, replay.model, plain)
    assert (masked.retired_at == NEVER).all()
