"""TensorRT-LLM's request and batch, as far as resource managers look at them."""

from __future__ import annotations

import enum
from types import SimpleNamespace


class LlmRequestState(enum.Enum):
    CONTEXT_INIT = 1
    GENERATION_IN_PROGRESS = 2
    GENERATION_COMPLETE = 3


class FakeLlmRequest:
    """The tokens live in C++: every read through ``get_tokens`` is a fresh copy, as a binding makes it."""

    def __init__(self, request_id: int, prompt: list[int], is_dummy: bool = False) -> None:
        self.py_request_id = self.request_id = request_id
        self._tokens = list(prompt)
        self.prompt_len = self.orig_prompt_len = len(prompt)
        self.state = LlmRequestState.CONTEXT_INIT
        self.is_first_context_chunk = True
        self.context_current_position = 0
        self.is_dummy_request = is_dummy
        self.py_rewind_len = 0
        self.lora_task_id = None
        self.sampling_config = SimpleNamespace(beam_width=1)
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

    def pause(self) -> None:
        """What is generated becomes prompt; the request starts again with its context."""
        self.num_lives += 1
        self.prompt_len = len(self._tokens)
        self.state = LlmRequestState.CONTEXT_INIT
        self.is_first_context_chunk = True
        self.context_current_position = 0


class ScheduledRequests:
    def __init__(self, context: list[FakeLlmRequest], generation: list[FakeLlmRequest]) -> None:
        self.context_requests, self.generation_requests = context, generation

    def all_requests(self) -> list[FakeLlmRequest]:
        return self.context_requests + self.generation_requests
