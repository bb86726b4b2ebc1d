"""Builds an engine directory from a Hugging Face checkpoint, with KV-cache sharing if asked for."""

from __future__ import annotations

import sys

from trtllm_memshare.commands.build import main
from trtllm_memshare.errors import run_command_line

if __name__ == "__main__":
    run_command_line(lambda: main(sys.argv[0], sys.argv[1:]))
