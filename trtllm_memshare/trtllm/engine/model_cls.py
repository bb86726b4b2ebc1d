"""Model classes for plain ``trtllm-build --model_cls_file .../model_cls.py --model_cls_name MemShareQWenForCausalLM``.

Importing this file loads the plugin library that ``TRTLLM_MEMSHARE_PLUGIN`` names; ``TRTLLM_MEMSHARE_MAX_PAIRS`` sets
the pairs of one search. With ``--workers`` above 1 TensorRT-LLM pickles the class by a module name that other processes
do not know, so build with one worker. ``build_engine.py --adopt`` then makes it an engine directory of this project.
"""

from __future__ import annotations

import os
from pathlib import Path

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.search.config import MAX_PAIRS, make_config
from trtllm_memshare.trtllm.engine.installed import import_tensorrt
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins
from trtllm_memshare.trtllm.engine.search_layer import allow_plugin_v3_layers, memshare_model_class
from trtllm_memshare.trtllm.engine.signatures import BUILDER, check_signatures

_LIBRARY = Path(os.environ.get("TRTLLM_MEMSHARE_PLUGIN", "build/plugins/libtrtllm_memshare_plugin.so"))
if not _LIBRARY.is_file():
    raise UserError(f"the plugin library is missing, expected {_LIBRARY} (set TRTLLM_MEMSHARE_PLUGIN to its path)")
_trt = import_tensorrt()
load_trtllm_plugins(_trt)
check_signatures(BUILDER)
load_memshare_plugin(_trt, _LIBRARY)
allow_plugin_v3_layers()

from tensorrt_llm.models import MODEL_MAP  # noqa: E402  needs the checks above

_ASKED = os.environ.get("TRTLLM_MEMSHARE_MAX_PAIRS", str(make_config("aligned").max_pairs))
if not (_ASKED.isdecimal() and 1 <= int(_ASKED) <= MAX_PAIRS):
    raise UserError(f"TRTLLM_MEMSHARE_MAX_PAIRS must be from 1 to {MAX_PAIRS}, got {shorten(_ASKED)} (or leave it out)")
_PAIRS = int(_ASKED)
MemShareLLaMAForCausalLM = memshare_model_class(MODEL_MAP["LlamaForCausalLM"], _PAIRS)
MemShareQWenForCausalLM = memshare_model_class(MODEL_MAP["Qwen2ForCausalLM"], _PAIRS)
