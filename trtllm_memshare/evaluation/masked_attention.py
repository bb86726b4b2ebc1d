"""Attention of a whole text in one pass, where each query sees what a cache that lets go of pages would show it.

transformers calls ``masked_attention`` in every layer. Keys that no query of a chunk sees are left out of its product,
so that a pass costs what is left of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trtllm_memshare.evaluation.head_retirement import HeadRetirements
from trtllm_memshare.evaluation.retirement import NEVER, Retirements

IMPLEMENTATION = "memshare_masked"
_CHUNK_TOKENS = 128
_HIDDEN = float("-inf")


class LayerPass(Protocol):
    """What attends in one pass over a text."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[heads, tokens, head_dim]`` each, K and V with KV heads, scaled queries -> the shape of ``query``."""


@dataclass(frozen=True)
class QueryChunk:
    """Queries ``[start, stop)`` of the pass, and what they see.

    Attributes:
      keys: int64 ``[num_keys]``, positions in the text of the keys that any of them sees.
      bias: float32 ``[stop - start, num_keys]``, or the same for each KV head, added to the logits: -inf = not seen,
        ln m = weighs m times.
    """

    start: int
    stop: int
    keys: torch.Tensor
    bias: torch.Tensor

    def on(self, device: torch.device) -> QueryChunk:
        """The same on a device: itself if it is there."""
        if self.keys.device == device:
            return self
        return QueryChunk(self.start, self.stop, self.keys.to(device), self.bias.to(device))


class MaskedPass:
    """One pass over a text from ``start`` on, under an arm's retirements.

    Args:
      retirements: what goes when.
      num_tokens: length of the whole text.
      start: first query; K and V of what lies before it are those of ``prefix``.
      prefix: of each layer K (after RoPE) and V, float32 ``[kv_heads, start or more, head_dim]``.
      branches: lengths of continuations that follow the text in the pass, in tokens. Each sees what is left of the
        text at its end, and itself, but no other one.
    """

    def __init__(
        self,
        retirements: Retirements,
        num_tokens: int,
        start: int = 0,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        branches: Sequence[int] = (),
    ) -> None:
        self._start, self._prefix = start, prefix
        self._chunks = [
            _chunk(retirements, first, min(first + _CHUNK_TOKENS, num_tokens), start)
            for first in range(start, num_tokens, _CHUNK_TOKENS)
        ]
        first = num_tokens
        for length in branches:
            self._chunks.append(_branch(retirements, num_tokens, first, length, start))
            first += length

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``LayerPass``."""
        key, value = _with_prefix(self._prefix, layer, self._start, key, value)
        self._chunks = [chunk.on(query.device) for chunk in self._chunks]
        return _attend(self._chunks, query, key, value)


class HeadMaskedPass:
    """The same under retirements of each layer and KV head, without continuations.

    Args:
      retirements, num_tokens, start, prefix: see ``MaskedPass``.
    """

    def __init__(
        self,
        retirements: HeadRetirements,
        num_tokens: int,
        start: int = 0,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        self._retired_at, self._num_tokens = retirements.retired_at, num_tokens
        self._start, self._prefix = start, prefix

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``LayerPass``. Masks differ by layer and are made when it attends."""
        key, value = _with_prefix(self._prefix, layer, self._start, key, value)
        chunks = [
            _head_chunk(self._retired_at[layer], first, min(first + _CHUNK_TOKENS, self._num_tokens), self._start).on(
                query.device
            )
            for first in range(self._start, self._num_tokens, _CHUNK_TOKENS)
        ]
        return _attend(chunks, query, key, value)


class RoundedPass:
    """A pass whose K and V are those that a cache of a coarser type holds, with scales of 1.

    Args:
      whole: the pass, from the text's first token on.
      stored: the cache's type. What is larger than its largest number becomes that, as on a GPU.
    """

    def __init__(self, whole: LayerPass, stored: torch.dtype) -> None:
        self._whole, self._stored, self._largest = whole, stored, torch.finfo(stored).max

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``LayerPass``."""
        key, value = (x.clamp(-self._largest, self._largest).to(self._stored).float() for x in (key, value))
        return self._whole.attend(layer, query, key, value)


def open_pass(
    retirements: Retirements | HeadRetirements,
    num_tokens: int,
    start: int,
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> LayerPass:
    """The pass of an arm of either kind; see ``MaskedPass``."""
    if isinstance(retirements, HeadRetirements):
        return HeadMaskedPass(retirements, num_tokens, start, prefix)
    return MaskedPass(retirements, num_tokens, start, prefix)


def _with_prefix(
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]], layer: int, start: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the whole text: those of the pass behind the first ``start`` of the prefix."""
    if not start:
        return key, value
    old_key, old_value = prefix[layer]
    return torch.cat([old_key[:, :start], key], 1), torch.cat([old_value[:, :start], value], 1)


