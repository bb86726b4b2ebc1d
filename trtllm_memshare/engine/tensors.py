"""Holds a checkpoint's stored tensors against those that the architecture needs.

transformers fills a tensor that it does not find with random numbers and says so in a warning: a wrong name would be
served as a wrong model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trtllm_memshare.engine.skeleton import Skeleton
from trtllm_memshare.engine.weights import DTYPE_NAMES, StoredTensor
from trtllm_memshare.errors import UserError, shorten


@dataclass(frozen=True)
class Prefix:
    """A way to write names that other tools leave behind: ``stored`` stands where the model says ``model``."""

    stored: str
    model: str

    def rename(self, name: str) -> str:
        return self.model + name[len(self.stored) :] if name.startswith(self.stored) else name


PREFIXES = (
    Prefix("base_model.model.", ""),  # peft, after a merge that kept its wrapper
    Prefix("_orig_mod.", ""),  # torch.compile
    Prefix("module.", ""),  # DistributedDataParallel
    Prefix("model.language_model.", "model."),  # the text part of a model of text and images
    Prefix("language_model.", ""),  # the same, as transformers 4 wrote it
)
_QUANTIZED = (
    *(".qweight", ".qzeros", ".scales", ".g_idx"),  # GPTQ, AWQ
    *(".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".input_scale", ".weight_packed"),  # FP8, INT8
    *(".absmax", ".quant_map", ".nested_absmax", ".SCB"),  # bitsandbytes
)
_UNUSED = (".rotary_emb.inv_freq",)  # worked out anew; old checkpoints store it
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def find_prefix(names: list[str]) -> Prefix | None:
    """The prefix of ``PREFIXES`` that the stored names carry, None if they carry none."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix.stored) and prefix.rename(name).startswith("model.") for name in names):
            return prefix
    return None


def check_plain(tensors: dict[str, StoredTensor], model_dir: Path) -> None:
    """Refuses quantised weights and adapters, whatever config.json says of them."""
    for name, tensor in tensors.items():
        if name.endswith(_QUANTIZED) or tensor.dtype not in DTYPE_NAMES:
            raise UserError(
                f"{model_dir} holds quantized weights: {shorten(name)} of type {tensor.dtype}, expected plain ones of "
                f"{', '.join(DTYPE_NAMES)} (take the unquantized checkpoint)"
            )
        if ".lora_" in name:
            raise UserError(
                f"{model_dir} holds an adapter: {shorten(name)} (merge it into its base model and save that)"
            )


def check_tensors(
    tensors: dict[str, StoredTensor], skeleton: Skeleton, num_layers: int, model_dir: Path
) -> Prefix | None:
    """Checks that exactly the tensors of the model are stored, with its shapes.

    Returns:
      The prefix that the stored names carry, if any.

    Raises:
      UserError: names the first tensor that is missing, of another shape, or not part of the model.
    """
    prefix = find_prefix(list(tensors))
    held = {(prefix.rename(name) if prefix else name): tensor for name, tensor in tensors.items()}
    stored_layers = {int(found[1]) for name in held if (found := _LAYER.search(name))}
    if stored_layers and stored_layers != set(range(num_layers)):
        raise UserError(
            f"{model_dir}: config.json has num_hidden_layers {num_layers}, the weights hold layers "
            f"{_ranges(stored_layers)} (take the config.json and the weights of one model)"
        )
    for name, shape in skeleton.shapes.items():
        if name == "lm_head.weight" and skeleton.is_tied:
            continue
        if name not in held:
            raise UserError(
                f"{model_dir} lacks the tensor {name}{_nearest_stored(name, tensors)} (copy or download the checkpoint "
                f"again)"
            )
        if held[name].shape != shape:
            raise UserError(
                f"{model_dir}: the tensor {name} has shape {list(held[name].shape)}, config.json needs {list(shape)} "
                f"(take the config.json and the weights of one model)"
            )
    for name in held:
        if name not in skeleton.shapes and not name.endswith(_UNUSED):
            raise UserError(
                f"{model_dir} holds the tensor {shorten(name)}, which the architecture does not have (take the "
                f"config.json and the weights of one model)"
            )
    return prefix


def _ranges(layers: set[int]) -> str:
    """``0 to 2`` or ``0 to 6 without 3``."""
    missing = sorted(set(range(max(layers) + 1)) - layers)
    without = f" without {', '.join(map(str, missing[:8]))}" if missing else ""
    return f"0 to {max(layers)}{without}" if max(layers) < 10**6 else "with numbers over a million"


def _nearest_stored(name: str, tensors: dict[str, StoredTensor]) -> str:
    """Points at a stored name that ends like the missing one, as an unknown prefix would make it."""
    like = next((stored for stored in tensors if stored.endswith(name.removeprefix("model."))), None)
    return f", there is {shorten(like)}" if like else ""
