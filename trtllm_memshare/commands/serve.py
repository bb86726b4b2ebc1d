"""An OpenAI-compatible server: over an engine directory with ``--engine-dir``, else TensorRT-LLM's with MemShare."""

from __future__ import annotations

from importlib import import_module

from trtllm_memshare.errors import UserError, shorten

_ENGINE_DIR = "--engine-dir"


def main(command: str, arguments: list[str]) -> None:
    """Hands the arguments to the server that they are for; ``--help`` is ours, and says how to get the other.

    Raises:
      UserError: an option that is nearly ours, which trtllm-serve would be asked for.
    """
    names = [argument.partition("=")[0] for argument in arguments]
    ours = any(name in (_ENGINE_DIR, "-h", "--help") for name in names)
    slip = next((name for name in names if name.replace("_", "-").startswith(_ENGINE_DIR[:8])), None)
    if not ours and slip is not None:  # neither server takes the beginning of a name for the whole
        raise UserError(f"unknown option {shorten(slip)} of {command} (did you mean {_ENGINE_DIR}?)")
    if ours or not arguments:
        import_module("trtllm_memshare.triton.openai_serve").main(command, arguments or ["--help"])
    else:
        import_module("trtllm_memshare.trtllm.pytorch.wrap").main("serve", arguments)
