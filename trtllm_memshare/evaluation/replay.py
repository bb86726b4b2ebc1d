"""Replays written text through the serving loop: the model computes every step, the text decides what comes next.

Shows what sharing and its search cost, and what memory they free, at the size of a real model without its weights.
Such a run says nothing of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from trtllm_memshare.serving.request import RequestState
from trtllm_memshare.serving.sampling import Sampler, token_log_probs


class ReplaySampler(Sampler):
    """Takes the arg-max, as greedy decoding would, and then answers with the next token of the request's script.

    Attributes:
      loss: nats of each request's script so far, under what the model read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scripts: dict[int, list[int]] = {}
        self._places: dict[int, int] = {}
        self.loss: dict[int, float] = {}

    def add_script(self, request_id: int, token_ids: list[int]) -> None:
        """Sets what a request will generate, token by token."""
        self._scripts[request_id] = token_ids
        self._places[request_id] = 0

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next scripted token of each row; see ``Sampler.sample``."""
        super().sample(logits, requests)
        tokens = list[int]()
        for request in requests:
            tokens.append(self._scripts[request.request_id][self._places[request.request_id]])
            self._places[request.request_id] += 1
        for request, log_prob in zip(requests, token_log_probs(logits, tokens).tolist(), strict=True):
            self.loss[request.request_id] = self.loss.get(request.request_id, 0.0) - log_prob
        return tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer trained on ``texts``; the same texts give the same tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def cut_scripts(texts: list[str], tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> list[np.ndarray]:
    """``count`` stretches of ``length`` tokens, each from one text; longer texts give several, starts spread evenly.

    Raises:
      ValueError: no text is that long.
    """
    encoded = [np.array(tokenizer.encode(text), np.int32) for text in texts]
    encoded = [ids for ids in encoded if len(ids) >= length]
    if not encoded:
        raise ValueError(f"no text has {length} tokens (ask for fewer output tokens)")
    rounds = -(-count // len(encoded))
    scripts = []
    for index in range(count):
        ids, turn = encoded[index % len(encoded)], index // len(encoded)
        start = (len(ids) - length) * turn // max(1, rounds - 1) if rounds > 1 else 0
        scripts.append(ids[start : start + length])
    return scripts
