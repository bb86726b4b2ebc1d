"""What steps of the GPU suite need, where it is looked for, and what pip calls it. Needs nothing but Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from trtllm_memshare.engine.nvcc import check_nvcc
from trtllm_memshare.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu_suite_work"
KIT = ROOT / "gpu_kit"
"""What ``build_scripts/pack_gpu_kit.sh`` gathers."""
PLUGINS = ROOT / "build" / "plugins"
"""Where the tests with TensorRT look for the library."""

KERNEL = ("torch", "numpy", "pydantic", "tqdm", "cuda.core")
MODEL = (*KERNEL, "transformers", "tokenizers", "safetensors", "yaml")
REAL_MODEL = (*MODEL, "gguf", "accelerate")
ADAPTER = (*REAL_MODEL, "peft")
TESTS = (*MODEL, "pytest", "hypothesis")
REQUIREMENTS = {
    "torch": "torch>=2.6", "numpy": "numpy", "pydantic": "pydantic>=2.6,<3", "transformers": "transformers>=4.57,<6",
    "tokenizers": "tokenizers>=0.22", "safetensors": "safetensors>=0.4", "tqdm": "tqdm>=4.66", "yaml": "pyyaml>=6",
    "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100", "cuda.core": "cuda-core>=1.0,<2", "gguf": "gguf>=0.17",
    "accelerate": "accelerate>=1.0", "peft": "peft>=0.17", "triton": "triton",
}  # fmt: skip
"""Modules that steps import, and what pip calls them."""


def absent_modules(names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that are not installed; imports only their parent packages."""
    absent = []
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            absent.append(name)
    return absent


def why_not(
    modules: tuple[str, ...] = (), tools: tuple[str, ...] = (), others: dict[str, bool] | None = None
) -> str | None:
    """What a step lacks, in words that name it, or None. ``others``: what is needed -> whether it is there."""
    lacking = absent_modules(modules)
    lacking += [f"{tool} on PATH" for tool in tools if shutil.which(tool) is None]
    lacking += [what for what, there in (others or {}).items() if not there]
    return f"lacks {', '.join(lacking)}" if lacking else None


def tensorrt_root() -> str | None:
    """The folder with TensorRT's ``include/``: ``TENSORRT_ROOT``, else the kit's."""
    if os.environ.get("TENSORRT_ROOT"):
        return os.environ["TENSORRT_ROOT"]
    return str(KIT / "tensorrt") if (KIT / "tensorrt" / "include").is_dir() else None


def real_model() -> Path | None:
    """The GGUF file of the kit, or the checkpoint that ``get_smollm2.py`` leaves."""
    known = (KIT / "SmolLM2-135M-Instruct.gguf", ROOT / "models" / "smollm2")
    return next((path for path in known if path.exists()), None)


def plugin_lacks() -> str | None:
    """What the build of the plugin library lacks."""
    root = tensorrt_root()
    header = root is not None and (Path(root) / "include" / "NvInferRuntime.h").is_file()
    others = {"TENSORRT_ROOT (a folder with TensorRT's include/)": header}
    if shutil.which("nvcc") is not None:
        try:
            check_nvcc()
        except UserError as error:
            others[f"an nvcc that builds it: {error}"] = False
    return why_not(KERNEL, ("nvcc", "cmake"), others)


def real_model_lacks(modules: tuple[str, ...] = REAL_MODEL) -> str | None:
    """What a step with SmolLM2 lacks."""
    return why_not(modules, (), {"SmolLM2 (build_scripts/get_smollm2.py)": real_model() is not None})
