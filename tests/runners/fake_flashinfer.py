"""A stand-in for FlashInfer's paged decode that computes with PyTorch and enforces what the real one requires."""

from __future__ import annotations

import torch

__version__ = "fake"
_used: set[int] = set()  # workspaces seen


class BatchDecodeWithPagedKVCacheWrapper:
    """The part of FlashInfer's class that the runner uses (flashinfer/decode.py, 0.6)."""

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):
        assert kv_layout == "HND"
        assert float_workspace_buffer.dtype == torch.uint8
        if float_workspace_buffer.data_ptr() not in _used:
            assert not float_workspace_buffer.any(), "the workspace must be zero for its first use"
        _used.add(float_workspace_buffer.data_ptr())
        self._fixed = None
        if use_cuda_graph:
            self._fixed, self._room = len(paged_kv_last_page_len_buffer), len(paged_kv_indices_buffer)
            assert len(paged_kv_indptr_buffer) == self._fixed + 1
        self._plan = None

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
             pos_encoding_mode="NONE", q_data_type="float16", kv_data_type=None, sm_scale=None):  # fmt: skip
        batch = len(last_page_len)
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        assert len(indptr) == batch + 1
        assert int(indptr[-1]) == len(indices)
        assert (indptr.diff() > 0).all()
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert num_qo_heads % num_kv_heads == 0
        assert pos_encoding_mode == "NONE"
        # The real one asserts nothing, and reads wrong numbers.
        assert kv_data_type in (q_data_type, torch.float8_e4m3fn)
        if self._fixed is not None:
            assert batch == self._fixed, "the batch size is frozen under a CUDA graph"
            assert len(indices) <= self._room
        self._plan = indptr.tolist(), indices.long(), last_page_len.tolist(), sm_scale
        self._types = q_data_type, kv_data_type
        self._shape = num_qo_heads, num_kv_heads, page_size, head_dim

    def run(self, query, paged_kv_cache):
        keys, values = paged_kv_cache
        indptr, indices, last_page_len, scale = self._plan
        num_heads, num_kv_heads, page_size, head_dim = self._shape
        assert query.shape == (len(last_page_len), num_heads, head_dim)
        assert query.is_contiguous()
        assert (query.dtype, keys.dtype) == self._types
        for cache in (keys, values):
            assert cache.shape[1:] == (num_kv_heads, page_size, head_dim)
            assert cache.stride(-1) == 1
        assert keys.stride() == values.stride()
        out = torch.empty_like(query)
        for row, last in enumerate(last_page_len):
            pages = indices[indptr[row] : indptr[row + 1]]
            length = (len(pages) - 1) * page_size + last
            k, v = (c[pages].transpose(0, 1).flatten(1, 2)[:, :length].to(query.dtype) for c in (keys, values))
            out[row] = torch.nn.functional.scaled_dot_product_attention(
                query[row][None, :, None], k[None], v[None], scale=scale, enable_gqa=True
            )[0, :, 0]
        return out
