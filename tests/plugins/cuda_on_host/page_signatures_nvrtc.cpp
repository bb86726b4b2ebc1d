// What NVRTC is given for one model: the shape comes from MEMSHARE_SHAPE, MEMSHARE_STRIDES and MEMSHARE_CHOSEN.
#include "cuda_runtime_api.h"

#include "page_signatures_nvrtc.cu"

extern "C" int memshare_page_signatures_variant(long long const* fields, int num_blocks, int const* block_ids,
    int const* positions, float const* inv_freq, float const* matrix, float* signatures, int num_pages)
{
    constexpr memshare::PoolShape shape{MEMSHARE_SHAPE};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(
        static_cast<unsigned int>(num_pages), static_cast<unsigned int>(memshare::num_token_groups(shape)));
    config.blockDim = dim3(memshare::kSignatureThreads);
    return cudaLaunchKernelEx(
        &config, page_signatures, fields, &num_blocks, block_ids, positions, inv_freq, matrix, signatures);
}
