"""Attention that vLLM has for GPUs, ``TRITON_ATTN``, with all that is chosen there, run on the CPU (``gpu_choices``).

Its kernels read block tables and lengths where they lie on the device, and fp8 caches on every CPU. Each case takes a
minute or two: the default in an fp8 cache runs every time, ``MEMSHARE_NIGHTLY`` adds the others.
"""

from __future__ import annotations

import numpy as np
import pytest
from nightly import NIGHTLY
from vllm_plugin.engine_runs import MODEL, check, run_small, save_with_scales, save_with_windows

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


CASES = [("skip", "fp8-scales")]
if NIGHTLY:
    CASES += [(arm, "fp8") for arm in ("read", "skip")] + [
        (arm, "auto") for arm in ("read", "skip", "aliases", "windows")
    ]
SCALES = [[0.03 * (i + 1), 0.05 / (i + 1)] for i in range(4)]


@pytest.mark.parametrize(("arm", "elements"), CASES, ids=lambda value: value)
def test_a_gpus_kernels_read_what_the_masked_reference_reads(null_pages, tmp_path, arm, elements):
    """With the null page of an fp8 cache as long as it can be; who skips has none."""
    has_scales = elements.endswith("-scales")
    model = save_with_scales(tmp_path, SCALES) if has_scales else MODEL
    if arm == "windows":
        model = save_with_windows(tmp_path, 48)
    runner = f"V2-async-graphs-triton-{elements}"
    result = run_small(arm, "" if arm in ("skip", "windows") else null_pages, runner=runner, model=model)
    assert result["attention"] == "TRITON_ATTN"
    assert result["elements"] == elements.removesuffix("-scales")
    assert np.allclose(result["scales"], SCALES if has_scales else 1)
    pressure = check(result, "cpu.model_runner")
    if arm == "aliases":
        assert pressure["aliased"] == pressure["retired"]
        assert pressure["difference_if_donors_counted_once"] > 0.05
    else:
        assert pressure["pages_with_surprisal"] >= 5
