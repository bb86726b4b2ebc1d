"""The default need under pressure on a TensorRT engine: no output of the engine, the runner's pool is what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.centred_model import write_centred_checkpoint
from plugins.kernels_on_host import SignaturesOnHost
from tolerances import SAME_LOGITS
from trtllm_engine.test_null_pages import SIZE, serve

from trtllm_memshare.engine import null_page
from trtllm_memshare.engine.null_page import calibrate_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search import page_signer
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.pressure import Pressure

CONFIG = make_config("pressure", protected_tokens=32, min_kept=0.4, min_run_tokens=500)


class OnCuda(torch.Tensor):
    """A pool that says it is on a CUDA device."""

    is_cuda = True


@pytest.fixture(scope="module")
def centred(tmp_path_factory):
    """A checkpoint with heads of 32, the smallest that the kernel takes, and its null pages."""
    changes = {"max_position_embeddings": 512, "hidden_size": 128}
    folder = write_centred_checkpoint(tmp_path_factory.mktemp("centred"), "qwen2", **changes)
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(null_page, "_WIDEST_BAND", 128)
        pages = calibrate_null_pages(load_model(folder), [rng.integers(4, 70, 150).tolist() for _ in range(4)])
    return folder, pages


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Puts the CUDA kernel, compiled for the host, in the place of its launcher; gives the blocks that it signed."""
    signed = []

    class KernelOnHost(SignaturesOnHost):
        def __init__(self, fields, inv_freq, projection):
            super().__init__(fields, inv_freq, projection, tmp_path)

        def page_signatures(self, block_ids, positions):
            signed.extend(block_ids.tolist())
            return super().page_signatures(block_ids, positions)

    monkeypatch.setattr(page_signer, "CudaSignatures", KernelOnHost)
    return signed


@pytest.mark.parametrize("need", [CONFIG.need, "redundancy"])
def test_an_engine_gives_up_the_pages_that_the_torch_runner_does(
    make_runner, centred, boundaries, kernel, monkeypatch, need
):
    folder, pages = centred
    retired = []
    original = Pressure._carry_out

    def carry_out(pressure, choice, views, donors):
        retired.append([(request, chosen.tolist()) for request, chosen in choice])
        assert all(np.isfinite(view.need).all() for view in views.values())
        return original(pressure, choice, views, donors)

    monkeypatch.setattr(Pressure, "_carry_out", carry_out)
    config = CONFIG.model_copy(update={"need": need})
    expected, _ = serve(TorchRunner(load_model(folder), 34, SIZE, null_page_set=pages), boundaries, config)
    of_torch = retired.copy()
    assert not kernel  # a pool on the CPU: the specification in PyTorch
    retired.clear()
    runner = make_runner(folder, 34, sizes={"max_seq_len": 512}, null_page_set=pages)
    runner.kept_alive = runner.pool  # the stand-in knows memory by its tensors
    runner.pool = runner.pool.as_subclass(OnCuda)
    logits, executor = serve(runner, boundaries, config)
    assert len(kernel) > 20
    assert retired == of_torch
    torch.testing.assert_close(logits, expected, **SAME_LOGITS)
    assert executor.manager.stats().forgotten > 0
    assert executor.stats.num_pauses == 0


def test_an_engine_reads_the_earlier_pages_that_the_torch_runner_does(make_runner, centred, boundaries):
    """The published method, without a search in the engine: what is compared lies in the runner's pool."""
    folder, pages = centred
    changes = {"need": "nearest-earlier", "retired_becomes": "alias", "protected_tokens": 32, "min_kept": 0.4}
    config = make_config("pressure", **changes)
    expected, of_torch = serve(TorchRunner(load_model(folder), 34, SIZE, null_page_set=pages), boundaries, config)
    logits, executor = serve(
        make_runner(folder, 34, sizes={"max_seq_len": 512}, null_page_set=pages), boundaries, config
    )
    stats = executor.manager.stats()
    assert stats.shared == of_torch.manager.stats().shared > 10
    assert executor.stats.num_pauses == 0
    torch.testing.assert_close(logits, expected, **SAME_LOGITS)


def test_an_engine_without_null_pages_cannot_forget_a_page_that_finds_no_donor(make_runner, centred, boundaries):
    config = make_config("pressure", need="nearest-earlier", retired_becomes="alias")
    with pytest.raises(UserError, match="got one without, whose runner reads every entry"):
        serve(make_runner(centred[0], 34, sizes={"max_seq_len": 512}), boundaries, config)
