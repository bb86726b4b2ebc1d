"""One benchmark run from options to report: opens the engine, sizes the pool, runs the variants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark import (
    Load,
    Measurement,
    blocks_without_waiting,
    follow_variant,
    run_variant,
    streaming_window,
)
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.dataset import DatasetItem, DatasetLimits, draw_samples, final_answer, read_dataset
from trtllm_memshare.evaluation.document import make_report, write_report
from trtllm_memshare.evaluation.rounds import merge_rounds
from trtllm_memshare.evaluation.variants import Variant, default_variants, make_variant, parse_variants
from trtllm_memshare.evaluation.warm_up import warm_up_items
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import choose_device, open_runner
from trtllm_memshare.runners.pool_memory import num_ranks
from trtllm_memshare.runners.protocol import BenchmarkedRunner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.ranked_executor import Ranks
from trtllm_memshare.serving.request import RequestResult
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION


def run_benchmark(options: BenchmarkOptions, command: str) -> dict[str, Any]:
    """Runs everything, says on stdout what was chosen, and returns the report, which it also writes after each run.

    Of an engine on several GPUs rank 0 does; the others take part in its runs and return an empty report.
    """
    engine = load_engine(options.engine_dir)
    names = options.variants or default_variants(engine.memshare)
    variants = parse_variants(names, engine.memshare, **dict(options.settings))
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    device = announce_device(options.device)
    limits = DatasetLimits(engine.build.max_seq_len, engine.vocab_size)
    rows = read_dataset(options.dataset, tokenizer, options.num_requests, limits, options.prompt_format)
    items = draw_samples(rows, options.samples)
    load = replace(
        load_of(engine),
        scheduler_policy=options.scheduler_policy,
        concurrency=options.concurrency,
        request_rate=options.request_rate,
        temperature=options.temperature,
        seed=options.seed,
        replay=options.replay,
    )
    if options.replay and any(item.output_ids is None for item in items):
        raise UserError(f"{options.dataset} has requests without an output, which --replay is to replay (leave it out)")
    ranks = _connect(engine)
    bench = _Bench(
        engine,
        tokenizer,
        items,
        load,
        options.device,
        options.read_aliases == "fold",
        ranks,
        options.engine_cuda_graphs,
    )
    if ranks is not None and not ranks.is_leader:
        bench.follow()
        return {}
    blocks = options.kv_cache_blocks or bench.enough_blocks()
    if options.kv_cache_share is not None:
        demand = bench.measure_demand()
        blocks = max(1, round(demand * options.kv_cache_share))
        print(f"KV pool: {blocks} blocks = {options.kv_cache_share:g} x {demand}, the full cache's peak demand")
    runner = bench.use_pool(blocks)
    print(f"block distances: {runner.search.description}")
    print(f"decode attention: {runner.decode_description}; backend: {engine.backend}")
    report = make_report(
        {
            "device": device,
            "block_distances": runner.search.description,
            "decode_attention": runner.decode_description,
            "engine": {"engine_dir": str(options.engine_dir), "backend": engine.backend, **engine.build.model_dump()},
            "dataset": {"path": str(options.dataset), "num_requests": len(items)},
            "kv_cache_blocks": blocks,
            "scheduler_policy": options.scheduler_policy,
            "concurrency": options.concurrency,
            "request_rate": options.request_rate,
            "repeat": options.repeat,
            "replay": options.replay,
            "read_aliases": options.read_aliases if engine.backend == "torch" else "repeat",
            "seed": options.seed,
            "variants": [],
        },
        command,
    )
    if device.startswith("cuda"):
        bench.warm_up()
    try:
        for entries in bench.run_all(variants, options.repeat):
            report["variants"] = entries
            if options.output_json is not None:  # an hour's run that is cut keeps the arms that have ended
                write_report(report, options.output_json)
    except UserError as error:
        if options.kv_cache_share is None or "--kv-cache-blocks" not in str(error):
            raise
        raise UserError(f"{error} in place of --kv-cache-share {options.kv_cache_share:g}") from error
    bench.dismiss()
    if options.output_texts is not None:
        bench.write_texts(options.output_texts)
    return report


def announce_device(asked: str) -> str:
    """The device that was asked for, ``auto`` as what is there; prints what was chosen and why."""
    device = choose_device(asked)
    found = "available" if device == "cuda" else "not available"
    print(f"device: {device} ({'asked for' if asked != 'auto' else f'CUDA is {found}'})")
    return device


def load_of(engine: Engine) -> Load:
    """The engine's limits, with all requests waiting from the start."""
    return Load(
        max_batch_size=engine.build.max_batch_size,
        max_num_tokens=engine.build.max_num_tokens,
        max_seq_len=engine.build.max_seq_len,
        scheduler_policy=MAX_UTILIZATION,
        stop_token_ids=engine.stop_token_ids,
    )


