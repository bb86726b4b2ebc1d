"""The executor on the bundled model: equality with transformers, capacity policies, streaming, cancellation."""

from __future__ import annotations

import pytest
import torch
from fakes.counting_runner import CountingRunner
from transformers import AutoModelForCausalLM

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import Phase, RequestHandle, RequestState, SamplingParams
from trtllm_memshare.serving.scheduler import GUARANTEED_NO_EVICT, MAX_UTILIZATION, Scheduler

EOS = 1
SIZE = 16
NEW_TOKENS = 160


@pytest.fixture(scope="module")
def runner(bundled_model) -> TorchRunner:
    return TorchRunner(load_model(bundled_model), 1200, SIZE)


@pytest.fixture(scope="module")
def short(prompts) -> list[list[int]]:
    """Eight prompts whose whole answers take 529 to 881 tokens, the first of which soon repeats itself."""
    return [prompts[place] for place in (1, 2, 3, 4, 5, 7, 9, 11)]


@pytest.fixture(scope="module")
def stock(bundled_model):
    """The model as transformers alone computes it."""
    return AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def generated(stock, prompts) -> list[list[int]]:
    """What transformers' own greedy `generate` gives for the first prompts, one by one."""
    outputs = []
    for prompt in prompts[:4]:
        ids = stock.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module")
def answers(runner, boundaries, short):
    """Whole answers without sharing, and their executor."""
    return run(runner, boundaries, short, make_config("off"), max_new_tokens=1000)


def run(runner, boundaries, prompts, config, max_new_tokens=NEW_TOKENS, num_blocks=None, **options):
    """Tokens of every prompt, and the executor."""
    if num_blocks is not None:
        small = TorchRunner.__new__(TorchRunner)
        small.__dict__.update(runner.__dict__, num_blocks=num_blocks, pool=runner.pool[:num_blocks])
        runner = small
    executor = Executor(runner, config, boundaries, max_seq_len=2304, **options)
    params = SamplingParams(max_new_tokens, stop_token_ids=(EOS,))
    handles = [executor.submit(p, params) for p in prompts]
    while executor.has_work:
        executor.step()
        executor.manager.check_integrity()
    assert executor.manager.pool.num_used == 0
    return [h.result(0).token_ids for h in handles], executor


def test_off_equals_transformers_generate(runner, boundaries, prompts, generated):
    outputs, _ = run(runner, boundaries, prompts[:4], make_config("off"), max_num_tokens=64)
    assert outputs == generated


