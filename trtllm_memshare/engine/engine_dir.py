"""The engine directory: `config.json` in TensorRT-LLM's shape, `memshare.json`, and the model's own files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trtllm_memshare.engine.checkpoint import Checkpoint, check_weights, read_checkpoint, read_json
from trtllm_memshare.errors import UserError, describe_validation_error, nearest
from trtllm_memshare.search.config import MemShareConfig, parse_config

FORMAT_VERSION = 1
TRTLLM_VERSION = "1.2.1"  # whose shape of config.json is written
_REBUILD = "build it again with build_scripts/build_engine.py --force"
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class BuildConfig(BaseModel):
    """What an engine is built for; lengths in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_block: int = 16
    max_batch_size: int = Field(64, ge=1)
    max_seq_len: int = Field(4096, ge=1)
    max_num_tokens: int = Field(2048, ge=1)
    kv_cache_dtype: str = "auto"

    @field_validator("tokens_per_block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not 8 <= value <= 128 or value & (value - 1):
            raise ValueError("must be a power of two between 8 and 128 (set --tokens-per-block 16)")
        return value

    @field_validator("kv_cache_dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value != "auto" and value not in _ELEMENT_BYTES:
            raise ValueError(f"must be one of auto, {', '.join(_ELEMENT_BYTES)} on the torch backend")
        return value


@dataclass(frozen=True)
class Engine:
    """An engine directory that was read and checked."""

    engine_dir: Path
    backend: str
    checkpoint: Checkpoint
    build: BuildConfig
    memshare: MemShareConfig

    @property
    def model_dir(self) -> Path:
        return self.checkpoint.model_dir

    @property
    def vocab_size(self) -> int:
        return self.checkpoint.vocab_size

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.checkpoint.stop_token_ids

    @property
    def kv_dtype(self) -> str:
        """Element type of the pool, e.g. "float32"; ``auto`` follows the model."""
        return self.checkpoint.dtype if self.build.kv_cache_dtype == "auto" else self.build.kv_cache_dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, K and V."""
        c = self.checkpoint
        elements = c.num_layers * 2 * c.num_kv_heads * self.build.tokens_per_block * c.head_dim
        return elements * _ELEMENT_BYTES[self.kv_dtype]


def parse_build_config(values: dict[str, Any], where: str) -> BuildConfig:
    """Validates build settings. Raises UserError naming the key, and the nearest known one for an unknown key."""
    try:
        return BuildConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, BuildConfig.model_fields, where)) from error


def load_engine(engine_dir: Path) -> Engine:
    """Reads an engine directory.

    Raises:
      UserError: no such directory, a missing or damaged file, unknown keys, or another format version.
    """
    if not engine_dir.is_dir():
        raise UserError(
            f"no engine directory at {engine_dir} (build one: python build_scripts/build_engine.py --memshare)"
        )
    remedy = f"the engine directory is damaged: {_REBUILD}"
    config = read_json(engine_dir / "config.json", f"engine {engine_dir}", remedy)
    document = read_json(engine_dir / "memshare.json", f"engine {engine_dir}", remedy)
    path = engine_dir / "memshare.json"
    known = ("format_version", "backend", "memshare", "build")
    for key in document:
        if key not in known:
            raise UserError(f"{path} has an unknown key {key} ({nearest(key, known)})")
    for key in known:
        if key not in document:
            raise UserError(f"{path} lacks {key} ({remedy})")
    if document["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {document['format_version']}, expected {FORMAT_VERSION} ({_REBUILD})"
        )
    if document["backend"] != "torch":
        raise UserError(f"{path} names backend {document['backend']!r}, expected torch ({_REBUILD})")
    if "pretrained_config" not in config or "build_config" not in config:
        raise UserError(f"{engine_dir}/config.json lacks pretrained_config or build_config ({remedy})")
    memshare = parse_config(document["memshare"], str(path))
    build = parse_build_config(document["build"], str(path))
    check_weights(engine_dir / "model")
    return Engine(engine_dir, document["backend"], read_checkpoint(engine_dir / "model"), build, memshare)


def write_engine(
    output_dir: Path, checkpoint: Checkpoint, build: BuildConfig, memshare: MemShareConfig, force: bool
) -> Engine:
    """Writes an engine for the torch backend: all of it, or nothing.

    Raises:
      UserError: the directory exists and ``force`` is False, or it is not an engine directory.
    """
    check_target(output_dir, force)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        _write_json(staging / "config.json", trtllm_config(checkpoint, build))
        document = {
            "format_version": FORMAT_VERSION,
            "backend": "torch",
            "build": build.model_dump(),
            "memshare": memshare.model_dump(),
        }
        _write_json(staging / "memshare.json", document)
        (staging / "model").mkdir()
        for source in checkpoint.model_dir.iterdir():
            if source.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja"):
                _link_or_copy(source, staging / "model" / source.name)
        staging.chmod(0o755)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return load_engine(output_dir)


def check_target(output_dir: Path, force: bool) -> None:
    """Refuses an output directory that holds something else, or an engine unless ``force``."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not (output_dir / "memshare.json").is_file():
        raise UserError(f"{output_dir} exists and is no engine directory (choose another --output-dir)")
    if not force:
        raise UserError(f"{output_dir} holds an engine already (set --force to replace it, or another --output-dir)")


def trtllm_config(checkpoint: Checkpoint, build: BuildConfig) -> dict[str, Any]:
    """`config.json` of an engine directory in TensorRT-LLM's shape, with what it and its tools read."""
    c = checkpoint
    return {
        "version": TRTLLM_VERSION,
        "pretrained_config": {
            "architecture": c.architecture,
            "dtype": c.dtype,
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_size": c.head_dim,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_position_embeddings,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_base": c.rope_theta,
            "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        },
        "build_config": {
            "max_input_len": build.max_seq_len - 1,
            "max_seq_len": build.max_seq_len,
            "max_batch_size": build.max_batch_size,
            "max_beam_width": 1,
            "max_num_tokens": build.max_num_tokens,
            "kv_cache_type": "PAGED",
            "plugin_config": {"tokens_per_block": build.tokens_per_block, "remove_input_padding": True},
        },
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one: weights are large."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
