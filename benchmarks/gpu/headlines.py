"""What of a benchmark's report is worth a glance: the lines that the steps of the GPU suite leave on the output."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]
_TOP = 5  # lines of a profile


def search_headline(report: Report) -> str:
    """A line a row: time, share of the bandwidth of a copy, and the reference's time where it was taken."""
    lines = []
    for row in report["rows"]:
        if "kernel_us" not in row:
            continue
        line = (f"{row['dtype']} {row['pairs']} pairs of {report['tokens_per_block']}: {row['kernel_us']:.1f} us, "
                f"{row['share_of_copy_bandwidth']:.0%} of a copy")  # fmt: skip
        if "profiled_us" in row:
            line += f" (by itself {row['profiled_us']:.1f} us, {row['profiled_share']:.0%})"
        for label in ("reference", "compiled"):
            if f"{label}_us" in row:
                line += f", {label} {row[f'{label}_us']:.0f} us"
        lines.append(line)
    errors = [row["kernel_relative_error"] for row in report["rows"] if "kernel_relative_error" in row]
    lines[0] += f"; copy {report['copy_gb_s'] / 1e3:.2f} TB/s, error {max(errors):.0e}" if errors else ""
    return "\n".join(lines)


def replay_headline(report: Report) -> str:
    """Step times of the variants, how much of a step is the model on the GPU, and what attended."""
    parts = []
    for name, row in report["variants"].items():
        over = "" if row["over_off"] is None else f" ({row['over_off']:+.1%})"
        parts.append(
            f"{name} {row['step_ms_mean']:.2f} ms{over}{_of_it(row)}, {row['step_ms_last_tenth']:.2f} at the end"
        )
    return f"{report['batch_size']} x {report['output_tokens']}: {'; '.join(parts)}; {report['decode_attention']}"


def profile_headline(report: Report) -> str:
    """A step and its parts, then what takes most of the host's and of the GPU's time in it."""
    plain = report["plain"]
    first = (
        f"{report['model_shape']}, {report['batch_size']} requests: step {plain['step_ms_mean']:.2f} ms{_of_it(plain)}"
    )
    lines = []
    for watched, name, rows in (("host", "function", "functions"), ("gpu", "kernel", "kernels")):
        if watched not in report:
            continue
        if watched == "gpu":  # the host's functions add up to the step, with all waits in it
            first += f"; GPU at work {report[watched]['ms_a_step']:.2f} ms, watched"
        for row in report[watched][rows][:_TOP]:
            lines.append(f"{watched} {row['ms_a_step']:.3f} ms, {row['calls_a_step']:.0f} calls: {row[name][:90]}")
    return "\n".join([first, *lines])


def index_headline(report: Report) -> str:
    """What a page and a step cost in the index of signatures, a line for all shapes."""
    shapes = (
        f"{r['requests']} x {r['resident_pages']} pages: {r['ms_a_page'] * 1e3:.0f} us a page, "
        f"{r['ms_a_step']:.2f} ms a step, {r['round_ms']:.1f} ms at once"
        for r in report["rows"]
    )
    return "; ".join(shapes)


def throughput_headline(report: Report) -> str:
    """Requests per second of the variants."""
    rates = [f"{v['variant']} {v['request_throughput_req_s']:.3g}" for v in report["variants"]]
    return f"requests/s: {', '.join(rates)}; {report['kv_cache_blocks']} blocks; {report['decode_attention']}"


def accuracy_headline(report: Report) -> str:
    """Answers that are right, of the variants, and the most blocks that each held."""
    parts = [f"{v['variant']} {v['accuracy']:.1%} right, {v['peak_used_blocks']} blocks" for v in report["variants"]]
    return f"{report['dataset']['num_requests']} problems: {', '.join(parts)}"


def adapter_headline(report: Report) -> str:
    """Loss on problems that were not trained on, at the first and the last entry of the log, and the file's size."""
    first, last = report["log"][0], report["log"][-1]
    return (f"{last['step']} steps: validation loss {first['validation_loss']:.3f} to {last['validation_loss']:.3f}; "
            f"{report['adapter_bytes'] / 2**20:.1f} MiB")  # fmt: skip


def _of_it(row: Report) -> str:
    """What of a step was the CUDA graph, and what was not; nothing where there is none."""
    if row.get("graph_ms_mean") is None:
        return ""
    return f" (graph {row['graph_ms_mean']:.2f}, rest {row['rest_ms_mean']:.2f})"
