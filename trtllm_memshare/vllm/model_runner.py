"""What MemShare needs of vLLM's model runner, of which vLLM has two: V1, and V2, its choice on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import TESTED
from trtllm_memshare.vllm.runner_v1 import RunnerV1
from trtllm_memshare.vllm.runner_v2 import RunnerV2
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.update import MemShareUpdate


class ModelRunner(Protocol):
    """A model runner whose tables follow, and whose sampler is watched.

    Attributes:
      reuses_tables: see ``skipped_entries.check_skipping``.
    """

    reuses_tables: bool

    def apply(self, update: MemShareUpdate) -> None:
        """Rewrites entries of the block tables before a step."""

    def tables(self, request_ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Block ids of those requests that are here, by logical block, as the step before read them.

        What lies behind a request's last block may be anything.
        """

    def check_sampler(self) -> None:
        """Raises UserError if how likely tokens were cannot be learned here."""

    def watch_sampler(self, surprisal: SampledSurprisal) -> None:
        """From now on how likely each sampled token was is noted."""


def open_runner(runner: Any, version: str, group: int = 0) -> ModelRunner:
    """Tells which one it is by what it keeps its block tables in.

    Args:
      runner: a worker's ``model_runner``, its KV cache in place.
      version: of vLLM, for errors.
      group: the KV cache group whose tables follow.

    Raises:
      UserError: neither.
    """
    batch = getattr(runner, "input_batch", None)
    if hasattr(runner, "requests") and hasattr(batch, "block_table") and hasattr(batch, "req_id_to_index"):
        return RunnerV1(runner, version, group)
    if hasattr(getattr(runner, "block_tables", None), "block_tables") and hasattr(runner, "req_states"):
        return RunnerV2(runner, version, group)
    raise UserError(
        f"vLLM {version}'s {type(runner).__name__} keeps its block tables in a form that MemShare does not know (it "
        f"was tested with vLLM {TESTED})"
    )
