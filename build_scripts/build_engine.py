"""Builds an engine directory from a Hugging Face checkpoint, with KV-cache sharing if asked for: ``memshare build``."""

from __future__ import annotations

import sys

try:
    from trtllm_memshare.__main__ import main
    from trtllm_memshare.errors import run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

if __name__ == "__main__":
    run_command_line(lambda: main(["build", *sys.argv[1:]]))
