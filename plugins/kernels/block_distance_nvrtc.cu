// Entry point for NVRTC, which compiles the kernel for one model: the shape is a constant, and divisions by it vanish.
// Given on the command line: MEMSHARE_ELEMENT, MEMSHARE_COUNT (elements of a vector), MEMSHARE_INTERLEAVED and the
// five numbers of MEMSHARE_SHAPE. Without the last it is the plugin library's kernel, to see what that needs.
#include "block_distance.cuh"

#if defined(MEMSHARE_SHAPE)
#define MEMSHARE_MIN_BLOCKS memshare::kMinBlocks
#define MEMSHARE_SHAPE_ARGUMENT
#else
#define MEMSHARE_MIN_BLOCKS memshare::kMinBlocksAnyShape<memshare::MEMSHARE_ELEMENT>
#define MEMSHARE_SHAPE_ARGUMENT , memshare::PoolShape shape
#endif

extern "C" __global__ void __launch_bounds__(memshare::kMaxThreads, MEMSHARE_MIN_BLOCKS) block_distance(
    long long const* __restrict__ pool_pointers, int const* __restrict__ num_blocks, int const* __restrict__ new_rows,
    int const* __restrict__ old_rows, int const* __restrict__ position_delta, float const* __restrict__ inv_freq,
    float4* __restrict__ distances MEMSHARE_SHAPE_ARGUMENT)
{
#if defined(MEMSHARE_SHAPE)
    constexpr memshare::PoolShape shape{MEMSHARE_SHAPE};
    static_assert(memshare::is_supported(shape), "no kernel takes this shape");
#endif
    memshare::compare_pair<memshare::MEMSHARE_ELEMENT, MEMSHARE_COUNT, MEMSHARE_INTERLEAVED>(
        pool_pointers, num_blocks, new_rows, old_rows, position_delta, inv_freq, distances, shape);
}
