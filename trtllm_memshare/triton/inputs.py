"""Inputs and outputs of the models under TensorRT-LLM's names: one table for configurations, checks and errors.

An input that this server has no use for is declared all the same, because clients send it: it is accepted at values
that change nothing and refused by name at others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError, nearest, quote


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
      text: its name at `ensemble` and `tensorrt_llm_bls`, empty = not there.
      token: its name at `tensorrt_llm`, empty = not there.
      dtype: Triton's name without ``TYPE_``.
      dims: without the batch dimension.
      required: requests without it are refused by Triton.
    """

    text: str
    token: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    required: bool = False


def _both(name: str, dtype: str, token: str | None = None) -> Input:
    return Input(name, name if token is None else token, dtype)


USED = (
    Input("text_input", "", "STRING", required=True),
    Input("", "input_ids", "INT32", (-1,), required=True),
    Input("", "input_lengths", "INT32", required=True),
    Input("max_tokens", "request_output_len", "INT32", required=True),
    Input("bad_words", "", "STRING", (-1,)),
    Input("stop_words", "", "STRING", (-1,)),
    Input("", "bad_words_list", "INT32", (2, -1)),
    Input("", "stop_words_list", "INT32", (2, -1)),
    _both("top_k", "INT32", "runtime_top_k"),
    _both("top_p", "FP32", "runtime_top_p"),
    _both("temperature", "FP32"),
    _both("seed", "UINT64"),
    _both("min_tokens", "INT32"),
    _both("repetition_penalty", "FP32"),
    _both("presence_penalty", "FP32"),
    _both("frequency_penalty", "FP32"),
    _both("num_return_sequences", "INT32"),
    _both("end_id", "INT32"),
    _both("stream", "BOOL", "streaming"),
    Input("", "stop", "BOOL"),
    _both("exclude_input_in_output", "BOOL"),
    _both("return_log_probs", "BOOL"),
    _both("return_perf_metrics", "BOOL"),
    _both("return_num_input_tokens", "BOOL"),
    _both("return_num_output_tokens", "BOOL"),
    _both("memshare_group", "INT64"),
    _both("memshare_min_kept", "FP32"),
    _both("memshare_off", "BOOL"),
)
"""What changes an answer."""

WITHOUT_EFFECT = (
    _both("pad_id", "INT32"),  # nothing is padded
    _both("length_penalty", "FP32", "len_penalty"),  # the next three: beam search only
    Input("", "early_stopping", "BOOL"),
    Input("", "beam_search_diversity_rate", "FP32"),
    Input("", "runtime_top_p_min", "FP32"),  # these two: with a decay of top_p, which is refused
    Input("", "runtime_top_p_reset_ids", "INT32"),
    Input("", "decoder_input_lengths", "INT32"),  # encoder-decoder models only
    Input("", "draft_acceptance_threshold", "FP32"),  # with draft tokens, which are refused
)
"""Accepted at every value, as TensorRT-LLM does for a model and a request like ours."""

ONLY_NEUTRAL: dict[Input, tuple[Any, ...]] = {
    _both("beam_width", "INT32"): (1,),
    _both("return_context_logits", "BOOL"): (False,),
    _both("return_generation_logits", "BOOL"): (False,),
    Input("", "runtime_top_p_decay", "FP32"): (1.0,),
    Input("decoder_text_input", "", "STRING"): ("",),
    Input("embedding_bias_words", "", "STRING", (-1,)): ("",),
    Input("embedding_bias_weights", "", "FP32", (-1,)): (0.0,),
    Input("", "embedding_bias", "FP32", (-1,)): (0.0,),
    Input("num_draft_tokens", "", "INT32"): (0,),
    Input("use_draft_logits", "", "BOOL"): (False,),
    Input("", "draft_input_ids", "INT32", (-1,)): (),
    Input("", "draft_logits", "FP32", (-1, -1)): (),
    Input("prompt_embedding_table", "prompt_embedding_table", "FP16", (-1, -1)): (),
    _both("prompt_vocab_size", "INT32"): (0,),
    Input("prompt_table_extra_id", "", "UINT64"): (0,),
    Input("", "prompt_table_extra_ids", "UINT64", (-1,)): (0,),
    _both("lora_task_id", "UINT64"): (0,),
    # `seed` as TensorRT-LLM called it until 2024; LlamaIndex's client still sends 0.
    _both("random_seed", "UINT64"): (0,),
    Input("lora_weights", "lora_weights", "FP16", (-1, -1)): (),
    Input("lora_config", "lora_config", "INT32", (-1, 3)): (),
    _both("guided_decoding_guide_type", "STRING"): ("",),
    _both("guided_decoding_guide", "STRING"): ("",),
    Input("", "lookahead_window_size", "INT32"): (0,),
    Input("", "lookahead_ngram_size", "INT32"): (0,),
    Input("", "lookahead_verification_set_size", "INT32"): (0,),
}
"""Accepted at these values, or empty, and refused otherwise."""

