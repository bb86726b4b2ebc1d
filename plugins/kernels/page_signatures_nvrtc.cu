// Entry point for NVRTC, which compiles it for one model. Given on the command line: MEMSHARE_ELEMENT, the five
// numbers of MEMSHARE_SHAPE, whose layers are the chosen ones, the three of MEMSHARE_STRIDES, and MEMSHARE_CHOSEN: field,
// width.
#include "page_signatures.cuh"

// Grid: pages by ceil(tokens_per_block / kSignatureTokens) blocks of kSignatureThreads threads.
//
// fields: int64 [chosen layers], address of the field in block 0 of each; num_blocks: int32 [1]. block_ids, positions:
// int32 [pages], position at which a page's first token was written; it is not read for V. inv_freq: float32
// [rotary_dim / 2]. matrix: float32 [chosen layers, num_kv_heads, head_dim, width]. signatures: float32 [pages,
// tokens_per_block, width]; NaN for a block out of the pool.
extern "C" __global__ void __launch_bounds__(memshare::kSignatureThreads) page_signatures(
    long long const* __restrict__ fields, int const* __restrict__ num_blocks, int const* __restrict__ block_ids,
    int const* __restrict__ positions, float const* __restrict__ inv_freq, float const* __restrict__ matrix,
    float* __restrict__ signatures)
{
    constexpr memshare::PoolShape shape{MEMSHARE_SHAPE};
    constexpr memshare::FieldStrides strides{MEMSHARE_STRIDES};
    constexpr memshare::SignatureShape chosen{MEMSHARE_CHOSEN};
    static_assert(memshare::is_supported(shape), "no kernel takes this shape");
    static_assert(chosen.width <= memshare::kMaxWidth, "a signature has at most 64 numbers");
    memshare::sign_tokens<memshare::MEMSHARE_ELEMENT>(
        fields, num_blocks, block_ids, positions, inv_freq, matrix, signatures, shape, strides, chosen);
}
