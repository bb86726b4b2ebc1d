"""Definitions of a distance between two blocks: what of K and V is compared, and how the layers are put together.

All come from the same sums, which are stage 2's own taken on one rotary frequency at a time. A definition is a quantity
and a vote, ``K and V, worst``; learned ones weigh the relative distances of the layers so that their sum follows harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.search.block_distance import DK, DV, K_NEW, V_NEW, block_distance, pairs_on
from trtllm_memshare.search.types import PairBatch

DEFAULT = "K and V, worst"
"""The definition that ``aligned`` uses."""

_HARM_FLOOR = 1e-12  # nats per token, what float64 can tell from nothing
_FIT_SWEEPS = 3000


@dataclass(frozen=True)
class PairSums:
    """Sums over rows and heads of squared differences and, last on each axis, of the newer block's squares.

    Attributes:
      k: float64 ``[pairs, num_layers, rotary_dim / 2, 2]`` by rotary frequency, highest first, K without its rotation.
      k_stored: float64 ``[pairs, num_layers, 2]``, K as it lies in the pool.
      v: float64 ``[pairs, num_layers, 2]``.
      inv_freq: float64 ``[rotary_dim / 2]``, radians per token.
    """

    k: np.ndarray
    k_stored: np.ndarray
    v: np.ndarray
    inv_freq: np.ndarray

    @staticmethod
    def join(parts: list[PairSums]) -> PairSums:
        """The pairs of all parts, in order."""
        k, stored, v = (np.concatenate([getattr(p, name) for p in parts]) for name in ("k", "k_stored", "v"))
        return PairSums(k, stored, v, parts[0].inv_freq)


def pair_sums(pool: torch.Tensor, pairs: PairBatch, inv_freq: torch.Tensor) -> PairSums:
    """Stage 2's specification, applied to one rotary frequency after the other.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``; half-split rotary layout over the
        whole head: elements i and ``i + head_dim / 2`` turn together.
      pairs: rows to compare.
      inv_freq: float32 ``[head_dim / 2]``.

    Raises:
      ValueError: a model that turns a part of each head only.
    """
    half = pool.shape[-1] // 2
    if len(inv_freq) != half:
        raise ValueError(f"the whole head must turn: {2 * len(inv_freq)} of {2 * half} elements do")
    rows = pairs_on(pool.device, pairs)
    stored = block_distance(pool, *rows, inv_freq[:0]).double().cpu().numpy()
    by_frequency = []
    for index in range(half):
        alone = torch.zeros_like(pool)
        alone[..., [index, index + half]] = pool[..., [index, index + half]]
        by_frequency.append(block_distance(alone, *rows, inv_freq)[..., [DK, K_NEW]])
    k = torch.stack(by_frequency, 2).double().cpu().numpy()
    return PairSums(k, stored[..., [DK, K_NEW]], stored[..., [DV, V_NEW]], inv_freq.double().cpu().numpy())


def _weighted(weights: Callable[[np.ndarray], np.ndarray]) -> Callable[[PairSums], np.ndarray]:
    """K's sums with a weight for each frequency."""
    return lambda sums: np.einsum("plfs,f->pls", sums.k, weights(sums.inv_freq))


def _band(low: float, high: float) -> Callable[[PairSums], np.ndarray]:
    """K's sums over a part of the frequencies, counted from the highest, in shares of all."""
    return lambda sums: sums.k[:, :, round(low * sums.k.shape[2]) : round(high * sums.k.shape[2])].sum(2)


_PARTS: dict[str, Callable[[PairSums], np.ndarray]] = {
    "K": _band(0, 1),
    "K as stored": lambda sums: sums.k_stored,
    "K high half": _band(0, 0.5),
    "K low half": _band(0.5, 1),
    "K quarter 1": _band(0, 0.25),
    "K quarter 2": _band(0.25, 0.5),
    "K quarter 3": _band(0.5, 0.75),
    "K quarter 4": _band(0.75, 1),
    "K by frequency": _weighted(lambda inv_freq: inv_freq),
    "K by wavelength": _weighted(lambda inv_freq: 1 / inv_freq),
    "V": lambda sums: sums.v,
}
_WITH_V = ("K", "K as stored", "K low half", "K by wavelength")

