"""The committed DeepSeek-R1 traces as documents, split by problem."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import Qwen2Tokenizer

from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.json_input import parse_json_line

TRACES = Path("benchmarks/data/traces")
FILES = ("r1_aime24", "r1_math500")
CAN_TRAIN = int(transformers.__version__.partition(".")[0]) >= 5
EOS, PAD, THINK, END_THINK = SPECIAL = ("<eos>", "<pad>", "<think>", "</think>")  # ids 0 to 3
_HELD_OUT = {"r1_aime24": (7, 2), "r1_math500": (3, 1)}  # problems of each file for test and for validation


@dataclass(frozen=True)
class Trace:
    """One problem and what the model wrote on it. ``split``: train, validation or test."""

    source: str
    name: str
    problem: str
    reasoning: str
    content: str
    split: str

    @property
    def prompt(self) -> str:
        return f"{self.problem}\n{THINK}\n"

    @property
    def document(self) -> str:
        """Prompt, reasoning and answer; a trace that was cut off has no end."""
        end = f"\n{END_THINK}\n{self.content}{EOS}" if self.content else ""
        return self.prompt + self.reasoning + end


def read_traces(folder: Path = TRACES) -> list[Trace]:
    """All traces, in the order of the files. The split goes by the hash of the problem, file by file.

    Raises:
      UserError: a file is missing, or a line is not a trace.
    """
    traces = []
    for source in FILES:
        path = folder / f"{source}.jsonl"
        if not path.is_file():
            raise UserError(f"no traces at {path} (run from the root of the repository, or give their folder)")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
        order = sorted(row["problem"] for row in rows)
        order.sort(key=lambda problem: hashlib.sha256(problem.encode()).hexdigest())
        num_test, num_validation = _HELD_OUT[source]
        names = ["test"] * num_test + ["validation"] * num_validation
        split = dict(zip(order, names + ["train"] * (len(order) - len(names)), strict=True))
        traces += [
            Trace(source, str(r["id"]), r["problem"], r["reasoning"], r["content"], split[r["problem"]]) for r in rows
        ]
    return traces


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level byte-pair tokenizer with Qwen2's rules for splitting text; the same documents give the same one.

    Those rules, and digits one by one, come from Qwen2's own class: transformers 5 puts them back whatever
    tokenizer.json of a Qwen2 checkpoint says. Whatever was trained loads with transformers 4 too.

    Raises:
      UserError: transformers 4, whose class cannot be made without files.
    """
    if not CAN_TRAIN:
        raise UserError(
            f"training a tokenizer needs transformers 5, got {transformers.__version__} (on Python 3.11 or 3.12)"
        )
    empty = Qwen2Tokenizer(vocab={EOS: 0, PAD: 1}, merges=[], unk_token=None, eos_token=EOS, pad_token=PAD)
    tokenizer = empty.train_new_from_iterator(documents, vocab_size, new_special_tokens=[THINK, END_THINK])
    tokenizer.model_max_length = max_length
    return tokenizer


def _parse(line: str, where: str) -> dict[str, Any]:
    row = parse_json_line(line, where)
    for key in ("problem", "reasoning", "content"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key} must be text, got {quote(row.get(key))} (take the committed traces)")
    return row
