// The kernels as NVRTC is given them for one model, for callers without C++.
#include "cuda_runtime_api.h"

#include "page_signatures_nvrtc.cu"

extern "C" int memshare_page_signatures(void const* pool, int num_blocks, int const* block_ids, int const* positions,
    float const* inv_freq, int const* layers, float const* matrix, float* signatures, int num_pages)
{
    constexpr memshare::PoolShape shape{MEMSHARE_SHAPE};
    auto const address = reinterpret_cast<long long>(pool);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(num_pages),
        (shape.tokens_per_block + memshare::kSignatureTokens - 1) / memshare::kSignatureTokens);
    config.blockDim = dim3(memshare::kSignatureThreads);
    return cudaLaunchKernelEx(
        &config, page_signatures, &address, &num_blocks, block_ids, positions, inv_freq, layers, matrix, signatures);
}

extern "C" int memshare_nearest_later(
    float const* signatures, int const* jobs, float* best, int* nearest, int num_jobs, int blocks, int threads)
{
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(blocks), static_cast<unsigned int>(num_jobs));
    config.blockDim = dim3(static_cast<unsigned int>(threads));
    return cudaLaunchKernelEx(
        &config, nearest_later, signatures, reinterpret_cast<memshare::NearestJob const*>(jobs), best, nearest);
}
