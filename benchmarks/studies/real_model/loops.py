"""A model that repeats itself for ever, inside ordinary reasoning: is memory flat, and is the text around it unharmed?

A text is real reasoning, then one passage again and again, then the reasoning goes on. Exact repeats go with nothing
else to press: shared, or forgotten (``--variant aligned:retired_becomes=dropped``). With ``--variant
pressure:min_kept=1`` all pages go that stand again, as under lasting pressure. The rows say why the pages of the loop
stay that are there at its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.loop_study import PAGE_TOKENS, measure_loop
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.real_texts import read_traces, runaway_trace, token_texts
    from trtllm_memshare.evaluation.variants import parse_variant
    from trtllm_memshare.search.config import make_config
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

BEFORE, AFTER = 512, 512
_RUNAWAY_PERIOD = 98  # tokens of SmolLM2's tokenizer, from the end of the 32,768-token trace
PASSAGES = {
    "English": "Wait, let me check that again. The sum is 14, so the answer must be 14. Hmm, but is it right?\n\n",
    "formula": "\\[ x^2 + 3x - 10 = (x + 5)(x - 2) = 0 \\]\n\nSo x = -5 or x = 2. Check: 4 + 6 - 10 = 0.\n\n",
    "Chinese": "等一下，让我再检查一遍。三加四等于七，所以答案是七。\n\n",
    "Russian": "Подождите, проверим ещё раз: три плюс четыре равно семи.\n\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--variant", default="aligned", help="NAME[:KEY=VALUE,...] (default: %(default)s)")
    parser.add_argument(
        "--loop-tokens", type=int, default=1024, help="of the loop, a multiple of 32, two pages (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/studies/real_model/results/loops.json"))
    arguments = parser.parse_args()
    loop = arguments.loop_tokens
    if loop < 2 * PAGE_TOKENS or loop % (2 * PAGE_TOKENS):
        parser.error(f"--loop-tokens must be a positive multiple of {2 * PAGE_TOKENS}, got {loop}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay = MaskedReplay(arguments.model_dir, "bfloat16")
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, replay.model.config.vocab_size)
    endless = tokenizer(runaway_trace().output, add_special_tokens=False, verbose=False)["input_ids"]
    passages = {"the runaway trace's own": endless[-_RUNAWAY_PERIOD:]}
    passages |= {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in PASSAGES.items()}
    texts = islice(token_texts(read_traces(), tokenizer, BEFORE + AFTER), len(passages))
    config, found = parse_variant(arguments.variant, make_config("off")).config, []
    for (name, passage), text in zip(passages.items(), texts, strict=True):
        figures = measure_loop(replay, text.ids, text.num_prompt_tokens, passage, boundaries, config, BEFORE, loop)
        found.append({"passage": name, **figures})
        print(json.dumps(found[-1]), flush=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run_command_line(main)
