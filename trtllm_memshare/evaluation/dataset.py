"""Reads benchmark data sets: trtllm-bench's JSON lines plus an optional answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.json_input import parse_json_line


@dataclass(frozen=True)
class DatasetItem:
    """One request. ``input_ids``: prompt tokens; ``output_tokens``: most tokens to generate.

    ``output_ids``: written text that continues the prompt, for teacher-forced measures; None = there is none.
    ``group``: number that samples of one prompt have in common, None = there is one; ``seed``: of the sampling.
    """

    task_id: int
    input_ids: list[int]
    output_tokens: int
    answer: str | None
    output_ids: list[int] | None = None
    group: int | None = None
    seed: int = 0


def final_answer(text: str) -> str:
    """What a reasoning model's output says after its reasoning."""
    return text.rpartition("</think>")[2].strip()


def draw_samples(items: list[DatasetItem], count: int) -> list[DatasetItem]:
    """Each item ``count`` times, one after the other, as samples of one prompt with a seed each; 1 = as they are."""
    if count == 1:
        return items
    return [
        replace(item, group=place, seed=place * count + number)
        for place, item in enumerate(items)
        for number in range(count)
    ]


def read_dataset(path: Path, tokenizer: Any, limit: int | None = None) -> list[DatasetItem]:
    """Reads up to ``limit`` lines ``{"task_id", "prompt" | "input_ids", "output_tokens"[, "answer"][, "output"]}``.

    ``output`` is text that continues the prompt; it is cut to ``output_tokens``.

    Raises:
      UserError: no such file, an empty file, or a line that is not usable, with its number.
    """
    if not path.is_file():
        raise UserError(f"no data set at {path} (give --dataset a JSON-lines file)")
    items: list[DatasetItem] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(items) >= limit:
                break
            if line.strip():
                items.append(_parse(line, f"{path} line {number}", tokenizer))
    if not items:
        raise UserError(f"{path} has no requests (each line is one JSON object with task_id, prompt, output_tokens)")
    return items


def _parse(line: str, where: str, tokenizer: Any) -> DatasetItem:
    row = parse_json_line(line, where)
    output_tokens = row.get("output_tokens")
    if not isinstance(output_tokens, int) or isinstance(output_tokens, bool) or output_tokens < 1:
        raise UserError(f"{where}: output_tokens must be a positive integer, got {output_tokens!r}")
    if not isinstance(row.get("task_id"), int):
        raise UserError(f"{where}: task_id must be an integer, got {row.get('task_id')!r}")
    answer, output = row.get("answer"), row.get("output")
    if output is not None and (not isinstance(output, str) or not output):
        raise UserError(
            f"{where}: output must be text that continues the prompt, got {output!r} (leave it out if none)"
        )
    return DatasetItem(
        row["task_id"],
        _input_ids(row, where, tokenizer),
        output_tokens,
        None if answer is None else str(answer),
        None if output is None else list(tokenizer(output, add_special_tokens=False)["input_ids"])[:output_tokens],
    )


def _input_ids(row: dict[str, Any], where: str, tokenizer: Any) -> list[int]:
    ids = row.get("input_ids")
    if ids is None:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{where} needs a prompt (text) or input_ids (list of integers), got {prompt!r}")
        return list(tokenizer(prompt)["input_ids"])
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{where}: input_ids must be integers from 0 to {len(tokenizer) - 1}, at least one of them")
    return ids
