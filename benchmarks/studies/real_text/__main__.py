"""Sharing on real reasoning text: the committed DeepSeek-R1 traces.

    python -m benchmarks.studies.real_text reach    # what stage 1 finds in all 45 traces, and what that costs
    python -m benchmarks.studies.real_text replay   # fidelity of the model trained on them, on problems it never saw

`reach` reads token ids alone. `replay` feeds the text of the held-out traces, token by token, through the executor,
the cache manager and the search, and compares each next-token distribution with the full cache's. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from benchmarks.studies.real_text.study import run_reach, run_replay
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.corpus import TRACES
    from trtllm_memshare.evaluation.document import publish
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{reach,replay}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    common.add_argument("--model-dir", type=Path, default=Path("benchmarks/data/trace_model"))
    common.add_argument("--output-json", type=Path)
    reach = commands.add_parser("reach", parents=[common], help="what stage 1 finds in all traces")
    reach.add_argument("--tokens-per-block", type=int, nargs="+", default=[8, 16, 32, 64])
    reach.set_defaults(run=run_reach)
    fidelity = commands.add_parser("replay", parents=[common], help="KL and perplexity on held-out traces")
    fidelity.add_argument("--tokens-per-block", dest="block_size", type=int, default=16)
    fidelity.add_argument("--max-tokens", type=int, help="length of a text, prompt included (default: the context)")
    fidelity.add_argument("--num-texts", type=int, help="first held-out traces only (default: all)")
    arms = "in place of the usual ones: variant, or variant:key=value,key=value"
    fidelity.add_argument("--arms", nargs="+", metavar="ARM", help=arms)
    fidelity.add_argument("--plot", type=Path)
    fidelity.set_defaults(run=run_replay)
    options = parser.parse_args()
    publish(options.run(options), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
