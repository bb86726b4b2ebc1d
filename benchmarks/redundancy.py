"""Redundancy of texts: real DeepSeek-R1 traces beside outputs of the bundled model. Prints a table, then JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.redundancy import measure
    from trtllm_memshare.evaluation.texts import TEXT_FIELDS, read_texts
    from trtllm_memshare.report.redundancy import redundancy_table
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_TRACES = Path("benchmarks/data/traces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        type=Path,
        default=[_TRACES / "r1_aime24.jsonl", _TRACES / "r1_math500.jsonl"],
        help="JSON lines with one text each (default: the committed traces)",
    )
    parser.add_argument("--field", help=f"field that holds the text (default: {' or '.join(TEXT_FIELDS)})")
    parser.add_argument("--output-json", type=Path, help="also write the JSON document here; ratios in [0, 1]")
    options = parser.parse_args()
    measures = {str(path): measure(read_texts(path, options.field)) for path in options.files}
    stems = [path.stem for path in options.files]
    titles = stems if len(set(stems)) == len(measures) else list(measures)
    print(redundancy_table(dict(zip(titles, measures.values(), strict=True))))
    document = {name: asdict(measured) for name, measured in measures.items()}
    if options.output_json is not None:
        options.output_json.parent.mkdir(parents=True, exist_ok=True)
        options.output_json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"report: {options.output_json}")
    print(json.dumps(document))


if __name__ == "__main__":
    run_command_line(main)
