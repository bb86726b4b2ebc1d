"""What a TensorRT engine will be built from and with, worked out without TensorRT-LLM; ``--dry-run`` prints it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import Checkpoint
from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, KernelVariant
from trtllm_memshare.search.need import find_need
from trtllm_memshare.trtllm.engine.directory import engine_dtype
from trtllm_memshare.trtllm.engine.io_table import IoTensor, dynamic_ranges, io_table, memshare_io
from trtllm_memshare.trtllm.engine.plugins import PLUGIN
from trtllm_memshare.trtllm.engine.spec import EngineSpec, engine_spec

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Those whose conversion was read in TensorRT-LLM and that its stand-in converts."""

QUANTIZATIONS = {"fp8": "FP8", "w8a16": "W8A16", "w4a16": "W4A16"}
"""Values of ``--quantization`` to members of TensorRT-LLM's ``QuantAlgo``."""

CALIBRATED = ("fp8",)
"""Those that TensorRT-LLM calibrates with ModelOpt, through a checkpoint of its own."""

SEARCH_ENGINES = ("embedded", "separate")


@dataclass(frozen=True)
class EnginePlan:
    """A TensorRT engine to build.

    Attributes:
      search_engine: embedded (in the model's engine), separate (``memshare.engine``) or none.
      plugin_library: the built library, None when there is no search.
    """

    checkpoint: Checkpoint
    build: BuildConfig
    memshare: MemShareConfig
    search_engine: str
    plugin_library: Path | None

    @property
    def max_pairs(self) -> int:
        """Pairs of one search, 0 without one."""
        return 0 if self.search_engine == "none" else self.memshare.max_pairs

    @property
    def num_ranks(self) -> int:
        return self.build.tp_size * self.build.pp_size

    def spec(self, rank: int) -> EngineSpec:
        """The spec of one rank's engine, its dtype that of the engine."""
        checkpoint = replace(self.checkpoint, dtype=engine_dtype(self.checkpoint))
        # ModelOpt gives its checkpoints logits of 16 bits, TensorRT-LLM's converters float32 ones.
        logits = "float16" if self.build.quantization in CALIBRATED else "float32"
        pairs = self.max_pairs if self.search_engine == "embedded" else 0
        return engine_spec(checkpoint, self.build, rank, pairs, logits)


def check_plan(plan: EnginePlan, is_built: bool = False) -> None:
    """Refuses settings with which TensorRT-LLM would build something that sharing or chunks cannot work with.

    Args:
      is_built: the engine is there, and its config.json has been checked: how it came to be does not matter.

    Raises:
      UserError: a model whose conversion is untried, an unknown quantization, a cache that switches chunks off, or a
        pool that no kernel takes.
    """
    _check_sharing(plan.memshare)
    if not is_built:
        _check_build(plan)
    for rank in range(plan.num_ranks):
        spec = plan.spec(rank)
        if plan.max_pairs:
            try:
                search_variant(spec)
            except ValueError as error:
                raise UserError(f"MemShareBlockSearch cannot be built: {error}") from error


def _check_sharing(memshare: MemShareConfig) -> None:
    """What needs attention of our own: TensorRT-LLM's kernels read every entry, and report nothing."""
    reads_attention = memshare.pressure and "attention" in find_need(memshare.need).facts
    for name, is_served in (
        (f"preset {memshare.preset}, which counts aliases once,", memshare.count_aliases or memshare.preset == "off"),
        ("retired_becomes dropped", memshare.retired_becomes != "dropped"),
        (f"control {memshare.control}", memshare.control == "none"),
        (f"need {memshare.need}", not reads_attention),
    ):
        if not is_served:
            raise UserError(
                f"the tensorrt backend attends with TensorRT-LLM's kernels, got {name} which needs our own (choose "
                f"another, or add --backend torch)"
            )


def _check_build(plan: EnginePlan) -> None:
    build = plan.build
    if plan.checkpoint.architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture must be one of {', '.join(ARCHITECTURES)} on the tensorrt backend, got "
            f"{plan.checkpoint.architecture}, whose conversion is untried (leave out --backend tensorrt)"
        )
    if build.quantization is not None and build.quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)} on the tensorrt backend, got {build.quantization} "
            f"(set another --quantization)"
        )
    if build.kv_cache_dtype == "int8":
        raise UserError(
            "kv_cache_dtype must be auto or fp8 on the tensorrt backend, got int8, which switches off the paged "
            "context attention that chunks of prompts need (set --kv-cache-dtype fp8 with --quantization fp8)"
        )
    if build.kv_cache_dtype == "fp8" and build.quantization != "fp8":
        raise UserError(
            f"kv_cache_dtype fp8 needs fp8 weights in TensorRT-LLM, got quantization {build.quantization} (add "
            f"--quantization fp8)"
        )
    if build.kv_cache_dtype not in ("auto", "fp8"):
        raise UserError(
            f"kv_cache_dtype must be auto or fp8 on the tensorrt backend, got {build.kv_cache_dtype} (leave out "
            f"--kv-cache-dtype)"
        )
    if build.max_num_tokens < build.tokens_per_block:
        raise UserError(
            f"max_num_tokens must be at least tokens_per_block {build.tokens_per_block}, got {build.max_num_tokens} "
            f"(raise --max-num-tokens)"
        )


