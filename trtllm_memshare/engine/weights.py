"""Which files hold a checkpoint's weights, and whether they are whole. Reads safetensors headers, nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AGAIN = "copy or download the checkpoint again"


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
      UserError: none there (files that need unpickling do not count), or a damaged index or a missing shard.
    """
    if (model_dir / INDEX).is_file():
        return [model_dir / name for name in sorted(set(_weight_map(model_dir).values()))]
    if (model_dir / "model.safetensors").is_file():
        return [model_dir / "model.safetensors"]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    found = f"found {', '.join(others)}, which can run code when loaded" if others else "found no weights"
    raise UserError(
        f"{model_dir} needs model.safetensors, {found} (convert to safetensors: save_pretrained with transformers)"
    )


def check_weights(model_dir: Path) -> str:
    """Checks that every weight file is whole and holds the tensors that the index promises.

    Returns:
      The element type of the first tensor, e.g. "float32"; the format's own name for types without one here.

    Raises:
      UserError: missing, half-written or damaged weights.
    """
    dtypes, held = [], {}
    for path in weight_files(model_dir):
        header = read_header(path)
        dtypes += [str(entry.get("dtype")) for entry in header.values()]
        held.update(dict.fromkeys(header, path.name))
    if (model_dir / INDEX).is_file():
        lost = sorted(tensor for tensor, name in _weight_map(model_dir).items() if held.get(tensor) != name)
        if lost:
            raise UserError(f"{model_dir / INDEX} names {lost[0]}, which is not in its weight file ({_AGAIN})")
    return _DTYPE_NAMES.get(dtypes[0], dtypes[0])


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file that is as long as it must be.

    The format: 8 bytes with the header's length, the header as JSON, then the data that the offsets point into. A
    header of 200 bytes whose largest offset is 4,096 belongs to a file of 8 + 200 + 4,096 = 4,304 bytes.

    Raises:
      UserError: the header cannot be read, or the file's length is another.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if size >= 8 and 0 < length <= min(size - 8, _LONGEST_HEADER) else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} ({_AGAIN})") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        expected = 8 + length + max(int(entry["data_offsets"][1]) for entry in header.values())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is half-written or damaged: its header cannot be read ({_AGAIN})") from error
    if expected != size:
        raise UserError(f"{path} is half-written or damaged: expected {expected} bytes, got {size} ({_AGAIN})")
    return header


def _weight_map(model_dir: Path) -> dict[str, str]:
    """Tensor name -> shard of the index; every shard is there, in the same directory."""
    path = model_dir / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A path in place of a name would take the engine's files from somewhere else.
        whole = bool(names) and all(Path(name).name == name for name in names.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: expected a weight_map from tensors to file names ({_AGAIN})")
    missing = sorted({name for name in names.values() if not (model_dir / name).is_file()})
    if missing:
        raise UserError(f"{model_dir} lacks {', '.join(missing)} named in {INDEX} ({_AGAIN})")
    return names
