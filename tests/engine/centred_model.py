"""Random models whose queries are concentrated around a mean, as those of real models are."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_random_checkpoint
from safetensors.torch import load_file, save_file


def write_centred_checkpoint(folder: Path, family: str, strength: float = 4.0, **changes) -> Path:
    """A random checkpoint whose hidden states share a direction, and with it the queries of each head.

    Rotary frequencies start slowly enough for heads of 8 elements to have slow ones.
    """
    write_random_checkpoint(folder, family, **changes)
    path = folder / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    shared = torch.ones(embedding.shape[1]) * embedding.std()
    weights["model.embed_tokens.weight"] = embedding + strength * shared
    for name, weight in weights.items():
        # Slow elements of Q, the last of each half, see the shared direction most.
        if name.endswith("q_proj.weight"):
            heads = weight.view(4, -1, weight.shape[1])
            half = heads.shape[1] // 2
            for element in (half - 1, 2 * half - 1):
                heads[:, element] = heads[:, element].abs() * 2
        elif name.endswith("q_proj.bias"):
            weight += 0.05
    save_file({n: w.contiguous() for n, w in weights.items()}, path, metadata={"format": "pt"})
    return folder
