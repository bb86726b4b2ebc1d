"""Teacher-forced scores: every arm reads the same text, shares as it goes, and is held against the full cache.

Free-running accuracy sees a change of a distribution only when it flips a token. On a fixed text every position counts:
the mean Kullback-Leibler divergence from the full cache's next-token distribution, and the perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.serving.request import RequestState

_MAX_REFERENCE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Scores:
    """Scores of one request's script, each float64 or bool ``[num_tokens]``.

    Attributes:
      loss: negative log-likelihood of each token of the script, in nats.
      divergence: Kullback-Leibler divergence of the arm from the full cache, in nats; zeros for the full cache.
      flipped: whether the most likely token differs from the full cache's.
    """

    loss: np.ndarray
    divergence: np.ndarray
    flipped: np.ndarray


class Reference:
    """The full cache's log-probabilities at every position of every script: float32 ``[num_tokens, vocab_size]`` each.

    Args:
      scripts: of request 0, 1, ...: what each generates, token ids.

    Raises:
      UserError: they would need more than 4 GiB.
    """

    def __init__(self, scripts: list[list[int]], vocab_size: int) -> None:
        needed = sum(map(len, scripts)) * vocab_size * 4
        if needed > _MAX_REFERENCE_BYTES:
            raise UserError(
                f"teacher-forced scores of {sum(map(len, scripts))} tokens over {vocab_size} vocabulary entries keep "
                f"{needed / 2**30:.1f} GiB of log-probabilities, expected at most 4 (set a smaller --replay-problems)"
            )
        self.scripts = scripts
        self.log_probs = [torch.empty(len(s), vocab_size) for s in scripts]


class ScoringSampler(ReplaySampler):
    """Scores each distribution against the script's next token, and against the reference or into it.

    Args:
      reference: the scripts, and where the full cache's log-probabilities are kept.
      fills: True while the full cache itself runs.
    """

    def __init__(self, reference: Reference, fills: bool) -> None:
        super().__init__()
        scripts = reference.scripts
        self._reference, self._fills = reference, fills
        self.scores = [Scores(np.zeros(len(s)), np.zeros(len(s)), np.zeros(len(s), bool)) for s in scripts]
        for request_id, script in enumerate(scripts):
            self.add_script(request_id, script)

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next scripted token of each row; see ``Sampler.sample``."""
        if not requests:
            return []
        log_probs = logits.float().log_softmax(-1).cpu()
        places = [(r.request_id, r.num_generated) for r in requests]
        tokens = super().sample(logits, requests)
        losses = -log_probs[torch.arange(len(tokens)), torch.tensor(tokens)]
        if self._fills:
            for row, (request, place) in enumerate(places):
                self._reference.log_probs[request][place] = log_probs[row]
        full = torch.stack([self._reference.log_probs[request][place] for request, place in places])
        # In float64, where the sum over the vocabulary of two close distributions does not cancel to below zero.
        divergences = (full.double().exp() * (full.double() - log_probs.double())).sum(-1)
        flips = full.argmax(-1) != log_probs.argmax(-1)
        for (request, place), loss, divergence, flip in zip(
            places, losses.tolist(), divergences.tolist(), flips.tolist(), strict=True
        ):
            scores = self.scores[request]
            scores.loss[place], scores.divergence[place], scores.flipped[place] = loss, divergence, flip
        return tokens


def summarize(scores: list[Scores]) -> dict[str, float]:
    """Means over all tokens; the standard error is over requests, since tokens of one are not independent.

    Returns:
      kl_nats, kl_standard_error, perplexity, flipped_token_fraction.
    """
    counts = np.array([len(s.loss) for s in scores], float)
    sums = np.array([s.divergence.sum() for s in scores])
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts  # of the ratio estimator
    error = np.sqrt((residuals**2).sum() * len(scores) / max(1, len(scores) - 1)) / counts.sum()
    return {
        "kl_nats": float(mean),
        "kl_standard_error": float(error),
        "perplexity": float(np.exp(sum(s.loss.sum() for s in scores) / counts.sum())),
        "flipped_token_fraction": float(sum(s.flipped.sum() for s in scores) / counts.sum()),
    }
