"""A short greedy run of a new engine, before anybody serves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trtllm_memshare.cache.offsets import encode_block_offsets
from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.protocol import StepBatch

_TEXT = "The answer is 42, so x = 6 * 7."
NUM_STEPS = 8


def check_engine_runs(engine: Engine, device: str = "auto") -> list[int]:
    """Runs a prompt and a few greedy steps through an engine's own runner.

    Weights that are whole may still be no model: overflow in float16, or a damaged file of the right length, shows as
    logits that are not finite.

    Returns:
      The tokens generated.

    Raises:
      UserError: a logit that is not finite.
    """
    from transformers import AutoTokenizer

    size = engine.build.tokens_per_block
    tokenizer: Any = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    num_steps = min(NUM_STEPS, engine.build.max_seq_len - 1)
    known = [i for i in tokenizer(_TEXT)["input_ids"] if i < engine.vocab_size] or [0]
    tokens = known[: engine.build.max_seq_len - num_steps]
    num_blocks = -(-(len(tokens) + num_steps) // size)
    null_pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    first = 0 if null_pages is None else null_pages.num_bands  # null pages are the pool's first blocks
    runner = open_runner(engine, first + num_blocks, device)
    table = encode_block_offsets(np.arange(first, first + num_blocks, dtype=np.int32)[None], runner.num_layers)
    num_prompt, num_computed = len(tokens), 0
    for _ in range(num_steps):
        chunk = len(tokens) - num_computed
        batch = StepBatch(
            input_ids=np.array(tokens[num_computed:], np.int32),
            position_ids=np.arange(num_computed, len(tokens), dtype=np.int32),
            num_contexts=int(num_computed == 0),
            chunk_lengths=np.array([chunk], np.int32),
            sequence_lengths=np.array([len(tokens)], np.int32),
            block_offsets=table,
            pairs=None,
            context_lengths=np.array([num_prompt], np.int32),
        )
        logits = runner.step(runner.prepare(batch)).logits
        num_computed = len(tokens)
        if not torch.isfinite(logits).all():
            raise UserError(
                f"the self-check of the new engine gave logits that are not finite after {num_computed} tokens: "
                f"the weights are damaged, or overflow in {engine.checkpoint.dtype} (copy the checkpoint again, build "
                f"with another type, or set --no-self-check)"
            )
        tokens.append(int(logits[0].argmax()))
    return tokens[num_prompt:]
