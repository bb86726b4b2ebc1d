"""What the arms of benchmarks/trtllm_suite.sh left behind: their figures, and the gates that they have to pass."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError

ALONE = ("alone", "alone_again")
MAX_ACCURACY_LOSS = 0.02
MIN_THROUGHPUT_RATIO = 0.97


@dataclass(frozen=True)
class Answers:
    """Right answers of a data set, in the order of its lines, and what turns tokens into text; None = it has none."""

    right: list[str]
    decode: Any

    @classmethod
    def find(cls, dataset: Path, model: str) -> Answers | None:
        """Those of the data set's lines, where every line has one."""
        lines = [json.loads(line) for line in dataset.read_text().splitlines() if line] if dataset.is_file() else []
        if not lines or any("answer" not in line for line in lines):
            return None
        from transformers import AutoTokenizer

        return cls([str(line["answer"]) for line in lines], AutoTokenizer.from_pretrained(model).decode)

    def share_right(self, outputs: Any) -> float:
        """How many outputs have their answer at their end, in the last 200 characters, as a word of its own."""
        tokens = outputs.values() if isinstance(outputs, dict) else outputs
        texts = [self.decode(t["output_tokens"] if isinstance(t, dict) else t) for t in tokens]
        return sum(_stands_in(a, t[-200:]) for a, t in zip(self.right, texts, strict=True)) / len(self.right)


def count_different(first: Any, second: Any) -> int:
    """Entries of two lists, or values of two objects, that are not equal."""
    if isinstance(first, dict):
        return sum(first.get(key) != second.get(key) for key in first.keys() | second.keys())
    return sum(a != b for a, b in zip_longest(first, second))


def read_arms(folder: Path, arms: list[str], answers: Answers | None) -> dict[str, dict[str, Any]]:
    """Figures of TensorRT-LLM alone, and of each arm, in this order. Raises UserError if one has no report.

    Args:
      arms: those that ran to their ends; ``alone_again`` is TensorRT-LLM alone once more.
    """
    rows: dict[str, dict[str, Any]] = {}
    alone = _read(folder / "alone.tokens.json")
    for arm in ("alone", *arms):
        report, outputs = _read(folder / f"{arm}.json"), _read(folder / f"{arm}.tokens.json")
        speed, ours = report["performance"], report.get("memshare", {})
        rows[arm] = {
            "right": answers.share_right(outputs) if answers is not None else None,
            "different_answers": count_different(alone, outputs),
            "request_throughput_req_s": speed["request_throughput_req_s"],
            "output_throughput_tok_s": speed["system_output_throughput_tok_s"],
            "mean_requests_in_flight": report["request_info"]["avg_num_concurrent_requests"],
            "pages_shared": ours.get("blocks_shared", 0),
            "pages_forgotten": ours.get("blocks_forgotten", 0),
            "memshare": ours,
        }
        if arm in ALONE or is_active(arm, rows[arm]):
            rows[arm]["ratio"] = speed["request_throughput_req_s"] / rows["alone"]["request_throughput_req_s"]
    return rows


def is_active(arm: str, row: dict[str, Any]) -> bool:
    """Whether an arm shared or gave up a page: without that its figures say nothing."""
    return arm not in (*ALONE, "shadow") and row["pages_shared"] + row["pages_forgotten"] > 0


def failed_gates(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for every gate that an arm of ``read_arms`` did not pass."""
    failures, alone = list[str](), rows["alone"]
    for arm, row in rows.items():
        ours = row["memshare"]
        if arm not in (*ALONE, "shadow") and not is_active(arm, row):
            failures.append(
                f"{arm} shared and gave up nothing, so its figures say nothing (longer answers, less memory)"
            )
        if ours.get("errors", 0) or ours.get("requests_failed", 0):
            failures.append(f"{arm}: {ours.get('errors', 0)} errors, {ours.get('requests_failed', 0)} requests failed")
    for arm, row in rows.items():
        if not is_active(arm, row):
            continue
        if row["ratio"] < MIN_THROUGHPUT_RATIO:
            failures.append(
                f"{arm} serves {row['ratio']:.2f} times what TensorRT-LLM alone does, under {MIN_THROUGHPUT_RATIO}"
            )
        if row["right"] is not None and row["right"] < alone["right"] - MAX_ACCURACY_LOSS:
            failures.append(f"{arm} has {row['right']:.1%} right, TensorRT-LLM alone {alone['right']:.1%}")
    if "shadow" not in rows:
        failures.append("shadow did not run to its end, so nothing says that our search alone changes no token")
        return failures
    differ = rows["shadow"]["different_answers"]
    if differ and not rows.get("alone_again", {}).get("different_answers"):
        failures.append(f"shadow must not change a token, but {differ} answers differ (see *.tokens.json)")
    return failures


def _stands_in(answer: str, text: str) -> bool:
    """5 stands in "is 5." and not in "is 15", "is 5.2", "is 0.5", "is -5" or "is 5,000"."""
    return re.search(rf"(?<![\w.-]){re.escape(answer)}(?!\w|[.,]\d)", text) is not None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no {path}: that arm did not finish, its log is {path.with_suffix('.log').name}") from error
