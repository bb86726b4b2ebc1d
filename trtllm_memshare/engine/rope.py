"""Rotary settings of a checkpoint's config.json: which are served, and how far they reach."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote

_TYPES = ("default", "linear", "llama3", "yarn")  # rotations that depend on the position alone
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
"""Settings that each type cannot do without."""


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` of transformers 4.x where it is given, as in 5.x too; else ``rope_parameters`` of 5.x."""
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict) and config[key]:
            return dict(config[key])
    return {}


def rope_type(config: dict[str, Any]) -> str:
    settings = rope_settings(config)
    return str(settings.get("rope_type") or settings.get("type") or "default")


def check_rope(config: dict[str, Any], path: Path) -> None:
    """Raises UserError for a rotation that cannot be served, or whose numbers are missing or no numbers."""
    kind = rope_type(config)
    if kind == "mrope":
        raise UserError(
            f"{path.parent} rotates by three positions of an image or a text (mrope), expected one position a token "
            f"(take a model of text alone)"
        )
    if kind not in _TYPES:
        raise UserError(
            f"{path.parent} has rope_type {quote(kind)[1:-1]}, expected one of {', '.join(_TYPES)}: K of two positions "
            f"cannot be compared when rotations change with the length of the text (take a model without it)"
        )
    settings = rope_settings(config)
    part = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise UserError(
            f"{path.parent} rotates a part of each head (partial_rotary_factor {quote(part)}), expected all of "
            f"it: null pages and engines are made for whole heads (take a model without it)"
        )
    for key in _NUMBERS[kind]:
        value = settings.get(key)
        if value is None:
            raise UserError(f"{path}: rope_type {kind} needs {key} (take the model's own file)")
        if not _is_positive(value):
            raise UserError(
                f"{path}: {key} of rope_type {kind} must be a positive number, got {quote(value)} (take the model's "
                f"own file)"
            )


def rope_theta(config: dict[str, Any], path: Path) -> float:
    """Base of the rotary frequencies."""
    theta = rope_settings(config).get("rope_theta", config.get("rope_theta", 10000.0))
    if not _is_positive(theta):
        raise UserError(f"{path}: rope_theta must be a positive number, got {quote(theta)} (take the model's own file)")
    return float(theta)


def longest_sequence(config: dict[str, Any], max_position_embeddings: int) -> int:
    """Tokens that the rotations reach.

    A scaling stretches the length the model was trained for: yarn with factor 4 over 32,768 positions reaches 131,072,
    whether max_position_embeddings names the length before or after. llama3's factor blends frequencies: its models
    name the length they reach.
    """
    settings, kind = rope_settings(config), rope_type(config)
    if kind not in ("linear", "yarn"):
        return max_position_embeddings
    trained = settings.get("original_max_position_embeddings") or max_position_embeddings
    return max(max_position_embeddings, int(trained * settings["factor"]))


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer that no float holds
        return False
