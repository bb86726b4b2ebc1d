"""The contract between the executor and whatever computes a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.types import PairBatch


@dataclass(frozen=True)
class StepBatch:
    """One in-flight batch: context requests first, then generation requests, packed without padding.

    With 2 context chunks of 5 and 3 tokens and 2 generation requests, num_tokens = 5 + 3 + 1 + 1 = 10.

    Attributes:
      input_ids: int32 ``[num_tokens]``.
      position_ids: int32 ``[num_tokens]``.
      num_contexts: how many of the sequences are context requests.
      chunk_lengths: int32 ``[batch]``, tokens of each sequence in this step; 1 for generation.
      sequence_lengths: int32 ``[batch]``, tokens in the cache after this step.
      block_offsets: int32 ``[1, batch, 2, max_blocks]``, TensorRT-LLM's ``kv_cache_block_offsets``.
      pairs: rows to compare after the last layer, or None.
      count_aliases: whether a block that a table names m times counts m times in attention, as the table says; False:
        once, as if the duplicate had been dropped.
      read_null: whether null entries are read like any other, or skipped where the runner can; the result is the same.
      observe_attention: whether the step reports how much attention blocks receive.
      context_lengths: int32 ``[batch]``, TensorRT-LLM's input of that name: the chunk of a context request, all that a
        generation request brought as context, so after a pause what it had generated too. None where nobody asks.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    num_contexts: int
    chunk_lengths: np.ndarray
    sequence_lengths: np.ndarray
    block_offsets: np.ndarray
    pairs: PairBatch | None = None
    count_aliases: bool = True
    read_null: bool = False
    context_lengths: np.ndarray | None = None
    observe_attention: bool = False


@dataclass(frozen=True)
class StepOutput:
    """Results of a step.

    Attributes:
      logits: float32 ``[batch, vocab_size]``, of each sequence's last token.
      block_distances: of the batch's pairs, see ``search.block_search``, or None. To be read after the logits: a
        runner on a GPU then need not be waited for twice.
      block_attention: float32 ``[num_blocks]``, if it was asked for: attention that each physical block received from
        the generation requests, averaged over layers and heads; of one request it sums to 1.
    """

    logits: torch.Tensor
    block_distances: Distances | None
    block_attention: np.ndarray | None = None


class Described(Protocol):
    """What says of itself which implementation it is."""

    @property
    def description(self) -> str:
        """Which implementation, and why."""


class Runner(Protocol):
    """Holds the model and the pool; knows nothing of requests."""

    num_layers: int
    tokens_per_block: int
    num_blocks: int
    vocab_size: int

    def prepare(self, batch: StepBatch) -> Any:
        """Turns a batch into device inputs."""

    def step(self, inputs: Any) -> StepOutput:
        """Runs the model once: writes K and V of the batch's tokens to the pool and returns the logits."""


@runtime_checkable
class ComparingRunner(Runner, Protocol):
    """A runner that can compare rows of its pool apart from a step.

    It is given no pairs with a batch: the executor looks for them once the step is enqueued, while a GPU computes.
    """

    def compare(self, pairs: PairBatch) -> Distances:
        """Starts the comparison of the pool's rows as the last step leaves them."""


@runtime_checkable
class ForgettingRunner(Runner, Protocol):
    """A runner over whose pool pages can be forgotten.

    Attributes:
      null_pages: blocks of the pool that it has written so that no query attends to them, or None.
      skips_entries: whether it passes over entries without a block, so that it needs no null pages to forget.
    """

    null_pages: NullPages | None
    skips_entries: bool

    def reserve_null_pages(self, are_used: bool) -> None:
        """Writes its null pages anew, if it has any; or takes their blocks for ordinary ones, where nobody forgets.

        An executor asks once, when it is made: a runner serves the one that was made last.
        """


class BenchmarkedRunner(Runner, Protocol):
    """A runner that says what it runs on."""

    decode_description: str

    @property
    def search(self) -> Described:
        """What computes stage 2."""
