"""Reads a request's tensors. Works on anything with ``as_numpy``, so that tests need no server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError, quote

_UNBOUNDED = 2**31 - 1
MAX_WORDS = 1024
MAX_WORD_ELEMENTS = 16384
"""Stop words or bad words of one request, and bytes or tokens of all of them."""


class RequestTensors:
    """The inputs of one prompt by name; those a client left out are absent.

    Args:
      arrays: of any shape.
      shown: what the caller calls an input, where it has another name for it than we do.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], shown: Mapping[str, str] | None = None) -> None:
        self.arrays = dict(arrays)
        self._shown = shown or {}

    @classmethod
    def of(cls, request: Any) -> RequestTensors:
        """From a python-backend request."""
        return cls({t.name(): t.as_numpy() for t in request.inputs()})

    @classmethod
    def of_values(cls, values: Mapping[str, Any], shown: Mapping[str, str]) -> RequestTensors:
        """From numbers and lists of them."""
        return cls({name: np.asarray(value) for name, value in values.items()}, shown)

    def rows(self, counted: str) -> list[RequestTensors]:
        """One set of tensors for each prompt of a batch.

        Args:
          counted: an input whose first dimension is the batch.

        Raises:
          UserError: another input has another batch dimension.
        """
        first = self.arrays.get(counted)
        size = first.shape[0] if first is not None and first.ndim else 1
        for name, array in self.arrays.items():
            if size > 1 and array.shape[:1] != (size,):
                raise UserError(
                    f"{name} must have the batch size {size} of {counted} in front, got shape {list(array.shape)}"
                )
        if size == 1:
            return [self]
        return [RequestTensors({n: a[i] for n, a in self.arrays.items()}, self._shown) for i in range(size)]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def name(self, name: str) -> str:
        """What the caller calls an input."""
        return self._shown.get(name, name)

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """One number in ``[low, high]``, of the type of ``default``.

        Raises:
          UserError: several numbers, or one out of range; the limit is named, a limit of the type only if it is passed.
        """
        value = self._one(name, type(default))
        if value is None:
            return default
        if not low <= value <= high:
            bounds = f"between {_shown(low)} and {_shown(high)}"
            if high >= _UNBOUNDED:
                bounds = f"at most {_shown(high)}" if value > high else f"at least {_shown(low)}"
            raise UserError(f"{self.name(name)} must be {bounds}, got {_shown(value)}")
        return value

    def share(self, name: str) -> float | None:
        """One number in [0, 1] as its client wrote it; None if absent or empty.

        In FP32, which Triton's inputs have, 0.1 is a hair more: of ten pages two would stay. So it is read as the
        nearest fraction with a denominator up to 10,000.

        Raises:
          UserError: several numbers, or one out of range.
        """
        if not self.num_elements(name):
            return None
        return float(Fraction(self.number(name, 0.0, 0.0, 1.0)).limit_denominator(10_000))

    def flag(self, name: str, default: bool) -> bool:
        """One boolean."""
        value = self._one(name, bool)
        return default if value is None else value

    def scalar(self, name: str) -> Any:
        """One value as Python has it, unchecked; None if absent."""
        return self._one(name, lambda value: value.item() if hasattr(value, "item") else value)

    def num_elements(self, name: str) -> int:
        """How many elements an input has, 0 if it is absent."""
        array = self.arrays.get(name)
        return 0 if array is None else int(array.size)

    def token_ids(self, name: str) -> list[int]:
        """All elements as integers; empty if absent. Raises UserError if they are none of 64 bits."""
        array = self.arrays.get(name)
        if array is None or not array.size:
            return []
        if array.dtype.kind not in "iu":
            raise UserError(f"{self.name(name)} must hold integers of 64 bits, got {array.dtype}")
        return array.reshape(-1).astype(np.int64).tolist()

    def texts(self, name: str, max_bytes: int = MAX_WORD_ELEMENTS) -> list[str]:
        """All elements as text, empty ones left out.

        Raises:
          UserError: bytes that are not UTF-8, or more than ``max_bytes`` or ``MAX_WORDS`` of them.
        """
        array = self.arrays.get(name)
        if array is None:
            return []
        if array.size > MAX_WORDS:
            raise UserError(f"{self.name(name)} may hold {MAX_WORDS} texts, got {array.size}")
        raw = [e if isinstance(e, bytes) else str(e).encode() for e in array.reshape(-1)]
        total = sum(map(len, raw))
        if total > max_bytes:
            raise UserError(f"{self.name(name)} may have {max_bytes} bytes, got {total}")
        try:
            found = [e.decode() for e in raw]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name(name)} must be UTF-8, got {error.object[error.start : error.end]!r} at byte {error.start}"
            ) from error
        return [text for text in found if text]

    def word_lists(self, name: str, vocab_size: int) -> tuple[tuple[int, ...], ...]:
        """Token sequences in TensorRT-LLM's form: ``[2, n]``, ids in the first row, ends of sequences in the second.

        Example: ids ``[7, 8, 9]`` with ends ``[2, 3, -1]`` are the sequences (7, 8) and (9,).

        Raises:
          UserError: not of that form, too long, or an id outside the vocabulary.
        """
        array = self.arrays.get(name)
        if array is None or not array.size:
            return ()
        shown, width = self.name(name), array.shape[-1]
        if array.dtype.kind not in "iu":
            raise UserError(f"{shown} must hold integers, got {array.dtype}")
        if array.size != 2 * width:
            raise UserError(f"{shown} must have shape [2, n], got {list(array.shape)}")
        if width > MAX_WORD_ELEMENTS:
            raise UserError(f"{shown} may hold {MAX_WORD_ELEMENTS} tokens, got {width}")
        ids, ends = array.reshape(2, width)
        stops = [int(end) for end in ends if end > 0]
        if stops != sorted(stops) or (stops and stops[-1] > width):
            raise UserError(f"{shown} must give the ends of its words in order within {width} tokens, got {stops}")
        if not stops:
            return ()
        used = ids[: stops[-1]]
        outside = used[(used < 0) | (used >= vocab_size)]
        if outside.size:
            raise UserError(f"{shown} must lie in the vocabulary 0..{vocab_size - 1}, got {int(outside[0])}")
        starts = [0, *stops[:-1]]
        return tuple(tuple(ids[a:b].tolist()) for a, b in zip(starts, stops, strict=True) if b > a)

    def _one(self, name: str, convert: Callable[[Any], Any]) -> Any:
        array = self.arrays.get(name)
        if array is None or not array.size:
            return None
        if array.size != 1:
            raise UserError(f"{self.name(name)} must be one value for each prompt, got shape {list(array.shape)}")
        value = array.reshape(-1)[0]
        try:
            return convert(value)
        except (ValueError, OverflowError, TypeError) as error:  # NaN where an integer is expected, say
            raise UserError(f"{self.name(name)} must be {convert.__name__}, got {quote(value)}") from error


def _shown(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else quote(number)
