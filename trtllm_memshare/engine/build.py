"""From options to an engine: settles every setting, picks the backend, says what will be built."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtllm_memshare
from trtllm_memshare.engine.build_config import parse_build_config
from trtllm_memshare.engine.checkpoint import read_checkpoint, read_json
from trtllm_memshare.engine.engine_dir import Engine, check_target, trtllm_config, write_engine
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.search.config import MemShareConfig, make_config

DEFAULT_MODEL_DIR = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"
_GIB = 2**30


@dataclass(frozen=True)
class BuildOptions:
    """What a command line asks for; ``None`` = not given.

    Attributes:
      memshare: whether the engine shares; without it the preset is ``off``.
      preset: name in ``PRESETS``; ``aligned`` if neither it nor the file gives one.
      build: fields of ``BuildConfig`` as given, None = not given.
      config_file: JSON ``{"build": {...}, "memshare": {...}}``; the command line wins over it.
    """

    model_dir: Path = DEFAULT_MODEL_DIR
    output_dir: Path = Path("engines/tiny_reasoner")
    memshare: bool = False
    preset: str | None = None
    shadow: bool = False
    backend: str = "auto"
    build: dict[str, Any] | None = None
    config_file: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """An engine that can be written.

    Attributes:
      engine: as it will be; its checkpoint is still the source.
      backend_reason: which backend was chosen and why, in words.
    """

    engine: Engine
    backend_reason: str
    force: bool


def plan_build(options: BuildOptions) -> BuildPlan:
    """Settles all settings and checks all input; writes nothing.

    Raises:
      UserError: a setting, checkpoint or output directory that cannot be used.
    """
    backend, reason = _choose_backend(options.backend)
    file = _read_config_file(options.config_file)
    memshare = _settle_memshare(options, file["memshare"])
    checkpoint = read_checkpoint(options.model_dir)
    given = {key: value for key, value in (options.build or {}).items() if value is not None}
    defaults = {"max_seq_len": checkpoint.max_position_embeddings}
    build = parse_build_config({**defaults, **file["build"], **given}, "build settings")
    build.check_backend(backend)
    if build.max_seq_len > checkpoint.max_position_embeddings:
        raise UserError(
            f"max_seq_len must be at most the model's max_position_embeddings {checkpoint.max_position_embeddings}, "
            f"got {build.max_seq_len} (lower --max-seq-len)"
        )
    check_target(options.output_dir, options.force)
    engine = Engine(options.output_dir, backend, checkpoint, build, memshare)
    return BuildPlan(engine, reason, options.force)


def build_engine(plan: BuildPlan) -> Engine:
    """Writes the engine directory and reads it back. Raises UserError if it cannot be written."""
    engine = plan.engine
    return write_engine(engine.engine_dir, engine.checkpoint, engine.build, engine.memshare, plan.force)


def describe_plan(plan: BuildPlan) -> str:
    """The plan as JSON, for ``--dry-run``."""
    engine = plan.engine
    document = {
        "backend": engine.backend,
        "model_dir": str(engine.model_dir),
        "output_dir": str(engine.engine_dir),
        **trtllm_config(engine.checkpoint, engine.build),
        "memshare": engine.memshare.model_dump(),
        "summary": summarize(engine).splitlines(),
    }
    return json.dumps(document, indent=2)


def summarize(engine: Engine) -> str:
    """What the engine is, in words and figures: KV block size, what a GiB holds, what MemShare will do."""
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
    if config.matcher == "runs":
        where = f"runs of at least {config.min_run_tokens} matching tokens at any shift"
    else:
        where = f"similar steps (cosine at least {config.min_step_cosine:g}), block by block"
    kept = "the newer copy stays" if config.direction == "keep-latest" else "the older copy stays"
    if config.accept_all:
        check = "no KV comparison"
    else:
        rotation = "without its rotation" if config.undo_rope else "as stored"
        layers = "every layer" if config.layer_quorum == 1 else f"{config.layer_quorum:.0%} of the layers"
        fields = {"k-and-v": "K and V", "k": "K", "v": "V"}[config.compared]
        if config.layer_vote == "mean":
            layers = "the mean of the layers"
        check = f"{fields} within a relative distance of {config.max_distance:g} in {layers}, K compared {rotation}"
    if not config.count_aliases:
        kept += " and counts once in attention"
    return (
        f"preset {config.preset} {what}: {where}, {check}; {kept}, one block serves at most {config.max_aliases} "
        f"places; the prompt, the last {config.protected_tokens} tokens and the last {config.protected_steps} steps "
        f"are never given up"
    )


def _settle_memshare(options: BuildOptions, settings: dict[str, Any]) -> MemShareConfig:
    if not options.memshare:
        for name, given in (
            ("--preset", options.preset is not None),
            ("--shadow", options.shadow),
            (f"memshare in {options.config_file}", bool(settings)),
        ):
            if given:
                raise UserError(f"{name} needs --memshare, got it without (add --memshare)")
        return make_config("off")
    settings = dict(settings)
    in_file = settings.pop("preset", "aligned")
    if options.shadow:
        settings["shadow"] = True
    return make_config(str(options.preset or in_file), **settings)


def _choose_backend(asked: str) -> tuple[str, str]:
    """Returns the backend's name, and what was chosen and why; raises UserError for what cannot be had."""
    present = importlib.util.find_spec("tensorrt_llm") is not None
    if asked == "tensorrt":
        missing = "" if present else "tensorrt_llm 1.2.1 and TensorRT 10.14 are missing, and "
        raise UserError(
            f"backend tensorrt cannot be built yet: {missing}this version has no TensorRT builder (use --backend torch)"
        )
    if asked == "torch":
        return "torch", "torch (asked for)"
    # Once there is a builder for it, tensorrt comes first here.
    why = "installed, but this version has no builder for it" if present else "not installed"
    return "torch", f"torch (tensorrt_llm is {why})"


def _read_config_file(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {"build": {}, "memshare": {}}
    document = read_json(path, "the command", 'give --config a file like {"build": {}, "memshare": {}}')
    for key, value in document.items():
        if key not in ("build", "memshare"):
            raise UserError(f"{path} has an unknown key {key} ({nearest(key, ('build', 'memshare'))})")
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} must be an object, got {type(value).__name__} (see --help)")
    return {"build": document.get("build", {}), "memshare": document.get("memshare", {})}
