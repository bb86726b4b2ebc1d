"""What benchmarks/trtllm_suite.sh has run, in NVIDIA's order: accuracy, activity, speed, gates.

1. Accuracy: how many answers are right, where the data set has answers, against TensorRT-LLM alone. Batches differ from
   run to run, so TensorRT-LLM alone need not repeat itself to the bit: differences are held against two runs of it.
2. Activity: pages shared and given up. An arm in which nothing was is not reported, and the suite fails.
3. A/B: the same command with one setting changed.
4. Gates: shadow changes no token where TensorRT-LLM alone repeats itself; no error of ours; no request failed; accuracy
   and throughput no further below TensorRT-LLM alone than the limits say.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.evaluation.document import make_report, publish

ALONE = ("alone", "alone_again")
MAX_ACCURACY_LOSS = 0.02
MIN_THROUGHPUT_RATIO = 0.97


def read(path: Path) -> Any:
    """A JSON file of the suite. Raises UserError if it is not there."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no {path}: that arm did not finish, its log is {path.with_suffix('.log').name}") from error


def count_different(first: Any, second: Any) -> int:
    """Entries of two lists, or values of two objects, that are not equal."""
    if isinstance(first, dict):
        return sum(first.get(key) != second.get(key) for key in first.keys() | second.keys())
    return sum(a != b for a, b in zip_longest(first, second))


def share_right(outputs: Any, answers: list[str], decode: Any) -> float | None:
    """How many outputs end with their answer (last 200 characters); None where there are no answers."""
    if not answers or decode is None:
        return None
    tokens = outputs.values() if isinstance(outputs, dict) else outputs
    texts = [decode(t["output_tokens"] if isinstance(t, dict) else t) for t in tokens]
    return sum(a in t[-200:] for a, t in zip(answers, texts, strict=True)) / len(answers)


def find_answers(dataset: Path, model: str) -> tuple[list[str], Any]:
    """Answers of the data set's lines and what turns tokens into text; nothing where it has no answers."""
    lines = [json.loads(line) for line in dataset.read_text().splitlines() if line] if dataset.is_file() else []
    answers = [str(line["answer"]) for line in lines if "answer" in line]
    if not answers or len(answers) != len(lines):
        return [], None
    from transformers import AutoTokenizer

    return answers, AutoTokenizer.from_pretrained(model).decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what trtllm_suite.sh wrote")
    parser.add_argument("--arms", nargs="+", default=["shadow", "aligned", "lexical"])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    folder, failures, rows = options.folder, list[str](), dict[str, dict[str, Any]]()
    answers, decode = find_answers(options.dataset, options.model)
    outputs = {arm: read(folder / f"{arm}.tokens.json") for arm in (*ALONE, *options.arms)}
    for arm in (*ALONE, *options.arms):
        report = read(folder / f"{arm}.json")
        speed, ours = report["performance"], report.get("memshare", {})
        rows[arm] = {
            "right": share_right(outputs[arm], answers, decode),
            "different_answers": count_different(outputs["alone"], outputs[arm]),
            "request_throughput_req_s": speed["request_throughput_req_s"],
            "output_throughput_tok_s": speed["system_output_throughput_tok_s"],
            "mean_requests_in_flight": report["request_info"]["avg_num_concurrent_requests"],
            "pages_shared": ours.get("blocks_shared", 0),
            "pages_forgotten": ours.get("blocks_forgotten", 0),
            "memshare": ours,
        }
    print("1 accuracy against TensorRT-LLM alone" + ("" if answers else " (no answers in the data set: tokens only)"))
    for arm, row in rows.items():
        right = "" if row["right"] is None else f"{row['right']:>7.1%} right"
        print(f"  {arm:<12} {right} {row['different_answers']:>6} answers differ")
    print("2 activity")
    active = []
    for arm in options.arms:
        row, ours = rows[arm], rows[arm]["memshare"]
        would = ours.get("blocks_shadowed", 0)
        print(f"  {arm:<12} {row['pages_shared']:>8} shared {row['pages_forgotten']:>8} given up {would:>8} in shadow")
        if arm != "shadow" and row["pages_shared"] + row["pages_forgotten"] > 0:
            active.append(arm)
        elif arm != "shadow":
            failures.append(
                f"{arm} shared and gave up nothing, so its figures say nothing (longer answers, less memory)"
            )
        if ours.get("errors", 0) or ours.get("requests_failed", 0):
            failures.append(f"{arm}: {ours.get('errors', 0)} errors, {ours.get('requests_failed', 0)} requests failed")
    print("3 A/B: requests a second, tokens a second, requests in flight")
    base = rows["alone"]["request_throughput_req_s"]
    for arm in (*ALONE, *active):
        row = rows[arm]
        ratio = row["ratio"] = row["request_throughput_req_s"] / base
        print(
            f"  {arm:<12} {row['request_throughput_req_s']:>8.2f} ({ratio:.2f}) {row['output_throughput_tok_s']:>9.0f} "
            f"{row['mean_requests_in_flight']:>7.1f}"
        )
        if arm in active and ratio < MIN_THROUGHPUT_RATIO:
            failures.append(
                f"{arm} serves {ratio:.2f} times what TensorRT-LLM alone does, under {MIN_THROUGHPUT_RATIO}"
            )
        if arm in active and row["right"] is not None and row["right"] < rows["alone"]["right"] - MAX_ACCURACY_LOSS:
            failures.append(f"{arm} has {row['right']:.1%} right, TensorRT-LLM alone {rows['alone']['right']:.1%}")
    if rows["shadow"]["different_answers"] and not rows["alone_again"]["different_answers"]:
        differ = rows["shadow"]["different_answers"]
        failures.append(f"shadow must not change a token, but {differ} answers differ (see *.tokens.json)")
    print("4 gates: " + ("all passed" if not failures else "; ".join(failures)))
    if active:
        publish(make_report({"arms": rows, "active": active, "failures": failures}), folder / "summary.json")
    if failures:
        raise UserError(f"{len(failures)} gates failed: {failures[0]}")


if __name__ == "__main__":
    run_command_line(main)
