"""Adds ``MemShareBlockSearch`` to TensorRT-LLM's network: a model class between the model and its builder.

Imports TensorRT-LLM when a class is made. Everything goes through ``prepare_inputs`` and ``forward``, which
``tensorrt_llm.builder.build`` calls; nothing of TensorRT-LLM is patched but the table of layer types below.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.engine.build_plan import plugin_fields
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.io_table import DISTANCES, IoTensor, memshare_io
from trtllm_memshare.trtllm.engine.plugins import PLUGIN
from trtllm_memshare.trtllm.engine.spec import EngineSpec

_KV_DTYPES = {"fp8": "float8_e4m3fn"}  # TensorRT-LLM's name to torch's
_ROTARY = "rope_gpt_neox"


def memshare_model_class(base: type, max_pairs: int) -> type:
    """A model class whose engine searches after its last layer.

    Args:
      base: a ``DecoderModelForCausalLM`` of TensorRT-LLM.
      max_pairs: pairs of one search.
    """

    class MemShareModel(base):
        """``base`` with the inputs and the output of the search."""

        def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """TensorRT-LLM's inputs, and ``memshare``, a dictionary of the search's."""
            result = super().prepare_inputs(*args, **kwargs)
            result["memshare"] = _declare_inputs(_spec_of(self.config, max_pairs))
            return result

        def forward(self, *args: Any, memshare: dict[str, Any], **kwargs: Any) -> Any:
            """TensorRT-LLM's forward, then the search, ordered behind every layer by the last hidden states."""
            output = super().forward(*args, **kwargs)
            # The last pipeline rank gives (logits, hidden states of last tokens, hidden states); others what they send.
            hidden = output[2] if isinstance(output, tuple) else output
            spec = _spec_of(self.config, max_pairs)
            _add_search(hidden, memshare, spec).mark_output(DISTANCES, "float32")
            return output

    MemShareModel.__name__ = MemShareModel.__qualname__ = f"MemShare{base.__name__}"
    return MemShareModel


def allow_plugin_v3_layers() -> None:
    """Tells TensorRT-LLM's graph rewriting of IPluginV3 layers.

    Its pass over all layers raises NotImplementedError for types that its table lacks (graph_rewriting.py,
    ``Layer.as_layer``), so that no network with such a layer could be built.
    """
    from tensorrt_llm.graph_rewriting import Layer

    trt = import_tensorrt()
    Layer.TRT_LAYER_TYPE_TO_LAYER.setdefault(trt.LayerType.PLUGIN_V3, trt.IPluginV3Layer)


def add_search_to(network: Any, tensors: list[Any], spec: EngineSpec) -> Any:
    """Adds the plugin to a TensorRT network.

    Args:
      network: TensorRT's ``INetworkDefinition``.
      tensors: hidden states and the six inputs of ``memshare_io``, TensorRT's ``ITensor``.

    Returns:
      The layer; its output 0 is ``memshare_block_distances``.

    Raises:
      UserError: the plugin library was not loaded, or refuses the pool.
    """
    trt = import_tensorrt()
    creator = trt.get_plugin_registry().get_creator(*PLUGIN)
    if creator is None:
        raise UserError(f"the plugin {PLUGIN[0]} is not registered (load its library first: load_memshare_plugin)")
    # Fields point at these arrays, so they live until the plugin has read them.
    values = {name: np.array([value], np.int32) for name, value in plugin_fields(spec).items()}
    fields = trt.PluginFieldCollection(
        [trt.PluginField(name, value, trt.PluginFieldType.INT32) for name, value in values.items()]
    )
    plugin = creator.create_plugin("memshare_block_search", fields, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise UserError(f"{PLUGIN[0]} refused its fields {plugin_fields(spec)}; TensorRT's log says why")
    return network.add_plugin_v3(tensors, [], plugin)


def _add_search(hidden: Any, memshare: dict[str, Any], spec: EngineSpec) -> Any:
    from tensorrt_llm._common import default_trtnet
    from tensorrt_llm.functional import _create_tensor

    tensors = [hidden.trt_tensor, *(memshare[t.name].trt_tensor for t in memshare_io(spec) if not t.is_output)]
    layer = add_search_to(default_trtnet(), tensors, spec)
    return _create_tensor(layer.get_output(0), layer)


def _declare_inputs(spec: EngineSpec) -> dict[str, Any]:
    return {t.name: _declare(t, spec) for t in memshare_io(spec) if not t.is_output}


def _declare(tensor: IoTensor, spec: EngineSpec) -> Any:
    """A network input. Dimension names are MemShare's own: TensorRT-LLM wants equal names to have equal ranges."""
    from tensorrt_llm._utils import str_dtype_to_trt
    from tensorrt_llm.functional import Tensor

    ranges = OrderedDict[str, list[Any]]()
    for index, size in enumerate(tensor.dims):
        if size == "pairs":
            ranges["memshare_pairs"] = [[1, spec.max_pairs, spec.max_pairs]]
        else:
            ranges[f"{tensor.name}_{index}"] = [size]
    shape = [-1 if isinstance(d, str) else d for d in tensor.dims]
    return Tensor(name=tensor.name, dtype=str_dtype_to_trt(tensor.dtype), shape=shape, dim_range=ranges)


def _spec_of(config: Any, max_pairs: int) -> EngineSpec:
    """The part of a spec that the search needs, from TensorRT-LLM's ``PretrainedConfig`` and the current network.

    Raises:
      UserError: several profiles, several KV pools, or rotary embeddings of another layout.
    """
    from tensorrt_llm._common import default_net

    plugins, mapping = default_net().plugin_config, config.mapping
    if plugins.multiple_profiles:
        raise UserError("MemShareBlockSearch is built with one profile, got multiple_profiles (leave it disabled)")
    per_layer = set(getattr(config, "num_kv_heads_per_layer", None) or [config.num_key_value_heads])
    if len(per_layer) > 1:
        raise UserError(f"MemShare supports one KV pool, got layers with {sorted(per_layer)} KV heads (build without)")
    position = getattr(config.position_embedding_type, "name", config.position_embedding_type)
    if _ROTARY not in str(position):
        raise UserError(f"MemShare undoes rotary embeddings of type {_ROTARY}, got {position} (build without it)")
    return EngineSpec(
        dtype=config.dtype,
        logits_dtype=config.logits_dtype,
        kv_dtype=_KV_DTYPES.get(config.kv_dtype, config.kv_dtype),
        num_layers=len(mapping.pp_layers(config.num_hidden_layers)),
        num_kv_heads=-(-config.num_key_value_heads // mapping.tp_size),
        head_dim=config.head_size,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        tokens_per_block=plugins.tokens_per_block,
        max_batch_size=1,
        max_num_tokens=1,
        max_seq_len=1,
        max_pairs=max_pairs,
        tp_size=mapping.tp_size,
        pp_size=mapping.pp_size,
        tp_rank=mapping.tp_rank,
        pp_rank=mapping.pp_rank,
    )
