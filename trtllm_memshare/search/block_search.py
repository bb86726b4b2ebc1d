"""Chooses what computes stage 2 for a pool: the CUDA kernel, or the PyTorch specification where it cannot run."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.search.block_distance import block_distance, pairs_on
from trtllm_memshare.search.cuda_block_distance import CudaBlockDistance, check_count
from trtllm_memshare.search.types import PairBatch

log = logging.getLogger(__name__)


class Distances(Protocol):
    """Results of one search, perhaps still on their way."""

    def read(self) -> tuple[np.ndarray, float]:
        """float32 ``[pairs, num_layers, 4]`` as of ``block_distance``, and the search's seconds; waits for them."""


class BlockSearch(Protocol):
    """Compares rows of one pool. ``description``: which implementation, and why."""

    description: str

    def compare(self, pairs: PairBatch) -> Distances:
        """Starts the comparison of the pool's rows as they are at this point of the stream.

        Raises:
          ValueError: more than max_pairs pairs.
        """


@dataclass(frozen=True)
class ReadyDistances:
    """Distances that are there already."""

    sums: np.ndarray
    seconds: float

    def read(self) -> tuple[np.ndarray, float]:
        """See ``Distances.read``."""
        return self.sums, self.seconds


class ReferenceBlockSearch:
    """The PyTorch specification, on whatever device the pool is."""

    def __init__(self, pool: torch.Tensor, inv_freq: torch.Tensor, max_pairs: int, reason: str) -> None:
        self._pool, self._inv_freq, self._max_pairs = pool, inv_freq, max_pairs
        self.description = f"PyTorch reference ({reason})"

    def compare(self, pairs: PairBatch) -> ReadyDistances:
        """See ``BlockSearch.compare``. Refuses what the kernel's buffers could not hold, though it could take it."""
        check_count(len(pairs), self._max_pairs)
        started = time.perf_counter()
        inv_freq = self._inv_freq if pairs.undo_rope else self._inv_freq[:0]
        sums = block_distance(self._pool, *pairs_on(self._pool.device, pairs), inv_freq).cpu().numpy()
        return ReadyDistances(sums, time.perf_counter() - started)


def make_block_search(pool: torch.Tensor, inv_freq: torch.Tensor, max_pairs: int) -> BlockSearch:
    """The CUDA kernel for a pool on a CUDA device, the reference elsewhere.

    Where ``cuda.core`` is missing, or a kernel cannot be compiled or loaded, a pool on a CUDA device gets the reference
    too, and a warning says why. Kernels are compiled here: at the first search that would be inside a step.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token, half-split layout.
      max_pairs: most pairs of one search.

    Raises:
      ValueError: a pool on a CUDA device that no kernel takes.
    """
    if not pool.is_cuda:
        return ReferenceBlockSearch(pool, inv_freq, max_pairs, f"the pool is on {pool.device}")
    try:
        search = CudaBlockDistance(pool, inv_freq, max_pairs)
        for undo_rope in (True, False):
            search.kernel(undo_rope)
    except torch.cuda.OutOfMemoryError:
        raise  # the reference would want more of it
    except (UserError, RuntimeError, OSError) as error:
        log.warning("blocks are compared by PyTorch, not by the CUDA kernel: %s", error)
        return ReferenceBlockSearch(pool, inv_freq, max_pairs, shorten(str(error)))
    return search
