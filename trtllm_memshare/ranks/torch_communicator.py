"""Ranks as processes of ``torch.distributed``: how they find each other, and what passes between them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.ranks.agreement import RankLostError

_LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("RANK", "WORLD_SIZE"))
"""Variables of Open MPI's mpirun, of MPICH's, of torchrun."""

MAX_WAIT_S = 1800.0
"""Longest wait for another rank: loading a model takes less, and a rank 0 without requests speaks every minute."""


class TorchCommunicator:
    """See ``Communicator``; a group of its own on gloo, beside whatever TensorRT-LLM sets up.

    Args:
      rank, size: of this process.
      init_method: as ``torch.distributed.init_process_group`` takes it.
      max_wait_s: longest wait for the others, in seconds.

    Raises:
      RankLostError: the other processes did not come within ``max_wait_s``.
      UserError: somebody else listens on rank 0's port.
    """

    def __init__(self, rank: int, size: int, init_method: str, max_wait_s: float = MAX_WAIT_S) -> None:
        self.rank, self.size, self._max_wait_s = rank, size, max_wait_s
        limit = datetime.timedelta(seconds=max_wait_s)
        with self._waiting():
            if not dist.is_initialized():
                with _refusing_a_port_in_use(init_method):
                    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=limit)
            self._group = dist.new_group(backend="gloo", timeout=limit)

    @classmethod
    def from_environment(cls) -> TorchCommunicator:
        """Connects the processes that mpirun or torchrun started, through ``MASTER_ADDR`` and ``MASTER_PORT``.

        Raises:
          UserError: the process was not started by one of them, or the port is none.
        """
        for rank, size in _LAUNCHERS:
            if rank in os.environ and size in os.environ:
                address = os.environ.get("MASTER_ADDR", "127.0.0.1")
                port = os.environ.get("MASTER_PORT", "29511")
                if not (port.isdecimal() and 0 < int(port) < 2**16):
                    raise UserError(
                        f"MASTER_PORT must be a port from 1 to 65535, got {shorten(port)} (set it to the same free "
                        f"port for all ranks)"
                    )
                return cls(int(os.environ[rank]), int(os.environ[size]), f"tcp://{address}:{port}")
        names = ", ".join(rank for rank, _ in _LAUNCHERS)
        raise UserError(f"several ranks need mpirun or torchrun, got none of {names} (start with mpirun -n RANKS)")

    def gather(self, value: Any) -> list[Any] | None:
        """See ``Communicator``."""
        values = [None] * self.size if self.rank == 0 else None
        with self._waiting():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """See ``Communicator``."""
        values = [value]
        with self._waiting():
            dist.broadcast_object_list(values, src=root, group=self._group)
        return values[0]

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and the store's: out of time, or a connection that was closed
            cause = shorten(str(error).strip().partition("\n")[0])
            raise RankLostError(
                f"rank {self.rank} of {self.size} has lost another one: it has ended, or did not answer for "
                f"{self._max_wait_s:g} s (see the other ranks' logs, start all of them again): {cause}"
            ) from error


@contextlib.contextmanager
def _refusing_a_port_in_use(init_method: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
            raise
        raise UserError(
            f"rank 0 must listen on {init_method}, got a port that another program has, perhaps the ranks of another "
            f"engine (set MASTER_PORT to the same free port for all ranks)"
        ) from error
