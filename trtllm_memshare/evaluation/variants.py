"""The arms of a comparison: presets, the full cache, and the controls, each as settings and a capacity policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtllm_memshare.errors import UserError, nearest, shorten
from trtllm_memshare.evaluation.benchmark_options import parse_setting
from trtllm_memshare.search.config import PRESETS, MemShareConfig, make_config
from trtllm_memshare.serving.scheduler import GUARANTEED_NO_EVICT

_CONTROLS = ("random", "streaming", "snapkv", "rkv")
_FULL = ("full", "full-guaranteed")
VARIANTS = (
    *_FULL,
    "pressure",
    "pressure-guaranteed",
    "paper",
    "aligned",
    "lexical",
    "drop-duplicate",
    "shadow",
    *_CONTROLS,
)
_GUARANTEED = "-guaranteed"


@dataclass(frozen=True)
class Variant:
    """An arm.

    Attributes:
      policy: the capacity policy this arm insists on, None = the benchmark's.
      takes_window: the control ``streaming`` whose window nobody gave: it gets one at the memory of ``aligned``.
    """

    name: str
    config: MemShareConfig
    policy: str | None = None
    takes_window: bool = False


def make_variant(name: str, engine: MemShareConfig, **overrides: Any) -> Variant:
    """Settings of an arm.

    Args:
      name: one of ``VARIANTS``. ``full-guaranteed`` is the full cache under GUARANTEED_NO_EVICT, and so with
        ``pressure``; ``shadow`` and the controls start from the settings of ``aligned``, and so does
        ``drop-duplicate`` in an engine of that preset.
      engine: the engine's own settings; they stand for the preset that they name.
      overrides: settings laid on top of those of sharing arms.

    Raises:
      UserError: unknown name or setting.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name} ({nearest(name, VARIANTS)})")
    if name in _FULL:
        return Variant(name, make_config("off"), GUARANTEED_NO_EVICT if name == "full-guaranteed" else None)
    preset = name.removesuffix(_GUARANTEED)
    preset = preset if preset in PRESETS else "aligned"
    settings = engine.model_dump() if engine.preset == preset else PRESETS[preset]
    if name == "drop-duplicate" and engine.preset == "aligned":
        settings = {**engine.model_dump(), **PRESETS[name]}  # the engine's sharing, counted once
    # R-KV compares keys as they are stored.
    settings = {**settings, "shadow": name == "shadow", **({"undo_rope": False} if name == "rkv" else {}), **overrides}
    if name in _CONTROLS:
        settings["control"] = name
    settings.pop("preset")
    config, policy = make_config(preset, **settings), GUARANTEED_NO_EVICT if name.endswith(_GUARANTEED) else None
    return Variant(name, config, policy, config.control == "streaming" and "streaming_window_tokens" not in overrides)


def default_variants(engine: MemShareConfig) -> tuple[str, ...]:
    """The full cache, ``aligned`` and what the engine itself is set to, if that is a third thing."""
    own = engine.preset in VARIANTS and engine.preset != "aligned"
    return ("full", "aligned", engine.preset) if own else ("full", "aligned")


def parse_variant(text: str, engine: MemShareConfig, **overrides: Any) -> Variant:
    """``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``, for example ``pressure:min_kept=0.25,need=random``.

    Raises:
      UserError: unknown variant or setting, or a value out of range.
    """
    name, _, rest = text.partition(":")
    settings = dict(parse_setting(part) for part in rest.split(",")) if rest else {}
    if settings and name in _FULL:
        raise UserError(f"{name} shares nothing and takes no settings, got {shorten(text)} (write {name} alone)")
    return replace(make_variant(name, engine, **{**overrides, **settings}), name=text)


def parse_variants(texts: Sequence[str], engine: MemShareConfig, **overrides: Any) -> list[Variant]:
    """Arms of one comparison, whose results are kept by name.

    Raises:
      UserError: see ``parse_variant``; one that is named twice; or settings and no arm that takes them.
    """
    twice = next((text for text in texts if list(texts).count(text) > 1), None)
    if twice is not None:
        raise UserError(
            f"--variants must name each variant once, got {shorten(twice)} twice (leave one out, or set --repeat)"
        )
    if overrides and all(text in _FULL for text in texts):
        raise UserError(
            f"settings are laid over sharing variants, got {shorten(', '.join(overrides))} with {' and '.join(texts)} "
            f"alone (add a sharing variant, or leave the settings out)"
        )
    return [parse_variant(text, engine, **overrides) for text in texts]
