"""Options of the LLM API that sharing needs, laid over the user's own; one that says otherwise is an error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from trtllm_memshare.errors import UserError, read_text
from trtllm_memshare.trtllm.pytorch.compression_config import ALGORITHM
from trtllm_memshare.trtllm.pytorch.guards import host_tier_reason

_REUSE = ("kv_cache_config", "enable_block_reuse")
_NEEDED: dict[tuple[str, ...], Any] = {
    ("attn_backend",): "TRTLLM",
    _REUSE: False,
    # Freed blocks turn into more requests in flight under this policy only: the other counts them as still needed.
    ("scheduler_config", "capacity_scheduler_policy"): "MAX_UTILIZATION",
    ("enable_iter_perf_stats",): True,
}
_MAY_DIFFER = (_REUSE, ("enable_iter_perf_stats",))
"""Settings that may differ: with block reuse, prompts are protected and shared text stays out of the tree."""
_BY_ROUTE: dict[str, dict[tuple[str, ...], Any]] = {
    "overlay": {},
    "framework": {
        ("kv_cache_config", "use_kv_cache_manager_v2"): True,  # "auto" may choose V1, which knows no compression
        ("kv_cache_compression_config", "algorithm"): ALGORITHM,
        _REUSE: False,  # TensorRT-LLM refuses it for a method that does not say it can, and ours does not
    },
}


def merge_options(user: dict[str, Any], route: str = "overlay") -> dict[str, Any]:
    """The user's LLM options with what sharing needs, and what its route to TensorRT-LLM needs beside.

    Args:
      user: options of the LLM API, nested as in their file; left as they are.
      route: overlay or framework.

    Raises:
      UserError: an option that contradicts it.
    """
    merged, of_route = copy.deepcopy(user), _BY_ROUTE[route]
    if (backend := merged.get("backend")) not in (None, "pytorch"):
        raise UserError(f"backend must be pytorch to share, got {_shown(backend)} (remove it from your options)")
    for path, value in (_NEEDED | of_route).items():
        section = merged
        for key in path[:-1]:
            section[key] = section.get(key) or {}
            if not isinstance(section[key], dict):
                raise UserError(f"{key} must be a mapping of options, got {section[key]!r}")
            section = section[key]
        got = section.setdefault(path[-1], value)
        if got != value and path in of_route:
            raise UserError(
                f"{'.'.join(path)} must be {_shown(value)} for route {route}, got {_shown(got)} (remove it from your "
                f"options, or take route overlay)"
            )
        if got != value and path not in _MAY_DIFFER:
            raise UserError(
                f"{'.'.join(path)} must be {_shown(value)} to share, got {_shown(got)} (remove it from your options)"
            )
    cache = merged["kv_cache_config"]
    is_v2 = {True: True, False: False}.get(cache.get("use_kv_cache_manager_v2"))  # "auto" and nothing: not known yet
    reason = host_tier_reason(is_v2, cache.get("host_cache_size"))
    if reason is not None:
        raise UserError(f"sharing excludes {reason}")
    return merged


def describe_added(user: dict[str, Any], route: str) -> str:
    """What ``merge_options`` adds to the user's options, as one line for the log."""
    added = [f"{'.'.join(p)}={_shown(v)}" for p, v in (_NEEDED | _BY_ROUTE[route]).items() if not _has(user, p)]
    return f"memshare: added to the LLM options: {', '.join(added) or 'nothing'}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Options of the LLM API from a file. Raises UserError if it is not a YAML mapping."""
    try:
        document = yaml.safe_load(read_text(path, "the file of LLM options"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if document is None:  # an empty file
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a mapping of LLM options, got {type(document).__name__}")
    return document


def _has(options: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(options, dict) or key not in options:
            return False
        options = options[key]
    return True


def _shown(value: Any) -> str:
    """A value as its YAML file has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
