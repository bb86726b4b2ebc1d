"""In-flight batching with and without MemShare: same engine, same requests, same KV pool: ``memshare bench``."""

from __future__ import annotations

import sys

try:
    from trtllm_memshare.__main__ import main
    from trtllm_memshare.errors import run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

if __name__ == "__main__":
    run_command_line(lambda: main(["bench", *sys.argv[1:]]))
