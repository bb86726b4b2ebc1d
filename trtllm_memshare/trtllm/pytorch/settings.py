"""What a user sets: environment variables and one file. TensorRT-LLM's own arguments forbid unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_memshare.errors import UserError, describe_validation_error, nearest, read_text, shorten
from trtllm_memshare.json_input import check_known_keys, parse_json
from trtllm_memshare.search.config import HOST_NEED, MemShareConfig, make_config
from trtllm_memshare.search.need import NEEDS, find_need

PREFIX = "TRTLLM_MEMSHARE_"  # TensorRT-LLM hands variables that start with TRTLLM on to its MPI workers
ENABLE = PREFIX + "ENABLE"
_OF_ENGINES = (PREFIX + "PLUGIN", PREFIX + "MAX_PAIRS")  # read by trtllm/engine/model_cls.py
VARIABLES = {
    ENABLE: "1 switches sharing on, 0 or nothing leaves TensorRT-LLM as it is",
    PREFIX + "CONFIG": "JSON file with settings",
    PREFIX + "STATS_FILE": "file that rank 0 keeps its totals in, as JSON",
    PREFIX + "OFF_FILE": "while this file exists nothing new is shared; looked for every 16 iterations",
    PREFIX + "METRICS_PORT": "port of a Prometheus endpoint of rank 0, on loopback",
}


class AdapterOptions(BaseModel):
    """Settings beside those of the search.

    ``on_unsupported``: stop the start-up, or run unshared and say so, when a feature is on that sharing excludes.
    ``null_entries``: of preset pressure: attention reads a null page for what was given up, or is given nothing for it.
    ``null_pages``: a folder with the model's null pages, to be read: of ``memshare null-pages`` or an engine.
    ``route``: overlay, around TensorRT-LLM's KV cache manager, or framework, a method of its KV cache compression.
    ``tokenizer_dir``: where the tokenizer is that step boundaries come from; default: the model's directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_unsupported: Literal["stop", "warn"] = "stop"
    tokenizer_dir: str | None = None
    null_pages: str | None = None
    null_entries: Literal["read", "skip"] = "read"
    route: Literal["overlay", "framework"] = "overlay"
    stats_interval: int = Field(100, ge=1, description="iterations between two updates of metrics and statistics")


@dataclass(frozen=True)
class Settings:
    """Everything that was set. ``stats_file``, ``metrics_port``, ``off_file``: None where not given."""

    memshare: MemShareConfig
    options: AdapterOptions
    stats_file: Path | None = None
    metrics_port: int | None = None
    off_file: Path | None = None

    @property
    def title(self) -> str:
        """What was chosen, for one line of a log: ``preset pressure, null_entries skip, min_kept 0.5``."""
        config = self.memshare
        parts = [f"preset {config.preset}", *(["shadow"] if config.shadow else [])]
        if config.pressure:
            way = (
                "route framework" if self.options.route == "framework" else f"null_entries {self.options.null_entries}"
            )
            parts += [way, f"min_kept {config.min_kept:g}"]
        return ", ".join(parts)


