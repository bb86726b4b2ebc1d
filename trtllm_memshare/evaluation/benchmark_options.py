"""Options of the benchmark of in-flight batching, and the settings that people write on command lines."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of ``benchmarks/inflight_batching.py``; the names are those of its command line."""

    engine_dir: Path
    dataset: Path
    variants: tuple[str, ...]
    kv_cache_blocks: int | None = None
    kv_cache_share: float | None = None
    concurrency: int | None = None
    request_rate: float | None = None
    num_requests: int | None = None
    repeat: int = 1
    scheduler_policy: str = "MAX_UTILIZATION"
    settings: tuple[tuple[str, Any], ...] = ()
    output_json: Path | None = None
    plot: Path | None = None
    output_texts: Path | None = None
    read_aliases: str = "fold"
    engine_cuda_graphs: bool = False
    device: str = "auto"
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    replay: bool = False

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> BenchmarkOptions:
        """Checks parsed arguments. Raises UserError on values that make no sense together."""
        values = vars(arguments)
        settings = tuple(parse_setting(text) for text in values.pop("set"))
        values["variants"] = tuple(values["variants"])
        for name in ("kv_cache_blocks", "concurrency", "num_requests", "repeat", "request_rate", "samples"):
            if values[name] is not None and values[name] <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {values[name]}")
        check_temperature(values["temperature"])
        share = values["kv_cache_share"]
        if share is not None and not 0 < share <= 1:
            raise UserError(f"--kv-cache-share must be above 0 and at most 1, got {share}")
        if share is not None and values["kv_cache_blocks"] is not None:
            raise UserError("--kv-cache-blocks and --kv-cache-share both size the pool, got both (give one of them)")
        return cls(settings=settings, **values)


def check_temperature(temperature: float) -> None:
    """Raises UserError if it is no temperature."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be 0 (greedy) or more, got {temperature:g} (0.6 is usual for DeepSeek-R1)")


def parse_setting(text: str) -> tuple[str, Any]:
    """One ``KEY=VALUE``; the value is JSON where it can be read as such. Raises UserError without an equals sign."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, got {text} (for example max_distance=0.4)")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
