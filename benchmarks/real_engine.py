"""An engine of a real model, out of a GGUF file or a checkpoint, for the GPU suite: in bf16 if nothing else is asked.

bf16 is what attention kernels of a GPU take; ``build_engine.py`` leaves a checkpoint's dtype alone, and GGUF files
become float32.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

try:
    import torch
    from transformers import AutoModelForCausalLM

    from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
    from trtllm_memshare.engine.gguf import checkpoint_of_gguf, is_gguf
    from trtllm_memshare.errors import run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or checkpoint folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="the engine; replaced if it is there")
    parser.add_argument("--max-batch-size", type=int, default=64, help="most requests in flight (default: 64)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options = parser.parse_args()
    source = checkpoint_of_gguf(options.model) if is_gguf(options.model) else options.model
    narrow = options.output_dir.with_name(f"{options.output_dir.name}_checkpoint")
    shutil.rmtree(narrow, ignore_errors=True)
    shutil.copytree(source, narrow, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    narrow.chmod(0o755)  # a folder that is read only is copied as one
    AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, options.dtype), local_files_only=True
    ).save_pretrained(narrow)
    sizes = {"max_batch_size": options.max_batch_size}
    build_engine(plan_build(BuildOptions(narrow, options.output_dir, memshare=True, build=sizes, force=True)))
    print(f"engine: {options.output_dir}")


if __name__ == "__main__":
    run_command_line(main)
