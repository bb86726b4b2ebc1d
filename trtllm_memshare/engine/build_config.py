"""What an engine is built for: sizes, precision and ranks, and which of it a backend can do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtllm_memshare.errors import UserError, describe_validation_error
from trtllm_memshare.json_input import check_known_keys


class BuildConfig(BaseModel):
    """Settings of an engine with TensorRT-LLM's names. Frozen; lengths in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_block: int = Field(16, description="tokens of one KV block: a power of two, 8 to 128")
    max_batch_size: int = Field(64, ge=1, description="most requests in flight")
    max_seq_len: int = Field(4096, ge=2, description="longest request, prompt and output, in tokens")
    max_num_tokens: int = Field(2048, ge=1, description="most tokens in one step")
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8", "int8"] = Field(
        "auto", description="element type of the KV cache; auto follows the model"
    )
    quantization: str | None = Field(None, description="of the weights; needs TensorRT-LLM")
    tp_size: int = Field(1, ge=1, description="tensor-parallel ranks")
    pp_size: int = Field(1, ge=1, description="pipeline-parallel ranks")

    @model_validator(mode="after")
    def _check_sizes(self) -> BuildConfig:
        size = self.tokens_per_block
        # The kernels of TensorRT-LLM shift and mask a token's index.
        if not 8 <= size <= 128 or size & (size - 1):
            raise UserError(
                f"tokens_per_block must be a power of two between 8 and 128, got {size} (set --tokens-per-block 16)"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise UserError(
                f"max_num_tokens must be at least max_batch_size {self.max_batch_size}, one token of each request in "
                f"flight, got {self.max_num_tokens} (raise --max-num-tokens or lower --max-batch-size)"
            )
        return self

    def check_backend(self, backend: str) -> None:
        """Raises UserError for a setting that ``backend`` cannot do."""
        if backend != "torch":
            return
        if self.kv_cache_dtype in ("fp8", "int8"):
            raise UserError(
                f"kv_cache_dtype must be auto, float32, float16 or bfloat16 on the torch backend, got "
                f"{self.kv_cache_dtype} (its scales need TensorRT-LLM; leave out --kv-cache-dtype)"
            )
        if self.quantization is not None:
            raise UserError(
                f"quantization is not available on the torch backend, got {self.quantization} (leave out "
                f"--quantization)"
            )
        for name, size in (("tp_size", self.tp_size), ("pp_size", self.pp_size)):
            if size != 1:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{name} must be 1 on the torch backend, got {size} (leave out {option})")


def parse_build_config(values: dict[str, Any], where: str) -> BuildConfig:
    """Validates build settings. Raises UserError naming the key, and the nearest known one for an unknown key."""
    check_known_keys(values, tuple(BuildConfig.model_fields), where)  # pydantic would list all of 200,000 unknown ones
    try:
        return BuildConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of our own sentences
            raise UserError(f"{where}: {first['ctx']['error']}") from error
        raise UserError(describe_validation_error(error, BuildConfig.model_fields, where)) from error
