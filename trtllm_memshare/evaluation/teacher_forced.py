"""Teacher-forced fidelity: written text goes through the real executor, and next-token distributions are compared.

Every arm sees the same tokens, so distributions can be held against the full cache position by position, and a
difference is what sharing did to the cache, not where an answer wandered off to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestResult, RequestState, SamplingParams


@dataclass(frozen=True)
class Script:
    """A prompt and the text that follows it, as token ids."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True)
class Replay:
    """What one arm did with all scripts.

    Attributes:
      losses: float32 ``[len(output)]`` per script, -log p of each written token, in nats.
      divergences: the same shape, KL(full || arm) of each next-token distribution, in nats; None without a reference.
      log_probs: float32 ``[len(output), vocab_size]`` per script, if they were asked for.
      shared_ratio: blocks freed / blocks filled by generation.
      block_steps_per_request: blocks in use summed over steps, per script.
      candidates: pairs that stage 1 offered; ``rejected`` and ``refused`` count those turned down, by reason.
    """

    losses: list[np.ndarray]
    divergences: list[np.ndarray] | None
    log_probs: list[torch.Tensor] | None
    shared_ratio: float
    block_steps_per_request: float
    candidates: int
    rejected: dict[str, int]
    refused: dict[str, int]
    results: list[RequestResult]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all tokens of all scripts."""
        return float(np.exp(np.concatenate(self.losses).mean(dtype=np.float64)))

    @property
    def mean_divergence(self) -> float | None:
        """Mean KL(full || arm) over all tokens, in nats."""
        return None if self.divergences is None else float(np.concatenate(self.divergences).mean(dtype=np.float64))


class TeacherForcing(ReplaySampler):
    """Replays scripts and notes what the model thought of each token.

    Args:
      reference: log-probabilities of the full cache by request id, float32 ``[len(output), vocab_size]``; None = none.
      keep: keep this run's own log-probabilities, for use as a reference: ``vocab_size`` floats for each token.
    """

    def __init__(self, reference: list[torch.Tensor] | None = None, keep: bool = False) -> None:
        super().__init__()
        self._reference, self._keep = reference, keep
        self.losses: dict[int, list[float]] = {}
        self.divergences: dict[int, list[float]] = {}
        self.log_probs: dict[int, list[torch.Tensor]] = {}

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next scripted token of each row; see ``Sampler.sample``."""
        places = [request.num_generated for request in requests]
        tokens = super().sample(logits, requests)
        if not tokens:
            return tokens
        log_probs = logits.float().log_softmax(-1).cpu()
        losses = -log_probs[torch.arange(len(tokens)), torch.tensor(tokens)]
        ids = [request.request_id for request in requests]
        for request_id, loss in zip(ids, losses.tolist(), strict=True):
            self.losses.setdefault(request_id, []).append(loss)
        if self._reference is not None:
            full = torch.stack([self._reference[i][place] for i, place in zip(ids, places, strict=True)])
            divergences = (full.exp() * (full - log_probs)).sum(-1)
            for request_id, divergence in zip(ids, divergences.tolist(), strict=True):
                self.divergences.setdefault(request_id, []).append(divergence)
        if self._keep:
            for request_id, row in zip(ids, log_probs, strict=True):
                self.log_probs.setdefault(request_id, []).append(row)
        return tokens


def replay(
    runner: Runner,
    config: MemShareConfig,
    boundaries: BoundaryTokens,
    scripts: list[Script],
    reference: list[torch.Tensor] | None = None,
    keep_log_probs: bool = False,
    description: str = "",
) -> Replay:
    """Runs all scripts at once through a fresh executor.

    Args:
      runner: its pool has to hold all scripts unshared: a request that is paused comes back unshared, and another
        pool would then mean another result.
      reference: ``log_probs`` of the full cache on the same scripts.
      keep_log_probs: return ``log_probs``.
      description: of the progress bar.

    Raises:
      UserError: a script that does not fit the pool.
      RuntimeError: a request was paused.
    """
    sampler = TeacherForcing(reference, keep_log_probs)
    longest = max(len(s.prompt) + len(s.output) for s in scripts)
    executor = Executor(
        runner,
        config,
        boundaries,
        longest,
        len(scripts),
        max_num_tokens=4096,
        sampler=sampler,
        make_control=make_control,
    )
    handles = []
    for script in scripts:
        handle = executor.submit(script.prompt, SamplingParams(len(script.output)))
        sampler.add_script(handle.request_id, script.output)
        handles.append(handle)
    with tqdm(total=sum(len(s.output) for s in scripts), desc=description, unit="tok", leave=False) as bar:
        while executor.has_work:
            executor.step()
            bar.update(len(executor.last_batch.chunk_lengths) if executor.last_batch is not None else 0)
    executor.manager.check_integrity()
    if executor.stats.num_pauses:
        raise RuntimeError(f"{executor.stats.num_pauses} pauses in a replay: the pool has {runner.num_blocks} blocks")
    ids, cache = [h.request_id for h in handles], executor.manager.stats()
    return Replay(
        losses=[np.array(sampler.losses[i], np.float32) for i in ids],
        divergences=None if reference is None else [np.array(sampler.divergences[i], np.float32) for i in ids],
        log_probs=[torch.stack(sampler.log_probs[i]) for i in ids] if keep_log_probs else None,
        shared_ratio=cache.shared_block_fraction,
        block_steps_per_request=executor.stats.block_steps / len(scripts),
        candidates=executor.sharing.policy.num_candidates,
        rejected=executor.rejected,
        refused=dict(cache.refused),
        results=[h.result() for h in handles],
    )
