"""From options to an engine: settles every setting, picks the backend, says what will be built."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtllm_memshare
from trtllm_memshare.engine.checkpoint import Checkpoint, read_checkpoint, read_json
from trtllm_memshare.engine.engine_dir import (
    BuildConfig,
    Engine,
    check_target,
    parse_build_config,
    trtllm_config,
    write_engine,
)
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.search.config import MemShareConfig, make_config

DEFAULT_MODEL_DIR = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"
_GIB = 2**30


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides the outcome; ``backend_reason`` says why the backend was chosen."""

    checkpoint: Checkpoint
    output_dir: Path
    build: BuildConfig
    memshare: MemShareConfig
    backend_reason: str
    force: bool


def plan_build(
    model_dir: Path,
    output_dir: Path,
    memshare: bool,
    preset: str | None,
    shadow: bool,
    backend: str,
    build_options: dict[str, Any],
    quantization: str | None,
    tp_size: int,
    pp_size: int,
    config_file: Path | None,
    force: bool,
) -> BuildPlan:
    """Settles all settings; command line over file over defaults.

    Args:
      memshare: whether the engine shares; without it the preset is ``off``.
      build_options: fields of ``BuildConfig``, None = not given.
      config_file: JSON ``{"build": {...}, "memshare": {...}}``.

    Raises:
      UserError: any setting or checkpoint that cannot be used.
    """
    if (preset is not None or shadow) and not memshare:
        option = "--preset" if preset is not None else "--shadow"
        raise UserError(f"{option} needs --memshare, got it without (add --memshare)")
    reason = _choose_backend(backend)
    for name, size in (("--tp-size", tp_size), ("--pp-size", pp_size)):
        if size != 1:
            raise UserError(f"{name} must be 1 on the torch backend, got {size} (several GPUs need TensorRT-LLM)")
    if quantization is not None:
        raise UserError(f"--quantization is not available on the torch backend, got {quantization} (leave it out)")
    file = _read_config_file(config_file)
    checkpoint = read_checkpoint(model_dir)
    given = {k: v for k, v in build_options.items() if v is not None}
    defaults = {"max_seq_len": checkpoint.max_position_embeddings}
    build = parse_build_config({**defaults, **file["build"], **given}, "build settings")
    if build.max_seq_len > checkpoint.max_position_embeddings:
        raise UserError(
            f"max_seq_len must be at most the model's max_position_embeddings {checkpoint.max_position_embeddings}, "
            f"got {build.max_seq_len} (lower --max-seq-len)"
        )
    settings = dict(file["memshare"])
    chosen = preset or settings.pop("preset", "aligned")
    settings.pop("preset", None)
    if shadow:
        settings["shadow"] = True
    config = make_config(chosen, **settings) if memshare else make_config("off")
    check_target(output_dir, force)
    return BuildPlan(checkpoint, output_dir, build, config, reason, force)


def build_engine(plan: BuildPlan) -> Engine:
    """Writes the engine directory."""
    return write_engine(plan.output_dir, plan.checkpoint, plan.build, plan.memshare, plan.force)


def describe_plan(plan: BuildPlan) -> str:
    """The build configuration as JSON, for ``--dry-run``."""
    document = {
        "backend": plan.backend_reason,
        "output_dir": str(plan.output_dir),
        **trtllm_config(plan.checkpoint, plan.build),
        "memshare": plan.memshare.model_dump(),
    }
    return json.dumps(document, indent=2)


def summarize(engine: Engine) -> str:
    """What was built, in words and figures."""
    size, tokens = engine.bytes_per_block, engine.build.tokens_per_block
    per_gib = _GIB // size
    return "\n".join(
        [
            f"engine: {engine.engine_dir} ({engine.checkpoint.architecture}, backend {engine.backend})",
            f"KV cache: {size:,} bytes per block of {tokens} tokens ({engine.kv_dtype}), {per_gib:,} blocks or "
            f"{per_gib * tokens:,} tokens per GiB",
            f"MemShare: {describe_sharing(engine.memshare)}",
        ]
    )


def describe_sharing(config: MemShareConfig) -> str:
    """One sentence on what a server with these settings does."""
    if config.preset == "off":
        return "off, every request keeps all of its blocks"
    what = "reports repeats but shares nothing (shadow)" if config.shadow else "shares the blocks of repeats"
    where = "token runs at any shift" if config.matcher == "runs" else "similar steps, block by block"
    kept = "the newer copy stays" if config.direction == "keep-latest" else "the older copy stays"
    check = (
        "no KV comparison"
        if config.accept_all
        else f"K and V within {config.max_distance:g} in {config.layer_quorum:.0%} of the layers, K compared "
        + ("without its rotation" if config.undo_rope else "as stored")
    )
    return (
        f"preset {config.preset} {what}: {where}, {check}; {kept}; the last {config.protected_tokens} tokens and "
        f"{config.protected_steps} steps are never touched"
    )


def _choose_backend(backend: str) -> str:
    """Returns what was chosen and why; raises UserError for what cannot be had."""
    present = importlib.util.find_spec("tensorrt_llm") is not None
    if backend == "tensorrt":
        missing = (
            "tensorrt_llm is installed, but" if present else "tensorrt_llm 1.2.1 and TensorRT 10.14 are missing, and"
        )
        raise UserError(
            f"backend tensorrt cannot be built yet: {missing} this version has no TensorRT "
            f"builder (use --backend torch)"
        )
    if backend == "torch":
        return "torch (asked for)"
    return "torch (tensorrt_llm is " + (
        "installed, its builder is not part of this version)" if present else "not installed)"
    )


def _read_config_file(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {"build": {}, "memshare": {}}
    document = read_json(path, "the command", 'give --config a file like {"build": {}, "memshare": {}}')
    for key, value in document.items():
        if key not in ("build", "memshare"):
            raise UserError(f"{path} has an unknown key {key} ({nearest(key, ('build', 'memshare'))})")
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} must be an object, got {type(value).__name__}")
    return {"build": document.get("build", {}), "memshare": document.get("memshare", {})}
