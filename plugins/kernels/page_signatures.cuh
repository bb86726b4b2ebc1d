// Signatures of the tokens of some pages. The specification is trtllm_memshare/search/signatures.py.
#pragma once

#include "block_distance.h"

namespace memshare {

constexpr int kSignatureTokens = 8; // of a page, by one thread block
constexpr int kSignatureParts = 4;  // vectors of a token that a thread block takes side by side
constexpr int kMaxWidth = 64;       // numbers of a signature
constexpr int kSignatureThreads = kSignatureParts * kMaxWidth;
constexpr int kMaxHeadDim = 256;
constexpr float kLeastNorm = 1e-12f; // as torch.nn.functional.normalize: zeros stay zero

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

// Elements from one block, KV head and token of a layer's field to the next; those of a vector lie side by side.
//
//   our pool         block num_layers * 2 * num_kv_heads * tokens_per_block * head_dim, head tokens_per_block * head_dim
//   vLLM's cache     [blocks, heads, tokens, K then V] in any order: token 2 * head_dim, or num_kv_heads times that
struct FieldStrides {
    long long block, head, token;
};

// What a signature is taken of.
struct SignatureShape {
    int field; // 0 = K, un-rotated; 1 = V
    int width;
};

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
    int const position = positions[blockIdx.x];
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

} // namespace memshare
