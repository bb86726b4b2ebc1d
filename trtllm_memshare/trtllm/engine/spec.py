"""What one rank's engine is: sizes, types and place among the ranks. Names are those of TensorRT-LLM's config.json."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import Checkpoint
from trtllm_memshare.errors import UserError


@dataclass(frozen=True)
class EngineSpec:
    """One rank's engine.

    Attributes:
      dtype: of weights and activations.
      logits_dtype: of the output ``logits``.
      kv_dtype: of the pool, a key of ``search.kernel_source.ELEMENT_TYPES``.
      num_layers, num_kv_heads: of this rank.
      vocab_size: tokens; ``vocab_size_padded`` is the width of the logits.
      max_pairs: rows of the search's inputs, 0 = the engine holds no search.
      tp_size, pp_size, tp_rank, pp_rank: TensorRT-LLM's mapping; rank = pp_rank * tp_size + tp_rank.
    """

    dtype: str
    logits_dtype: str
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    tokens_per_block: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_pairs: int = 0
    tp_size: int = 1
    pp_size: int = 1
    tp_rank: int = 0
    pp_rank: int = 0

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def max_blocks_per_seq(self) -> int:
        """Widest block table: 4096 tokens in blocks of 16 give 256."""
        return -(-self.max_seq_len // self.tokens_per_block)

    @property
    def vocab_size_padded(self) -> int:
        """TensorRT-LLM pads the vocabulary to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size


def engine_spec(
    checkpoint: Checkpoint, build: BuildConfig, rank: int = 0, max_pairs: int = 0, logits_dtype: str = "float32"
) -> EngineSpec:
    """The spec of one rank's engine.

    Raises:
      UserError: layers or heads that do not divide among the ranks, or a rank that does not exist.
    """
    world = build.tp_size * build.pp_size
    if not 0 <= rank < world:
        raise UserError(f"rank must be below tp_size * pp_size = {world}, got {rank} (start one process for each rank)")
    pp_rank, tp_rank = divmod(rank, build.tp_size)
    if checkpoint.num_layers % build.pp_size:
        raise UserError(
            f"pp_size must divide the model's {checkpoint.num_layers} layers, got {build.pp_size} (set another "
            f"--pp-size)"
        )
    heads, kv_heads = checkpoint.num_attention_heads, checkpoint.num_kv_heads
    if heads % build.tp_size or (kv_heads % build.tp_size and build.tp_size % kv_heads):
        raise UserError(
            f"tp_size must divide the model's {heads} attention heads, and divide its {kv_heads} KV heads or be a "
            f"multiple of them, got {build.tp_size} (set another --tp-size)"
        )
    names = {"fp8": "float8_e4m3fn", "auto": checkpoint.dtype}
    return EngineSpec(
        dtype=checkpoint.dtype,
        logits_dtype=logits_dtype,
        kv_dtype=names.get(build.kv_cache_dtype, build.kv_cache_dtype),
        num_layers=checkpoint.num_layers // build.pp_size,
        num_kv_heads=-(-kv_heads // build.tp_size),
        head_dim=checkpoint.head_dim,
        hidden_size=checkpoint.hidden_size,
        vocab_size=checkpoint.vocab_size,
        tokens_per_block=build.tokens_per_block,
        max_batch_size=build.max_batch_size,
        max_num_tokens=build.max_num_tokens,
        max_seq_len=build.max_seq_len,
        max_pairs=max_pairs,
        tp_size=build.tp_size,
        pp_size=build.pp_size,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
    )
