"""Makes sharing for a KV cache manager that TensorRT-LLM has just constructed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.search.block_search import make_block_search
from trtllm_memshare.search.config import MAX_PAIRS
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.trtllm.pytorch.backends import V1Backend, V2Backend
from trtllm_memshare.trtllm.pytorch.guards import model_reasons, unsupported_features
from trtllm_memshare.trtllm.pytorch.settings import Settings
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap

log = logging.getLogger("trtllm_memshare")


@dataclass(frozen=True)
class ModelFacts:
    """What sharing needs of the model: ``config``, its Hugging Face configuration."""

    config: Any

    @classmethod
    def of(cls, model_config: Any) -> ModelFacts:
        """From TensorRT-LLM's ``ModelConfig``; of a model for several kinds of input the part for text."""
        config = model_config.pretrained_config
        return cls(config.get_text_config() if hasattr(config, "get_text_config") else config)

    def boundaries(self, tokenizer_dir: str | None) -> BoundaryTokens:
        """Step boundaries of the model's tokenizer.

        Raises:
          UserError: there is no tokenizer in the directory.
        """
        from transformers import AutoTokenizer

        source = tokenizer_dir or getattr(self.config, "_name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tokenizer in {source!r}: {str(error).splitlines()[0]} (set tokenizer_dir in the settings file)"
            ) from error
        return BoundaryTokens.from_tokenizer(tokenizer, self.config.vocab_size)

    def reasons(self) -> list[str]:
        """Why this model cannot be served with sharing."""
        return model_reasons(self.config)

    def inv_freq(self) -> torch.Tensor:
        """float32 ``[rotary_dim / 2]``, radians per token."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(config=self.config).inv_freq.float()


def attach(
    manager: Any, kv_cache_config: Any, arguments: dict[str, Any], facts: ModelFacts, settings: Settings
) -> TailSwap | None:
    """Sharing for a manager; None where it must stay as TensorRT-LLM made it, which is logged.

    Args:
      manager: constructed, V1 or V2.
      kv_cache_config: TensorRT-LLM's ``KvCacheConfig``.
      arguments: keyword arguments of the manager's constructor.

    Raises:
      UserError: something sharing excludes is on, and ``on_unsupported`` is stop.
    """
    if arguments.get("is_draft") or arguments.get("is_estimating_kv_cache"):
        return None  # the dry run that measures memory, or a draft model's cache
    complain = Complaints(settings.options.on_unsupported)
    agreement: RankAgreement | None = None
    shared: TailSwap | None = None
    problem: Exception | None = None
    try:
        agreement = make_agreement(manager.mapping)
        reasons = unsupported_features(manager, kv_cache_config, arguments) + facts.reasons()
        if reasons:
            raise UserError(reasons[0])
        backend = V2Backend(manager) if hasattr(manager, "kv_cache_map") else V1Backend(manager)
        boundaries = facts.boundaries(settings.options.tokenizer_dir)
        search = make_block_search(backend.pool, facts.inv_freq(), min(settings.memshare.max_pairs, MAX_PAIRS))
        shared = TailSwap(backend, settings.memshare, boundaries, search, agreement, complain)
    except Exception as error:  # TensorRT-LLM must run as it is, whatever it has that is not expected here
        problem = error
    here = shared is not None
    on_all_ranks = agreement.all_hold(here) if agreement is not None else here
    if isinstance(problem, UserError):
        complain(str(problem))
    elif problem is not None:
        log.warning("MemShare is off, TensorRT-LLM runs as it is: %s: %s", type(problem).__name__, problem)
    elif not on_all_ranks:  # one that shared alone would wait for the others for ever
        log.warning("MemShare is off, requests run unshared: another rank could not switch it on, see its log")
    if shared is None or not on_all_ranks:
        return None
    log.info(
        "MemShare is on: preset %s%s, %s on %d blocks of %d tokens, %s; process %d",
        settings.memshare.preset,
        " (shadow)" if settings.memshare.shadow else "",
        type(backend).__name__,
        backend.pool.shape[0],
        manager.tokens_per_block,
        search.description,
        os.getpid(),
    )
    return shared


class Complaints:
    """What becomes of something that sharing excludes: the process stops, or each thing is said once."""

    def __init__(self, on_unsupported: str) -> None:
        self._stops = on_unsupported == "stop"
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        """Raises UserError, or logs and returns: requests then run unshared."""
        if self._stops:
            raise UserError(message)
        if message not in self._said:
            self._said.add(message)
            log.warning("MemShare is off, requests run unshared: %s", message)


class MpiCommunicator:
    """See ``Communicator``; over one of mpi4py's that nobody else uses."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def gather(self, value: Any) -> list[Any] | None:
        """See ``Communicator``."""
        return self._communicator.gather(value, root=0)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """See ``Communicator``."""
        return self._communicator.bcast(value, root=root)


def make_agreement(mapping: Any) -> RankAgreement | None:
    """How the ranks of a mapping agree; None for one rank.

    Raises:
      UserError: several ranks that do not talk through MPI.
    """
    if mapping.tp_size == 1:
        return None
    from tensorrt_llm._utils import mpi_comm, mpi_disabled

    if mpi_disabled():
        raise UserError(f"tensor parallelism needs MPI to share, got tp_size {mapping.tp_size} with MPI disabled")
    # A communicator of our own: TensorRT-LLM's collectives must not meet ours.
    return RankAgreement(MpiCommunicator(mpi_comm().Dup()), mapping.tp_size)
