"""Chooses next tokens: greedy rows in one call, sampled rows in another, each with a generator of its own.

A row that asks for it goes through temperature, then repetition, presence and frequency penalties, then bans, in
TensorRT-LLM's order and with its meaning: penalties count the prompt's tokens too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from trtllm_memshare.serving.drawing import MIN_TEMPERATURE, Draw, draw_tokens
from trtllm_memshare.serving.request import RequestState, SamplingParams

NO_TOKEN = -1
"""What a row gives that has no next token: its logits are not finite, or choosing failed. The request ends then."""
_Result = TypeVar("_Result")


class Sampler:
    """Keeps one seeded generator per sampled request, so that a request's tokens do not depend on its batch.

    Attributes:
      errors: by request id, what went wrong where ``sample`` gave ``NO_TOKEN``; nothing = logits that are not finite.
    """

    def __init__(self) -> None:
        self.errors: dict[int, Exception] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._counts: dict[int, TokenCounts] = {}
        self._last: tuple[list[int], torch.Tensor] | None = None  # the last tokens, and the same where the logits are

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next token of each row.

        Args:
          logits: float32 ``[batch, vocab_size]``; not changed.
          requests: one per row.

        Returns:
          Token ids; ``NO_TOKEN`` for a row whose request has to end, see ``errors``.
        """
        # A row with a NaN has NaN for its largest logit; one wait for the device brings tokens and verdicts.
        largest, chosen = logits.max(-1)
        is_broken = ~torch.isfinite(largest)
        shaping = [row for row, request in enumerate(requests) if request.params.shapes_logits]
        changed = {row: self._guard(requests[row], self._shape, logits[row], requests[row]) for row in shaping}
        if changed:
            logits = logits.clone()
            for row, shaped in changed.items():
                if shaped is not None:
                    logits[row] = shaped
            chosen = logits.argmax(-1)
        tokens: list[int] = torch.where(is_broken, NO_TOKEN, chosen).tolist()
        for row, shaped in changed.items():
            if shaped is None:
                tokens[row] = NO_TOKEN
        drawn = [r for r, q in enumerate(requests) if q.params.temperature > 0 and tokens[r] != NO_TOKEN]
        draws = dict[int, Draw]()
        for row in drawn:
            uniform = self._guard(requests[row], self._uniform, requests[row])
            if uniform is None:
                tokens[row] = NO_TOKEN
                continue
            params = requests[row].params
            temperature = 1.0 if row in changed else params.temperature  # a shaped row has its temperature
            draws[row] = Draw(temperature, params.top_k, params.top_p, uniform)
        if draws:
            for row, token in zip(draws, draw_tokens(logits[list(draws)], list(draws.values())), strict=True):
                tokens[row] = token
        self._last = None if draws else (tokens, chosen)
        return tokens

    def log_probs_of(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """Of the tokens that were just chosen, see ``token_log_probs``."""
        if self._last is not None and self._last[0] is tokens:
            return token_log_probs(logits, self._last[1])
        return token_log_probs(logits, tokens)

    def forget(self, request_id: int) -> None:
        """Drops the generator and the counts of a finished request."""
        self._generators.pop(request_id, None)
        self._counts.pop(request_id, None)
        self.errors.pop(request_id, None)

    def _guard(self, request: RequestState, choose: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """What ``choose`` gives; None if it raised, which is this request's matter and not that of its batch."""
        try:
            return choose(*arguments)
        except Exception as error:
            self.errors[request.request_id] = error
            return None

    def _shape(self, row: torch.Tensor, request: RequestState) -> torch.Tensor:
        """``row`` after temperature, penalties and bans. Bans that would leave no token are not applied."""
        params = request.params
        if params.temperature > 0:
            row = row / max(params.temperature, MIN_TEMPERATURE)
        if params.penalizes:
            counts = self._counts.get(request.request_id)
            if counts is None:
                counts = self._counts[request.request_id] = TokenCounts(row)
            row = counts.penalize(row, request.tokens, params)
        if banned := request.banned_tokens:
            shaped = row.clone()
            shaped[banned] = -torch.inf
            row = shaped if shaped.max() > -torch.inf else row
        return row

    def _uniform(self, request: RequestState) -> float:
        """The next number in [0, 1) of the request's own generator."""
        generator = self._generators.get(request.request_id)
        if generator is None:
            generator = self._generators[request.request_id] = torch.Generator().manual_seed(request.params.seed)
        return float(torch.rand((), generator=generator, dtype=torch.float64))


class TokenCounts:
    """How often each token of the vocabulary stands in one request, prompt included.

    Args:
      row: logits of the request, for size and device.
    """

    def __init__(self, row: torch.Tensor) -> None:
        self._counts = torch.zeros(row.shape[-1], dtype=torch.float32, device=row.device)
        self._num_counted = 0

    def penalize(self, row: torch.Tensor, tokens: list[int], params: SamplingParams) -> torch.Tensor:
        """A copy of ``row``, float32 ``[vocab_size]``, with the penalties of the tokens that have occurred."""
        new = torch.tensor(tokens[self._num_counted :], dtype=torch.long, device=row.device)
        self._counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float32))
        self._num_counted = len(tokens)
        seen = self._counts > 0
        repeated = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
        row = torch.where(seen, repeated, row)
        return row - seen * params.presence_penalty - self._counts * params.frequency_penalty


def token_log_probs(logits: torch.Tensor, tokens: list[int] | torch.Tensor) -> torch.Tensor:
    """Natural logarithm of each chosen token's probability under the model, before temperature, penalties and bans.

    Args:
      logits: float32 ``[batch, vocab_size]``.
      tokens: one per row, int64 if it is a tensor; that of a row with ``NO_TOKEN`` means nothing.

    Returns:
      float32 ``[batch]``, where the logits are.
    """
    if not isinstance(tokens, torch.Tensor):
        tokens = torch.tensor([max(0, token) for token in tokens], dtype=torch.long, device=logits.device)
    return -torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
