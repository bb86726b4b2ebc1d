"""The controls that evict by score: what they read from the runner, what they drop, and what they never drop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tolerances import SAME_LOGITS
from transformers import AutoModelForCausalLM

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.evaluation.eviction import BlockEviction, key_redundancy
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

SIZE = 8


def test_observed_attention_is_that_of_transformers_and_changes_no_logit(tiny_checkpoint):
    runner = TorchRunner(load_model(tiny_checkpoint), 12, SIZE)
    manager = KVCacheManager(12, runner.num_layers, SIZE, 8, 2, make_config("off"))
    tokens = np.random.default_rng(0).integers(4, 70, 30).astype(np.int32)
    assert manager.add_sequence(0, tokens)

    def batch(start: int, stop: int, observe: bool) -> StepBatch:
        return StepBatch(
            tokens[start:stop],
            np.arange(start, stop, dtype=np.int32),
            int(start == 0),
            np.array([stop - start], np.int32),
            np.array([stop], np.int32),
            manager.block_offsets([0]),
            observe_attention=observe,
        )

    runner.step(runner.prepare(batch(0, 29, False)))
    plain = runner.step(runner.prepare(batch(29, 30, False)))
    observed = runner.step(runner.prepare(batch(29, 30, True)))
    assert plain.block_attention is None
    torch.testing.assert_close(observed.logits, plain.logits, **SAME_LOGITS)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    with torch.inference_mode():
        weights = model(torch.tensor(tokens)[None].long(), output_attentions=True).attentions
    last = torch.stack([w[0, :, -1] for w in weights]).mean((0, 1))  # over layers and heads
    expected = np.zeros(12, np.float32)
    for logical, block in enumerate(manager.block_table(0)):
        expected[block] = float(last[logical * SIZE : (logical + 1) * SIZE].sum())
    assert observed.block_attention == pytest.approx(expected, abs=1e-5)
    assert observed.block_attention.sum() == pytest.approx(1, abs=1e-5)


def test_of_two_equal_blocks_the_older_is_redundant_and_rotation_hides_it():
    """Block 2 repeats block 0 at another position; block 1 is unlike both."""
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 2, 2, 1, SIZE, 16, generator=rng)
    plain[2] = plain[0]
    inv_freq = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.1, 0.05, 0.02, 0.01])
    origin = np.array([40, 8, 0], np.int32)  # blocks in order of position: 2, 1, 0
    stored = plain.clone()
    for block in range(3):
        keys = plain[block, :, 0].permute(2, 0, 1, 3)[None]  # [1, size, layers, heads, head_dim]
        positions = torch.from_numpy(origin[block] + np.arange(SIZE))[None]
        stored[block, :, 0] = rotate(keys, positions, inv_freq)[0].permute(1, 2, 0, 3)
    order = np.array([2, 1, 0])
    older, unlike, newer = key_redundancy(stored, order, origin[order], inv_freq)
    assert older > newer
    assert older > unlike
    assert older + unlike + newer == pytest.approx(1, abs=1e-5)
    as_stored = key_redundancy(stored, order, origin[order], inv_freq[:0])
    assert as_stored[0] - as_stored.mean() < older - (older + unlike + newer) / 3


class PoolRunner:
    """A runner's pool and no model."""

    def __init__(self) -> None:
        self.pool = torch.zeros(20, 1, 2, 1, SIZE, 4)
        self.inv_freq = torch.zeros(0)


def test_the_least_attended_old_blocks_go_and_prompt_and_recent_ones_stay():
    config = make_config("aligned", control="snapkv", budget_tokens=5 * SIZE, protected_tokens=2 * SIZE)
    manager = KVCacheManager(20, 1, SIZE, 20, 1, config)
    assert manager.add_sequence(0, np.zeros(2 * SIZE, np.int32))
    assert manager.append_tokens(0, [0] * (8 * SIZE + 1))
    manager.mark_computed(0, 10 * SIZE)
    eviction = BlockEviction(manager, config, PoolRunner())
    table = manager.block_table(0)
    attention = np.zeros(20, np.float32)
    attention[table] = [0, 0, 0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0, 0, 0]  # 2 of prompt, 6 old, 2 recent, 1 partial
    eviction.observe(attention)
    eviction.evict()
    gone = np.flatnonzero(manager.block_table(0) == NO_BLOCK).tolist()
    assert gone == [3, 5, 6]
    eviction.evict()
    assert (manager.block_table(0) == NO_BLOCK).sum() == 3
    manager.check_integrity()


@pytest.mark.parametrize("control", ["snapkv", "rkv"])
def test_requests_stay_within_their_budget(bundled_model, boundaries, prompts, control):
    config = make_config("aligned", control=control, budget_tokens=96, search_interval=1)
    runner = TorchRunner(load_model(bundled_model), 200, 16)
    executor = Executor(runner, config, boundaries, max_seq_len=1024, make_control=make_control)
    handles = [executor.submit(p, SamplingParams(400)) for p in prompts[:3]]
    executor.run_until_idle()
    prompt_blocks = sum(-(-len(p) // 16) for p in prompts[:3])
    # Beside the budget a request holds its partial block, and a full one until the next step.
    assert executor.manager.stats().peak_used_blocks <= prompt_blocks + 3 * (96 // 16 + 2)
    assert all(len(h.result(0).token_ids) == 400 for h in handles)
    executor.manager.check_integrity()


def test_a_runner_without_attention_is_refused(boundaries):
    class Blind:
        num_blocks, num_layers, tokens_per_block = 10, 1, SIZE

    with pytest.raises(UserError, match="control rkv scores blocks by attention, got a runner that does not report it"):
        Executor(Blind(), make_config("aligned", control="rkv"), boundaries, 64, make_control=make_control)


@pytest.mark.parametrize("control", ["snapkv", "rkv"])
def test_more_queries_than_a_block_has_are_refused(control):
    """They would have been cut to a block's in silence."""
    runner = SimpleNamespace(pool=torch.zeros(4, 1, 2, 1, 16, 8), inv_freq=torch.ones(4))
    manager = KVCacheManager(4, 1, 16, 4, 1, make_config("off"))
    with pytest.raises(UserError, match=f"observation_tokens must be at most 16, .* with control {control}, got 17"):
        make_control(manager, make_config("off", control=control, observation_tokens=17), runner)
    assert make_control(manager, make_config("off", control=control, observation_tokens=16), runner).evicts
