"""The TensorRT runner over a stand-in engine that enforces the recorded contract, against the torch runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes.host_device import HostGraph

from trtllm_memshare.cache.offsets import encode_block_offsets
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.rotary import rotary_inv_freq
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

EOS, NEW_TOKENS = 1, 220
CONFIG = make_config("aligned", protected_tokens=16, search_interval=3)


class Recorded:
    """A runner that keeps the block offsets of every step."""

    def __init__(self, runner):
        self._runner, self.offsets = runner, []

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def prepare(self, batch):
        self.offsets.append(batch.block_offsets.copy())
        return self._runner.prepare(batch)


def run(runner, boundaries, prompts, config=CONFIG, lengths=None, **options):
    """Tokens of every request, and the executor."""
    executor = Executor(runner, config, boundaries, 1024, max_batch_size=8, max_num_tokens=96, **options)
    handles = [
        executor.submit(p, SamplingParams(n, stop_token_ids=(EOS,)))
        for p, n in zip(prompts, lengths or [NEW_TOKENS] * len(prompts), strict=True)
    ]
    executor.run_until_idle()
    executor.manager.check_integrity()
    return [h.result(0).token_ids for h in handles], executor


@pytest.fixture(scope="module")
def expected(bundled_model, boundaries, prompts):
    """Tokens and block offsets of the torch runner, with a pool so small that requests are paused."""
    runner = Recorded(TorchRunner(load_model(bundled_model), 60, 16, fold_aliases=False))
    runner.chunk_unit_size = 16  # prompts are cut at ends of blocks, as for the engine
    tokens, executor = run(runner, boundaries, prompts[:6])
    assert executor.manager.stats().shared > 0
    assert executor.stats.num_pauses > 0
    return tokens, runner.offsets


@pytest.mark.parametrize(("use_graphs", "num_profiles"), [(False, 1), (True, 1), (True, 2)])
def test_tokens_and_block_offsets_are_those_of_the_torch_runner(
    make_runner, bundled_model, boundaries, prompts, expected, use_graphs, num_profiles
):
    """Two profiles: one up to 64 tokens, one from there, as TensorRT-LLM's multiple_profiles makes them."""
    runner = make_runner(bundled_model, 60, use_graphs=use_graphs, num_profiles=num_profiles)
    tokens, executor = run(runner, boundaries, prompts[:6])
    assert tokens == expected[0]
    assert executor.manager.stats().shared > 0
    seen = runner.fake.seen_offsets
    assert len(seen) == len(expected[1])
    for got, wanted in zip(seen, expected[1], strict=True):
        batch, width = wanted.shape[1], wanted.shape[3]  # a graph's batch and table are padded
        np.testing.assert_array_equal(got[:, :batch, :, :width], wanted)
        np.testing.assert_array_equal(got[:, batch:], np.repeat(got[:, :1], got.shape[1] - batch, axis=1))


def test_graphs_are_captured_once_for_a_bucket_and_length_and_replayed(make_runner, bundled_model, boundaries, prompts):
    runner = make_runner(bundled_model, use_graphs=True)
    HostGraph.captures = 0
    run(runner, boundaries, prompts[:3], make_config("off"), lengths=[60, 90, 120])
    steps = len(runner.fake.seen_offsets)
    assert 3 <= HostGraph.captures <= 6  # batches of 1, 2 and 3 (padded to 4), at most two rounded lengths each
    assert steps > 100


def test_every_family_and_the_variants_of_the_search(make_runner, family_checkpoint, boundaries):
    """Keys as stored, without their rotation, or stage 1 alone: what is compared and shared is the torch runner's.

    Texts are given, since a model of random weights does not repeat itself.
    """
    torch_runner = TorchRunner(load_model(family_checkpoint), 300, 16, fold_aliases=False)
    engine_runner = make_runner(family_checkpoint, 300, sizes={"max_seq_len": 512})
    shared = {}
    for preset, settings in (("aligned", {}), ("aligned", {"undo_rope": False}), ("lexical", {})):
        config = make_config(preset, protected_tokens=16, protected_steps=0, search_interval=2, **settings)
        results = []
        for runner in (torch_runner, engine_runner):
            sampler = ReplaySampler()
            executor = Executor(runner, config, boundaries, 512, max_batch_size=4, sampler=sampler)
            for seed in range(3):
                piece = np.random.default_rng(seed).integers(4, runner.vocab_size, 45).tolist()
                handle = executor.submit(piece[:7], SamplingParams(250))
                sampler.add_script(handle.request_id, (piece * 7)[7:257])
            executor.run_until_idle()
            policy = executor.sharing.policy
            results.append((policy.num_candidates, dict(policy.rejected), executor.manager.stats().shared))
        assert results[0] == results[1]
        assert results[0][0] > 20
        shared[preset, settings.get("undo_rope")] = results[0][2]
    assert shared["lexical", None] > 20
    assert shared["aligned", False] < shared["aligned", None]  # rotated keys of one text are further apart


def test_frequencies_without_the_model_are_those_of_the_model(family_checkpoint):
    model = load_model(family_checkpoint)
    assert torch.equal(rotary_inv_freq(family_checkpoint), model.model.rotary_emb.inv_freq.float())


def test_two_steps_may_be_prepared_before_the_first_runs(make_runner, bundled_model, prompts):
    """The stream runs late: inputs of the second step must not reach the first."""
    runner = make_runner(bundled_model)
    first, second = [_context(runner, prompts[i], i) for i in (0, 1)]
    expected = [runner.step(runner.prepare(b)).logits.clone() for b in (first, second)]
    prepared = [runner.prepare(b) for b in (first, second)]
    assert torch.equal(runner.step(prepared[0]).logits, expected[0])
    assert torch.equal(runner.step(prepared[1]).logits, expected[1])
    prepared = [runner.prepare(b) for b in (first, second, first)]
    with pytest.raises(RuntimeError, match=r"inputs of step .* were overwritten by step"):
        runner.step(prepared[0])


def _context(runner, prompt, index):
    """A prompt as one context chunk in blocks of its own."""
    count = np.array([len(prompt)], np.int32)
    blocks = np.arange(index * 20, index * 20 + -(-len(prompt) // 16), dtype=np.int32)[None]
    positions = np.arange(len(prompt), dtype=np.int32)
    offsets = encode_block_offsets(blocks, runner.num_layers)
    return StepBatch(np.array(prompt, np.int32), positions, 1, count, count, offsets, context_lengths=count)
