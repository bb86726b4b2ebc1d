"""Starts Triton Inference Server over a model repository; other options go to tritonserver."""

from __future__ import annotations

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.triton.launch import main

if __name__ == "__main__":
    run_command_line(main)