def is_enabled(environment: Mapping[str, str]) -> bool:
    """Whether sharing is switched on.

    Raises:
      UserError: a value other than 0 or 1, or a variable of ours that does not exist.
    """
    for name in environment:
        if name.startswith(PREFIX) and name not in VARIABLES and name not in _OF_ENGINES:
            raise UserError(f"unknown variable {name} ({nearest(name, VARIABLES)})")
    value = environment.get(ENABLE, "0")
    if value not in ("", "0", "1"):
        raise UserError(f"{ENABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def read_values(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the file that ``TRTLLM_MEMSHARE_CONFIG`` names says; nothing without one.

    Raises:
      UserError: no such file, or no JSON object.
    """
    path = environment.get(PREFIX + "CONFIG")
    return _read(Path(path)) if path else {}


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Settings of the file that ``TRTLLM_MEMSHARE_CONFIG`` names, or the defaults.

    The file is one JSON object: a ``preset``, any field of ``MemShareConfig`` laid over it, and those of
    ``AdapterOptions``.

    Raises:
      UserError: no such file, not JSON, an unknown key, a value out of range, or settings that serving excludes.
    """
    path, values = environment.get(PREFIX + "CONFIG"), read_values(environment)
    options = {name: values.pop(name) for name in list(values) if name in AdapterOptions.model_fields}
    check_known_keys(values, (*MemShareConfig.model_fields, *AdapterOptions.model_fields), str(path))
    preset = values.pop("preset", "aligned")
    if preset == "pressure":
        values.setdefault("need", HOST_NEED)
    memshare = make_config(preset, **values)
    if memshare.scope == "group":
        raise UserError(
            "scope must be request with TensorRT-LLM's PyTorch backend, got group (a request frees its own tail only)"
        )
    if not memshare.count_aliases:
        raise UserError(
            f"preset {memshare.preset} counts an alias once, which needs attention of our own, got TensorRT-LLM's "
            f"(take preset aligned)"
        )
    if memshare.retired_becomes == "dropped":
        raise UserError(
            "retired_becomes must be null or alias with TensorRT-LLM's PyTorch backend, got dropped (set null_entries "
            "to skip with preset pressure: its attention is then given nothing for those entries)"
        )
    if memshare.retired_becomes == "null" and memshare.searches:
        raise UserError(
            f"retired_becomes must be alias with preset {memshare.preset} on TensorRT-LLM's PyTorch backend, got null "
            f"(leave it out, or take preset pressure, which reads null pages)"
        )
    if memshare.control != "none":
        raise UserError(f"control must be none when serving, got {memshare.control} (controls run in benchmarks/)")
    try:
        adapter = AdapterOptions.model_validate(options)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, AdapterOptions.model_fields, str(path))) from error
    if memshare.pressure:
        check_need(memshare.need, adapter.route)
        skips = adapter.null_entries == "skip"
        if adapter.null_pages is None and adapter.route == "overlay" and not skips:
            raise UserError(
                "preset pressure needs null_pages, a folder with the model's null pages, got none (make it with "
                "memshare null-pages MODEL and name it, with --null-pages or in the settings, or set null_entries to "
                "skip)"
            )
        if skips and adapter.null_pages is not None:
            raise UserError(f"null_entries skip reads no null pages, got null_pages {adapter.null_pages} (keep one)")
        if skips and adapter.route == "framework":
            raise UserError(
                "null_entries is a setting of route overlay, got route framework, which drops pages (leave it out)"
            )
        if adapter.route == "framework" and memshare.protected_steps:
            raise UserError(
                f"route framework protects tokens and knows no steps, got protected_steps {memshare.protected_steps} "
                f"(leave it out and set protected_tokens, or take route overlay)"
            )
    elif adapter.null_entries == "skip":
        raise UserError(f"null_entries skip needs preset pressure, got {memshare.preset} (take it, or leave this out)")
    elif adapter.route == "framework":
        raise UserError(
            f"route framework drops pages and shares none, got preset {memshare.preset} (take preset pressure, or "
            f"route overlay)"
        )
    _refuse_unread(memshare, adapter)
    return Settings(memshare, adapter, _stats_file(environment), _port(environment), _off_file(environment))


_OF_OWN_RUNNERS: tuple[str, ...] = ("read_null",)
_UNDER_PRESSURE = ("lookahead_tokens",)
"""TensorRT-LLM admits requests itself."""
_WHERE_DROPPED = ("shingle_tokens", "min_run_tokens", "search_interval")
"""The framework's pages are not looked through for repeats."""


def _refuse_unread(memshare: MemShareConfig, options: AdapterOptions) -> None:
    """Raises UserError for a setting that the preset knows and this path does not read."""
    names, where = _OF_OWN_RUNNERS, ""
    if memshare.pressure:
        names, where = names + _UNDER_PRESSURE, " under pressure"
    if options.route == "framework":
        names, where = names + _WHERE_DROPPED, ", route framework"
    for name in names:
        if (value := getattr(memshare, name)) != MemShareConfig.model_fields[name].default:
            raise UserError(f"{name} is not read by TensorRT-LLM's PyTorch backend{where}, got {value} (leave it out)")


_MEASURED: dict[str, tuple[str, ...]] = {
    "overlay": ("position", "redundancy", "draw", "distance"),
    "framework": ("position", "redundancy", "draw"),
}
"""Facts of a page that can be known: TensorRT-LLM hands out neither attention nor the tokens' probabilities."""


def check_need(need: str, route: str) -> None:
    """Raises UserError for a formula that reads what cannot be known on this route."""
    measured = set(_MEASURED[route])
    missing = [fact for fact in find_need(need).facts if fact not in measured]
    if missing:
        possible = [name for name, formula in NEEDS.items() if set(formula.facts) <= measured]
        raise UserError(
            f"need {need} reads {', '.join(missing)}, which route {route} of TensorRT-LLM's PyTorch backend does not "
            f"know (take one of {', '.join(possible)})"
        )


def _read(path: Path) -> dict[str, Any]:
    values = parse_json(read_text(path, f"the file of {PREFIX}CONFIG"), shorten(str(path)))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _stats_file(environment: Mapping[str, str]) -> Path | None:
    text = environment.get(PREFIX + "STATS_FILE")
    if not text:
        return None
    if not Path(text).absolute().parent.is_dir():
        raise UserError(f"{PREFIX}STATS_FILE must lie in a folder that exists, got {text}")
    return Path(text)


def _port(environment: Mapping[str, str]) -> int | None:
    text = environment.get(PREFIX + "METRICS_PORT")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise UserError(f"{PREFIX}METRICS_PORT must be a port between 1 and 65535, got {text!r}")
    return int(text)


def _off_file(environment: Mapping[str, str]) -> Path | None:
    text = environment.get(PREFIX + "OFF_FILE")
    return Path(text) if text else None
