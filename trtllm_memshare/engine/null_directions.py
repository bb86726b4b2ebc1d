"""Directions that queries point away from: the geometry of null pages.

Queries of a head are concentrated around a mean (before their rotation), and the rotation of that mean averaged over a
band of positions keeps what turns slowly. So for a band of the positions ``[0, w)``::

    m_h = mean over p in [0, w) of R_p (mean of head h's un-rotated queries)
    u   = - normalised mean over the KV head's query heads of m_h / |m_h|

has q.u < 0 for every query of the band. Rotations keep products, so R_a u serves the band ``[a, a + w)`` in the same
way. Where single queries come near to u or beyond it, u is turned away from them.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from trtllm_memshare.engine.attention_queries import Queries
from trtllm_memshare.search.block_distance import rotate

_POSITIONS = 48  # of a band, at which every query is tried where lengths are fitted
_DRAWS = 4  # positions of a band at which a query is put while a direction is turned
_STEPS = 200
_ROWS = 4096  # queries tried at once, at so many positions
_LOGITS = 1 << 24  # of one product


def mean_directions(means: torch.Tensor, width: int, inv_freq: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """u of the band ``[0, width)``, float32 ``[num_layers, num_kv_heads, head_dim]``.

    Args:
      means: float32 ``[num_layers, num_heads, head_dim]``, mean un-rotated query of each head.
      inv_freq: float64 ``[rotary_dim / 2]``, radians per token.
    """
    angle = torch.arange(width, dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angle.cos().mean(0).float(), angle.sin().mean(0).float()
    half = len(inv_freq)
    first, second = means[..., :half], means[..., half : 2 * half]
    # Elements that are not rotated keep their mean.
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, means[..., 2 * half :]], -1)
    groups = normalize(turned, dim=-1).unflatten(1, (num_kv_heads, -1))
    return -normalize(groups.mean(2), dim=-1)


def turn_away(queries: Queries, directions: torch.Tensor, chosen: torch.Tensor, width: int, inv_freq: torch.Tensor,
              gap: float) -> torch.Tensor:  # fmt: skip
    """Directions with those of some KV heads turned so that their worst query needs the shortest key.

    Descends on a soft maximum of ``q.u / (gap + log-sum-exp)`` over queries at random positions of the band, with the
    best direction met kept; deterministic.

    Args:
      directions: float32 ``[num_layers, num_kv_heads, head_dim]``.
      chosen: bool ``[num_layers, num_kv_heads]``, which ones.
      gap: nats that a null logit is to lie below the log-sum-exp.
    """
    turned, random = directions.clone(), torch.Generator().manual_seed(0)
    num_kv_heads = directions.shape[1]
    for layer, group in chosen.nonzero().tolist():
        q = queries.unrotated[layer].unflatten(0, (num_kv_heads, -1))[group].flatten(0, 1)
        needed = (queries.log_sum_exp[layer].unflatten(0, (num_kv_heads, -1))[group].flatten() + gap).clamp_max(-1.0)
        rows = (q / -needed[:, None]).repeat(_DRAWS, 1)
        positions = torch.randint(0, width, (len(rows),), generator=random)
        rows = rotate(rows[None, :, None, None], positions[None], inv_freq)[0, :, 0, 0]
        turned[layer, group] = _descend(rows / rows.norm(dim=-1).mean(), directions[layer, group])
    return turned


def _descend(rows: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The unit vector of smallest largest product with rows ``[n, head_dim]`` of about unit length."""
    best, smallest, u = start, (rows @ start).max(), start
    for step in range(_STEPS):
        done = step / _STEPS
        products = rows @ u
        if products.max() < smallest:
            best, smallest = u, products.max()
        pull = (60.0 * (1 + 4 * done) * products).softmax(0) @ rows  # sharper and sharper, in smaller and smaller steps
        pull -= (pull @ u) * u
        u = normalize(u - (0.3 * (1 - done) ** 2 + 0.002) * pull, dim=-1)
    return best


def largest_logits(
    queries: Queries, keys: torch.Tensor, start: int, width: int, inv_freq: torch.Tensor, every: bool = False
) -> torch.Tensor:
    """Largest logit of one key for each KV head over the positions of a band; the same shape as ``log_sum_exp``.

    Every query is tried at positions spread over ``[start, start + width)``, or at each of them. With R_p the rotation
    at position p::

        (R_p q).k = sum over f of cos(p w_f) (q_f k_f + q'_f k'_f) + sin(p w_f) (q_f k'_f - q'_f k_f)

    Args:
      keys: float32 ``[num_layers, num_kv_heads, head_dim]``, as they lie in the pool.
      every: what is promised holds at every position; 48 of 4,096 miss up to 10 nats where fast rotations meet.
    """
    half = len(inv_freq)
    # Rounded steps: fast rotations are met at all their phases.
    num_positions = width if every else _POSITIONS
    positions = (start + torch.linspace(0, width - 1, num_positions, dtype=torch.float64)).round()
    rows = max(1, _LOGITS // (queries.unrotated.shape[1] * width)) if every else _ROWS
    angle = positions * inv_freq[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    best = torch.empty(queries.log_sum_exp.shape)
    for layer, of_layer in enumerate(queries.unrotated):
        k = keys[layer][:, None, None]
        k1, k2, k3 = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
        for first in range(0, of_layer.shape[1], rows):
            part = of_layer[:, first : first + rows]
            q = part.unflatten(0, (keys.shape[1], -1))  # [kv heads, heads of each, n, head_dim]
            q1, q2, q3 = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
            logits = (q1 * k1 + q2 * k2) @ cos + (q1 * k2 - q2 * k1) @ sin
            logits += (q3 * k3).sum(-1, keepdim=True)
            best[layer, :, first : first + rows] = logits.amax(-1).flatten(0, 1) * queries.scaling
    return best


def needed_length(logits: torch.Tensor, queries: Queries, gap: float, num_kv_heads: int) -> torch.Tensor:
    """Shortest K that keeps every query that far from its log-sum-exp, float32 ``[num_layers, num_kv_heads]``.

    Args:
      logits: from ``largest_logits`` of keys of length 1; a head with one that is not negative gets infinity.
      gap: nats, negative.
    """
    needed = ((queries.log_sum_exp + gap) / logits).clamp_min(math.ulp(1.0))  # a log-sum-exp above -gap needs nothing
    needed[logits >= 0] = torch.inf
    return needed.amax(-1).unflatten(1, (num_kv_heads, -1)).amax(-1)
