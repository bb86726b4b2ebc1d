"""Finds out what this TensorRT-LLM offers, and puts sharing where it fits; by what is there, not by version.

Three forms of the block table's copy, two of the manager::

    V1      KVCacheManager.copy_batch_block_offsets exists: rows are rearranged behind it
    V1 old  it does not (1.1): TrtllmAttentionMetadata.prepare copies, and is wrapped
    V2      KVCacheManagerV2, where the configuration, the model or the release's default selects it

Two places are wrapped. ``_util.get_kv_cache_manager_cls`` is told of each model before its cache is made, and returns
what TensorRT-LLM's own returns. The managers' ``__init__`` attaches sharing to the instance when it has ended; so a
manager that TensorRT-LLM falls back to, by naming its class, shares as well, and nothing is ever of another type.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.attach import attach
from trtllm_memshare.trtllm.pytorch.compression_config import ALGORITHM
from trtllm_memshare.trtllm.pytorch.contracts import ProbeError, find_attention, look_up
from trtllm_memshare.trtllm.pytorch.facts import ModelFacts
from trtllm_memshare.trtllm.pytorch.failures import Complaints
from trtllm_memshare.trtllm.pytorch.framework import make_compression_manager, note_arguments
from trtllm_memshare.trtllm.pytorch.guards import DISAGGREGATED, rotation_reasons
from trtllm_memshare.trtllm.pytorch.lengths import Rotations, check_attention, check_rotations, fit_lengths
from trtllm_memshare.trtllm.pytorch.names import names_of
from trtllm_memshare.trtllm.pytorch.settings import Settings

log = logging.getLogger("trtllm_memshare")

_FACTORY = "create_kv_cache_compression_manager"
_RESERVED_ROWS = "num_reserved_index_slots"
"""Of main's V2: rows beside those of requests, one for the padding of CUDA graphs."""


class Models:
    """Models that TensorRT-LLM has been asked about, so that a manager finds its own.

    Args:
      rotations: notes layers whose attention kernel rotates keys; None = it does not matter.

    Attributes:
      is_compressed: a manager of TensorRT-LLM's framework for KV cache compression was made.
      is_disaggregated: prompt and generation are served apart.
      is_estimating: a manager is being made to measure memory with, which 1.1 tells its maker only.
    """

    def __init__(self, rotations: Rotations | None = None) -> None:
        self._facts: list[ModelFacts] = []
        self._rotations = rotations
        self.is_compressed = self.is_disaggregated = self.is_estimating = False

    def remember(self, facts: ModelFacts) -> None:
        self._facts.append(facts)

    def noticed(self) -> dict[str, Any]:
        """What ``attach`` is told beside the arguments of a manager's constructor."""
        inside = self._rotations.inside if self._rotations is not None else ()
        return {
            "is_compressed": self.is_compressed,
            "is_disaggregated": self.is_disaggregated,
            "rotated_inside": inside,
        }

    def of(self, arguments: dict[str, Any]) -> ModelFacts:
        """The latest model whose geometry a manager's arguments have. Raises UserError if there is none."""
        for facts in reversed(self._facts):
            if facts.fits(arguments):
                return facts
        geometry = {name: arguments.get(name) for name in ("num_layers", "num_kv_heads", "head_dim")}
        raise UserError(f"sharing knows no model of this KV cache's geometry {geometry} (serve a plain decoder model)")


