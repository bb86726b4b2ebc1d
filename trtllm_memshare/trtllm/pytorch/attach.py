"""Makes sharing for a KV cache manager that TensorRT-LLM has just constructed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.null_page_files import KEYS_FILE
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.search.block_search import make_block_search
from trtllm_memshare.search.config import MAX_PAIRS
from trtllm_memshare.trtllm.pytorch.admission import AdmissionReserve
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend, V1Backend, V2Backend
from trtllm_memshare.trtllm.pytorch.facts import ModelFacts
from trtllm_memshare.trtllm.pytorch.failures import Complaints, Failures
from trtllm_memshare.trtllm.pytorch.guards import rotation_reasons, unsupported_features
from trtllm_memshare.trtllm.pytorch.kill_switch import KillSwitch
from trtllm_memshare.trtllm.pytorch.metrics import Reporter
from trtllm_memshare.trtllm.pytorch.null_rows import NullKeys, NullRows
from trtllm_memshare.trtllm.pytorch.overlay import Overlay
from trtllm_memshare.trtllm.pytorch.settings import Settings
from trtllm_memshare.trtllm.pytorch.sharing import Sharing
from trtllm_memshare.trtllm.pytorch.skipped_rows import SkippedRows
from trtllm_memshare.trtllm.pytorch.totals import overlay_totals

log = logging.getLogger("trtllm_memshare")


def attach(
    manager: Any,
    kv_cache_config: Any,
    arguments: dict[str, Any],
    find_model: Callable[[dict[str, Any]], ModelFacts],
    settings: Settings,
) -> Sharing | None:
    """Puts sharing around a manager; None where it must stay as TensorRT-LLM made it, which is logged.

    Args:
      manager: constructed, V1 or V2.
      kv_cache_config: TensorRT-LLM's ``KvCacheConfig``.
      arguments: keyword arguments of the manager's constructor, and ``is_compressed``: TensorRT-LLM compresses it,
        ``is_disaggregated``: it serves prompt and generation apart, ``rotated_inside``: layers whose kernels rotate
        keys.
      find_model: the model that a manager of these arguments serves; may raise UserError.
      settings: what the user set.

    Raises:
      UserError: something sharing excludes is on, and ``on_unsupported`` is stop.
    """
    manager.memshare = None
    complain = Complaints(settings.options.on_unsupported)
    agreement: RankAgreement | None = None
    shared: Sharing | None = None
    problem: Exception | None = None
    try:
        agreement = make_agreement(manager.mapping)
        reasons = unsupported_features(manager, kv_cache_config, arguments)
        facts = None if reasons else find_model(arguments)
        if facts is not None:
            config = settings.memshare
            compares = config.searches and config.undo_rope and not config.accept_all
            reasons = [*facts.reasons(), *(facts.comparison_reasons() if compares else ())]
            if settings.options.null_entries == "skip":
                reasons += rotation_reasons(arguments.get("rotated_inside", ()))
            if settings.memshare.need == "nearest-earlier" and agreement is not None:
                reasons.append(
                    f"need nearest-earlier compares whole pages, got {manager.mapping.tp_size} ranks that each hold a "
                    f"part of them (take redundancy)"
                )
        if reasons or facts is None:
            raise UserError(reasons[0])
        backend = V2Backend(manager) if hasattr(manager, "kv_cache_map") else V1Backend(manager)
        boundaries = facts.boundaries(settings.options.tokenizer_dir)
        search = make_block_search(backend.pool, facts.inv_freq(), min(settings.memshare.max_pairs, MAX_PAIRS))
        description = f"{type(manager).__name__} of TensorRT-LLM {version()}, preset {settings.memshare.preset}"
        shared = Sharing(
            backend,
            settings.memshare,
            boundaries,
            search,
            agreement,
            complain.say,
            Failures(description),
            KillSwitch(settings.off_file),
            _null_rows(manager, backend, facts, settings) if settings.memshare.pressure else None,
            _reserve(manager, backend, agreement, settings),
        )
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
        "MemShare is on: %s, %s on %d blocks of %d tokens, %s; process %d",
        settings.title,
        type(backend).__name__,
        backend.pool.shape[0],
        manager.tokens_per_block,
        search.description,
        os.getpid(),
    )
    reporter = Reporter(partial(overlay_totals, shared), settings) if manager.mapping.rank == 0 else None
    Overlay(manager, shared, reporter)
    return shared


def _null_rows(manager: Any, backend: CacheBackend, facts: ModelFacts, settings: Settings) -> NullRows | SkippedRows:
    """How rows forget. Raises UserError for null pages that are not there, or not of this model."""
    if settings.options.null_entries == "skip":
        return SkippedRows(backend)
    folder = Path(settings.options.null_pages or "")
    null_keys = NullKeys.read(folder, backend.pool.shape, manager.mapping, manager.max_seq_len)
    facts.check_null_pages(folder / KEYS_FILE)
    rows = NullRows(manager, backend, null_keys)
    rows.check_room(manager.max_seq_len)
    return rows


def _reserve(
    manager: Any, backend: CacheBackend, agreement: RankAgreement | None, settings: Settings
) -> AdmissionReserve | None:
    """For V1 on one rank: V2 suspends requests to the host, and pages that come back from the reuse tree are counted
    otherwise."""
    fits = isinstance(backend, V1Backend) and agreement is None and not manager.enable_block_reuse
    return AdmissionReserve(manager, backend) if settings.memshare.pressure and fits else None


def version() -> str:
    """TensorRT-LLM's, as installed."""
    from importlib import metadata

    try:
        return metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return "of unknown version"


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
