"""One rank of several, in a process of its own; run by test_ranks.py.

``run`` serves a model whose attention heads are split over the ranks and leaves a digest of the block tables chained
over all steps, and what was shared.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from fakes.counting_runner import CountingRunner

from trtllm_memshare.evaluation import benchmark_run
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.benchmark_run import run_benchmark
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.ranks.agreement import RankAgreement, RankDisagreementError, RankLostError
from trtllm_memshare.ranks.torch_communicator import TorchCommunicator
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.ranked_executor import Ranks
from trtllm_memshare.serving.request import SamplingParams


def split_heads(model, rank: int, size: int):
    """Keeps this rank's share of every layer's heads; attention's output is added over the ranks."""
    config = model.config
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            linear.weight.data = linear.weight.data.chunk(size)[rank].contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.chunk(size)[rank].contiguous()
        weight = attention.o_proj.weight.data.chunk(size, dim=1)[rank].contiguous()
        attention.o_proj.weight.data = weight
        attention.o_proj.register_forward_hook(_add_over_ranks)
    config.num_attention_heads //= size
    config.num_key_value_heads //= size
    return model


def _add_over_ranks(_module, _inputs, output):
    dist.all_reduce(output)
    return output


def run(checkpoint: str, rank: int, size: int, rendezvous: str, rounds: int, preset: str, fault_at: int) -> dict:
    """Serves ``rounds`` times three requests; rank 1 spoils its table before step ``fault_at``."""
    model, agreement = load_model(Path(checkpoint)), None
    if size > 1:
        agreement = RankAgreement(TorchCommunicator(rank, size, f"file://{rendezvous}"), size)
        model = split_heads(model, rank, size)
    runner = TorchRunner(model, 52, 8)
    boundaries = BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])
    settings = {"protected_tokens": 8, "protected_steps": 0, "search_interval": 8}
    sampler = ReplaySampler()
    executor = Executor(
        runner, make_config(preset, **settings), boundaries, 512, 4, 64, sampler=sampler, agreement=agreement
    )
    chain, steps = b"", 0
    for turn in range(rounds):
        rng = np.random.default_rng(turn)
        for _ in range(3):
            piece = rng.integers(4, runner.vocab_size, 40)
            script = np.concatenate([piece, rng.integers(4, runner.vocab_size, 9)] * 9)[:400].tolist()
            handle = executor.submit(piece[:7].tolist(), SamplingParams(len(script)))
            sampler.add_script(handle.request_id, script)
        while executor.has_work:
            if rank == 1 and steps == fault_at:
                executor.manager._tables[0, 0] += 1
            executor.step()
            steps += 1
            chain = hashlib.blake2b(chain + executor.manager.state_digest(), digest_size=16).digest()
    stats = executor.manager.stats()
    pauses = executor.stats.num_pauses
    return {"chain": chain.hex(), "steps": steps, "shared": stats.shared, "pauses": pauses}


def serve(checkpoint: str, rank: int, size: int, rendezvous: str, prompts: list[list[int]]) -> dict:
    """Requests that reach rank 0 only, from another thread, and one that is cancelled there."""
    runner = TorchRunner(load_model(Path(checkpoint)), 120, 8)
    boundaries = BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])
    settings = {"protected_tokens": 8, "protected_steps": 0, "search_interval": 1, "min_run_tokens": 16}
    ranks = Ranks(TorchCommunicator(rank, size, f"file://{rendezvous}"), size, 1)
    config = make_config("lexical", **settings)
    executor = ranks.executor(runner, config, boundaries, 512, 4, 64, "MAX_UTILIZATION")
    outputs = []
    if rank == 0:
        with executor:
            endless = executor.submit(prompts[0], SamplingParams(440))
            next(iter(endless))
            endless.cancel()
            params = [SamplingParams(60, temperature=0.4 * i, seed=i) for i in range(len(prompts))]
            handles = [executor.submit(p, s) for p, s in zip(prompts, params, strict=True)]
            outputs = [h.result(60).token_ids for h in handles]
            reason = endless.result(60).finish_reason
        assert reason == "cancelled"
    else:
        executor.follow()
    stats, state = executor.manager.stats(), executor.manager.state_digest().hex()
    return {"shared": stats.shared, "state": state, "steps": executor.stats.num_steps, "outputs": outputs}


def benchmark(engine_dir: str, rank: int, size: int, rendezvous: str, dataset: str) -> dict:
    """The benchmark as each rank of an engine of ``size`` ranks runs it."""
    ranks = Ranks(TorchCommunicator(rank, size, f"file://{rendezvous}"), size, 1)
    benchmark_run._connect = lambda _: ranks
    options = BenchmarkOptions(Path(engine_dir), Path(dataset), ("full", "lexical"), kv_cache_share=1.0)
    report = run_benchmark(options, "command")
    return {v["variant"]: v["mean_output_tokens"] for v in report.get("variants", [])}


def interrupted(_: str, rank: int, size: int, rendezvous: str, victim: int) -> dict:
    """Requests on rank 0, and a step on rank ``victim`` in which Ctrl-C is pressed: how everything ended."""
    runner = CountingRunner()
    ranks = Ranks(TorchCommunicator(rank, size, f"file://{rendezvous}"), size, 1)
    agreement = RankAgreement(ranks.communicator, size)

    def interrupt(batch) -> None:
        if rank == victim and batch.sequence_lengths[0] > 10:
            raise KeyboardInterrupt
        agreement.exchange(rank)  # as a model adds up its heads: no rank computes alone

    runner.before_step = interrupt
    boundaries = BoundaryTokens.from_texts([f"t{i}" for i in range(runner.vocab_size)])
    executor = ranks.executor(runner, make_config("off"), boundaries, 512, 4, 64, "MAX_UTILIZATION")  # type: ignore[arg-type]
    if rank == 0:
        with executor:
            handles = [executor.submit([5 + i], SamplingParams(300)) for i in range(6)]
            ends = [str(h.future.exception(60)) for h in handles]
        return {"ends": ends}
    try:
        executor.follow()
    except KeyboardInterrupt:
        return {"error": "KeyboardInterrupt"}
    return {"error": "none"}


def silent(_: str, rank: int, size: int, rendezvous: str) -> dict:
    """The last rank says nothing; the others exchange values as a decision does."""
    here = Path(rendezvous)
    _meet(here, rank, size)
    communicator = TorchCommunicator(rank, size, f"file://{rendezvous}", max_wait_s=2.0)
    if rank < size - 1:
        RankAgreement(communicator, size).exchange(rank)
    deadline = time.monotonic() + 60
    while not all((here.parent / f"rank{r}.json").exists() for r in range(rank)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {}


def _meet(here: Path, rank: int, size: int) -> None:
    """Waits until every process has come so far: from here on a short limit tells something."""
    here.with_suffix(f".{rank}").touch()
    while not all(here.with_suffix(f".{r}").exists() for r in range(size)):
        time.sleep(0.01)


def never_met(_: str, rank: int, size: int, rendezvous: str) -> dict:
    """There should be one rank more."""
    TorchCommunicator(rank, size + 1, f"file://{rendezvous}", max_wait_s=0.3)
    return {}


def run_into(path: str, function: Callable[..., dict], *arguments) -> None:
    """Writes the result, or the text of an error between ranks, to a file."""
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except (RankDisagreementError, RankLostError) as error:
        result = {"error": str(error)}
    Path(path).write_text(json.dumps(result))
