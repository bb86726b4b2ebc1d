"""Text in, text out, over a token-level executor: what `ensemble` and the OpenAI-compatible endpoint have in common."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.failures import describe
from trtllm_memshare.serving.prompts import PromptFormat, encode_prompt
from trtllm_memshare.triton.detokenizer import special_stop_tokens
from trtllm_memshare.triton.events import Call, QueueFullError, TextEvent
from trtllm_memshare.triton.inputs import TEXT_NAMES, USED
from trtllm_memshare.triton.request_metrics import OutcomeCounter
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_sequence import Sequence
from trtllm_memshare.triton.token_requests import check_prompt_length

_TOKENIZER_THREADS = 2
_READ_BY_TEMPLATES = {"tools", "documents"}  # which the tokenizer's method takes by name and hands on
_PASSED_ON = {i.token: i.text for i in USED if i.token in TEXT_NAMES and i.token != "streaming"}


@dataclass(frozen=True)
class TextLimits:
    """What one deployment allows: ``max_requests`` prompts at a time, each of so many tokens and bytes."""

    max_prompt_tokens: int
    max_prompt_bytes: int
    max_requests: int


@dataclass(frozen=True)
class TextRequest:
    """One prompt.

    Attributes:
      prompt: text, or token ids that need no tokenizer.
      inputs: of the model `tensorrt_llm`, as numbers; what the prompt and the words become is added.
      stop_words: texts that end a sequence and are left out of it.
      bad_words: texts that are not generated.
      streams: a piece of text for each batch of tokens instead of one for each sequence.
      echo: begin each sequence with the prompt.
    """

    prompt: str | list[int]
    inputs: dict[str, Any]
    stop_words: list[str] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    streams: bool = False
    echo: bool = False


class TextService:
    """Tokenizes, has an executor generate, detokenizes and looks for stop words.

    A prompt's length in bytes is checked before it is tokenized, and tokenizing runs in threads of its own, so that one
    huge prompt holds nobody up.

    Args:
      tokenizer: a transformers tokenizer.
      limits: of the deployment.
      submit: hands inputs of `tensorrt_llm` to the executor.
      outcomes: told of requests that end before the executor has seen them.
    """

    def __init__(
        self,
        tokenizer: Any,
        limits: TextLimits,
        submit: Callable[[dict[str, Any]], Awaitable[Call]],
        outcomes: OutcomeCounter,
    ) -> None:
        self.tokenizer = tokenizer
        self._limits, self._submit, self._outcomes = limits, submit, outcomes
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="memshare-tokenizer")
        self._num_active = 0

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """What is done to a request before ``answer`` has its prompt: it counts as a request, and so do its errors.

        Raises:
          QueueFullError: there is no room for it, so that nothing is done for it.
        """
        self._num_active += 1
        try:
            self._check_room()
            yield
        except BaseException as error:
            self._outcomes.count_error(error)
            raise
        finally:
            self._num_active -= 1

    async def answer(self, request: TextRequest) -> AsyncGenerator[TextEvent, None]:
        """Events of one prompt. Leaving early cancels it.

        Raises:
          QueueFullError, UserError: the request was refused.
          ServiceLostError, RuntimeError: the executor failed.
        """
        self._num_active += 1
        try:
            try:
                inputs = await self._inputs(request)
                call = await self._submit(inputs)
            except BaseException as error:
                self._outcomes.count_error(error)
                raise
            sequences: dict[int, Sequence] = {}
            async with aclosing(call.events()) as events:
                async for event in events:
                    given: TextEvent | None = None
                    try:
                        sequence = sequences.get(event.sequence_index)
                        if sequence is None:
                            sequence = Sequence(self.tokenizer, request.stop_words, self._echoed(request))
                            sequences[event.sequence_index] = sequence
                        if sequence.take(event):
                            call.cancel(event.sequence_index)
                        if event.finish_reason or (request.streams and sequence.text):
                            given = sequence.give(event)
                    except Exception:
                        call.fail()
                        raise
                    if given is not None:
                        yield given
        finally:
            self._num_active -= 1

    def _echoed(self, request: TextRequest) -> str:
        if not request.echo:
            return ""
        if isinstance(request.prompt, str):
            return request.prompt
        # With its special tokens, as a text prompt is echoed with those that its client wrote.
        return str(self.tokenizer.decode(request.prompt, clean_up_tokenization_spaces=False))

    async def _inputs(self, request: TextRequest) -> dict[str, Any]:
        """Inputs of the token level, as lists and numbers."""
        self._check_room()
        ids = request.prompt if isinstance(request.prompt, list) else await self.tokenize(request.prompt)
        check_prompt_length(len(ids), self._limits.max_prompt_tokens)
        inputs = {
            **request.inputs,
            "input_ids": ids,
            "input_lengths": len(ids),
            "streaming": request.streams or bool(request.stop_words),
            "exclude_input_in_output": True,
        }
        if request.bad_words:
            inputs["bad_words_list"] = self._word_list(request.bad_words)
        if special := special_stop_tokens(self.tokenizer, request.stop_words):
            # One sequence of one token each: [ids, ends].
            inputs["stop_words_list"] = [list(special), list(range(1, len(special) + 1))]
        return inputs

    def _word_list(self, texts: list[str]) -> list[list[int]]:
        """See ``RequestTensors.word_lists``. Texts that have no token are left out."""
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        words = [word for word in found if word]
        flat = [token for word in words for token in word]
        ends = np.cumsum([len(word) for word in words]).tolist()
        return [flat, ends + [-1] * (len(flat) - len(ends))]

    async def tokenize(self, prompt: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a prompt; special tokens as ``PromptFormat`` says.

        Raises:
          UserError: it has too many bytes, or too many tokens.
        """
        self._check_size(prompt)

        def encode() -> list[int]:
            return encode_prompt(self.tokenizer, prompt, PromptFormat(add_special_tokens=add_special_tokens))

        ids = await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        check_prompt_length(len(ids), self._limits.max_prompt_tokens)
        return ids

    async def render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        """The prompt that the tokenizer's chat template makes of a chat.

        Args:
          messages: with ``role`` and ``content``.
          options: further names for the template, ``tools`` and ``documents`` too; not the other arguments of the
            tokenizer's method, one of which is a template of the client's own that could run for ever.

        Raises:
          UserError: no template, one that refuses these messages, too many bytes, or such a name.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template (use /v1/completions, or set --chat-template)")
        arguments = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - _READ_BY_TEMPLATES
        if taken := set(options) & arguments:
            raise UserError(
                f"chat_template_kwargs must be names that the template reads, got {min(taken)}, which is an argument "
                f"of the tokenizer's method (leave it out)"
            )
        self._check_size("".join(message["content"] for message in messages))

        def apply() -> str:
            try:
                return str(
                    self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
                )
            except Exception as error:  # a template may do to messages whatever it likes
                raise UserError(f"the chat template cannot be applied: {describe(error)}") from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, apply)

    def check_number(self, num_sequences: int) -> None:
        """Raises UserError for more answers in one request than the system ever holds: they would never be let in."""
        if num_sequences > self._limits.max_requests:
            raise UserError(
                f"prompts and n must ask for at most {self._limits.max_requests} answers in one request, as many as "
                f"the system holds, got {num_sequences} (send several requests)"
            )

    def _check_room(self) -> None:
        if self._num_active > self._limits.max_requests:
            raise QueueFullError(
                f"the queue is full: {self._limits.max_requests} requests are in the system (try again later)"
            )

    def _check_size(self, text: str) -> None:
        # A character has at most four bytes: most prompts need no encoding to be measured.
        limit = self._limits.max_prompt_bytes
        size = len(text) if len(text) * 4 <= limit else len(text.encode(errors="surrogatepass"))
        if size > limit:
            raise UserError(
                f"the prompt has {size} bytes, over the limit max_prompt_bytes {limit}, which is checked before "
                f"tokenizing"
            )


def parse_text_request(tensors: RequestTensors, limits: TextLimits, exclude_input: bool) -> TextRequest:
    """Reads the tensors of TensorRT-LLM's `ensemble` for one prompt.

    Args:
      tensors: under the names of `ensemble`.
      limits: of the deployment.
      exclude_input: whether answers leave the prompt out when the request does not say.

    Raises:
      UserError: no prompt, text that is not UTF-8, or too much of it.
    """
    try:
        prompts = tensors.texts("text_input", limits.max_prompt_bytes)
    except UserError as error:
        if "bytes" not in str(error):
            raise
        raise UserError(f"{error}: the limit max_prompt_bytes, which is checked before tokenizing") from error
    if len(prompts) != 1:
        raise UserError(f"text_input must be one text that is not empty for each prompt, got {len(prompts)}")
    return TextRequest(
        prompts[0],
        {token: tensors.scalar(text) for token, text in _PASSED_ON.items() if text in tensors},
        tensors.texts("stop_words"),
        tensors.texts("bad_words"),
        tensors.flag("stream", False),
        not tensors.flag("exclude_input_in_output", exclude_input),
    )
