"""A runner without a model: the next token of a sequence is its last one plus one, modulo the vocabulary.

``before_step`` may raise, and ``change_logits`` may damage rows, to play what a device does. A batch it was given is
kept in ``last_batch``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trtllm_memshare.runners.protocol import StepBatch, StepOutput


class CountingRunner:
    num_layers, tokens_per_block = 1, 16

    def __init__(self, num_blocks: int = 200, vocab_size: int = 80) -> None:
        self.num_blocks, self.vocab_size = num_blocks, vocab_size
        self.before_step: Callable[[StepBatch], object] = lambda batch: None
        self.change_logits: Callable[[StepBatch, torch.Tensor], object] = lambda batch, logits: None
        self.last_batch: StepBatch | None = None

    def prepare(self, batch: StepBatch) -> StepBatch:
        return batch

    def step(self, batch: StepBatch) -> StepOutput:
        self.last_batch = batch
        self.before_step(batch)
        last = batch.input_ids[np.cumsum(batch.chunk_lengths) - 1]
        logits = torch.zeros(len(last), self.vocab_size)
        logits[torch.arange(len(last)), torch.from_numpy((last.astype(np.int64) + 1) % self.vocab_size)] = 5.0
        self.change_logits(batch, logits)
        return StepOutput(logits, None)


def expected(prompt: list[int], count: int, vocab_size: int = 80) -> list[int]:
    """What a greedy request gets."""
    return [(prompt[-1] + 1 + i) % vocab_size for i in range(count)]
