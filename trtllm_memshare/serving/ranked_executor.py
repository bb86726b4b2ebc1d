"""The executor of several ranks: requests reach rank 0, and every rank takes the same steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from trtllm_memshare.ranks.agreement import Communicator, RankAgreement, RankLostError
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import describe
from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams
from trtllm_memshare.serving.sampling import Sampler
from trtllm_memshare.serving.sharing import MakeControl

_Result = TypeVar("_Result")


class RankedSampler(Sampler):
    """Samples on the rank that has the logits, the last pipeline stage's first, and hands the tokens to all.

    Args:
      communicator: of all ranks.
      root: rank that samples: ``(pp_size - 1) * tp_size``.
    """

    def __init__(self, communicator: Communicator, root: int = 0) -> None:
        super().__init__()
        self._communicator, self._root = communicator, root

    def sample(self, logits: torch.Tensor, requests: list[RequestState]) -> list[int]:
        """Next token of each row; see ``Sampler.sample``."""
        tokens, errors = self._of_root(lambda: (super(RankedSampler, self).sample(logits, requests), self._sentences()))
        self.errors |= {request_id: RuntimeError(text) for request_id, text in errors.items()}
        return list(tokens)

    def log_probs_of(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """The same on every rank: rank 0 answers for a pipeline whose last stage alone has logits."""
        return torch.tensor(self._of_root(lambda: super(RankedSampler, self).log_probs_of(logits, tokens).tolist()))

    def _sentences(self) -> dict[int, str]:
        return {request_id: describe(error) for request_id, error in self.errors.items()}

    def _of_root(self, work: Callable[[], _Result]) -> _Result:
        """What ``work`` gives on the root; where it raises there, every rank raises: none may wait for the others."""
        outcome: tuple[_Result | None, str] | None = None
        if self._communicator.rank == self._root:
            try:
                outcome = work(), ""
            except Exception as error:
                outcome = None, describe(error)
        result, problem = self._communicator.broadcast(outcome, self._root)
        if problem:
            raise RuntimeError(f"rank {self._root} could not choose the next tokens: {problem}")
        return result


@dataclass(frozen=True)
class _Turn:
    """What rank 0 tells before each step: new requests, those to cancel, or that there are no more steps."""

    new: list[tuple[int, list[int], SamplingParams, int | None]]
    cancelled: frozenset[int]
    ends: bool = False


class RankedExecutor(Executor):
    """One per rank. Rank 0 is used like an ``Executor``; the others call ``follow``, which returns at the end.

    A request is drawn on rank 0 alone, so its arrival and its cancelling count from the step at which rank 0 says so.
    A rank that ends, by an error or by Ctrl-C, ends the others: their next exchange raises ``RankLostError``. They wait
    for rank 0 no longer than their communicator's limit: without requests it takes an empty step every minute.

    Args:
      runner: this rank's, over its own layers and heads.
      communicator: of all ranks.
      tp_size, pp_size: rank = pp_rank * tp_size + tp_rank; the last stage's first rank samples.
      options: as for ``Executor``.
    """

    max_idle_s = 60.0

    def __init__(
        self,
        runner: Runner,
        config: MemShareConfig,
        boundaries: BoundaryTokens,
        max_seq_len: int,
        communicator: Communicator,
        tp_size: int,
        pp_size: int,
        **options: Any,
    ) -> None:
        sampler = RankedSampler(communicator, (pp_size - 1) * tp_size)
        agreement = RankAgreement(communicator, tp_size)
        super().__init__(runner, config, boundaries, max_seq_len, sampler=sampler, agreement=agreement, **options)
        self._communicator = communicator
        self._turn = _Turn([], frozenset())
        self._new: list[RequestState] = []

    def step(self) -> None:
        """One iteration of rank 0, and with it of every rank that follows."""
        with self._lock:
            self._new = list(self._submitted)
        states = [*self._scheduler.waiting, *self._scheduler.running]
        self._turn = self._communicator.broadcast(
            _Turn(
                [(s.request_id, s.prompt, s.params, s.group) for s in self._new],
                frozenset(s.request_id for s in states if s.handle.cancelled),
            )
        )
        super().step()

    def follow(self) -> None:
        """Steps with rank 0 until it closes. Called on the other ranks."""
        while True:
            self._turn = self._communicator.broadcast(None)
            if self._turn.ends:
                return
            self._new = [
                RequestState(request_id, list(ids), params, RequestHandle(request_id), group, tokens=list(ids))
                for request_id, ids, params, group in self._turn.new
            ]
            super().step()

    def close(self) -> None:
        """Lets the other ranks return. Called on rank 0, once, after its last step."""
        self._communicator.broadcast(_Turn([], frozenset(), ends=True))

    def __exit__(self, *error: object) -> None:
        """Lets the other ranks return, unless a step failed.

        They may wait in another exchange then: a broadcast would hang, and hide the error. This process ends with it,
        and the others with their next exchange.
        """
        try:
            super().__exit__(*error)
        finally:
            if not self.has_failed:
                try:
                    self.close()
                except RankLostError:  # after Ctrl-C for all ranks: what the body raised is to be seen
                    if not any(error):
                        raise

    def _take_submissions(self) -> None:
        """Takes what this turn names; until then rank 0 keeps it queued, so that a failed turn loses no request."""
        with self._lock:
            for state in self._new:
                if self._submitted:
                    self._submitted.popleft()
                self._scheduler.add(state)
        self._new = []

    def _looks_for_cancelled(self) -> bool:
        return bool(self._turn.cancelled)

    def _fail_admissions(self) -> None:
        for _, error in self._scheduler.failed:
            raise error  # the other ranks have added it

    def _fail_batch(self, states: list[RequestState], error: Exception) -> None:
        """An error of one rank ends them all: the others may wait in an exchange that this one has left."""
        raise error

    def _is_cancelled(self, state: RequestState) -> bool:
        return state.request_id in self._turn.cancelled


@dataclass(frozen=True)
class Ranks:
    """The ranks of one engine, as one of them sees them."""

    communicator: Communicator
    tp_size: int
    pp_size: int

    @property
    def is_leader(self) -> bool:
        return self.communicator.rank == 0

    def executor(self, runner: Runner, config: MemShareConfig, boundaries: BoundaryTokens, max_seq_len: int,
                 *limits: Any, make_control: MakeControl | None = None) -> RankedExecutor:  # fmt: skip
        """This rank's executor; ``limits``: max_batch_size, max_num_tokens, scheduler_policy."""
        names = ("max_batch_size", "max_num_tokens", "scheduler_policy")
        options = {**dict(zip(names, limits, strict=True)), "make_control": make_control}
        return RankedExecutor(
            runner, config, boundaries, max_seq_len, self.communicator, self.tp_size, self.pp_size, **options
        )
