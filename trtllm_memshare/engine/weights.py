"""Which files hold a checkpoint's weights, whether they are whole, and what lies in them.

Reads safetensors headers, nothing more. Whether the tensors are those of the model: see ``tensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.json_input import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LONGEST_HEADER = 16 * 2**20  # bytes; about 100,000 tensors. The format allows 100 MB, which is slow to parse.
_SAMPLED_BYTES = 256  # of each tensor
_AGAIN = "copy or download the checkpoint again"
_ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor. ``dtype``: the format's own name, e.g. "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file if it is there, else the shards of the index, as transformers.

    Raises:
      UserError: none there (files that need unpickling do not count), or a damaged index or a missing shard.
    """
    if (model_dir / SINGLE).is_file():
        return [model_dir / SINGLE]
    if (model_dir / INDEX).is_file():
        return [model_dir / name for name in sorted(set(_weight_map(model_dir).values()))]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    found = f"found {shorten(', '.join(others))}, which can run code when loaded" if others else "found no weights"
    raise UserError(f"{model_dir} needs {SINGLE}, {found} (convert to safetensors: save_pretrained with transformers)")


def which_files(model_dir: Path) -> str | None:
    """Says which files were taken where there is a choice; None where there is none."""
    if (model_dir / SINGLE).is_file() and (model_dir / INDEX).is_file():
        return f"weights: {SINGLE} is taken, {INDEX} beside it is not read (as transformers does)"
    return None


def stored_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by its stored name; every file is whole and holds what the index promises.

    Raises:
      UserError: missing, half-written or damaged weights, or one tensor in two files.
    """
    files = weight_files(model_dir)
    held: dict[str, StoredTensor] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in held:
                raise UserError(f"{model_dir} holds {shorten(name)} twice, in {held[name].file} and {path.name}")
            held[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), path.name)
    if files[0].name != SINGLE:
        promised = _weight_map(model_dir)
        lost = sorted(name for name, file in promised.items() if name not in held or held[name].file != file)
        if lost:
            raise UserError(f"{model_dir / INDEX} names {shorten(lost[0])}, which is not in its weight file ({_AGAIN})")
    return held


def main_dtype(tensors: dict[str, StoredTensor]) -> str:
    """The type of most elements, e.g. "bfloat16"; the format's own name for types without one here.

    Norms that were kept in float32 do not make a float32 model.
    """
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += prod(tensor.shape)
    most = elements.most_common(1)[0][0]
    return DTYPE_NAMES.get(most, most)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file that is as long as it must be.

    The format: 8 bytes with the header's length, the header as JSON, then the data that the offsets point into. A
    header of 200 bytes whose largest offset is 4,096 belongs to a file of 8 + 200 + 4,096 = 4,304 bytes.

    Raises:
      UserError: the header cannot be read, a tensor's bytes do not fit its shape, or the file's length is another.
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
        unlike = next((name for name, entry in header.items() if not _is_consistent(entry)), None)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is half-written or damaged: its header cannot be read ({_AGAIN})") from error
    if unlike is not None:
        raise UserError(
            f"{path} is damaged: the bytes of {shorten(unlike)} do not fit its shape {quote(header[unlike]['shape'])} "
            f"({_AGAIN})"
        )
    if expected != size:
        raise UserError(f"{path} is half-written or damaged: expected {quote(expected)} bytes, got {size} ({_AGAIN})")
    return header


def weights_digest(model_dir: Path) -> str:
    """Tells one checkpoint's weights from others of the same shapes: names, shapes, and some bytes of every tensor.

    Reads little, so that it can be asked at every start: another training run leaves no tensor as it was.

    Raises:
      UserError: see ``stored_tensors``.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in weight_files(model_dir):
        header = read_header(path)
        digest.update(json.dumps(header, sort_keys=True).encode())
        with path.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
            for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
                first = max(start, (start + stop - _SAMPLED_BYTES) // 2)  # from the middle: padding lies at the ends
                file.seek(data + first)
                digest.update(file.read(min(_SAMPLED_BYTES, stop - first)))
    return digest.hexdigest()


def _is_consistent(entry: dict[str, Any]) -> bool:
    """Raises what ``read_header`` catches if a part is missing or of another type."""
    start, stop = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in [*shape, start, stop]):
        return False
    bytes_each = _ELEMENT_BYTES.get(dtype)  # None: a packed type, which no model here uses
    return start <= stop and len(shape) <= 8 and (bytes_each is None or stop - start == prod(shape) * bytes_each)


def _weight_map(model_dir: Path) -> dict[str, str]:
    """Tensor name -> shard of the index; every shard is there, in the same directory."""
    path = model_dir / INDEX
    names = read_json(path, "the checkpoint", _AGAIN).get("weight_map")
    # A path in place of a name would take the engine's files from somewhere else.
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(n, str) and 0 < len(n) <= 255 and Path(n).name == n for n in names.values())
    ):
        raise UserError(f"{path} is damaged: expected a weight_map from tensors to file names ({_AGAIN})")
    missing = sorted({name for name in names.values() if not (model_dir / name).is_file()})
    if missing:
        raise UserError(f"{model_dir} lacks {shorten(', '.join(missing))} named in {INDEX} ({_AGAIN})")
    return names
