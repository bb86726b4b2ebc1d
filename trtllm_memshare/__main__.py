"""``memshare COMMAND``, or ``python -m trtllm_memshare COMMAND``: one entry for everything that the project does."""

from __future__ import annotations

import sys
from importlib import import_module

from trtllm_memshare.errors import UserError, nearest, run_command_line

COMMANDS: dict[str, tuple[str, str]] = {
    "build": (
        "trtllm_memshare.commands.build",
        "an engine from a checkpoint, with --memshare one that shares",
    ),
    "bench": ("trtllm_memshare.commands.bench", "a table of throughput, latency and memory, with and without sharing"),
    "explain": ("trtllm_memshare.report.explain", "a web page: what became of each block of one answer's memory"),
    "calibrate": ("trtllm_memshare.evaluation.calibrate", "the most aggressive setting within an accuracy budget"),
    "doctor": (
        "trtllm_memshare.report.doctor",
        "what is installed, what can run here, what would fix the rest",
    ),
    "serve": (
        "trtllm_memshare.commands.serve",
        "an OpenAI-compatible server: of an engine with --engine-dir, else trtllm-serve with MemShare",
    ),
    "null-pages": (
        "trtllm_memshare.commands.null_pages",
        "pages that a model does not attend to, made once: for serve, bench and vllm where null entries are read",
    ),
    "triton": ("trtllm_memshare.commands.triton", "a Triton model repository over an engine, and the server over it"),
    "vllm": ("trtllm_memshare.vllm.commands", "vLLM with memory pressure: vllm serve, vllm bench, vllm calibrate"),
}
"""Module whose ``main(command, arguments)`` runs it, and what comes out; imported when it is asked for."""

_EXTRAS = {"numpy": "", "prometheus_client": "", "pydantic": "", "tqdm": "", "filelock": "", "yaml": "",
           "torch": "[torch]", "transformers": "[torch]", "safetensors": "[torch]", "tokenizers": "[torch]",
           "jinja2": "[torch]", "matplotlib": "[report]", "cuda": "[cuda]", "tritonclient": "[triton]",
           "aiohttp": "[triton]", "psutil": "[triton]", "fastapi": "[serve]",
           "uvicorn": "[serve]", "gguf": "[real]"}  # fmt: skip
"""What of pyproject.toml brings a package: an extra, or nothing where every install has it."""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Raises:
      UserError: no such command, or a package that it needs is not installed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: memshare COMMAND ...  (memshare COMMAND --help says more)\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"unknown command {command} ({nearest(command, COMMANDS)})")
    try:
        module = COMMANDS[command][0]
        import_module(module).main(f"memshare {command}" if ".commands." in module else command, rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise UserError(
            f"memshare {command} needs the package {package}, which {sys.executable} does not have (make venv; "
            f"source .venv/bin/activate; or, in a clone, for this Python: pip install '.{_EXTRAS[package]}')"
        ) from error


def console() -> None:
    """The console script ``memshare``."""
    run_command_line(main)


if __name__ == "__main__":
    console()
