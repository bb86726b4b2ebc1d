"""The model's null pages: loaded by band for the scheduler, held against the model and written by each worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.engine.null_page_files import KEYS_FILE, calibrated_on, read_null_pages
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError

log = logging.getLogger(__name__)

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
    path = _path(folder)
    _, bands, _ = read_null_pages(path, _AGAIN)
    if bands[-1] < max_tokens:
        raise UserError(
            f"{path} covers positions below {bands[-1]}, max_model_len is {max_tokens} (calibrate for longer text or "
            f"lower --max-model-len)"
        )
    return bands[: int(np.searchsorted(bands, max_tokens)) + 1]


def check_weights(folder: str, model: str, model_dir: Path | None) -> None:
    """Holds null pages against the weights that are served: of another model their shape may be right all the same.

    Where one of the two is not known, a warning says so.

    Args:
      folder: where the calibration is.
      model: as the user named it.
      model_dir: its files, None if they are not known.

    Raises:
      UserError: they were calibrated on other weights, or the file is damaged.
    """
    path = _path(folder)
    expected = calibrated_on(path, _AGAIN)
    if expected is None:
        reason = "it does not say on which it was calibrated"
    elif model_dir is None:
        reason = f"no folder with the weights of {model} is found"
    else:
        try:
            found = weights_digest(model_dir)
        except (UserError, OSError) as error:
            reason = str(error)
        else:
            if found != expected:
                raise UserError(
                    f"{path} must be calibrated on the weights of {model}, got null pages of other weights (calibrate "
                    f"this model, from the very files that are served)"
                )
            return
    log.warning(
        "%s is not held against the weights of %s, since %s; null pages of another model of this shape turn text to "
        "garbage under pressure (calibrate again if in doubt)", path, model, reason,
    )  # fmt: skip


def find_weights(model: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """The folder of a served model: itself, or what vLLM has downloaded of a hub's; nothing is fetched."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a hub's
        return None


def load_keys(folder: str, layers: list[Any], tp_rank: int, tp_size: int) -> torch.Tensor:
    """K of each band's null page as this worker holds it, float32 ``[num_bands, num_layers, num_kv_heads, head_dim]``.

    Args:
      folder: where the calibration is.
      layers: vLLM's attention layers, first to last.
      tp_rank, tp_size: this worker's share of the KV heads; with more ranks than KV heads each has a copy of one.

    Raises:
      UserError: the calibration is of a model of another shape.
    """
    keys, _, _ = read_null_pages(_path(folder), _AGAIN)
    num_heads, head_dim = layers[0].num_kv_heads, layers[0].head_size
    total = keys.shape[2] if tp_size > keys.shape[2] else num_heads * tp_size
    if keys.shape[1:] != (len(layers), total, head_dim):
        raise UserError(
            f"{_path(folder)} is of a model with {keys.shape[1]} layers, {keys.shape[2]} KV heads of {keys.shape[3]}, "
            f"the served one has {len(layers)}, {total} of {head_dim} (calibrate this model)"
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
            key = keys[band, index].to(runner.device, runner.kv_cache_dtype)
            rows = key[None].expand(block_size, -1, -1).contiguous()
            layer.impl.do_kv_cache_update(layer, rows, torch.zeros_like(rows), layer.kv_cache, slots)


def attention_layers(runner: Any) -> list[Any]:
    """The model's attention layers that own KV cache, first to last."""
    context = runner.vllm_config.compilation_config.static_forward_context
    names = [name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names]
    return [context[name] for name in sorted(names, key=_layer_index)]


def _layer_index(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _path(folder: str) -> Path:
    path = Path(folder) / KEYS_FILE
    if not path.is_file():
        raise UserError(f"null_pages must name a folder with {KEYS_FILE}, got {folder} (calibrate the model first)")
    return path
