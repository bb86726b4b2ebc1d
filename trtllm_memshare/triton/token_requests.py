"""A token-level request: what its tensors ask for, within the limits of the deployment."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.tensors import RequestTensors

_MAX_SEED = _MAX_GROUP = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """What one deployment allows.

    Attributes:
      max_prompt_tokens, max_output_tokens: of one request.
      max_requests: in the system at once, waiting ones included.
      vocab_size: token ids must lie below it.
    """

    max_prompt_tokens: int
    max_output_tokens: int
    max_requests: int
    vocab_size: int


@dataclass(frozen=True)
class TokenRequest:
    """What a client asked for.

    ``streaming``: one response for each batch of new tokens instead of one in all. ``group``: see ``Executor.submit``.
    """

    input_ids: list[int]
    params: SamplingParams
    streaming: bool
    echo_input: bool
    perf_metrics: bool
    group: int | None


def parse_token_request(
    tensors: RequestTensors, limits: Limits, stop_token_ids: tuple[int, ...], exclude_input: bool
) -> TokenRequest:
    """Reads the tensors of TensorRT-LLM's ``tensorrt_llm`` model.

    Args:
      tensors: the request's inputs.
      limits: of the deployment.
      stop_token_ids: the model's, used unless ``end_id`` is given.
      exclude_input: whether output leaves the prompt out when the request does not say.

    Raises:
      UserError: a limit is passed or a value makes no sense; the message names the limit.
    """
    ids = tensors.token_ids("input_ids")
    length = tensors.number("input_lengths", len(ids), 0, 2**31 - 1)
    if length > len(ids):
        raise UserError(f"input_lengths must be at most the {len(ids)} tokens of input_ids, got {length}")
    ids = ids[:length]
    if not ids:
        raise UserError("input_ids must hold at least one token, got none")
    if len(ids) > limits.max_prompt_tokens:
        raise UserError(
            f"the prompt has {len(ids)} tokens, over the limit max_prompt_tokens {limits.max_prompt_tokens}"
        )
    outside = next((i for i in ids if not 0 <= i < limits.vocab_size), None)
    if outside is not None:
        raise UserError(f"input_ids must lie in the vocabulary 0..{limits.vocab_size - 1}, got {outside}")
    output_len = tensors.number("request_output_len", 0, 0, 2**31 - 1)
    if not 1 <= output_len <= limits.max_output_tokens:
        raise UserError(
            f"request_output_len (max_tokens) must be between 1 and the limit max_output_tokens "
            f"{limits.max_output_tokens}, got {output_len}"
        )
    tensors.number("beam_width", 1, 1, 1)
    end_id = tensors.number("end_id", -1, -1, limits.vocab_size - 1)
    temperature = tensors.number("temperature", 0.0, 0.0, 100.0)
    top_k = tensors.number("runtime_top_k", 0, 0, 2**31 - 1)
    params = SamplingParams(
        max_new_tokens=output_len,
        # TensorRT-LLM's default is greedy through top_k 1 at temperature 1.
        temperature=0.0 if top_k == 1 else temperature,
        top_k=top_k,
        top_p=tensors.number("runtime_top_p", 1.0, 0.0, 1.0) or 1.0,
        seed=tensors.number("seed", 0, 0, _MAX_SEED),
        stop_token_ids=stop_token_ids if end_id < 0 else (end_id,),
        stop_sequences=tensors.word_lists("stop_words_list"),
        bad_words=tensors.word_lists("bad_words_list"),
    )
    group = tensors.number("memshare_group", -1, -1, _MAX_GROUP)
    return TokenRequest(
        ids,
        params,
        tensors.flag("streaming", False),
        not tensors.flag("exclude_input_in_output", exclude_input),
        tensors.flag("return_perf_metrics", False),
        None if group < 0 else group,
    )
