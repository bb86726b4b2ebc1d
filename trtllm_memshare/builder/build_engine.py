"""From options to an engine: settles every setting, picks the backend, says what will be built."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trtllm_memshare
from trtllm_memshare.builder.summary import summarize
from trtllm_memshare.engine.build_config import BuildConfig, parse_build_config
from trtllm_memshare.engine.checkpoint import Checkpoint, read_checkpoint
from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION, Engine, trtllm_config, write_engine
from trtllm_memshare.engine.gguf import checkpoint_of_gguf, is_gguf
from trtllm_memshare.engine.replacement import check_target
from trtllm_memshare.engine.tokenizer_check import check_tokenizer
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.json_input import read_json
from trtllm_memshare.search.config import MemShareConfig, check_for_executor, make_config

if TYPE_CHECKING:
    from trtllm_memshare.trtllm.engine.build_plan import EnginePlan

DEFAULT_MODEL_DIR = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"


@dataclass(frozen=True)
class BuildOptions:
    """What a command line asks for; ``None`` = not given.

    Attributes:
      model_dir: a checkpoint directory, or a GGUF file: ``x.gguf`` is dequantized to a checkpoint ``x/`` beside it;
        None = the bundled model.
      memshare: whether the engine shares; without it the preset is ``off``.
      preset: name in ``PRESETS``; if neither it nor the file gives one, ``pressure`` on the torch backend, and
        ``aligned`` on TensorRT or with ``shadow``.
      build: fields of ``BuildConfig`` as given, None = not given.
      config_file: JSON ``{"build": {...}, "memshare": {...}}``; the command line wins over it.
      search_engine: where a TensorRT engine's search runs: embedded (default) or separate; needs ``memshare``.
      plugin_library: the built plugin library of a TensorRT engine with a search.
      adopt: add memshare.json to an engine that TensorRT-LLM left in ``output_dir`` instead of building one.
    """

    model_dir: Path | None = None
    output_dir: Path = Path("engines/tiny_reasoner")
    memshare: bool = False
    preset: str | None = None
    shadow: bool = False
    backend: str = "auto"
    build: dict[str, Any] | None = None
    config_file: Path | None = None
    force: bool = False
    search_engine: str | None = None
    plugin_library: Path = Path("build/plugins/libtrtllm_memshare_plugin.so")
    adopt: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """An engine that can be written.

    Attributes:
      engine: as it will be; its checkpoint is still the source.
      backend_reason: which backend was chosen and why, in words.
      tensorrt: what TensorRT-LLM will be asked for, None on the torch backend.
      adopt: see ``BuildOptions``.
    """

    engine: Engine
    backend_reason: str
    force: bool
    tensorrt: EnginePlan | None = None
    adopt: bool = False


def plan_build(options: BuildOptions) -> BuildPlan:
    """Settles all settings and checks all input; writes nothing but the checkpoint beside a GGUF file.

    Raises:
      UserError: a setting, checkpoint or output directory that cannot be used.
    """
    backend, reason = _choose_backend(options.backend)
    file = _read_config_file(options.config_file)
    memshare = _settle_memshare(options, file["memshare"], backend)
    given = {key: value for key, value in (options.build or {}).items() if value is not None}
    asked = {**file["build"], **given}
    # What needs no model is checked before one is read, which takes seconds.
    parse_build_config(asked, "build settings").check_backend(backend)
    source = options.model_dir or DEFAULT_MODEL_DIR
    if options.adopt:
        _check_adoption(options, backend)
    else:
        check_target(options.output_dir, options.force)
    model_dir = checkpoint_of_gguf(source) if is_gguf(source) else source
    checkpoint = read_checkpoint(model_dir)
    if options.adopt:
        from trtllm_memshare.trtllm.engine.adoption import read_adoptable

        checkpoint, build = read_adoptable(options.output_dir, options.force, checkpoint, asked)
    else:
        build = _settle_build(checkpoint, asked)
    notes = [*checkpoint.notes, *check_tokenizer(model_dir, checkpoint.vocab_size)]
    checkpoint = replace(checkpoint, notes=tuple(notes))
    tensorrt = None
    if backend == "tensorrt":
        if checkpoint.renamed_prefix:
            raise UserError(
                f'{source} stores its tensors as "{checkpoint.renamed_prefix}...", which TensorRT-LLM does '
                f"not read (load and save it once with transformers)"
            )
        tensorrt = _plan_tensorrt(options, checkpoint, build, memshare)
        checkpoint = replace(checkpoint, dtype=tensorrt.spec(0).dtype)
    elif options.search_engine is not None:
        raise UserError(
            f"--search-engine is for the tensorrt backend, got {options.search_engine} on {backend} (leave it out, or "
            f"add --backend tensorrt)"
        )
    engine = Engine(options.output_dir, backend, checkpoint, build, memshare)
    return BuildPlan(engine, reason, options.force, tensorrt, options.adopt)


def build_engine(plan: BuildPlan, check: Callable[[Engine], object] | None = None) -> Engine:
    """Writes the engine directory and reads it back.

    Args:
      check: called with the engine of the torch backend before it takes its place; what it raises stops the build.

    Raises:
      UserError: it cannot be written.
    """
    engine = plan.engine
    if plan.tensorrt is not None:
        if plan.adopt:
            from trtllm_memshare.trtllm.engine.adoption import adopt_engine

            return adopt_engine(plan.tensorrt, engine.engine_dir, plan.force)
        from trtllm_memshare.trtllm.engine.builder import build_tensorrt_engine

        return build_tensorrt_engine(plan.tensorrt, engine.engine_dir, plan.force)

    def add(folder: Path) -> None:
        from trtllm_memshare.engine.null_page_build import add_null_pages

        sizes = engine.build.max_seq_len, engine.kv_dtype
        add_null_pages(folder, folder / "model", *sizes, engine.memshare, skips_entries=True)

    return write_engine(engine.engine_dir, engine.checkpoint, engine.build, engine.memshare, plan.force, check, add)


def describe_plan(plan: BuildPlan) -> str:
    """The plan as JSON, for ``--dry-run``."""
    engine = plan.engine
    document = {
        "backend": engine.backend,
        "model_dir": str(engine.model_dir),
        "output_dir": str(engine.engine_dir),
        **trtllm_config(engine.checkpoint, engine.build),
        "memshare": engine.memshare.model_dump(),
        "summary": summarize(engine, None if plan.tensorrt is None else plan.tensorrt.search_engine).splitlines(),
    }
    if plan.tensorrt is not None:
        from trtllm_memshare.trtllm.engine.build_plan import describe

        document = {**document, "tensorrt": describe(plan.tensorrt)}
        del document["version"], document["pretrained_config"], document["build_config"]
    return json.dumps(document, indent=2)


def _check_adoption(options: BuildOptions, backend: str) -> None:
    """What can be refused before a model is read. Raises UserError."""
    if backend != "tensorrt":
        raise UserError(f"--adopt is for engines of TensorRT-LLM, got backend {backend} (add --backend tensorrt)")
    if options.model_dir is None:
        raise UserError(
            "--adopt needs --model-dir, got it without: the tokenizer comes from there (name the checkpoint that the "
            "engine was built from)"
        )


def _settle_build(checkpoint: Checkpoint, asked: dict[str, Any]) -> BuildConfig:
    build = parse_build_config({"max_seq_len": checkpoint.max_position_embeddings, **asked}, "build settings")
    if build.max_seq_len > checkpoint.longest_sequence:
        is_scaled = checkpoint.longest_sequence > checkpoint.max_position_embeddings
        limit = "longest sequence" if is_scaled else "max_position_embeddings"
        raise UserError(
            f"max_seq_len must be at most the model's {limit} {checkpoint.longest_sequence}, got {build.max_seq_len} "
            f"(lower --max-seq-len)"
        )
    return build


def _settle_memshare(options: BuildOptions, settings: dict[str, Any], backend: str) -> MemShareConfig:
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
    # Shadow reports what a search finds, and TensorRT engines carry the search inside: both mean sharing.
    if options.shadow:
        settings["shadow"] = True
    is_shadow = bool(settings.get("shadow"))
    in_file = settings.pop("preset", "pressure" if backend == "torch" and not is_shadow else "aligned")
    config = make_config(str(options.preset or in_file), **settings)
    check_for_executor(config)
    return config


def _choose_backend(asked: str) -> tuple[str, str]:
    """Returns the backend's name, and what was chosen and why."""
    if asked != "auto":
        return asked, f"{asked} (asked for)"
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return "torch", "torch (tensorrt_llm is not installed)"
    if version != TRTLLM_VERSION:
        return "torch", f"torch (tensorrt_llm is {version}; engines need {TRTLLM_VERSION})"
    return "tensorrt", f"tensorrt (tensorrt_llm {version} is installed)"


def _plan_tensorrt(
    options: BuildOptions, checkpoint: Checkpoint, build: BuildConfig, memshare: MemShareConfig
) -> EnginePlan:
    from trtllm_memshare.trtllm.engine.build_plan import SEARCH_ENGINES, EnginePlan, check_plan

    where = options.search_engine or "embedded"
    if where not in SEARCH_ENGINES:
        raise UserError(f"unknown search engine {where} ({nearest(where, SEARCH_ENGINES)})")
    has_search = memshare.searches and not memshare.accept_all
    if options.search_engine is not None and not has_search:
        got = f"preset {memshare.preset}" if options.memshare else "no --memshare"
        raise UserError(
            f"--search-engine is for presets that compare blocks, got {got} (take --memshare --preset aligned, or "
            f"leave out --search-engine)"
        )
    plan = EnginePlan(
        checkpoint,
        build,
        memshare,
        where if has_search else "none",
        options.plugin_library.resolve() if has_search else None,
    )
    check_plan(plan, is_built=options.adopt)
    return plan


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