def _attend(chunks: list[QueryChunk], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of every chunk over what it sees: the shape of ``query``."""
    kv_heads, head_dim = key.shape[0], key.shape[2]
    output = torch.empty_like(query)
    for chunk in chunks:
        # The queries that share a KV head become the rows of one product.
        rows = query[:, chunk.start : chunk.stop].reshape(1, kv_heads, -1, head_dim)
        k, v = key.index_select(1, chunk.keys), value.index_select(1, chunk.keys)
        bias = torch.cat([chunk.bias] * (query.shape[0] // kv_heads), -2)
        attended = scaled_dot_product_attention(rows, k[None], v[None], attn_mask=bias, scale=1.0)
        output[:, chunk.start : chunk.stop] = attended[0].reshape(query.shape[0], -1, head_dim)
    return output


def _head_chunk(retired_at: np.ndarray, first: int, stop: int, start: int) -> QueryChunk:
    """See ``_chunk``; ``retired_at``: int64 ``[kv_heads, tokens]``."""
    keys = np.flatnonzero((retired_at[:, :stop] > first).any(0))
    queries = np.arange(first, stop)[:, None]
    seen = (keys <= queries) & (queries < retired_at[:, None, keys])
    bias = np.where(seen, np.float32(0), np.float32(_HIDDEN))
    return QueryChunk(first - start, stop - start, torch.from_numpy(keys), torch.from_numpy(bias))


def _chunk(retirements: Retirements, first: int, stop: int, start: int) -> QueryChunk:
    """What the queries at positions ``[first, stop)`` see, counted from ``start`` for the pass."""
    retired_at = np.full(stop, NEVER, np.int64)
    by_token = np.repeat(retirements.retired_at, retirements.tokens_per_block)[:stop]
    retired_at[: len(by_token)] = by_token
    keys = np.flatnonzero(retired_at > first)  # seen by the first query at least, or written later
    queries = np.arange(first, stop)[:, None]
    seen = (keys <= queries) & (queries < retired_at[keys])
    weights = retirements.weights(np.arange(first, stop))  # [queries, pages]
    page = keys // retirements.tokens_per_block
    bias = np.zeros(seen.shape, np.float32)
    whole = page < weights.shape[1]
    bias[:, whole] = np.log(weights[:, page[whole]])
    bias[~seen] = _HIDDEN
    return QueryChunk(first - start, stop - start, torch.from_numpy(keys), torch.from_numpy(bias))


def _branch(retirements: Retirements, num_tokens: int, first: int, length: int, start: int) -> QueryChunk:
    """What a continuation sees whose rows are ``[first, first + length)`` of the pass, counted from the text's start.

    It is the text's next query, as far as the text is concerned.
    """
    chunk = _chunk(retirements, num_tokens, num_tokens + 1, start)
    text = chunk.keys < num_tokens
    keys = torch.cat([chunk.keys[text], torch.arange(first, first + length)])
    own = torch.full((length, length), _HIDDEN).triu(1)
    bias = torch.cat([chunk.bias[:, text].expand(length, -1), own], 1)
    return QueryChunk(first - start, first - start + length, keys, bias)


def masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    memshare_pass: LayerPass | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query ``[1, heads, tokens, head_dim]`` -> ``[1, tokens, heads, head_dim]``.

    Attends in float32 whatever the rest of the pass computes in.

    Raises:
      RuntimeError: called outside a masked pass.
    """
    if memshare_pass is None:
        raise RuntimeError(f"attention {IMPLEMENTATION} runs inside a masked pass only: memshare_pass is missing")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = query[0].float() * scale, key[0].float(), value[0].float()
        output = memshare_pass.attend(int(module.layer_idx), q, k, v)  # type: ignore[arg-type]
    return output.transpose(0, 1)[None], None


AttentionInterface.register(IMPLEMENTATION, masked_attention)
