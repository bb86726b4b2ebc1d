"""Opens the runner that an engine directory is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import BenchmarkedRunner

if TYPE_CHECKING:
    from trtllm_memshare.ranks.agreement import Communicator


def open_runner(
    engine: Engine,
    num_blocks: int,
    device: str = "auto",
    fold_aliases: bool = True,
    communicator: Communicator | None = None,
    use_graphs: bool = False,
) -> BenchmarkedRunner:
    """A runner over an engine directory.

    Args:
      engine: from ``load_engine``.
      num_blocks: blocks of the KV pool.
      device: auto, cpu or cuda; an engine of the TensorRT backend runs on cuda only.
      fold_aliases: see ``plan_step``; TensorRT-LLM reads every alias.
      communicator: of the ranks of an engine that was built for several.
      use_graphs: replay CUDA graphs of a TensorRT engine's pure decode steps; the torch runner decides for itself.

    Raises:
      UserError: the engine cannot run on that device or this machine.
    """
    if engine.backend == "tensorrt":
        if device == "cpu":
            raise UserError("an engine of the TensorRT backend runs on cuda, got --device cpu (leave out --device)")
        if communicator is not None:
            from trtllm_memshare.runners.tensorrt.parallel import open_ranked_runner

            return open_ranked_runner(engine, num_blocks, communicator)
        if num_ranks(engine) > 1:
            raise UserError(
                f"engine {engine.engine_dir} is for {num_ranks(engine)} ranks, got one process (start it with mpirun "
                f"-n {num_ranks(engine)})"
            )
        from trtllm_memshare.runners.tensorrt.open import open_tensorrt_runner

        return open_tensorrt_runner(engine, num_blocks, use_graphs=use_graphs)
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

    null_pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    model = load_model(engine.model_dir, choose_device(device))
    kv_dtype = getattr(torch, engine.kv_dtype)
    return TorchRunner(model, num_blocks, engine.build.tokens_per_block, kv_dtype, fold_aliases, null_pages)


def num_ranks(engine: Engine) -> int:
    """Processes that an engine was built for."""
    return engine.build.tp_size * engine.build.pp_size


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda``: what was asked for, and for ``auto`` a GPU if there is one."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"
