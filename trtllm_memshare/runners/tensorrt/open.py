"""Opens an engine directory of the TensorRT backend: checks first, then plugins, then the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.tensorrt.device import CudaDevice, Device
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.runners.tensorrt.separate_search import SeparateEngineSearch
from trtllm_memshare.search.rotary import rotary_inv_freq
from trtllm_memshare.trtllm.engine.directory import REBUILD, spec_of
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.io_table import IoTensor, dynamic_ranges, io_table, memshare_io
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins
from trtllm_memshare.trtllm.engine.record import PLUGIN_FILE, SEARCH_ENGINE_FILE
from trtllm_memshare.trtllm.engine.spec import EngineSpec

_DTYPES = {"INT32": "int32", "INT64": "int64", "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""TensorRT's names of types to torch's."""


def open_tensorrt_runner(
    engine: Engine,
    num_blocks: int,
    rank: int = 0,
    use_graphs: bool = False,
    all_reduce_workspace: torch.Tensor | None = None,
) -> TensorRTRunner:
    """A runner over one rank's engine.

    Args:
      engine: from ``load_engine``.
      num_blocks: blocks of the pool.
      rank: which rank's engine.
      use_graphs: replay CUDA graphs in pure decode steps.
      all_reduce_workspace: with tensor parallelism, see ``runners.tensorrt.parallel``.

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
    inv_freq = rotary_inv_freq(engine.model_dir)

    def open_search(pool: torch.Tensor) -> SeparateEngineSearch:
        search_path = engine.engine_dir / SEARCH_ENGINE_FILE
        search_plan = _deserialize(runtime, search_path)
        assert engine.record is not None
        separate = spec_of(engine, rank, engine.record.max_pairs)
        hidden = IoTensor("memshare_hidden", "float32", (1,))
        check_engine_io(search_plan, [hidden, *memshare_io(separate)], search_path)
        return SeparateEngineSearch(search_plan, separate, pool, device, inv_freq)

    search = open_search if engine.record.search_engine == "separate" else None
    return TensorRTRunner(plan, spec, num_blocks, device, inv_freq, search, use_graphs, all_reduce_workspace)


def check_rank_engine(trt: Any, engine: Engine, rank: int) -> tuple[Any, EngineSpec, Any]:
    """Loads one rank's plan and holds it against what the engine's files say.

    Returns:
      TensorRT's runtime, which must outlive the plan; the rank's sizes; the plan.

    Raises:
      UserError: no plan, one that TensorRT does not load, or one with other inputs, outputs or ranges.
    """
    spec = spec_of(engine, rank)
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    path = engine.engine_dir / f"rank{rank}.engine"
    plan = _deserialize(runtime, path)
    _check_profiles(plan, spec, path)
    check_engine_io(plan, io_table(spec), path)
    return runtime, spec, plan


def check_engine_io(plan: Any, table: list[IoTensor], path: Path) -> None:
    """Compares a plan's inputs and outputs with those that will be bound.

    Raises:
      UserError: a name too many or too few, or another type; an engine without the plugin is named as such.
    """
    expected = {t.name: t for t in table}
    names = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
    missing, extra = [n for n in expected if n not in names], [n for n in names if n not in expected]
    if missing and all(expected[n].is_memshare for n in missing):
        raise UserError(
            f"{path} was built without the plugin MemShareBlockSearch: it lacks {missing[0]} (build it with "
            f"--memshare, or take --search-engine separate)"
        )
    if missing or extra:
        raise UserError(
            f"{path} should have the inputs and outputs of TensorRT-LLM 1.2.1, got none named {missing} and unknown "
            f"ones {extra} ({REBUILD})"
        )
    for name, tensor in expected.items():
        dtype = _DTYPES.get(plan.get_tensor_dtype(name).name, "unknown")
        is_output = plan.get_tensor_mode(name).name == "OUTPUT"
        if (dtype, is_output) != (tensor.dtype, tensor.is_output):
            kinds = ("input", "output")
            raise UserError(
                f"{path}: {name} is an {kinds[is_output]} of {dtype}, expected an {kinds[tensor.is_output]} of "
                f"{tensor.dtype} ({REBUILD})"
            )


def _check_profiles(plan: Any, spec: EngineSpec, path: Path) -> None:
    """The plan takes what config.json promises."""
    largest = {name: high for name, (_, _, high) in dynamic_ranges(spec).items()}
    last = plan.num_optimization_profiles - 1
    for tensor in io_table(spec):
        if tensor.is_output or not any(isinstance(d, str) for d in tensor.dims):
            continue
        names = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
        if tensor.name not in names:
            continue  # check_engine_io names it
        high = tuple(plan.get_tensor_profile_shape(tensor.name, last)[2])
        if any(h < n for h, n in zip(high, tensor.shape(largest), strict=True)):
            raise UserError(
                f"{path}: {tensor.name} takes at most {list(high)}, expected {list(tensor.shape(largest))} from "
                f"config.json ({REBUILD})"
            )


def _deserialize(runtime: Any, path: Path) -> Any:
    try:
        plan = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} ({REBUILD})") from error
    if plan is None:
        raise UserError(f"TensorRT could not load {path}; its log says why ({REBUILD})")
    return plan


def _open_device(engine_dir: Path) -> Device:
    if not torch.cuda.is_available():
        raise UserError(f"engine {engine_dir} needs a CUDA GPU, got none (run it on one, or build for --backend torch)")
    return CudaDevice()
