"""TensorRT's side of a build: networks that record what is added to them.

Fields of the plugin: plugins/tensorrt/search_attributes.cpp. Calls: TensorRT 10.14's Python API (INetworkDefinition,
IPluginCreatorV3One, IBuilder), NvInfer.h and NvInferRuntime.h of the same version.
"""

from __future__ import annotations

import enum
import json

import numpy as np
from fakes.contract import require

LayerType = enum.Enum("LayerType", "PLUGIN_V2 PLUGIN_V3 ELEMENTWISE MATRIX_MULTIPLY")
PluginFieldType = enum.Enum("PluginFieldType", "INT32 FLOAT32")
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
FIELDS = ("num_layers", "num_kv_heads", "tokens_per_block", "head_dim", "rotary_dim", "kv_dtype", "interleaved")
KV_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")
SEARCH_INPUTS = ("memshare_pool_pointers", "memshare_num_blocks", "memshare_new_rows", "memshare_old_rows",
                 "memshare_position_delta", "memshare_inv_freq")  # fmt: skip


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class PluginField:
    def __init__(self, name, data, type):
        self.name, self.data, self.type = name, data, type


class SearchCreator:
    """The creator that our library registers; refuses what the library refuses."""

    def create_plugin(self, name, fields, phase):
        require(phase is TensorRTPhase.BUILD, f"phase {phase}")
        values = {}
        for field in fields:
            fits = field.type is PluginFieldType.INT32 and field.data.dtype == np.int32 and field.data.shape == (1,)
            require(fits, f"plugin field {field.name} must be one int32")
            values[field.name] = int(field.data[0])
        return SearchPlugin(values) if sorted(values) == sorted(FIELDS) else None


class SearchPlugin:
    def __init__(self, fields):
        self.fields = fields


class TrtTensor:
    def __init__(self, name, dtype, shape, producer=None):
        self.name, self.dtype, self.shape, self.producer = name, dtype, shape, producer


class Layer:
    def __init__(self, kind, inputs, num_outputs=1, name="layer"):
        self.type, self.inputs, self.name = kind, inputs, name
        self._outputs = [TrtTensor(f"{name}.out", None, None, self) for _ in range(num_outputs)]

    def get_output(self, index):
        return self._outputs[index]

    def ancestors(self):
        """Every layer that this one waits for."""
        found, todo = [], [t.producer for t in self.inputs if t.producer is not None]
        while todo:
            layer = todo.pop()
            if layer not in found:
                found.append(layer)
                todo += [t.producer for t in layer.inputs if t.producer is not None]
        return found


class PluginV3Layer(Layer):
    def __init__(self, inputs, plugin):
        super().__init__(LayerType.PLUGIN_V3, inputs, name="MemShareBlockSearch")
        self.plugin = plugin


class TrtNetwork:
    """Records inputs, layers and outputs."""

    def __init__(self):
        self.inputs, self.layers, self.outputs = {}, [], {}

    def add_input(self, name, dtype, shape):
        require(name not in self.inputs, f"a second input {name}")
        self.inputs[name] = TrtTensor(name, dtype, tuple(shape))
        return self.inputs[name]

    def add_layer(self, kind, inputs, name="layer"):
        self.layers.append(Layer(kind, inputs, name=name))
        return self.layers[-1]

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        require(shape_inputs == [], "the plugin takes no shape inputs")
        require(isinstance(plugin, SearchPlugin), "no plugin")
        require(all(isinstance(t, TrtTensor) for t in inputs), "inputs of a layer are TensorRT's tensors")
        require(tuple(t.name for t in inputs[1:]) == SEARCH_INPUTS, f"inputs {[t.name for t in inputs]}")
        self.layers.append(PluginV3Layer(inputs, plugin))
        return self.layers[-1]

    def mark_output(self, tensor):
        self.outputs[tensor.name] = tensor

    @property
    def search(self):
        return next((layer for layer in self.layers if layer.type is LayerType.PLUGIN_V3), None)


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, smallest, usual, largest):
        self.shapes[name] = (smallest, usual, largest)


class _Config:
    def __init__(self):
        self.profiles = []

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)


class Builder:
    """Builds engines of one search layer."""

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        require(flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "networks are strongly typed")
        return TrtNetwork()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        (profile,) = config.profiles
        dynamic = {n for n, t in network.inputs.items() if -1 in t.shape}
        require(dynamic == set(profile.shapes), f"the profile names {sorted(profile.shapes)}")
        require(list(network.outputs) == ["memshare_block_distances"], f"outputs {list(network.outputs)}")
        fields = network.search.plugin.fields
        plan = {
            "kind": "search",
            "num_profiles": 1,
            "fields": fields,
            "kv_dtype": KV_DTYPES[fields["kv_dtype"]],
            "tokens_per_block": fields["tokens_per_block"],
            "max_pairs": profile.shapes["memshare_new_rows"][2][0],
        }
        return json.dumps(plan).encode()
