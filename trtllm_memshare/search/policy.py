"""From candidates to decisions: the vote over layers, and the controls that stand beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from trtllm_memshare.search.block_distance import DK, DV, K_NEW, V_NEW, relative_distances
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.types import Candidate, Decision, PairBatch


def make_pairs(
    candidates: list[Candidate], origin_position: np.ndarray, tokens_per_block: int, undo_rope: bool
) -> PairBatch:
    """Stage 2's inputs for candidates.

    Args:
      origin_position: int32 ``[num_blocks]``, position at which each block's first row was written. Deltas come from
        these and not from logical positions, which differ once a block has been remapped.
      tokens_per_block: rows of a block.
      undo_rope: see ``PairBatch``.
    """
    retired = np.stack([c.retired_rows for c in candidates])
    kept = np.stack([c.kept_rows for c in candidates])
    written = [origin_position[rows // tokens_per_block] + rows % tokens_per_block for rows in (kept, retired)]
    delta = (written[0] - written[1]).astype(np.int32)
    kept_is_newer = delta.sum(1, keepdims=True) > 0
    return PairBatch(
        new_rows=np.where(kept_is_newer, kept, retired).astype(np.int32),
        old_rows=np.where(kept_is_newer, retired, kept).astype(np.int32),
        position_delta=np.where(kept_is_newer, delta, -delta).astype(np.int32),
        undo_rope=undo_rope,
    )


class SharingPolicy:
    """Accepts a candidate when enough layers say that its K and V are near those that would stand in.

    ``rejected`` counts candidates by reason; ``on_verdict``, or None, hears of each that was rejected, with the reason,
    and of each that was chosen, with None.
    """

    def __init__(self, config: MemShareConfig) -> None:
        self._config = config
        self.rejected: Counter[str] = Counter()
        self.num_candidates = 0
        self.on_verdict: Callable[[Candidate, str | None], None] | None = None

    def layer_vote(self, sums: np.ndarray) -> np.ndarray:
        """The distance that a quorum of layers stays within, float32 ``[pairs]``.

        NaN if any sum is not finite or any layer's |K_new|^2 or |V_new|^2 is 0: keys and values are not all zero, so
        those sums were never computed (a kernel that did not run leaves zeros, which would read as no distance).

        A layer's distance is the larger of its K's and its V's, or that of one of them by ``compared``. With 4 layers
        and a quorum of 0.75 the result is the third smallest of the four: it is within a threshold exactly if three
        layers are. The vote ``mean`` takes the mean of the layers instead. With ``pool_layers`` it is one Euclidean
        distance over all of them, relative to the newer block.
        """
        unknown = ~np.isfinite(sums).all((1, 2)) | (sums[..., [K_NEW, V_NEW]] <= 0).any((1, 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(unknown, np.nan, self._vote(sums))

    def _vote(self, sums: np.ndarray) -> np.ndarray:
        if self._config.pool_layers:
            total = sums.sum(1)
            return np.sqrt((total[:, DK] + total[:, DV]) / (total[:, K_NEW] + total[:, V_NEW]))
        fields = relative_distances(sums)
        choices = {"k-and-v": fields.max(-1), "k": fields[..., 0], "v": fields[..., 1]}
        per_layer = choices[self._config.compared]
        if self._config.layer_vote == "mean":
            return per_layer.mean(1)
        rank = math.ceil(self._config.layer_quorum * per_layer.shape[1] - 1e-9)
        return np.sort(per_layer, axis=1)[:, rank - 1]

    def decide(self, candidates: list[Candidate], sums: np.ndarray | None) -> list[Decision]:
        """Decisions for candidates, at most one for a block: the nearest of its choices.

        Args:
          sums: float32 ``[len(candidates), num_layers, 4]``; None with ``accept_all``, and otherwise where the runner
            gave none: every candidate is then refused.
        """
        self.num_candidates += len(candidates)
        if self._config.accept_all:
            distances = np.zeros(len(candidates))
        elif sums is None:  # nothing was compared, so nothing is known to be near
            for candidate in candidates:
                self._reject(candidate, "not_compared")
            return []
        else:
            distances = self.layer_vote(sums)
        best: dict[tuple[int, int], Decision] = {}
        for candidate, distance in zip(candidates, distances.tolist(), strict=True):
            if not distance <= self._config.max_distance and not self._config.accept_all:
                self._reject(candidate, "not_finite" if math.isnan(distance) else "distance")
                continue
            place = (candidate.request_id, candidate.logical)
            if place not in best or distance < best[place].distance:
                best[place] = Decision(candidate, distance)
        if self.on_verdict is not None:
            for decision in best.values():
                self.on_verdict(decision.candidate, None)
        return list(best.values())

    def _reject(self, candidate: Candidate, reason: str) -> None:
        self.rejected[reason] += 1
        if self.on_verdict is not None:
            self.on_verdict(candidate, reason)
