"""Holds TensorRT-LLM's classes against the names that this path uses (names.py).

``probe.py`` looks up the names of the classes that it is about to wrap, ``doctor --surface pytorch`` all of them
without starting a server, and tests hold the stand-ins of TensorRT-LLM's classes against them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trtllm_memshare.trtllm.pytorch.names import TABLE, Name, names_of

MANAGERS = (
    "tensorrt_llm._torch.pyexecutor.kv_cache.kv_cache_manager_v2",  # 1.4
    "tensorrt_llm._torch.pyexecutor.kv_cache_manager_v2",  # 1.3 from May 2026
    "tensorrt_llm._torch.pyexecutor.resource_manager",
)
_UTIL, _RESOURCES = "tensorrt_llm._torch.pyexecutor._util", "tensorrt_llm._torch.pyexecutor.resource_manager"
_ATTENTION = ("tensorrt_llm._torch.attention_backend.trtllm", "tensorrt_llm._torch.attention.backends.trtllm")
_REQUEST = "tensorrt_llm._torch.pyexecutor.llm_request"
_OWNERS = {
    "": (_UTIL,),
    "KVCacheManager": (_RESOURCES,),
    "KVCacheManagerV2": MANAGERS,
    "TrtllmAttention": _ATTENTION,
    "TrtllmAttentionMetadata": _ATTENTION,
    "LlmRequest": (_REQUEST,),
    "FinishReason": ("tensorrt_llm.bindings.executor", _REQUEST),
    "KVCacheCompressionManager": (_UTIL,),
}
"""Modules that each class may be in."""
_LATE = ("KVCacheManagerV2", "KVCacheCompressionManager")
"""What releases before them have not: 1.1 and 1.2 neither of the two."""


class ProbeError(RuntimeError):
    """TensorRT-LLM lacks something sharing builds on."""


@dataclass(frozen=True)
class Installed:
    """What an installation has.

    Attributes:
      found: owners that could be looked at, with the module they came from.
      missing: a sentence for each name that is not there, or each owner that could not be imported.
      cannot_skip: the same of names that ``null_entries: skip`` uses, one of which ``route: framework`` does too.
      has_framework: route framework can be taken, as far as names tell.
    """

    found: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cannot_skip: list[str] = field(default_factory=list)

    @property
    def has_framework(self) -> bool:
        return {"KVCacheCompressionManager", "TrtllmAttention"} <= self.found.keys()


def look_up(owner: Any, names: Iterable[Name]) -> None:
    """Raises ProbeError naming the first of a class's names, or of its parameters, that is missing."""
    for difference in differences(owner, names):
        raise ProbeError(difference)


def differences(owner: Any, names: Iterable[Name]) -> Iterator[str]:
    """A sentence for each name that a class or module lacks, or whose parameters are not as recorded."""
    title = getattr(owner, "__name__", str(owner))
    for name in names:
        if not hasattr(owner, name.name):
            yield f"{title} has no {name.name} ({name.use})"
            continue
        if name.parameters:
            try:
                taken = inspect.signature(getattr(owner, name.name)).parameters
            except (TypeError, ValueError):
                continue  # a binding without a signature: it is found out by calling it
            takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
            for parameter in name.parameters:
                if parameter not in taken and not takes_any:
                    yield f"{title}.{name.name} takes no {parameter} ({name.use})"


def check_installed(load: Callable[[str], Any] = importlib.import_module) -> Installed:
    """Holds the table against what is installed, by importing modules; no model, no GPU memory, no server.

    Args:
      load: imports a module by name.
    """
    result, is_old = Installed(), False
    for owner, modules in _OWNERS.items():
        target, module, why = _find(owner, modules, load)
        # The oldest form reads the block table of the metadata on every path, the others nothing of attention's.
        is_needed = not owner.startswith("TrtllmAttention") or (is_old and owner == "TrtllmAttentionMetadata")
        lacking = result.missing if is_needed else result.cannot_skip
        if target is None:
            if owner not in _LATE:
                lacking.append(why)
            continue
        result.found[owner or "functions"] = module
        is_old = is_old or (owner == "KVCacheManager" and not _has_copy(target))
        form = "V2" if owner in _LATE else "V1 old" if owner == "KVCacheManager" and is_old else "V1"
        lacking.extend(differences(target, names_of(owner, form)))
    if result.has_framework:
        util = load(_UTIL)
        result.missing.extend(differences(util, [n for n in TABLE if n.owner == "" and "1.2" not in n.states]))
    return result


def find_attention(load: Callable[[str], Any] = importlib.import_module) -> Any:
    """The module of ``TrtllmAttention`` and its metadata. Raises ProbeError if there is none."""
    metadata, module, why = _find("TrtllmAttentionMetadata", _ATTENTION, load)
    if metadata is None:
        raise ProbeError(f"no TrtllmAttentionMetadata: {why}")
    return load(module)


def check_here() -> Installed:
    """``check_installed``; nothing is found or missing where TensorRT-LLM is not installed."""
    return check_installed() if importlib.util.find_spec("tensorrt_llm") is not None else Installed()


def _has_copy(manager: Any) -> bool:
    return hasattr(manager, "copy_batch_block_offsets")


def _find(owner: str, modules: Iterable[str], load: Callable[[str], Any]) -> tuple[Any, str, str]:
    """The owner and its module; None, and why, if no module has it."""
    reasons = []
    for name in modules:
        try:
            module = load(name)
        except Exception as error:  # an import may fail in any way on a machine without a GPU
            reasons.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if not owner:
            return module, name, ""
        if hasattr(module, owner):
            return getattr(module, owner), name, ""
        reasons.append(f"{name} has no {owner}")
    return None, "", "; ".join(reasons)
