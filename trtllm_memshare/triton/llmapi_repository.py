"""A model repository around the ``llmapi`` model that TensorRT-LLM ships, with sharing switched on by the environment.

The model's code stays TensorRT-LLM's: it is copied from where the user has it. Ours are ``1/model.yaml`` (LLM options
with what sharing needs), ``memshare.json`` (settings) and a marker that tells the launcher which variables to set.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.repository import new_repository
from trtllm_memshare.triton.repository_marker import MARKER
from trtllm_memshare.trtllm.pytorch.llm_options import merge_options, read_yaml
from trtllm_memshare.trtllm.pytorch.settings import PREFIX, load_settings

STOCK_MODEL_DIR = Path("/app/all_models/llmapi/tensorrt_llm")  # in NVIDIA's TensorRT-LLM images for Triton
_FILES = ("config.pbtxt", "1/model.py", "1/model.yaml")
_OWN_KEYS = ("model", "backend", "triton_config")
_SETTINGS = "memshare.json"


@dataclass(frozen=True)
class LlmapiOptions:
    """What goes into the repository.

    Attributes:
      model: a checkpoint's folder or its name on the Hugging Face hub.
      output_dir: where the repository goes.
      stock_model_dir: TensorRT-LLM's ``triton_backend/all_models/llmapi/tensorrt_llm``.
      llm_options: YAML file with options of the LLM API; None = the defaults.
      memshare_config: settings file as for ``TRTLLM_MEMSHARE_CONFIG``; None = the defaults.
      decoupled: allow streaming.
      force: replace a repository that is there.
    """

    model: str
    output_dir: Path
    stock_model_dir: Path = STOCK_MODEL_DIR
    llm_options: Path | None = None
    memshare_config: Path | None = None
    decoupled: bool = True
    force: bool = False


def write_llmapi_repository(options: LlmapiOptions) -> dict[str, Any]:
    """Writes the model ``tensorrt_llm``; nothing is left behind if it fails.

    Returns:
      What ``1/model.yaml`` holds.

    Raises:
      UserError: no stock model, options that exclude sharing, wrong settings, or a folder in the way.
    """
    for name in _FILES:
        if not (options.stock_model_dir / name).is_file():
            raise UserError(
                f"no {name} in {options.stock_model_dir}: it must be TensorRT-LLM's "
                f"triton_backend/all_models/llmapi/tensorrt_llm (set --llmapi-model-dir)"
            )
    user = read_yaml(options.llm_options) if options.llm_options else {}
    for key in _OWN_KEYS:
        if key in user:
            raise UserError(f"{options.llm_options} must not set {key} (the repository's writer does)")
    settings = str(options.memshare_config) if options.memshare_config else None
    # Wrong ones are told now, not at the first start.
    route = load_settings({PREFIX + "CONFIG": settings} if settings else {}).options.route
    document = {
        "model": options.model,
        "backend": "pytorch",
        **merge_options(user, route),
        "triton_config": {"max_batch_size": 0, "decoupled": options.decoupled},
    }
    with new_repository(options.output_dir, options.force) as draft:
        shutil.copytree(options.stock_model_dir, draft / "tensorrt_llm")
        (draft / "tensorrt_llm" / "1" / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        (draft / _SETTINGS).write_text(Path(settings).read_text() if settings else "{}\n")
        (draft / MARKER).write_text(json.dumps({"flavour": "llmapi", "model": options.model}) + "\n")
    return document


def llmapi_environment(repository: Path) -> dict[str, str]:
    """Variables that switch sharing on in the processes of a server over ``repository``.

    ``LLM_CONFIG_PATH`` names the options that TensorRT-LLM's model reads; an inherited one would name others.
    """
    return {
        PREFIX + "ENABLE": "1",
        PREFIX + "CONFIG": str((repository / _SETTINGS).resolve()),
        "LLM_CONFIG_PATH": str((repository / "tensorrt_llm" / "1" / "model.yaml").resolve()),
    }
