"""Options of the benchmark of in-flight batching, and the settings that people write on command lines."""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.serving.prompts import PromptFormat

PICTURES = (".png", ".pdf", ".svg", ".jpg")
MOST_REQUESTS = 2**31 - 1
_MOST = {
    "kv_cache_blocks": 2**31 - 1,
    "concurrency": MOST_REQUESTS,
    "num_requests": MOST_REQUESTS,
    "repeat": 1000,
    "samples": 1000,
    "seed": 2**63 - 1,
}
"""Largest value of each option; a million answers to one request are a slip of the finger."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of ``benchmarks/inflight_batching.py``; the names are those of its command line.

    Attributes:
      variants: empty = the full cache, ``aligned`` and the engine's own preset.
    """

    engine_dir: Path
    dataset: Path
    variants: tuple[str, ...] = ()
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
    chat_template: bool = False
    add_special_tokens: bool | None = None

    @property
    def prompt_format(self) -> PromptFormat:
        """How texts of the data set become tokens."""
        return PromptFormat(self.chat_template, self.add_special_tokens)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> BenchmarkOptions:
        """Checks parsed arguments. Raises UserError on values that make no sense together."""
        values = vars(arguments)
        settings = tuple(parse_setting(text) for text in values.pop("set"))
        if values.pop("read_null"):
            settings += (("read_null", True),)
        values["variants"] = tuple(values["variants"] or ())
        for name, most in _MOST.items():
            check_number(f"--{name.replace('_', '-')}", values[name], 0 if name == "seed" else 1, most)
        rate = values["request_rate"]
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"--request-rate must be a number of requests per second above 0, got {rate:g}")
        check_temperature(values["temperature"])
        for name in ("output_json", "plot", "output_texts"):
            check_output_file(f"--{name.replace('_', '-')}", values[name], PICTURES if name == "plot" else ())
        _check_no_file_twice({name: values[name] for name in ("dataset", "output_json", "plot", "output_texts")})
        values["add_special_tokens"] = {"auto": None, "yes": True, "no": False}[values["add_special_tokens"]]
        share = values["kv_cache_share"]
        if share is not None and not 0 < share <= 1:
            raise UserError(f"--kv-cache-share must be above 0 and at most 1, got {share}")
        if share is not None and values["kv_cache_blocks"] is not None:
            raise UserError("--kv-cache-blocks and --kv-cache-share both size the pool, got both (give one of them)")
        return cls(settings=settings, **values)


def check_number(option: str, value: int | None, least: int, most: int) -> None:
    """Raises UserError if a number that was given lies outside; None = it was not given."""
    if value is not None and not least <= value <= most:
        what = "must be positive" if value < 1 <= least else f"must be between {least} and {most}"
        raise UserError(f"{option} {what}, got {quote(value)}")


def check_output_file(option: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raises UserError if a file could not be written at the end of a long run; None = it was not given.

    Args:
      suffixes: ends of names that are understood; none = any.
    """
    if path is None:
        return
    shown = shorten(str(path))
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} must end in one of {', '.join(suffixes)}, got {shown}")
    try:
        is_folder = path.is_dir()
        there = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    except OSError as error:
        raise UserError(f"{option} cannot be written: {shown}: {error.strerror} (choose another path)") from error
    if is_folder:
        raise UserError(f"{option} must name a file, got the directory {shown}")
    if there != path and not there.is_dir():
        raise UserError(f"{option} cannot be written: {shown}: {shorten(str(there))} is no directory")
    # A regular file is replaced by one that is written beside it, so that its folder must let that happen too.
    folder = Path(os.path.realpath(path)).parent if there == path and path.is_file() else there
    for needed in dict.fromkeys((there, folder)):
        if not os.access(needed, os.W_OK):
            raise UserError(f"{option} cannot be written: {shown}: no right to write to {shorten(str(needed))}")


def _check_no_file_twice(files: dict[str, Path | None]) -> None:
    """Raises UserError for one file behind two options: a result would replace the data set, or another result."""
    options = dict[str, str]()
    for name, path in files.items():
        option = f"--{name.replace('_', '-')}"
        if path is None or (path.exists() and not path.is_file()):
            continue  # of a device, which keeps nothing
        if (other := options.setdefault(os.path.realpath(path), option)) != option:
            raise UserError(
                f"{option} must name another file than {other}, got {shorten(str(path))} twice (choose another one)"
            )


def check_temperature(temperature: float) -> None:
    """Raises UserError if it is no temperature."""
    if not 0 <= temperature <= 100:
        raise UserError(
            f"--temperature must be 0 (greedy) or more, at most 100, got {temperature:g} (0.6 is usual for DeepSeek-R1)"
        )


def parse_setting(text: str) -> tuple[str, Any]:
    """One ``KEY=VALUE``; the value is JSON where it can be read as such. Raises UserError without an equals sign."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, got {shorten(text)} (for example max_distance=0.4)")
    if key == "preset":
        raise UserError(
            f"a preset is no setting of another, got {shorten(text)} (name it itself: --preset or --variants)"
        )
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets of thousands
        raise UserError(f"--set {shorten(key)} has a value that is too large, got {shorten(value)}") from error