class _Bench:
    """The engine's runner, kept between variants, and the requests."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        items: list[DatasetItem],
        load: Load,
        device: str,
        fold: bool,
        ranks: Ranks | None = None,
        use_graphs: bool = False,
    ) -> None:
        self._ranks, self._use_graphs = ranks, use_graphs
        self._engine, self._tokenizer, self._items, self._load = engine, tokenizer, items, load
        self._device, self._fold = device, fold
        self._first: list[RequestResult] = []
        self._runner: BenchmarkedRunner | None = None
        self._boundaries = BoundaryTokens.from_tokenizer(tokenizer, engine.vocab_size)

    def enough_blocks(self) -> int:
        """Blocks with which no request ever waits."""
        return blocks_without_waiting(self._items, self._load, self._engine.build.tokens_per_block)

    def measure_demand(self) -> int:
        """Peak blocks of the full cache when nothing limits it."""
        self.use_pool(self.enough_blocks())
        return self._run(make_variant("full", self._engine.memshare)).entry["peak_used_blocks"]

    def use_pool(self, num_blocks: int) -> BenchmarkedRunner:
        """The runner, made anew if the pool's size changed."""
        if self._runner is None or self._runner.num_blocks != num_blocks:
            self._runner = None  # gives its pool back before the next one is made
            communicator = None if self._ranks is None else self._ranks.communicator
            if communicator is not None and communicator.rank == 0:
                communicator.broadcast(num_blocks)
            self._runner = open_runner(
                self._engine, num_blocks, self._device, self._fold, communicator, self._use_graphs
            )
        return self._runner

    def warm_up(self) -> None:
        """One short run that nobody records; none on several GPUs, where no graphs are captured."""
        if self._ranks is None:
            load = replace(self._load, concurrency=None, request_rate=None, replay=False, stop_token_ids=())
            in_flight = min(load.max_batch_size, self._load.concurrency or load.max_batch_size)
            items, variant = warm_up_items(self._items, in_flight), Variant("warm-up", make_config("off"))
            assert self._runner is not None
            run_variant(variant, self._runner, self._boundaries, items, load, self._is_right)

    def run_all(self, variants: list[Variant], repeat: int) -> Iterator[list[dict[str, Any]]]:
        """Yields after each run the entries of the variants that have run, in the order of ``variants``.

        Rounds are interleaved so that drift of the machine hits all alike.
        """
        rounds: dict[str, list[Measurement]] = {v.name: [] for v in variants}
        for index in range(repeat):
            # The window of `streaming` comes from `full` and `aligned` of the same run.
            for variant in sorted(variants, key=lambda v: v.takes_window):
                if variant.takes_window and index == 0:
                    variant = self._with_window(variant, rounds)
                elif variant.takes_window:
                    variant = Variant(variant.name, rounds[variant.name][0].config)
                rounds[variant.name].append(self._run(variant))
                full = rounds["full"][0] if rounds.get("full") else None
                yield [merge_rounds(rounds[v.name], full) for v in variants if rounds[v.name]]
        self._first = rounds[variants[0].name][0].results

    def write_texts(self, path: Path) -> None:
        """What the first variant generated, one JSON object per request."""
        texts = [self._tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in self._first]
        rows = [{"task_id": i.task_id, "text": t} for i, t in zip(self._items, texts, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def follow(self) -> None:
        """Does on another rank what rank 0 says: a pool of so many blocks, a variant, or None for the end."""
        assert self._ranks is not None
        while (order := self._ranks.communicator.broadcast(None)) is not None:
            if isinstance(order, int):
                self.use_pool(order)
            else:
                assert self._runner is not None
                follow_variant(order, self._runner, self._boundaries, self._load, self._ranks)

    def dismiss(self) -> None:
        """Lets the other ranks return from ``follow``."""
        if self._ranks is not None:
            self._ranks.communicator.broadcast(None)

    def _run(self, variant: Variant) -> Measurement:
        assert self._runner is not None
        if self._ranks is not None:
            self._ranks.communicator.broadcast(variant)
        return run_variant(
            variant, self._runner, self._boundaries, self._items, self._load, self._is_right, self._ranks
        )

    def _with_window(self, variant: Variant, rounds: dict[str, list[Measurement]]) -> Variant:
        if not rounds.get("full") or not rounds.get("aligned"):
            raise UserError(
                "variant streaming takes its window from the memory of full and aligned, got a run without one of "
                "them (add both to --variants, or give one: streaming:streaming_window_tokens=512)"
            )
        config, size = variant.config, self._engine.build.tokens_per_block
        held = rounds["aligned"][0].entry["block_steps_per_request"]
        spans = [(r.stats.num_prompt_tokens, r.stats.num_output_tokens) for r in rounds["full"][0].results]
        window = streaming_window(spans, held, config.streaming_sink_tokens, size)
        return Variant(variant.name, config.model_copy(update={"streaming_window_tokens": window}))

    def _is_right(self, item: DatasetItem, token_ids: list[int]) -> bool:
        """The generated text ends with the answer, after the reasoning."""
        return final_answer(self._tokenizer.decode(token_ids, skip_special_tokens=True)) == item.answer


def _connect(engine: Engine) -> Ranks | None:
    """The ranks of an engine on several GPUs; None for an engine of one."""
    if num_ranks(engine) == 1:
        return None
    from trtllm_memshare.ranks.torch_communicator import TorchCommunicator

    return Ranks(TorchCommunicator.from_environment(), engine.build.tp_size, engine.build.pp_size)
