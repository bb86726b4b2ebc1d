"""Work for vLLM with and without memory pressure: requests of recorded traces, a pool, and the settings of each arm.

What the names of the arms mean stands in benchmarks/vllm_pressure.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trtllm_memshare.vllm import SCHEDULER_CLASS, WORKER_CLASS

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
"""Variables for vLLM in this process, on a CPU; read when it is imported."""

_PAPER = "paper-"  # and min_kept
_SKIP = "-skip"  # after the name of any arm of ours
_LONGEST_PROMPT = 96  # tokens of a problem that are used
_FREE_SAMPLING = {"temperature": 0.6}  # greedily, small models repeat themselves and never end


@dataclass(frozen=True)
class VllmWork:
    """Requests and the pool that they are served from.

    Attributes:
      requests: (prompt's token ids, tokens to generate) of each.
      free: the model ends its answers itself, the tokens to generate are the most that it may.
      texts: what each request writes where there is no model, token ids of its trace; none where ``free``.
      replay: the model reads these texts as its own answers.
    """

    model_dir: Path
    null_pages: Path
    traces: Path
    in_flight: int
    shorter_by: int
    longest_answer: int
    block_size: int
    protected_tokens: int
    requests: list[tuple[list[int], int]]
    free: bool = False
    texts: list[list[int]] = field(default_factory=list)
    replay: bool = False

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
        """Options of a command line that ``from_options`` reads. ``defaults``: by option, what differs by command."""
        parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"))
        parser.add_argument("--null-pages", type=Path, default=Path("models/smollm2-null"), help="of vllm calibrate")
        parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_math500.jsonl"))
        parser.add_argument("--requests", type=int)
        parser.add_argument("--in-flight", type=int, help="vLLM's max_num_seqs")
        parser.add_argument("--shorter-by", type=int, help="answers are this part of their traces")
        parser.add_argument("--longest-answer", type=int, help="tokens")
        parser.add_argument("--block-size", type=int, help="tokens; on a CPU vLLM takes multiples of 32")
        parser.add_argument("--protected-tokens", type=int, help="newest tokens, which stay")
        parser.add_argument("--parts", type=int, nargs="+", default=[4], help="pools: one over these of the demand")
        parser.set_defaults(**defaults)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> VllmWork:
        """Reads the traces and cuts them by the model's tokenizer."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
        values = {"free": False, "replay": False, "texts": [], **vars(options)}
        values = {f.name: values[f.name] for f in fields(cls)}
        rows = [json.loads(line) for line in options.traces.read_text().splitlines()]
        if values["free"]:
            requests = ask_in_chat(rows, tokenizer, options.requests, options.longest_answer)
        else:
            cut = cut_requests(rows, tokenizer, options.requests, options.shorter_by, options.longest_answer)
            requests, values["texts"] = [(prompt, len(text)) for prompt, text in cut], [text for _, text in cut]
        return cls(**{**values, "requests": requests})

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, in whole blocks."""
        longest = max(len(prompt) + length for prompt, length in self.requests)
        return -(-longest // self.block_size) * self.block_size

    @property
    def demand_blocks(self) -> int:
        """Blocks that all requests in flight hold at their ends."""
        final = [-(-(len(prompt) + length) // self.block_size) for prompt, length in self.requests]
        return round(sum(final) / len(final) * self.in_flight)

    def pool_blocks(self, part: int) -> int:
        """Blocks of a pool of one ``part``-th of the demand; two more are vLLM's null block and the null page."""
        return -(-self.demand_blocks // part) + 2

    def describe(self, admission: str | None) -> dict[str, Any]:
        """For a report."""
        return {
            "model": self.model_dir.name, "traces": str(self.traces), "requests": len(self.requests),
            "in_flight": self.in_flight, "block_size": self.block_size,
            "prompt_tokens": sum(len(p) for p, _ in self.requests), "answer_tokens": sum(n for _, n in self.requests),
            "longest_answer": max(n for _, n in self.requests), "protected_tokens": self.protected_tokens,
            "admission": admission, "demand_blocks": self.demand_blocks,
        }  # fmt: skip

    def sampling(self, index: int) -> dict[str, Any]:
        """Arguments of vLLM's ``SamplingParams`` for a request. Free ones have a seed, the same in every arm."""
        how: dict[str, Any] = (
            {**_FREE_SAMPLING, "seed": index} if self.free else {"temperature": 0.0, "ignore_eos": True}
        )
        if self.replay:
            from trtllm_memshare.evaluation.vllm_replay import replayed

            how["extra_args"] = replayed(index, self.texts[index])
        return {"max_tokens": self.requests[index][1], **how}

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's engine that all arms have in common."""
        return {
            "model": str(self.model_dir), "dtype": "float32", "enforce_eager": True, "max_num_seqs": self.in_flight,
            "max_model_len": self.max_model_len, "block_size": self.block_size, "enable_prefix_caching": False,
        }  # fmt: skip

    def arm_arguments(self, arm: str, admission: str) -> dict[str, Any]:
        """Those that make an arm, by its name."""
        if arm == "vllm":
            return {}
        arm, null_entries = arm.removesuffix(_SKIP), "skip" if arm.endswith(_SKIP) else "read"
        settings: dict[str, Any] = {"need": "redundancy", "min_kept": 0.5}
        if arm == "admission":
            settings = {"need": "age", "min_kept": 1.0}
        elif arm in ("random", "age"):
            settings["need"] = arm
        elif arm == "default":
            settings = {}
        elif arm.startswith(_PAPER):
            settings = {"need": "nearest-earlier", "min_kept": float(arm[len(_PAPER) :]), "retired_becomes": "alias"}
        else:
            settings["min_kept"] = float(arm)
        settings |= {"protected_tokens": self.protected_tokens, "admission": admission, "null_entries": null_entries}
        return plugin_arguments(self.null_pages, **settings)


def plugin_arguments(null_pages: Path, **settings: Any) -> dict[str, Any]:
    """vLLM's own options that switch our plugin on; ``null_pages`` is for settings that do not skip null entries."""
    if settings.get("null_entries") != "skip":
        settings["null_pages"] = str(null_pages)
    config = {"memshare": settings}
    return {"scheduler_cls": SCHEDULER_CLASS, "worker_cls": WORKER_CLASS, "additional_config": config}


def cut_requests(
    rows: list[dict[str, Any]], tokenizer: Any, count: int, shorter_by: int, longest_answer: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of ``count`` requests, token ids: the traces in order, again and again."""
    work = []
    for index in range(count):
        row = rows[index % len(rows)]
        prompt = tokenizer(row["problem"])["input_ids"][:_LONGEST_PROMPT]
        text = tokenizer(row["reasoning"])["input_ids"]
        # A second request of a trace asks the same of other tokens, so that the prefix cache plays no part.
        work.append(
            (prompt if index < len(rows) else prompt[::-1], text[: min(len(text) // shorter_by, longest_answer)])
        )
    return work


def ask_in_chat(
    rows: list[dict[str, Any]], tokenizer: Any, count: int, longest_answer: int
) -> list[tuple[list[int], int]]:
    """(prompt's token ids, most tokens to generate) of ``count`` problems as a user asks them, by the chat template."""
    work = []
    for index in range(count):
        message = {"role": "user", "content": rows[index % len(rows)]["problem"]}
        asked = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        work.append((tokenizer(asked, add_special_tokens=False)["input_ids"], longest_answer))
    return work
