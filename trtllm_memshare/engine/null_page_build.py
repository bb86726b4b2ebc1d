"""The null pages' part of a build: loads the model, reads the text to it, and says what came of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from trtllm_memshare.engine.checkpoint import excluded_attention, refuse_adapter
from trtllm_memshare.engine.load import check_loaded, load_decoder
from trtllm_memshare.engine.null_page import NullPageRefused, NullPageSet, calibrate_null_pages
from trtllm_memshare.engine.null_page_files import KEYS_FILE, calibration_texts, save_null_pages, save_refusal
from trtllm_memshare.engine.rope import check_rope
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.json_input import read_json
from trtllm_memshare.search.config import MemShareConfig

_MOST_POSITIONS = 1 << 24  # no model reads as many
_POOL_TYPES = {
    "auto": None,  # the checkpoint's
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,  # vLLM has both names
    "int8": torch.int8,
}


def add_null_pages(
    folder: Path, model_dir: Path, max_seq_len: int, kv_dtype: str, memshare: MemShareConfig, skips_entries: bool
) -> None:
    """Calibrates null pages and writes them into an engine directory, if retired pages are to become null.

    Args:
      folder: the engine directory; modified.
      model_dir: the checkpoint, with weights.
      skips_entries: whether the engine's runner forgets entries without a block, so that a model that has no null page
        is served all the same. The reason is then written down in place of the pages.

    Raises:
      NullPageRefused: no null page is found and the runner needs one.
    """
    if not memshare.forgets:
        return
    try:
        pages = calibrate_checkpoint(model_dir, max_seq_len, kv_dtype)
    except NullPageRefused as refusal:
        if not skips_entries or memshare.read_null:
            raise
        save_refusal(folder, str(refusal))
    else:
        save_null_pages(folder, pages)


def make_null_pages(model: str, output: str, max_seq_len: int, kv_dtype: str, without: str) -> None:
    """Calibrates a checkpoint's null pages, writes them into a folder and prints what came of it.

    Args:
      model: folder of the checkpoint.
      output: folder; made where it is missing.
      max_seq_len, kv_dtype: see ``calibrate_checkpoint``.
      without: what to do where the model has no null page, for the error.

    Raises:
      UserError: see ``calibrate_checkpoint``; or the model has no null page.
    """
    folder = Path(output)
    if not output or (folder / KEYS_FILE).is_dir():
        raise UserError(f"--output must be a folder that can have the file {KEYS_FILE}, got {quote(output)}")
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that it takes
    try:
        pages = calibrate_checkpoint(Path(model), max_seq_len, kv_dtype)
    except NullPageRefused as refusal:
        raise UserError(f"{refusal.reason} ({without})") from refusal
    save_null_pages(folder, pages)
    print(f"null pages: {pages.describe()}")


def calibrate_checkpoint(model_dir: Path, max_seq_len: int, kv_dtype: str) -> NullPageSet:
    """Null pages of a checkpoint, for positions below ``max_seq_len``.

    Runs on a GPU if there is one, in the checkpoint's own precision; products and sums are float32.

    Args:
      kv_dtype: element type of the pool by its name in the build settings, e.g. "bfloat16" or "fp8"; "auto" is the
        checkpoint's.

    Raises:
      UserError: no positions, a type that no pool has, a model whose rotations change, or weights that are not all
        there.
      NullPageRefused: a model with other layers than those of full attention, or see ``calibrate_null_pages``.
    """
    from transformers import AutoTokenizer

    if kv_dtype not in _POOL_TYPES:
        raise UserError(
            f"the KV cache's element type must be one of {', '.join(_POOL_TYPES)}, got {shorten(kv_dtype)} "
            f"(name the one that the server will use)"
        )
    if not 1 <= max_seq_len <= _MOST_POSITIONS:
        raise UserError(
            f"positions that need a null page must be from 1 to {_MOST_POSITIONS}, got {max_seq_len} (give the longest "
            f"text that is to be served, in tokens)"
        )
    if not model_dir.is_dir():
        raise UserError(
            f"a model must be a folder with its checkpoint, got {shorten(str(model_dir))} (download it first)"
        )
    # Not ``read_checkpoint``: other hosts serve architectures and quantized weights that our executor does not.
    config = read_json(model_dir / "config.json", "the checkpoint", "name a Hugging Face checkpoint")
    excluded = excluded_attention(config, model_dir)
    if excluded is not None:
        raise NullPageRefused(excluded, "take a model without such")
    check_rope(config, model_dir / "config.json")
    refuse_adapter(model_dir)
    model, report = load_decoder(model_dir)
    check_loaded(model_dir, report, "copy or download the checkpoint again")
    if not all(hasattr(layer, "self_attn") for layer in model.model.layers):
        raise NullPageRefused(f"{model_dir} has layers without attention", "take a model without such")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    longest = int(model.config.max_position_embeddings)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in calibration_texts(model_dir)]
    pages = calibrate_null_pages(model, texts, max_seq_len, _POOL_TYPES[kv_dtype] or model.dtype)
    return replace(pages, weights=weights_digest(model_dir))
