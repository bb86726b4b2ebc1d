// What NVRTC is given for one model: the shape comes from MEMSHARE_SHAPE.
#include "cuda_runtime_api.h"

#include "block_distance_nvrtc.cu"

extern "C" int memshare_block_distance_variant(void const* pool, int num_blocks, int const* new_rows,
    int const* old_rows, int const* position_delta, float const* inv_freq, float* distances, int num_pairs,
    int num_groups, int num_threads)
{
    auto const address = reinterpret_cast<long long>(pool);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(num_pairs), static_cast<unsigned int>(num_groups));
    config.blockDim = dim3(static_cast<unsigned int>(num_threads));
    return cudaLaunchKernelEx(&config, block_distance, &address, &num_blocks, new_rows, old_rows, position_delta,
        inv_freq, reinterpret_cast<float4*>(distances));
}
