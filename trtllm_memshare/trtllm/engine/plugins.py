"""Registers plugin libraries with TensorRT, before an engine is built or loaded that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.engine.tensorrt_record import file_sha256
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.engine.installed import import_tensorrt_llm

PLUGIN = ("MemShareBlockSearch", "1", "trtllm_memshare")
ATTENTION = ("GPTAttention", "1", "tensorrt_llm")
"""Name, version and namespace of a plugin's creator."""

_loaded: list[str] = []
"""Hash of the library that was loaded. TensorRT has one registry a process, though each call may wrap it anew."""


def load_memshare_plugin(trt: Any, library: Path) -> None:
    """Loads our library once; TensorRT refuses a second library with the same plugin.

    Raises:
      UserError: it does not load, or another build of it was loaded into this process before.
    """
    registry, found = trt.get_plugin_registry(), file_sha256(library)
    if registry.get_creator(*PLUGIN) is not None:
        if _loaded[-1:] != [found]:
            raise UserError(
                f"another build of the plugin library is loaded already, got {library} with SHA-256 {found[:12]}... "
                f"(run each engine in a process of its own)"
            )
        return
    if registry.load_library(str(library)) is None or registry.get_creator(*PLUGIN) is None:
        raise UserError(
            f"TensorRT could not load the plugin library {library}; its log says why (build it with "
            f"build_scripts/build_plugins.py against the headers of TensorRT {trt.__version__})"
        )
    _loaded.append(found)


def load_trtllm_plugins(trt: Any) -> None:
    """Imports TensorRT-LLM for its plugin library.

    Raises:
      UserError: TensorRT-LLM is missing, or did not register its attention plugin.
    """
    import_tensorrt_llm()
    if trt.get_plugin_registry().get_creator(*ATTENTION) is None:
        raise UserError(
            "TensorRT-LLM did not register GPTAttention, expected it on import (unset TRT_LLM_NO_LIB_INIT, or install "
            "TensorRT-LLM again)"
        )
