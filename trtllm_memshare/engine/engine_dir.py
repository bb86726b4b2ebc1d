"""The engine directory of the torch backend: what is in it, how it is read, checked and written.

Those of the TensorRT backend are TensorRT-LLM's own, with a memshare.json; see ``trtllm.engine.directory``.

The layout::

    config.json     TensorRT-LLM's shape: version, pretrained_config, build_config with plugin_config
    memshare.json   format_version, backend, memshare (the settings), torch (the pool's type, a digest of weights)
    model/          the checkpoint: weights as hard links where the file system allows them, the rest copied
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.build_config import BuildConfig, parse_build_config
from trtllm_memshare.engine.checkpoint import ADAPTER, ELEMENT_BYTES, Checkpoint, portable_config, read_checkpoint
from trtllm_memshare.engine.replacement import find_retired, replace_engine
from trtllm_memshare.engine.tensorrt_record import TensorRTRecord
from trtllm_memshare.engine.weights import INDEX, SINGLE, weight_files, weights_digest
from trtllm_memshare.errors import UserError, nearest, quote
from trtllm_memshare.json_input import read_json
from trtllm_memshare.search.config import MemShareConfig, parse_config

FORMAT_VERSION = 1
TRTLLM_VERSION = "1.2.1"  # whose shape of config.json is written
KV_ELEMENT_BYTES = {**ELEMENT_BYTES, "fp8": 1, "int8": 1}
REBUILD = "build it again with build_scripts/build_engine.py --force"
_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # tokenizer and settings; never code


@dataclass(frozen=True)
class Engine:
    """An engine directory that was read and checked, or is about to be written.

    Attributes:
      checkpoint: facts of the model; ``checkpoint.model_dir`` is where the weights and the tokenizer are.
      record: versions, GPU and plugin that a TensorRT engine was built with; None for the torch backend.
    """

    engine_dir: Path
    backend: str
    checkpoint: Checkpoint
    build: BuildConfig
    memshare: MemShareConfig
    record: TensorRTRecord | None = None

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
        """Bytes of one block over all layers, K and V.

        4 layers, 2 KV heads of 32, 16 tokens, float32: 4 * 2 * 2 * 16 * 32 * 4 = 32,768.
        """
        c = self.checkpoint
        elements = c.num_layers * 2 * c.num_kv_heads * self.build.tokens_per_block * c.head_dim
        return elements * KV_ELEMENT_BYTES[self.kv_dtype]


def read_documents(engine_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and memshare.json of an engine directory. Raises UserError if one is missing or damaged."""
    if not engine_dir.is_dir():
        if (retired := find_retired(engine_dir)) is not None:
            raise UserError(
                f"no engine directory at {engine_dir}: a build was killed while it replaced it (move {retired} back, "
                f"or {REBUILD})"
            )
        raise UserError(
            f"no engine directory at {engine_dir} (build one: python build_scripts/build_engine.py --memshare)"
        )
    remedy = f"the engine directory is damaged: {REBUILD}"
    names = ("config.json", "memshare.json")
    config, document = (read_json(engine_dir / name, f"engine {engine_dir}", remedy) for name in names)
    return config, document


def read_torch_engine(engine_dir: Path) -> Engine:
    """Reads and checks an engine directory of the torch backend; ``runners.engines`` reads those of both.

    Raises:
      UserError: no such directory, a missing or damaged file, unknown keys, another version, or files that disagree.
    """
    config, document = read_documents(engine_dir)
    remedy, path = f"the engine directory is damaged: {REBUILD}", engine_dir / "memshare.json"
    check_keys(document, ("format_version", "backend", "memshare", "torch"), f"{path}", remedy)
    if document["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {quote(document['format_version'])}, expected {FORMAT_VERSION} ({REBUILD})"
        )
    if document["backend"] != "torch":
        raise UserError(f"{path} names backend {quote(document['backend'])}, expected torch or tensorrt ({REBUILD})")
    facts, built_with = document["torch"], None
    if isinstance(facts, dict) and "weights" in facts:  # engines of before have none
        facts, built_with = {k: v for k, v in facts.items() if k != "weights"}, facts["weights"]
    check_keys(facts, ("kv_cache_dtype",), f"{path}: torch", remedy)
    memshare = parse_config(document["memshare"], str(path))
    try:
        checkpoint = read_checkpoint(engine_dir / "model")
    except UserError as error:
        raise UserError(f"engine {engine_dir} is damaged, {REBUILD}: {error}") from error
    if built_with is not None and built_with != weights_digest(engine_dir / "model"):
        raise UserError(
            f"engine {engine_dir} has other weights than it was built with: links to a checkpoint that was written "
            f"over, and null pages are those of the old ones ({REBUILD})"
        )
    build = read_build(config, facts["kv_cache_dtype"], engine_dir / "config.json", remedy)
    build.check_backend("torch")
    # Runners take the model's facts from model/config.json: a config.json that says otherwise is no description of it.
    _check_same(trtllm_config(checkpoint, build), config, f"{engine_dir / 'config.json'}: ", remedy)
    return Engine(engine_dir, document["backend"], checkpoint, build, memshare)


