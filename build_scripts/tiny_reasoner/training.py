"""Trains the bundled model from random weights on generated transcripts.

Early batches hold transcripts cut short: a first pass is where arithmetic is learned, and re-checks are mostly
copying. Later batches hold whole transcripts, so that the model learns when to stop and every position it will see.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from build_scripts.tiny_reasoner.optimization import Schedule, optimize
from build_scripts.tiny_reasoner.problems import sample_problem, transcript
from build_scripts.tiny_reasoner.tokenizer import EOS, PAD, VOCAB_SIZE, VOCABULARY, encode_fast, save_tokenizer


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run. Lengths in tokens; what is not explained here: see ``Schedule``."""

    num_steps: int = 4500
    minutes: float | None = None
    tokens_per_step: int = 12288
    prefix_length: int = 448
    early_full_share: float = 0.15  # share of batches with whole transcripts, in the first 70 % of training
    late_full_share: float = 0.6  # and in the rest
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    slip_rate: float = 0.08
    seed: int = 20250729
    bf16: bool = True


def model_config() -> Qwen2Config:
    """Shape of the bundled model: about a million parameters, two KV heads of 32, room for the longest problem."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
    )


def train(config: TrainingConfig, output_dir: Path, device: str, init_from: Path | None = None) -> None:
    """Trains, then writes the checkpoint, the tokenizer and ``training_log.json`` to ``output_dir``.

    Args:
      init_from: a checkpoint to go on from; its log is kept in front of the new one. None = random weights.
    """
    torch.manual_seed(config.seed)
    earlier: list[dict[str, Any]] = []
    if init_from is None:
        model = Qwen2ForCausalLM(model_config()).to(device)
    else:
        model = Qwen2ForCausalLM.from_pretrained(init_from, dtype=torch.float32).to(device)
        earlier = json.loads((init_from / "training_log.json").read_text())["stages"]
    schedule = Schedule(
        config.num_steps,
        config.minutes,
        config.muon_learning_rate,
        config.adam_learning_rate,
        bf16=config.bf16,
    )
    optimize(
        model,
        _batches(config),
        VOCABULARY[PAD],
        schedule,
        measure=lambda step: {"exact_rate": exact_rate(model, 64, seed=step)},
        keep=lambda log: save(model, [*earlier, {"config": asdict(config), "log": log}], output_dir),
    )


def save(model: Qwen2ForCausalLM, stages: list[dict[str, Any]], output_dir: Path) -> None:
    """Writes the checkpoint as safetensors in float32, with tokenizer and the log of every stage of training."""
    model.save_pretrained(output_dir)
    save_tokenizer(model.config.max_position_embeddings, output_dir)
    document = {"torch": torch.__version__, "stages": stages}
    (output_dir / "training_log.json").write_text(json.dumps(document, indent=1) + "\n")


@torch.inference_mode()
def exact_rate(model: Qwen2ForCausalLM, num_problems: int, seed: int) -> float:
    """Share of held-out problems of 3 to 6 terms whose whole transcript greedy decoding would give, in [0, 1].

    Computed teacher-forced: greedy decoding gives the transcript exactly if every arg-max equals the next token.
    """
    rng, exact = random.Random(seed), 0
    for _ in range(num_problems):
        problem = sample_problem(rng, rng.randint(3, 6), held_out=True)
        ids = encode_fast(problem.prompt + transcript(problem, rng) + EOS)
        predicted = model(torch.from_numpy(ids[None]).to(model.device)).logits[0].argmax(-1).cpu().numpy()
        prompt_length = len(problem.prompt)
        exact += bool((predicted[prompt_length - 1 : -1] == ids[prompt_length:]).all())
    return exact / num_problems


def _batches(config: TrainingConfig) -> Generator[np.ndarray, float, None]:
    """Yields int64 ``[sequences, length]`` padded batches; ``send`` takes the share of training done."""
    generator = _generate_batches(config)
    next(generator)
    return generator


def _generate_batches(config: TrainingConfig) -> Generator[Any, float, None]:
    rng, buckets = random.Random(config.seed), dict[tuple[bool, int], list[np.ndarray]]()
    done = yield
    while True:
        share = config.early_full_share if done < 0.7 else config.late_full_share
        whole = rng.random() < share
        batch = None
        while batch is None:
            num_terms = rng.choices(range(2, 9), weights=(1, 2, 3, 3, 3, 2, 2))[0]
            problem = sample_problem(rng, num_terms, held_out=False)
            ids = encode_fast(problem.prompt + transcript(problem, rng, config.slip_rate) + EOS)
            if not whole:
                ids = ids[: config.prefix_length]
            width = math.ceil(len(ids) / 128) * 128
            bucket = buckets.setdefault((whole, width), [])
            bucket.append(ids)
            if len(bucket) * width >= config.tokens_per_step:
                batch = np.full((len(bucket), max(map(len, bucket))), VOCABULARY[PAD], np.int64)
                for row, sequence in zip(batch, bucket, strict=True):
                    row[: len(sequence)] = sequence
                bucket.clear()
        done = yield batch
