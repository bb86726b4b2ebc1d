"""Compiles kernel variants with NVRTC through ``cuda.core``; needs neither a GPU nor a driver."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, KernelVariant, kernel_source

LOG = logging.getLogger(__name__)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
"""What ``build_plugins.py --check`` compiles for: A100, L40 and RTX 40, H100 and H200, B200, RTX 50."""

CHECKED_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports of a compiled kernel. ``spill_bytes``: stores and loads; ``shared_bytes``: static."""

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int


def import_cuda_core() -> Any:
    """The ``cuda.core`` module.

    Raises:
      UserError: it is not installed, with the original text, or older than 1.0, which keeps no cubins.
    """
    try:
        import cuda.core
        import cuda.core.utils
    except ImportError as error:
        raise UserError(f"the CUDA search needs cuda.core, got {error} (pip install '.[cuda]')") from error
    if not hasattr(cuda.core, "Program") or not hasattr(cuda.core.utils, "FileStreamProgramCache"):
        version = getattr(cuda.core, "__version__", "of unknown version")
        raise UserError(f"cuda.core must be 1.0 or newer, got {version} (pip install '.[cuda]')")
    return cuda.core


def compile_variant(variant: KernelVariant, arch: str, cache_dir: Path | None = None, logs: Any = None) -> Any:
    """Compiles one variant to a cubin.

    Args:
      variant: what to compile.
      arch: such as ``sm_90``.
      cache_dir: where cubins are kept, keyed by source, options, architecture and NVRTC version; None, or a folder that
        cannot be written = compile anew.
      logs: object whose ``write`` receives ptxas' report; it stays silent when the cubin comes from the cache.

    Returns:
      A ``cuda.core.ObjectCode``.

    Raises:
      UserError: ``cuda.core`` is missing or too old.
      RuntimeError: the kernel does not compile; the text names the variant.
    """
    try:
        return compile_source(kernel_source(), "block_distance", variant.macros, arch, cache_dir, logs)
    except RuntimeError as error:
        raise RuntimeError(f"block_distance does not compile for {arch}, {variant}: {error}") from error


def compile_source(
    source: str,
    name: str,
    macros: list[tuple[str, str]],
    arch: str,
    cache_dir: Path | None = None,
    logs: Any = None,
) -> Any:
    """Compiles a text to a cubin; see ``compile_variant``.

    Raises:
      UserError: ``cuda.core`` is missing or too old.
      RuntimeError: the text does not compile.
    """
    core = import_cuda_core()
    options = core.ProgramOptions(arch=arch, std="c++17", define_macro=macros, ptxas_options=["-v"], name=name)
    try:
        program = core.Program(source, "c++", options)
        if cache_dir is not None:
            try:
                with core.utils.FileStreamProgramCache(cache_dir) as cache:
                    return program.compile("cubin", logs=logs, cache=cache)
            except OSError as error:  # a cache saves seconds of a start, and the kernel is none the worse without
                _warn_of_cache(cache_dir, str(error))
        return program.compile("cubin", logs=logs)
    except Exception as error:  # cuda.core raises several unrelated types
        raise RuntimeError(str(error)) from error


@contextlib.contextmanager
def loading(name: str, arch: str) -> Iterator[None]:
    """Turns whatever goes wrong while a kernel is loaded into a RuntimeError that names it."""
    try:
        yield
    except Exception as error:  # the driver's error type is private to cuda.core
        raise RuntimeError(f"{name} for {arch} cannot be loaded: {error}") from error


@functools.cache
def _warn_of_cache(cache_dir: Path, reason: str) -> None:
    """Said once for each folder: a start compiles several kernels."""
    LOG.warning(
        "kernels cannot be kept in %s: %s (they are compiled at every start; make the folder writable)",
        cache_dir,
        reason,
    )


def kernel_resources(variant: KernelVariant, arch: str) -> KernelResources:
    """Registers, shared memory and spills of a variant, from a fresh compilation.

    Raises:
      RuntimeError: as ``compile_variant``, or a report that cannot be read.
    """
    logs = io.StringIO()
    compile_variant(variant, arch, logs=logs)
    return parse_resources(logs.getvalue())


def parse_resources(report: str) -> KernelResources:
    """Reads ptxas' verbose report of one kernel.

    Raises:
      RuntimeError: no register count in it.
    """
    registers = re.search(r"Used (\d+) registers", report)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or memory is None:
        raise RuntimeError(f"ptxas reported no resources (expected 'Used N registers'), got {report!r}")
    shared = re.search(r"(\d+) bytes smem", report)
    return KernelResources(
        int(registers[1]), int(shared[1]) if shared else 0, int(memory[2]) + int(memory[3]), int(memory[1])
    )


def checked_variants() -> list[KernelVariant]:
    """Every element type, layout and vector width: full vectors at two head sizes, and single elements.

    Each vector width once more as the plugin library has it, for any shape.
    """
    variants = []
    for dtype in ELEMENT_TYPES:
        for interleaved in (False, True):
            variants += [KernelVariant(dtype, 28, 4, 32, d, d, interleaved) for d in CHECKED_HEAD_DIMS]
            # 36 rotary elements of 72: neither divides into 16-byte vectors.
            variants.append(KernelVariant(dtype, 28, 4, 32, 72, 36, interleaved))
            variants += [replace(v, any_shape=True) for v in variants[-2:]]
    return variants
