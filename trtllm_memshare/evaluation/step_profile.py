"""Where the time of decode steps goes: functions of the host and kernels of the GPU, of steps alone.

Imports, the tokenizer, the capture of graphs and the prompts' step are left out. Each profile takes a run of its own,
since it makes what it watches slower: the host's says which functions, the GPU's how long kernels take.
"""

from __future__ import annotations

import cProfile
import pstats
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

SKIPPED_STEPS = 8
"""First steps that are not watched: the prompts', and those after it, in which buffers grow."""
_TOP = 15


class HostProfile:
    """Watches the interpreter while a step runs; one is called with each step."""

    def __init__(self) -> None:
        self._profile, self._num_steps = cProfile.Profile(), 0

    def __call__(self, step: Callable[[], object]) -> None:
        self._num_steps += 1
        if self._num_steps <= SKIPPED_STEPS:
            step()
        else:
            self._profile.runcall(step)

    def summary(self) -> dict[str, Any]:
        """Watched steps, and what of one took longest by itself: its callees are not in it, waits for the GPU are.

        Raises:
          ValueError: there were no more steps than are skipped.
        """
        count = _watched(self._num_steps)
        stats: dict[Any, Any] = pstats.Stats(self._profile).stats  # type: ignore[attr-defined]
        rows = [
            {"function": _place(*where), "calls_a_step": calls / count, "ms_a_step": own * 1e3 / count}
            for where, (_, calls, own, *_) in stats.items()
        ]
        return {"num_steps": count, "ms_a_step": sum(row["ms_a_step"] for row in rows), "functions": _longest(rows)}


class KernelProfile:
    """Watches the GPU while steps run; one is called with each step."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        self._num_steps = 0

    def __call__(self, step: Callable[[], object]) -> None:
        self._num_steps += 1
        if self._num_steps == SKIPPED_STEPS + 1:
            torch.cuda.synchronize()
            self._profile.start()
        step()

    def summary(self) -> dict[str, Any]:
        """Watched steps, how long the GPU is at work in one, copies included, and what takes longest.

        Raises:
          ValueError: there were no more steps than are skipped.
        """
        count = _watched(self._num_steps)
        torch.cuda.synchronize()
        self._profile.stop()
        return summarize_kernels(gpu_spans(self._profile.events()), count)


def gpu_spans(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Names and microseconds of what the GPU did, of the events of a profile.

    Calls of the driver are among the events too, and would count the host's waiting as work.
    """
    return [(e.name, e.time_range.elapsed_us()) for e in events if e.device_type is torch.autograd.DeviceType.CUDA]


def summarize_kernels(spans: list[tuple[str, float]], num_steps: int) -> dict[str, Any]:
    """The summary of names and microseconds of everything that the GPU did in ``num_steps`` steps."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, us in spans:
        found[name].append(us)
    rows = [
        {"kernel": name[:120], "calls_a_step": len(times) / num_steps, "ms_a_step": sum(times) / 1e3 / num_steps}
        for name, times in found.items()
    ]
    return {"num_steps": num_steps, "ms_a_step": sum(row["ms_a_step"] for row in rows), "kernels": _longest(rows)}


def _watched(num_steps: int) -> int:
    if num_steps <= SKIPPED_STEPS:
        raise ValueError(f"a profile needs more than {SKIPPED_STEPS} steps, got {num_steps} (ask for more tokens)")
    return num_steps - SKIPPED_STEPS


def _place(file: str, line: int, name: str) -> str:
    return name if file == "~" else f"{Path(file).name}:{line} {name}"


def _longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["ms_a_step"])[:_TOP]
