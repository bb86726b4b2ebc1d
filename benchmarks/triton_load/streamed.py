"""The same full load as streams, by our own clients and by AIPerf: rate, and time to first token under load."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.triton_load.aiperf import AiperfLoad, LoadFigures, Prompt, run_aiperf
from benchmarks.triton_load.cost import Alone, Triton
from benchmarks.triton_load.server import cpu_seconds
from trtllm_memshare.evaluation.dataset import DatasetItem


@dataclass(frozen=True)
class Streams:
    """What is asked of every side.

    Attributes:
      items, texts: the requests, as token ids and as text.
      clients: at a time.
      aiperf: the executable.
      tokenizer_dir: with which AIPerf counts.
    """

    items: list[DatasetItem]
    texts: list[str]
    clients: int
    aiperf: Path
    tokenizer_dir: Path

    def run(self, sides: Mapping[str, Triton | Alone], url: str, folder: Path, number: int) -> dict[str, LoadFigures]:
        """Our own clients on every side, then AIPerf on Triton, which it reaches at ``url``; ``folder``: for AIPerf.

        ``number``: of the round; the side that begins is the other one in odd rounds.
        """
        order = sorted(sides, reverse=bool(number % 2))
        found = {name: asyncio.run(self.run_own(sides[name])) for name in order}
        prompts = [Prompt(text, item.output_tokens) for text, item in zip(self.texts, self.items, strict=True)]
        load = AiperfLoad(url, "ensemble", "triton", self.tokenizer_dir, prompts, self.clients)
        return {**found, "aiperf": run_aiperf(self.aiperf, load, folder)}

    async def run_own(self, side: Triton | Alone) -> LoadFigures:
        """Our own clients; a request that fails ends them all."""
        places, me = asyncio.Semaphore(self.clients), psutil.Process()
        async with side as ask:

            async def one(item: DatasetItem, text: str) -> float:
                async with places:
                    return await ask(item, text, item.output_tokens, True)

            began, own = time.perf_counter(), cpu_seconds(me)
            first = await asyncio.gather(*(one(i, t) for i, t in zip(self.items, self.texts, strict=True)))
            seconds = time.perf_counter() - began
            p50, p99 = (float(np.percentile(first, q)) * 1e3 for q in (50, 99))
            return LoadFigures(len(first) / seconds, p50, p99, len(first), 0, cpu_seconds(me) - own)


def streamed_summary(rounds: list[dict[str, LoadFigures]]) -> dict[str, Any]:
    """Medians of each load over the rounds, errors in all; ``throughput_ratio``: Triton's by pairs of rounds."""
    loads = {
        load: {
            **{key: statistics.median(asdict(r[load])[key] for r in rounds) for key in asdict(rounds[0][load])},
            "num_errors": sum(r[load].num_errors for r in rounds),
        }
        for load in rounds[0]
    }
    return {
        **loads,
        "throughput_ratio": statistics.median(r["triton"].req_s / r["executor"].req_s for r in rounds),
        "rounds": [{load: asdict(figures) for load, figures in r.items()} for r in rounds],
    }


def streamed_lines(summary: dict[str, Any]) -> list[str]:
    """A summary for people, one line a load."""
    return [
        f"streamed, {load}: {found['req_s']:.2f} requests per second, first token after {found['ttft_p50_ms']:.0f} ms "
        f"(p99 {found['ttft_p99_ms']:.0f}), {found['num_errors']} errors; CPU time of the load "
        f"{found['client_cpu_s']:.1f} s"
        for load, found in summary.items()
        if isinstance(found, dict)
    ]
