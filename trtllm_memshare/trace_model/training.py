"""Trains the model of the traces from random weights on windows of the documents of the training split.

Windows are short at first, which is cheap, and as long as the model's context in the last part of training, so that
it has seen the positions and the distances between repeats that the measurements use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trtllm_memshare.tiny_reasoner.optimization import Schedule, optimize
from trtllm_memshare.trace_model.corpus import TRACES, read_traces, train_tokenizer


@dataclass(frozen=True)
class TraceTrainingConfig:
    """Settings of one run. Lengths in tokens; what is not explained here: see ``Schedule``."""

    num_steps: int = 1100
    minutes: float | None = None
    tokens_per_step: int = 8192
    vocab_size: int = 2048
    short_window: int = 1024
    long_window: int = 4096  # also the model's context
    long_share: float = 0.2  # of training, at its end
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 20250729
    bf16: bool = True


def model_config(config: TraceTrainingConfig, eos_id: int, pad_id: int) -> Qwen2Config:
    """Shape of the model: that of the bundled one with a larger vocabulary, 1.1 million parameters."""
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=config.long_window,
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def train(config: TraceTrainingConfig, output_dir: Path, device: str, traces: Path = TRACES) -> None:
    """Trains; keeps the weights with the lowest validation loss, with tokenizer and ``training_log.json``."""
    torch.manual_seed(config.seed)
    documents = {s: [t.document for t in read_traces(traces) if t.split == s] for s in ("train", "validation")}
    tokenizer = train_tokenizer(documents["train"], config.vocab_size, config.long_window)
    encoded = {split: [np.array(tokenizer.encode(d), np.int64) for d in texts] for split, texts in documents.items()}
    model = Qwen2ForCausalLM(model_config(config, tokenizer.eos_token_id, tokenizer.pad_token_id)).to(device)

    def keep(log: list[dict[str, float]]) -> None:
        losses = [entry["validation_loss"] for entry in log]
        if losses[-1] == min(losses):
            model.save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
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
        _batches(config, encoded["train"], tokenizer.pad_token_id),
        tokenizer.pad_token_id,
        Schedule(
            config.num_steps,
            config.minutes,
            config.muon_learning_rate,
            config.adam_learning_rate,
            config.weight_decay,
            config.bf16,
            log_every=100,
        ),
        measure=lambda _: {"validation_loss": mean_loss(model, encoded["validation"], config.long_window)},
        keep=keep,
    )


@torch.inference_mode()
def mean_loss(model: Any, documents: list[np.ndarray], window: int) -> float:
    """Mean loss over the first ``window`` tokens of each document, in nats per token."""
    total, count = 0.0, 0
    for ids in documents:
        batch = torch.from_numpy(ids[None, :window]).to(model.device)
        logits = model(batch[:, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum"))
        count += batch.shape[1] - 1
    return total / count


def _batches(
    config: TraceTrainingConfig, documents: list[np.ndarray], pad_id: int
) -> Generator[np.ndarray, float, None]:
    """Yields int64 ``[sequences, window]`` padded batches; ``send`` takes the share of training done."""
    generator = _generate_batches(config, documents, pad_id)
    next(generator)
    return generator


def _generate_batches(
    config: TraceTrainingConfig, documents: list[np.ndarray], pad_id: int
) -> Generator[Any, float, None]:
    rng = np.random.default_rng(config.seed)
    sizes = np.array([len(d) for d in documents], float)
    done = yield
    while True:
        window = config.long_window if done >= 1 - config.long_share else config.short_window
        batch = np.full((math.ceil(config.tokens_per_step / window), window), pad_id, np.int64)
        for row in batch:
            document = documents[rng.choice(len(documents), p=sizes / sizes.sum())]
            last = max(0, len(document) - window)
            # Every fourth window starts with a prompt, as every measured text does.
            start = 0 if rng.random() < 0.25 else rng.integers(last + 1)
            part = document[start : start + window]
            row[: len(part)] = part
        done = yield batch
