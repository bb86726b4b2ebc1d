"""The header of a GGUF file, walked through before a library reads it: everything it announces lies in the file.

The reader of the ``gguf`` package follows any length that a header gives: an array of 2**60 elements, from a damaged or
a hostile file, takes all memory. Here time and memory are bounded by ``MAX_HEADER_BYTES`` and ``MAX_ELEMENTS``.

Layout, little-endian (ggml's docs/gguf.md, versions 2 and 3)::

    "GGUF" | u32 version | u64 tensors | u64 pairs
    pairs:    string key | u32 type | value      string: u64 length | bytes      array: u32 type | u64 count | values
    tensors:  string name | u32 dimensions | u64 size of each | u32 type | u64 offset behind the header
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 64 * 2**20
"""Names, metadata and tokenizer: a vocabulary of 256,000 tokens with its merges takes a quarter."""
MAX_ELEMENTS = 4_000_000
"""Of all arrays together; the same vocabulary has 1.3 million."""

_VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number."""
_STRING, _ARRAY = 8, 9
_COUNTS = (2, 3, 4, 5, 10, 11)  # types of integers of 2, 4 and 8 bytes
_MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_NUM_PARTS = b"split.count"
_BLOCK_COUNT = re.compile(rb"[^.]*\.block_count")
"""Of any architecture: transformers takes that of another one too. ``x.vision.block_count`` is an image tower's."""
_BLOCK = re.compile(rb"blk\.(\d{1,4})\.")
_ATTENTION = re.compile(rb"[^.]*\.(rope\.scaling\.type|rope\.scaling\.factor|rope\.scale_linear"
                        rb"|attention\.sliding_window|context_length)")  # fmt: skip
"""Keys of any architecture that say what a token attends to and how it is rotated."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ROTATIONS = re.compile(rb"rope_(freqs|factors_long|factors_short)\b")


def check_gguf_header(path: Path) -> list[str]:
    """Checks the header of a GGUF file, and that transformers leaves out nothing that attention depends on.

    transformers reads the weights and the base of the rotation, but neither scaled rotations nor sliding windows: a
    model with one would come out as one without.

    Returns:
      The names of the file's tensors.

    Raises:
      UserError: no GGUF file, a header that announces more than there is, or a rotation or window that would be lost.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_HEADER_BYTES)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} (give --model-dir a GGUF file or a folder)") from error
    if data[:4] != MAGIC:
        raise UserError(f"{path} is no GGUF file: it must start with {MAGIC!r}, got {data[:4]!r} (download it again)")
    try:
        header = _Header(data, size)
        num_parts = header.walk()
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error} (download it again)") from error
    if num_parts > 1:
        raise UserError(
            f"{path} is one of {num_parts} files that hold a model together, expected one file with all of it (merge "
            f"them with gguf-split --merge)"
        )
    if lost := header.lost_in_reading():
        raise UserError(
            f"{path} has {lost}, which is not read from GGUF files: the model would compute something else (take its "
            f"Hugging Face checkpoint)"
        )
    return [name.decode("utf-8", "replace") for name in header.tensors]


class _Header:
    """A place in the bytes of a header that only moves forward."""

    def __init__(self, data: bytes, file_size: int) -> None:
        self._data, self._file_size, self._place = data, file_size, len(MAGIC)
        self._elements_left = MAX_ELEMENTS
        self.tensors: list[bytes] = []
        self._attention: dict[str, Any] = {}  # by the key without its architecture

    def walk(self) -> int:
        """Number of files that the model is split into; raises ValueError at the first thing that cannot be."""
        (version,) = self._take("<I")
        if version not in _VERSIONS:
            raise ValueError(f"its version must be one of {_VERSIONS}, got {version}")
        num_tensors, num_pairs = self._take("<QQ")
        announced, stored, num_parts = set[int](), 0, 0
        for _ in range(num_pairs):  # ends where the data ends: each takes at least 12 bytes
            key = self._take_string()
            (kind,) = self._take("<I")
            start = self._place
            self._skip_values(kind, 1)
            if found := _ATTENTION.fullmatch(key):
                self._attention[found[1].decode()] = self._value(kind, start)
            if kind in _COUNTS and (key == _NUM_PARTS or _BLOCK_COUNT.fullmatch(key)):
                value = int.from_bytes(self._data[start : self._place], "little")
                if key == _NUM_PARTS:
                    num_parts = value
                else:
                    announced.add(value)
        for _ in range(num_tensors):
            self.tensors.append(self._take_string())
            if found := _BLOCK.match(self.tensors[-1]):
                stored = max(stored, int(found[1]) + 1)
            (dimensions,) = self._take("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor must have at most {_MAX_DIMENSIONS} dimensions, got {dimensions}")
            self._take(f"<{dimensions}Q")
            _, offset = self._take("<IQ")
            if offset > self._file_size:
                raise ValueError(f"a tensor begins at byte {offset}, of {self._file_size}")
        for count in announced:
            if num_parts < 2 and stored and count != stored:  # each is built before a weight is read
                raise ValueError(f"its block_count is {count}, its tensors are of {stored} blocks")
        return num_parts

    def lost_in_reading(self) -> str:
        """What of the attention transformers would leave out, in words; empty if nothing."""
        for name in self.tensors:
            if _ROTATIONS.match(name):
                return f"scaled rotations (tensor {name.decode('utf-8', 'replace')})"
        said = self._attention
        # As llama.cpp reads it: a factor without a type is linear, and a factor of 0 or none is 1.
        kind = said.get("rope.scaling.type", "linear")
        factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1
        if kind != "none" and (kind != "linear" or factor != 1):
            return f"scaled rotations (rope.scaling.type {quote(kind)}, factor {quote(factor)})"
        window, length = said.get("attention.sliding_window") or 0, said.get("context_length") or 0
        if window and (not isinstance(window, int) or not isinstance(length, int) or window < length):
            return f"a sliding window (attention.sliding_window {quote(window)}, context_length {quote(length)})"
        return ""

    def _value(self, kind: int, start: int) -> Any:
        """The text or number that was walked over from ``start`` on; of an array, that it is one."""
        data = self._data[start : self._place]
        if kind == _STRING:
            return data[8:].decode("utf-8", "replace")
        return struct.unpack(f"<{_NUMBERS[kind]}", data)[0] if kind in _NUMBERS else "an array"

    def _skip_values(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind] * count)
        elif kind == _STRING:
            for _ in range(count):
                self._skip_string()
        elif kind == _ARRAY and count == 1:
            kind, count = self._take("<IQ")
            self._elements_left -= count
            if self._elements_left < 0:
                raise ValueError(f"its arrays must have {MAX_ELEMENTS:,} elements in all at most, got one of {count}")
            if kind == _ARRAY:
                raise ValueError("it has an array of arrays, which no model needs")
            self._skip_values(kind, count)
        else:
            raise ValueError(f"a value has the unknown type {quote(kind)}")

    def _skip_string(self) -> None:
        (length,) = self._take("<Q")
        self._skip(length)

    def _take_string(self) -> bytes:
        start = self._place + 8  # behind the length
        self._skip_string()
        return self._data[start : self._place]

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._place:
            raise ValueError(f"its header goes on for {num_bytes} bytes at byte {self._place} of {len(self._data)}")
        self._place += num_bytes

    def _take(self, layout: str) -> tuple[int, ...]:
        start = self._place
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)
