"""Masked replay against the executor that goes token by token, and against transformers: same decisions and logits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.step_by_step import served_at_floor, step_by_step
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.evaluation import masked_attention, masked_replay, page_facts
from trtllm_memshare.evaluation.masked_attention import MaskedPass
from trtllm_memshare.evaluation.masked_replay import MaskedReplay, nothing_retired
from trtllm_memshare.evaluation.page_arms import ARMS, Budget, ranking_of, retire
from trtllm_memshare.evaluation.page_facts import CollectingPass, text_signatures
from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
from trtllm_memshare.evaluation.retirement import NEVER, Retirements, hold_at_floor, nearest_earlier
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "smollm2"
SIZE, TOKENS, PROMPT = 8, 203, 11
FP8 = torch.float8_e4m3fn
PROTECTED = 24
IDS = (np.random.default_rng(5).integers(4, 60, TOKENS - 90).tolist() * 2)[:TOKENS]


@pytest.fixture(scope="module")
def replay(tiny_checkpoint) -> MaskedReplay:
    return MaskedReplay(tiny_checkpoint)


@pytest.fixture(scope="module")
def full(replay):
    return replay.read(IDS, SIZE)


@pytest.fixture(scope="module")
def runner(tiny_checkpoint) -> TorchRunner:
    return TorchRunner(load_model(tiny_checkpoint), 40, SIZE)


@pytest.fixture(scope="module")
def plain(runner) -> BoundaryTokens:
    return BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])


@pytest.mark.parametrize(
    ("name", "min_kept"),
    [*((name, 0.5) for name in [*ARMS, "paper-alias"]), ("attention-redundancy", 0.25), ("paper-alias", 0.25)],
)
def test_decisions_and_logits_are_those_of_the_executor(replay, full, runner, plain, name, min_kept):
    budget = Budget(min_kept, PROTECTED)
    masked = retire(name, budget, PROMPT, TOKENS, full.facts, 3)
    paper = name == "paper-alias"
    become = "alias" if paper else "dropped"
    choose = nearest_earlier(full.facts.distance, 8) if paper else ranking_of(ARMS[name], full.facts, 3)
    stepped, logits = step_by_step(runner, plain, IDS, PROMPT, choose, min_kept, PROTECTED, become)
    assert (masked.retired_at < NEVER).sum() >= 8
    assert np.array_equal(masked.retired_at, stepped.retired_at)
    assert np.array_equal(masked.donor, stepped.donor)
    torch.testing.assert_close(replay.logits(IDS, masked)[PROMPT - 1 : -1], logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("min_kept", [0.62, 0.53, 0.1])
@pytest.mark.parametrize("becomes", ["alias", "dropped"])
def test_the_papers_choice_while_serving_is_that_of_the_study(replay, full, runner, plain, becomes, min_kept):
    """From the pages that serving compares: what was written after an alias differs a little from the full pass."""
    changes = {"protected_tokens": PROTECTED, "min_kept": min_kept, "retired_becomes": becomes}
    config = make_config("pressure", need="nearest-earlier", **changes)
    served, distance, logits = served_at_floor(runner, plain, IDS, PROMPT, config)
    studied = hold_at_floor(PROMPT, TOKENS, SIZE, min_kept, PROTECTED, nearest_earlier(distance, 8))
    studied = studied if becomes == "alias" else studied.forgotten()
    assert (studied.retired_at < NEVER).sum() >= 8
    assert np.array_equal(studied.retired_at, served.retired_at)
    assert np.array_equal(studied.donor, served.donor)
    untouched = slice(-(-PROMPT // SIZE), studied.first // SIZE)
    compared, expected = (np.tril(d[untouched, untouched], -1) for d in (distance, full.facts.distance))
    np.testing.assert_allclose(compared, expected, atol=2e-3)
    torch.testing.assert_close(replay.logits(IDS, studied)[PROMPT - 1 : -1], logits, rtol=0, atol=1e-3)


def test_the_full_pass_is_the_models_own(replay, full, tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with torch.inference_mode():
        log_p = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    expected = -log_p[torch.arange(TOKENS - 1), torch.tensor(IDS[1:])]
    torch.testing.assert_close(torch.from_numpy(full.losses[1:]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(replay.logits(IDS, nothing_retired(TOKENS, SIZE)).log_softmax(-1), log_p)
    assert torch.equal(full.best, log_p.argmax(-1))


@pytest.mark.parametrize("name", ["redundancy-k", "paper-alias"])
def test_changes_are_those_of_the_logits_and_nothing_changes_before_the_first_retirement(replay, full, name):
    retirements = retire(name, Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    change = replay.change(full, retirements)
    arm = replay.logits(IDS, retirements)[:-1].double().log_softmax(-1)
    whole = replay.logits(IDS, nothing_retired(TOKENS, SIZE))[:-1].double().log_softmax(-1)
    targets = torch.tensor(IDS[1:])[:, None]
    loss = (whole - arm).gather(1, targets)[:, 0]
    divergence = (whole.exp() * (whole - arm)).sum(-1)
    first = retirements.first
    assert first is not None
    assert change.loss[:first].any() == change.divergence[:first].any() == False  # noqa: E712
    assert np.abs(change.loss[first:]).max() > 0.01
    np.testing.assert_allclose(change.loss, loss, atol=2e-3)
    np.testing.assert_allclose(change.divergence, divergence, atol=2e-3)
    assert np.array_equal(change.agrees, (whole.argmax(-1) == arm.argmax(-1)).numpy())


def test_no_retirement_changes_nothing(replay, full):
    change = replay.change(full, nothing_retired(TOKENS, SIZE))
    assert not change.loss.any()
    assert not change.divergence.any()
    assert change.agrees.all()


def rounded_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention over K and V as a cache in fp8 holds them, by transformers' interface."""
    key, value = (x.to(FP8).float().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


def test_a_cache_in_fp8_rounds_k_and_v(replay, full, tiny_checkpoint):
    AttentionInterface.register("rounded", rounded_attention)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="rounded").eval()
    with torch.inference_mode():
        log_p = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    expected = -log_p[torch.arange(TOKENS - 1), torch.tensor(IDS[1:])] - torch.from_numpy(full.losses[1:])
    change = replay.change(full, nothing_retired(TOKENS, SIZE), FP8)
    torch.testing.assert_close(torch.from_numpy(change.loss), expected, rtol=0, atol=2e-3)
    assert expected.abs().max() > 0.02
    # Of pages that go as well, with a type that rounds nothing the change is that of the pages alone.
    retirements = retire("streaming", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    exact, same = replay.change(full, retirements), replay.change(full, retirements, torch.float32)
    np.testing.assert_allclose(same.loss, exact.loss, atol=1e-3)
    assert np.abs(replay.change(full, retirements, FP8).loss - exact.loss).max() > 0.02


def test_branches_read_what_is_left_of_the_text_and_not_each_other(replay, full):
    retirements = retire("streaming", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    branches = [[7, 8, 9, 10], [30, 31]]
    together = replay.answers(full, retirements, branches)
    for branch, logits in zip(branches, together, strict=True):
        alone = replay.logits(IDS + branch, retirements)[TOKENS:]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    nothing = replay.answers(full, nothing_retired(TOKENS, SIZE), branches)
    assert (nothing[0] - together[0]).abs().max() > 1e-2
    whole = replay.answers(full, retirements, branches, torch.float32)  # read from the first token on
    torch.testing.assert_close(whole[0], together[0], rtol=1e-4, atol=1e-4)
    rounded = replay.answers(full, retirements, branches, FP8)
    assert (rounded[0] - together[0]).abs().max() > 1e-2


def test_bfloat16_products_agree_with_float32(replay, full, tiny_checkpoint):
    fast = MaskedReplay(tiny_checkpoint, "bfloat16")
    retirements = retire("random-once", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    exact, quick = replay.change(full, retirements), fast.change(fast.read(IDS, SIZE), retirements)
    assert abs(float(exact.loss.mean()) - float(quick.loss.mean())) < 0.02 * np.abs(exact.loss).mean()


@pytest.mark.parametrize("chunk", [8, 24])
def test_queries_in_smaller_chunks_see_the_same(replay, full, tiny_checkpoint, monkeypatch, chunk):
    """Memory is bounded by the chunk, whatever the length of the text."""
    retirements = retire("paper-alias", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    expected = replay.change(full, retirements)
    monkeypatch.setattr(masked_attention, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(page_facts, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(masked_replay, "_ROWS", 5)
    again = replay.read(IDS, SIZE)
    np.testing.assert_allclose(again.losses, full.losses, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again.facts.attention, full.facts.attention, rtol=1e-4, atol=1e-6)
    change = replay.change(again, retirements)
    np.testing.assert_allclose(change.loss, expected.loss, atol=1e-3)
    np.testing.assert_allclose(change.divergence, expected.divergence, atol=1e-3)


def test_nothing_of_a_pass_is_left_on_the_cpu_where_the_model_is_elsewhere(tiny_checkpoint, monkeypatch):
    """On torch's device without memory, which like CUDA takes no tensor of the CPU beside its own."""
    replay = MaskedReplay(tiny_checkpoint)
    replay.model.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    layers = replay.model.config.num_hidden_layers
    collect = CollectingPass(TOKENS, layers, SIZE, replay.model.model.rotary_emb.inv_freq.float())
    with torch.inference_mode():
        hidden = [replay._hidden(torch.tensor(IDS), torch.arange(TOKENS), collect)]
        arm = MaskedPass(nothing_retired(TOKENS, SIZE), TOKENS, 100, collect.states)
        hidden.append(replay._hidden(torch.tensor(IDS[100:]), torch.arange(100, TOKENS), arm))
        signatures = text_signatures(collect._units["v"], collect.states[0][0].shape[-1])
    assert {tensor.device.type for tensor in (*hidden, signatures, *collect.states[0])} == {"meta"}
    assert collect._attention.device == collect._distance.device == hidden[0].device


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(replay, full, tiny_checkpoint):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = MaskedReplay(tiny_checkpoint, device="cuda")
    retirements = retire("paper-alias", Budget(0.5, PROTECTED), PROMPT, TOKENS, full.facts, 0)
    expected, found = replay.change(full, retirements), there.change(there.read(IDS, SIZE), retirements)
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-3)
    np.testing.assert_allclose(found.divergence, expected.divergence, atol=1e-3)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs models/smollm2: run build_scripts/get_smollm2.py")
@pytest.mark.parametrize("name", ["surprisal-redundancy", "paper-alias", "random"])
def test_smollm2_reads_a_trace_as_the_executor_does(name):
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    text = next(token_texts(read_traces(ROOT / "benchmarks/data/traces"), tokenizer, 256))
    replay = MaskedReplay(SMOLLM2)
    facts = replay.read(text.ids, 16).facts
    runner = TorchRunner(load_model(SMOLLM2), 20, 16)
    plain = BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])
    prompt = text.num_prompt_tokens
    masked = retire(name, Budget(0.5, 32), prompt, 256, facts, 0)
    paper = name == "paper-alias"
    choose = nearest_earlier(facts.distance, 8) if paper else ranking_of(ARMS[name], facts, 0)
    stepped, logits = step_by_step(runner, plain, text.ids, prompt, choose, 0.5, 32, "alias" if paper else "dropped")
    assert (masked.retired_at < NEVER).sum() >= 3
    assert np.array_equal(masked.retired_at, stepped.retired_at)
    assert np.array_equal(masked.donor, stepped.donor)
    found = replay.logits(text.ids, masked)[prompt - 1 : -1]
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-3)


def test_chains_of_aliases_add_up():
    never = NEVER
    retired_at = np.array([never, never, 100, never, never, 200, never, never, never, never])
    donor = np.array([-1, -1, 5, -1, -1, 9, -1, -1, -1, -1], np.int32)
    weights = Retirements(16, retired_at, donor).weights(np.array([99, 100, 199, 200, 300]))
    assert weights[:, 5].tolist() == [1, 2, 2, 2, 2]  # hidden from 200 on
    assert weights[:, 9].tolist() == [1, 1, 1, 3, 3]
    assert (np.delete(weights, [5, 9], 1) == 1).all()
    assert (Retirements(16, retired_at, donor).forgotten().weights(np.array([300])) == 1).all()


@pytest.mark.parametrize("donor", [[-1, 0, 1], [-1, 2, 0]])
def test_a_chain_that_goes_at_one_position_hands_on_all_that_it_stands_for(donor):
    retired_at = np.array([NEVER, 100, 100])
    weights = Retirements(16, retired_at, np.array(donor, np.int32)).weights(np.array([100]))
    assert weights[0, 0] == 3


def test_the_floor_is_held_and_the_prompt_and_recent_pages_stay():
    retirements = hold_at_floor(20, 320, 16, 0.5, 64, ranking_of(ARMS["streaming"], _no_facts(20), 0))
    for page in range(2, 20):  # page - 1 pages are generated, at least half of them are there
        assert (retirements.retired_at[2:] <= 16 * (page + 1)).sum() <= (page - 1) / 2
    assert (retirements.retired_at[:2] == NEVER).all()
    assert (retirements.retired_at[-4:] == NEVER).all()
    gone = np.flatnonzero(retirements.retired_at < NEVER)
    assert gone.tolist() == list(range(2, 2 + len(gone)))  # the oldest went
    assert len(gone) == 9
    assert 0.5 <= retirements.memory_share(2) < 0.62


def _no_facts(pages: int):
    from trtllm_memshare.evaluation.page_facts import TextFacts

    zeros = np.zeros((pages, pages), np.float32)
    cosines = {"k": np.zeros((pages * 16, pages), np.float32)}
    return TextFacts(16, zeros, cosines, np.zeros(pages, np.float32), zeros)
