"""An engine of two pipeline stages and two halves of the heads: four processes, one model."""

from __future__ import annotations

import shutil

import pytest
from ranks.test_ranks import run_ranks
from trtllm_engine.conftest import write_engine_dir
from trtllm_engine.ranked_engine import NEW_TOKENS, NUM_BLOCKS, SETTINGS, serve_engine

from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2)])
def test_ranks_of_an_engine_serve_and_share_as_one_runner_does(
    tmp_path, bundled_model, boundaries, prompts, tp_size, pp_size
):
    runner = TorchRunner(load_model(bundled_model), NUM_BLOCKS, 16, fold_aliases=False)
    executor = Executor(runner, make_config("aligned", **SETTINGS), boundaries, 1024, 8, 64)
    handles = [executor.submit(p, SamplingParams(NEW_TOKENS, stop_token_ids=(1,))) for p in prompts[:3]]
    executor.run_until_idle()
    engine_dir = write_engine_dir(tmp_path / "engine", bundled_model, tp_size=tp_size, pp_size=pp_size)
    for rank in range(1, tp_size * pp_size):
        shutil.copy(engine_dir / "rank0.engine", engine_dir / f"rank{rank}.engine")
    ranks = run_ranks(serve_engine, engine_dir, tmp_path, tp_size * pp_size, prompts[:3])
    assert ranks[0]["outputs"] == [h.result(0).token_ids for h in handles]
    assert ranks[0]["shared"] == executor.manager.stats().shared > 0
    assert ranks[0]["rejected"] == executor.rejected
    assert executor.rejected["distance"] > 0  # the distances of all ranks decided
    assert {r["state"] for r in ranks} == {executor.manager.state_digest().hex()}
