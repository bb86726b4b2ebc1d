// Signatures of the tokens of some pages. The specification is trtllm_memshare/search/signatures.py.
#pragma once

#include "page_signature_shape.h"

namespace memshare {

constexpr int kMaxHeadDim = 256;
constexpr float kLeastNorm = 1e-12f; // as torch.nn.functional.normalize: zeros stay zero

// Thread blocks per multiprocessor of the kernels that learn the shape at launch: leaves 64 registers to a thread. Left
// to itself the compiler makes room for five, as shared memory would allow, and spills in fp16.
constexpr int kMinSignatureBlocksAnyShape = 4;

MEMSHARE_HD float larger(float a, float b)
{
    return a > b ? a : b;
}

__device__ __forceinline__ float sum_over_warp(float value)
{
MEMSHARE_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(~0u, value, offset);
    }
    return value;
}

// One token's vector of one layer and head, by one warp: un-rotated if it is K, brought to length 1, written to
// unit[d][token]. A vector that is not there is all zeros.
template <class Element>
__device__ __forceinline__ void write_unit(typename Element::Bits const* source, bool is_there, int position,
    float const* inv_freq, PoolShape const& shape, int field, float (*unit)[kSignatureTokens], int token)
{
    int const lane = threadIdx.x % 32;
    float square = 0.0f;
    for (int d = lane; d < shape.head_dim; d += 32) {
        float const x = is_there ? Element::decode(source[d]) : 0.0f;
        square = fused_multiply_add(x, x, square);
    }
    float const scale = 1.0f / larger(sqrtf(sum_over_warp(square)), kLeastNorm);
    int const half = field == 0 ? shape.rotary_dim / 2 : 0;
    for (int d = lane; d < half; d += 32) {
        float const x = is_there ? scale * Element::decode(source[d]) : 0.0f;
        float const y = is_there ? scale * Element::decode(source[half + d]) : 0.0f;
        float cosine, sine;
        cos_sin_of_turns(-position * (inv_freq[d] * 0.15915494309189533577), cosine, sine);
        unit[d][token] = fused_multiply_add(x, cosine, -(y * sine));
        unit[half + d][token] = fused_multiply_add(y, cosine, x * sine);
    }
    for (int d = 2 * half + lane; d < shape.head_dim; d += 32) {
        unit[d][token] = is_there ? scale * Element::decode(source[d]) : 0.0f;
    }
}

// kSignatureTokens tokens of page blockIdx.x, from blockIdx.y * kSignatureTokens on.
//
// A thread has a column of the projection and every fourth vector; its products with eight tokens share each element
// of the matrix that it loads. Parts are added in order, so the same input gives the same bits.
template <class Element>
__device__ __forceinline__ void sign_tokens(long long const* fields, int const* num_blocks, int const* block_ids,
    int const* positions, float const* inv_freq, float const* matrix, float* signatures, PoolShape const& shape,
    FieldStrides const& strides, SignatureShape const& chosen)
{
    __shared__ float units[kSignatureParts][kMaxHeadDim][kSignatureTokens];
    __shared__ float sums[kSignatureParts][kSignatureTokens][kMaxWidth];
    int const column = threadIdx.x % kMaxWidth;
    int const part = threadIdx.x / kMaxWidth;
    int const lane = threadIdx.x % 32;
    int const first = blockIdx.y * kSignatureTokens;
    int const block = block_ids[blockIdx.x];
    int const position = chosen.field == 0 ? positions[blockIdx.x] : 0;
    bool const inside = block >= 0 && block < *num_blocks;
    int const num_vectors = shape.num_layers * shape.num_kv_heads;
    float totals[kSignatureTokens] = {};
    for (int base = 0; base < num_vectors; base += kSignatureParts) {
        int const vector = base + part;
        bool const has_vector = vector < num_vectors;
        auto const* vectors = reinterpret_cast<typename Element::Bits const*>(
                                  fields[has_vector ? vector / shape.num_kv_heads : 0])
            + (inside ? block : 0) * strides.block + vector % shape.num_kv_heads * strides.head;
        for (int token = column / 32; token < kSignatureTokens; token += kMaxWidth / 32) {
            int const slot = first + token;
            bool const is_there = inside && has_vector && slot < shape.tokens_per_block;
            write_unit<Element>(vectors + (is_there ? slot : 0) * strides.token, is_there, position + slot, inv_freq,
                shape, chosen.field, units[part], token);
        }
        __syncthreads();
        if (has_vector && column < chosen.width) {
            float const* row = matrix + static_cast<long long>(vector) * shape.head_dim * chosen.width + column;
            for (int d = 0; d < shape.head_dim; ++d) {
                float const weight = row[d * chosen.width];
MEMSHARE_UNROLL
                for (int token = 0; token < kSignatureTokens; ++token) {
                    totals[token] = fused_multiply_add(units[part][d][token], weight, totals[token]);
                }
            }
        }
        __syncthreads();
    }
MEMSHARE_UNROLL
    for (int token = 0; token < kSignatureTokens; ++token) {
        sums[part][token][column] = totals[token];
    }
    __syncthreads();
    int const token = threadIdx.x / 32; // a warp for each
    float values[kMaxWidth / 32];
    float square = 0.0f;
MEMSHARE_UNROLL
    for (int i = 0; i < kMaxWidth / 32; ++i) {
        values[i] = 0.0f;
        for (int from = 0; from < kSignatureParts; ++from) {
            values[i] += sums[from][token][lane + 32 * i];
        }
        square = fused_multiply_add(values[i], values[i], square);
    }
    float const scale = inside ? 1.0f / larger(sqrtf(sum_over_warp(square)), kLeastNorm) : float_of_bits(0x7fc00000u);
    int const slot = first + token;
MEMSHARE_UNROLL
    for (int i = 0; i < kMaxWidth / 32; ++i) {
        if (slot < shape.tokens_per_block && lane + 32 * i < chosen.width) {
            long long const row = static_cast<long long>(blockIdx.x) * shape.tokens_per_block + slot;
            signatures[row * chosen.width + lane + 32 * i] = scale * values[i];
        }
    }
}

// Grid: pages by num_token_groups(shape) blocks of kSignatureThreads threads.
//
// fields: int64 [chosen layers], address of the field in block 0 of each; num_blocks: int32 [1]. block_ids, positions:
// int32 [pages], position at which a page's first token was written; it is not read for V. inv_freq: float32
// [rotary_dim / 2]; it is not read for V. matrix: float32 [chosen layers, num_kv_heads, head_dim, width]. signatures:
// float32 [pages, tokens_per_block, width]; NaN for a block out of the pool. shape: its layers are the chosen ones.
template <class Element>
__global__ void __launch_bounds__(kSignatureThreads, kMinSignatureBlocksAnyShape) page_signatures(
    long long const* __restrict__ fields, int const* __restrict__ num_blocks, int const* __restrict__ block_ids,
    int const* __restrict__ positions, float const* __restrict__ inv_freq, float const* __restrict__ matrix,
    float* __restrict__ signatures, PoolShape shape, FieldStrides strides, SignatureShape chosen)
{
    sign_tokens<Element>(
        fields, num_blocks, block_ids, positions, inv_freq, matrix, signatures, shape, strides, chosen);
}

} // namespace memshare
