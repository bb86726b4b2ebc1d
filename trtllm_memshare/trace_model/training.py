"""Trains the model of the traces from random weights on windows of the documents of the training split.

The text is little, so dropout and weight decay hold the model back from learning it by heart, and the weights with the
lowest validation loss are kept.
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

    num_steps: int = 700
    minutes: float | None = None
    tokens_per_step: int = 8192
    vocab_size: int = 2048
    window: int = 4096  # also the model's context
    prompt_share: float = 0.05  # of windows that start with the prompt, as every measured text does
    dropout: float = 0.2
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
        max_position_embeddings=config.window,
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Without the list of special tokens, which transformers 4 reads as a mapping: tokenizer.json has them anyway."""
    tokenizer.save_pretrained(folder)
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
    model = Qwen2ForCausalLM(model_config(config, tokenizer.eos_token_id, tokenizer.pad_token_id)).to(device).train()

    add_dropout(model, config.dropout)

    def keep(log: list[dict[str, float]]) -> None:
        losses = [entry["validation_loss"] for entry in log]
        if losses[-1] == min(losses):
            model.save_pretrained(output_dir)
            _save_tokenizer(tokenizer, output_dir)
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
            log_every=50,
        ),
        measure=lambda _: {"validation_loss": mean_loss(model, encoded["validation"], config.window)},
        keep=keep,
    )


def add_dropout(model: Any, rate: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream, in training mode only."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: torch.dropout(output, rate, m.training))


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


def _batches(
    config: TraceTrainingConfig, documents: list[np.ndarray], pad_id: int
) -> Generator[np.ndarray, float, None]:
    """Yields int64 ``[sequences, window]`` padded batches."""
    generator = _generate_batches(config, documents, pad_id)
    next(generator)
    return generator


def _generate_batches(
    config: TraceTrainingConfig, documents: list[np.ndarray], pad_id: int
) -> Generator[Any, float, None]:
    rng = np.random.default_rng(config.seed)
    sizes = np.array([len(d) for d in documents], float)
    yield
    while True:
        batch = np.full((math.ceil(config.tokens_per_step / config.window), config.window), pad_id, np.int64)
        for row in batch:
            document = documents[rng.choice(len(documents), p=sizes / sizes.sum())]
            last = max(0, len(document) - config.window)
            start = 0 if rng.random() < config.prompt_share else rng.integers(last + 1)
            part = document[start : start + config.window]
            row[: len(part)] = part
        yield batch
