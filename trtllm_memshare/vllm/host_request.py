"""What the plugin's pure half reads of vLLM's requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol


class HostRequest(Protocol):
    """What is read of a vLLM ``Request``. Lengths in tokens; ``num_computed_tokens`` includes those in flight."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_tokens: int

    @property
    def all_token_ids(self) -> Sequence[int]: ...


def given_id(request_id: str) -> str:
    """A request's id as its client gave it, which is the same in every run.

    VLLM 0.32's frontend ends ids with eight random hexadecimal digits (``assign_request_id`` of
    ``v1/engine/input_processor.py``), and its scheduler is not told what was before.
    """
    return re.sub("-[0-9a-f]{8}$", "", request_id)
