"""What the plugin's pure half reads of vLLM's requests."""

from __future__ import annotations

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
