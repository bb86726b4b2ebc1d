"""Opens an engine directory of the TensorRT backend: checks first, then plugins, then the plan."""

from __future__ import annotations

from pathlib import Path

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.engine.tensorrt_record import PLUGIN_FILE, SEARCH_ENGINE_FILE
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.null_pages import of_rank
from trtllm_memshare.runners.pool_memory import blocks_that_fit, pool_that_fits
from trtllm_memshare.runners.tensorrt.device import CudaDevice, Device
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.runners.tensorrt.separate_search import SeparateEngineSearch
from trtllm_memshare.search.rotary import rotary_inv_freq
from trtllm_memshare.trtllm.engine.directory import spec_of
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.io_table import IoTensor, memshare_io
from trtllm_memshare.trtllm.engine.plan_check import check_engine_io, check_rank_engine, deserialize
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins


def open_tensorrt_runner(
    engine: Engine,
    num_blocks: int,
    rank: int = 0,
    use_graphs: bool = False,
    all_reduce_workspace: torch.Tensor | None = None,
    free_memory_share: float | None = None,
) -> TensorRTRunner:
    """A runner over one rank's engine.

    Args:
      engine: from ``load_engine``.
      num_blocks: blocks of the pool.
      rank: which rank's engine.
      use_graphs: replay CUDA graphs in pure decode steps.
      all_reduce_workspace: with tensor parallelism, see ``runners.tensorrt.parallel``.
      free_memory_share: see ``blocks_that_fit``.

    Raises:
      UserError: TensorRT, a GPU or a plugin is missing or not the build's, or the plan is not what the files say.
    """
    trt = import_tensorrt()
    device = _open_device(engine.engine_dir)
    assert engine.record is not None
    engine.record.check_machine(trt.__version__, device.compute_capability, engine.engine_dir)
    load_trtllm_plugins(trt)
    has_search = engine.record.search_engine != "none"
    if has_search:
        library = engine.engine_dir / PLUGIN_FILE
        engine.record.check_plugin(library)
        load_memshare_plugin(trt, library)
    runtime, spec, plan = check_rank_engine(trt, engine, rank)
    num_blocks = blocks_that_fit(engine, num_blocks, free_memory_share, torch.device("cuda"))
    inv_freq = rotary_inv_freq(engine.model_dir)

    def open_search(pool: torch.Tensor) -> SeparateEngineSearch:
        search_path = engine.engine_dir / SEARCH_ENGINE_FILE
        search_plan = deserialize(runtime, search_path)
        assert engine.record is not None
        separate = spec_of(engine, rank, engine.record.max_pairs)
        hidden = IoTensor("memshare_hidden", "float32", (1,))
        check_engine_io(search_plan, [hidden, *memshare_io(separate)], search_path)
        return SeparateEngineSearch(search_plan, separate, pool, device, inv_freq)

    search = open_search if engine.record.search_engine == "separate" else None
    null_pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    if null_pages is not None:
        place = spec.pp_rank, spec.tp_rank, spec.tp_size
        null_pages = of_rank(null_pages, spec.num_layers, spec.num_kv_heads, *place)
    with pool_that_fits(engine, num_blocks, "the GPU"):
        return TensorRTRunner(
            plan, spec, num_blocks, device, inv_freq, search, use_graphs, all_reduce_workspace, null_pages
        )


def _open_device(engine_dir: Path) -> Device:
    if not torch.cuda.is_available():
        raise UserError(f"engine {engine_dir} needs a CUDA GPU, got none (run it on one, or build for --backend torch)")
    return CudaDevice()
