"""An OpenAI-compatible server: over an engine directory with ``--engine-dir``, else TensorRT-LLM's with MemShare."""

from __future__ import annotations

from importlib import import_module


def main(command: str, arguments: list[str]) -> None:
    """Hands the arguments to the server that they are for; ``--help`` is ours, and says how to get the other."""
    ours = any(argument.partition("=")[0] in ("--engine-dir", "-h", "--help") for argument in arguments)
    if ours or not arguments:
        import_module("trtllm_memshare.triton.openai_serve").main(command, arguments or ["--help"])
    else:
        import_module("trtllm_memshare.trtllm.pytorch.wrap").main("serve", arguments)
