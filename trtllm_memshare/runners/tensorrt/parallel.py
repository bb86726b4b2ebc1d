"""Runners of an engine on several GPUs: one process and one GPU for each rank, started by mpirun."""

from __future__ import annotations

import os
from typing import Any

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import Communicator
from trtllm_memshare.runners.tensorrt.device import ALIGNMENT
from trtllm_memshare.runners.tensorrt.open import open_tensorrt_runner
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.trtllm.engine.installed import import_tensorrt_llm
from trtllm_memshare.trtllm.engine.signatures import PARALLEL, check_signatures

_RANKS_HERE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE")
"""Variables that say how many ranks this machine has: Open MPI's, MPICH's, torchrun's."""


def open_ranked_runner(engine: Engine, num_blocks: int, communicator: Communicator) -> TensorRTRunner:
    """This process's runner, on the GPU that its rank has on this machine.

    Args:
      engine: built for as many ranks as there are processes.
      num_blocks: blocks of each rank's pool; the same number on all.

    Raises:
      UserError: another number of processes, more of them here than GPUs, and see ``open_tensorrt_runner``.
    """
    build, ranks = engine.build, engine.build.tp_size * engine.build.pp_size
    if communicator.size != ranks:
        raise UserError(
            f"engine {engine.engine_dir} is for {ranks} ranks, got {communicator.size} processes (start it with mpirun "
            f"-n {ranks})"
        )
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        told = (os.environ.get(name, "") for name in _RANKS_HERE)
        here = next((int(number) for number in told if number.isdecimal()), 1)
        if here > count:
            raise UserError(
                f"each rank needs a GPU of its own, got {here} ranks and {count} GPUs on this machine (start fewer "
                f"ranks here, or build for fewer)"
            )
        torch.cuda.set_device(communicator.rank % count)
    workspace, buffers = None, None
    if build.tp_size > 1:
        workspace, buffers = _all_reduce_workspace(engine, communicator.rank)
    # Without graphs: that TensorRT-LLM's communication between GPUs can be captured has not been verified.
    runner = open_tensorrt_runner(engine, num_blocks, communicator.rank, False, workspace)
    runner.kept_alive = buffers
    return runner


def _all_reduce_workspace(engine: Engine, rank: int) -> tuple[torch.Tensor, Any]:
    """Pointers for TensorRT-LLM's all-reduce, int64 on the host, and the memory behind them."""
    import_tensorrt_llm()
    check_signatures(PARALLEL)
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.plugin.plugin import CustomAllReduceHelper

    build = engine.build
    world = build.tp_size * build.pp_size
    mapping = Mapping(world_size=world, rank=rank, tp_size=build.tp_size, pp_size=build.pp_size)
    size = CustomAllReduceHelper.max_workspace_size_auto(build.tp_size)
    buffers, pointers = CustomAllReduceHelper.allocate_workspace(mapping, size)
    return aligned_copy(pointers.cpu()), (buffers, pointers)


def aligned_copy(values: torch.Tensor) -> torch.Tensor:
    """The same values at an address that TensorRT takes."""
    count = values.numel() * values.element_size()
    room = torch.zeros(count + ALIGNMENT, dtype=torch.uint8)
    shift = -room.data_ptr() % ALIGNMENT
    return room[shift : shift + count].view(values.dtype).view(values.shape).copy_(values)
