"""Queries as attention takes them, and what they make of the keys before them: what null pages are calibrated on.

Taken through transformers' attention interface, so after biases (Qwen2) and query norms (Qwen3), whatever the model.
The rotation is undone: a query of a short text then stands for the same query at any position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.block_distance import rotate

IMPLEMENTATION = "memshare_observed"
"""Name under which the observing attention is registered with transformers' ``AttentionInterface``."""

FIRST_POSITION = 16
"""Queries before it are left out: the first tokens of a text are unlike all later ones, and prompt stays anyway."""

_SLICE_ELEMENTS = 1 << 26  # logits of one product, so that long texts fit into memory


@dataclass(frozen=True)
class Queries:
    """Queries of one text or several.

    Attributes:
      unrotated: float32 ``[num_layers, num_heads, n, head_dim]``, with the rotation undone.
      log_sum_exp: float32 ``[num_layers, num_heads, n]``, of the logits of all real keys up to the query.
      largest: float32 ``[num_layers]``, largest magnitude among the elements of K and V of the whole text.
      scaling: factor on the logits.
      positions: int ``[n]``, ascending, where they stood in their text; empty where they are of several or of none.
    """

    unrotated: torch.Tensor
    log_sum_exp: torch.Tensor
    largest: torch.Tensor
    scaling: float
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, int))


@dataclass
class Observer:
    """Collects queries at some positions while the model reads a text; one layer after the other."""

    positions: torch.Tensor
    inv_freq: torch.Tensor
    unrotated: list[torch.Tensor] = field(default_factory=list)
    log_sum_exp: list[torch.Tensor] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    scaling: float = 0.0

    def take(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
        """Takes one layer: query ``[num_heads, tokens, head_dim]``, key and value ``[num_kv_heads, ...]`` likewise."""
        self.scaling = scaling
        self.largest.append(float(torch.maximum(key.abs().amax(), value.abs().amax())))
        at = self.positions
        chosen = query[:, at].float()
        turned = rotate(chosen.transpose(0, 1)[None, :, None], -at[None], self.inv_freq)[0, :, 0]
        self.unrotated.append(turned.transpose(0, 1).cpu())
        grouped = chosen.view(key.shape[0], -1, len(at), chosen.shape[-1])
        tokens = torch.arange(key.shape[1], device=key.device)
        rows = max(1, _SLICE_ELEMENTS // (key.shape[1] * len(chosen)))
        sums = []
        for start in range(0, len(at), rows):
            part = slice(start, start + rows)
            logits = grouped[:, :, part] @ key[:, None].float().transpose(-1, -2) * scaling
            logits.masked_fill_(tokens > at[part, None], -torch.inf)
            sums.append(logits.logsumexp(-1).flatten(0, 1))
        self.log_sum_exp.append(torch.cat(sums, -1).cpu())


@torch.inference_mode()
def observe_queries(model: Any, token_ids: list[int], max_queries: int) -> Queries:
    """Reads a text and returns up to ``max_queries`` of its queries, evenly spread over positions.

    Args:
      model: a Hugging Face decoder with rotary embeddings of half-split layout; its attention is switched and back.
      token_ids: of the text; more than ``FIRST_POSITION``.

    Raises:
      UserError: attention that is not finite, as where float16 overflows.
    """
    device = model.device
    count = len(token_ids)
    chosen = np.unique(np.linspace(FIRST_POSITION, count - 1, min(max_queries, count - FIRST_POSITION)).astype(int))
    observer = Observer(torch.from_numpy(chosen).to(device), model.model.rotary_emb.inv_freq.float())
    with _observed(model):
        model.model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.arange(count, device=device)[None],
            use_cache=False,
            memshare_observer=observer,
        )
    largest = torch.tensor(observer.largest)
    unrotated, log_sum_exp = torch.stack(observer.unrotated), torch.stack(observer.log_sum_exp)
    if not (unrotated.isfinite().all() and log_sum_exp.isfinite().all()):
        raise UserError(
            f"the model's attention must be finite to find a null page, got numbers that are not, in {model.dtype} and "
            f"a text of {count} tokens (calibrate in bfloat16 or float32, or look at the weights)"
        )
    return Queries(unrotated, log_sum_exp, largest, observer.scaling, chosen)


@torch.inference_mode()
def first_layer_queries(model: Any, log_sum_exp: torch.Tensor, most_tokens: int) -> Queries:
    """Queries of the first layer for tokens of the whole vocabulary, evenly spread: there they hang on nothing else.

    Args:
      model: as in ``observe_queries``.
      log_sum_exp: float32 ``[num_heads]``, what each head's queries are taken to have.
      most_tokens: of the vocabulary.

    Returns:
      Queries of one layer.
    """
    vocabulary = int(model.config.vocab_size)
    ids = torch.arange(0, vocabulary, -(-vocabulary // most_tokens), device=model.device)
    parts = []
    with _observed(model):
        for chunk in ids.split(2048):
            observer = _FirstLayer()
            with suppress(_Enough):
                model.model(
                    input_ids=chunk[None],
                    position_ids=torch.zeros_like(chunk)[None],  # position 0: nothing is turned
                    use_cache=False,
                    memshare_observer=observer,
                )
            parts.append(observer.query)
    unrotated = torch.cat(parts, 1)[None]
    return Queries(
        unrotated,
        log_sum_exp[None, :, None].expand(1, -1, unrotated.shape[2]).clone(),
        torch.zeros(1),
        float(model.model.layers[0].self_attn.scaling),
    )


class _Enough(Exception):
    """Ends a pass whose later layers are of no interest."""


class _FirstLayer:
    query: torch.Tensor

    def take(self, query: torch.Tensor, *_: Any) -> None:
        self.query = query.float().cpu()
        raise _Enough


def join_queries(parts: list[Queries]) -> Queries:
    """Queries of several texts as one."""
    return Queries(
        torch.cat([p.unrotated for p in parts], 2),
        torch.cat([p.log_sum_exp for p in parts], 2),
        torch.stack([p.largest for p in parts]).amax(0),
        parts[0].scaling,
    )


@contextmanager
def _observed(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _observed_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _observed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    memshare_observer: Observer | _FirstLayer | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: causal attention over one text, shown to the observer."""
    if memshare_observer is None:
        raise RuntimeError(f"attention {IMPLEMENTATION} runs inside observe_queries only: memshare_observer is missing")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    memshare_observer.take(query[0], key[0], value[0], scale)
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2), None
