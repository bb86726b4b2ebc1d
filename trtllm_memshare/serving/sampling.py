"""Chooses next tokens: greedy rows in one call, sampled rows with a generator of their own."""

from __future__ import annotations

import torch

from trtllm_memshare.serving.request import RequestState, SamplingParams


class Sampler:
    """Keeps one seeded generator per sampled request, so that a request's tokens do not depend on its batch."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next token of each row.

        Args:
          logits: float32 ``[batch, vocab_size]``.
          requests: one per row.
        """
        if any(request.params.bad_words for request in requests):
            logits = logits.clone()
            for row, request in enumerate(requests):
                logits[row, request.banned_tokens] = -torch.inf
        tokens: list[int] = logits.argmax(-1).tolist()
        for row, request in enumerate(requests):
            if request.params.temperature > 0:
                tokens[row] = self._sample_row(logits[row], request.request_id, request.params)
        return tokens

    def forget(self, request_id: int) -> None:
        """Drops the generator of a finished request."""
        self._generators.pop(request_id, None)

    def _sample_row(self, logits: torch.Tensor, request_id: int, params: SamplingParams) -> int:
        generator = self._generators.get(request_id)
        if generator is None:
            generator = self._generators[request_id] = torch.Generator().manual_seed(params.seed)
        ordered, ids = (logits / params.temperature).cpu().sort(descending=True, stable=True)
        if params.top_k:
            ordered[params.top_k :] = -torch.inf
        probabilities = ordered.softmax(-1)
        if params.top_p < 1:
            # A token stays while those before it have not reached top_p: the first one always does.
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= params.top_p] = 0
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
