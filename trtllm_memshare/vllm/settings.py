"""What a user sets for vLLM: ``--additional-config '{"memshare": {...}}'``, or a file named by the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trtllm_memshare.errors import UserError, describe_validation_error, read_text, shorten
from trtllm_memshare.json_input import check_known_keys, parse_json
from trtllm_memshare.search.config import PRESETS, MemShareConfig, parse_config, refuse_shadow
from trtllm_memshare.search.need import find_need

CONFIG_VARIABLE = "VLLM_MEMSHARE_CONFIG"
"""Environment variable with the path of a JSON file; vLLM hands variables that start with VLLM on to its workers."""
ADDITIONAL_CONFIG_KEY = "memshare"
_READ = (
    "high_watermark", "low_watermark", "min_kept", "lookahead_tokens", "need", "spread", "retired_becomes",
    "max_aliases", "protected_tokens", "protected_steps", "max_protected_tokens", "shingle_tokens", "min_run_tokens",
    "control_seed",
)  # fmt: skip
"""Of the search's settings what pressure on vLLM reads; the others hold for other presets and runners."""

Admission = Literal["vllm", "lookahead", "max-tokens"]
NullEntries = Literal["read", "skip"]


class VllmOptions(BaseModel):
    """Settings beside those of the search.

    ``null_pages``: the folder that ``memshare vllm calibrate`` wrote; None: null entries are skipped.
    ``admission``: what a waiting request needs before it gets in. vllm: free blocks for its prompt. lookahead: that the
    pool holds everybody's kept pages ``lookahead_tokens`` further on. max-tokens: the same at any step until each has
    written its max_tokens. ``null_entries``: whether vLLM's kernels read the null page for what was given up, or get
    tables without it; read where there are null pages, unless it is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    null_pages: str | None = None
    admission: Admission = "lookahead"
    null_entries: NullEntries


@dataclass(frozen=True)
class VllmSettings:
    """Everything that was set."""

    memshare: MemShareConfig
    options: VllmOptions


def load_settings(additional_config: object, environment: Mapping[str, str]) -> VllmSettings:
    """Settings from the ``memshare`` part of ``--additional-config``, else from the file in the environment.

    Args:
      additional_config: ``VllmConfig.additional_config``.
      environment: the process's.

    Raises:
      UserError: both are given, an unknown key, or a value out of range.
    """
    part = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, Mapping) else None
    path = environment.get(CONFIG_VARIABLE)
    if part is not None and path:
        raise UserError(
            f"MemShare's settings are given twice, by --additional-config and by {CONFIG_VARIABLE}={path} (keep one)"
        )
    if path:
        return parse_settings(read_settings(Path(path), CONFIG_VARIABLE), path)
    return parse_settings({} if part is None else part, f"--additional-config {ADDITIONAL_CONFIG_KEY}")


def parse_settings(values: object, where: str) -> VllmSettings:
    """Validates one mapping of settings; ``where`` names it in errors. Raises UserError."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must hold a JSON object, got {type(values).__name__}")
    check_known_keys(dict(values), (*MemShareConfig.model_fields, *VllmOptions.model_fields), where)
    search = {k: v for k, v in values.items() if k in MemShareConfig.model_fields}
    config = parse_config({**PRESETS["pressure"], **search}, where)
    refuse_shadow(config)
    if "read_null" in search:
        raise UserError(
            f"with vLLM null_entries says whether null pages are read, got read_null {search['read_null']} (set "
            f"null_entries to read or skip)"
        )
    if config.retired_becomes == "dropped":
        raise UserError(
            "with vLLM retired_becomes must be null, or alias with need nearest-earlier, got dropped (keep null; "
            "with null_entries skip its kernels do not read those entries)"
        )
    plain = parse_config(PRESETS["pressure"], where)
    unread = [key for key in search if key not in _READ and getattr(config, key) != getattr(plain, key)]
    if unread:
        raise UserError(
            f"{where} sets {unread[0]}, which pressure on vLLM does not read (leave it out; it reads "
            f"{', '.join(_READ)})"
        )
    facts = find_need(config.need).facts
    if {"attention", "recent_attention"} & set(facts):
        raise UserError(
            f"need must be one that vLLM can tell, got {config.need} (take surprisal-led-redundancy-recency, "
            f"surprisal-led-redundancy, surprisal-redundancy, surprisal, redundancy, redundancy-recency, "
            f"nearest-earlier, age or random: its kernels do not report attention)"
        )
    given = {k: v for k, v in values.items() if k in VllmOptions.model_fields}
    given.setdefault("null_entries", "skip" if given.get("null_pages") is None else "read")
    try:
        options = VllmOptions.model_validate(given)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, VllmOptions.model_fields, where)) from error
    if options.null_entries == "read" and options.null_pages is None:
        raise UserError(
            "null_entries read needs null_pages, a folder with the model's null pages, got none (make it with memshare "
            "vllm calibrate MODEL, or leave out null_entries)"
        )
    return VllmSettings(config, options)


def read_settings(path: Path, named_by: str) -> dict[str, Any]:
    """The settings file that an option or variable names. Raises UserError if it is not one JSON object."""
    values = parse_json(read_text(path, f"the file of {named_by}"), shorten(str(path)))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
