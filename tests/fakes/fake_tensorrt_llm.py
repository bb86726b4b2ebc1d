"""A stand-in for TensorRT-LLM's builder: records the graph, refuses what the real one refuses, and saves plans that the
stand-in for TensorRT runs.

Sources, all of NVIDIA/TensorRT-LLM: builder.py (build, BuildConfig, Engine.save, _validate_named_dimensions),
models/modeling_utils.py (PretrainedModel.prepare_inputs, DecoderModelForCausalLM.forward), models/qwen/model.py
(from_hugging_face), models/generation_mixin.py (inputs and their dimension names), graph_rewriting.py (Layer.as_layer
raises NotImplementedError for layer types its table lacks), functional.py (Tensor), commands/build.py (MODEL_MAP).
"""

from __future__ import annotations

import copy
import json
import sys
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

from fakes.contract import require
from fakes.fake_network import KV_DTYPES, LayerType, TrtNetwork

QuantAlgo = Enum("QuantAlgo", "FP8 W8A16 W4A16 INT8")
KVCacheType = Enum("KVCacheType", "CONTINUOUS PAGED DISABLED")
_net = None


def default_net():
    require(_net is not None, "no network is being built")
    return _net


def default_trtnet():
    return default_net().trt_network


@contextmanager
def net_guard(network):
    global _net
    _net = network
    yield
    _net = None


class Network:
    def __init__(self, plugin_config):
        self.trt_network, self.plugin_config, self.dim_ranges = TrtNetwork(), plugin_config, {}


class Tensor:
    def __init__(self, name=None, dtype=None, shape=None, dim_range=None, is_network_input=True, location=None,
                 network=None, trt_tensor=None):  # fmt: skip
        if trt_tensor is None:
            require(not isinstance(dtype, str), f"{name}: dtype must be TensorRT's, got {dtype!r}")
            require(dim_range is not None and len(dim_range) == len(shape), f"{name}: a range for each dimension")
            trt_tensor = default_trtnet().add_input(name, dtype, shape)
            for (dim, ranges), size in zip(dim_range.items(), shape, strict=True):
                # _validate_named_dimensions: one name, one range
                known = default_net().dim_ranges.setdefault(dim, ranges)
                require(known == ranges, f"dimension {dim} is {ranges} in {name} and {known} elsewhere")
                require((size == -1) == isinstance(ranges[0], list), f"{name}: {dim} of size {size} with {ranges}")
        self.trt_tensor, self.name, self.dtype = trt_tensor, name, dtype

    def mark_output(self, output_name=None, dtype=None):
        self.trt_tensor.name, self.trt_tensor.dtype = output_name, dtype
        default_trtnet().mark_output(self.trt_tensor)


def _create_tensor(trt_tensor, producer):
    require(trt_tensor.producer is producer, "the tensor comes from another layer")
    return Tensor(trt_tensor=trt_tensor)


class Mapping:
    def __init__(self, world_size=1, rank=0, gpus_per_node=8, *, tp_size=1, pp_size=1, **_):
        require(world_size == tp_size * pp_size and 0 <= rank < world_size, "world_size must be tp_size * pp_size")
        self.world_size, self.rank, self.tp_size, self.pp_size = world_size, rank, tp_size, pp_size
        self.pp_rank, self.tp_rank = divmod(rank, tp_size)

    def pp_layers(self, num_layers):
        count = num_layers // self.pp_size
        return list(range(self.pp_rank * count, (self.pp_rank + 1) * count))

    def is_last_pp_rank(self):
        return self.pp_rank == self.pp_size - 1


@dataclass
class QuantConfig:
    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128


@dataclass
class PluginConfig:
    gpt_attention_plugin: str = "auto"
    gemm_plugin: str | None = None
    remove_input_padding: bool = True
    paged_kv_cache: bool | None = None
    tokens_per_block: int = 32
    context_fmha: bool = True
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = True
    multiple_profiles: bool = False
    streamingllm: bool = False


