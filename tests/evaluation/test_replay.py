"""Replaying written text through the executor."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.evaluation.replay import ReplaySampler, cut_scripts, train_tokenizer
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

TEXTS = ["First we add 3 and 4. That gives 7.\n\nWait, let me check: 3 and 4 make 7.\n\n" * 8, "So x is 9. " * 30]


def test_the_same_texts_give_the_same_tokenizer_and_nothing_is_lost():
    first, second = (train_tokenizer(TEXTS, 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(first.encode(TEXTS[0])) == TEXTS[0]


def test_scripts_have_one_length_and_spread_over_the_longer_texts():
    tokenizer = train_tokenizer(TEXTS, 300)
    scripts = cut_scripts(TEXTS, tokenizer, 3, 60)
    assert [len(s) for s in scripts] == [60, 60, 60]
    assert len({s.tobytes() for s in scripts}) == 3
    with pytest.raises(ValueError, match="no text has 100000 tokens"):
        cut_scripts(TEXTS, tokenizer, 1, 100_000)


def test_requests_generate_their_scripts_and_share_their_repeats(tiny_checkpoint):
    """The model's own choice is computed and thrown away; the repeated text is shared as if it had been chosen."""
    runner = TorchRunner(load_model(tiny_checkpoint), 64, 8)
    script = (np.arange(40) % 37 + 4).tolist() * 3
    boundaries = BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])
    config = make_config("lexical", protected_tokens=8, protected_steps=0, search_interval=1)
    sampler = ReplaySampler()
    executor = Executor(runner, config, boundaries, 160, 4, sampler=sampler)
    handle = executor.submit([5, 6, 7], SamplingParams(len(script)))
    sampler.add_script(handle.request_id, script)
    executor.run_until_idle()
    assert handle.result().token_ids == script
    assert executor.manager.stats().shared > 0
    assert executor.last_batch.num_contexts == 0
