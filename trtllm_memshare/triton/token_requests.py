"""A token-level request: what its tensors ask for, within the limits of the deployment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.tensors import RequestTensors

_MAX_INT = 2**31 - 1
_MAX_SEED = 2**63 - 1
MAX_GROUP = 2**62 - 1
"""Largest group of a client; those above are the server's own."""
MAX_SEQUENCES = 64


@dataclass(frozen=True)
class Limits:
    """What one deployment allows.

    Attributes:
      max_prompt_tokens, max_output_tokens: of one request.
      max_requests: in the system at once, waiting ones included; each sequence counts.
      vocab_size: token ids must lie below it.
    """

    max_prompt_tokens: int
    max_output_tokens: int
    max_requests: int
    vocab_size: int


@dataclass(frozen=True)
class TokenRequest:
    """What a client asked for.

    ``num_sequences``: answers to the one prompt, the seed counted up for each. ``streaming``: a response for each batch
    of new tokens instead of one in all. ``perf_metrics``, ``num_input_tokens``, ``num_output_tokens``: figures to
    return. ``group``: see ``Executor.submit``.
    """

    input_ids: list[int]
    params: SamplingParams
    num_sequences: int
    streaming: bool
    echo_input: bool
    perf_metrics: bool
    num_input_tokens: bool
    num_output_tokens: bool
    group: int | None


def parse_token_request(
    tensors: RequestTensors, limits: Limits, stop_token_ids: tuple[int, ...], exclude_input: bool
) -> TokenRequest:
    """Reads the tensors of TensorRT-LLM's ``tensorrt_llm`` model.

    Args:
      tensors: the inputs of one prompt.
      limits: of the deployment.
      stop_token_ids: the model's, used unless ``end_id`` is given.
      exclude_input: whether output leaves the prompt out when the request does not say.

    Raises:
      UserError: a limit is passed or a value makes no sense; the message names the limit.
    """
    output_len = tensors.number("request_output_len", 0, -math.inf, math.inf)
    if not 1 <= output_len <= limits.max_output_tokens:
        raise UserError(
            f"{tensors.name('request_output_len')} must be between 1 and the limit max_output_tokens "
            f"{limits.max_output_tokens}, got {quote(output_len)}"
        )
    group = tensors.number("memshare_group", -1, -1, MAX_GROUP)
    return TokenRequest(
        _prompt(tensors, limits),
        _sampling(tensors, limits, output_len, stop_token_ids),
        tensors.number("num_return_sequences", 1, 1, MAX_SEQUENCES),
        tensors.flag("streaming", False),
        not tensors.flag("exclude_input_in_output", exclude_input),
        tensors.flag("return_perf_metrics", False),
        tensors.flag("return_num_input_tokens", False),
        tensors.flag("return_num_output_tokens", False),
        None if group < 0 else group,
    )


def check_prompt_length(num_tokens: int, limit: int) -> None:
    """Raises UserError if a prompt is longer than the deployment allows."""
    if num_tokens > limit:
        raise UserError(f"the prompt has {num_tokens} tokens, over the limit max_prompt_tokens {limit}")


def _prompt(tensors: RequestTensors, limits: Limits) -> list[int]:
    given = tensors.num_elements("input_ids")
    length = tensors.number("input_lengths", given, 0, _MAX_INT)
    if length > given:
        raise UserError(f"input_lengths must be at most the {given} tokens of input_ids, got {length}")
    check_prompt_length(length, limits.max_prompt_tokens)
    ids = tensors.token_ids("input_ids")[:length]
    if not ids:
        raise UserError("input_ids must hold at least one token, got none")
    outside = next((i for i in ids if not 0 <= i < limits.vocab_size), None)
    if outside is not None:
        raise UserError(f"input_ids must lie in the vocabulary 0..{limits.vocab_size - 1}, got {outside}")
    return ids


def _sampling(
    tensors: RequestTensors, limits: Limits, output_len: int, stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    end_id = tensors.number("end_id", -1, -1, limits.vocab_size - 1)
    temperature = tensors.number("temperature", 1.0, 0.0, 100.0)
    top_k = tensors.number("runtime_top_k", 0, 0, _MAX_INT)
    top_p = tensors.number("runtime_top_p", 0.0, 0.0, 1.0)
    # TensorRT-LLM's rule: without top_k and top_p the best token is taken, whatever the temperature, and a top_p of 0
    # beside a top_k cuts nothing.
    greedy = temperature == 0 or top_k == 1 or (top_k == 0 and top_p == 0)
    bad_words = tensors.word_lists("bad_words_list", limits.vocab_size)
    if len({word[0] for word in bad_words if len(word) == 1}) >= limits.vocab_size:
        raise UserError(f"{tensors.name('bad_words_list')} must leave at least one token of the vocabulary, got all")
    penalty = tensors.number("repetition_penalty", 1.0, 0.0, 100.0)
    if penalty == 0:
        raise UserError(f"{tensors.name('repetition_penalty')} must be above 0 and at most 100, got 0")
    return SamplingParams(
        max_new_tokens=output_len,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p or 1.0,
        seed=tensors.number("seed", 0, 0, _MAX_SEED),
        stop_token_ids=stop_token_ids if end_id < 0 else (end_id,),
        stop_sequences=tensors.word_lists("stop_words_list", limits.vocab_size),
        bad_words=bad_words,
        min_new_tokens=tensors.number("min_tokens", 0, 0, output_len),
        repetition_penalty=penalty,
        presence_penalty=tensors.number("presence_penalty", 0.0, -100.0, 100.0),
        frequency_penalty=tensors.number("frequency_penalty", 0.0, -100.0, 100.0),
        log_probs=tensors.flag("return_log_probs", False),
        min_kept=tensors.share("memshare_min_kept"),
        memshare=not tensors.flag("memshare_off", False),
    )
