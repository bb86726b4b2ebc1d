"""Redundancy of a text's pages, exactly and by signatures, and how far the two rank the pages alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.signature_index import SignatureIndex
from trtllm_memshare.search.signatures import K, V, fields_of_pool, make_projection, page_signatures

PAGE_TOKENS, LAST_PAGES = 16, 8
"""Tokens of a page; newest pages, which are protected and not ranked."""

FORMS = {f"{name}_{width}": (field, width) for name, field in (("v", V), ("k", K)) for width in (16, 32, 64)}


@dataclass(frozen=True)
class TextPool:
    """K as stored and V of a text in whole pages.

    Attributes:
      pool: ``[pages, layers, 2, kv_heads, PAGE_TOKENS, head_dim]``, float32.
      inv_freq: float32 ``[head_dim / 2]``.
    """

    pool: torch.Tensor
    inv_freq: torch.Tensor

    @classmethod
    def read(cls, replay: MaskedReplay, ids: list[int]) -> TextPool:
        """What the full cache holds of a text; what is left over behind its last whole page stays away."""
        whole = len(ids) // PAGE_TOKENS * PAGE_TOKENS
        states = replay.read(ids, PAGE_TOKENS).states
        stored = torch.stack([torch.stack(pair)[:, :, :whole] for pair in states])  # [layers, 2, kv_heads, tokens, ...]
        pool = stored.unflatten(3, (-1, PAGE_TOKENS)).permute(3, 0, 1, 2, 4, 5).contiguous()
        return cls(pool, replay.model.model.rotary_emb.inv_freq)

    def exact_redundancy(self) -> np.ndarray:
        """Mean over a page's tokens of the largest cosine with a token of a later page, float32 ``[pages]``.

        The cosine is that of K without its rotation, mean over all layers and KV heads.
        """
        pages, layers, _, heads, size, _ = self.pool.shape
        keys = self.pool[:, :, 0].permute(0, 3, 1, 2, 4).flatten(0, 1)[None]  # [1, tokens, layers, heads, head_dim]
        keys = rotate(keys, -torch.arange(pages * size)[None], self.inv_freq)[0]
        unit = torch.nn.functional.normalize(keys, dim=-1).flatten(1) / math.sqrt(layers * heads)
        page = torch.arange(pages * size) // size
        cosines = (unit @ unit.T).masked_fill(page[None] <= page[:, None], -1.0)
        return cosines.amax(1).view(-1, size).mean(1).numpy()

    def redundancy_by_signatures(self, field: int, width: int) -> np.ndarray:
        """The same from the index, as serving has it."""
        pages, layers, _, heads, size, head_dim = self.pool.shape
        projection, blocks = make_projection(layers, heads, head_dim, width, field), torch.arange(pages)
        fields = fields_of_pool(self.pool, projection)
        index = SignatureIndex(size, width)
        index.extend([(0, np.arange(pages))], page_signatures(fields, blocks, self.inv_freq, blocks * size, projection))
        return index.redundancy(0)

    def correlations(self) -> dict[str, float]:
        """Of each form of signatures with the exact measure, over the pages that are not protected."""
        exact = self.exact_redundancy()[:-LAST_PAGES]
        return {
            name: rank_correlation(exact, self.redundancy_by_signatures(*form)[:-LAST_PAGES])
            for name, form in FORMS.items()
        }


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; no two values are equal in practice."""
    return float(np.corrcoef(first.argsort().argsort(), second.argsort().argsort())[0, 1])
