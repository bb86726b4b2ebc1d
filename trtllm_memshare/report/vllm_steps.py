"""Steps of vLLM's scheduler by pool, as `docs/vllm_figures.md` shows them."""

from __future__ import annotations

from typing import Any

_CACHES = {
    "full": "full attention alone", "gpt-oss-120b": "gpt-oss-120b", "gemma-3-27b": "Gemma 3 27B",
    "qwen3-next-80b": "Qwen3-Next-80B-A3B",
}  # fmt: skip


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


def steps_by_cache(reports: list[dict[str, Any]]) -> str:
    """One row for each model whose layers share the pool, and each load: how many times fewer steps each arm takes.

    Args:
      reports: of ``benchmarks/vllm_schedule.py --cache``, each with another load and the same arms.
    """
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in reports[0]["runs"]) if arm != "vllm"]
    heads = ["the pool is shared as by", "page, tokens", "texts up to", "full attention", "vLLM, steps", "preempted"]
    heads += [f"{arm.removesuffix('-skip')} kept" for arm in arms]
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: |" + " ---: |" * (2 + len(arms))]
    for name in reports[0]["caches"]:
        for report in reports:
            cache = report["caches"][name]
            runs = {run["arm"]: run for run in report["runs"] if run["cache"] == name}
            vllm = runs["vllm"]
            gains = " | ".join(
                f"{vllm['steps'] / runs[arm]['steps']:.2f} times, {runs[arm]['preemptions']} preempted" for arm in arms
            )
            lines.append(
                f"| {_CACHES[name]} | {cache['block_size']} | {report['workload']['longest_answer']:,} | "
                f"{cache['share_of_full_attention']:.0%} | {vllm['steps']:,} | {vllm['preemptions']} | {gains} |"
            )
    return "\n".join(lines).replace("% |", " % |")
