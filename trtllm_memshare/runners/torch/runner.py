"""The embedded runner: transformers computes the model, the pool and its offsets are TensorRT-LLM's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.runners.torch.attention import IMPLEMENTATION, PagedStep, paged_attention
from trtllm_memshare.runners.torch.plan import plan_step
from trtllm_memshare.search.block_search import make_block_search
from trtllm_memshare.search.config import MAX_PAIRS

AttentionInterface.register(IMPLEMENTATION, paged_attention)


@dataclass(frozen=True)
class TorchInputs:
    """Device inputs of a step."""

    input_ids: torch.Tensor  # int64 [1, num_tokens]
    position_ids: torch.Tensor  # int64 [1, num_tokens]
    paged: PagedStep
    batch: StepBatch


class TorchRunner:
    """Runs a Hugging Face decoder with rotary embeddings over a paged pool.

    Args:
      model_dir: a checkpoint directory that ``engine.read_checkpoint`` accepts.
      num_blocks: physical blocks of the pool.
      tokens_per_block: tokens of one block.
      kv_dtype: element type of the pool, None = the model's.
      device: ``cpu`` or a CUDA device.
      fold_aliases: see ``plan_step``.

    Attributes:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      search: what computes stage 2 on it.
    """

    def __init__(
        self,
        model_dir: Path,
        num_blocks: int,
        tokens_per_block: int,
        kv_dtype: torch.dtype | None = None,
        device: str = "cpu",
        fold_aliases: bool = True,
    ) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype="auto",
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        self.model.to(device).eval()
        config = self.model.config
        self.num_layers = config.num_hidden_layers
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.vocab_size = config.vocab_size
        self._num_kv_heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pool = torch.zeros(
            (num_blocks, self.num_layers, 2, self._num_kv_heads, tokens_per_block, head_dim),
            dtype=kv_dtype or self.model.dtype,
            device=device,
        )
        self._fold_aliases = fold_aliases
        self.search = make_block_search(self.pool, self.model.model.rotary_emb.inv_freq.float(), MAX_PAIRS)

    def prepare(self, batch: StepBatch) -> TorchInputs:
        """Works out addresses on the host and moves them to the device."""
        plan = plan_step(batch, self._num_kv_heads, self.tokens_per_block, self._fold_aliases)
        device = self.pool.device
        return TorchInputs(
            torch.from_numpy(batch.input_ids).to(device, torch.int64)[None],
            torch.from_numpy(batch.position_ids).to(device, torch.int64)[None],
            PagedStep(self.pool, plan, self.model.dtype),
            batch,
        )

    @torch.inference_mode()
    def step(self, inputs: TorchInputs) -> StepOutput:
        """Runs the model once, then stage 2 on the batch's pairs."""
        result = self.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=inputs.paged.last_tokens,
            memshare_step=inputs.paged,
        )
        pairs = inputs.batch.pairs
        distances = None if pairs is None else self.search.compare(pairs)
        return StepOutput(result.logits[0].float(), distances)
