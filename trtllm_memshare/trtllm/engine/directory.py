"""The engine directory of the TensorRT backend.

The layout::

    config.json, rank0.engine, ...   as TensorRT-LLM's ``Engine.save`` writes them
    memshare.json                    format_version, backend, memshare (the settings), tensorrt (``TensorRTRecord``)
    memshare.engine                  the search alone, with ``--search-engine separate``
    libtrtllm_memshare_plugin.so     the plugin library of the build
    model/                           settings and tokenizer of the checkpoint, no weights
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import ELEMENT_BYTES, Checkpoint, read_checkpoint
from trtllm_memshare.engine.engine_dir import FORMAT_VERSION, Engine, check_keys, read_build, read_documents
from trtllm_memshare.engine.tensorrt_record import TensorRTRecord, parse_record
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.json_input import read_json
from trtllm_memshare.search.config import MemShareConfig, parse_config
from trtllm_memshare.trtllm.engine.refusals import check_engine_config
from trtllm_memshare.trtllm.engine.spec import EngineSpec, engine_spec

REBUILD = "build it again with build_scripts/build_engine.py --backend tensorrt --force"
_KV_ALGORITHMS = {None: "auto", "FP8": "fp8", "INT8": "int8"}
_CHECKED = {  # pretrained_config's name of a fact that the model's own config.json states too
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_size": "head_dim",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
}


def read_tensorrt_engine(engine_dir: Path) -> Engine:
    """Reads and checks an engine directory of the TensorRT backend; needs neither TensorRT nor a GPU.

    Raises:
      UserError: unknown keys, another version, files that disagree, or an engine that sharing cannot work with.
    """
    remedy = f"the engine directory is damaged: {REBUILD}"
    path = engine_dir / "memshare.json"
    config, document = read_documents(engine_dir)
    check_keys(document, ("format_version", "backend", "memshare", "tensorrt"), str(path), remedy)
    if document["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {quote(document['format_version'])}, expected {FORMAT_VERSION} ({REBUILD})"
        )
    memshare = parse_config(document["memshare"], str(path))
    record = parse_record(document["tensorrt"], f"{path}: tensorrt")
    check_search(memshare, record, path)
    try:
        checkpoint = read_checkpoint(engine_dir / "model", with_weights=False)
    except UserError as error:
        raise UserError(f"engine {engine_dir} is damaged, {REBUILD}: {error}") from error
    checkpoint, build = read_facts(engine_dir, config, checkpoint, remedy)
    return Engine(engine_dir, "tensorrt", checkpoint, build, memshare, record)


def read_facts(
    engine_dir: Path, config: dict[str, Any], checkpoint: Checkpoint, remedy: str
) -> tuple[Checkpoint, BuildConfig]:
    """What TensorRT-LLM built, from its own files.

    Args:
      config: the engine's config.json.
      checkpoint: the model that should be in the engine.
      remedy: what to do if it is another one, or a file is missing.

    Returns:
      The checkpoint with the engine's dtype, and the engine's build settings.

    Raises:
      UserError: files that disagree or are missing, or an engine that sharing cannot work with.
    """
    where = engine_dir / "config.json"
    build = read_build(config, _kv_cache_dtype(config, where), where, remedy)
    check_engine_config(config, str(where))
    model = config["pretrained_config"]
    for theirs, ours in _CHECKED.items():
        if model.get(theirs) != getattr(checkpoint, ours):
            raise UserError(
                f"{where}: pretrained_config.{theirs} is {quote(model.get(theirs))}, expected "
                f"{quote(getattr(checkpoint, ours))} for the model in the engine ({remedy})"
            )
    if not (isinstance(model.get("dtype"), str) and model["dtype"] in ELEMENT_BYTES):
        raise UserError(f"{where} has dtype {quote(model.get('dtype'))}, expected one of {', '.join(ELEMENT_BYTES)}")
    for rank in range(build.tp_size * build.pp_size):
        if not (engine_dir / f"rank{rank}.engine").is_file():
            raise UserError(f"engine {engine_dir} is missing rank{rank}.engine ({remedy})")
    return replace(checkpoint, dtype=model["dtype"]), build


def check_search(memshare: MemShareConfig, record: TensorRTRecord, where: Path) -> None:
    """Raises UserError for settings that search as the engine was not built for, which would end it while it serves."""
    if not memshare.searches or memshare.accept_all:
        return
    if record.search_engine == "none":
        raise UserError(
            f"{where} has preset {memshare.preset}, which compares blocks, got an engine that was built without a "
            f"search (choose lexical, pressure or off, or {REBUILD})"
        )
    if memshare.max_pairs > record.max_pairs:
        raise UserError(
            f"{where} has max_pairs {memshare.max_pairs}, expected at most {record.max_pairs}, for which the engine "
            f"was built (lower it, or {REBUILD})"
        )


def spec_of(engine: Engine, rank: int = 0, max_pairs: int | None = None) -> EngineSpec:
    """The spec of one rank's engine in a directory; ``max_pairs``: None = those of the search inside it."""
    assert engine.record is not None
    if max_pairs is None:
        max_pairs = engine.record.max_pairs if engine.record.search_engine == "embedded" else 0
    where = engine.engine_dir / "config.json"
    model = read_json(where, f"engine {engine.engine_dir}", REBUILD)["pretrained_config"]
    logits = model.get("logits_dtype", "float32")  # ModelOpt's checkpoints say float16
    if logits not in ("float32", "float16", "bfloat16"):
        raise UserError(f"{where} has logits_dtype {quote(logits)}, expected float32, float16 or bfloat16 ({REBUILD})")
    return engine_spec(engine.checkpoint, engine.build, rank, max_pairs, logits)


def engine_dtype(checkpoint: Checkpoint) -> str:
    """What an engine computes in: the checkpoint's type, float16 for float32, since fused attention takes 16 bits."""
    return "float16" if checkpoint.dtype == "float32" else checkpoint.dtype


def _kv_cache_dtype(config: dict[str, Any], where: Path) -> str:
    quantization = (config.get("pretrained_config") or {}).get("quantization") or {}
    algorithm = quantization.get("kv_cache_quant_algo") if isinstance(quantization, dict) else quantization
    if isinstance(algorithm, (dict, list)) or algorithm not in _KV_ALGORITHMS or not isinstance(quantization, dict):
        raise UserError(
            f"{where} has kv_cache_quant_algo {quote(algorithm)}, expected none, FP8 or INT8: other caches keep scales "
            f"per block that sharing does not move (build with another --kv-cache-dtype)"
        )
    return _KV_ALGORITHMS[algorithm]
