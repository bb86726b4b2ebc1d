"""The attention function that transformers calls in each layer: writes K and V to the pool, reads through offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from trtllm_memshare.runners.torch.gather import PageGather
from trtllm_memshare.runners.torch.paged_decode import PagedDecode
from trtllm_memshare.runners.torch.plan import StepPlan

IMPLEMENTATION = "memshare_paged"
"""Name under which the function is registered with transformers' ``AttentionInterface``."""


@dataclass(frozen=True)
class DeviceGroup:
    """``DecodeGroup`` on the device, same shapes."""

    tokens: torch.Tensor
    head_units: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class DeviceContext:
    """``ContextChunk`` on the device. ``mask``: bool ``[chunk, keys]``, None when there is no past."""

    start: int
    stop: int
    head_units: torch.Tensor | None
    mask: torch.Tensor | None


class PagedStep:
    """Everything the attention function needs of one step.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``; modified by ``attend``.
      plan: the step's addresses; None: those of ``for_decode``.
      compute_dtype: dtype of the model's activations.
      decode: attends for the generation requests, planned for this step; None = PyTorch, from the plan's groups.
      gather: reads the pool for PyTorch's attention; None = one for this step.
      observe: add up how much attention the generation requests pay to each block, see ``block_attention``.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        plan: StepPlan | None,
        compute_dtype: torch.dtype,
        decode: PagedDecode | None = None,
        gather: PageGather | None = None,
        observe: bool = False,
    ) -> None:
        self.num_blocks, self.num_layers, _, self.num_kv_heads, self.tokens_per_block, self.head_dim = pool.shape
        device = pool.device
        self._rows = pool.view(-1, self.head_dim)
        self._gather = gather or PageGather(pool, compute_dtype)
        self._decode, self._first_decode = decode, 0
        self._contexts: list[DeviceContext] = []
        self._groups: list[DeviceGroup] = []
        self._masses: list[torch.Tensor] = []  # of each group, where attention is observed
        if plan is None:
            return
        self._write_rows = torch.from_numpy(plan.write_rows).to(device)
        self._first_decode = plan.contexts[-1].stop if plan.contexts else 0
        self._contexts = [self._context(chunk, device) for chunk in plan.contexts]
        self._groups = [
            DeviceGroup(
                torch.from_numpy(g.tokens).to(device),
                torch.from_numpy(g.head_units).to(device),
                torch.from_numpy(g.bias).to(device, compute_dtype),
            )
            for g in plan.decode_groups
        ]
        self.last_tokens = torch.from_numpy(plan.last_tokens).to(device)
        if observe:
            self._masses = [torch.zeros(len(g.tokens), g.head_units.shape[-1], device=device) for g in self._groups]

    @classmethod
    def for_decode(
        cls, pool: torch.Tensor, write_rows: torch.Tensor, decode: PagedDecode, compute_dtype: torch.dtype
    ) -> PagedStep:
        """A pure decode step whose addresses may change in place between uses.

        Args:
          write_rows: int64 ``[2, batch, num_kv_heads]``, on the device; kept.
        """
        step = cls(pool, None, compute_dtype, decode)
        step._write_rows = write_rows
        step.last_tokens = torch.arange(write_rows.shape[1], device=pool.device)
        return step

    @staticmethod
    def _context(chunk: Any, device: torch.device) -> DeviceContext:
        if chunk.head_units is None or chunk.key_positions is None:
            return DeviceContext(chunk.start, chunk.stop, None, None)
        queries = torch.arange(chunk.past, chunk.past + chunk.stop - chunk.start, device=device)
        keys = torch.from_numpy(chunk.key_positions).to(device)
        return DeviceContext(
            chunk.start, chunk.stop, torch.from_numpy(chunk.head_units).to(device), keys <= queries[:, None]
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of one layer over the packed tokens.

        Args:
          layer: index of the layer in the pool.
          query: ``[num_heads, num_tokens, head_dim]``, after RoPE.
          key, value: ``[num_kv_heads, num_tokens, head_dim]``, K after RoPE.
          scaling: factor on the logits.

        Returns:
          ``[num_tokens, num_heads, head_dim]``.
        """
        num_heads, num_tokens, _ = query.shape
        rows = self._write_rows + layer * 2 * self.num_kv_heads * self.tokens_per_block
        for field, states in enumerate((key, value)):
            source = states.transpose(0, 1).reshape(-1, self.head_dim).to(self._rows.dtype)
            self._rows.index_copy_(0, rows[field].reshape(-1), source)
        output = query.new_empty((num_tokens, num_heads, self.head_dim))
        for chunk in self._contexts:
            part = slice(chunk.start, chunk.stop)
            if chunk.head_units is None or chunk.mask is None:
                k, v = key[:, part], value[:, part]
            else:
                num_keys = chunk.mask.shape[1]
                k, v = (s[:, :num_keys] for s in self._gather.keys_and_values(chunk.head_units, layer))
            attended = scaled_dot_product_attention(
                query[None, :, part],
                k[None],
                v[None],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                scale=scaling,
                enable_gqa=True,
            )
            output[part] = attended[0].transpose(0, 1)
        if self._decode is not None and self._first_decode < num_tokens:
            part = slice(self._first_decode, num_tokens)
            output[part] = self._decode.attend(layer, query[:, part].transpose(0, 1))
        for index, group in enumerate(self._groups):
            # The queries that share a KV head become the rows of one small product.
            grouped = query[:, group.tokens].view(self.num_kv_heads, -1, len(group.tokens), self.head_dim)
            k, v = self._gather.keys_and_values(group.head_units, layer)
            grouped = grouped.permute(2, 0, 1, 3)
            if self._masses:
                weights = (grouped @ k.transpose(-1, -2) * scaling + group.bias).softmax(-1)
                attended = weights @ v
                self._masses[index] += weights.float().mean((1, 2)).unflatten(-1, (-1, self.tokens_per_block)).sum(-1)
            else:
                attended = scaled_dot_product_attention(grouped, k, v, attn_mask=group.bias, scale=scaling)
            output[group.tokens] = attended.reshape(len(group.tokens), num_heads, self.head_dim)
        return output

    def block_attention(self) -> torch.Tensor:
        """Attention per physical block once every layer has attended, float32 ``[num_blocks]``, mean over layers."""
        total = torch.zeros(self.num_blocks, device=self._rows.device)
        for group, mass in zip(self._groups, self._masses, strict=True):
            blocks = group.head_units[0, :, 0] // (2 * self.num_layers * self.num_kv_heads)
            total.index_put_((blocks.flatten(),), mass.flatten() / self.num_layers, accumulate=True)
        return total


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    memshare_step: PagedStep | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query ``[1, heads, tokens, head_dim]`` -> ``[1, tokens, heads, head_dim]``.

    Raises:
      RuntimeError: called outside a step of the torch runner.
    """
    if memshare_step is None:
        raise RuntimeError(f"attention {IMPLEMENTATION} runs inside the torch runner only: memshare_step is missing")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = memshare_step.attend(int(module.layer_idx), query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return output[None], None
