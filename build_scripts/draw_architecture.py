"""Draws docs/architecture.png from the imports of the code as it stands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "architecture.png")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # grimp imports nothing, but finds packages by the import path
    from trtllm_memshare.report.architecture import draw_rooms, read_rooms

    rooms = read_rooms(ROOT)
    draw_rooms(rooms, options.output)
    for room in rooms:
        print(f"{room.name:<14}{room.lines:>7,} lines  imports {', '.join(room.imports) or 'nothing'}")


if __name__ == "__main__":
    run_command_line(main)
