"""The one place that imports TensorRT and TensorRT-LLM, and says what is missing and how to get it."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION
from trtllm_memshare.errors import UserError

TENSORRT_SERIES = (10, 14)
"""Of TensorRT-LLM 1.2.1; engines of another series do not load."""

INSTALL = f"pip install tensorrt_llm=={TRTLLM_VERSION} from NVIDIA's package index, in Python 3.12"


def import_tensorrt() -> Any:
    """The module ``tensorrt``.

    Raises:
      UserError: it is missing or of another series.
    """
    try:
        import tensorrt  # type: ignore[import-not-found]
    except (ImportError, OSError, RuntimeError) as error:  # OSError: bindings without the library
        raise UserError(f"a TensorRT engine needs TensorRT 10.14, got {error} ({INSTALL})") from error
    check_tensorrt(tensorrt)
    return tensorrt


def check_tensorrt(module: Any) -> None:
    """Raises UserError unless the module is of the series that TensorRT-LLM 1.2.1 is built with."""
    version = str(getattr(module, "__version__", "unknown"))
    if not version.startswith(".".join(map(str, TENSORRT_SERIES)) + "."):
        raise UserError(f"TensorRT must be 10.14, got {version} (pip install 'tensorrt~=10.14.1', or {INSTALL})")


def import_tensorrt_llm() -> Any:
    """The module ``tensorrt_llm``, which loads and registers its plugin library when it is imported.

    Raises:
      UserError: it is missing or another version than the recorded signatures are of.
    """
    try:
        import tensorrt_llm
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"TensorRT-LLM {TRTLLM_VERSION} is needed, got {error} ({INSTALL})") from error
    if tensorrt_llm.__version__ != TRTLLM_VERSION:
        raise UserError(
            f"TensorRT-LLM must be {TRTLLM_VERSION}, the last series with an engine backend, got "
            f"{tensorrt_llm.__version__} ({INSTALL}; its PyTorch backend works with later versions)"
        )
    return tensorrt_llm
