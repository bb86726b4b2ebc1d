"""``python -m trtllm_memshare COMMAND``: one entry for what has no script of its own."""

from __future__ import annotations

import sys
from importlib import import_module

from trtllm_memshare.errors import UserError, nearest, run_command_line

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("trtllm_memshare.trtllm.pytorch.wrap", "trtllm-serve with MemShare and the settings that it needs"),
    "vllm": ("trtllm_memshare.vllm.commands", "vLLM with memory pressure: vllm serve, vllm bench, vllm calibrate"),
    "doctor": ("trtllm_memshare.report.doctor", "what is installed, what can run here, what would fix the rest"),
    "bench": ("trtllm_memshare.trtllm.pytorch.wrap", "trtllm-bench with MemShare, its report merged with ours"),
    "calibrate": ("trtllm_memshare.evaluation.calibrate", "find the most aggressive setting within an accuracy budget"),
    "explain": ("trtllm_memshare.report.explain", "one answer as a web page: what became of each block of its memory"),
}
"""Module whose ``main(command, arguments)`` runs it, and what it does; modules are imported when they are asked for."""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Raises:
      UserError: no such command.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m trtllm_memshare COMMAND ...\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"unknown command {command} ({nearest(command, COMMANDS)})")
    import_module(COMMANDS[command][0]).main(command, rest)


if __name__ == "__main__":
    run_command_line(main)
