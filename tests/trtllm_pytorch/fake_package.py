"""A package ``tensorrt_llm`` on disk, for tests that start other processes."""

from __future__ import annotations

import textwrap
from pathlib import Path

UTIL = """
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    class KVCacheManager:
        def prepare_resources(self, **arguments): ...
        free_resources = update_resources = get_batch_cache_indices = shutdown = add_dummy_requests = prepare_resources
        get_unique_primary_pool = copy_batch_block_offsets = get_num_free_blocks = prepare_resources

    def get_kv_cache_manager_cls(model_config):
        return KVCacheManager
    """

LLM_ARGS = """
    from typing import Annotated, ClassVar, Literal, Optional, Union
    from pydantic import BaseModel, ConfigDict, Field

    class KvCacheCompressionConfig(BaseModel):
        model_config = ConfigDict(extra="forbid")
        changes_physical_kv_length: ClassVar[bool] = False
        algorithm: str

    class ColdPageQuantizationCompressionConfig(KvCacheCompressionConfig):
        algorithm: Literal["quantization_for_cold_page"] = "quantization_for_cold_page"

    class TriAttentionKvCacheCompressionConfig(KvCacheCompressionConfig):
        algorithm: Literal["triattention"] = "triattention"

    Known = Union[ColdPageQuantizationCompressionConfig, TriAttentionKvCacheCompressionConfig]

    class TorchLlmArgs(BaseModel):
        kv_cache_compression_config: Optional[Annotated[Known, Field(discriminator="algorithm")]] = None
    """


def write_fake_package(folder: Path) -> None:
    """Writes the modules that sharing waits for; the folder is made."""
    for name in ("", "llmapi", "_torch", "_torch/pyexecutor"):
        (folder / "tensorrt_llm" / name).mkdir(parents=True, exist_ok=True)
        (folder / "tensorrt_llm" / name / "__init__.py").touch()
    (folder / "tensorrt_llm/_torch/pyexecutor/_util.py").write_text(textwrap.dedent(UTIL))
    (folder / "tensorrt_llm/llmapi/llm_args.py").write_text(textwrap.dedent(LLM_ARGS))
