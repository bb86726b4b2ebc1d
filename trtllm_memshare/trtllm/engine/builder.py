"""Builds engines with TensorRT-LLM: Hugging Face checkpoint -> TensorRT-LLM model -> engine of every rank."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.engine.engine_dir import FORMAT_VERSION, Engine, copy_small_files, write_json
from trtllm_memshare.engine.null_page_build import add_null_pages
from trtllm_memshare.engine.replacement import replace_engine
from trtllm_memshare.engine.tensorrt_record import PLUGIN_FILE, SEARCH_ENGINE_FILE, TensorRTRecord, file_sha256
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.engine.build_plan import (
    CALIBRATED,
    QUANTIZATIONS,
    EnginePlan,
    build_settings,
    plugin_settings,
)
from trtllm_memshare.trtllm.engine.directory import engine_dtype, read_tensorrt_engine
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins
from trtllm_memshare.trtllm.engine.search_engine import build_search_engine
from trtllm_memshare.trtllm.engine.search_layer import allow_plugin_v3_layers, memshare_model_class
from trtllm_memshare.trtllm.engine.signatures import BUILDER, CONVERSION, check_call, check_signatures


def build_tensorrt_engine(plan: EnginePlan, output_dir: Path, force: bool) -> Engine:
    """Writes an engine directory of the TensorRT backend: all of it, or nothing.

    Raises:
      UserError: TensorRT, TensorRT-LLM, a GPU or the plugin library is missing, or is not what was recorded.
    """
    trt = import_tensorrt()
    load_trtllm_plugins(trt)
    check_signatures(BUILDER)
    capability = gpu_capability()
    if plan.search_engine != "none":
        load_memshare_plugin(trt, find_plugin_library(plan))
    if plan.search_engine == "embedded":
        allow_plugin_v3_layers()

    def fill(folder: Path) -> None:
        (folder / "model").mkdir(parents=True)
        write_null_pages(plan, folder)  # first: it may refuse, and takes minutes where a build may take hours
        with tempfile.TemporaryDirectory() as workspace:
            for rank in range(plan.num_ranks):
                _build_rank(plan, rank, folder, Path(workspace))
        if plan.search_engine == "separate":
            (folder / SEARCH_ENGINE_FILE).write_bytes(build_search_engine(trt, plan.spec(0), plan.max_pairs))
        write_memshare_files(plan, folder, make_record(plan, trt.__version__, capability))

    return replace_engine(output_dir, force, fill, read_tensorrt_engine)


def write_memshare_files(plan: EnginePlan, folder: Path, record: TensorRTRecord) -> None:
    """Puts memshare.json, the plugin library and the checkpoint's small files beside the engines."""
    if plan.search_engine != "none":
        shutil.copy2(find_plugin_library(plan), folder / PLUGIN_FILE)
    copy_small_files(plan.checkpoint.model_dir, folder / "model", plan.checkpoint.dtype)
    document = {
        "format_version": FORMAT_VERSION,
        "backend": "tensorrt",
        "memshare": plan.memshare.model_dump(),
        "tensorrt": record.model_dump(),
    }
    write_json(folder / "memshare.json", document)


def write_null_pages(plan: EnginePlan, folder: Path) -> None:
    """Calibrates null pages for the engine's longest sequences, if the settings want any."""
    # TensorRT-LLM's kernels read every entry: without null pages nothing could be forgotten.
    kv_dtype = plan.build.kv_cache_dtype if plan.build.kv_cache_dtype != "auto" else plan.spec(0).kv_dtype
    add_null_pages(
        folder, plan.checkpoint.model_dir, plan.spec(0).max_seq_len, kv_dtype, plan.memshare, skips_entries=False
    )
    torch.cuda.empty_cache()  # TensorRT allocates beside torch, which keeps what the model took


def make_record(plan: EnginePlan, tensorrt_version: str, capability: tuple[int, int]) -> TensorRTRecord:
    """What memshare.json will say of the build. Raises UserError if the plugin library has not been built."""
    return TensorRTRecord(
        tensorrt_version=tensorrt_version,
        compute_capability=".".join(map(str, capability)),
        search_engine=plan.search_engine,  # type: ignore[arg-type]
        max_pairs=plan.max_pairs,
        plugin_sha256=None if plan.search_engine == "none" else file_sha256(find_plugin_library(plan)),
    )