def write_engine(
    output_dir: Path,
    checkpoint: Checkpoint,
    build: BuildConfig,
    memshare: MemShareConfig,
    force: bool,
    check: Callable[[Engine], object] | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> Engine:
    """Writes an engine for the torch backend: all of it, or nothing.

    Args:
      add: puts what else belongs to the engine into the folder it is given.

    Raises:
      UserError: see ``replace_engine``.
    """

    def fill(folder: Path) -> None:
        _fill(folder, checkpoint, build, memshare)
        add(folder)

    return replace_engine(output_dir, force, fill, read_torch_engine, check)


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
            "mapping": {
                "world_size": build.tp_size * build.pp_size,
                "tp_size": build.tp_size,
                "pp_size": build.pp_size,
            },
            "quantization": {"quant_algo": build.quantization, "kv_cache_quant_algo": None},
        },
        "build_config": {
            "max_input_len": build.max_seq_len - 1,
            "max_seq_len": build.max_seq_len,
            "max_batch_size": build.max_batch_size,
            "max_beam_width": 1,
            "max_num_tokens": build.max_num_tokens,
            "kv_cache_type": "PAGED",
            "plugin_config": {
                "tokens_per_block": build.tokens_per_block,
                "paged_kv_cache": True,
                "remove_input_padding": True,
            },
        },
    }


def _fill(folder: Path, checkpoint: Checkpoint, build: BuildConfig, memshare: MemShareConfig) -> None:
    (folder / "model").mkdir(parents=True)
    write_json(folder / "config.json", trtllm_config(checkpoint, build))
    document = {
        "format_version": FORMAT_VERSION,
        "backend": "torch",
        "memshare": memshare.model_dump(),
        "torch": {"kv_cache_dtype": build.kv_cache_dtype, "weights": weights_digest(checkpoint.model_dir)},
    }
    write_json(folder / "memshare.json", document)
    copy_small_files(checkpoint.model_dir, folder / "model", checkpoint.dtype)
    for source in weight_files(checkpoint.model_dir):
        link_or_copy(source, folder / "model" / source.name)


def copy_small_files(model_dir: Path, target: Path, dtype: str) -> None:
    """Copies a checkpoint's settings and tokenizer: an edit of the checkpoint must not change engines built from it."""
    for source in model_dir.iterdir():
        is_unread = (
            source.name == ADAPTER
            or source.name.endswith(".bin.index.json")
            or (source.name == INDEX and (model_dir / SINGLE).is_file())  # see ``weight_files``
        )
        if source.suffix in _COPIED and source.is_file() and not is_unread:
            shutil.copy2(source, target / source.name)
    config = read_json(model_dir / "config.json", "the checkpoint", "copy the checkpoint again")
    # The dtype is written down: transformers would take the first tensor's where the file names none.
    write_json(target / "config.json", {**portable_config(config), "dtype": dtype})


def read_build(config: dict[str, Any], kv_cache_dtype: Any, path: Path, remedy: str) -> BuildConfig:
    """Build settings from config.json. Raises UserError for another version, or a key missing or out of range."""
    if config.get("version") != TRTLLM_VERSION:
        raise UserError(
            f"{path} has version {quote(config.get('version'))}, expected {quote(TRTLLM_VERSION)} ({REBUILD})"
        )
    try:
        section, model = config["build_config"], config["pretrained_config"]
        values = {
            "tokens_per_block": section["plugin_config"]["tokens_per_block"],
            **{key: section[key] for key in ("max_batch_size", "max_seq_len", "max_num_tokens")},
            "kv_cache_dtype": kv_cache_dtype,
            "quantization": model["quantization"]["quant_algo"],
            "tp_size": model["mapping"]["tp_size"],
            "pp_size": model["mapping"]["pp_size"],
        }
    except (KeyError, TypeError) as error:
        missing = f"lacks {error.args[0]}" if isinstance(error, KeyError) else "has a value in place of an object"
        raise UserError(f"{path} {missing} ({remedy})") from error
    return parse_build_config(values, str(path))


def check_keys(document: Any, known: tuple[str, ...], where: str, remedy: str) -> None:
    """Every known key and no other."""
    if not isinstance(document, dict):
        raise UserError(f"{where} must be an object, got {type(document).__name__} ({remedy})")
    for key in document:
        if key not in known:
            raise UserError(f"{where} has an unknown key {key} ({nearest(key, known)}): correct it, or {REBUILD}")
    for key in known:
        if key not in document:
            raise UserError(f"{where} lacks {key} ({remedy})")


def _check_same(expected: Any, got: Any, where: str, remedy: str) -> None:
    """Names the first place at which two documents differ; ``where`` is a prefix such as "config.json: "."""
    if isinstance(expected, dict):
        check_keys(got, tuple(expected), where.rstrip(": ."), remedy)
        for key, value in expected.items():
            _check_same(value, got[key], f"{where}{key}" + ("." if isinstance(value, dict) else ""), remedy)
    elif expected != got:
        raise UserError(f"{where} is {quote(got)}, expected {quote(expected)} for the model in the engine ({remedy})")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file for people too."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one: weights are large."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
