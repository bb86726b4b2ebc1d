"""Times work on a device without the host in it, and the bandwidth of a copy to hold it against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_WARM_UPS = 3
_CLOCK_HZ = 2e9  # at least that of any GPU here: a slower one only waits longer
_MAX_LEAD_S = 0.1


@dataclass(frozen=True)
class Timing:
    """Of repeated calls. ``launch_ms``: what the host needs to enqueue one, 0 on the CPU."""

    median_ms: float
    max_ms: float
    launch_ms: float


def time_calls(
    run: Callable[[int], object], repeat: int, device: str, prepare: Callable[[int], object] = lambda _: None
) -> Timing:
    """Median and largest time of ``repeat`` calls, after three to warm up.

    On a GPU by two events around each call. The stream is kept busy until the host has enqueued the call and both
    events, for twice as long as the last warm-up took: on an idle stream the first event would be stamped at once and
    Python's launch would count as the kernel's time. What does count is the gap of one to two microseconds between
    work that stands in line. Should the host fall behind, as with more launches than a stream's queue holds, its
    pauses count.

    Args:
      run: takes the number of the call, from 0, warm-ups included.
      repeat: timed calls.
      device: ``cuda`` or ``cpu``.
      prepare: what comes before each call and does not count.
    """
    times, launch_s = [], 0.0
    for index in range(_WARM_UPS + repeat):
        if device == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if index >= _WARM_UPS:
                lead = min(_MAX_LEAD_S, 2 * launch_s + 1e-4)
                torch.cuda._sleep(int(lead * _CLOCK_HZ))
            clock = time.perf_counter()
            prepare(index)
            started.record()
            run(index)
            ended.record()
            if index < _WARM_UPS:
                launch_s = time.perf_counter() - clock  # the first ones compile
            ended.synchronize()
            taken = started.elapsed_time(ended)
        else:
            prepare(index)
            clock = time.perf_counter()
            run(index)
            taken = (time.perf_counter() - clock) * 1e3
        if index >= _WARM_UPS:
            times.append(taken)
    return Timing(statistics.median(times), max(times), launch_s * 1e3)


def kernel_time_ms(run: Callable[[int], object], repeat: int, name: str, prepare: Callable[[int], object]) -> float:
    """Median of what the kernel called ``name`` took on the device, as its profiler (CUPTI) says: no gap counts.

    Raises:
      ValueError: no such kernel ran.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for index in range(repeat):
            prepare(index)
            run(index)
        torch.cuda.synchronize()
    times = [event.time_range.elapsed_us() * 1e-3 for event in profile.events() if name in event.name]
    if not times:
        raise ValueError(f"the profiler must see a kernel called {name}, got none")
    return statistics.median(times)


def copy_bandwidth(device: str, repeat: int) -> float:
    """Bytes per second read and written by a plain copy, timed as everything else is."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_calls(lambda _: target.copy_(source), repeat, device).median_ms * 1e3
