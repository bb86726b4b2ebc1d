"""Holds a TensorRT plan against what the files beside it say: names, types and ranges of what is bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.engine.directory import REBUILD, spec_of
from trtllm_memshare.trtllm.engine.io_table import IoTensor, dynamic_ranges, io_table
from trtllm_memshare.trtllm.engine.spec import EngineSpec

_DTYPES = {"INT32": "int32", "INT64": "int64", "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""TensorRT's names of types to torch's."""


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
    plan = deserialize(runtime, path)
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
        wanted = tensor.shape(largest)
        if len(high) != len(wanted) or any(h < n for h, n in zip(high, wanted, strict=True)):
            raise UserError(
                f"{path}: {tensor.name} takes at most {list(high)}, expected {list(wanted)} from "
                f"config.json ({REBUILD})"
            )


def deserialize(runtime: Any, path: Path) -> Any:
    """A plan from its file. Raises UserError if it cannot be read or TensorRT does not take it."""
    try:
        plan = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} ({REBUILD})") from error
    if plan is None:
        raise UserError(f"TensorRT could not load {path}; its log says why ({REBUILD})")
    return plan
