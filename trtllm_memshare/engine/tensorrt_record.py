"""The part of memshare.json that says what a TensorRT engine was built with; checked before it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_memshare.errors import UserError, describe_validation_error

PLUGIN_FILE = "libtrtllm_memshare_plugin.so"
"""Name of the plugin library inside an engine directory."""

SEARCH_ENGINE_FILE = "memshare.engine"
_REBUILD = "build it again with build_scripts/build_engine.py --backend tensorrt --force"


class TensorRTRecord(BaseModel):
    """Versions, GPU and plugin of a build. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorrt_version: str = Field(description="as tensorrt.__version__")
    compute_capability: str = Field(description="of the GPU, such as 9.0")
    search_engine: Literal["embedded", "separate", "none"] = Field(description="where the search runs")
    max_pairs: int = Field(ge=0, description="pairs of one search, 0 without a search")
    plugin_sha256: str | None = Field(description="of the plugin library, None without a search")

    def check_machine(self, tensorrt_version: str, compute_capability: tuple[int, int], engine_dir: Path) -> None:
        """Raises UserError if TensorRT or the GPU differ from those of the build: plans fit one of each."""
        if tensorrt_version != self.tensorrt_version:
            raise UserError(
                f"engine {engine_dir} was built by TensorRT {self.tensorrt_version}, got TensorRT {tensorrt_version} "
                f"(install tensorrt=={self.tensorrt_version}, or {_REBUILD})"
            )
        found = ".".join(map(str, compute_capability))
        if found != self.compute_capability:
            raise UserError(
                f"engine {engine_dir} was built for compute capability {self.compute_capability}, got a GPU of {found} "
                f"(run it on such a GPU, or {_REBUILD} on this one)"
            )

    def check_plugin(self, library: Path) -> None:
        """Raises UserError if the library is missing or another build than the engine's."""
        if not library.is_file():
            raise UserError(
                f"the plugin library of the engine is missing, expected {library} (copy it back, or {_REBUILD})"
            )
        found = file_sha256(library)
        if found != self.plugin_sha256:
            raise UserError(
                f"the plugin library {library} is of another build than the engine: SHA-256 {found[:12]}..., expected "
                f"{str(self.plugin_sha256)[:12]}... (put the engine's own library there, or {_REBUILD})"
            )


def parse_record(values: Any, where: str) -> TensorRTRecord:
    """Validates the part ``tensorrt`` of a memshare.json; ``where`` names it in errors."""
    try:
        return TensorRTRecord.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, TensorRTRecord.model_fields, where)) from error


def file_sha256(path: Path) -> str:
    """Hash of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
