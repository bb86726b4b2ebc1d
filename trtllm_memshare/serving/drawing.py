"""Draws tokens for all sampled rows of a step at once: temperature, then top-k, then top-p.

Each row brings its own number between 0 and 1, so that its token does not depend on the rows beside it. Only the head
of a row is put in order, and the whole row where that does not decide: ordering 150,000 logits a request and step
would cost more than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_HEAD = 512  # logits that are put in order at first; top-p 0.95 keeps fewer in nearly every step of a reasoning model
MIN_TEMPERATURE = 1e-6  # below it float32 differences of logits divide to infinity


@dataclass(frozen=True)
class Draw:
    """How one row is drawn. ``top_k`` 0 and ``top_p`` 1 cut nothing; ``uniform`` in [0, 1) picks from what is left."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each row.

    Equal logits stand in the order of their ids. With top-p a token stays while those before it have not reached
    ``top_p``, so the first one always does.

    Args:
      logits: float32 ``[batch, vocab_size]``, no NaN, at least one finite in each row.
      draws: one per row.
    """
    # Less the largest first: a tiny temperature must not reach infinity less infinity.
    temperatures = [max(draw.temperature, MIN_TEMPERATURE) for draw in draws]
    scores = (logits - logits.amax(-1, keepdim=True)) / logits.new_tensor(temperatures)[:, None]
    tokens = [0] * len(draws)
    free = [row for row, draw in enumerate(draws) if not draw.cuts]
    cut = [row for row, draw in enumerate(draws) if draw.cuts]
    if free:
        picked = _pick(scores[free].exp().cumsum(-1, dtype=torch.float64), [draws[row] for row in free])
        for row, token in zip(free, picked.tolist(), strict=True):
            tokens[row] = token
    size = min(logits.shape[-1], 1 + max([_HEAD, *(draws[row].top_k for row in cut)]))
    while cut:
        found, is_decided = _draw_from_head(scores[cut], [draws[row] for row in cut], size)
        for row, token in zip(cut, found, strict=True):
            tokens[row] = token
        cut = [row for row, decided in zip(cut, is_decided, strict=True) if not decided]
        size = logits.shape[-1]
    return tokens


def _draw_from_head(scores: torch.Tensor, draws: list[Draw], size: int) -> tuple[list[int], list[bool]]:
    """Tokens drawn from the ``size`` largest scores, and whether all that stays was among these."""
    values, ids = _largest(scores, size)
    weights = values.exp().double()
    top_k = torch.tensor([draw.top_k or size for draw in draws], device=scores.device)[:, None]
    weights = weights.masked_fill(torch.arange(size, device=scores.device) >= top_k, 0)
    whole = torch.where(top_k < size, weights.sum(-1, keepdim=True), scores.exp().sum(-1, dtype=torch.float64)[:, None])
    reach = whole * whole.new_tensor([draw.top_p for draw in draws])[:, None]
    is_cut = weights.cumsum(-1) - weights >= reach
    is_cut[:, 0] = False  # rounding may have a tiny top_p reached by nothing
    weights = weights.masked_fill(is_cut, 0)
    last_kept = values.gather(1, (weights > 0).sum(-1, keepdim=True) - 1)
    is_decided = (last_kept > values[:, -1:])[:, 0] | (size == scores.shape[-1])
    picked = _pick(weights.cumsum(-1), draws)
    return ids.gather(1, picked[:, None])[:, 0].tolist(), is_decided.tolist()


def _largest(scores: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores of each row and their ids, largest first, equal ones by id."""
    if size == scores.shape[-1]:
        ordered = scores.sort(descending=True, stable=True)
        return ordered.values, ordered.indices
    ids = scores.topk(size, sorted=False).indices.sort(-1).values
    values, places = scores.gather(1, ids).sort(descending=True, stable=True)
    return values, ids.gather(1, places)


def _pick(cumulated: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Place of the first entry above ``uniform`` of the sum, which has weight of its own; int64 ``[batch]``."""
    whole = cumulated[:, -1:]
    wanted = whole * whole.new_tensor([draw.uniform for draw in draws])[:, None]
    last = (cumulated < whole).sum(-1)  # the last one with weight, should the product have rounded up to the sum
    return torch.minimum(torch.searchsorted(cumulated, wanted, right=True)[:, 0], last)
