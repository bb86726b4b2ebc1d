// The kernel: one thread block for each pair and group of layers.
#pragma once

#include "block_distance.h"

namespace memshare {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 2; // per multiprocessor: leaves 128 registers to a thread

// The same for kernels that learn the shape at launch. Full vectors of e4m3 do not fit 128 registers beside a shape that
// is no constant; a block of theirs has 128 threads where a pool has 32-token blocks, so that several still fit.
template <class Element> constexpr int kMinBlocksAnyShape = kMinBlocks;
template <> constexpr int kMinBlocksAnyShape<Fp8E4M3> = 1;

// Sums over a warp in a fixed order: halves are added to halves. The result is lane 0's.
__device__ __forceinline__ Sums warp_sum(Sums sums)
{
MEMSHARE_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) {
        Sums const other{__shfl_down_sync(~0u, sums.dk, offset), __shfl_down_sync(~0u, sums.k, offset),
            __shfl_down_sync(~0u, sums.dv, offset), __shfl_down_sync(~0u, sums.v, offset)};
        sums = sums + other;
    }
    return sums;
}

// One pair, and of the layers blockIdx.y, blockIdx.y + gridDim.y, ..., by one thread block.
//
// A thread has one token and one place in the head at a time and goes with them through its layers and their heads, so
// that angles are worked out once. Before the first element of the pool arrives it has waited for two loads in a row:
// rows, positions, frequencies and the pool's address, all asked for at once; then the pool, while it works out angles.
template <class Element, int kCount, bool kInterleaved>
__device__ __forceinline__ void compare_pair(long long const* pool_pointers, int const* num_blocks, int const* new_rows,
    int const* old_rows, int const* position_delta, float const* inv_freq, float4* distances, PoolShape const& shape)
{
    using Bits = typename Element::Bits;
    __shared__ Sums warp_sums[kMaxLayersOfBlock][kMaxThreads / 32];
    int const thread = threadIdx.x;
    int const threads = blockDim.x;
    int const units = shape.head_dim / 2 / kCount;
    int const size = shape.tokens_per_block;
    long long const head_stride = static_cast<long long>(size) * shape.head_dim;
    long long const value_stride = head_stride * shape.num_kv_heads;
    // From the last head of a layer to the first of this block's next one.
    long long const layer_stride = 2 * value_stride * gridDim.y - value_stride + head_stride;
    long long const first = static_cast<long long>(blockIdx.x) * size;
    new_rows += first;
    old_rows += first;
    position_delta += first;
    distances += static_cast<long long>(blockIdx.x) * shape.num_layers;

    auto const* pool = reinterpret_cast<Bits const*>(*pool_pointers);
    long long const num_rows = static_cast<long long>(*num_blocks) * size;
    // There are at least as many threads as tokens, so that together they see every row. `|`, since `||` would wait for
    // the first load before it asks for the second.
    int const seen = thread < size ? thread : size - 1;
    bool const named = (new_rows[seen] != -1) | (old_rows[seen] != -1);
    for (int base = 0; base < size * units; base += threads) {
        // The last round may have more threads than units; those only take part in the sums.
        int const index = base + thread;
        bool const has_unit = index < size * units;
        int const token = has_unit ? index / units : size - 1;
        int const new_row = new_rows[token];
        int const old_row = old_rows[token];
        int const delta = position_delta[token];
        Unit<kCount, kInterleaved> const unit(shape, index % units, inv_freq);
        if (base == 0 && !__syncthreads_or(named)) { // padding
            for (int layer = blockIdx.y + thread * gridDim.y; layer < shape.num_layers; layer += threads * gridDim.y) {
                distances[layer] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            return;
        }
        RowPair const rows = has_unit ? classify(new_row, old_row, num_rows) : RowPair::kAbsent;
        bool const present = rows == RowPair::kPresent;
        Bits const* newer = pool + row_offset(shape, present ? new_row : 0, blockIdx.y);
        Bits const* older = pool + row_offset(shape, present ? old_row : 0, blockIdx.y);
        HeadVectors<Element, kCount> vectors;
        if (present) {
            vectors.load(newer, older, value_stride, unit);
        }
        Rotation<kCount, kInterleaved> const rotation(unit, delta);
        int slot = 0;
MEMSHARE_ROLLED
        for (int layer = blockIdx.y; layer < shape.num_layers; layer += gridDim.y, ++slot) {
            // A row out of the pool is not read; its NaN reaches all sums of the pair.
            float const none = rows == RowPair::kInvalid ? float_of_bits(0x7fc00000u) : 0.0f;
            Sums sums{none, none, none, none};
            if (present) {
                bool const is_last = layer + static_cast<int>(gridDim.y) >= shape.num_layers;
MEMSHARE_ROLLED
                for (int head = 1; head <= shape.num_kv_heads; ++head) {
                    vectors.add_to(sums, rotation);
                    long long const stride = head < shape.num_kv_heads ? head_stride : layer_stride;
                    newer += stride;
                    older += stride;
                    if (head < shape.num_kv_heads || !is_last) {
                        vectors.load(newer, older, value_stride, unit);
                    }
                }
            }
            sums = warp_sum(sums);
            if (thread % 32 == 0) {
                Sums& mine = warp_sums[slot][thread / 32];
                mine = base == 0 ? sums : mine + sums;
            }
        }
    }
    __syncthreads();
    int const layer = blockIdx.y + thread * gridDim.y;
    if (layer < shape.num_layers) {
        Sums sums = warp_sums[thread][0];
MEMSHARE_UNROLL
        for (int warp = 1; warp < kMaxThreads / 32; ++warp) {
            if (warp < threads / 32) {
                sums = sums + warp_sums[thread][warp];
            }
        }
        distances[layer] = make_float4(sums.dk, sums.k, sums.dv, sums.v);
    }
}

// Grid: num_pairs by num_layer_groups blocks of num_threads(shape, kCount) threads.
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
