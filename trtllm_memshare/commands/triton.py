"""Writes a Triton model repository, starts Triton Inference Server over one.

memshare triton repository --engine-dir engines/tiny_reasoner --output-dir model_repository
memshare triton launch model_repository
"""

from __future__ import annotations

from importlib import import_module

from trtllm_memshare.errors import UserError, nearest

_ACTIONS = {"repository": "trtllm_memshare.commands.triton_repository", "launch": "trtllm_memshare.triton.launch"}


def main(command: str, arguments: list[str]) -> None:
    """Runs ``repository`` or ``launch``. Raises UserError for another word."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {command} {{{','.join(_ACTIONS)}}} ...\n\n{__doc__}")
        return
    action, *rest = arguments
    if action not in _ACTIONS:
        raise UserError(f"unknown action {action} of {command} ({nearest(action, _ACTIONS)})")
    import_module(_ACTIONS[action]).main(f"{command} {action}", rest)
