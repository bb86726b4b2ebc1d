"""A stand-in for TensorRT's Python API that runs a decoder on the CPU and enforces the engine's contract to the letter.

Sources of what is enforced:
- names, types, shapes, profiles: TensorRT-LLM tensorrt_llm/models/generation_mixin.py (prepare_attention_inputs,
  prepare_basic_inputs) for paged KV cache, packed input, beam width 1.
- values in flight: cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp (setFromInputs, prepareBuffersForCudaGraph).
- table entries: cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp (setOffsets), kernels/kvCacheUtils.h.
- addresses: NvInferRuntime.h 10.14, IExecutionContext::setTensorAddress (256 bytes); plugins read ``host_*`` on the
  CPU, in enqueue (gptAttentionPlugin.cpp).
- a plugin's creator must be registered before an engine is deserialized; loadLibrary fails for a registered one
  (NvInferRuntimeCommon.h 10.14). Each call for the registry may give another Python object for the one registry
  (python/src/infer/pyPlugin.cpp, return_value_policy::reference).
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fakes.contract import ContractError, require
from fakes.fake_network import (
    Builder,
    LayerType,
    NetworkDefinitionCreationFlag,
    PluginField,
    PluginFieldType,
    PluginV3Layer,
    SearchCreator,
    TensorRTPhase,
)
from fakes.numpy_decoder import NULL, NumpyDecoder, PagedStep, array_at, block_distances

__all__ = ["ContractError", "FakeTensorRT", "write_engine"]
__version__ = "10.14.1.48"
DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32 INT64")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
KV_ROUND = 256
_TYPES = {"int32": DataType.INT32, "int64": DataType.INT64, "float32": DataType.FLOAT, "float16": DataType.HALF}


def write_engine(path, model_dir, **sizes):
    """What a build leaves: a 'plan' that names its weights. ``sizes``: tokens_per_block, max_batch_size, ..."""
    plan = {"model_dir": str(model_dir), "max_pairs": 0, "kind": "decoder", "num_profiles": 1, "kv_dtype": "float32",
            **sizes}  # fmt: skip
    Path(path).write_text(json.dumps(plan))


class Registry:
    def __init__(self, module):
        self.libraries, self.has_attention, self._module = [], False, module

    def get_creator(self, name, version, namespace=""):
        if (name, version, namespace) == ("GPTAttention", "1", "tensorrt_llm") and self.has_attention:
            return object()
        found = bool(self.libraries) and (name, version, namespace) == ("MemShareBlockSearch", "1", "trtllm_memshare")
        return SearchCreator() if found else None

    def load_library(self, plugin_path):
        if self.libraries or not Path(plugin_path).is_file():
            return None
        self.libraries.append(str(plugin_path))
        return object()


class FakeTensorRT:
    """The module: hand it to what imports ``tensorrt``. ``device``: whose memory and stream engines use. ``links``: to
    the engines of other ranks."""

    DataType, TensorIOMode = DataType, TensorIOMode
    LayerType, IPluginV3Layer = LayerType, PluginV3Layer
    PluginField, PluginFieldCollection, PluginFieldType = PluginField, list, PluginFieldType
    TensorRTPhase, NetworkDefinitionCreationFlag = TensorRTPhase, NetworkDefinitionCreationFlag
    Builder = Builder

    def __init__(self, device, version=__version__):
        self.__version__, self.device, self.registry = version, device, Registry(self)
        self.engines, self.links = [], None

    class Logger:
        INFO, WARNING, ERROR = 2, 1, 0

        def __init__(self, severity=1):
            self.severity = severity

    def get_plugin_registry(self):
        return SimpleNamespace(
            get_creator=self.registry.get_creator, load_library=lambda path: self.registry.load_library(path)
        )

    def Runtime(self, logger):
        require(isinstance(logger, FakeTensorRT.Logger), "a Runtime needs a Logger")
        return _Runtime(self)


class _Runtime:
    def __init__(self, module):
        self._module = module

    def deserialize_cuda_engine(self, serialized):
        try:
            plan = json.loads(bytes(serialized))
        except ValueError:
            return None
        needs_plugin = plan["max_pairs"] > 0
        if needs_plugin and self._module.registry.get_creator("MemShareBlockSearch", "1", "trtllm_memshare") is None:
            return None
        engine = FakeEngine(plan, self._module.device, self._module.links)
        self._module.engines.append(engine)
        return engine


class SearchedPool:
    """The shape of a pool, from the fields of the plugin."""

    def __init__(self, fields):
        self.num_layers, self.kv_heads, self.dim = fields["num_layers"], fields["num_kv_heads"], fields["head_dim"]


def engine_tensors(plan, decoder):
    """The recorded table: name -> (type, dims, "host" or "device", is output)."""
    layers, size, dim = decoder.num_layers, plan["tokens_per_block"], decoder.dim
    rows = ("P", size)
    extra = {
        "memshare_pool_pointers": ("int64", (1,), "device", False),
        "memshare_num_blocks": ("int32", (1,), "device", False),
        "memshare_new_rows": ("int32", rows, "device", False),
        "memshare_old_rows": ("int32", rows, "device", False),
        "memshare_position_delta": ("int32", rows, "device", False),
        "memshare_inv_freq": ("float32", (dim // 2,), "device", False),
        "memshare_block_distances": ("float32", ("P", layers, 4), "device", True),
    }
    if plan["kind"] == "search":
        return {"memshare_hidden": ("float32", (1,), "device", False), **extra}
    table = {
        "input_ids": ("int32", ("T",), "device", False),
        "position_ids": ("int32", ("T",), "device", False),
        "last_token_ids": ("int32", ("B",), "device", False),
        "sequence_length": ("int32", ("B",), "device", False),
        "context_lengths": ("int32", ("B",), "device", False),
        "host_context_lengths": ("int32", ("B",), "host", False),
        "host_request_types": ("int32", ("B",), "host", False),
        "host_past_key_value_lengths": ("int32", ("B",), "host", False),
        "cache_indirection": ("int32", ("B", 1, "S"), "device", False),
        "host_max_attention_window_sizes": ("int32", (layers,), "host", False),
        "host_sink_token_length": ("int32", (1,), "host", False),
        "kv_cache_block_offsets": ("int32", (1, "B", 2, "M"), "device", False),
        "host_kv_cache_block_offsets": ("int32", (1, "B", 2, "M"), "host", False),
        "host_kv_cache_pool_pointers": ("int64", (1, 2), "host", False),
        "host_kv_cache_pool_mapping": ("int32", (layers, 2), "host", False),
        "host_runtime_perf_knobs": ("int64", (16,), "host", False),
        "host_context_progress": ("int64", (1,), "host", False),
        "logits": (plan.get("logits_dtype", "float32"), ("B", decoder.config["vocab_size"]), "device", True),
    }
    hidden = decoder.config["hidden_size"]
    if not decoder.is_first:  # prepare_basic_inputs: later stages take hidden states and no positions
        del table["input_ids"], table["position_ids"]
        table["hidden_states_input"] = ("float32", ("T", hidden), "device", False)
    if not decoder.is_last:
        del table["last_token_ids"], table["logits"]
        table["hidden_states_output"] = ("float32", ("T", hidden), "device", True)
    if decoder.links.tp_size > 1:  # CustomAllReduceHelper: 7 pointers per rank and 3 counters
        table["all_reduce_workspace"] = ("int64", (7 * decoder.links.tp_size + 3,), "host", False)
    return {**table, **(extra if plan["max_pairs"] else {})}


class FakeEngine:
    def __init__(self, plan, device, links=None):
        self.plan, self.device = plan, device
        fields = plan.get("fields")  # of a search alone, built by the stand-in's builder
        self.decoder = SearchedPool(fields) if fields else NumpyDecoder(plan["model_dir"], links)
        self.tensors = engine_tensors(plan, self.decoder)
        self.ranges = {
            "T": (1, plan.get("max_num_tokens", 1)),
            "B": (1, plan.get("max_batch_size", 1)),
            "M": (1, -(-plan.get("max_seq_len", 1) // plan["tokens_per_block"])),
            "S": (1, plan.get("max_seq_len", 1)),
            "P": (1, max(1, plan["max_pairs"])),
        }
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), plan["num_profiles"]
        self.seen_offsets, self.written, self.context_tokens = [], None, {}

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if self.tensors[name][3] else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return _TYPES[self.tensors[name][0]]

    def get_tensor_profile_shape(self, name, index):
        require(0 <= index < self.num_optimization_profiles, f"no profile {index}")
        low, high = (
            tuple(self.ranges[d][i] if isinstance(d, str) else d for d in self.tensors[name][1]) for i in (0, 1)
        )
        if self.num_optimization_profiles > 1 and name in ("input_ids", "position_ids"):
            bounds = [0, *([64] * (self.num_optimization_profiles - 1)), self.plan["max_num_tokens"]]
            low, high = (bounds[index] or 1,), (bounds[index + 1],)
        return low, high, high

    def create_execution_context(self):
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine):
        self.engine, self.profile = engine, 0
        self.shapes, self.addresses = {}, {}

    def set_optimization_profile_async(self, index, stream):
        require(stream == self.engine.device.stream, "another stream")
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        if name not in self.engine.tensors or self.engine.tensors[name][3]:
            return False
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        if name not in self.engine.tensors:
            return False
        require(address % 256 == 0, f"{name} lies at {address:#x}, no multiple of 256")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        engine = self.engine
        require(stream_handle == engine.device.stream, "the step was enqueued on another stream")
        sizes = self._sizes()
        for name in engine.tensors:
            require(name in self.addresses, f"{name} has no address")
        shapes = {n: tuple(sizes[d] if isinstance(d, str) else d for d in t[1]) for n, t in engine.tensors.items()}
        addresses = dict(self.addresses)
        self._check_places(shapes, addresses)
        # What plugins read on the host they read now; what they read on the device they read when the stream runs.
        host = {n: self._read(n, shapes, addresses).copy() for n, t in engine.tensors.items() if t[2] == "host"}
        captured = engine.device.recording is not None
        run = _run_search if engine.plan["kind"] == "search" else _run_decoder
        engine.device.enqueue(lambda: self._execute(run, shapes, addresses, host, captured))
        return True

    def _execute(self, run, shapes, addresses, host, captured):
        self._check_places(shapes, addresses)
        tensors = self.engine.tensors
        inputs = {n: self._read(n, shapes, addresses) for n, t in tensors.items() if t[2] == "device" and not t[3]}
        results = run(self.engine, {**inputs, **host}, captured)
        for name, values in results.items():
            self._read(name, shapes, addresses)[:] = values

    def _sizes(self):
        sizes = {}
        for name, (_, dims, _, is_output) in self.engine.tensors.items():
            if is_output:
                continue
            require(name in self.shapes, f"{name} has no shape")
            for dim, size in zip(dims, self.shapes[name], strict=True):
                known = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                require(known == size, f"{name} has {size} where another input has {known}")
        return sizes

    def _check_places(self, shapes, addresses):
        for name, (dtype, _, place, _) in self.engine.tensors.items():
            num_bytes = int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
            kind = self.engine.device.find(addresses[name], num_bytes)
            require(kind == place, f"{name} must be {num_bytes} bytes of live {place} memory, got {kind}")

    def _read(self, name, shapes, addresses):
        return array_at(addresses[name], self.engine.tensors[name][0], shapes[name])


def _run_search(engine, inputs, captured):
    pool = _pool(engine, int(inputs["memshare_pool_pointers"][0]), int(inputs["memshare_num_blocks"][0]))
    return {"memshare_block_distances": _distances(engine, pool, inputs)}


def _run_decoder(engine, inputs, captured):
    plan, size = engine.plan, engine.plan["tokens_per_block"]
    inputs["is_generation"] = _check_lengths(plan, inputs, captured)
    pointers, mapping = inputs["host_kv_cache_pool_pointers"], inputs["host_kv_cache_pool_mapping"]
    require(pointers[0, 1] == 0, "the secondary pool must be 0")
    require(mapping.tolist() == [[0, i] for i in range(len(mapping))], f"pool mapping {mapping.tolist()}")
    pool_bytes = engine.device.size_from(int(pointers[0, 0]))
    step = PagedStep(int(pointers[0, 0]), pool_bytes, engine.decoder, size, inputs, plan["kv_dtype"])
    _check_table(engine, step, inputs, captured)
    results = {"logits" if engine.decoder.is_last else "hidden_states_output": engine.decoder.forward(step)}
    engine.seen_offsets.append(inputs["kv_cache_block_offsets"].copy())
    if plan["max_pairs"]:
        require(inputs["memshare_pool_pointers"][0] == pointers[0, 0], "the search reads another pool")
        results["memshare_block_distances"] = _distances(engine, step.units, inputs)
    return results


def _check_lengths(plan, inputs, captured):
    types, contexts = inputs["host_request_types"], inputs["context_lengths"]
    lengths, past = inputs["sequence_length"], inputs["host_past_key_value_lengths"]
    require(set(types.tolist()) <= {0, 1} and (np.diff(types) >= 0).all(), f"request types {types.tolist()}")
    is_generation = types == 1
    queries = np.where(is_generation, 1, contexts)
    num_tokens = len(inputs.get("input_ids", inputs.get("hidden_states_input")))
    require(queries.sum() == num_tokens, f"{num_tokens} tokens for chunks {queries}")
    last = inputs.get("last_token_ids", np.cumsum(queries))
    require((last == np.cumsum(queries)).all(), "last_token_ids is no inclusive sum of the chunks")
    ends = np.cumsum(queries)
    expected = np.concatenate([np.arange(n - q, n) for q, n in zip(queries, lengths, strict=True)])
    positions = inputs.get("position_ids", expected)
    require((positions == expected).all(), f"positions {positions}, expected {expected}")
    require((lengths[is_generation] > contexts[is_generation]).all(), "a generation request is as short as its prompt")
    require(lengths.max() <= plan["max_seq_len"] and ends[-1] <= plan["max_num_tokens"], "a sequence is too long")
    if captured:  # values of the capture, which served every step since
        rounded = {min(plan["max_seq_len"] - 1, n) for n in range(0, plan["max_seq_len"] + KV_ROUND, KV_ROUND)}
        require(is_generation.all() and set(past.tolist()) <= rounded, f"a graph of past lengths {past.tolist()}")
        require((past >= lengths - 1).all(), f"a graph for {past.tolist()} replayed at lengths {lengths.tolist()}")
    else:
        require((inputs["host_context_lengths"] == contexts).all(), "host_context_lengths differ from the device's")
        exact = (past == lengths - is_generation).all()
        require(exact or (is_generation.all() and (past >= lengths - 1).all()), f"past lengths {past}, now {lengths}")
    require((inputs["host_max_attention_window_sizes"] == plan["max_seq_len"]).all(), "a window below max_seq_len")
    require(inputs["host_sink_token_length"][0] == 0, "sink tokens")
    require(not inputs["cache_indirection"].any(), "cache_indirection must be zeros for beam width 1")
    require(inputs["host_context_progress"][0] == 0, "context progress")
    knobs = inputs["host_runtime_perf_knobs"]
    require(set(knobs[:2].tolist()) <= {-1, 0, 1} and (knobs[2:] == -1).all(), f"perf knobs {knobs.tolist()}")
    require((inputs.get("input_ids", expected) >= 0).all(), "negative token ids")
    return is_generation


def _check_table(engine, step, inputs, captured):
    """Entries, and a shadow of the pool: which rows hold K and V of the sequence that reads them."""
    size, layers = step.size, engine.decoder.num_layers
    if not captured:
        same = (inputs["host_kv_cache_block_offsets"] == inputs["kv_cache_block_offsets"]).all()
        require(same, "host_kv_cache_block_offsets differ from the device's")
    if engine.written is None:
        # Null pages are there before the first step; whatever else is zeros.
        engine.written = step.units[:: 2 * layers].astype(bool).any((1, 3))
    tables = []
    for row, length in enumerate(step.lengths):
        entries = step.offsets[row, :, : -(-length // size)]
        require((entries != NULL).all(), f"sequence {row} has a hole in its table")
        require((entries[0] % (2 * layers) == 0).all() and (entries[1] == entries[0] + 1).all(),
                f"entries {entries.tolist()} are not block * {2 * layers} + field")  # fmt: skip
        blocks = entries[0] // (2 * layers)
        require((blocks >= 0).all() and blocks.max() < len(step.units) // (2 * layers), f"blocks {blocks} of the pool")
        tables.append(blocks)
    unique = {(*tuple(t), n): t for t, n in zip(tables, step.lengths.tolist(), strict=True)}.values()
    references = np.bincount(np.concatenate(list(unique)), minlength=1)
    for row, (blocks, length, count) in enumerate(zip(tables, step.lengths, step.query_lengths, strict=True)):
        begin = int(length - count)
        require(count == 1 or begin % size == 0, f"a context chunk begins inside a block, at {begin}")
        writes = np.arange(begin, length)
        touched = blocks[np.unique(writes // size)]
        require((references[touched] == 1).all(), f"sequence {row} writes blocks {touched}, named more than once")
        opened = blocks[writes[writes % size == 0] // size]
        engine.written[opened] = False
        engine.written[blocks[writes // size], writes % size] = True
        held = engine.written[blocks].ravel()[: int(length)]
        require(held.all(), f"sequence {row} reads rows that nobody wrote: {np.flatnonzero(~held).tolist()}")
        if inputs["is_generation"][row]:
            brought = engine.context_tokens.get(int(blocks[0]))
            got = int(inputs["context_lengths"][row])
            require(brought == got, f"sequence {row} brought {brought} tokens as context, context_lengths says {got}")
        else:
            engine.context_tokens[int(blocks[0])] = int(length)


def _pool(engine, address, num_blocks):
    d = engine.decoder
    unit = (d.kv_heads, engine.plan["tokens_per_block"], d.dim)
    dtype = engine.plan["kv_dtype"]
    num_bytes = num_blocks * d.num_layers * 2 * int(np.prod(unit)) * np.dtype(dtype).itemsize
    require(engine.device.find(address, num_bytes) == "device", "the search was given another pool")
    return array_at(address, dtype, (num_blocks * d.num_layers * 2, *unit))


def _distances(engine, units, inputs):
    _pool(engine, int(inputs["memshare_pool_pointers"][0]), int(inputs["memshare_num_blocks"][0]))
    rows = int(inputs["memshare_num_blocks"][0]) * engine.plan["tokens_per_block"]
    for name in ("memshare_new_rows", "memshare_old_rows"):
        require(((inputs[name] >= -1) & (inputs[name] < rows)).all(), f"{name} outside the pool")
    return block_distances(units, engine.decoder.num_layers, inputs, engine.plan["tokens_per_block"])
