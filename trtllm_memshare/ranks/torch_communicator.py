"""Ranks as processes of ``torch.distributed``: how they find each other, and what passes between them."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist

from trtllm_memshare.errors import UserError

_LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("RANK", "WORLD_SIZE"))
"""Variables of Open MPI's mpirun, of MPICH's, of torchrun."""

_NEVER = datetime.timedelta(days=365)  # ranks wait for rank 0, and rank 0 for requests


class TorchCommunicator:
    """See ``Communicator``; a group of its own on gloo, beside whatever TensorRT-LLM sets up.

    Args:
      rank, size: of this process.
      init_method: as ``torch.distributed.init_process_group`` takes it.
    """

    def __init__(self, rank: int, size: int, init_method: str) -> None:
        self.rank, self.size = rank, size
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=_NEVER)
        self._group = dist.new_group(backend="gloo", timeout=_NEVER)

    @classmethod
    def from_environment(cls) -> TorchCommunicator:
        """Connects the processes that mpirun or torchrun started, through ``MASTER_ADDR`` and ``MASTER_PORT``.

        Raises:
          UserError: the process was not started by one of them.
        """
        for rank, size in _LAUNCHERS:
            if rank in os.environ and size in os.environ:
                address = os.environ.get("MASTER_ADDR", "127.0.0.1")
                port = os.environ.get("MASTER_PORT", "29511")
                return cls(int(os.environ[rank]), int(os.environ[size]), f"tcp://{address}:{port}")
        names = ", ".join(rank for rank, _ in _LAUNCHERS)
        raise UserError(f"several ranks need mpirun or torchrun, got none of {names} (start with mpirun -n RANKS)")

    def gather(self, value: Any) -> list[Any] | None:
        """See ``Communicator``."""
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """See ``Communicator``."""
        values = [value]
        dist.broadcast_object_list(values, src=root, group=self._group)
        return values[0]
