// Entry point for NVRTC, which compiles the kernel for one model: the shape is a constant, and divisions by it vanish.
// Given on the command line: MEMSHARE_ELEMENT, MEMSHARE_COUNT (elements of a vector), MEMSHARE_INTERLEAVED and the
// five numbers of MEMSHARE_SHAPE.
#include "block_distance.cuh"

extern "C" __global__ void __launch_bounds__(memshare::kMaxThreads, memshare::kMinBlocks) block_distance(
    long long const* __restrict__ pool_pointers, int const* __restrict__ num_blocks, int const* __restrict__ new_rows,
    int const* __restrict__ old_rows, int const* __restrict__ position_delta, float const* __restrict__ inv_freq,
    float4* __restrict__ distances)
{
    constexpr memshare::PoolShape kShape{MEMSHARE_SHAPE};
    static_assert(memshare::is_supported(kShape), "no kernel takes this shape");
    memshare::compare_pair<memshare::MEMSHARE_ELEMENT, MEMSHARE_COUNT, MEMSHARE_INTERLEAVED>(
        pool_pointers, num_blocks, new_rows, old_rows, position_delta, inv_freq, distances, kShape);
}