def find_plugin_library(plan: EnginePlan) -> Path:
    """The library that the plan names. Raises UserError if it has not been built."""
    if plan.plugin_library is None or not plan.plugin_library.is_file():
        raise UserError(
            f"the plugin library is missing, expected {plan.plugin_library} (python build_scripts/build_plugins.py "
            f"builds it; --plugin-library names another place)"
        )
    return plan.plugin_library


def gpu_capability() -> tuple[int, int]:
    """Compute capability of the current GPU. Raises UserError without one: TensorRT times layers on it."""
    if not torch.cuda.is_available():
        raise UserError("building a TensorRT engine needs the GPU it is for, got none (build on such a machine)")
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def _build_rank(plan: EnginePlan, rank: int, folder: Path, workspace: Path) -> None:
    from tensorrt_llm.builder import build

    try:
        model = _load_model(plan, rank, workspace)
        engine = build(model, make_build_config(plan, workspace))
    except (AssertionError, RuntimeError, ImportError) as error:  # how TensorRT-LLM says that it cannot
        raise UserError(
            f"TensorRT-LLM built no engine for rank {rank}: {type(error).__name__}: {error} (its log says why; out of "
            f"memory, try a smaller --max-batch-size)"
        ) from error
    except OSError as error:
        hint = " and downloads text to calibrate fp8 with" if plan.build.quantization in CALIBRATED else ""
        raise UserError(
            f"TensorRT-LLM built no engine for rank {rank}: {error} (it writes its own files{hint}: see that it can)"
        ) from error
    if engine is None or engine.engine is None:
        raise UserError(f"TensorRT built no engine for rank {rank}; its log says why (try a smaller --max-batch-size)")
    engine.save(str(folder))


def make_build_config(plan: EnginePlan, workspace: Path) -> Any:
    """TensorRT-LLM's ``BuildConfig`` with the settings that ``describe`` prints.

    Args:
      workspace: a folder that lives as long as the build; times of kernels go there, which TensorRT-LLM would write
        where the command runs.
    """
    from tensorrt_llm.builder import BuildConfig

    # kv_cache_type is left out: its enum moved between releases, and the build takes PAGED from paged_kv_cache.
    config = BuildConfig(**build_settings(plan.build), output_timing_cache=str(workspace / "model.cache"))
    for name, value in plugin_settings(plan.build).items():
        if not hasattr(config.plugin_config, name):
            raise UserError(
                f"tensorrt_llm.plugin.plugin.PluginConfig differs from the recorded one: it has no {name} (install the "
                f"recorded version)"
            )
        setattr(config.plugin_config, name, value)
    return config


def _load_model(plan: EnginePlan, rank: int, workspace: Path) -> Any:
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.models import MODEL_MAP
    from tensorrt_llm.models.modeling_utils import QuantConfig
    from tensorrt_llm.quantization.mode import QuantAlgo

    build, architecture = plan.build, plan.checkpoint.architecture
    if architecture not in MODEL_MAP:
        raise UserError(f"TensorRT-LLM has no engine model for {architecture} (take a model of another family)")
    model_class = MODEL_MAP[architecture]
    check_call(CONVERSION, model_class.from_hugging_face)
    if plan.search_engine == "embedded":
        model_class = memshare_model_class(model_class, plan.max_pairs)
    mapping = Mapping(world_size=plan.num_ranks, rank=rank, tp_size=build.tp_size, pp_size=build.pp_size)
    algorithm = None if build.quantization is None else getattr(QuantAlgo, QUANTIZATIONS[build.quantization])
    quantization = QuantConfig(
        quant_algo=algorithm, kv_cache_quant_algo=QuantAlgo.FP8 if build.kv_cache_dtype == "fp8" else None
    )
    source, dtype = str(plan.checkpoint.model_dir), engine_dtype(plan.checkpoint)
    if build.quantization not in CALIBRATED:
        model = model_class.from_hugging_face(source, dtype=dtype, mapping=mapping, quant_config=quantization)
    else:
        if rank == 0:  # writes the TensorRT-LLM checkpoint of every rank
            model_class.quantize(source, str(workspace), dtype=dtype, mapping=mapping, quant_config=quantization)
        model = model_class.from_checkpoint(str(workspace), rank=rank)
    if not isinstance(model, model_class):  # some of TensorRT-LLM's converters name their own class
        raise UserError(
            f"TensorRT-LLM made a {type(model).__name__} without the search, expected {model_class.__name__} (unset "
            f"TRTLLM_DISABLE_UNIFIED_CONVERTER)"
        )
    return model
