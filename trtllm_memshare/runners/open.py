"""Opens the runner that an engine directory is for."""

from __future__ import annotations

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.protocol import BenchmarkedRunner


def open_runner(engine: Engine, num_blocks: int, device: str = "auto", fold_aliases: bool = True) -> BenchmarkedRunner:
    """A runner over an engine directory.

    Args:
      engine: from ``load_engine``.
      num_blocks: blocks of the KV pool.
      device: auto, cpu or cuda; an engine of the TensorRT backend runs on cuda only.
      fold_aliases: see ``plan_step``; TensorRT-LLM reads every alias.

    Raises:
      UserError: the engine cannot run on that device or this machine.
    """
    if engine.backend == "tensorrt":
        if device == "cpu":
            raise UserError("an engine of the TensorRT backend runs on cuda, got --device cpu (leave out --device)")
        from trtllm_memshare.runners.tensorrt.open import open_tensorrt_runner

        return open_tensorrt_runner(engine, num_blocks)
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

    model = load_model(engine.model_dir, choose_device(device))
    return TorchRunner(model, num_blocks, engine.build.tokens_per_block, getattr(torch, engine.kv_dtype), fold_aliases)


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda``: what was asked for, and for ``auto`` a GPU if there is one."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"
