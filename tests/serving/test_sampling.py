"""Top-k and top-p against their definitions."""

from __future__ import annotations

import pytest
import torch

from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams
from trtllm_memshare.serving.sampling import NO_TOKEN, Sampler, token_log_probs

LOGITS = torch.tensor([[0.5, 0.3, 0.1, 0.07, 0.03]]).log()


def request(params: SamplingParams, tokens: tuple[int, ...] = (4,)) -> RequestState:
    return RequestState(0, [4], params, RequestHandle(0), tokens=list(tokens))


def drawn(count: int = 400, **options) -> list[int]:
    sampler, params = Sampler(), SamplingParams(temperature=1.0, seed=3, **options)
    return [sampler.sample(LOGITS, [request(params)])[0] for _ in range(count)]


def test_greedy_takes_the_largest():
    assert Sampler().sample(LOGITS.flip(1), [request(SamplingParams())]) == [4]


def test_top_k_and_top_p_cut_the_tail():
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_p=0.75)) == {0, 1}
    assert set(drawn(top_p=0.01)) == {0}
    assert set(drawn()) == {0, 1, 2, 3, 4}


def test_frequencies_follow_the_probabilities():
    tokens = torch.tensor(drawn(4000))
    observed = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(observed, LOGITS[0].exp(), atol=0.03, rtol=0)


def test_a_finished_request_s_id_starts_over_with_its_seed():
    sampler, params = Sampler(), SamplingParams(temperature=1.0, seed=3)
    first = [sampler.sample(LOGITS, [request(params)])[0] for _ in range(20)]
    sampler.forget(0)
    assert [sampler.sample(LOGITS, [request(params)])[0] for _ in range(20)] == first


def test_a_bad_word_is_not_completed_and_may_begin():
    params = SamplingParams(bad_words=((0,), (2, 1), (9, 2, 1)))
    sampler = Sampler()
    assert sampler.sample(LOGITS, [request(params)]) == [1]
    assert sampler.sample(LOGITS, [request(params, (4, 2))]) == [2]
    assert sampler.sample(LOGITS.repeat(2, 1), [request(SamplingParams()), request(params)]) == [0, 1]
    assert set(drawn(bad_words=((0,), (4, 3)))) == {1, 2, 4}
    assert LOGITS.isfinite().all()


def test_stop_sequences_count_generated_tokens_only():
    params = SamplingParams(stop_token_ids=(3,), stop_sequences=((4, 2), (0, 1)))
    assert request(params, (4, 3)).stops
    assert not request(params, (4, 2)).stops  # the 4 is the prompt's
    assert request(params, (4, 4, 2)).stops
    assert not request(params, (4, 0, 2, 1)).stops


def test_penalties_count_prompt_and_output_as_tensorrt_llm_does():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])

    def greedy(tokens, **options) -> int:
        return Sampler().sample(logits, [request(SamplingParams(**options), tokens)])[0]

    assert greedy((0,), repetition_penalty=2.0) == 1  # 2.0 becomes 1.0
    assert greedy((0, 1), repetition_penalty=2.0) == 0
    assert greedy((0,), presence_penalty=0.6) == 1
    assert greedy((0, 0, 1), frequency_penalty=0.4) == 0  # 2.0 - 0.8 against 1.5 - 0.4
    assert greedy((0, 0, 1), frequency_penalty=0.6) == 1
    assert Sampler().sample(logits[:, 2:], [request(SamplingParams(repetition_penalty=2.0), (0,))]) == [1]
    assert logits.tolist() == torch.tensor([[2.0, 1.5, -1.0, -1.2]]).tolist()


def test_counts_go_on_with_the_request_and_end_with_it():
    sampler, params = Sampler(), SamplingParams(frequency_penalty=0.3)
    logits = torch.tensor([[1.0, 0.9]])
    state = request(params, (0,))
    seen = []
    for _ in range(4):
        seen += sampler.sample(logits, [state])
        state.tokens.append(seen[-1])
    assert seen == [1, 0, 1, 0]
    sampler.forget(0)
    assert sampler.sample(logits, [request(params, (1,))]) == [0]


def test_stop_tokens_wait_for_min_new_tokens():
    params = SamplingParams(stop_token_ids=(0,), min_new_tokens=2)
    sampler = Sampler()
    assert sampler.sample(LOGITS, [request(params)]) == [1]
    assert sampler.sample(LOGITS, [request(params, (4, 1, 1))]) == [0]


def test_no_value_makes_the_sampler_fail():
    tiny = SamplingParams(temperature=1e-39, seed=1)
    assert Sampler().sample(LOGITS, [request(tiny)]) == [0]
    everything = SamplingParams(temperature=1.0, bad_words=tuple((i,) for i in range(5)))
    assert Sampler().sample(LOGITS, [request(everything)])[0] in range(5)


def test_log_probs_are_the_model_s_own():
    found = token_log_probs(LOGITS.repeat(2, 1) + 3, [0, 4])
    torch.testing.assert_close(found.exp(), torch.tensor([0.5, 0.03]))


@pytest.mark.parametrize("tokens", [[], [2], [0, 3, NO_TOKEN]])
def test_log_probabilities_are_those_of_the_chosen_tokens(tokens):
    logits = torch.randn(len(tokens), 5, generator=torch.Generator().manual_seed(1))
    found = token_log_probs(logits, tokens)
    expected = [logits[row].log_softmax(-1)[max(0, token)].item() for row, token in enumerate(tokens)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "one row is drawn"])
def test_the_sampler_tells_the_log_probabilities_of_what_it_chose(temperature):
    """Banned, drawn and greedy rows: the model's own, whatever the row was made into; also of other tokens."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    banned = SamplingParams(bad_words=((int(logits[1].argmax()),),))
    params = [SamplingParams(), banned, SamplingParams(temperature=temperature, seed=9), SamplingParams()]
    logits[3, 0] = torch.nan
    sampler = Sampler()
    tokens = sampler.sample(logits, [request(one) for one in params])
    assert tokens[3] == NO_TOKEN
    assert tokens[1] != logits[1].argmax()
    for asked in (tokens, list(tokens), [0, 1, 2, 3]):
        found = sampler.log_probs_of(logits, asked)[:3]
        torch.testing.assert_close(found, logits.log_softmax(-1)[range(3), asked[:3]])
