#include "page_signatures_launch.h"

#include "element_dispatch.h"
#include "kernel_launch.h"
#include "page_signatures.cuh"

namespace memshare {

cudaError_t page_signatures_launch(long long const* fields, int const* num_blocks, int const* block_ids,
    int const* positions, float const* inv_freq, float const* matrix, float* signatures, int num_pages,
    PoolShape const& shape, FieldStrides const& strides, SignatureShape const& chosen, KvDtype dtype,
    cudaStream_t stream)
{
    if (num_pages < 0 || !is_supported(shape) || !is_supported(chosen)) {
        return cudaErrorInvalidValue;
    }
    return with_element(dtype, cudaErrorInvalidValue, [&](auto element) {
        if (num_pages == 0) {
            return cudaSuccess;
        }
        dim3 const grid(static_cast<unsigned int>(num_pages), static_cast<unsigned int>(num_token_groups(shape)));
        return launch_kernel(page_signatures<decltype(element)>, grid, kSignatureThreads, stream, fields, num_blocks,
            block_ids, positions, inv_freq, matrix, signatures, shape, strides, chosen);
    });
}

} // namespace memshare
