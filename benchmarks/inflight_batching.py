"""In-flight batching with and without MemShare: same engine, same requests, same KV pool."""

from __future__ import annotations

import sys

from trtllm_memshare.commands.bench import main
from trtllm_memshare.errors import run_command_line

if __name__ == "__main__":
    run_command_line(lambda: main(sys.argv[0], sys.argv[1:]))
