"""Reads a request's tensors. Works on anything with ``as_numpy``, so that tests need no server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError

PERF_OUTPUTS = (
    "num_input_tokens", "num_output_tokens", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks", "memshare_shared_blocks", "arrival_time_ns", "first_token_time_ns",
    "last_token_time_ns",
)  # fmt: skip
"""Outputs that come with ``return_perf_metrics``."""


class RequestTensors:
    """The inputs of one request by name; those a client left out are absent.

    Args:
      arrays: with or without a leading batch dimension of 1.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    @classmethod
    def of(cls, request: Any) -> RequestTensors:
        """From a python-backend request."""
        return cls({t.name(): t.as_numpy() for t in request.inputs()})

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """One number in ``[low, high]``, of the type of ``default``.

        Raises:
          UserError: several numbers, or one out of range; the limit is named.
        """
        value = self._one(name, type(default))
        if value is None:
            return default
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low:g} and {high:g}, got {value:g}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """One boolean."""
        value = self._one(name, bool)
        return default if value is None else value

    def token_ids(self, name: str) -> list[int]:
        """All elements as integers; empty if absent."""
        array = self._arrays.get(name)
        return [] if array is None else array.reshape(-1).astype(np.int64).tolist()

    def texts(self, name: str) -> list[str]:
        """All elements as text, empty ones left out.

        Raises:
          UserError: bytes that are not UTF-8.
        """
        array = self._arrays.get(name)
        if array is None:
            return []
        try:
            found = [e.decode() if isinstance(e, bytes) else str(e) for e in array.reshape(-1)]
        except UnicodeDecodeError as error:
            raise UserError(f"{name} must be UTF-8, got {error.object[error.start : error.end]!r}") from error
        return [text for text in found if text]

    def word_lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Token sequences in TensorRT-LLM's form: ``[2, n]``, ids in the first row, ends of sequences in the second.

        Example: ids ``[7, 8, 9]`` with ends ``[2, 3, -1]`` are the sequences (7, 8) and (9,).
        """
        array = self._arrays.get(name)
        if array is None or not array.size:
            return ()
        ids, ends = array.reshape(-1, array.shape[-1])[-2:]
        stops = [int(end) for end in ends if end > 0]
        starts = [0, *stops[:-1]]
        return tuple(tuple(ids[a:b].tolist()) for a, b in zip(starts, stops, strict=True) if b > a)

    def _one(self, name: str, convert: Callable[[Any], Any]) -> Any:
        array = self._arrays.get(name)
        if array is None or not array.size:
            return None
        if array.size != 1:
            raise UserError(f"{name} must be one value, got shape {list(array.shape)} (send one request per prompt)")
        return convert(array.reshape(-1)[0])


def perf_tensors(tensor: Any, perf: dict[str, int]) -> list[Any]:
    """Output tensors of counts and times. ``tensor``: Triton's class."""
    types = {name: np.int64 if name.endswith("_ns") else np.int32 for name in perf}
    return [tensor(name, np.array([[value]], types[name])) for name, value in perf.items()]
