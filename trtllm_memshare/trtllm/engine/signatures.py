"""Signatures of TensorRT-LLM that the engine builder relies on, and the check that refuses others.

A call is recorded by the parameters that it passes. It fits a function that takes all of them and demands no other; the
first function that does not is named and nothing is built. Sources of the signatures: ``docs/tensorrt_llm.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION
from trtllm_memshare.errors import UserError


@dataclass(frozen=True)
class Call:
    """A function that is called, or overridden and called through ``super``.

    Attributes:
      module, name: where it is, ``Class.method`` for methods.
      positional: how many arguments are passed by position, ``self`` or ``cls`` included for methods.
      keywords: parameters passed by name.
    """

    module: str
    name: str
    positional: int = 0
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """A module's or class's attribute that is read; ``members``: what it must hold."""

    module: str
    name: str
    members: tuple[str, ...] = ()


_MODELING = "tensorrt_llm.models.modeling_utils"
BUILDER: tuple[Call | Attribute, ...] = (
    Call("tensorrt_llm.builder", "build", 2),
    Call(
        "tensorrt_llm.builder",
        "BuildConfig",
        keywords=("max_input_len", "max_seq_len", "max_batch_size", "opt_batch_size", "max_beam_width",
                  "max_num_tokens", "opt_num_tokens", "gather_context_logits", "max_draft_len",
                  "output_timing_cache"),
    ),
    Call("tensorrt_llm.builder", "Engine.save", 2),
    Attribute("tensorrt_llm.plugin.plugin", "PluginConfig"),
    Attribute("tensorrt_llm.models", "MODEL_MAP", ("LlamaForCausalLM", "Qwen2ForCausalLM")),
    Call("tensorrt_llm.mapping", "Mapping", keywords=("world_size", "rank", "tp_size", "pp_size")),
    Call("tensorrt_llm.mapping", "Mapping.pp_layers", 2),
    Call(_MODELING, "QuantConfig", keywords=("quant_algo", "kv_cache_quant_algo")),
    Attribute("tensorrt_llm.quantization.mode", "QuantAlgo", ("FP8", "W8A16", "W4A16")),
    Call(_MODELING, "PretrainedModel.prepare_inputs", 1,
         ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "use_cache")),
    Call(_MODELING, "PretrainedModel.from_checkpoint", 1, ("rank",)),
    Call(_MODELING, "PretrainedModel.quantize", 2, ("dtype", "mapping", "quant_config")),
    Call(_MODELING, "DecoderModelForCausalLM.forward", 2, ("position_ids", "use_cache", "last_token_ids",
         "attention_mask", "kv_cache_params", "attention_params")),
    Call("tensorrt_llm.functional", "Tensor", keywords=("name", "dtype", "shape", "dim_range")),
    Call("tensorrt_llm.functional", "Tensor.mark_output", 3),
    Call("tensorrt_llm.functional", "_create_tensor", 2),
    Call("tensorrt_llm._common", "default_net"),
    Call("tensorrt_llm._common", "default_trtnet"),
    Call("tensorrt_llm._utils", "str_dtype_to_trt", 1),
    Attribute("tensorrt_llm.graph_rewriting", "Layer.TRT_LAYER_TYPE_TO_LAYER"),
)  # fmt: skip
"""What ``trtllm.engine.builder`` and ``trtllm.engine.search_layer`` use."""

CONVERSION = Call("", "from_hugging_face", 1, ("dtype", "mapping", "quant_config"))
"""Of the model class that an architecture has in ``MODEL_MAP``."""

PARALLEL: tuple[Call | Attribute, ...] = (
    Call("tensorrt_llm.mapping", "Mapping", keywords=("world_size", "rank", "tp_size", "pp_size")),
    Call("tensorrt_llm.plugin.plugin", "CustomAllReduceHelper.allocate_workspace", 2),
    Call("tensorrt_llm.plugin.plugin", "CustomAllReduceHelper.max_workspace_size_auto", 1),
)
"""What a runner of several tensor-parallel ranks uses."""


def check_signatures(recorded: tuple[Call | Attribute, ...], load: Callable[[str], Any] = import_module) -> None:
    """Compares what is installed with what is recorded.

    Args:
      load: imports a module by name.

    Raises:
      UserError: naming the first thing that is missing or has another signature.
    """
    for entry in recorded:
        _check(entry, load)


def compare_signatures(
    recorded: tuple[Call | Attribute, ...], load: Callable[[str], Any] = import_module
) -> dict[str, str | None]:
    """What is recorded, by name, and the sentence that says how the installed one differs; None where it does not."""
    found: dict[str, str | None] = {}
    for entry in recorded:
        name = f"{entry.module}.{entry.name}"
        try:
            _check(entry, load)
            found.setdefault(name, None)
        except UserError as error:
            found[name] = str(error)
    return found


def _check(entry: Call | Attribute, load: Callable[[str], Any]) -> None:
    found = _find(entry, load)
    if isinstance(entry, Call):
        check_call(entry, found)
    missing = [m for m in getattr(entry, "members", ()) if not _holds(found, m)]
    if missing:
        raise _differs(entry, f"no {missing[0]} in it")


def check_call(entry: Call, function: Any) -> None:
    """Raises UserError unless ``function`` can be called as recorded."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise _differs(entry, f"something without a signature ({error})") from error
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    got = f"{entry.name}{inspect.signature(function)}"
    unknown = [k for k in entry.keywords if k not in named and not takes_any]
    if unknown:
        raise _differs(entry, f"{got} without {unknown[0]}")
    if len(by_position) < entry.positional and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise _differs(entry, got)
    given = {p.name for p in by_position[: entry.positional]} | set(entry.keywords)
    demanded = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    ]
    if demanded:
        raise _differs(entry, f"{got}, which demands {demanded[0]}")


def _find(entry: Call | Attribute, load: Callable[[str], Any]) -> Any:
    try:
        found = load(entry.module)
        for part in entry.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _differs(entry, f"nothing of that name ({error})") from error
    return found


def _holds(found: Any, member: str) -> bool:
    return member in found if isinstance(found, dict) else hasattr(found, member)


def _differs(entry: Call | Attribute, got: str) -> UserError:
    wanted = ""
    if isinstance(entry, Call):
        wanted = f" called with {entry.positional} positional arguments and {', '.join(entry.keywords) or 'no names'}"
    return UserError(
        f"{entry.module}.{entry.name} of TensorRT-LLM differs from the recorded one of {TRTLLM_VERSION}: expected it"
        f"{wanted}, got {got} (install tensorrt_llm=={TRTLLM_VERSION})"
    )
