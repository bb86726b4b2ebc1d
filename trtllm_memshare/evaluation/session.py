"""An engine and a data set, opened once: what an arm generates on its own, and how it reads a given text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trtllm_memshare.engine.weights import weight_files
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark import blocks_without_waiting, run_variant
from trtllm_memshare.evaluation.benchmark_options import (
    MOST_REQUESTS,
    check_number,
    check_output_file,
    check_temperature,
)
from trtllm_memshare.evaluation.benchmark_run import announce_device, load_of
from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.evaluation.dataset import DatasetItem, DatasetLimits, draw_samples, final_answer, read_dataset
from trtllm_memshare.evaluation.scoring import Reference, ScoringSampler, summarize
from trtllm_memshare.evaluation.variants import Variant
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

_KEPT = (
    "block_steps_per_request", "shared_block_fraction", "mean_output_tokens", "num_length_stops", "refused", "rejected"
)  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """What an arm generated on its own.

    Attributes:
      token_ids: of each request, a stop token included.
      figures: counts of blocks and tokens, under the names of the benchmark's report; none depends on the clock.
    """

    token_ids: list[list[int]]
    figures: dict[str, Any]


class Session:
    """Runs arms over a pool in which nobody waits, greedily or seeded, so that every figure is the same in each run.

    Args:
      engine_dir: an engine directory.
      dataset: JSON lines as for the benchmarks.
      num_problems: first lines of the data set only, None = all.
      device: auto, cpu or cuda.
      keep_dir: a folder in which generations and scores are kept and found again, None = none. They are found by
        model, requests and settings, not by the code's version: empty it after a change of the code.
      samples: answers to each problem; they are one group for ``scope: group``.
      temperature: of the full cache and of every arm, 0 = greedy.

    Raises:
      UserError: an unusable engine or data set, no problems, no samples, no temperature, or a folder to keep results
        in that cannot be written.
    """

    def __init__(
        self,
        engine_dir: Path,
        dataset: Path,
        num_problems: int | None = None,
        device: str = "auto",
        keep_dir: Path | None = None,
        samples: int = 1,
        temperature: float = 0.0,
    ) -> None:
        check_temperature(temperature)
        check_number("--num-problems", num_problems, 1, MOST_REQUESTS)
        check_output_file("--keep-dir", None if keep_dir is None else keep_dir / "kept.json")
        if samples < 1:
            raise UserError(f"--samples must be at least 1, got {samples} (1 = one answer to each problem)")
        self.engine = load_engine(engine_dir)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.engine.model_dir, local_files_only=True)
        limits = DatasetLimits(self.engine.build.max_seq_len, self.engine.vocab_size)
        self.items = draw_samples(read_dataset(dataset, self.tokenizer, num_problems, limits), samples)
        self.tokens_per_block = self.engine.build.tokens_per_block
        self._load = replace(load_of(self.engine), temperature=temperature)
        self._boundaries = BoundaryTokens.from_tokenizer(self.tokenizer, self.engine.vocab_size)
        self._keep_dir = keep_dir
        self._reference: Reference | None = None
        model = load_model(self.engine.model_dir, announce_device(device))
        blocks = blocks_without_waiting(self.items, self._load, self.tokens_per_block)
        self._runner = TorchRunner(model, blocks, self.tokens_per_block, getattr(torch, self.engine.kv_dtype))

    @property
    def has_answers(self) -> bool:
        return all(item.answer is not None for item in self.items)

    @property
    def has_outputs(self) -> bool:
        return all(item.output_ids for item in self.items)

    def answers(self, generation: Generation) -> list[str]:
        """Final answers, one per request."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in generation.token_ids]
        return [final_answer(text) for text in texts]

    def generate(self, name: str, config: MemShareConfig) -> Generation:
        """Lets an arm answer every request."""
        kept = self._kept_file(config)
        if (found := _find_kept(kept, "token_ids", "figures")) is not None:
            return Generation(found["token_ids"], found["figures"])

        def unjudged(item: DatasetItem, token_ids: list[int]) -> bool:
            return False  # answers are compared later, when all arms are there

        run = run_variant(Variant(name, config), self._runner, self._boundaries, self.items, self._load, unjudged)
        generation = Generation([r.token_ids for r in run.results], {key: run.entry[key] for key in _KEPT})
        self._keep(kept, asdict(generation))
        return generation

    def read(self, config: MemShareConfig, scripts: list[list[int]]) -> dict[str, Any]:
        """Feeds the first requests their scripts while the arm shares, and scores it against the full cache.

        Args:
          scripts: token ids that each of the first ``len(scripts)`` requests generates.

        Returns:
          ``scoring.summarize``'s figures, block_steps_per_request and shared_block_fraction.

        Raises:
          UserError: the full cache's distributions take too much memory.
        """
        kept = self._kept_file(config, scripts)
        if (found := _find_kept(kept, "block_steps_per_request", "shared_block_fraction")) is not None:
            return found
        full = make_config("off")
        if self._reference is None or self._reference.scripts != scripts:
            self._reference = Reference(scripts, self._runner.vocab_size)
            filled = self._replay(full, self._reference, fills=True)
            self._keep(self._kept_file(full, scripts), filled)
            if config == full:
                return filled
        figures = self._replay(config, self._reference, fills=False)
        self._keep(kept, figures)
        return figures

    def _replay(self, config: MemShareConfig, reference: Reference, fills: bool) -> dict[str, Any]:
        sampler = ScoringSampler(reference, fills)
        build = self.engine.build
        executor = Executor(
            self._runner,
            config,
            self._boundaries,
            build.max_seq_len,
            build.max_batch_size,
            build.max_num_tokens,
            sampler=sampler,
            make_control=make_control,
        )
        for item, script in zip(self.items, reference.scripts, strict=False):
            executor.submit(item.input_ids, SamplingParams(len(script)), item.group)
        executor.run_until_idle()
        return {
            **summarize(sampler.scores),
            "block_steps_per_request": executor.stats.block_steps / len(reference.scripts),
            "shared_block_fraction": executor.manager.stats().shared_block_fraction,
        }

    def _kept_file(self, config: MemShareConfig, scripts: list[list[int]] | None = None) -> Path | None:
        if self._keep_dir is None:
            return None
        digest = hashlib.sha256()
        for path in weight_files(self.engine.model_dir):
            digest.update(path.read_bytes())
        requests = [(item.input_ids, item.output_tokens) for item in self.items]
        known: list[Any] = [self.engine.build.model_dump(), requests, config.model_dump(exclude_defaults=True), scripts]
        if self.items[-1].group is not None or self._load.temperature:
            known.append([(item.group, item.seed, self._load.temperature) for item in self.items])
        digest.update(json.dumps(known).encode())
        return self._keep_dir / f"{digest.hexdigest()[:32]}.json"

    @staticmethod
    def _keep(path: Path | None, document: dict[str, Any]) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A run that is killed leaves the whole file or none.
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(document))
            partial.replace(path)


def _find_kept(path: Path | None, *keys: str) -> dict[str, Any] | None:
    """What an earlier run has kept, None = nothing. Raises UserError for a file that no run has written so."""
    if path is None or not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise UserError(f"{path} is damaged: not JSON (delete it, and it is measured again)") from error
    if not isinstance(document, dict) or not all(key in document for key in keys):
        raise UserError(f"{path} is damaged: it lacks {' or '.join(keys)} (delete it, and it is measured again)")
    return document
