"""A runner without a model: its pool holds a token and a position for each row, and it reads them as attention would.

Every step checks what a kernel relies on: rows are written to blocks that nobody else refers to, in their place, and
what is read is the request's own text, that of an earlier page of it, or a null entry. The next token comes from a text
that repeats itself; with ``depends_on_reads`` it also depends on every row that was read, so that two runs which read
different things part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.cache.offsets import NO_BLOCK, decode_block_offsets
from trtllm_memshare.runners.protocol import StepBatch, StepOutput

VOCAB_SIZE = 64
MAX_TOKENS = 1024
RARE = 60
"""A token that patchwork texts hold now and then: requests may stop at it."""
_RNG = np.random.default_rng(1)
PHRASES = [[*_RNG.integers(4, 60, n).tolist(), 2] for n in (24, 31, 17, 8, 40)]
_VALUES = torch.from_numpy(np.random.default_rng(2).standard_normal((VOCAB_SIZE, 2, 4)).astype(np.float32))
_WEIGHTS = _RNG.integers(1, 2**31, MAX_TOKENS).astype(np.int64)


@lru_cache
def repeating_text(seed: int) -> list[int]:
    """``MAX_TOKENS`` tokens in which phrases come again, some words of their own between them."""
    rng, text = np.random.default_rng(seed), list[int]()
    while len(text) < MAX_TOKENS:
        if rng.random() < 0.15:
            text += rng.integers(4, 60, rng.integers(1, 6)).tolist()
        text += PHRASES[rng.integers(len(PHRASES))]
    return text[:MAX_TOKENS]


@lru_cache
def patchwork_text(seed: int) -> list[int]:
    """``MAX_TOKENS`` tokens: new words, and stretches of what was said, most in two parts at two times.

    Of the parts one in five has a token changed, so that text comes again whole, cut short, in pieces or nearly.
    """
    rng, text, later = np.random.default_rng(seed), [seed % VOCAB_SIZE], list[tuple[int, list[int]]]()
    while len(text) < MAX_TOKENS:
        if later and later[0][0] <= len(text):
            part = later.pop(0)[1]
        elif len(text) < 40 or rng.random() < 0.15:
            text += [*rng.integers(4, 60, rng.integers(3, 8)).tolist(), 2 if rng.random() < 0.9 else RARE]
            continue
        else:
            start = int(rng.integers(max(0, len(text) - 120), len(text) - 30))
            part = text[start : start + int(rng.integers(16, 30))]
            if rng.random() < 0.8:
                cut = int(rng.integers(4, len(part)))
                later.append((len(text) + int(rng.integers(20, 80)), part[cut - 4 :]))
                part = part[:cut]
        if rng.random() < 0.2:
            part[rng.integers(len(part))] = int(rng.integers(4, 60))
        text += part
    return text[:MAX_TOKENS]


class ReadingRunner:
    """See the module.

    Args:
      num_blocks: physical blocks of the pool.
      tokens_per_block: tokens of one block.
      depends_on_reads: whether the next token depends on what was read.
      chunk_unit_size: see ``Scheduler``.
      shows_pool: has a ``pool`` with K and V of the tokens, one layer and one head.
      text_of: the text that a request writes on, by its first token; ``MAX_TOKENS`` tokens.

    Attributes:
      manager: the cache whose pool this is, to hold the step against; set once it is made.
      null_pages: see ``ForgettingRunner``.
    """

    num_layers, vocab_size, skips_entries = 2, VOCAB_SIZE, True

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        depends_on_reads: bool = False,
        chunk_unit_size: int = 1,
        shows_pool: bool = False,
        text_of: Callable[[int], list[int]] = repeating_text,
    ) -> None:
        self.num_blocks, self.tokens_per_block = num_blocks, tokens_per_block
        self.chunk_unit_size = chunk_unit_size
        self._depends_on_reads, self._text_of = depends_on_reads, text_of
        self._tokens = np.full(num_blocks * tokens_per_block, -1, np.int64)
        self._positions = np.full(num_blocks * tokens_per_block, -1, np.int64)
        self.pool = torch.zeros(num_blocks, 1, 2, 1, tokens_per_block, 4) if shows_pool else None
        self.manager: KVCacheManager | None = None
        self.null_pages: NullPages | None = None

    def reserve_null_pages(self, are_used: bool) -> None:
        """It reads no null page: what it forgets it takes from the block tables."""

    def prepare(self, batch: StepBatch) -> StepBatch:
        return batch

    def step(self, batch: StepBatch) -> StepOutput:
        tables = decode_block_offsets(batch.block_offsets, self.num_layers)
        logits = np.zeros((len(batch.chunk_lengths), VOCAB_SIZE), np.float32)
        first = 0
        lengths = zip(batch.chunk_lengths.tolist(), batch.sequence_lengths.tolist(), strict=True)
        for row, (chunk, length) in enumerate(lengths):
            ids = batch.input_ids[first : first + chunk]
            assert (batch.position_ids[first : first + chunk] == np.arange(length - chunk, length)).all()
            first += chunk
            self._write(tables[row], ids, length)
            next_token = self._read(tables[row], chunk, length)
            logits[row, next_token] = 10.0
            logits[row, (next_token * 7 + 3) % VOCAB_SIZE] += 9.0
        return StepOutput(torch.from_numpy(logits), None)

    def _write(self, table: np.ndarray, ids: np.ndarray, length: int) -> None:
        size, positions = self.tokens_per_block, np.arange(length - len(ids), length)
        blocks = table[positions // size]
        assert (blocks != NO_BLOCK).all(), "a token has no block to be written to"
        if self.manager is not None:
            pool = self.manager.pool
            assert not pool.is_null[blocks].any(), "a null page is written"
            assert (pool.ref_count[blocks] == 1).all(), "a shared block is written"
            assert not pool.is_full[blocks].any(), "a full block is written"
            assert (pool.origin_position[blocks] == positions // size * size).all(), "a block starts somewhere else"
        rows = blocks * size + positions % size
        self._tokens[rows], self._positions[rows] = ids, positions
        if self.pool is not None:
            self.pool[blocks, 0, :, 0, positions % size] = _VALUES[ids]

    def _read(self, table: np.ndarray, chunk: int, length: int) -> int:
        size, positions = self.tokens_per_block, np.arange(length)
        blocks = table[positions // size]
        seen = blocks != NO_BLOCK
        if self.manager is not None:
            seen &= ~self.manager.pool.is_null[blocks]
        assert seen[length - chunk :].all(), "a token of the step cannot see itself"
        rows = blocks[seen] * size + positions[seen] % size
        # A page that is named more than once is that of the first entry which names it.
        _, first, place = np.unique(table, return_index=True, return_inverse=True)
        written = first[place.ravel()][positions[seen] // size] * size + positions[seen] % size
        assert (self._positions[rows] == written).all(), "a row of another page is read"
        tokens = self._tokens[rows]
        assert seen[0], "the first row of the prompt is gone"
        text = self._text_of(int(tokens[0]))
        mixed = int(((tokens + 1) * _WEIGHTS[: len(tokens)]).sum())
        return 4 + mixed % 55 if self._depends_on_reads and mixed % 7 == 0 else text[length]
