"""Teacher-forced replay: the full cache is the model itself, and an arm is held against it token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trtllm_memshare.evaluation.reach import measure_reach
from trtllm_memshare.evaluation.teacher_forced import Replay, Script, replay
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

SIZE = 8
REPEATS = {"protected_tokens": 8, "protected_steps": 0, "search_interval": 1, "min_run_tokens": 16}
SCRIPTS = [
    Script([5, 6, 7], (np.arange(40) % 37 + 4).tolist() * 3),
    Script([9, 8], (np.arange(90) * 7 % 71 + 4).tolist()),
]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint) -> TorchRunner:
    return TorchRunner(load_model(tiny_checkpoint), 40, SIZE)


@pytest.fixture(scope="module")
def plain(runner) -> BoundaryTokens:
    """No token ends a step."""
    return BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])


@pytest.fixture(scope="module")
def full(runner, plain) -> Replay:
    return replay(runner, make_config("off"), plain, SCRIPTS, keep_log_probs=True)


def test_the_full_cache_thinks_what_the_model_thinks(tiny_checkpoint, full):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    total, count = 0.0, 0
    for script, losses, log_probs in zip(SCRIPTS, full.losses, full.log_probs, strict=True):
        ids = torch.tensor([script.prompt + script.output])
        with torch.inference_mode():
            expected = model(ids).logits[0].log_softmax(-1)[len(script.prompt) - 1 : -1]
        torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
        wanted = -expected[torch.arange(len(script.output)), torch.tensor(script.output)]
        torch.testing.assert_close(torch.from_numpy(losses), wanted, rtol=1e-4, atol=1e-4)
        total, count = total + float(wanted.sum()), count + len(script.output)
    assert full.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert full.shared_ratio == 0
    assert full.divergences is None


def test_shadow_changes_nothing_and_sharing_is_seen(runner, plain, full):
    shadow = replay(runner, make_config("lexical", shadow=True, **REPEATS), plain, SCRIPTS, full.log_probs)
    assert shadow.candidates > 0
    assert shadow.shared_ratio == 0
    assert shadow.block_steps_per_request == full.block_steps_per_request
    assert all((a == b).all() for a, b in zip(shadow.losses, full.losses, strict=True))
    assert shadow.mean_divergence == pytest.approx(0, abs=1e-7)
    shared = replay(runner, make_config("lexical", **REPEATS), plain, SCRIPTS, full.log_probs)
    assert 0.3 < shared.shared_ratio < 0.5
    assert shared.block_steps_per_request < full.block_steps_per_request
    repetitive, plain_text = shared.divergences
    assert repetitive[:40] == pytest.approx(0, abs=1e-6)  # nothing repeats yet
    assert repetitive[-20:].min() > 1e-6
    assert plain_text == pytest.approx(0, abs=1e-6)  # nothing to share in the second script
    assert (np.concatenate(shared.divergences) > -1e-6).all()


def test_divergences_are_those_of_the_definition(runner, plain, full):
    shared = replay(runner, make_config("lexical", **REPEATS), plain, SCRIPTS, full.log_probs, keep_log_probs=True)
    for index in range(2):
        p, q = (torch.distributions.Categorical(logits=r.log_probs[index].double()) for r in (full, shared))
        expected = torch.distributions.kl_divergence(p, q)
        torch.testing.assert_close(torch.from_numpy(shared.divergences[index]).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_pool_that_makes_requests_pause_is_no_measurement(tiny_checkpoint, plain):
    small = TorchRunner(load_model(tiny_checkpoint), 18, SIZE)
    with pytest.raises(RuntimeError, match="pauses in a replay: the pool has 18 blocks"):
        replay(small, make_config("off"), plain, SCRIPTS)


def test_reach_is_what_the_executor_frees_when_stage_two_accepts_everything(runner, plain):
    config = make_config("lexical", **REPEATS)
    script = SCRIPTS[0]
    served = replay(runner, config, plain, [script])
    reach = measure_reach(make_config("aligned", **REPEATS), script.prompt, script.output, SIZE, plain)
    assert reach.num_tokens == 123
    assert reach.generated_blocks == 14  # of 15 full blocks the first holds the prompt
    assert reach.ratio == pytest.approx(served.shared_ratio, abs=1 / 14 + 1e-9)  # decisions come a step late there
    assert reach.shared_blocks >= 5
    assert measure_reach(config, SCRIPTS[1].prompt, SCRIPTS[1].output, SIZE, plain).shared_blocks == 0


def test_larger_blocks_are_reached_less(plain):
    """A block is within reach only as a whole: runs of 20 tokens hold blocks of 8, and none of 32."""
    rng = np.random.default_rng(0)
    output = []
    for _ in range(12):
        part = rng.integers(4, 75, 20).tolist()
        output += part + rng.integers(4, 75, 15).tolist() + part
    reach = {n: measure_reach(make_config("lexical", **REPEATS), [5, 6], output, n, plain) for n in (8, 32)}
    assert reach[8].shared_blocks > 0
    assert reach[32].shared_blocks == 0
