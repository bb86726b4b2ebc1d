"""Tells TensorRT-LLM's attention the lengths that rows without their null entries have (``skipped_rows.py``).

Two things change, as for RocketKV, TensorRT-LLM's own method that cuts sequences: ``prepare`` of the attention metadata
is given fewer cached tokens for requests that gave pages up, from which it works out every length that kernels read;
and keys are rotated by the model, at their place in the text, not in the kernel, which would take the place for the
length. Positions of tokens come from the requests and stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from trtllm_memshare.trtllm.pytorch.contracts import ProbeError, look_up
from trtllm_memshare.trtllm.pytorch.names import names_of


def check_attention(module: Any) -> None:
    """Raises ProbeError if the module of ``TrtllmAttention`` lacks what this builds on."""
    for owner in ("TrtllmAttention", "TrtllmAttentionMetadata"):
        if not hasattr(module, owner):
            raise ProbeError(f"{module.__name__} has no {owner} (null_entries skip)")
        look_up(getattr(module, owner), names_of(owner, "V1"))


def check_rotations(module: Any) -> None:
    """Raises ProbeError if it cannot be told whose attention kernel rotates keys."""
    if not hasattr(module, "TrtllmAttention"):
        raise ProbeError(f"{module.__name__} has no TrtllmAttention (route framework)")
    look_up(module.TrtllmAttention, [n for n in names_of("TrtllmAttention", "V2") if n.name == "__init__"])


class Rotations:
    """Has keys rotated outside of the attention kernel, and notes layers for which that is not so.

    Args:
      attention: ``TrtllmAttention``; its class is modified, before a model is built.
      asks: False = TensorRT-LLM is to know by its own configuration, as with ``route: framework``; layers are noted.

    Attributes:
      inside: layers whose kernel rotates keys, of any model.
    """

    def __init__(self, attention: Any, asks: bool = True) -> None:
        self.inside = set[int]()
        original, parameters = attention.__init__, inspect.signature(attention.__init__)

        @functools.wraps(original)
        def __init__(layer: Any, *arguments: Any, **keywords: Any) -> None:
            given = parameters.bind(layer, *arguments, **keywords).arguments
            if given.get("pos_embd_params") is not None:
                self.inside.add(given.get("layer_idx", -1))
            original(layer, *arguments, **keywords)
            if asks and given.get("mla_params") is not None:
                # MLA asks the layer, and its kernels turn the latent cache all the same.
                layer.support_fused_rope = lambda: True

        attention.__init__ = __init__
        if asks:
            attention.support_fused_rope = classmethod(lambda cls: False)


def fit_lengths(metadata: Any) -> None:
    """Has ``prepare`` take the lengths of rows; modifies the class.

    What the model engine set is put back afterwards: it is the engine's, and of the text.

    Args:
      metadata: ``TrtllmAttentionMetadata``.
    """
    original = metadata.prepare

    @functools.wraps(original)
    def prepare(self: Any, *arguments: Any, **keywords: Any) -> Any:
        shared: Any = getattr(getattr(self, "kv_cache_manager", None), "memshare", None)
        shorter = None if shared is None else shared.tables.shorter(self.request_ids)
        if shorter is None:
            return original(self, *arguments, **keywords)
        params, prompts = self.kv_cache_params, self.prompt_lens
        try:
            self.kv_cache_params, self.prompt_lens = _fitting(params, prompts, shorter)
        except Exception as error:  # every active request would fail with it
            shared.tables.fail_lengths(self.request_ids, error)
        try:
            return original(self, *arguments, **keywords)
        finally:
            self.kv_cache_params, self.prompt_lens = params, prompts

    metadata.prepare = prepare


def _fitting(params: Any, prompts: list[int], shorter: list[int]) -> tuple[Any, list[int]]:
    """What the engine set, with the lengths of rows.

    A prompt is never longer than its sequence: what V1 computes anew after a pause counts as prompt, and may be given
    up again.
    """
    cached = [total - less for total, less in zip(params.num_cached_tokens_per_seq, shorter, strict=True)]
    fitting = copy.copy(params)
    fitting.num_cached_tokens_per_seq = cached
    bounds = zip(prompts, cached, shorter, strict=True)
    return fitting, [min(prompt, now) if less else prompt for prompt, now, less in bounds]
