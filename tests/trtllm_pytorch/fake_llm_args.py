"""``tensorrt_llm.llmapi.llm_args``: the arguments of the LLM API, as far as a compression method is configured by them.

Mirrors ``llm_args.py`` of NVIDIA/TensorRT-LLM: main of September 2026, commit 00043967, where the field is a union told
apart by ``algorithm`` and another one is refused, and an earlier snapshot, whose own test has an unknown algorithm
parse to the base class. All classes forbid unknown keys.
"""

from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

FORMS = ("refuses others", "accepts others")


def make_llm_args(form: str) -> ModuleType:
    """The module in one of ``FORMS``; None of its classes is shared with another call."""

    class StrictBaseModel(BaseModel):
        model_config = ConfigDict(extra="forbid")

    class KvCacheCompressionConfig(StrictBaseModel):
        changes_physical_kv_length: ClassVar[bool] = False
        algorithm: str

        def supports_block_reuse(self) -> bool:
            return False

        def supports_speculative_decoding(self) -> bool:
            return False

    class ColdPageQuantizationCompressionConfig(KvCacheCompressionConfig):
        algorithm: Literal["quantization_for_cold_page"] = "quantization_for_cold_page"

    class TriAttentionKvCacheCompressionConfig(KvCacheCompressionConfig):
        changes_physical_kv_length: ClassVar[bool] = True
        algorithm: Literal["triattention"] = "triattention"
        budget: int = Field(2048, gt=0)

    def concrete(value: Any) -> Any:
        if isinstance(value, dict) and value.get("algorithm") == "triattention":
            return TriAttentionKvCacheCompressionConfig(**value)
        return value

    if form == "refuses others":
        kind: Any = Annotated[
            ColdPageQuantizationCompressionConfig | TriAttentionKvCacheCompressionConfig,
            Field(discriminator="algorithm"),
        ]
    else:
        kind = Annotated[SerializeAsAny[KvCacheCompressionConfig], BeforeValidator(concrete)]

    class BaseLlmArgs(StrictBaseModel):
        model: str
        kv_cache_compression_config: kind | None = Field(default=None, description="None disables compression.")

    class TorchLlmArgs(BaseLlmArgs):
        backend: Literal["pytorch"] = "pytorch"

    module = ModuleType("tensorrt_llm.llmapi.llm_args")
    for value in (
        StrictBaseModel, KvCacheCompressionConfig, ColdPageQuantizationCompressionConfig,
        TriAttentionKvCacheCompressionConfig, BaseLlmArgs, TorchLlmArgs,
    ):  # fmt: skip
        value.__module__, value.__qualname__ = module.__name__, value.__name__
        setattr(module, value.__name__, value)
    return module
