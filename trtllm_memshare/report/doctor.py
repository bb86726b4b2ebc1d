"""``python -m trtllm_memshare doctor``: what is installed, what can run here, and what would fix the rest."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.report.components import Component, find_components, has_engine_backend
from trtllm_memshare.trtllm.engine.installed import INSTALL, import_tensorrt_llm
from trtllm_memshare.trtllm.engine.signatures import BUILDER, PARALLEL, compare_signatures
from trtllm_memshare.trtllm.pytorch.contracts import check_here


@dataclass(frozen=True)
class Surface:
    """A way to use the project. ``needs``: names of components. ``try_it``: a command that uses it."""

    name: str
    what: str
    needs: tuple[str, ...]
    try_it: str


NAMES = "take a release that docs/pytorch_backend.md lists; sharing stays off with this one, and serving goes on"
NO_FRAMEWORK = "no KVCacheCompressionManager, so route framework cannot be taken (it comes with 1.4, take overlay)"
_TORCH = ("Python", "torch", "transformers")
SURFACES = (
    Surface("torch", "embedded default: torch runner", _TORCH, "make demo"),
    Surface("kernels", "CUDA kernels, compiled", ("Python", "NVRTC"), "python build_scripts/build_plugins.py --check"),
    Surface("gpu", "CUDA kernels, run", (*_TORCH, "NVRTC", "GPU", "driver", "CUDA"), "bash benchmarks/gpu_suite.sh"),
    Surface(
        "plugin",
        "TensorRT plugin library, built",
        ("nvcc, cmake", "TensorRT headers"),
        "TENSORRT_ROOT=/path/to/tensorrt python build_scripts/build_plugins.py",
    ),
    Surface(
        "engine",
        f"TensorRT-LLM {TRTLLM_VERSION} engines",
        (*_TORCH, "GPU", "driver", "CUDA", "TensorRT", "TensorRT-LLM", "plugin library"),
        "python build_scripts/build_engine.py --memshare --backend tensorrt",
    ),
    Surface(
        "pytorch",
        "TensorRT-LLM's PyTorch backend",
        (*_TORCH, "NVRTC", "GPU", "driver", "CUDA", "TensorRT-LLM"),
        "python -m trtllm_memshare serve MODEL",
    ),
    Surface("triton", "Triton Inference Server", (*_TORCH, "Triton"), "python build_scripts/build_triton_repo.py"),
    Surface(
        "vllm", "vLLM, pressure", (*_TORCH, "vLLM"), "python -m trtllm_memshare vllm serve MODEL --null-pages FOLDER"
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """A surface and the components that it lacks on this machine. ``note``: what it can do without, or nothing."""

    surface: Surface
    lacks: list[Component]
    note: str = ""


def diagnose(components: list[Component]) -> list[Diagnosis]:
    """What each surface lacks."""
    by_name = {c.name: c for c in components}
    found = []
    for surface in SURFACES:
        lacks = [by_name[name] for name in surface.needs if not by_name[name].found]
        trtllm = by_name["TensorRT-LLM"]
        if surface.name == "engine" and trtllm.found and not has_engine_backend(trtllm):
            detail = f"{trtllm.detail} has no engine backend that this project knows"
            lacks.append(Component("TensorRT-LLM", False, detail, INSTALL))
        note = ""
        if surface.name == "pytorch" and trtllm.found:
            installed = check_here()
            lacks += [
                Component(what, False, "looked up in TensorRT-LLM's modules", NAMES) for what in installed.missing
            ]
            notes = [*([] if installed.has_framework else [NO_FRAMEWORK])]
            notes += [f"null_entries skip cannot be set: {what}" for what in installed.cannot_skip]
            note = "; ".join(notes)
        found.append(Diagnosis(surface, lacks, note))
    return found


def describe(components: list[Component], diagnoses: list[Diagnosis]) -> str:
    """Both as text: a line for each component, then for each surface, then the commands that are missing."""
    width = max(len(c.name) for c in components)
    lines = [f"{'ok' if c.found else '--'}  {c.name:<{width}}  {c.detail}" for c in components]
    lines.append("")
    width = max(len(d.surface.name) for d in diagnoses)
    for d in diagnoses:
        lacks = ", ".join(c.name for c in d.lacks)
        state = f"lacks {lacks}" if lacks else f"can run: {d.surface.try_it}"
        lines.append(f"{'--' if lacks else 'ok'}  {d.surface.name:<{width}}  {d.surface.what}: {state}")
        lines += [f"    {'':<{width}}  {d.note}"] if d.note else []
    remedies = dict.fromkeys((c.name, c.remedy) for d in diagnoses for c in d.lacks)
    if remedies:
        lines += ["", "to fix:", *(f"  {name}: {remedy}" for name, remedy in remedies)]
    return "\n".join(lines)


def main(command: str, arguments: list[str]) -> None:
    """The command line.

    Raises:
      UserError: an unknown surface, or ``--signatures`` without TensorRT-LLM.
    """
    parser = argparse.ArgumentParser(prog=f"memshare {command}", description=__doc__)
    names = [s.name for s in SURFACES]
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a surface lacks something")
    parser.add_argument("--surface", nargs="+", default=names, metavar="NAME", help=f"only these: {', '.join(names)}")
    parser.add_argument(
        "--signatures", action="store_true", help="import TensorRT-LLM and compare what the engine builder calls"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plugin-library", type=Path, default=Path("build/plugins/libtrtllm_memshare_plugin.so"))
    options = parser.parse_args(arguments)
    for name in options.surface:
        if name not in names:
            raise UserError(f"unknown surface {name} ({nearest(name, names)})")
    components = find_components(options.plugin_library)
    diagnoses = [d for d in diagnose(components) if d.surface.name in options.surface]
    if options.json:
        surfaces = {
            d.surface.name: {"can_run": not d.lacks, "lacks": [c.name for c in d.lacks], "note": d.note}
            for d in diagnoses
        }
        print(json.dumps({"components": [asdict(c) for c in components], "surfaces": surfaces}, indent=1))
    else:
        print(describe(components, diagnoses))
    differs = options.signatures and not _print_signatures()
    if options.strict and (differs or any(d.lacks for d in diagnoses)):
        sys.exit(1)


def _print_signatures() -> bool:
    """One line for each recorded signature, on stderr: ``--json`` has stdout. Returns whether all are as recorded."""
    import_tensorrt_llm()
    compared = compare_signatures((*BUILDER, *PARALLEL))
    for name, difference in compared.items():
        print(f"{'ok' if difference is None else '--'}  {difference or name}", file=sys.stderr)
    return not any(compared.values())
