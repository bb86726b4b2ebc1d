"""Reads an engine directory of either backend, and gives it other settings."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from trtllm_memshare.engine.engine_dir import REBUILD, Engine, read_documents, read_torch_engine, write_json
from trtllm_memshare.errors import UserError
from trtllm_memshare.json_input import read_json
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.trtllm.engine.directory import check_search, read_tensorrt_engine


def load_engine(engine_dir: Path) -> Engine:
    """Reads and checks an engine directory; needs neither TensorRT nor a GPU.

    Raises:
      UserError: no such directory, a missing or damaged file, unknown keys, another version, or files that disagree.
    """
    _, document = read_documents(engine_dir)
    return read_tensorrt_engine(engine_dir) if document.get("backend") == "tensorrt" else read_torch_engine(engine_dir)


def check_replaceable(engine_dir: Path) -> None:
    """Raises UserError if ``replace_memshare`` could not write: for those who work for hours before they call it."""
    if not os.access(engine_dir, os.W_OK):
        raise UserError(
            f"engine {engine_dir} cannot be given other settings: no right to write to it (give yourself the right, or "
            f"set --dry-run)"
        )


def replace_memshare(engine_dir: Path, memshare: MemShareConfig) -> Engine:
    """Gives an engine other settings: a reader sees the old file or the new one.

    Raises:
      UserError: the engine cannot be read, was built for another search, or the disk refuses.
    """
    engine, path = load_engine(engine_dir), engine_dir / "memshare.json"
    if engine.record is not None:
        check_search(memshare, engine.record, path)
    document = read_json(path, f"engine {engine_dir}", REBUILD)
    document["memshare"] = memshare.model_dump()
    staging = path.with_name(f".memshare.{uuid.uuid4().hex}")
    try:
        write_json(staging, document)
        os.replace(staging, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error} (make room, or give yourself the right to write)") from error
    finally:
        staging.unlink(missing_ok=True)
    return load_engine(engine_dir)
