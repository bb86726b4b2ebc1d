"""Null pages of another model are told from this one's by its weights, and not by their shapes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trtllm_memshare
from trtllm_memshare.engine.calibrated_weights import check_weights, find_weights
from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.engine.null_page_files import KEYS_FILE, save_null_pages
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError

MODEL = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"


def save(folder: Path, weights: str | None) -> Path:
    folder.mkdir(exist_ok=True)
    pages = NullPageSet(
        torch.ones(1, 4, 2, 32), np.array([0, 512], np.int32), torch.zeros(1, 4, 4), num_tokens=1, weights=weights
    )
    save_null_pages(folder, pages)
    return folder / KEYS_FILE


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """The same function by other weights: queries and keys of the other sign."""
    folder = tmp_path / "turned"
    shutil.copytree(MODEL, folder)
    tensors = load_file(MODEL / "model.safetensors")
    sign = {name: -1 if "q_proj" in name or "k_proj" in name else 1 for name in tensors}
    save_file({name: sign[name] * t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_null_pages_of_another_model_of_this_shape_are_refused(tmp_path, turned, caplog):
    path = save(tmp_path / "null", weights_digest(MODEL))
    check_weights(path, "a name", MODEL)
    assert not caplog.records
    with pytest.raises(UserError, match="must be calibrated on the weights of a name, got null pages of other weights"):
        check_weights(path, "a name", turned)


@pytest.mark.parametrize(
    ("weights", "model_dir", "reason"),
    [
        (None, MODEL, "it does not say on which it was calibrated"),
        ("0" * 32, None, "no folder with the weights of a name is found"),
        ("0" * 32, MODEL.parent, "found no weights"),
    ],
)
def test_what_cannot_be_compared_is_a_warning_with_the_file(tmp_path, caplog, weights, model_dir, reason):
    path = save(tmp_path / "null", weights)
    with caplog.at_level(logging.WARNING):
        check_weights(path, "a name", model_dir)
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert reason in record.getMessage()


def test_weights_are_found_by_a_folder_or_by_what_a_hub_has_left_here(tmp_path):
    pytest.importorskip("huggingface_hub")
    assert find_weights(str(MODEL)) == MODEL
    repository = tmp_path / "models--maker--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(MODEL, repository / "snapshots" / ("a" * 40))
    found = find_weights("maker/name", None, str(tmp_path))
    assert found is not None
    assert weights_digest(found) == weights_digest(MODEL)
    assert find_weights("maker/other", None, str(tmp_path)) is None
    assert find_weights("/no/such/file.gguf", None, str(tmp_path)) is None
