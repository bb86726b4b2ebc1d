"""TensorRT-LLM's request and batch, as far as resource managers look at them.

Mirrors ``_torch/pyexecutor/llm_request.py`` and ``scheduler.py`` of NVIDIA/TensorRT-LLM (1.1 of autumn 2025, February
2026, which is nearest to 1.2.1, and main of September 2026); names are theirs, bodies are not.

``GENERATION_TO_COMPLETE`` (``py_executor.py``, ``scheduler/scheduler_v2.py``, ``capacityScheduler.cpp`` and
``llmRequest.h``, main, read on 29 November 2026): a request whose last token by its limit is on its way. Only the
overlap loop sets it, by counting: on a prompt right behind its forward pass, on one that generates when the batch
before has been processed. No scheduler schedules it again, so it runs no pass in vain, as one does that ends by its end
token; it stays active and keeps its pages until the next iteration has answered it. V1 never pauses it and V2 never
frees it to be computed anew, but **V2 suspends it like any other** (``is_generation_in_progress_state`` is true of it).
Resource managers do not look for it.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace


class LlmRequestState(enum.Enum):
    """In the order of TensorRT-LLM's, which schedules by it: from the first to the last but one before the end."""

    CONTEXT_INIT = 10
    GENERATION_IN_PROGRESS = 13
    GENERATION_TO_COMPLETE = 14
    GENERATION_COMPLETE = 20


class FinishReason(enum.Enum):
    NOT_FINISHED = 0
    END_ID = 1
    LENGTH = 3
    TIMED_OUT = 4
    CANCELLED = 5


class FakeLlmRequest:
    """The tokens live in C++: every read through ``get_tokens`` is a fresh copy, as a binding makes it."""

    def __init__(self, request_id: int, prompt: list[int], is_dummy: bool = False, max_new_tokens: int = 10**6) -> None:
        self.py_request_id = self.request_id = request_id
        self._tokens = list(prompt)
        self.prompt_len = self.orig_prompt_len = self.py_prompt_len = len(prompt)
        self.max_new_tokens = self.py_max_new_tokens = max_new_tokens
        self.state = LlmRequestState.CONTEXT_INIT
        self.is_first_context_chunk = True
        self.context_current_position = 0
        self.is_dummy_request = is_dummy
        self.py_rewind_len = 0
        self.py_decoding_iter = self.decoding_iter = 0
        self.py_num_compressed_tokens = 0
        self.lora_task_id = None
        self.py_beam_width = 1
        self.sampling_config = SimpleNamespace(beam_width=1)
        self.finish_reason = FinishReason.NOT_FINISHED
        self.num_history_reads = 0
        self.num_lives = 1

    @property
    def max_beam_num_tokens(self) -> int:
        return len(self._tokens)

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        self.num_history_reads += 1
        return list(self._tokens)

    def get_token(self, beam: int, position: int) -> int:
        assert beam == 0
        return self._tokens[position]

    def add_new_token(self, token: int, beam: int) -> None:
        assert beam == 0
        self._tokens.append(token)

    @property
    def is_generation_in_progress_state(self) -> bool:
        return self.state in (LlmRequestState.GENERATION_IN_PROGRESS, LlmRequestState.GENERATION_TO_COMPLETE)

    def will_complete_next_iteration(self) -> bool:
        """Whether the token behind those that the host knows is the last by its limit; end tokens are not looked at."""
        return len(self._tokens) - self.prompt_len + 1 >= self.max_new_tokens

    def finish_by_reason(self, reason: FinishReason) -> None:
        """Ends the request; the executor's loop answers and frees it with the next responses, as when cancelled."""
        self.finish_reason = reason
        self.state = LlmRequestState.GENERATION_COMPLETE

    def pause(self) -> None:
        """What is generated becomes prompt; the request starts again with its context, by main's list of what is reset.

        ``py_num_compressed_tokens`` is not on that list (September 2026).
        """
        self.num_lives += 1
        self.max_new_tokens -= len(self._tokens) - self.prompt_len
        self.prompt_len = self.py_prompt_len = len(self._tokens)
        self.state = LlmRequestState.CONTEXT_INIT
        self.is_first_context_chunk = True
        self.context_current_position = 0


class ScheduledRequests:
    def __init__(self, context: list[FakeLlmRequest], generation: list[FakeLlmRequest]) -> None:
        self.context_requests, self.generation_requests = context, generation

    @property
    def context_requests_last_chunk(self) -> list[FakeLlmRequest]:
        """Chunks that end a prompt: here each prompt is one chunk."""
        return self.context_requests

    def reset_context_requests(self) -> None:
        """Main's V1 sorts chunks again after block reuse moved them: nothing to do for whole prompts."""

    def all_requests(self) -> list[FakeLlmRequest]:
        return self.context_requests + self.generation_requests