QUANTITIES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _PARTS},
    **{f"{name} and V": (name, "V") for name in _WITH_V},
}
"""What a layer's distance is taken on: the largest of its parts, as in ``SharingPolicy``."""

VOTES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "worst": lambda layers: layers.max(1),
    "quorum": lambda layers: np.sort(layers, 1)[:, math.ceil(0.75 * layers.shape[1] - 1e-9) - 1],
    "mean": lambda layers: layers.mean(1),
    "first": lambda layers: layers[:, 0],
    "last": lambda layers: layers[:, -1],
}
"""From ``[pairs, num_layers]`` to ``[pairs]``; quorum: what three quarters of the layers lie within. ``pooled``, one
distance over all layers and parts, is not among them."""


def _relative(sums: np.ndarray) -> np.ndarray:
    """Sums ``[..., 2]`` to relative distances ``[...]``: 0 = equal, 1.41 = unrelated."""
    return np.sqrt(sums[..., 0] / np.maximum(sums[..., 1], np.finfo(np.float32).tiny))


def layer_distances(sums: PairSums, quantity: str) -> np.ndarray:
    """float64 ``[pairs, num_layers]``."""
    return np.max([_relative(_PARTS[part](sums)) for part in QUANTITIES[quantity]], axis=0)


def all_distances(sums: PairSums) -> dict[str, np.ndarray]:
    """Every fixed definition by name, ``quantity, vote``: float64 ``[pairs]``."""
    distances: dict[str, np.ndarray] = {}
    for quantity, parts in QUANTITIES.items():
        layers = layer_distances(sums, quantity)
        distances |= {f"{quantity}, {name}": vote(layers) for name, vote in VOTES.items()}
        pooled = np.sum([_PARTS[part](sums).sum(1) for part in parts], axis=0)
        distances[f"{quantity}, pooled"] = _relative(pooled)
    return distances


LEARNED: dict[str, tuple[str, ...]] = {
    "learned layers": ("K and V",),
    "learned layers of K quarters and V": ("K quarter 1", "K quarter 2", "K quarter 3", "K quarter 4", "V"),
}
"""Quantities that get a weight for each layer."""


def learned_features(sums: PairSums, name: str) -> np.ndarray:
    """Relative distances, float64 ``[pairs, quantities, num_layers]``."""
    return np.stack([layer_distances(sums, quantity) for quantity in LEARNED[name]], 1)


def fit_weights(features: np.ndarray, harm: np.ndarray) -> np.ndarray:
    """Non-negative weights whose weighted sum, and a constant, follow the logarithm of the harm in least squares.

    The logarithm, because harms span ten orders of magnitude: fitted on the harm itself, the weights are those of the
    two or three most harmful pairs and foretell nothing of others.

    Args:
      features: float64 ``[pairs, ...]``.
      harm: float64 ``[pairs]``, nats per token.

    Returns:
      float64, of one pair's features' shape, of sum 1 unless all are 0.
    """
    x, y = features.reshape(len(features), -1), np.log(np.maximum(harm, _HARM_FLOOR))
    x, y = x - x.mean(0), y - y.mean()  # takes the constant out
    gram, target, weights = x.T @ x, x.T @ y, np.zeros(x.shape[1])
    for _ in range(_FIT_SWEEPS):  # coordinate descent: the problem is convex, and each step solves for one weight
        for j in np.flatnonzero(np.diag(gram)):
            weights[j] = max(0.0, weights[j] + (target[j] - gram[j] @ weights) / gram[j, j])
    return (weights / max(weights.sum(), np.finfo(float).tiny)).reshape(features.shape[1:])
