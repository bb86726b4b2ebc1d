"""What one request may say about its own memory: ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_memshare.errors import UserError, quote


@dataclass(frozen=True)
class RequestOptions:
    """``memshare``: whether the request's pages may be retired at all. ``min_kept``: its floor, in [0, 1]."""

    memshare: bool
    min_kept: float


def parse_request_options(extra_args: Mapping[str, Any] | None, default_min_kept: float) -> RequestOptions:
    """Reads ``memshare`` and ``min_kept``; other keys belong to others.

    Raises:
      UserError: a value of the wrong kind or out of range.
    """
    extra = extra_args or {}
    memshare = extra.get("memshare", True)
    if memshare not in (True, False, 0, 1):  # JSON over HTTP has no booleans here, only numbers and text
        raise UserError(f"memshare must be true or false, got {quote(memshare)}")
    min_kept = extra.get("min_kept")
    if min_kept is None:
        return RequestOptions(bool(memshare), default_min_kept)
    if isinstance(min_kept, bool) or not isinstance(min_kept, (int, float)) or not 0 <= min_kept <= 1:
        raise UserError(f"min_kept must be a number between 0 and 1, got {quote(min_kept)}")
    return RequestOptions(bool(memshare), float(min_kept))
