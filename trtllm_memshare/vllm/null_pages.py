"""The model's null pages: loaded by band for the scheduler, and written by each worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.engine.null_page_files import KEYS_FILE, read_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.cache_elements import null_key_elements, write_elements
from trtllm_memshare.vllm.groups import find_full_group

_AGAIN = "calibrate the model again"


def load_bands(folder: str | None, max_tokens: int) -> np.ndarray:
    """First position of each band that a request of ``max_tokens`` can reach, and the last one's end.

    Args:
      folder: where the calibration is; None has one band, whose page nobody may read.

    Returns:
      int32 ``[num_bands + 1]``.

    Raises:
      UserError: no such file, a damaged one, or the bands end before ``max_tokens``.
    """
    if folder is None:
        return np.array([0, max_tokens], np.int32)
    path = null_page_file(folder)
    _, bands, _ = read_null_pages(path, _AGAIN)
    if bands[-1] < max_tokens:
        raise UserError(
            f"{path} covers positions below {bands[-1]}, max_model_len is {max_tokens} (calibrate for longer text or "
            f"lower --max-model-len)"
        )
    return bands[: int(np.searchsorted(bands, max_tokens)) + 1]


def load_keys(folder: str, layers: list[Any], tp_rank: int, tp_size: int) -> torch.Tensor:
    """K of each band's null page as this worker holds it, float32 ``[num_bands, num_layers, num_kv_heads, head_dim]``.

    Args:
      folder: where the calibration is.
      layers: vLLM's attention layers, first to last.
      tp_rank, tp_size: this worker's share of the KV heads; with more ranks than KV heads each has a copy of one.

    Raises:
      UserError: the calibration is of a model of another shape.
    """
    keys, _, _ = read_null_pages(null_page_file(folder), _AGAIN)
    num_heads, head_dim = layers[0].num_kv_heads, layers[0].head_size
    total = keys.shape[2] if tp_size > keys.shape[2] else num_heads * tp_size
    if keys.shape[1:] != (len(layers), total, head_dim):
        raise UserError(
            f"{null_page_file(folder)} is of a model with {keys.shape[1]} layers, {keys.shape[2]} KV heads of "
            f"{keys.shape[3]}, the served one has {len(layers)}, {total} of {head_dim} (calibrate this model)"
        )
    first = tp_rank * num_heads if tp_size <= total else tp_rank * total // tp_size  # as vLLM deals heads out
    return keys[:, :, first : first + num_heads]


def write_null_pages(runner: Any, keys: torch.Tensor, block_ids: list[int]) -> None:
    """Writes K and V of each band's null page into its block, through the attention backend's own operator.

    Args:
      runner: vLLM's model runner, KV cache in place; its cache is modified.
      keys: see ``load_keys``.
      block_ids: a block for each band, from the scheduler.
    """
    block_size = runner.cache_config.block_size
    for band, block_id in enumerate(block_ids):
        slots = torch.arange(
            block_id * block_size, (block_id + 1) * block_size, dtype=torch.int64, device=runner.device
        )
        for index, layer in enumerate(attention_layers(runner)):
            rows = null_key_elements(keys[band, index], layer).float()[None].repeat(block_size, 1, 1)
            write_elements(layer, rows, torch.zeros_like(rows), slots)


def attention_layers(runner: Any) -> list[Any]:
    """The model's layers of full attention that own KV cache, first to last; not those that read another one's."""
    context = runner.vllm_config.compilation_config.static_forward_context
    groups = runner.kv_cache_config.kv_cache_groups
    names = groups[find_full_group(groups)].layer_names
    layers = [context[name] for name in sorted(names, key=_layer_index)]
    return [layer for layer in layers if getattr(layer, "kv_sharing_target_layer_name", None) is None]


def _layer_index(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def null_page_file(folder: str) -> Path:
    """The file in a folder that calibration wrote. Raises UserError if it is not there."""
    path = Path(folder) / KEYS_FILE
    if not path.is_file():
        raise UserError(f"null_pages must name a folder with {KEYS_FILE}, got {folder} (calibrate the model first)")
    return path