def install(util_module: Any, settings: Settings, attention_module: Callable[[], Any] | None = None) -> bool:
    """Makes TensorRT-LLM's managers share; leaves it exactly as it was if anything is missing.

    Args:
      util_module: ``tensorrt_llm._torch.pyexecutor._util``, just imported.
      settings: what the user set.
      attention_module: returns the module of ``TrtllmAttention`` and its metadata; called where they are changed or
        watched: for V1 in the old form, for ``null_entries: skip`` and for ``route: framework``.

    Returns:
      Whether sharing is in place. If not, one line in the log says why.
    """
    is_framework, shares = settings.options.route == "framework", settings.memshare.shares
    skips = settings.options.null_entries == "skip" and shares  # shadow leaves all as it is
    watches, rotations = is_framework and shares, None
    try:
        form = _probe(util_module)
        attention: Any = (attention_module or find_attention)() if skips or watches or form == "V1 old" else None
        if form == "V1 old":
            look_up(attention.TrtllmAttentionMetadata, names_of("TrtllmAttentionMetadata", form))
        if skips:
            check_attention(attention)
        if watches:
            check_rotations(attention)
    except ProbeError as error:
        log.warning("MemShare is off, TensorRT-LLM runs as it is: %s", error)
        return False
    if is_framework:
        return _install_framework(util_module, settings, attention if watches else None)
    if form == "V1 old":
        wrap_prepare(attention.TrtllmAttentionMetadata)
    if skips:  # around the above: a table that is rearranged has its lengths
        rotations = Rotations(attention.TrtllmAttention)
        fit_lengths(attention.TrtllmAttentionMetadata)
    models = Models(rotations)
    known = [util_module.KVCacheManager]
    if hasattr(util_module, "KVCacheManagerV2"):
        known.append(util_module.KVCacheManagerV2)
    _wrap_selector(util_module, models, lambda chosen: _check_manager(chosen, known, models, settings))
    for manager_class in known:
        wrap_init(manager_class, models, settings)
    if hasattr(util_module, _FACTORY):
        _watch_factory(util_module, models)
    if form == "V1 old" and hasattr(util_module, "KvCacheCreator"):
        _watch_estimates(util_module.KvCacheCreator, models)
    log.info("MemShare found the KV cache manager in its form %s", form)
    return True


def _install_framework(util_module: Any, settings: Settings, attention: Any) -> bool:
    """Adds our algorithm to TensorRT-LLM's factory of compression methods.

    Beside it, the models that it asks about, the arguments of its managers and layers whose kernels rotate keys are
    noted, for what sharing excludes. ``attention``: the module of ``TrtllmAttention``; None = nothing is shortened.
    """
    base, original = getattr(util_module, "KVCacheCompressionManager", None), getattr(util_module, _FACTORY, None)
    if base is None or original is None:
        log.warning(
            "MemShare is off, TensorRT-LLM runs as it is: route framework needs KVCacheCompressionManager and %s, "
            "which come with 1.4 (take route overlay)",
            _FACTORY,
        )
        return False

    try:
        look_up(base, names_of("KVCacheCompressionManager", "V2"))
    except ProbeError as error:
        log.warning("MemShare is off, TensorRT-LLM runs as it is: %s", error)
        return False
    inside = set[int]() if attention is None else Rotations(attention.TrtllmAttention, asks=False).inside
    models = Models()
    _wrap_selector(util_module, models, lambda chosen: None)
    note_arguments(util_module.KVCacheManagerV2)

    def model_reasons(arguments: dict[str, Any]) -> list[str]:
        """Rotations of any type are served on this route, outside of the kernel: keys stay as they were written."""
        if models.is_disaggregated:
            return [f"sharing excludes {DISAGGREGATED}"]
        # An early release may know our algorithm's name and not that it makes sequences shorter.
        return models.of(arguments).window_reasons() + rotation_reasons(inside, "route framework")

    @functools.wraps(original)
    def create(config: Any, *arguments: Any, **keywords: Any) -> Any:
        if getattr(config, "algorithm", None) == ALGORITHM:
            return make_compression_manager(base, config, settings, model_reasons, **keywords)
        return original(config, *arguments, **keywords)

    setattr(util_module, _FACTORY, create)
    log.info("MemShare is a method of TensorRT-LLM's KV cache compression: algorithm %s", ALGORITHM)
    return True


def _probe(util_module: Any) -> str:
    """The form of the first manager. Raises ProbeError naming the first thing that is missing."""
    for name in ("get_kv_cache_manager_cls", "KVCacheManager"):
        if not hasattr(util_module, name):
            raise ProbeError(f"{util_module.__name__} has no {name}")
    first = next(iter(inspect.signature(util_module.get_kv_cache_manager_cls).parameters), None)
    if first != "model_config":
        raise ProbeError(f"get_kv_cache_manager_cls must take model_config first, got {first}")
    v1, v2 = util_module.KVCacheManager, getattr(util_module, "KVCacheManagerV2", None)
    form = "V1" if hasattr(v1, "copy_batch_block_offsets") else "V1 old"
    look_up(v1, names_of("KVCacheManager", form))
    if v2 is not None:
        look_up(v2, names_of("KVCacheManagerV2", "V2"))
    return form


