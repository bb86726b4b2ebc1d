"""Null pages on disk: the keys, the report for people, and the text that they are calibrated on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trtllm_memshare
from trtllm_memshare.engine.checkpoint import Checkpoint, read_json
from trtllm_memshare.engine.null_page import TARGET_GAP, NullPageSet
from trtllm_memshare.errors import UserError, quote, shorten

KEYS_FILE = "null_pages.safetensors"
REPORT_FILE = "null_pages.json"
TEXT_FILE = "calibration.txt"
"""Beside a checkpoint: text of the kind that it reads and writes, in place of the text that comes with the package."""

_BUNDLED_TEXT = Path(trtllm_memshare.__file__).parent / "assets" / TEXT_FILE
_REBUILD = "build the engine again with --force"
_WEIGHTS = "weights"  # in the keys' file, among the metadata


def calibration_texts(model_dir: Path) -> list[str]:
    """Texts to calibrate a checkpoint on: those of its own ``calibration.txt``, or neutral English ones.

    Texts are parted by lines that hold nothing but ``---``.

    Raises:
      UserError: a file that cannot be read as text.
    """
    own = model_dir / TEXT_FILE
    path = own if own.is_file() else _BUNDLED_TEXT
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} must be text in UTF-8, got {shorten(str(error))} (save it as UTF-8)") from error
    return [part.strip("\n") for part in text.split("\n---\n")]


def save_null_pages(folder: Path, pages: NullPageSet) -> None:
    """Writes the report and the keys into a folder. Raises UserError if it takes none."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {"keys": pages.keys.contiguous(), "gaps": pages.gaps.contiguous(), "bands": torch.from_numpy(pages.bands)}
    text, keys = folder / REPORT_FILE, folder / KEYS_FILE
    text.write_text(json.dumps(report(pages), indent=1) + "\n", encoding="utf-8")
    try:
        save_file(tensors, keys, None if pages.weights is None else {_WEIGHTS: pages.weights})
    except SafetensorError as error:
        raise UserError(f"{keys} cannot be written: {shorten(str(error))}") from error
    keys.chmod(text.stat().st_mode & 0o777)  # safetensors lets nobody else read it


def save_refusal(folder: Path, reason: str) -> None:
    """Notes in an engine directory that the model has no null page, and why."""
    (folder / REPORT_FILE).write_text(json.dumps({"refused": reason}, indent=1) + "\n", encoding="utf-8")


def report(pages: NullPageSet) -> dict[str, Any]:
    """The set's figures by layer, head and band; gaps in nats, lengths in units of K."""
    gaps, lengths = pages.gaps.permute(1, 2, 0), pages.lengths.permute(1, 2, 0)  # band last
    heads_each = gaps.shape[1] // lengths.shape[1]
    return {
        "summary": pages.describe(),
        "bands": pages.bands.tolist(),
        "target_gap": TARGET_GAP,
        "worst_gap": round(float(gaps.max()), 2),
        "median_length": round(float(lengths.median()), 1),
        "longest": round(float(lengths.max()), 1),
        "num_queries": pages.num_queries,
        "num_turned": pages.num_turned,
        "num_lengthened": pages.num_lengthened,
        "near_tokens": pages.near_tokens,
        "num_tokens": pages.num_tokens,
        "layers": [
            {
                "layer": layer,
                "kv_heads": [
                    {
                        "kv_head": group,
                        "lengths": _rounded(lengths[layer, group]),
                        "gaps_by_head": {
                            str(head): _rounded(gaps[layer, head])
                            for head in range(group * heads_each, (group + 1) * heads_each)
                        },
                    }
                    for group in range(lengths.shape[1])
                ],
            }
            for layer in range(len(gaps))
        ],
    }


def load_null_pages(engine_dir: Path, checkpoint: Checkpoint, max_seq_len: int) -> NullPageSet | None:
    """The null pages of an engine; None if it has none.

    Args:
      checkpoint: the model that they have to fit.
      max_seq_len: positions that they have to cover.

    Raises:
      UserError: a damaged file, pages of another model or for shorter texts, or nearer ones than are ever written.
    """
    path = engine_dir / KEYS_FILE
    if not path.is_file():
        return None
    keys, bands, gaps = read_null_pages(path, _REBUILD)
    shape = (len(bands) - 1, checkpoint.num_layers, checkpoint.num_kv_heads, checkpoint.head_dim)
    if tuple(keys.shape) != shape:
        raise UserError(f"{path} should hold finite keys of shape {list(shape)}, got {list(keys.shape)} ({_REBUILD})")
    expected = (*shape[:2], checkpoint.num_attention_heads)
    if gaps is None or tuple(gaps.shape) != expected:
        found = "none" if gaps is None else list(gaps.shape)
        raise UserError(f"{path} should hold gaps of shape {list(expected)}, got {found} ({_REBUILD})")
    if not gaps.max() <= TARGET_GAP:
        raise UserError(
            f"{path} has a page {-float(gaps.max()):.1f} nats below the real keys, expected at least {-TARGET_GAP:.0f} "
            f"({_REBUILD})"
        )
    if bands[-1] < max_seq_len:
        raise UserError(f"{path} covers positions {bands.tolist()}, expected 0 to {max_seq_len} ({_REBUILD})")
    return NullPageSet(keys, bands, gaps)


def read_null_pages(path: Path, remedy: str) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
    """What a file of null pages holds, whatever model it is of.

    Args:
      remedy: what to do about a damaged file, for the error.

    Returns:
      keys float32 ``[num_bands, num_layers, num_kv_heads, head_dim]``; bands int32 ``[num_bands + 1]``, ascending from
      0; gaps float32, which other hosts do without.

    Raises:
      UserError: a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        keys, bands, gaps = tensors["keys"], tensors["bands"], tensors.get("gaps")
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: {shorten(str(error))} ({remedy})") from error
    if keys.ndim != 4 or not keys.is_floating_point() or not torch.isfinite(keys.float()).all():
        expected, found = "[bands, layers, heads, head_dim]", f"{list(keys.shape)[:8]} of {keys.dtype}"
        raise UserError(f"{path} should hold finite keys of shape {expected}, got {found} ({remedy})")
    is_integer = bands.dtype in (torch.int32, torch.int64)
    if bands.ndim != 1 or not is_integer or len(bands) != len(keys) + 1:
        expected, found = f"[{len(keys) + 1}] of integers", f"{list(bands.shape)[:8]} of {bands.dtype}"
        raise UserError(f"{path} should hold borders of bands of shape {expected}, got {found} ({remedy})")
    ends = bands.tolist()
    if ends[0] != 0 or any(a >= b for a, b in itertools.pairwise(ends)) or ends[-1] >= 2**31:
        raise UserError(f"{path} covers positions {quote(ends)}, expected borders that ascend from 0 ({remedy})")
    return keys.float(), bands.numpy().astype(np.int32), None if gaps is None else gaps.float()


def calibrated_on(path: Path, remedy: str) -> str | None:
    """Digest of the weights that a file's null pages were calibrated on; None in files that are older than the digest.

    Raises:
      UserError: a damaged file; ``remedy`` says what to do about it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {shorten(str(error))} ({remedy})") from error


def describe_null_pages(engine_dir: Path) -> str:
    """One line on the null pages of an engine directory: bands and worst gap, or why there are none."""
    path = engine_dir / REPORT_FILE
    if not path.is_file():
        return "none"
    document = read_json(path, f"engine {engine_dir}", _REBUILD)
    refused = document.get("refused")
    return str(document.get("summary", "none")) if refused is None else f"none: {refused}"


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 2) for v in values.tolist()]
