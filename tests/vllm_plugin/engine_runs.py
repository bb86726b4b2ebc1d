"""Runs an engine in a process of its own, and makes the null pages that it is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_plugin.gpu_choices import where_vllm_is

import trtllm_memshare
from trtllm_memshare.engine.weights import weights_digest

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this project and the vLLM that the test has, which may be on PYTHONPATH itself."""
    spawned = str(Path(__file__).with_name("spawned"))
    paths = filter(None, [os.environ.get("PYTHONPATH"), spawned, str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def run(
    arm: str,
    null_pages: str,
    *arguments: str,
    program: str = "engine_process.py",
    runner: str = "V1",
    model: str = MODEL,
) -> dict[str, Any]:
    """``runner``: see ``gpu_choices``."""
    programs = [str(Path(__file__).with_name(name)) for name in ("gpu_choices.py", program)]
    ran = subprocess.run(
        [sys.executable, *programs, arm, model, null_pages, *arguments],
        env=environment(MEMSHARE_TEST_RUNNER=runner, MEMSHARE_TEST_VLLM=where_vllm_is()), capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def run_small(
    arm: str, null_pages: str, num_ranks: int = 1, num_schedules: int = 0, runner: str = "V1", model: str = MODEL
) -> dict[str, Any]:
    """The same of ``small_engine_process.py``."""
    numbers = (str(num_ranks), str(num_schedules))
    return run(arm, null_pages, *numbers, program="small_engine_process.py", runner=runner, model=model)


def save_null_pages(folder: Path, num_layers: int = 4, weights: str | None = None, second_band: int = 256) -> str:
    """Keys that are far from null, so that an entry at the wrong page, or one that did not move, is seen.

    The bundled model has no null page (``engine.null_page`` refuses it: its rotary base is 10,000 and its heads have 32
    numbers), and needs none here: the reference reads the same keys.
    """
    keys = 2 * torch.randn(2, num_layers, 2, 32, generator=torch.Generator().manual_seed(0))
    bands = torch.tensor([0, second_band, 1024], dtype=torch.int32)
    calibrated_on = {"weights": weights or weights_digest(Path(MODEL))}
    save_file({"keys": keys, "bands": bands}, folder / "null_pages.safetensors", calibrated_on)
    return str(folder)


def save_with_scales(folder: Path, scales: list[list[float]]) -> str:
    """The bundled model as a checkpoint with scales of an fp8 cache, K and V of each layer; none fits another."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for index, pair in enumerate(scales):
        for name, scale in zip("kv", pair, strict=True):
            weights[f"model.layers.{index}.self_attn.{name}_scale"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def save_with_windows(folder: Path, window: int) -> str:
    """The bundled model with sliding windows in every other layer, as a Llama, of which vLLM serves such.

    What it says then has no sense; how likely it was is what counts.
    """
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    config |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "layer_types": kinds,
        "sliding_window": window,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for index in range(config["num_hidden_layers"]):
        weights[f"model.layers.{index}.self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def check(result: dict[str, Any], runner: str = "") -> dict[str, Any]:
    """Asserts what a small run's requests under pressure must have, with the bounds of ``test_engine``; returns it."""
    if runner:
        assert result["is_async"]
        assert result["runner"] == f"vllm.v1.worker.{runner}"
    pressure = result["pressure"]
    assert pressure["retired"] >= 5
    assert pressure["requests_retired_from"] == 2
    assert not pressure["off_retired"]
    # In fp8 a number at the edge of two may be the other one here.
    assert pressure["difference"] < (1e-3 if result["elements"] == "fp8" else 1e-4)
    assert pressure["difference_if_nothing_were_retired"] > 1.0
    assert pressure["surprisal_difference"] < 1e-3
    return pressure
