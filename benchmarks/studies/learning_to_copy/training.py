"""Trains the model of the traces: first to continue earlier copies, then on the documents of the training split.

The text is little, so dropout and weight decay hold the model back from learning it by heart, and the weights with the
lowest validation loss are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from benchmarks.studies.learning_to_copy.copy_loss import copy_loss
from benchmarks.studies.learning_to_copy.curriculum import Curriculum, Mixture
from benchmarks.studies.learning_to_copy.shape import look_one_back, model_config
from build_scripts.tiny_reasoner.optimization import Schedule, optimize
from trtllm_memshare.engine.checkpoint import portable_config
from trtllm_memshare.evaluation.corpus import SPECIAL, TRACES, read_traces, train_tokenizer

_COPY_LENGTHS = (16, 128, 512)  # tokens


@dataclass(frozen=True)
class TraceTrainingConfig(Mixture):
    """Settings of one run. Lengths in tokens; what is not explained here: see ``Schedule`` and ``Mixture``.

    Attributes:
      start_head: begin with a head that looks one token back.
      window: longest batch row, also the model's context.
      dropout: of the text; there is none while the model learns to copy.
    """

    num_steps: int = 2200
    minutes: float | None = None
    tokens_per_step: int = 4096
    vocab_size: int = 2048
    window: int = 4096
    start_head: bool = True
    dropout: float = 0.15
    muon_learning_rate: float = 0.0
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    log_every: int = 100
    seed: int = 20250729
    bf16: bool = True


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A checkpoint that transformers 4 and 5 load alike: the rotary base under both its names, and no list of special
    tokens, which 4 reads as a mapping (tokenizer.json has them anyway)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(portable_config(json.loads(path.read_text())), indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    document.pop("extra_special_tokens", None)
    path.write_text(json.dumps(document, indent=2) + "\n")


def train(config: TraceTrainingConfig, output_dir: Path, device: str, traces: Path = TRACES) -> None:
    """Trains; keeps the weights with the lowest validation loss, with tokenizer and ``training_log.json``."""
    torch.manual_seed(config.seed)
    documents = {s: [t.document for t in read_traces(traces) if t.split == s] for s in ("train", "validation")}
    tokenizer = train_tokenizer(documents["train"], config.vocab_size, config.window)
    encoded = {split: [np.array(tokenizer.encode(d), np.int64) for d in texts] for split, texts in documents.items()}
    shape = model_config(config.vocab_size, config.window, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(shape).to(device).train()
    if config.start_head:
        look_one_back(model)
    curriculum = Curriculum(
        encoded["train"],
        config,
        config.vocab_size,
        len(SPECIAL),
        tokenizer.pad_token_id,
        config.tokens_per_step,
        config.window,
        config.seed,
    )
    add_dropout(model, lambda: config.dropout if curriculum.in_text else 0.0)

    def measure(step: int) -> dict[str, float]:
        model.eval()
        copies = {f"copy_loss_{n}": copy_loss(model, n, len(SPECIAL)) for n in _COPY_LENGTHS if 2 * n <= config.window}
        return {"validation_loss": mean_loss(model, encoded["validation"], config.window), **copies}

    def keep(log: list[dict[str, float]]) -> None:
        losses = [entry["validation_loss"] for entry in log]
        if losses[-1] == min(losses):
            _save(model, tokenizer, output_dir)
        document = {
            "torch": torch.__version__,
            "config": asdict(config),
            "tokens": {split: sum(map(len, ids)) for split, ids in encoded.items()},
            "kept_step": log[losses.index(min(losses))]["step"],
            "log": log,
        }
        (output_dir / "training_log.json").write_text(json.dumps(document, indent=1) + "\n")

    optimize(
        model,
        curriculum.batches(),
        tokenizer.pad_token_id,
        Schedule(
            config.num_steps,
            config.minutes,
            config.muon_learning_rate,
            config.adam_learning_rate,
            config.weight_decay,
            config.bf16,
            log_every=config.log_every,
        ),
        measure=measure,
        keep=keep,
    )


def add_dropout(model: Any, rate: Callable[[], float]) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream, in training mode only."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: torch.dropout(output, rate(), m.training))


@torch.inference_mode()
def mean_loss(model: Any, documents: list[np.ndarray], window: int) -> float:
    """Mean loss over the first ``window`` tokens of each document, in nats per token."""
    model.eval()
    total, count = 0.0, 0
    for ids in documents:
        batch = torch.from_numpy(ids[None, :window]).to(model.device)
        logits = model(batch[:, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum"))
        count += batch.shape[1] - 1
    model.train()
    return total / count
