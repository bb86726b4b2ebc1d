"""Inputs and outputs of a TensorRT-LLM decoder engine with paged KV cache and packed input, and of MemShare.

Names, types and shapes are those of ``GenerationMixin`` (tensorrt_llm/models/generation_mixin.py); values are those of
the C++ runtime (cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp). ``docs/tensorrt_llm.md`` has the sources. Inputs
named ``host_*`` are read on the CPU by TensorRT-LLM's plugins, from the address they were given, while the step is
enqueued; TensorRT itself does not know that they are not on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_memshare.trtllm.engine.spec import EngineSpec

MEMSHARE_PREFIX = "memshare_"
DISTANCES = "memshare_block_distances"
PERF_KNOBS = 16  # host_runtime_perf_knobs


@dataclass(frozen=True)
class IoTensor:
    """A network input or output. ``dims``: sizes, or names of dynamic ones: num_tokens, batch, max_blocks, pairs."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    on_host: bool = False
    is_output: bool = False

    @property
    def is_memshare(self) -> bool:
        return self.name.startswith(MEMSHARE_PREFIX)

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the dynamic dimensions."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


def io_table(spec: EngineSpec) -> list[IoTensor]:
    """Every input and output of one rank's engine, in the order of the recorded table."""
    tensors = []
    if spec.is_first_pp_rank:
        tensors += [IoTensor("input_ids", "int32", ("num_tokens",)), IoTensor("position_ids", "int32", ("num_tokens",))]
    else:  # only its shape matters: the values come from the previous rank, inside the engine
        tensors.append(IoTensor("hidden_states_input", spec.dtype, ("num_tokens", spec.hidden_size)))
    if spec.is_last_pp_rank:
        tensors.append(IoTensor("last_token_ids", "int32", ("batch",)))
    layers = spec.num_layers
    table = (1, "batch", 2, "max_blocks")
    tensors += [
        IoTensor("sequence_length", "int32", ("batch",)),
        IoTensor("context_lengths", "int32", ("batch",)),
        IoTensor("host_context_lengths", "int32", ("batch",), on_host=True),
        IoTensor("host_request_types", "int32", ("batch",), on_host=True),
        IoTensor("host_past_key_value_lengths", "int32", ("batch",), on_host=True),
        IoTensor("cache_indirection", "int32", ("batch", 1, spec.max_seq_len)),
        IoTensor("host_max_attention_window_sizes", "int32", (layers,), on_host=True),
        IoTensor("host_sink_token_length", "int32", (1,), on_host=True),
        IoTensor("kv_cache_block_offsets", "int32", table),
        IoTensor("host_kv_cache_block_offsets", "int32", table, on_host=True),
        IoTensor("host_kv_cache_pool_pointers", "int64", (1, 2), on_host=True),
        IoTensor("host_kv_cache_pool_mapping", "int32", (layers, 2), on_host=True),
        IoTensor("host_runtime_perf_knobs", "int64", (PERF_KNOBS,), on_host=True),
        IoTensor("host_context_progress", "int64", (1,), on_host=True),
    ]
    if spec.tp_size > 1:
        tensors.append(IoTensor("all_reduce_workspace", "int64", (7 * spec.tp_size + 3,), on_host=True))
    if spec.is_last_pp_rank:
        tensors.append(IoTensor("logits", spec.logits_dtype, ("batch", spec.vocab_size_padded), is_output=True))
    else:
        tensors.append(IoTensor("hidden_states_output", spec.dtype, ("num_tokens", spec.hidden_size), is_output=True))
    return tensors + (memshare_io(spec) if spec.max_pairs else [])


def memshare_io(spec: EngineSpec) -> list[IoTensor]:
    """What ``MemShareBlockSearch`` adds to a TensorRT engine: six inputs and one output, all on the device."""
    rows = ("pairs", spec.tokens_per_block)
    return [
        IoTensor("memshare_pool_pointers", "int64", (1,)),
        IoTensor("memshare_num_blocks", "int32", (1,)),
        IoTensor("memshare_new_rows", "int32", rows),
        IoTensor("memshare_old_rows", "int32", rows),
        IoTensor("memshare_position_delta", "int32", rows),
        IoTensor("memshare_inv_freq", "float32", (spec.head_dim // 2,)),
        IoTensor(DISTANCES, "float32", ("pairs", spec.num_layers, 4), is_output=True),
    ]


def dynamic_ranges(spec: EngineSpec) -> dict[str, tuple[int, int, int]]:
    """(min, opt, max) of each dynamic dimension, as TensorRT-LLM works them out for beam width 1 and one profile."""
    opt_tokens = min(spec.max_num_tokens, spec.max_batch_size)
    blocks = -(-((spec.max_seq_len + 1) // 2) // spec.tokens_per_block)
    return {
        "num_tokens": (1, opt_tokens, spec.max_num_tokens),
        "batch": (1, (spec.max_batch_size + 1) // 2, spec.max_batch_size),
        "max_blocks": (1, blocks, spec.max_blocks_per_seq),
        "pairs": (1, spec.max_pairs, spec.max_pairs),
    }
