"""The CUDA kernels as source text, and the variant of stage 2 that a pool needs.

The files are those of ``plugins/kernels``, which the package carries as ``trtllm_memshare/kernels``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable  # Python 3.10 has it nowhere else

_ENTRY = "block_distance_nvrtc.cu"
ENTRY_POINT = "block_distance"
"""Name of the kernel in a compiled variant."""

FULL_VECTOR_BYTES = 16
MAX_LAYERS_OF_BLOCK = 32
"""Most layers that one thread block takes in turn."""


@dataclass(frozen=True)
class ElementType:
    """An element type of a pool. ``cuda_name``: its struct in ``kv_elements.h``; ``code``: its ``KvDtype``."""

    cuda_name: str
    code: int
    element_bytes: int


ELEMENT_TYPES: dict[str, ElementType] = {
    "float32": ElementType("Fp32", 0, 4),
    "float16": ElementType("Fp16", 1, 2),
    "bfloat16": ElementType("Bf16", 2, 2),
    "float8_e4m3fn": ElementType("Fp8E4M3", 3, 1),
    "int8": ElementType("Int8", 4, 1),
}
"""By torch's name of the dtype."""


@dataclass(frozen=True)
class KernelVariant:
    """One compiled form of the kernel: an element type, a rotary layout and a pool's shape.

    Attributes:
      dtype: a key of ``ELEMENT_TYPES``.
      num_layers, num_kv_heads, tokens_per_block, head_dim: shape of the pool.
      rotary_dim: rotated elements of a head, 0 = compare K as stored.
      interleaved: RoPE turns neighbours (2i, 2i + 1) instead of halves (i, i + rotary_dim / 2).
      any_shape: the form of the plugin library, which learns the shape at launch; here the shape says only how wide
        its vectors are.

    Raises:
      ValueError: a dtype or shape that no kernel takes.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    any_shape: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_TYPES:
            raise ValueError(
                f"the KV pool must be one of {', '.join(ELEMENT_TYPES)}, got {self.dtype} (build with another "
                f"--kv-cache-dtype)"
            )
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise ValueError(f"a pool needs layers and KV heads, got {self.num_layers} and {self.num_kv_heads}")
        if not 8 <= self.tokens_per_block <= 128:
            raise ValueError(
                f"tokens_per_block must be between 8 and 128, got {self.tokens_per_block} (set --tokens-per-block 32)"
            )
        if not 32 <= self.head_dim <= 256 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and between 32 and 256, got {self.head_dim} (set search off)")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim {self.head_dim}, got {self.rotary_dim} (inv_freq holds "
                f"rotary_dim / 2 values)"
            )

    @property
    def vector_elements(self) -> int:
        """Elements of one load: a full 16-byte vector where RoPE partners and the rest divide into them, else one."""
        full = FULL_VECTOR_BYTES // ELEMENT_TYPES[self.dtype].element_bytes
        fits = self.interleaved or self.rotary_dim // 2 % full == 0
        return full if fits and self.head_dim % (2 * full) == 0 and self.rotary_dim % (2 * full) == 0 else 1

    @property
    def num_threads(self) -> int:
        """Threads of a block: as many as a block's rows have pairs of vectors, in whole warps, at most 256."""
        units = self.tokens_per_block * (self.head_dim // 2 // self.vector_elements)
        return min(256, -(-units // 32) * 32)

    @property
    def macros(self) -> list[tuple[str, str]]:
        """Definitions that turn the source into this variant."""
        shape = (self.num_layers, self.num_kv_heads, self.tokens_per_block, self.head_dim, self.rotary_dim)
        macros = [
            ("MEMSHARE_ELEMENT", ELEMENT_TYPES[self.dtype].cuda_name),
            ("MEMSHARE_COUNT", str(self.vector_elements)),
            ("MEMSHARE_INTERLEAVED", str(self.interleaved).lower()),
        ]
        return macros if self.any_shape else [*macros, ("MEMSHARE_SHAPE", ",".join(map(str, shape)))]


def num_layer_groups(num_pairs: int, num_layers: int, num_slots: int) -> int:
    """Height of the kernel's grid: into how many groups the layers of a pair are dealt; see ``block_distance.h``.

    Args:
      num_slots: thread blocks that the device runs at a time.
    """

    def cost(layers: int) -> int:
        rounds = -(-num_pairs * -(-num_layers // layers) // num_slots)
        return rounds * (2 * layers + 1)

    layers = min(range(min(MAX_LAYERS_OF_BLOCK, num_layers), 0, -1), key=cost)
    return -(-num_layers // layers)


def kernel_source(entry: str = _ENTRY, folder: Traversable | None = None) -> str:
    """A kernel file and its headers as one text without includes, so that caches can key on it alone.

    Args:
      folder: another one with kernels, such as an older checkout's; None = the package's.
    """
    return _inline(entry, set(), folder or resources.files("trtllm_memshare") / "kernels")


def _inline(name: str, seen: set[str], folder: Traversable) -> str:
    """Text of a file with its own headers put in place of their includes, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = (folder / name).read_text()
    return re.sub(
        r'^#include "([\w.]+)"$', lambda m: _inline(m[1], seen, folder), text.replace("#pragma once\n", ""), flags=re.M
    )