def _wrap_selector(util_module: Any, models: Models, check: Callable[[type], None]) -> None:
    """Notes each model that TensorRT-LLM asks about; ``check`` may refuse the class that it chose."""
    original = util_module.get_kv_cache_manager_cls

    @functools.wraps(original, assigned=("__name__", "__doc__"))
    def get_kv_cache_manager_cls(model_config: Any, *arguments: Any, **keywords: Any) -> type:
        chosen = original(model_config, *arguments, **keywords)
        models.remember(ModelFacts.of(model_config))
        transceiver = keywords.get("cache_transceiver_config")
        has_transceiver = getattr(transceiver, "backend", transceiver) is not None  # main's may be there for nothing
        models.is_disaggregated = bool(
            keywords.get("is_disagg") or has_transceiver or (len(arguments) > 1 and arguments[1])
        )
        check(chosen)
        return chosen

    util_module.get_kv_cache_manager_cls = get_kv_cache_manager_cls


def wrap_init(manager_class: type, models: Models, settings: Settings) -> None:
    """Attaches sharing to every instance of exactly this class once it is made; modifies the class."""
    original = manager_class.__init__  # type: ignore[misc]
    takes_null_pages = settings.memshare.pressure and settings.options.null_entries == "read"
    reserves_rows = takes_null_pages and _RESERVED_ROWS in inspect.signature(original).parameters

    @functools.wraps(original)
    def __init__(self: Any, kv_cache_config: Any, *arguments: Any, **keywords: Any) -> None:
        is_served = (
            type(self) is manager_class
            and not models.is_estimating
            and not (keywords.get("is_draft") or keywords.get("is_estimating_kv_cache"))
        )
        if is_served and reserves_rows:  # the request of the null pages has one for good
            reserved = keywords.get(_RESERVED_ROWS)
            keywords[_RESERVED_ROWS] = 1 + (1 if reserved is None else reserved)
        original(self, kv_cache_config, *arguments, **keywords)
        if is_served:
            attach(self, kv_cache_config, {**keywords, **models.noticed()}, models.of, settings)

    manager_class.__init__ = __init__  # type: ignore[misc]


def _check_manager(chosen: type, known: list[type], models: Models, settings: Settings) -> None:
    complain = Complaints(settings.options.on_unsupported)
    if chosen not in known:
        complain(
            f"sharing excludes the KV cache manager {chosen.__name__} (serve a model with plain attention, without "
            f"sparse_attention_config)"
        )
    elif models.is_disaggregated and settings.options.on_unsupported == "stop":  # else said when the manager is made
        complain(f"sharing excludes {DISAGGREGATED}")


def _watch_factory(util_module: Any, models: Models) -> None:
    """Notices a compression method of TensorRT-LLM's own; main makes it before the KV cache manager."""
    original = getattr(util_module, _FACTORY)

    @functools.wraps(original)
    def create(*arguments: Any, **keywords: Any) -> Any:
        made = original(*arguments, **keywords)
        models.is_compressed = models.is_compressed or made is not None
        return made

    setattr(util_module, _FACTORY, create)


def _watch_estimates(creator: Any, models: Models) -> None:
    original = creator.build_managers

    @functools.wraps(original)
    def build_managers(self: Any, resources: Any, estimating_kv_cache: bool = False) -> None:
        models.is_estimating = estimating_kv_cache
        try:
            original(self, resources, estimating_kv_cache)
        finally:
            models.is_estimating = False

    creator.build_managers = build_managers


def wrap_prepare(metadata: type) -> None:
    """Rearranges rows behind ``prepare``, in which the old form copies the table; modifies the class.

    The table is an attribute of the instance that ``__post_init__`` makes, so it is looked for at each call; where it
    is missing, rows are not counted as ours, and sharing says so once and stays off.
    """
    original = metadata.prepare  # type: ignore[attr-defined]

    @functools.wraps(original)
    def prepare(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        shared = getattr(getattr(self, "kv_cache_manager", None), "memshare", None)
        table = getattr(self, "kv_cache_block_offsets", None)
        if shared is not None and table is not None:
            shared.tables.rearrange(table, self.request_ids)
        return result

    metadata.prepare = prepare  # type: ignore[attr-defined]
