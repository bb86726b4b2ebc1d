"""The null pages' part of a build: loads the model, reads the text to it, and says what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.engine.null_page import NullPageSet, calibrate_null_pages
from trtllm_memshare.engine.null_page_files import calibration_texts
from trtllm_memshare.engine.tensors import key_mapping

_POOL_TYPES = {"fp8": torch.float8_e4m3fn}
"""Names of pool types that torch calls otherwise."""


def calibrate_checkpoint(model_dir: Path, max_seq_len: int, kv_dtype: str) -> NullPageSet:
    """Null pages of a checkpoint, for positions below ``max_seq_len``.

    Runs on a GPU if there is one, in the checkpoint's own precision; products and sums are float32.

    Args:
      kv_dtype: element type of the pool by its name in the build settings, e.g. "bfloat16" or "fp8".

    Raises:
      NullPageRefused: see ``calibrate_null_pages``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        key_mapping=key_mapping(model_dir),
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    longest = int(model.config.max_position_embeddings)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in calibration_texts(model_dir)]
    dtype = _POOL_TYPES.get(kv_dtype) or getattr(torch, kv_dtype)
    return calibrate_null_pages(model, texts, max_seq_len, dtype)