@dataclass
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    opt_num_tokens: int | None = None
    kv_cache_type: KVCacheType | None = None  # of a module that moved between releases: nobody may set it
    gather_context_logits: bool = False
    max_draft_len: int = 0
    output_timing_cache: str = "model.cache"
    plugin_config: PluginConfig = field(default_factory=PluginConfig)


class PretrainedModel:
    def __init__(self, config):
        self.config = config

    def __call__(self, *args, **kwargs):
        default_net()
        return self.forward(*args, **kwargs)

    @classmethod
    def from_checkpoint(cls, ckpt_dir, rank=None, config=None, *, preprocess_weights_hook=None):
        stored = json.loads((Path(ckpt_dir) / "config.json").read_text())
        mapping = Mapping(stored["world_size"], rank, tp_size=stored["tp_size"], pp_size=stored["pp_size"])
        algorithms = {k: getattr(QuantAlgo, v) if v else None for k, v in stored["quantization"].items()}
        config = make_config(stored["source"], stored["dtype"], mapping, QuantConfig(**algorithms))
        config.logits_dtype = stored["logits_dtype"]
        return cls(config)

    @classmethod
    def quantize(cls, hf_model_dir, output_dir, dtype="auto", mapping=None, quant_config=None, *, device="cuda",
                 calib_dataset="cnn_dailymail", calib_batches=512):  # fmt: skip
        require(quant_config.quant_algo is QuantAlgo.FP8, "only what ModelOpt calibrates is quantized")
        names = {k: getattr(quant_config, k) and getattr(quant_config, k).name
                 for k in ("quant_algo", "kv_cache_quant_algo")}  # fmt: skip
        stored = {"source": hf_model_dir, "dtype": dtype, "world_size": mapping.world_size, "tp_size": mapping.tp_size,
                  "pp_size": mapping.pp_size, "quantization": names,
                  "logits_dtype": "float16" if dtype == "bfloat16" else dtype}  # fmt: skip  # modelopt
        (Path(output_dir) / "config.json").write_text(json.dumps(stored))

    def prepare_inputs(self, max_batch_size, max_input_len, max_seq_len, max_num_tokens, use_cache, max_beam_width=1,
                       opt_num_tokens=None, prompt_embedding_table_size=0, max_draft_len=0,
                       gather_context_logits=False, opt_batch_size=0):  # fmt: skip
        int32 = str_dtype_to_trt("int32")
        tokens = [[1, opt_num_tokens, max_num_tokens]]
        batch = [[1, (1 + max_batch_size) // 2, max_batch_size]]
        size = default_net().plugin_config.tokens_per_block
        blocks = [[-(-n // size) for n in (1, (1 + max_seq_len) // 2, max_seq_len)]]
        table = OrderedDict([("num_kv_cache_pools", [1]), ("batch_size_beam_width", batch), ("kv", [2]),
                             ("max_blocks_per_seq", blocks)])  # fmt: skip
        result = {
            "input_ids": Tensor("input_ids", int32, [-1], OrderedDict([("num_tokens", tokens)])),
            "position_ids": Tensor(
                "position_ids", int32, [-1], OrderedDict([("position_ids_num_tokens_range", tokens)])
            ),
            "use_cache": use_cache,
            "last_token_ids": None,
            "attention_mask": None,
            "kv_cache_params": SimpleNamespace(
                kv_cache_block_offsets=Tensor("kv_cache_block_offsets", int32, [1, -1, 2, -1], table)
            ),
            "attention_params": SimpleNamespace(),
        }
        if self.config.mapping.is_last_pp_rank():
            batches = OrderedDict([("batch_size_last_token_ids", batch)])
            result["last_token_ids"] = Tensor("last_token_ids", int32, [-1], batches)
        return result


class DecoderModelForCausalLM(PretrainedModel):
    def forward(self, input_ids, position_ids=None, use_cache=False, last_token_ids=None, attention_mask=None,
                kv_cache_params=None, attention_params=None, mrope_params=None, hidden_states=None,
                prompt_embedding_table=None, prompt_tasks=None, prompt_vocab_size=None, lora_params=None,
                spec_decoding_params=None):  # fmt: skip
        network, hidden = default_trtnet(), input_ids.trt_tensor
        for layer in self.config.mapping.pp_layers(self.config.num_hidden_layers):
            inputs = [hidden, kv_cache_params.kv_cache_block_offsets.trt_tensor]
            hidden = network.add_layer(LayerType.PLUGIN_V2, inputs, f"attention {layer}").get_output(0)
        last = network.add_layer(LayerType.ELEMENTWISE, [hidden], "last")
        states = _create_tensor(last.get_output(0), last)
        if not self.config.mapping.is_last_pp_rank():
            states.mark_output("hidden_states_output", self.config.dtype)
            return states
        gathered = network.add_layer(LayerType.ELEMENTWISE, [last.get_output(0), last_token_ids.trt_tensor], "gather")
        logits = network.add_layer(LayerType.MATRIX_MULTIPLY, [gathered.get_output(0)], "lm_head")
        logits = _create_tensor(logits.get_output(0), logits)
        logits.mark_output("logits", self.config.logits_dtype)
        return logits, _create_tensor(gathered.get_output(0), gathered), states


class QWenForCausalLM(DecoderModelForCausalLM):
    @classmethod
    def from_hugging_face(cls, hf_model_or_dir, dtype="auto", mapping=None, quant_config=None, **kwargs):
        return cls(make_config(hf_model_or_dir, dtype, mapping, quant_config))


class LLaMAForCausalLM(QWenForCausalLM):
    pass


def make_config(source, dtype, mapping, quantization):
    hf = json.loads((Path(source) / "config.json").read_text())
    cache = quantization.kv_cache_quant_algo
    return SimpleNamespace(
        source=source,
        architecture=hf["architectures"][0],
        dtype=dtype,
        kv_dtype="fp8" if cache is QuantAlgo.FP8 else dtype,
        logits_dtype="float32",
        hidden_size=hf["hidden_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=hf["num_key_value_heads"],
        head_size=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        position_embedding_type=SimpleNamespace(name="rope_gpt_neox"),
        mapping=mapping,
        quantization=quantization,
    )


class Engine:
    def __init__(self, config, engine, network):
        self.config, self.engine, self.network = config, engine, network

    def save(self, engine_dir):
        mapping = self.config["pretrained_config"]["mapping"]
        if mapping["rank"] == 0:
            (Path(engine_dir) / "config.json").write_text(json.dumps(self.config))
        (Path(engine_dir) / f"rank{mapping['rank']}.engine").write_bytes(self.engine)


class GraphLayer:
    """graph_rewriting.Layer: the table of layer types that a pass over the graph knows."""


GraphLayer.TRT_LAYER_TYPE_TO_LAYER = dict.fromkeys(
    (LayerType.PLUGIN_V2, LayerType.ELEMENTWISE, LayerType.MATRIX_MULTIPLY), object
)
built = []
"""Engines of this test, with their networks."""


def build(model, build_config):
    config = copy.deepcopy(build_config)
    require(config.kv_cache_type is None, "kv_cache_type is given as an enum of another module")
    config.kv_cache_type = KVCacheType.PAGED if config.plugin_config.paged_kv_cache else KVCacheType.CONTINUOUS
    require(config.max_input_len <= config.max_seq_len, "max_input_len above max_seq_len")
    network = Network(config.plugin_config)
    with net_guard(network):
        inputs = model.prepare_inputs(
            max_batch_size=config.max_batch_size,
            max_input_len=config.max_input_len,
            max_seq_len=config.max_seq_len,
            use_cache=config.kv_cache_type is not KVCacheType.DISABLED,
            max_beam_width=config.max_beam_width,
            max_num_tokens=config.max_num_tokens,
            opt_num_tokens=config.opt_num_tokens,
            prompt_embedding_table_size=0,
            max_draft_len=config.max_draft_len,
            gather_context_logits=config.gather_context_logits,
        )
        model(**inputs)
    if config.output_timing_cache is not None and model.config.mapping.rank == 0:
        Path(config.output_timing_cache).write_bytes(b"times of kernels")
    for layer in network.trt_network.layers:
        if layer.type not in GraphLayer.TRT_LAYER_TYPE_TO_LAYER:
            raise NotImplementedError(f"Unknown layer type: {layer.type}")
    engine = Engine(_engine_config(model.config, config), _plan(model.config, config, network), network.trt_network)
    built.append(engine)
    return engine


def _engine_config(model, config):
    plain = {k: v for k, v in vars(model).items() if k not in ("source", "mapping", "quantization", "kv_dtype")}
    quantization = {k: v.name if v else None for k, v in vars(model.quantization).items() if k != "group_size"}
    mapping = {k: getattr(model.mapping, k) for k in ("world_size", "rank", "tp_size", "pp_size")}
    pretrained = {**plain, "position_embedding_type": "rope_gpt_neox", "mapping": mapping, "quantization": quantization}
    build = {**vars(config), "kv_cache_type": config.kv_cache_type.name, "plugin_config": vars(config.plugin_config)}
    return {"version": "1.2.1", "pretrained_config": pretrained, "build_config": build}


def _plan(model, config, network):
    search = network.trt_network.search
    plan = {
        "kind": "decoder",
        "num_profiles": 1,
        "model_dir": str(model.source),
        "kv_dtype": {"fp8": KV_DTYPES[3]}.get(model.kv_dtype, model.kv_dtype),
        "max_pairs": network.dim_ranges["memshare_pairs"][0][2] if search else 0,
        "tokens_per_block": config.plugin_config.tokens_per_block,
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_seq_len": config.max_seq_len,
        "logits_dtype": model.logits_dtype,
    }
    return json.dumps(plan).encode()


def str_dtype_to_trt(dtype):
    return sys.modules["tensorrt"].DataType[{"int32": "INT32", "int64": "INT64", "float32": "FLOAT"}[dtype]]


class CustomAllReduceHelper:
    @staticmethod
    def allocate_workspace(mapping, size):
        return [], None

    @staticmethod
    def max_workspace_size_auto(tp_size, support_deterministic=True):
        return 16_000_000


def install(monkeypatch, trt):
    """Puts both stand-ins where ``import tensorrt`` and ``import tensorrt_llm`` find them."""
    contents = {
        "": {"__version__": "1.2.1"},
        ".builder": {"build": build, "BuildConfig": BuildConfig, "Engine": Engine},
        ".plugin": {},
        ".plugin.plugin": {"PluginConfig": PluginConfig, "CustomAllReduceHelper": CustomAllReduceHelper},
        ".mapping": {"Mapping": Mapping},
        ".models": {"MODEL_MAP": {"LlamaForCausalLM": LLaMAForCausalLM, "MistralForCausalLM": LLaMAForCausalLM,
                                  "Qwen2ForCausalLM": QWenForCausalLM, "Qwen3ForCausalLM": QWenForCausalLM}},
        ".models.modeling_utils": {"QuantConfig": QuantConfig, "PretrainedModel": PretrainedModel,
                                   "DecoderModelForCausalLM": DecoderModelForCausalLM},
        ".quantization": {},
        ".quantization.mode": {"QuantAlgo": QuantAlgo},
        ".functional": {"Tensor": Tensor, "_create_tensor": _create_tensor},
        "._common": {"default_net": default_net, "default_trtnet": default_trtnet},
        "._utils": {"str_dtype_to_trt": str_dtype_to_trt},
        ".graph_rewriting": {"Layer": GraphLayer},
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(GraphLayer, "TRT_LAYER_TYPE_TO_LAYER", dict(GraphLayer.TRT_LAYER_TYPE_TO_LAYER))
    for name, values in contents.items():
        module = ModuleType("tensorrt_llm" + name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, "tensorrt_llm" + name, module)
    trt.registry.has_attention = True
    built.clear()
