// The kernel: one thread block for each pair and layer.
#pragma once

#include "block_distance.h"

namespace memshare {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 2; // per multiprocessor: leaves 128 registers to a thread

// The same for kernels that learn the shape at launch. Before sm_89, which decodes e4m3 by an instruction, full vectors
// of it do not fit 128 registers beside a shape that is no constant.
template <class Element> constexpr int kMinBlocksAnyShape = kMinBlocks;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
template <> constexpr int kMinBlocksAnyShape<Fp8E4M3> = 1;
#endif

// Sums over the block in a fixed order: within a warp halves are added to halves, then the warps in order.
// The result is thread 0's.
__device__ __forceinline__ Sums block_sum(Sums sums)
{
    __shared__ Sums warp_sums[kMaxThreads / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Sums const other{__shfl_down_sync(~0u, sums.dk, offset), __shfl_down_sync(~0u, sums.k, offset),
            __shfl_down_sync(~0u, sums.dv, offset), __shfl_down_sync(~0u, sums.v, offset)};
        sums = sums + other;
    }
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = sums;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned int warp = 1; warp < blockDim.x / 32; ++warp) {
            sums = sums + warp_sums[warp];
        }
    }
    return sums;
}

// One pair and layer by one thread block.
template <class Element, int kCount, bool kInterleaved>
__device__ __forceinline__ void compare_pair(long long const* pool_pointers, int const* num_blocks, int const* new_rows,
    int const* old_rows, int const* position_delta, float const* inv_freq, float4* distances, PoolShape const& shape)
{
    int const pair = blockIdx.x / shape.num_layers;
    int const layer = blockIdx.x % shape.num_layers;
    int const first = pair * shape.tokens_per_block;
    long long const num_rows = static_cast<long long>(*num_blocks) * shape.tokens_per_block;
    bool present = false;
    bool invalid = false;
    for (int token = threadIdx.x; token < shape.tokens_per_block; token += blockDim.x) {
        RowPair const rows = classify(new_rows[first + token], old_rows[first + token], num_rows);
        present |= rows == RowPair::kPresent;
        invalid |= rows == RowPair::kInvalid;
    }
    invalid = __syncthreads_or(invalid);
    present = __syncthreads_or(present);
    if (invalid || !present) {
        if (threadIdx.x == 0) {
            float const value = invalid ? float_of_bits(0x7fc00000u) : 0.0f;
            distances[blockIdx.x] = make_float4(value, value, value, value);
        }
        return;
    }
    auto const* pool = reinterpret_cast<typename Element::Bits const*>(*pool_pointers);
    Sums const sums = block_sum(thread_sums<Element, kCount, kInterleaved>(shape, pool, layer, new_rows + first,
        old_rows + first, position_delta + first, inv_freq, threadIdx.x, blockDim.x));
    if (threadIdx.x == 0) {
        distances[blockIdx.x] = make_float4(sums.dk, sums.k, sums.dv, sums.v);
    }
}

// Grid: num_pairs * num_layers blocks of num_threads(shape, kCount) threads; layers of a pair are neighbours, as in the
// pool.
//
// pool_pointers: int64 [1], address of the pool. num_blocks: int32 [1]. Both are read on the device, so that one
// captured graph serves a pool that is allocated later.
// new_rows, old_rows, position_delta: int32 [num_pairs, tokens_per_block]. inv_freq: float32 [rotary_dim / 2].
// distances: float32 [num_pairs, num_layers, 4]; zero for a pair without rows, NaN for one with a row out of the pool.
template <class Element, int kCount, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocksAnyShape<Element>) block_distance(
    long long const* __restrict__ pool_pointers, int const* __restrict__ num_blocks, int const* __restrict__ new_rows,
    int const* __restrict__ old_rows, int const* __restrict__ position_delta, float const* __restrict__ inv_freq,
    float4* __restrict__ distances, PoolShape shape)
{
    compare_pair<Element, kCount, kInterleaved>(
        pool_pointers, num_blocks, new_rows, old_rows, position_delta, inv_freq, distances, shape);
}

} // namespace memshare
