"""Requests of the OpenAI-compatible endpoint: what is used, and what is accepted only at values that change nothing."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.triton.tensors import MAX_WORD_ELEMENTS, MAX_WORDS

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "skip_special_tokens": (None, True),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
}
"""Accepted at these values, refused at others."""

_WITHOUT_EFFECT = (
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "verbosity", "length_penalty", "request_id",
)  # fmt: skip
"""Accepted at every value: they ask nothing of the model."""


MAX_PROMPTS = 1024
"""Of one request; each becomes a task."""
_MAX_MESSAGES = 4096
_MAX_DRAWN_SEED = 2**62
_Element = TypeVar("_Element")
_Sequence = Annotated[list[_Element], Field(fail_fast=True)]
"""Read until its first fault: an error for each of a million elements takes gigabytes."""


FORMS = {
    "prompt": "a text, a list of texts, token ids, or a list of token ids for each prompt",
    "stop": "a text or a list of texts",
}
"""What fields of several forms may hold."""


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk with the counts of tokens."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. Beside OpenAI's: ``top_k``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos`` as
    other servers have them, and MemShare's settings for one request."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = Field(default=1, ge=1, le=64)
    seed: int | None = None
    stop: StrictStr | _Sequence[StrictStr] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    memshare_group: int | None = None
    memshare_min_kept: float | None = None
    memshare_off: bool = False

    @property
    def stop_words(self) -> list[str]:
        """Texts that end an answer.

        Raises:
          UserError: more than what Triton's inputs may hold; every one is looked for after every token.
        """
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        length = sum(map(len, words))
        if len(words) > MAX_WORDS or length > MAX_WORD_ELEMENTS:
            raise UserError(
                f"stop may hold {MAX_WORDS} texts and {MAX_WORD_ELEMENTS} characters, got {len(words)} and {length}"
            )
        return [word for word in words if word]

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_extra(self) -> None:
        """Refuses a field that asks for what this server cannot do.

        Raises:
          UserError: names it.
        """
        for name, value in (self.stream_options.model_extra or {} if self.stream_options else {}).items():
            if name != "include_obfuscation" and value not in (None, False):  # that one only pads what is sent
                raise UserError(f"stream_options.{name} is not supported by this server (leave it out)")
        for name, value in (self.model_extra or {}).items():
            if name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL:
                raise UserError(f"{name} is no field of this endpoint (leave it out)")
            if value not in _NEUTRAL[name]:
                allowed = _NEUTRAL[name][-1]
                raise UserError(
                    f"{name} is not supported by this server and must be {quote(allowed)}, got {quote(value)}"
                )


class CompletionRequest(Common):
    """Body of ``/v1/completions``. ``logprobs``: 0 or 1 give the chosen tokens', alternatives are not kept."""

    prompt: StrictStr | _Sequence[StrictStr] | _Sequence[StrictInt] | _Sequence[_Sequence[StrictInt]]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt.

        Raises:
          UserError: no prompt, an empty one, or too many.
        """
        if isinstance(self.prompt, str):
            found: list[str | list[int]] = [self.prompt]
        elif self.prompt and isinstance(self.prompt[0], int):
            found = [[token for token in self.prompt if isinstance(token, int)]]
        else:
            found = [p for p in self.prompt if isinstance(p, (str, list))]
        if not found or not all(found):
            raise UserError("prompt must not be empty")
        if len(found) > MAX_PROMPTS:
            raise UserError(f"prompt may hold {MAX_PROMPTS} prompts, got {len(found)} (send several requests)")
        return found

    @property
    def wants_log_probs(self) -> bool:
        return self.logprobs is not None

    def check_extra(self) -> None:
        super().check_extra()
        if self.echo and self.wants_log_probs:
            raise UserError(
                "logprobs are those of the answer's tokens, which echo puts the prompt's in front of, got both "
                "(leave one of them out)"
            )


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat; other fields, such as a name, go on to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | _Sequence[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(Common):
    """Body of ``/v1/chat/completions``. ``max_completion_tokens`` is the newer name of ``max_tokens``;
    ``chat_template_kwargs`` go on to the template."""

    messages: _Sequence[Message] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def wants_log_probs(self) -> bool:
        return bool(self.logprobs)


def token_inputs(request: Common, max_tokens: int, log_probs: bool) -> dict[str, Any]:
    """Inputs of the model `tensorrt_llm` but for the prompt.

    OpenAI samples from everything at temperature 1 by default; in TensorRT-LLM's terms that is a ``top_p`` of 1.
    Without a seed each call draws one, where TensorRT-LLM's own is always 0: who asks twice wants two answers.
    """
    inputs: dict[str, Any] = {
        "request_output_len": max_tokens,
        "temperature": request.temperature,
        "runtime_top_p": request.top_p,
        "runtime_top_k": max(0, request.top_k),  # other servers write -1 for all
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "min_tokens": max_tokens if request.ignore_eos else request.min_tokens,
        "num_return_sequences": request.n,
        "return_log_probs": log_probs,
        "return_perf_metrics": True,
        "memshare_off": request.memshare_off,
        "seed": secrets.randbelow(_MAX_DRAWN_SEED) if request.seed is None else request.seed,
    }
    for name in ("memshare_group", "memshare_min_kept"):
        if getattr(request, name) is not None:
            inputs[name] = getattr(request, name)
    return inputs
