"""The arms of a comparison: presets, the full cache, and the controls, each as settings and a capacity policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtllm_memshare.errors import UserError, nearest, shorten
from trtllm_memshare.evaluation.benchmark_options import parse_setting
from trtllm_memshare.search.config import PRESETS, MemShareConfig, make_config
from trtllm_memshare.search.unread import find_unread
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


def make_variant(
    name: str, engine: MemShareConfig, over_all: Mapping[str, Any] | None = None, **overrides: Any
) -> Variant:
    """Settings of an arm.

    Args:
      name: one of ``VARIANTS``. ``full-guaranteed`` is the full cache under GUARANTEED_NO_EVICT, and so with
        ``pressure``; ``shadow`` and the controls start from the settings of ``aligned``, and so does
        ``drop-duplicate`` in an engine of that preset.
      engine: the engine's own settings; they stand for the preset that they name.
      over_all: settings laid on top of those of sharing arms; an arm that does not read one goes without.
      overrides: of this arm, laid on top of these; it must read them.

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
    settings = {**settings, "shadow": name == "shadow", **({"undo_rope": False} if name == "rkv" else {})}
    if name in _CONTROLS:
        settings["control"] = name
    laid = {**_what_it_reads({**settings, "preset": preset}, over_all or {}, overrides), **overrides}
    settings = {**settings, **laid}
    settings.pop("preset")
    config, policy = make_config(preset, **settings), GUARANTEED_NO_EVICT if name.endswith(_GUARANTEED) else None
    return Variant(name, config, policy, config.control == "streaming" and "streaming_window_tokens" not in laid)


def _what_it_reads(
    settings: dict[str, Any], over_all: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    make_config("off", **over_all)  # names and values: the off switch may be laid over any
    left = dict(over_all)
    while left:
        unread = find_unread(MemShareConfig.model_construct(**{**settings, **left, **overrides}))
        if unread is None or left.pop(unread[0], None) is None:
            break
    return left


def default_variants(engine: MemShareConfig) -> tuple[str, ...]:
    """The full cache, ``aligned`` and what the engine itself is set to, if that is a third thing."""
    own = engine.preset in VARIANTS and engine.preset != "aligned"
    return ("full", "aligned", engine.preset) if own else ("full", "aligned")


def parse_variant(text: str, engine: MemShareConfig, **overrides: Any) -> Variant:
    """``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``, for example ``pressure:min_kept=0.25,need=random``.

    Args:
      overrides: see ``over_all`` of ``make_variant``.

    Raises:
      UserError: unknown variant or setting, or a value out of range.
    """
    name, _, rest = text.partition(":")
    settings = dict(parse_setting(part) for part in rest.split(",")) if rest else {}
    if settings and name in _FULL:
        raise UserError(f"{name} shares nothing and takes no settings, got {shorten(text)} (write {name} alone)")
    return replace(make_variant(name, engine, overrides, **settings), name=text)


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
    variants, wanted = [parse_variant(text, engine, **overrides) for text in texts], make_config("off", **overrides)
    sharing = [variant.config for variant in variants if variant.name not in _FULL]
    for name in overrides:
        if not any(getattr(config, name) == getattr(wanted, name) for config in sharing):
            raise UserError(
                f"a setting must be read by one of the variants, got {name} with {shorten(' and '.join(texts))} (add a "
                f"variant that reads it, or leave it out)"
            )
    return variants
