"""``memshare.engine``: the search alone, built with TensorRT and nothing of TensorRT-LLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.engine.io_table import DISTANCES, IoTensor, memshare_io
from trtllm_memshare.trtllm.engine.search_layer import add_search_to
from trtllm_memshare.trtllm.engine.spec import EngineSpec

HIDDEN = IoTensor("memshare_hidden", "float32", (1,))
"""Stands where a model's last hidden states are inside its engine; nothing reads it."""


def build_search_engine(trt: Any, spec: EngineSpec, max_pairs: int) -> bytes:
    """A serialized engine whose one layer is the plugin.

    Args:
      trt: the module ``tensorrt``, the plugin library loaded.
      spec: of a rank's engine; every rank has the same number of layers and heads.

    Raises:
      UserError: TensorRT builds none.
    """
    spec = replace(spec, max_pairs=max_pairs)
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    dtypes = {"int32": trt.DataType.INT32, "int64": trt.DataType.INT64, "float32": trt.DataType.FLOAT}
    tensors = []
    for tensor in [HIDDEN, *(t for t in memshare_io(spec) if not t.is_output)]:
        shape = tuple(-1 if isinstance(d, str) else d for d in tensor.dims)
        tensors.append(network.add_input(tensor.name, dtypes[tensor.dtype], shape))
        if -1 in shape:
            smallest, largest = tensor.shape({"pairs": 1}), tensor.shape({"pairs": max_pairs})
            profile.set_shape(tensor.name, smallest, largest, largest)
    config.add_optimization_profile(profile)
    output = add_search_to(network, tensors, spec).get_output(0)
    output.name = DISTANCES
    network.mark_output(output)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError("TensorRT built no memshare.engine; its log says why (build without --search-engine separate)")
    return bytes(plan)