def search_variant(spec: EngineSpec) -> KernelVariant:
    """The kernel that the plugin will launch. Raises ValueError if there is none."""
    heads, size, dim = spec.num_kv_heads, spec.tokens_per_block, spec.head_dim
    return KernelVariant(spec.kv_dtype, spec.num_layers, heads, size, dim, rotary_dim=dim)


def plugin_fields(spec: EngineSpec) -> dict[str, int]:
    """Fields of the plugin's creator, all int32; names are those of ``plugins/tensorrt/search_attributes.cpp``."""
    variant = search_variant(spec)
    return {
        "num_layers": variant.num_layers,
        "num_kv_heads": variant.num_kv_heads,
        "tokens_per_block": variant.tokens_per_block,
        "head_dim": variant.head_dim,
        "rotary_dim": variant.rotary_dim,
        "kv_dtype": ELEMENT_TYPES[variant.dtype].code,
        "interleaved": int(variant.interleaved),
    }


def build_settings(build: BuildConfig) -> dict[str, Any]:
    """Fields of TensorRT-LLM's ``BuildConfig`` that are set; the rest keep TensorRT-LLM's defaults."""
    return {
        "max_input_len": build.max_seq_len - 1,
        "max_seq_len": build.max_seq_len,
        "max_batch_size": build.max_batch_size,
        "opt_batch_size": (build.max_batch_size + 1) // 2,
        "max_beam_width": 1,
        "max_num_tokens": build.max_num_tokens,
        "opt_num_tokens": min(build.max_num_tokens, build.max_batch_size),
        "gather_context_logits": False,
        "max_draft_len": 0,
    }


def plugin_settings(build: BuildConfig) -> dict[str, Any]:
    """Fields of TensorRT-LLM's ``PluginConfig`` that are set."""
    return {
        "remove_input_padding": True,
        "paged_kv_cache": True,
        "tokens_per_block": build.tokens_per_block,
        "context_fmha": True,
        "use_paged_context_fmha": True,
        "use_fp8_context_fmha": build.kv_cache_dtype == "fp8",
        "multiple_profiles": False,
        "streamingllm": False,
    }


def describe(plan: EnginePlan) -> dict[str, Any]:
    """The plan as JSON: what is converted and how, the exact build configuration, and what MemShare adds to it."""
    build, dtype = plan.build, engine_dtype(plan.checkpoint)
    return {
        "tensorrt_llm": TRTLLM_VERSION,
        "convert": {
            "architecture": plan.checkpoint.architecture,
            "dtype": dtype,
            "tp_size": build.tp_size,
            "pp_size": build.pp_size,
            "quant_algo": QUANTIZATIONS.get(build.quantization or ""),
            "kv_cache_quant_algo": "FP8" if build.kv_cache_dtype == "fp8" else None,
        },
        "build_config": {
            **build_settings(build),
            "plugin_config": plugin_settings(build),
        },
        "search_engine": plan.search_engine,
        "plugin": None if plan.search_engine == "none" else _describe_plugin(plan),
        "ranks": [_describe_rank(plan, rank) for rank in range(plan.num_ranks)],
    }


def _describe_plugin(plan: EnginePlan) -> dict[str, Any]:
    name, version, namespace = PLUGIN
    library = None if plan.plugin_library is None else str(plan.plugin_library)
    return {"name": name, "version": version, "namespace": namespace, "library": library}


def _describe_rank(plan: EnginePlan, rank: int) -> dict[str, Any]:
    spec = plan.spec(rank)
    added = memshare_io(replace(spec, max_pairs=plan.max_pairs)) if plan.max_pairs else []
    ranges = {k: list(v) for k, v in dynamic_ranges(replace(spec, max_pairs=plan.max_pairs)).items()}
    return {
        "file": f"rank{rank}.engine",
        "inputs": [_describe_tensor(t) for t in io_table(spec) if not t.is_output and not t.is_memshare],
        "outputs": [_describe_tensor(t) for t in io_table(spec) if t.is_output and not t.is_memshare],
        "extra_inputs": [_describe_tensor(t) for t in added if not t.is_output],
        "extra_outputs": [_describe_tensor(t) for t in added if t.is_output],
        "profile": ranges if plan.max_pairs else {k: v for k, v in ranges.items() if k != "pairs"},
        "plugin_fields": plugin_fields(spec) if plan.max_pairs else {},
    }


def _describe_tensor(tensor: IoTensor) -> str:
    place = "host" if tensor.on_host else "device"
    return f"{tensor.name}: {tensor.dtype} {list(tensor.dims)} on the {place}".replace("'", "")
