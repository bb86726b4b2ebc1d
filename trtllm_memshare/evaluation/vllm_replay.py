"""Requests of vLLM's engine that write recorded texts, whatever the model would choose: the same text in every arm.

A small model's greedy answers repeat themselves, the more so the more was taken from them. Repeats go below the floor,
so that an arm with worse text would give up more pages and take fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

_KEY = "replayed"


def replayed(name: int, text: Sequence[int]) -> dict[str, Any]:
    """``extra_args`` of vLLM's ``SamplingParams`` for a request that writes ``text``; ``name``: its own."""
    return {_KEY: (name, list(text))}


class Replay(LogitsProcessor):
    """Leaves each replayed request the next token of its text, and notes how likely the model found it.

    Attributes:
      nats: -log p of each token under the model, by the request's name and the place in its text; of all engines of
        this process.
    """

    nats: ClassVar[dict[tuple[int, int], float]] = {}

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[int, list[int], list[int]]] = {}  # by row: name, text, what is written

    def is_argmax_invariant(self) -> bool:
        """See ``LogitsProcessor``."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """See ``LogitsProcessor``."""
        process_dict_updates(self._requests, batch_update, _state_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """See ``LogitsProcessor``; float32 ``[rows, vocab_size]``, changed in place."""
        if not self._requests:
            return logits
        rows = torch.tensor(list(self._requests), device=logits.device)
        states = list(self._requests.values())
        tokens = torch.tensor([text[len(written)] for _, text, written in states], device=logits.device)
        found = -logits[rows].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        # Of a text that is not read to its end the token is thrown away, and the last word on its place comes later.
        for (name, _, written), nats in zip(states, found.tolist(), strict=True):
            self.nats[name, len(written)] = nats
        logits[rows] = -torch.inf
        logits[rows, tokens] = 0.0
        return logits


def _state_of(params: SamplingParams, _: object, written: list[int]) -> tuple[int, list[int], list[int]] | None:
    asked = (params.extra_args or {}).get(_KEY)
    return None if asked is None else (*asked, written)