# The decoder's start token comes from `preprocessing`, and models without an encoder do not read it.
DECODER_INPUT_IDS = Input("", "decoder_input_ids", "INT32", (-1,))

INPUTS = (*USED, *WITHOUT_EFFECT, *ONLY_NEUTRAL, DECODER_INPUT_IDS)

TEXT_NAMES = {i.token: i.text for i in INPUTS if i.text and i.token}
"""What a caller of `ensemble` calls an input of `tensorrt_llm`."""

COUNTS = (
    "num_input_tokens", "num_output_tokens", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks", "total_accepted_draft_tokens", "total_draft_tokens", "memshare_retired_pages",
    "memshare_peak_pages", "memshare_num_pauses",
)  # fmt: skip
TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
"""Outputs that come with ``return_perf_metrics``, nanoseconds since the epoch."""

OUTPUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "finish_reason": ("STRING", (-1,)),
    "cum_log_probs": ("FP32", (-1,)),
    "output_log_probs": ("FP32", (-1, -1)),
    "context_logits": ("FP32", (-1, -1)),
    "generation_logits": ("FP32", (-1, -1, -1)),
    "batch_index": ("INT32", (1,)),
    "sequence_index": ("INT32", (1,)),
    **{name: ("INT32", (1,)) for name in COUNTS},
    **{name: ("INT64", (1,)) for name in TIMES},
    "acceptance_rate": ("FP32", (1,)),
}
"""Outputs that both models have. The logits are declared because clients name them; they never come."""

TEXT_OUTPUTS = {"text_output": ("STRING", (-1,)), **OUTPUTS}
TOKEN_OUTPUTS = {"output_ids": ("INT32", (-1, -1)), "sequence_length": ("INT32", (-1,)), **OUTPUTS}

_PARAMETERS_OF_CLIENTS = ("Streaming", "model", "id", "request_id", "sequence_id", "sequence_start", "sequence_end",
                          "priority", "timeout", "binary_data_output",
                          "triton_enable_empty_final_response")  # fmt: skip


def check_neutral(arrays: dict[str, np.ndarray], level: str) -> None:
    """Refuses inputs that ask for what this server cannot do.

    Args:
      arrays: of the request.
      level: ``text`` or ``token``, whose names the request uses.

    Raises:
      UserError: names the input and what it may be.
    """
    for known, neutral in ONLY_NEUTRAL.items():
        name = getattr(known, level)
        array = arrays.get(name) if name else None
        if array is None:
            continue
        for element in array.reshape(-1).tolist():
            value = element.decode(errors="replace") if isinstance(element, bytes) else element
            if value not in neutral:
                allowed = f"{neutral[0]!r}" if neutral else "empty"
                raise UserError(f"{name} is not supported by this server and must be {allowed}, got {quote(value)}")
    decoder = arrays.get(DECODER_INPUT_IDS.token) if level == "token" else None
    if decoder is not None and decoder.shape[-1] > 1:
        raise UserError(f"decoder_input_ids must hold at most a start token, got {decoder.shape[-1]} tokens")


def check_parameters(names: list[str], level: str) -> None:
    """Refuses request parameters: over HTTP, Triton makes one of every field that is no input of the model.

    Raises:
      UserError: names the field and the nearest input.
    """
    known = [getattr(i, level) for i in INPUTS if getattr(i, level)]
    for name in names:
        if name not in _PARAMETERS_OF_CLIENTS:
            raise UserError(f"{name} is no input of this model ({nearest(name, known)})")


def input_lines(level: str) -> str:
    """Inputs of one level as lines of a ``config.pbtxt``."""
    lines = []
    for known in INPUTS:
        if not (name := getattr(known, level)):
            continue
        # TensorRT-LLM's `tensorrt_llm` drops the last dimension of scalars.
        reshape = " reshape: { shape: [ ] }" if level == "token" and known.dims == (1,) else ""
        optional = "" if known.required else " optional: true"
        lines.append(
            f'  {{ name: "{name}" data_type: TYPE_{known.dtype} dims: {_dims(known.dims)}{reshape}{optional} }}'
        )
    return ",\n".join(lines)


def output_lines(outputs: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """Outputs as lines of a ``config.pbtxt``."""
    return ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_{dtype} dims: {_dims(dims)} }}' for name, (dtype, dims) in outputs.items()
    )


def _dims(dims: tuple[int, ...]) -> str:
    return f"[ {', '.join(map(str, dims))} ]"
