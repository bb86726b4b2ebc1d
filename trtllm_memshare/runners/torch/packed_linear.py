"""Weights in oneDNN's own layout: on a CPU, torch lays a float32 matrix out anew in every product.

A decode step multiplies a few rows by every matrix of the model, so laying out costs as much as multiplying. The two
operators are those that torch's own compiler takes for frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from trtllm_memshare.errors import UserError

_SMALLEST = 2**18  # elements; a smaller matrix stays in the CPU's cache, and the call costs more than is won


class PackedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with its weight laid out once; it can be neither moved, copied nor saved.

    The plain weight is not kept here. That of an output layer which is tied to the embedding stays there, beside it.

    Args:
      linear: weight float32 ``[out_features, in_features]`` on the CPU, and bias or None.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., in_features]`` to ``[..., out_features]``."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return result

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        moved = fn(torch.empty(0))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            _refuse(f"a move to {moved.dtype} on {moved.device}")
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *_: object) -> None:
        _refuse("state_dict")  # what it lacks would be missed when somebody loads what was saved

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("a copy")


def _refuse(what: str) -> NoReturn:
    raise UserError(
        f"packed weights can be neither moved, copied nor saved, got {what} (give load_model the dtype or device; save "
        f"a model that it has not loaded)"
    )


def pack_linears(model: torch.nn.Module) -> None:
    """Replaces the large float32 linear layers of a model on the CPU; modifies it. Without oneDNN nothing happens."""
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and _gains(child.weight):
                setattr(parent, name, PackedLinear(child))


def _gains(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST
