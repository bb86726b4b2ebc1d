"""What vLLM 0.32 chooses on a GPU, on the CPU: model runner V2, and async scheduling.

``MEMSHARE_TEST_RUNNER`` is V1 or V2, followed by ``-async`` for async scheduling, by ``-graphs`` if attention is to
read what it would where CUDA graphs hold it, by ``-triton`` for vLLM's attention in Triton, and by ``-fp8`` for a
cache that only such attention has on every CPU, and by ``-scales`` for a checkpoint that has scales for
it. ``python gpu_choices.py PROGRAM ARGUMENTS`` starts a program with that model runner, before it imports vLLM.

V2's own kernels are written in Triton, whose wheel has no backend for the CPU: its interpreter runs them here, one
program after the other. Both choices are vLLM's own code, unchanged; read on 30 November 2026.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import runpy
import sys
from types import SimpleNamespace
from typing import Any

RUNNER = os.environ.get("MEMSHARE_TEST_RUNNER", "V1")


def where_vllm_is() -> str:
    """The file that ``import vllm`` would read; "" = none."""
    found = importlib.util.find_spec("vllm")
    return (found and found.origin) or ""


def choose_runner() -> None:
    """Before vLLM is imported."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(RUNNER.startswith("V2")))
    if RUNNER.startswith("V1") and "-triton" not in RUNNER:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would take the backend below for one that compiles
    from triton import backends

    # vLLM asks whether there is a backend for the CPU that it could compile kernels with; nothing is compiled.
    backends.backends.clear()
    backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from triton.runtime import interpreter

    # As a GPU's kernels are compiled: each sum of integers is not computed twice, to see whether it overflows.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def schedule_asynchronously() -> None:
    """vLLM switches async scheduling off on a CPU as it checks a configuration: it is switched on afterwards."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        config = original(self, *arguments, **keywords)
        config.scheduler_config.async_scheduling = True
        return config

    EngineArgs.create_engine_config = create_engine_config


def read_as_graphs_do() -> None:
    """What attention reads lies at one address in every step, as a graph needs it, and vLLM's own is not changed."""
    from trtllm_memshare.vllm import skipped_entries

    skipped_entries.has_whole_graphs = lambda runner: True
    original, places = skipped_entries.SkippedEntries._given, dict[int, tuple[Any, ...]]()

    def given(self: Any, metadata: Any) -> Any:
        before = metadata.block_table_tensor.clone(), metadata.seq_lens.clone()
        found = original(self, metadata)
        table, lengths = found.block_table_tensor, found.seq_lens
        place = table.data_ptr(), table.stride(), lengths.data_ptr()
        assert places.setdefault(id(self), place) == place, "attention reads elsewhere than at its capture"
        assert place[0] != metadata.block_table_tensor.data_ptr()
        assert before[0].equal(metadata.block_table_tensor), "vLLM's tables are changed"
        assert before[1].equal(metadata.seq_lens), "vLLM's lengths are changed"
        return found

    skipped_entries.SkippedEntries._given = given


def read_in_pieces(num_tokens: int) -> None:
    """vLLM has a CPU read texts whole where a model has latent attention, without a prefix cache; both work there.

    Args:
      num_tokens: of a step at most.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        original(config)
        config.scheduler_config.enable_chunked_prefill = config.cache_config.enable_prefix_caching = True
        config.scheduler_config.max_num_batched_tokens = num_tokens

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


def order_as_flash_mla() -> None:
    """Has latent attention on a CPU tell requests that decode from those that read a text as vLLM's FlashMLA does.

    Up to 128 tokens decode if there are as many of each request, and what differs goes to the prefill path.
    """
    import copy

    import torch
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder, QueryLenSupport
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    MLACommonMetadataBuilder.query_len_support = QueryLenSupport.UNIFORM
    MLACommonMetadataBuilder.reorder_batch_threshold = 128
    forward = CPUMLAImpl.forward_mqa

    def one_by_one(self: Any, query: Any, cache: Any, metadata: Any, layer: Any) -> Any:
        """The kernel for CPUs has one token of each request, so one with more stands for as many."""
        decode, metadata = copy.copy(metadata.decode), copy.copy(metadata)
        count = metadata.num_decode_tokens // len(decode.seq_lens)
        seen = torch.arange(1 - count, 1, dtype=decode.seq_lens.dtype)
        decode.block_table = decode.block_table.repeat_interleave(count, 0)
        decode.seq_lens = (decode.seq_lens[:, None] + seen).flatten()
        metadata.decode = decode
        return forward(self, query, cache, metadata, layer)

    CPUMLAImpl.forward_mqa = one_by_one


def rotate_in_pytorch() -> None:
    """vLLM's operator for CPUs rotates queries that have an axis for heads otherwise than its own PyTorch code does."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def attend_in_triton() -> None:
    """vLLM has a CPU choose its own attention, whatever is asked for."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.mla import cpu_mla, triton_mla
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops import triton_unified_attention

    # Kernels are sized by what the device can do, and fp8 asks for it.
    round_to_fp8_as_gpus_do()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    CpuPlatform.has_device_capability = classmethod(lambda *_, **__: True)
    # A batch that fills no GPU is cut along its texts, sixteen programs for each: here one request alone, and two.
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D, triton_attn.NUM_PAR_SOFTMAX_SEGMENTS = 2, 2
    triton_unified_attention._get_tile_size = lambda *_, **__: 64  # keys at a time; fewer take the interpreter longer

    def chosen(cls: type, selected_backend: Any, attn_selector_config: Any, **others: Any) -> str:
        is_mla = attn_selector_config.use_mla
        return (AttentionBackendEnum.TRITON_MLA if is_mla else AttentionBackendEnum.TRITON_ATTN).get_path()

    CpuPlatform.get_attn_backend_cls = classmethod(chosen)
    # What it calls to write latents is not in the CPU's build.
    triton_mla.TritonMLAImpl.do_kv_cache_update = cpu_mla.CPUMLAImpl.do_kv_cache_update


def round_to_fp8_as_gpus_do() -> None:
    """The interpreter of Triton 3.9 rounds 0.49 to 0.25 where it is to be 0.5: what is carried into the exponent is
    lost. A GPU takes the nearest number, and the largest for one that is larger."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(numbers: Any, input_type: Any, output_type: Any, rounding_mode: Any) -> Any:
        if (input_type, output_type) == (tl.float32, tl.float8e4nv):
            rows = torch.from_numpy(numbers.view("float32")).clamp(-448, 448)
            return rows.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return original(numbers, input_type, output_type, rounding_mode)

    interpreter._convert_float = convert


if __name__ == "__main__":
    assert where_vllm_is() == os.environ["MEMSHARE_TEST_VLLM"], "this process has another vLLM than the test"
    choose_runner()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
