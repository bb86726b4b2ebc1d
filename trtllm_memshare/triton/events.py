"""What passes between a request's maker and the executor. Light: imported by processes that need no PyTorch."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from trtllm_memshare.errors import UserError


class QueueFullError(UserError):
    """The deployment's limit of requests in the system is reached."""


class ServiceLostError(RuntimeError):
    """The process of `tensorrt_llm` went away."""


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one sequence of a request.

    Attributes:
      token_ids: new ones.
      sequence_index: which answer, in ``range(num_return_sequences)``.
      finish_reason: of the sequence, with its last tokens; empty before.
      is_last: no more comes, of any sequence.
      log_probs: of ``token_ids``, if they were asked for.
      figures: counts and times, at the end of the sequence if they were asked for.
    """

    token_ids: list[int]
    sequence_index: int = 0
    finish_reason: str = ""
    is_last: bool = False
    log_probs: list[float] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    def as_message(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TextEvent(TokenEvent):
    """``text``: what the new tokens add; it may lag behind them, and a stop word is left out."""

    text: str = ""


class Call(Protocol):
    """A request that the executor works on."""

    def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Events to the end; leaving before it cancels the request.

        Raises:
          UserError, QueueFullError: the request was refused.
          ServiceLostError, RuntimeError: the executor failed.
        """
        ...

    def cancel(self, sequence_index: int) -> None:
        """Asks the executor to end one sequence, of which nothing more is wanted, at its next step."""
        ...

    def fail(self) -> None:
        """Says, before ``events`` is left, that it is left for an error and not by its client; for the metrics."""
        ...
