"""Controls that evict by score at a fixed budget, block by block: what sharing has to be held against at equal memory.

Block-granular reconstructions: a block spans all layers and heads, so one score decides for all of them, where the
papers choose tokens for each head. The prompt and the protected recent tokens stay, as they do under sharing, and a
kept token keeps the rotation that it was written with.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.offsets import NO_BLOCK
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Decision

_SIMILAR = 0.5  # cosine from which R-KV counts two keys as similar
_IMPORTANCE_WEIGHT = 0.1  # lambda of R-KV: importance against redundancy


class BlockEviction:
    """Keeps the full blocks with the highest scores, within a budget of generated tokens for each request.

    The papers fix the budget; ``budget: share`` lets it grow with the request, which is kinder where lengths differ.

    - ``snapkv`` (SnapKV, arXiv 2404.14469, applied while decoding): the score is the attention that the block received
      from the last ``observation_tokens`` queries, averaged over layers and heads.
    - ``rkv`` (R-KV, arXiv 2505.24133): a tenth of that attention minus nine tenths of the redundancy of the block's
      keys, see ``key_redundancy``.

    Args:
      manager: the cache.
      config: ``control``, budget, observation window, protections; ``undo_rope``: whether keys are compared without
        their rotation (R-KV compares them as stored).
      runner: a runner that reports attention and shows its pool.

    Raises:
      UserError: the runner does neither.
    """

    evicts = observes_attention = True

    def __init__(self, manager: KVCacheManager, config: MemShareConfig, runner: Runner | None) -> None:
        pool, inv_freq = getattr(runner, "pool", None), getattr(runner, "inv_freq", None)
        if not isinstance(pool, torch.Tensor) or not isinstance(inv_freq, torch.Tensor):
            raise UserError(
                f"control {config.control} scores blocks by attention, got a runner that does not report it (use the "
                f"torch runner on the CPU)"
            )
        self._manager, self._config = manager, config
        self._pool, self._inv_freq = pool, inv_freq if config.undo_rope else inv_freq[:0]
        self._window = config.observation_tokens
        # A block is full tokens_per_block steps after it was taken: by then every column is its own.
        if self._window > manager.tokens_per_block:
            raise UserError(
                f"observation_tokens must be at most {manager.tokens_per_block}, the tokens of a block, with control "
                f"{config.control}, got {self._window}"
            )
        self._attention = np.zeros((manager.pool.num_blocks, self._window), np.float32)
        self._step = 0

    def replace(self, decisions: list[Decision]) -> list[Decision]:
        """The decisions as they are: there are none."""
        return decisions

    def observe(self, attention: np.ndarray) -> None:
        """Takes one step's attention per block, float32 ``[num_blocks]``."""
        self._attention[:, self._step % self._window] = attention
        self._step += 1

    def evict(self) -> None:
        """Brings every request down to its budget."""
        size, config = self._manager.tokens_per_block, self._config
        for request_id, first, num_computed in self._manager.generating_sequences():
            table = self._manager.block_table(request_id)
            logical = np.arange(first, num_computed // size)
            logical = logical[table[logical] != NO_BLOCK]
            tokens = config.budget_tokens
            if config.budget == "share":
                tokens = round(config.budget_share * (num_computed - first * size))
            excess = len(logical) - max(1, tokens // size)
            num_old = int((logical < (num_computed - config.protected_tokens) // size).sum())
            if excess <= 0 or num_old == 0:
                continue
            scores = self._scores(table[logical])[:num_old]
            self._manager.evict_blocks(request_id, logical[np.argsort(scores, kind="stable")[:excess]])

    def _scores(self, blocks: np.ndarray) -> np.ndarray:
        """Score of each block, float32 ``[len(blocks)]``; the blocks are in order of position."""
        attention = self._attention[blocks].mean(1)
        if self._config.control == "snapkv":
            return attention
        importance = attention / max(float(attention.sum()), np.finfo(np.float32).tiny)
        redundancy = key_redundancy(self._pool, blocks, self._manager.pool.origin_position[blocks], self._inv_freq)
        return _IMPORTANCE_WEIGHT * importance - (1 - _IMPORTANCE_WEIGHT) * redundancy


def key_redundancy(
    pool: torch.Tensor, blocks: np.ndarray, origin_position: np.ndarray, inv_freq: torch.Tensor
) -> np.ndarray:
    """How much of each block's keys other keys of the request repeat, after R-KV's equations; sums to 1.

    In each layer and head: cosine of every two keys; of the keys similar to key i the latest is let off, so that one
    copy of a repeat is not counted as redundant; the mean over i, as a softmax over keys. Summed over a block's tokens,
    averaged over layers and heads.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      blocks: int ``[n]``, physical blocks in order of position.
      origin_position: int32 ``[n]``, position of each block's first token.
      inv_freq: float32 ``[rotary_dim / 2]``, to undo the rotation; empty = compare keys as stored.

    Returns:
      float32 ``[n]``.
    """
    size = pool.shape[4]
    keys = pool[torch.from_numpy(blocks).long().to(pool.device), :, 0].float()  # [n, layers, heads, size, head_dim]
    keys = keys.permute(0, 3, 1, 2, 4).flatten(0, 1)[None]  # [1, tokens, layers, heads, head_dim]
    if len(inv_freq):
        positions = (origin_position[:, None] + np.arange(size)).reshape(1, -1)
        keys = rotate(keys, torch.from_numpy(-positions).to(pool.device), inv_freq)
    unit = torch.nn.functional.normalize(keys[0].permute(1, 2, 0, 3), dim=-1)  # [layers, heads, tokens, head_dim]
    cosines = unit @ unit.transpose(-1, -2)
    count = cosines.shape[-1]
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    latest = torch.where(cosines > _SIMILAR, torch.arange(count, device=pool.device), 0).amax(-1, keepdim=True)
    cosines.scatter_(-1, latest, 0.0)
    redundancy = cosines.mean(-2).softmax(-1).mean((0, 1))
    return redundancy.view(-1, size).sum(1).cpu().numpy()
