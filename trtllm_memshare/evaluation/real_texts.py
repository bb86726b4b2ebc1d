"""The committed reasoning traces as token texts, in an order that is balanced over the models that wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError

TRACES = Path("benchmarks/data/traces")
_RUNAWAY = "math500_0009"  # of the 7B model: 32,768 tokens of one loop, a test of loops and not for averages
_QWEN3_PROBLEMS = {
    **{0: 79, 1: 74, 2: 70, 3: 86, 5: 66, 6: 65, 7: 72, 8: 71, 9: 75, 10: 69, 11: 85, 13: 81, 14: 76, 15: 87, 16: 61},
    18: 78,
}
"""Trace number -> problem in r1_aime24.jsonl: the trace file holds no problems, these are what the traces restate."""
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Trace:
    """One reasoning text.

    Attributes:
      name: of the text, unique.
      problem: equal for texts of one problem, whoever wrote them.
      model: who wrote it.
      prompt, output: text; the prompt ends where generation began.
    """

    name: str
    problem: str
    model: str
    prompt: str
    output: str


@dataclass(frozen=True)
class TokenText:
    """The first tokens of a trace: ``ids`` of prompt and output, of which ``num_prompt_tokens`` are prompt."""

    trace: Trace
    ids: list[int]
    num_prompt_tokens: int


def read_traces(folder: Path = TRACES) -> list[Trace]:
    """All traces in turns over the models, so that any first part of the list is balanced over them.

    Raises:
      UserError: a file that is missing.
    """
    by_model: dict[str, list[Trace]] = {}
    for trace in _all(folder):
        by_model.setdefault(trace.model, []).append(trace)
    longest = max(map(len, by_model.values()))
    return [traces[i] for i in range(longest) for traces in by_model.values() if i < len(traces)]


def token_texts(traces: list[Trace], tokenizer: Any, num_tokens: int) -> Iterator[TokenText]:
    """The first ``num_tokens`` tokens of each trace that has as many, special tokens left out."""
    for trace in traces:
        prompt = tokenizer(trace.prompt, add_special_tokens=False)["input_ids"]
        output = tokenizer(trace.output, add_special_tokens=False, verbose=False)["input_ids"]
        if len(prompt) + len(output) >= num_tokens and 2 * len(prompt) < num_tokens:
            yield TokenText(trace, (prompt + output)[:num_tokens], len(prompt))


def cut_traces(tokenizer: Any, count: int, max_tokens: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Requests of unequal length out of the first traces that are long enough: (problem, written text) as token ids.

    Lengths of problem and text together are drawn evenly from a quarter of ``max_tokens`` upwards, a problem takes a
    sixth of ``max_tokens`` at most.
    """
    rng, requests = np.random.default_rng(seed), list[tuple[list[int], list[int]]]()
    for text in token_texts(read_traces(), tokenizer, max_tokens):
        if len(requests) == count:
            break
        if text.num_prompt_tokens <= max_tokens // 6:
            length = int(rng.integers(max_tokens // 4, max_tokens + 1))
            requests.append((text.ids[: text.num_prompt_tokens], text.ids[text.num_prompt_tokens : length]))
    return requests


def whole_traces(tokenizer: Any, count: int, max_tokens: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Requests of the lengths that the models wrote, cut at ``max_tokens``, in a drawn order; otherwise ``cut_traces``.

    Traces take turns over the models that wrote them.
    """
    requests = list[tuple[list[int], list[int]]]()
    for trace in read_traces()[:count]:
        prompt = tokenizer(trace.prompt, add_special_tokens=False)["input_ids"]
        output = tokenizer(trace.output, add_special_tokens=False, verbose=False)["input_ids"]
        requests.append((prompt, output[: max_tokens - len(prompt)]))
    return [requests[i] for i in np.random.default_rng(seed).permutation(len(requests))]


def runaway_trace(folder: Path = TRACES) -> Trace:
    """The 32,768-token loop of R1-Distill-Qwen-7B."""
    rows = _read(folder / "r1-distill-math500-pilot" / "pilot_math500_qwen7b.jsonl")
    return _pilot(next(row for row in rows if row["item_id"] == _RUNAWAY))


def _all(folder: Path) -> Iterator[Trace]:
    aime = {row["id"]: row["problem"] for row in _read(folder / "r1_aime24.jsonl")}
    for row in _read(folder / "qwen3-32b-thinking-aime24" / "traces.jsonl"):
        number = _QWEN3_PROBLEMS[int(row["id"].rsplit("-", 1)[1])]
        thought = str(row["text"]).removeprefix("<think>\n")
        for end in _TURN_ENDS:
            thought = thought.removesuffix(end)
        yield Trace(row["id"], f"aime24-{number}", "Qwen3-32B", f"{aime[number]}\n<think>\n", thought)
    for name in ("pilot_math500_llama8b", "pilot_math500_qwen7b"):
        for row in _read(folder / "r1-distill-math500-pilot" / f"{name}.jsonl"):
            if not (row["item_id"] == _RUNAWAY and name.endswith("qwen7b")):
                yield _pilot(row)
    for name in ("r1_aime24", "r1_math500"):
        for row in _read(folder / f"{name}.jsonl"):
            problem = f"aime24-{row['id']}" if name == "r1_aime24" else row["problem"]
            yield Trace(f"r1-{row['id']}", problem, "DeepSeek-R1", f"{row['problem']}\n<think>\n", row["reasoning"])
    for name in ("math500_deepseek_r1", "pilot_math500_r1"):
        for row in _read(folder / "r1-distill-math500-pilot" / f"{name}.jsonl"):
            yield _pilot(row, name)
    for row in _read(folder / "r1-distill-qwen1.5b-math" / "traces.jsonl"):
        prompt, _, thought = str(row["generated_cot"]).partition("<think>\n")
        name = f"r1-distill-1.5b-{row['problem_id']}"
        yield Trace(name, row["problem_text"], "R1-Distill-Qwen-1.5B", f"{prompt}<think>\n", thought)


def _pilot(row: dict[str, Any], prefix: str = "") -> Trace:
    thought = str(row["full_response"]).removeprefix("<think>\n")
    model = str(row["model_short_name"])
    name = f"{prefix or model}-{row['item_id']}"
    return Trace(name, row["problem"], model, f"{row['problem']}\n<think>\n", thought)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise UserError(f"cannot read the traces {path}: {error.strerror} (they are in the repository)") from error
