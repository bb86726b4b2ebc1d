"""Trains a low-rank adapter of a real model on chained sums re-checked in words, so that it can be right or wrong.

The task is the bundled model's (``build_scripts/tiny_reasoner/problems.py``): a problem, its working digit by digit,
re-checks in varied wording, the answer. The held-out problems of ``benchmarks/data`` are never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from build_scripts.tiny_reasoner.optimization import Schedule, optimize
from build_scripts.tiny_reasoner.problems import MIN_TERMS, sample_problem, transcript
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.document import make_report

MAX_ADAPTER_BYTES = 16 << 20
"""Of the file that is kept: it has to fit where results are carried by hand."""
_LAYERS = "all-linear"
_VALIDATION_PROBLEMS = 16


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of one run; lengths in tokens.

    Attributes:
      rank: of the adapter of every linear layer. SmolLM2-135M takes 0.6 MiB a rank in bfloat16.
      max_terms: longest sums; those of the data sets have up to six.
      num_steps, minutes: how long, see ``Schedule``.
      tokens_per_step: most tokens of a step, padding and all.
      learning_rate: of AdamW.
    """

    rank: int = 16
    max_terms: int = 6
    num_steps: int = 1000
    minutes: float | None = None
    tokens_per_step: int = 16384
    learning_rate: float = 1e-3
    log_every: int = 100
    seed: int = 20250729


class Transcripts:
    """Documents of the task, ended by the model's end token."""

    def __init__(self, tokenizer: Any, max_terms: int, seed: int) -> None:
        self._tokenizer, self._max_terms, self._rng = tokenizer, max_terms, random.Random(seed)
        self.end: int = tokenizer.eos_token_id
        # The pad token of a chat model is often its end token, which has to be a target.
        spare = (i for i in sorted(tokenizer.all_special_ids) if i != self.end)
        self.pad: int = next(spare, 0)

    def draw(self, *, held_out: bool = False) -> list[int]:
        """One document as token ids."""
        problem = sample_problem(self._rng, self._rng.randint(MIN_TERMS, self._max_terms), held_out=held_out)
        text = problem.prompt + transcript(problem, self._rng)
        return [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def rows(self, documents: list[list[int]]) -> np.ndarray:
        """int64 ``[documents, longest]``, padded at the end, where causal attention does not look."""
        rows = np.full((len(documents), max(map(len, documents))), self.pad, np.int64)
        for row, document in zip(rows, documents, strict=True):
            row[: len(document)] = document
        return rows

    def batches(self, tokens_per_step: int) -> Generator[np.ndarray, float, None]:
        """As ``optimize`` wants them: as many documents as fit, padding counted."""
        yield np.zeros((0, 0), np.int64)
        waiting: list[list[int]] = []
        while True:
            while len(waiting) < 2 or len(waiting) * max(map(len, waiting)) <= tokens_per_step:
                waiting.append(self.draw())
            yield self.rows(waiting[:-1])
            waiting = waiting[-1:]


def train(model_dir: Path, output_dir: Path, config: AdapterConfig, device: str) -> dict[str, Any]:
    """Trains, and writes ``adapter_model.safetensors`` in bfloat16 and ``merged/``, the checkpoint with it applied.

    Returns:
      The report: settings, log (losses in nats a token), adapter_bytes.

    Raises:
      UserError: an adapter above ``MAX_ADAPTER_BYTES``; nothing has been trained then.
    """
    torch.manual_seed(config.seed)
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True).to(device)
    base.config.use_cache = False
    settings = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=_LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    num_bytes = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if num_bytes > MAX_ADAPTER_BYTES:
        most = config.rank * MAX_ADAPTER_BYTES // num_bytes
        raise UserError(
            f"an adapter must take at most {MAX_ADAPTER_BYTES >> 20} MiB in bfloat16, got {num_bytes / 2**20:.1f} MiB "
            f"(set --rank {most})"
        )
    held_out = Transcripts(tokenizer, config.max_terms, config.seed + 1)
    unseen = held_out.rows([held_out.draw(held_out=True) for _ in range(_VALIDATION_PROBLEMS)])
    drawn, log = Transcripts(tokenizer, config.max_terms, config.seed), list[dict[str, float]]()

    def measure(step: int) -> dict[str, float]:
        return {"validation_loss": mean_loss(model, unseen, drawn.pad)}

    def keep(entries: list[dict[str, float]]) -> None:
        log[1:] = entries

    log.append({"step": 0, "minutes": 0.0, **measure(0)})
    batches = drawn.batches(config.tokens_per_step)
    next(batches)
    schedule = Schedule(config.num_steps, config.minutes, 0.0, config.learning_rate, bf16=on_gpu,
                        log_every=config.log_every)  # fmt: skip
    optimize(model.train(), batches, drawn.pad, schedule, measure, keep)
    _write(model, tokenizer, output_dir, dtype)
    written = (output_dir / "adapter_model.safetensors").stat().st_size
    return make_report({"config": asdict(config), "device": device, "adapter_bytes": written, "log": log})


@torch.inference_mode()
def mean_loss(model: Any, rows: np.ndarray, pad: int) -> float:
    """Mean loss over all tokens of the rows but the first of each, in nats a token; leaves the model in training."""
    model.eval()
    batch = torch.from_numpy(rows).to(model.device)
    total, count = 0.0, 0
    for row in batch.split(4):
        logits = model(row[:, :-1], use_cache=False).logits.flatten(0, 1).float()
        targets = row[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=pad, reduction="sum"))
        count += int((targets != pad).sum())
    model.train()
    return total / count


def _write(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    merged = model.to(dtype).merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