@torch.inference_mode()
def test_off_gives_what_transformers_would_say_next_on_fifty_prompts(runner, boundaries, prompts, stock):
    """Each token is the likeliest after all before it, in one pass over the text: so greedy `generate` takes it too."""
    outputs, _ = run(runner, boundaries, prompts, make_config("off"), max_batch_size=16, max_num_tokens=64)
    assert len(prompts) >= 50
    for prompt, ids in zip(prompts, outputs, strict=True):
        likeliest = stock(torch.tensor([prompt + ids])).logits[0].argmax(-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == ids
        assert len(ids) == NEW_TOKENS or ids[-1] == EOS


def test_shadow_gives_the_tokens_of_off_and_still_finds_repeats(runner, boundaries, short, answers):
    shadow, executor = run(runner, boundaries, short[:6], make_config("aligned", shadow=True), max_new_tokens=400)
    assert shadow == [ids[:400] for ids in answers[0][:6]]
    assert executor.manager.stats().shadowed > 0
    assert executor.manager.stats().shared == 0


def test_sharing_frees_blocks_and_keeps_most_answers(runner, boundaries, short, answers):
    off, full = answers
    shared, executor = run(runner, boundaries, short, make_config("aligned"), max_new_tokens=1000)
    assert executor.manager.stats().shared_block_fraction > 0.1
    assert executor.stats.block_steps < full.stats.block_steps
    tails = [[ids[-8:] for ids in outputs] for outputs in (off, shared)]
    assert sum(a == b for a, b in zip(*tails, strict=True)) >= 7


class PairsInTheBatch:
    """A runner whose search is part of its step, as an engine's is."""

    def __init__(self, runner) -> None:
        for name in ("num_layers", "num_blocks", "tokens_per_block", "vocab_size", "prepare", "step"):
            setattr(self, name, getattr(runner, name))


@pytest.mark.parametrize("preset", ["aligned", "lexical"])
def test_stage_1_behind_the_launch_decides_as_it_does_before_it(runner, boundaries, short, preset):
    """Once between the step's launch and its results, once ahead of the batch: the same shares in the same steps."""
    results = []
    for each in (runner, PairsInTheBatch(runner)):
        outputs, executor = run(each, boundaries, short[:4], make_config(preset), max_new_tokens=450)
        results.append((outputs, executor.manager.stats(), executor.rejected, executor.stats.block_steps))
    assert results[0] == results[1]
    assert results[0][1].shared > 0


def test_candidates_are_looked_for_after_the_step_is_enqueued(runner, boundaries, short, monkeypatch):
    calls = []

    class Recorded(PairsInTheBatch):
        def compare(self, pairs):
            calls.append("compare")
            return runner.compare(pairs)

    recorded = Recorded(runner)
    step, candidates = recorded.step, KVCacheManager.candidates
    monkeypatch.setattr(recorded, "step", lambda inputs: calls.append("step") or step(inputs))
    monkeypatch.setattr(KVCacheManager, "candidates", lambda manager: calls.append("candidates") or candidates(manager))
    config = make_config("aligned", search_interval=1)
    run(recorded, boundaries, short[:1], config, max_new_tokens=300)
    assert "compare" in calls
    for index, call in enumerate(calls):
        if call == "compare":
            assert calls[index - 2 : index] == ["step", "candidates"]


@pytest.mark.parametrize("preset", ["off", "aligned"])
@pytest.mark.parametrize("policy", [MAX_UTILIZATION, GUARANTEED_NO_EVICT])
def test_a_small_pool_delays_but_changes_no_token(runner, boundaries, short, answers, preset, policy):
    """Every generated token is protected, so nothing is shared: pauses and waits alone must not change an output."""
    config = make_config(preset, protected_tokens=NEW_TOKENS)
    outputs, executor = run(
        runner, boundaries, short, config, num_blocks=30, scheduler_policy=policy, max_num_tokens=48
    )
    assert outputs == [ids[:NEW_TOKENS] for ids in answers[0]]
    assert executor.manager.stats().peak_used_blocks <= 30
    assert (executor.stats.num_pauses > 0) is (policy == MAX_UTILIZATION)


def test_paused_requests_share_again_and_all_end(runner, boundaries, short):
    outputs, executor = run(runner, boundaries, short[:6], make_config("aligned"), max_new_tokens=500, num_blocks=80)
    assert len(outputs) == 6
    assert executor.stats.num_pauses > 0
    assert executor.manager.stats().shared > 0


@pytest.mark.parametrize(
    "settings",
    [{"count_aliases": False}, {"control": "random"}, {"control": "streaming", "streaming_window_tokens": 64}],
)
def test_controls_run_and_change_memory(runner, boundaries, short, settings):
    config = make_config("aligned", **settings)
    _, executor = run(runner, boundaries, short[:4], config, max_new_tokens=350, make_control=make_control)
    assert executor.manager.stats().shared_block_fraction > 0


def test_a_control_is_not_served_with(runner, boundaries):
    with pytest.raises(UserError, match=r"control random is an experiment's, got it in settings to serve with"):
        Executor(runner, make_config("aligned", control="random"), boundaries, max_seq_len=512)


def test_sampled_tokens_do_not_depend_on_the_batch(runner, boundaries, prompts):
    params = SamplingParams(40, temperature=8.0, top_k=20, top_p=0.95, seed=7)
    outputs = []
    for others in (0, 5):
        executor = Executor(runner, make_config("off"), boundaries, max_seq_len=512)
        handles = [executor.submit(p, SamplingParams(40)) for p in prompts[1 : 1 + others]]
        handle = executor.submit(prompts[0], params)
        executor.run_until_idle()
        outputs.append(handle.result(0).token_ids)
        assert all(h.result(0).finish_reason == "length" for h in handles)
    assert outputs[0] == outputs[1]
    executor = Executor(runner, make_config("off"), boundaries, max_seq_len=512)
    greedy = executor.submit(prompts[0], SamplingParams(40))
    executor.run_until_idle()
    assert outputs[0] != greedy.result(0).token_ids


def test_threaded_streaming_cancellation_and_statistics(runner, boundaries, prompts, generated):
    with Executor(runner, make_config("off"), boundaries, max_seq_len=2304) as executor:
        stream = executor.submit(prompts[0], SamplingParams(NEW_TOKENS))
        endless = executor.submit(prompts[1], SamplingParams(2000))
        assert list(stream) == generated[0]
        endless.cancel()
        result = endless.result(30)
    assert result.finish_reason == "cancelled"
    assert result.stats.num_output_tokens < 2000
    assert executor.manager.pool.num_used == 0
    stats = stream.result(0).stats
    assert 0 < stats.ttft_s < stats.latency_s
    assert stats.num_output_tokens == len(generated[0])
    with pytest.raises(UserError, match="shutting down"):
        executor.submit(prompts[0])


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ([], 5, "input_ids must hold at least one token, got none"),
        ([5], 0, "max_new_tokens must be between 1 and 2147483647, got 0"),
        ([5] * 500, 13, r"must fit max_seq_len 512, got 500 \+ 13 tokens"),
        ([5] * 400, 100, r"too small for one request: 500 tokens need 32 blocks of 16, the pool has 20 .*32 or more"),
    ],
)
def test_requests_that_cannot_run_are_refused(runner, boundaries, prompt, new_tokens, message):
    small = TorchRunner.__new__(TorchRunner)
    small.__dict__.update(runner.__dict__, num_blocks=20)
    executor = Executor(small, make_config("off"), boundaries, max_seq_len=512)
    with pytest.raises(UserError, match=message):
        executor.submit(prompt, SamplingParams(new_tokens))


