"""Calibrates null pages: keys that no query of a model attends to, one for each layer, KV head and band of positions.

K of a page lies along a direction that all queries point away from (``null_directions``), and is made so long that the
worst query's logit lies far below the log-sum-exp of its real keys; V is 0. Directions are taken from some texts,
lengths from another, and the result is checked on one that neither has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from trtllm_memshare.engine.attention_queries import (
    FIRST_POSITION,
    Queries,
    first_layer_queries,
    join_queries,
    observe_queries,
)
from trtllm_memshare.engine.null_directions import largest_logits, mean_directions, needed_length, turn_away
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.block_distance import rotate

TARGET_GAP = -20.0
"""Largest null logit less the log-sum-exp of the real keys, in nats, on text that nothing was fitted on. 500 pages of
16 tokens then weigh at most 8,000 e^-20, or 2 in 100,000 of the softmax."""

_FITTED_GAP = -30.0  # what lengths are chosen for, so that text not seen yet stays below TARGET_GAP
_WIDEST_BAND, _NARROWEST_BAND = 4096, 128
_LONG_KEY = 100.0  # the direction of a key that would be longer is turned
_MARGIN = 2.0
"""Times the length that short texts need. Queries from position 4,096 of a real text on came within 17 nats of keys
that were fitted on 700 tokens to 30; a key that is longer costs nothing, as far as the pool can hold it."""
_LONGEST_KEY = 1000.0
_LONGEST_TOKEN_KEY = 400.0  # that the vocabulary alone can ask for
_MAX_QUERIES = 512  # of a text
_MAX_TOKENS, _FITTED_TOKENS = 32_768, 8192  # of the vocabulary, in the first layer: tried, and fitted on
_VOCABULARY_SHARE = 0.999  # of it, in each head, is to be as far away as text is
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest stored element of the pools that have scales."""


