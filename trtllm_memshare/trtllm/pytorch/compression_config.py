"""Makes ``kv_cache_compression_config: {algorithm: memshare}`` a setting that TensorRT-LLM's arguments know.

Early releases with the framework parse an algorithm that they do not know to the base class of such configurations;
main (September 2026) refuses it, since the field is a union of configurations told apart by ``algorithm``. Ours is put
before what the field allows in either. It says that lengths change, as is true, and as TensorRT-LLM must know before
the model is built: keys are then rotated outside of the attention kernel, by their position in the text and not in the
cache.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, Literal, Union

from pydantic import BaseModel, Field, create_model

log = logging.getLogger("trtllm_memshare")

ALGORITHM = "memshare"
"""``kv_cache_compression_config.algorithm``; our configuration has no other field."""

_FIELD, _BASE, _OURS = "kv_cache_compression_config", "KvCacheCompressionConfig", "MemShareKvCacheCompressionConfig"


def allow_algorithm(module: ModuleType) -> bool:
    """Lets the arguments of the LLM API take our algorithm; modifies their classes in place.

    Args:
      module: ``tensorrt_llm.llmapi.llm_args``, just imported: classes that derive from its own come later.

    Returns:
      Whether they take it; False for a release without the framework, and with a line in the log where it fails.
    """
    base = getattr(module, _BASE, None)
    if base is None or hasattr(module, _OURS):
        return base is not None
    try:
        # Told by its module and name when arguments are sent to MPI workers, which have it by this function too.
        fields: dict[str, Any] = {
            "algorithm": (
                Literal["memshare"],
                Field(ALGORITHM, json_schema_extra={"telemetry": {"exclude": True}}),  # TensorRT-LLM's: not reported
            )
        }
        ours: Any = create_model(_OURS, __base__=base, __module__=module.__name__, **fields)
        ours.changes_physical_kv_length = True
        changed = [c for c in vars(module).values() if _has_field(c)]
        for arguments in changed:
            field = arguments.model_fields[_FIELD]
            field.annotation = Union[ours, field.annotation]  # noqa: UP007
        for arguments in sorted(changed, key=lambda c: len(c.__mro__)):
            arguments.model_rebuild(force=True)
        setattr(module, _OURS, ours)
    except Exception as error:  # TensorRT-LLM's import must go well, whatever it has that is not expected here
        log.warning("route framework cannot be configured: %s: %s", type(error).__name__, error)
        return False
    return bool(changed)


def _has_field(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel) and _FIELD in value.model_fields
