"""What it takes until a model of the traces' size continues an earlier copy: its first stage of training, with one
thing changed at a time. The last line is JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    from transformers import Qwen2ForCausalLM

    from benchmarks.studies.learning_to_copy.copy_loss import copy_loss
    from benchmarks.studies.learning_to_copy.curriculum import Curriculum, Mixture
    from benchmarks.studies.learning_to_copy.shape import look_one_back, model_config
    from benchmarks.studies.learning_to_copy.training import TraceTrainingConfig
    from benchmarks.studies.real_text.tables import copying_table
    from build_scripts.tiny_reasoner.optimization import Schedule, optimize
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.corpus import SPECIAL
    from trtllm_memshare.evaluation.document import make_report, publish
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "no head to start with": {"start_head": False},
    "Muon for the matrices": {"muon_learning_rate": 0.02},
    "heads of 32, base 10,000": {"head_dim": 32, "rope_theta": 1e4},
}
_LENGTHS = (16, 128, 512)


def learn(
    num_steps: int, start_head: bool = True, muon_learning_rate: float = 0.0, **shape: Any
) -> list[dict[str, float]]:
    """Copy losses in nats per token along a run on random tokens alone."""
    defaults = TraceTrainingConfig()
    torch.manual_seed(defaults.seed)
    model = Qwen2ForCausalLM(model_config(defaults.vocab_size, defaults.window, 0, 1, **shape)).train()
    if start_head:
        look_one_back(model)
    curriculum = Curriculum(
        [],
        Mixture(repeats=1.0),
        defaults.vocab_size,
        len(SPECIAL),
        1,
        defaults.tokens_per_step,
        defaults.window,
        defaults.seed,
    )

    log: list[dict[str, float]] = []
    optimize(
        model,
        curriculum.batches(),
        1,
        Schedule(
            num_steps,
            None,
            muon_learning_rate,
            defaults.adam_learning_rate,
            defaults.weight_decay,
            defaults.bf16,
            log_every=max(1, num_steps // 10),
        ),
        measure=lambda _: {str(n): copy_loss(model, n, len(SPECIAL)) for n in _LENGTHS},
        keep=lambda entries: log.append(entries[-1]),
    )
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=330, help="as many as the model of the traces had")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    runs = [{"variant": name, "log": learn(options.num_steps, **changes)} for name, changes in _VARIANTS.items()]
    report = make_report({"num_steps": options.num_steps, "runs": runs})
    print(copying_table(report))
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