class NullPageRefused(UserError):
    """No null page could be made of this model.

    Args:
      reason: layer, head and why.
      advice: what to do about it, of who makes engines.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} ({advice})")
        self.reason = reason


@dataclass(frozen=True)
class NullPageSet:
    """Null pages of a model and how far each query head stays from them.

    Attributes:
      keys: float32 ``[num_bands, num_layers, num_kv_heads, head_dim]``, K after the rotation, the same for every token
        of the page. V is 0.
      bands: int32 ``[num_bands + 1]``, where bands begin, and where the last one ends.
      gaps: float32 ``[num_bands, num_layers, num_heads]``, largest null logit less the log-sum-exp of the real keys,
        over the queries of the text that nothing was fitted on, each at every position of the band.
      num_queries: how many queries that were.
      num_turned: KV heads whose direction was turned away from single queries.
      num_lengthened: KV heads whose key had to be lengthened for the last text: their gaps are fitted ones.
      near_tokens: of ``num_tokens`` tokens of the vocabulary, how many come nearer than the target in some head of the
        first layer.
      weights: digest of the weights that they were calibrated on, see ``weights.weights_digest``.
    """

    keys: torch.Tensor
    bands: np.ndarray
    gaps: torch.Tensor
    num_queries: int = 0
    num_turned: int = 0
    num_lengthened: int = 0
    near_tokens: int = 0
    num_tokens: int = 0
    weights: str | None = None

    @property
    def num_bands(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> torch.Tensor:
        """Length of K, float32 ``[num_bands, num_layers, num_kv_heads]``."""
        return self.keys.norm(dim=-1)

    def describe(self) -> str:
        """The pages in one line."""
        pages = f"{self.num_bands} page{'s' if self.num_bands > 1 else ''}, one for each"
        return (
            f"{pages} {int(self.bands[1] - self.bands[0]):,} positions; worst gap {float(self.gaps.max()):.1f} nats, "
            f"longest K {float(self.lengths.max()):.0f}"
        )


def calibrate_null_pages(
    model: Any,
    texts: Seq[Seq[int]],
    max_positions: int | None = None,
    kv_dtype: torch.dtype = torch.float32,
    kv_scales: torch.Tensor | None = None,
) -> NullPageSet:
    """Finds null pages for a model.

    Bands are as wide as possible: 4,096 positions, and half of that as long as some head has no direction.

    Args:
      model: a Hugging Face decoder with rotary embeddings.
      texts: token ids, at least three texts of at least 64 tokens: the last is the one that nothing is fitted on, the
        one before gives the lengths, the others the directions. A few thousand tokens in all.
      max_positions: positions that need a page; None = all that the model has.
      kv_dtype: element type of the pool.
      kv_scales: float32 ``[num_layers]``, what a stored element of an fp8 or int8 pool is multiplied by. None: 1 for
        fp8, the least that NVIDIA's Model Optimizer exports; for int8 just enough for the largest element of K and V in
        the texts. A larger scale makes a page's K longer.

    Raises:
      UserError: too little text.
      NullPageRefused: a head without a direction, or whose key the pool cannot hold, named with its layer.
    """
    if len(texts) < 3 or min(len(t) for t in texts) < 4 * FIRST_POSITION:
        raise UserError(
            f"null pages are calibrated on at least 3 texts of at least {4 * FIRST_POSITION} tokens, got "
            f"{[len(t) for t in texts]} tokens (give more or longer texts)"
        )
    last = int(model.config.max_position_embeddings) if max_positions is None else max_positions
    fit = join_queries([observe_queries(model, list(t), _MAX_QUERIES) for t in texts[:-2]])
    measure, check = (observe_queries(model, list(t), _MAX_QUERIES) for t in texts[-2:])
    vocabulary = first_layer_queries(model, fit.log_sum_exp[0].amin(-1), _MAX_TOKENS)
    calibration = _Calibration(
        fit,
        measure,
        check,
        vocabulary,
        model.model.rotary_emb.inv_freq.double().cpu(),
        int(model.config.num_key_value_heads),
    )
    width = min(_WIDEST_BAND, max(_NARROWEST_BAND, 1 << (last - 1).bit_length()))
    if not calibration.fit_band(width):
        # A direction for a band serves its parts as well, so this one decides whether to go on.
        if not calibration.fit_band(_NARROWEST_BAND):
            calibration.refuse(_NARROWEST_BAND)
        width //= 2
        while not calibration.fit_band(width):
            width //= 2
    edges = np.arange(0, last + width, width, dtype=np.int32)
    return calibration.pages(edges[: -(-last // width) + 1], kv_dtype, kv_scales)


class _Calibration:
    """Queries of three kinds, and the keys of the band ``[0, width)`` that was tried last.

    In the first layer a query hangs on its token alone, and a short text has few of all tokens. So there directions and
    lengths are taken from the vocabulary too.
    """

    def __init__(
        self,
        fit: Queries,
        measure: Queries,
        check: Queries,
        vocabulary: Queries,
        inv_freq: torch.Tensor,
        num_kv_heads: int,
    ) -> None:
        self._fit, self._measure, self._check, self._vocabulary = fit, measure, check, vocabulary
        self._inv_freq, self._num_kv_heads = inv_freq, num_kv_heads

    def fit_band(self, width: int) -> bool:
        """Directions and lengths for bands of that width; False if some head has none."""
        self._directions = mean_directions(self._fit.unrotated.mean(2), width, self._inv_freq, self._num_kv_heads)
        self._fit_first_layer(width)
        self._lengths(width)
        self._turned = self.length > _LONG_KEY
        self._turned[0] = False
        if self._turned.any():
            self._directions = turn_away(self._fit, self._directions, self._turned, width, self._inv_freq, _FITTED_GAP)
            self._lengths(width)
        return bool(self.length.max() <= _LONGEST_KEY)

    def _fit_first_layer(self, width: int) -> None:
        tokens, text = self._vocabulary, self._fit
        step = -(-tokens.unrotated.shape[2] // _FITTED_TOKENS)
        both = Queries(
            torch.cat([tokens.unrotated[:, :, ::step], text.unrotated[:1]], 2),
            torch.cat([tokens.log_sum_exp[..., ::step], text.log_sum_exp[:1]], 2),
            text.largest,
            text.scaling,
        )
        start = mean_directions(tokens.unrotated.mean(2), width, self._inv_freq, self._num_kv_heads)
        all_heads = torch.ones((1, self._num_kv_heads), dtype=torch.bool)
        self._directions[:1] = turn_away(both, start, all_heads, width, self._inv_freq, _FITTED_GAP)

    def _lengths(self, width: int) -> None:
        measured = largest_logits(self._measure, self._directions, 0, width, self._inv_freq)
        length = needed_length(measured, self._measure, _FITTED_GAP, self._num_kv_heads)
        checked = largest_logits(self._check, self._directions, 0, width, self._inv_freq, every=True)
        # A check that fails by little makes the key longer; one that fails for any length leaves infinity.
        self._short = needed_length(checked, self._check, TARGET_GAP, self._num_kv_heads) > length
        longer = needed_length(checked, self._check, _FITTED_GAP, self._num_kv_heads)
        self.length = torch.where(self._short, longer, length)
        tokens = self._vocabulary
        found = largest_logits(tokens, self._directions[:1], 0, width, self._inv_freq)
        usual = found.sort(-1).values[..., : math.ceil(_VOCABULARY_SHARE * found.shape[-1])]
        of_usual = Queries(tokens.unrotated, tokens.log_sum_exp[..., : usual.shape[-1]], tokens.largest, tokens.scaling)
        needed = needed_length(usual, of_usual, _FITTED_GAP, self._num_kv_heads)[0]
        # Rare tokens may ask for more than a key can be: the report counts those that are left near.
        self.length[0] = torch.maximum(self.length[0], needed.clamp_max(_LONGEST_TOKEN_KEY))

    def refuse(self, width: int) -> NoReturn:
        """Raises NullPageRefused for the head that is worst off."""
        worst = torch.cat(
            [largest_logits(q, self._directions, 0, width, self._inv_freq) for q in (self._measure, self._check)], -1
        )
        layer, head = divmod(int(worst.amax(-1).argmax()), worst.shape[1])
        share = float((worst[layer, head] >= 0).float().mean())
        raise NullPageRefused(
            f"no null page is found for layer {layer}, head {head}: {share:.1%} of its queries point towards the best "
            f"direction, even in bands of {width} positions",
            "take preset aligned, or set retired_becomes to dropped on a runner that skips entries",
        )

    def pages(self, edges: np.ndarray, kv_dtype: torch.dtype, kv_scales: torch.Tensor | None) -> NullPageSet:
        """The pages of all bands as a pool holds them, and their gaps. Raises NullPageRefused: see the top."""
        keys, gaps = [], []
        with_margin = torch.maximum(self.length, (_MARGIN * self.length).clamp_max(_LONGEST_KEY))
        base = self._directions * with_margin[..., None]
        if kv_scales is None:
            kv_scales = self._fit.largest / 127 if kv_dtype is torch.int8 else torch.ones(len(base))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            position = torch.full((1, len(base)), start)
            key = rotate(base[None, :, None], position, self._inv_freq)[0, :, 0]
            key = stored_keys(key, kv_dtype).float()
            if kv_dtype in _LARGEST:
                key *= kv_scales[:, None, None]
            logits = largest_logits(self._check, key, start, stop - start, self._inv_freq, every=True)
            keys.append(key)
            gaps.append((logits - self._check.log_sum_exp).amax(-1))
        gap = torch.stack(gaps)
        worst = gap.nan_to_num(nan=torch.inf)
        if worst.max() > TARGET_GAP:
            band, layer, head = (int(i[0]) for i in torch.where(worst == worst.max()))
            raise NullPageRefused(
                f"the null page of layer {layer}, head {head} at positions from {int(edges[band])} on lies "
                f"{-float(gap[band, layer, head]):.1f} nats below the real keys in a pool of "
                f"{str(kv_dtype).removeprefix('torch.')}, expected at least {-TARGET_GAP:.0f}",
                "take another --kv-cache-dtype",
            )
        tokens = self._vocabulary
        near = largest_logits(tokens, keys[0][:1], 0, int(edges[1]), self._inv_freq) - tokens.log_sum_exp > TARGET_GAP
        return NullPageSet(
            torch.stack(keys), edges, gap, self._check.log_sum_exp.shape[-1], int(self._turned.sum()),
            int(self._short.sum()), int(near.any(1).sum()), near.shape[-1],
        )  # fmt: skip


def stored_keys(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys as elements of a pool, the same shape, of type ``dtype``.

    An fp8 or int8 pool holds stored elements times a scale that need not be known here. It gets the longest key along
    the same direction that its elements can be: with int8 ``[1.0, -0.5]`` becomes ``[127, -64]``.
    """
    if dtype not in _LARGEST:
        return keys.to(dtype)
    longest = keys * (_LARGEST[dtype] / keys.abs().amax(-1, keepdim=True).clamp_min(1e-30))
    return longest.round().to(dtype) if dtype is torch.int8 else longest.to(dtype)
