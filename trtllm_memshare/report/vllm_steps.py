"""Steps of vLLM's scheduler by pool, as `docs/vllm_figures.md` shows them."""

from __future__ import annotations

from typing import Any


def steps_by_pool(report: dict[str, Any]) -> str:
    """One row for each pool, smallest first: vLLM's steps, and how many times fewer each arm takes."""
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in report["runs"]) if arm not in ("vllm", "admission")]
    lines = [
        f"| pool | vLLM, steps | preempted | {' | '.join(f'`min_kept` {arm}' for arm in arms)} |",
        "| ---: | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for part in sorted({run["part"] for run in report["runs"]}, reverse=True):
        runs = {run["arm"]: run for run in report["runs"] if run["part"] == part}
        vllm = runs["vllm"]
        gains = " | ".join(
            f"{vllm['steps'] / runs[arm]['steps']:.2f} times, {runs[arm]['preemptions']} preempted" for arm in arms
        )
        lines.append(f"| 1/{part} | {vllm['steps']:,} | {vllm['preemptions']} | {gains} |")
    return "\n".join(lines)
