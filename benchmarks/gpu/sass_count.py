"""Counts the machine instructions of a compiled kernel, and how many loads its first data waits for in a row."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trtllm_memshare.errors import UserError

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_GUARD = re.compile(r"/\s+@!?(U?P\d+)\s")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
_WIDE_RESULT = re.compile(r"WIDE|\.64|^D(ADD|MUL|FMA)|F64")


@dataclass(frozen=True)
class KernelCount:
    """Of one kernel, per warp.

    Attributes:
      before_loop: instructions before the loop over heads; most of them angles.
      loop: instructions of one turn of the loop: one head of one layer.
      loop_by_kind: the same by name.
      dependent_loads: loads in a row up to the first one of data, that one included.
      barriers_before_data: barriers that stand before it.
    """

    before_loop: int
    loop: int
    loop_by_kind: dict[str, int]
    dependent_loads: int
    barriers_before_data: int


def find_nvdisasm() -> str:
    """The disassembler of the CUDA toolkit, or the one that the package triton carries.

    Raises:
      UserError: neither is there.
    """
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        if carried.is_file():
            return str(carried)
    raise UserError("nvdisasm must be on PATH or in the package triton, got neither (install the CUDA toolkit)")


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing of the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([find_nvdisasm(), "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"nvdisasm must read the cubin, got {done.stderr.strip()[:200]} (use one as new as NVRTC)")
    return done.stdout


def count_kernel(listing: str) -> KernelCount:
    """Counts the block distance: its loop is the smallest one with the eight loads of a head.

    Raises:
      ValueError: there is no such loop.
    """
    instructions: list[tuple[str, str, str]] = []  # name, operands, line
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2], line))
    loops = []
    for end, (name, operands, _) in enumerate(instructions):
        target = _TARGET.search(operands)
        start = labels.get(target[1], end + 1) if target and name.startswith("BRA") else end + 1
        data = sum(is_data(n) for n, _, _ in instructions[start : end + 1])
        if start <= end and data == 8:
            loops.append((end + 1 - start, start, end + 1))
    if not loops:
        raise ValueError("no loop with eight loads of 16 bytes (full vectors only)")
    size, start, end = min(loops)
    kinds = Counter(name.split(".")[0] for name, _, _ in instructions[start:end])
    depth, barriers = _data_depth(instructions)
    return KernelCount(start, size, dict(kinds.most_common()), depth, barriers)


def is_data(name: str) -> bool:
    """Whether an instruction loads a whole vector of the pool."""
    return name.startswith("LDG") and ".128" in name


def _data_depth(instructions: list[tuple[str, str, str]]) -> tuple[int, int]:
    """How many loads stand in a row before and with the first one of data, and how many barriers.

    Straight down the listing: a value is as deep as what it is made of, a load one deeper, and what stands behind a
    barrier or a branch at least as deep as the predicate that it waits for.
    """
    depths: dict[str, int] = {}
    control, barriers = 0, 0
    for name, operands, line in instructions:
        registers = [
            f"{kind}{int(number) + more}"
            for kind, number, wide in _REGISTER.findall(operands)
            for more in range(2 if wide else 1)
        ]
        guard = _GUARD.search(line)
        read = max((depths.get(r, 0) for r in [*registers[1:], *(guard.groups() if guard else ())]), default=0)
        if is_data(name):
            return max(read, control) + 1, barriers
        if name.startswith(("BAR", "BRA", "EXIT")):
            barriers += name.startswith("BAR")
            control = max(control, read, max((depths.get(r, 0) for r in registers), default=0))
            continue
        if not registers:
            continue
        depth = max(read, control) + 1 if name.startswith("LDG") else read
        width = 2 if _WIDE_RESULT.search(name) else 1
        kind, number = re.match(r"(U?[RP])(\d+)", registers[0]).groups()  # type: ignore[union-attr]
        for more in range(width):
            depths[f"{kind}{int(number) + more}"] = depth
        if kind in ("P", "UP") and len(registers) > 1 and registers[1].startswith(kind):
            depths[registers[1]] = depth
    raise ValueError("no load of 16 bytes (full vectors only)")
