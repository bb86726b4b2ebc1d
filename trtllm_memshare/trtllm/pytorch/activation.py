"""Waits for TensorRT-LLM to be imported, in every process of it, and installs sharing at that moment.

``trtllm_memshare_activation.pth`` in site-packages runs at interpreter start and calls ``activate`` if
``TRTLLM_MEMSHARE_ENABLE`` is set. That covers the LLM API, trtllm-serve, trtllm-bench, Triton's llmapi model and the
MPI workers that each of them spawns, without a flag. Nothing of TensorRT-LLM or torch is imported here, and a wrong
setting stops the import of TensorRT-LLM, not every Python process of the environment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

TARGET = "tensorrt_llm._torch.pyexecutor._util"
ARGUMENTS = "tensorrt_llm.llmapi.llm_args"
"""Arguments of the LLM API, which every process has: they must know the algorithm of route framework."""


class PostImportHook(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after it was imported. Finds nothing itself.

    It stays until both have gone well: an import that failed may be tried again.
    """

    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self.name, self._action = name, action
        self._is_asking = False  # the other finders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders have, with a loader that runs the action; None for any other module."""
        if fullname != self.name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader, self._act)
        return spec

    def _act(self, module: ModuleType) -> None:
        self._action(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[ModuleType], object]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)


def activate() -> None:
    """Registers the hooks; acts at once on what was imported already."""
    for name, action in ((ARGUMENTS, _allow_algorithm), (TARGET, _install_sharing)):
        if name in sys.modules:
            action(sys.modules[name])
        elif not any(isinstance(finder, PostImportHook) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, PostImportHook(name, action))


def _allow_algorithm(module: ModuleType) -> None:
    """For route framework; raises UserError as ``_install_sharing`` does."""
    from trtllm_memshare.trtllm.pytorch.settings import is_enabled, load_settings

    if is_enabled(os.environ) and load_settings(os.environ).options.route == "framework":
        from trtllm_memshare.trtllm.pytorch.compression_config import allow_algorithm

        allow_algorithm(module)


def _install_sharing(module: ModuleType) -> None:
    """Raises UserError, through the import of TensorRT-LLM, if a setting is wrong."""
    from trtllm_memshare.errors import show_log
    from trtllm_memshare.trtllm.pytorch.probe import install
    from trtllm_memshare.trtllm.pytorch.settings import is_enabled, load_settings

    if is_enabled(os.environ):
        show_log("[trtllm_memshare] %(message)s")  # what was chosen must be seen
        install(module, load_settings(os.environ))
