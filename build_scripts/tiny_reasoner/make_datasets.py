"""Writes the committed data sets of the bundled model's task; running it again changes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from build_scripts.tiny_reasoner.datasets import write_datasets
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/data"))
    for name, path in write_datasets(parser.parse_args().output_dir).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
