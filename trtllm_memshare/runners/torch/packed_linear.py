"""Weights in oneDNN's own layout: on a CPU, torch lays a float32 matrix out anew in every product.

A decode step multiplies a few rows by every matrix of the model, so laying out costs as much as multiplying. The two
operators are those that torch's own compiler takes for frozen weights.
"""

from __future__ import annotations

import torch

_SMALLEST = 2**18  # elements; a smaller matrix stays in the CPU's cache, and the call costs more than is won


class PackedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with its weight laid out once; the plain weight is not kept.

    Args:
      linear: weight float32 ``[out_features, in_features]`` on the CPU, and bias or None.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not a buffer: the layout can neither be saved nor moved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., in_features]`` to ``[..., out_features]``."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return result


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
