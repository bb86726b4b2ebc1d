"""Settings that nothing reads beside the others: they are refused, so that nobody trusts in what has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PRESSURE = ("high_watermark", "low_watermark", "min_kept", "lookahead_tokens", "need", "spread")
_SEARCH = ("accept_all", "settled_tokens", "min_pool_use", "max_pairs")
_DISTANCE = ("undo_rope", "max_distance", "pool_layers", "compared", "layer_vote", "layer_quorum")
_VOTES = ("compared", "layer_vote", "layer_quorum")
_RUNS = ("shingle_tokens", "min_run_tokens", "max_gap_tokens")
_STEPS = ("min_step_tokens", "min_step_cosine", "max_steps_compared")
_STREAMING = ("streaming_window_tokens", "streaming_sink_tokens")
_ALIASES = ("max_aliases", "count_aliases")
_BUDGET = ("budget", "observation_tokens")
_REPEATS = ("shingle_tokens", "min_run_tokens")

# Settings, whether they have an effect, and who reads them.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_PRESSURE, lambda c: c.pressure, "preset pressure reads it"),
    (_SEARCH, lambda c: c.searches, "presets that search while there is room read it"),
    (_DISTANCE, lambda c: c.searches and not c.accept_all, "presets that compare K and V read it"),
    (_VOTES, lambda c: not c.pool_layers, "a vote of the layers reads it, which pool_layers replaces"),
    (_RUNS, lambda c: c.matcher == "runs" or c.scope == "group", "matcher runs reads it"),
    (_STEPS, lambda c: c.matcher == "steps", "matcher steps reads it"),
    (("layer_quorum",), lambda c: c.layer_vote == "quorum", "layer_vote quorum reads it"),
    (("scope", "control"), lambda c: not c.pressure, "presets that search while there is room read it"),
    # Whose pages are the same with null entries, for the comparison: an earlier page stands for so many.
    (_ALIASES, lambda c: not c.pressure or c.need == "nearest-earlier", "need nearest-earlier reads it"),
    (("count_aliases",), lambda c: not c.pressure or c.retired_becomes == "alias", "retired_becomes alias reads it"),
    (
        _REPEATS,
        lambda c: not c.pressure or c.need != "nearest-earlier",
        "needs that give up exact repeats first read it",
    ),
    (
        ("read_null",),
        lambda c: c.retired_becomes == "null" or (c.pressure and c.retired_becomes == "alias"),
        "null entries read it",
    ),
    (("control_seed",), lambda c: "random" in (c.control, c.need), "control random and need random read it"),
    (("max_protected_tokens",), lambda c: c.protected_steps > 0, "protected_steps above 0 reads it"),
    (_STREAMING, lambda c: c.control == "streaming", "control streaming reads it"),
    (_BUDGET, lambda c: c.control in ("snapkv", "rkv"), "controls snapkv and rkv read it"),
    (("budget_tokens",), lambda c: c.control in ("snapkv", "rkv") and c.budget == "fixed", "budget fixed reads it"),
    (("budget_share",), lambda c: c.control in ("snapkv", "rkv") and c.budget == "share", "budget share reads it"),
)


def find_unread(config: Any) -> tuple[str, str] | None:
    """The first setting that differs from its default and has no effect, and who reads it; None if there is none.

    The preset ``off`` reads nothing and may be laid over anything: it is the off switch.

    Args:
      config: a ``MemShareConfig``.
    """
    if config.preset == "off":
        return None
    for names, is_read, reader in _RULES:
        if not is_read(config):
            for name in names:
                if getattr(config, name) != type(config).model_fields[name].default:
                    return name, reader
    return None
