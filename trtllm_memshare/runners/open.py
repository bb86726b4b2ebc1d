"""Opens the runner that an engine directory is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.runners.pool_memory import blocks_that_fit, check_pool, num_ranks, pool_that_fits
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
    free_memory_share: float | None = None,
) -> BenchmarkedRunner:
    """A runner over an engine directory.

    Args:
      engine: from ``load_engine``.
      num_blocks: blocks of the KV pool; at most so many with ``free_memory_share``.
      device: auto, cpu or cuda; an engine of the TensorRT backend runs on cuda only.
      fold_aliases: see ``plan_step``; TensorRT-LLM reads every alias.
      communicator: of the ranks of an engine that was built for several.
      use_graphs: replay CUDA graphs of a TensorRT engine's pure decode steps; the torch runner decides for itself.
      free_memory_share: see ``blocks_that_fit``; of an engine for one rank.

    Raises:
      UserError: the engine cannot run on that device or this machine, or replays no graphs.
    """
    check_pool(engine, num_blocks)
    if use_graphs and (engine.backend != "tensorrt" or communicator is not None):
        got = f"an engine of {engine.backend}" if engine.backend != "tensorrt" else "several ranks"
        raise UserError(
            f"--engine-cuda-graphs is for TensorRT engines of one rank, got {got} (leave it out; the torch runner "
            f"decides for itself)"
        )
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

        return open_tensorrt_runner(engine, num_blocks, use_graphs=use_graphs, free_memory_share=free_memory_share)
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

    null_pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    model = load_model(engine.model_dir, choose_device(device))
    kv_dtype = getattr(torch, engine.kv_dtype)
    num_blocks = blocks_that_fit(engine, num_blocks, free_memory_share, model.device)
    with pool_that_fits(engine, num_blocks, model.device.type):
        return TorchRunner(model, num_blocks, engine.build.tokens_per_block, kv_dtype, fold_aliases, null_pages)


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda``: what was asked for, and for ``auto`` a GPU if there is one.

    Raises:
      UserError: an unknown device, or one that is not there.
    """
    if asked == "cpu":
        return asked
    kind, _, index = asked.partition(":")
    if asked != "auto" and (kind != "cuda" or (":" in asked and not index.isdigit())):
        raise UserError(f"unknown device {shorten(asked)} (known: auto, cpu, cuda, cuda:N)")
    if asked != "auto":
        if not torch.cuda.is_available():
            raise UserError(f"device {asked} needs a CUDA GPU, torch finds none (set --device cpu, or leave it out)")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(f"device {asked} is not there: torch finds {torch.cuda.device_count()} GPUs")
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"
