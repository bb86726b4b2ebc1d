"""Starts Triton Inference Server over a model repository; other options go to tritonserver."""

from __future__ import annotations

import sys

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.triton.launch import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

if __name__ == "__main__":
    run_command_line(main)
