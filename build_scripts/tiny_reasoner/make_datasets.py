"""Writes the committed data sets of the bundled model's task; running it again changes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from build_scripts.tiny_reasoner.datasets import write_datasets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/data"))
    for name, path in write_datasets(parser.parse_args().output_dir).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
