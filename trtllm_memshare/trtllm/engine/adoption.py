"""Makes an engine that trtllm-build left an engine directory of this project: whole, or as it was.

The engine is one of ``model_cls.py``'s classes, or any other with ``--search-engine separate``. What TensorRT-LLM wrote
is linked into the new directory, never written to; what is in the directory besides stays in it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import Checkpoint
from trtllm_memshare.engine.engine_dir import Engine, link_or_copy
from trtllm_memshare.engine.null_page_files import KEYS_FILE, REPORT_FILE
from trtllm_memshare.engine.replacement import refuse_working_directory, replace_engine
from trtllm_memshare.engine.tensorrt_record import PLUGIN_FILE, SEARCH_ENGINE_FILE
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.json_input import read_json
from trtllm_memshare.trtllm.engine.build_plan import QUANTIZATIONS, EnginePlan
from trtllm_memshare.trtllm.engine.builder import (
    find_plugin_library,
    gpu_capability,
    make_record,
    write_memshare_files,
    write_null_pages,
)
from trtllm_memshare.trtllm.engine.directory import read_facts, read_tensorrt_engine, spec_of
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.plan_check import check_rank_engine
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins
from trtllm_memshare.trtllm.engine.search_engine import build_search_engine

_OURS = ("memshare.json", "model", PLUGIN_FILE, SEARCH_ENGINE_FILE, KEYS_FILE, REPORT_FILE)
"""What adopting writes; all of it is written anew."""

_REMEDY = "name the checkpoint that the engine was built from with --model-dir, or build the engine again"


def check_adoptable(engine_dir: Path, force: bool) -> None:
    """Refuses a directory without an engine of TensorRT-LLM, and with ``force`` False one that would lose a file.

    Raises:
      UserError: see above.
    """
    for name in ("config.json", "rank0.engine"):
        if not (engine_dir / name).is_file():
            raise UserError(
                f"there is no engine to adopt at {engine_dir}: it has no {name} (build one with trtllm-build, or leave "
                f"out --adopt)"
            )
    refuse_working_directory(engine_dir)
    there = [name for name in _OURS[:2] if (engine_dir / name).exists()]
    if there and not force:
        raise UserError(
            f"{engine_dir} holds {there[0]} already, which --adopt would replace (set --force if it may, or leave out "
            f"--adopt)"
        )


def read_adoptable(
    engine_dir: Path, force: bool, checkpoint: Checkpoint, asked: dict[str, Any]
) -> tuple[Checkpoint, BuildConfig]:
    """What the engine that is to be adopted was built for; writes nothing.

    Args:
      checkpoint: the model that it is said to be built from.
      asked: build settings that were given.

    Returns:
      See ``read_facts``.

    Raises:
      UserError: see ``check_adoptable``; an engine of another model, or for other sizes than were asked for.
    """
    check_adoptable(engine_dir, force)
    where = engine_dir / "config.json"
    checkpoint, build = read_facts(engine_dir, read_json(where, f"engine {engine_dir}", _REMEDY), checkpoint, _REMEDY)
    for name, value in asked.items():
        built = getattr(build, name)
        # The engine names quantizations as TensorRT-LLM does, and a cache of the model's own type auto.
        same = {built, checkpoint.dtype} if name == "kv_cache_dtype" and built == "auto" else {built}
        if (QUANTIZATIONS.get(value, value) if name == "quantization" else value) not in same:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{name} of the engine to adopt is {quote(built)} by {where}, got {quote(value)} (leave out {option}: "
                f"an engine keeps what it was built for)"
            )
    return checkpoint, build


def adopt_engine(plan: EnginePlan, engine_dir: Path, force: bool) -> Engine:
    """Adds what this project needs to an engine: memshare.json, plugin library, tokenizer, null pages.

    Raises:
      UserError: see ``check_adoptable``, or a plan that is not what the files say; everything is as it was then.
    """
    trt = import_tensorrt()
    capability = gpu_capability()
    load_trtllm_plugins(trt)
    if plan.search_engine != "none":
        load_memshare_plugin(trt, find_plugin_library(plan))
    record = make_record(plan, trt.__version__, capability)
    engine = Engine(engine_dir, "tensorrt", plan.checkpoint, plan.build, plan.memshare, record)
    for rank in range(plan.num_ranks):
        check_rank_engine(trt, engine, rank)

    def fill(folder: Path) -> None:
        _link_all(engine_dir, folder)
        (folder / "model").mkdir()
        write_memshare_files(plan, folder, record)
        if plan.search_engine == "separate":
            (folder / SEARCH_ENGINE_FILE).write_bytes(build_search_engine(trt, spec_of(engine), plan.max_pairs))
        write_null_pages(plan, folder)

    return replace_engine(engine_dir, force, fill, read_tensorrt_engine, refuse=check_adoptable)


def _link_all(source: Path, target: Path) -> None:
    """Links every file but those that are written anew: plans take gigabytes."""

    def leave_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in _OURS] if Path(folder) == source else []

    def link(here: str, there: str) -> None:
        link_or_copy(Path(here), Path(there))

    shutil.copytree(os.fspath(source), target, symlinks=True, ignore=leave_out, copy_function=link)
