"""How far the queries of a text stay from null pages: each at its own place, from the page of its band."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trtllm_memshare.engine.attention_queries import Queries
from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.search.block_distance import rotate


def gaps_of(queries: Queries, pages: NullPageSet, inv_freq: torch.Tensor) -> torch.Tensor:
    """Null logit of each query of one text, where it stands, less its log-sum-exp, float32 ``[layers, heads, n]``."""
    bands = torch.from_numpy(np.searchsorted(pages.bands, queries.positions, "right") - 1)
    found = []
    for layer, unrotated in enumerate(queries.unrotated):
        at = torch.from_numpy(queries.positions)[None]
        turned = rotate(unrotated.transpose(0, 1)[None, :, None], at, inv_freq)[0, :, 0].transpose(0, 1)
        keys = pages.keys[:, layer].transpose(0, 1)[:, bands]  # [KV heads, n, head_dim]
        per_head = keys.repeat_interleave(len(turned) // len(keys), 0)
        found.append((turned * per_head).sum(-1) * queries.scaling - queries.log_sum_exp[layer])
    return torch.stack(found)


def worst_by_part(gaps: torch.Tensor, positions: np.ndarray, cuts: list[int]) -> list[dict[str, Any]]:
    """The worst gap of each part of a text, by the position at which it ends."""
    ends = [*cuts, int(positions[-1]) + 1]
    part_of = np.searchsorted(ends, positions, "right")
    return [{"end": end, "worst_gap": float(gaps[..., part_of == i].max())} for i, end in enumerate(ends)]


def worst_heads(pages: NullPageSet, count: int = 5) -> list[dict[str, Any]]:
    """The heads that come nearest to a null page, and the length of the key that keeps them away."""
    gaps, lengths = pages.gaps.amax(0), pages.lengths.amax(0)
    order = gaps.flatten().argsort(descending=True)[:count].tolist()
    heads, each = gaps.shape[1], gaps.shape[1] // lengths.shape[1]
    return [
        {
            "layer": i // heads,
            "head": i % heads,
            "gap": float(gaps.flatten()[i]),
            "length": float(lengths[i // heads, i % heads // each]),
        }
        for i in order
    ]