def test_an_unknown_policy_names_the_nearest(runner, boundaries):
    with pytest.raises(UserError, match=r"MAX_UTILISATION \(did you mean MAX_UTILIZATION\?\)"):
        Executor(runner, make_config("off"), boundaries, 512, scheduler_policy="MAX_UTILISATION")


def test_a_step_that_holds_no_chunk_of_a_context_is_refused():
    """TensorRT-LLM's chunks are whole blocks: a step of fewer tokens would take none, for ever."""
    manager = KVCacheManager(100, 1, 16, 20, 4, make_config("off"))
    with pytest.raises(UserError, match=r"max_num_tokens must be at least 16, .* got 15 \(raise --max-num-tokens\)"):
        Scheduler(manager, MAX_UTILIZATION, 4, 15, chunk_unit_size=16)
    with pytest.raises(UserError, match="max_batch_size must be at least 1, got 0"):
        Scheduler(manager, MAX_UTILIZATION, 0, 64)


def test_a_pool_that_is_too_small_says_a_size_that_is_enough(boundaries):
    """Null pages take blocks of it, which the advice counts."""
    executor = Executor(CountingRunner(), make_config("off"), boundaries, max_seq_len=400)
    pool = executor.manager.pool
    pool.reserve(range(pool.num_blocks - 3))
    needed = executor.manager.blocks_for(390)
    with pytest.raises(UserError, match=f"set --kv-cache-blocks {needed + pool.num_null} or more"):
        executor.submit([5] * 380, SamplingParams(10))


def test_sharing_waits_until_the_pool_needs_it(runner, boundaries, short):
    """With room for all nothing is shared; in a pool that fills up, sharing sets in and the requests end."""
    config = make_config("aligned", min_pool_use=0.8)
    _, roomy = run(runner, boundaries, short[:4], config, max_new_tokens=350)
    assert roomy.manager.stats().shared == 0
    _, tight = run(runner, boundaries, short[:4], config, max_new_tokens=350, num_blocks=70)
    assert tight.manager.stats().shared > 0


def test_context_chunks_end_where_blocks_do():
    """TensorRT-LLM's chunk_unit_size: all but a prompt's last chunk are a multiple of it, and nobody starves."""
    manager = KVCacheManager(100, 1, 16, 20, 4, make_config("off"))
    scheduler = Scheduler(manager, MAX_UTILIZATION, 4, 50, chunk_unit_size=16)
    states = [RequestState(i, [1] * 70, SamplingParams(5), RequestHandle(i), None, tokens=[1] * 70) for i in range(3)]
    for state in states:
        scheduler.add(state)
    chunks = []
    for _ in range(12):
        step = scheduler.schedule()
        assert sum(c for _, c in step.contexts) + len(step.generations) <= 50
        for state, chunk in step.contexts:
            assert chunk % 16 == 0 or state.num_computed + chunk == 70
            state.num_computed += chunk
            manager.mark_computed(state.request_id, state.num_computed)
            chunks.append(chunk)
            if state.num_computed == 70:
                state.phase = Phase.GENERATION
                state.tokens.append(1)
        if all(s.phase is Phase.GENERATION for s in states):
            break
    assert sum(chunks) == 210
    assert len(chunks) > 3
